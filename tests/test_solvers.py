"""Samplers beyond the official ones, against exact solutions and independent formulas.

In one dimension the flow dz/dt = (x̂ - z) / (1 - t) with the exact x̂ = E[x | z] keeps the order of points, so it takes
the p-quantile of the noise to the p-quantile of the data: an exact answer that needs no integration.
"""

import dataclasses
import math
from statistics import NormalDist

import numpy as np
import pytest

from elf_rt.errors import InputError
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.sampling import schedule
from elf_rt.sampling.schedule import Row, Table

NOISE_SCALE = 2.0
CENTRES, SHARES, WIDTH = np.array([-1.5, 0.4, 2.0]), np.array([0.3, 0.5, 0.2]), 0.5
CONFIG = ModelConfig(
    depth=1,
    hidden_size=8,
    num_heads=1,
    head_dim=8,
    mlp_dim=8,
    latent_dim=1,
    bottleneck_dim=4,
    vocab_size=8,
    max_length=8,
    noise_scale=NOISE_SCALE,
    t_eps=1e-9,
)


def posterior_mean(z: np.ndarray, t: float) -> np.ndarray:
    """E[x | t x + (1 - t) noise_scale ε = z] for x from the mixture of normal distributions."""
    variance = (t * WIDTH) ** 2 + ((1 - t) * NOISE_SCALE) ** 2
    off = z[:, None] - t * CENTRES
    log_share = np.log(SHARES) - off**2 / (2 * variance)
    share = np.exp(log_share - log_share.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    return np.sum(share * (CENTRES + t * WIDTH**2 / variance * off), axis=1)


def exact_flow(z0: np.ndarray) -> np.ndarray:
    """The mixture's quantile at each start's probability, by bisection."""

    def cdf(x: float) -> float:
        return sum(p * NormalDist(m, WIDTH).cdf(x) for p, m in zip(SHARES, CENTRES, strict=True))

    out = []
    for z in z0:
        p, low, high = NormalDist(0, NOISE_SCALE).cdf(z), -10.0, 10.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if cdf(middle) < p else (low, middle)
        out.append(low)
    return np.array(out)


def run(table: Table, z0: np.ndarray) -> np.ndarray:
    """A table of one sample in float64, started at z0 (points), with the exact x̂ as the network."""
    z, x_last = z0.copy(), np.zeros_like(z0)
    for j in range(1, len(table.t)):
        a, b, c, d, _ = table.coef[j]
        assert d == 0
        x = np.zeros_like(z0) if j == 1 else posterior_mean(z, table.t[j - 1])
        z, x_last = a * z + b * x + c * x_last, x
    return z


def make(params: SamplingParams, config: ModelConfig = CONFIG) -> Table:
    (grid,) = schedule.make_grid(params, config, np.array([0], np.uint64))
    return schedule.make_table(params, config, grid, conditional=True)


@pytest.mark.parametrize(("sampler", "order"), [("ode", 1), ("ab2", 2)])
def test_order_of_convergence(sampler: str, order: int) -> None:
    z0 = np.linspace(-4, 4, 33)
    exact = exact_flow(z0)
    errors = []
    for steps in (16, 32, 64, 128):
        table = make(SamplingParams(steps=steps, sampler=sampler, schedule="uniform"))
        errors.append(np.sqrt(np.mean((run(table, z0) - exact) ** 2)))
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all(np.abs(rates[1:] - order) < 0.25), (errors, rates)


def test_second_order_pays_at_few_steps() -> None:
    """On the grid and the step counts that are used: the same network calls, less than half of the error."""
    z0 = np.linspace(-4, 4, 33)
    exact = exact_flow(z0)
    for steps in (8, 16):
        first, second = (
            np.abs(run(make(SamplingParams(steps=steps, sampler=sampler, schedule="uniform")), z0) - exact).mean()
            for sampler in ("ode", "ab2")
        )
        assert second < 0.5 * first


def test_second_order_is_exact_where_the_estimate_is_a_line_in_time() -> None:
    """x̂ = a + b τ gives z' / w' = z / w + ∫ (a + b τ) / (1 - τ)² dτ in closed form; c must reproduce it."""
    a, b, t_last, t, t_next, z = 0.7, -1.3, 0.2, 0.35, 0.6, 0.9
    _, c, _ = schedule.second_order(np.array([t_last, t, t_next]), np.array([t, t_next, 1.0]))
    kappa = (t_next - t) / (1 - t)
    step = (1 - kappa) * z + kappa * (a + b * t) + c * b * (t - t_last)

    def antiderivative(tau: float) -> float:
        return (a + b) / (1 - tau) + b * math.log(1 - tau)

    w, w_next = 1 - t, 1 - t_next
    assert step == pytest.approx(w_next * (z / w + antiderivative(t_next) - antiderivative(t)))


def test_second_order_needs_a_usable_line() -> None:
    t = np.array([0.0, 0.3, 0.3001, 0.5, 0.5])
    c = schedule.second_order(t, np.array([0.3, 0.3001, 0.5, 0.5, 1.0]))
    assert c[0] == 0 and c[-1] == 0  # the first step and the last
    assert c[1] > 0
    assert c[2] == 0  # after a step 2000 times shorter
    assert c[3] == 0  # an empty step changes nothing
    assert np.all(np.isfinite(c))
    # A grid that reaches 1 early, and one of a single step.
    assert np.all(np.isfinite(schedule.second_order(np.array([0.0, 0.5, 1.0]), np.array([0.5, 1.0, 1.0]))))
    assert schedule.second_order(np.zeros(1), np.ones(1)) == 0


def test_second_order_table_uses_the_previous_estimate() -> None:
    ode = make(SamplingParams(steps=6, sampler="ode", schedule="quantile"))
    ab2 = make(SamplingParams(steps=6, sampler="ab2", schedule="quantile"))
    assert np.array_equal(ode.t, ab2.t) and np.array_equal(ode.weights, ab2.weights)
    c = -ab2.coef[:, schedule.C]
    assert np.all(c[3:-1] > 0) and not np.any(c[[0, 1, 2, -1]])
    # Both estimates share the weight that the first-order step gives to one.
    assert np.allclose(ab2.coef[:, schedule.B] - c, ode.coef[:, schedule.B])


def test_quantile_grid() -> None:
    params = SamplingParams(steps=4, schedule="quantile", grid_mean=-1.0, grid_std=0.5)
    grid = schedule.make_grid(params, CONFIG, np.array([3, 4], np.uint64))
    assert np.array_equal(grid[0], grid[1])  # no seed in it
    # 0.6744897501960817 is the upper quartile of the standard normal distribution.
    expected = [1 / (1 + math.exp(1 - 0.5 * q)) for q in (-0.6744897501960817, 0, 0.6744897501960817)]
    assert grid[0] == pytest.approx([0, *expected, 1])


def test_quantile_grid_is_where_random_grids_are_on_average() -> None:
    seeds = np.arange(400, dtype=np.uint64)
    random = schedule.make_grid(SamplingParams(steps=16), CONFIG, seeds)
    static = schedule.make_grid(SamplingParams(steps=16, schedule="quantile"), CONFIG, seeds[:1])[0]
    assert np.abs(np.median(random, axis=0) - static)[:-2].max() < 0.02  # the topmost draw is spread wide
    assert np.diff(static).min() > 10 * np.diff(random, axis=1).min()


def test_logit_normal_grid_takes_another_mean() -> None:
    seeds = np.array([5], np.uint64)
    base, moved = (
        schedule.make_grid(SamplingParams(steps=8, grid_mean=mean), CONFIG, seeds)[0, 1:-1] for mean in (None, -2.0)
    )

    def logit(t: np.ndarray) -> np.ndarray:
        return np.log(t / (1 - t))

    assert logit(moved) == pytest.approx(logit(base) - 0.5)


def test_annealed_gamma() -> None:
    params = SamplingParams(steps=5, sampler="sde", schedule="uniform", gamma=2.0, gamma_power=1.5)
    table = make(params)
    for i in range(4):
        t = i / 5
        alpha = 1 - 2.0 * (1 - t) ** 1.5 * 0.2
        assert table.t[i + 1] == pytest.approx(alpha * t)
        assert table.coef[i + 1, schedule.D] == pytest.approx((1 - alpha) * NOISE_SCALE)
    assert table.coef[5, schedule.D] == 0  # the last step is always the ODE's
    assert not np.array_equal(table.coef, make(params.replace(gamma_power=0.0)).coef)


def test_guidance_interval_makes_fewer_rows() -> None:
    params = SamplingParams(
        steps=8, sampler="ode", schedule="uniform", guidance_scale=2.0, guidance_from=0.2, guidance_until=0.6
    )
    table = make(params)
    assert table.rows == (Row(True, True), Row(False, True))
    # Calls at t = 0, 1/8, .. 7/8; 2/8, 3/8 and 4/8 lie inside.
    assert list(table.calls[1:9]) == [1, 1, 2, 2, 2, 1, 1, 1]
    assert table.weights[3].tolist() == [1, 0]  # combines the call at 1/8
    assert table.weights[4].tolist() == [2, -1]
    assert np.array_equal(table.coef, make(params.replace(guidance_scale=1.0)).coef)


def test_guidance_interval_keeps_self_conditioning_guidance() -> None:
    """Models without guidance tokens: the pair of rows that sees the source stays where the others are left out."""
    config = dataclasses.replace(CONFIG, num_self_cond_cfg_tokens=0)
    params = SamplingParams(steps=2, sampler="ode", schedule="uniform", guidance_scale=1.5, sc_cfg=2.0)
    always = make(params, config=config)
    assert always.weights[2].tolist() == [3.0, -1.5, -1.0, 0.5]
    never = make(params.replace(guidance_from=0.9), config=config)
    assert never.weights[2].tolist() == [2.0, -1.0, 0.0, 0.0]
    assert list(never.calls[1:3]) == [2, 2]


def test_temperature_scales_every_noise_and_nothing_else() -> None:
    warm, cold = (make(SamplingParams(steps=5, sampler="sde", temperature=temperature)) for temperature in (1.0, 0.25))
    assert warm.coef[0, schedule.D] == NOISE_SCALE and np.any(warm.coef[1:, schedule.D] > 0)
    scaled = warm.coef.copy()
    scaled[..., schedule.D] *= 0.25
    assert np.allclose(cold.coef, scaled) and np.array_equal(cold.t, warm.t)


def test_scale_of_the_fed_back_estimate() -> None:
    table = make(SamplingParams(steps=4, x_prev_scale=1.3))
    assert table.coef[:, schedule.X].tolist() == [0, 1.3, 1.3, 1.3, 1.3, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance_from": 0.6, "guidance_until": 0.4},
        {"guidance_until": 1.5},
        {"grid_std": -1.0},
        {"grid_mean": math.nan},
        {"gamma_power": -1.0},
        {"temperature": -0.1},
        {"x_prev_scale": math.inf},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SamplingParams(**wrong)
