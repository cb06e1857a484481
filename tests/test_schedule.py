"""Sampler tables against the official loop, written again here in float64, and their bounds."""

import dataclasses

import numpy as np
import pytest

from elf_rt.errors import InputError
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.sampling import schedule
from elf_rt.sampling.schedule import MAIN, Row

CONFIG = ModelConfig(2, 8, 2, 4, 16, 4, 4, 11, max_length=6, max_input_length=3)


def official(params, grid, z0, eps, net, source=None, mask=None):
    """z at t = 1, step by step as facts of the official sampler say, one sample, float64."""
    hold = (lambda x: x) if mask is None else (lambda x: np.where(mask[:, None], source, x))
    z, x_prev = hold(z0), hold(np.zeros_like(z0))
    if params.sampler == "refine":
        for i in range(len(grid) - 1):
            z = hold(CONFIG.noise_scale * eps[i]) if i and params.gamma == 1 else z
            x_prev = hold(net(z, x_prev, 0.0))
        return x_prev
    for i in range(len(grid) - 1):
        t, t_next = grid[i], grid[i + 1]
        if params.sampler == "sde" and i < len(grid) - 2:
            alpha = np.clip(1 - params.gamma * (t_next - t), 0, 1)
            z, t = hold(alpha * z + (1 - alpha) * CONFIG.noise_scale * eps[i]), alpha * t
        x = hold(net(z, x_prev, t))
        kappa = (t_next - t) / max(1 - t, CONFIG.t_eps)
        z, x_prev = hold((1 - kappa) * z + kappa * x), x
    return z


def by_table(table, z0, eps, net, source=None, mask=None):
    """The table's own rule (the module docstring of elf_rt.sampling.schedule), one sample, float64."""
    hold = (lambda x: x) if mask is None else (lambda x: np.where(mask[:, None], source, x))
    z, x_last, x = z0, np.zeros_like(z0), np.zeros_like(z0)
    for j in range(1, len(table.t)):
        a, b, c, d, keep = table.coef[j]
        x_hat = hold(x * table.weights[j].sum())
        noise = eps[j - 1] if d else 0.0
        z = hold(a * z + b * x_hat + c * x_last + d * noise)
        x_last = x_hat
        if j < len(table.t) - 1:
            x = net(z, keep * x_hat, table.t[j])
    return z


def net(z, x_prev, t):
    return np.tanh(0.7 * z - 0.3 * x_prev + t)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(
    ("sampler", "gamma"), [("ode", 1.0), ("sde", 1.5), ("sde", 9.0), ("refine", 0.0), ("refine", 1.0)]
)
def test_table_is_the_official_sampler(sampler, gamma, steps, held):
    rng = np.random.default_rng(steps)
    params = SamplingParams(sampler=sampler, steps=steps, gamma=gamma)
    grid = schedule.make_grid(params, CONFIG, np.array([5], np.uint64))
    z0, eps = rng.normal(size=(6, 4)), rng.normal(size=(steps, 6, 4))
    source, mask = (rng.normal(size=(6, 4)), np.arange(6) < 2) if held else (None, None)
    table = schedule.make_table(params, CONFIG, grid[0], conditional=held)
    want = official(params, grid[0], z0, eps, net, source, mask)
    np.testing.assert_allclose(by_table(table, z0, eps, net, source, mask), want, rtol=1e-12, atol=1e-12)
    noisy = {"sde": steps - 1, "refine": steps if gamma and steps > 1 else 0}
    assert table.noisy_steps == noisy.get(sampler, 0)


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("s", [0.0, 1.0, 3.0])
def test_guidance_rows_combine_like_the_formulas(w, s):
    config = dataclasses.replace(CONFIG, num_self_cond_cfg_tokens=0)
    value = {Row(a, b): 1.7 + 2.3 * a - 0.9 * b + 5.1 * a * b for a in (False, True) for b in (False, True)}

    def self_conditioned(sees_source):
        plain = value[Row(sees_source, False)]
        return plain + s * (value[Row(sees_source, True)] - plain)

    want = self_conditioned(False) + w * (self_conditioned(True) - self_conditioned(False))
    params = SamplingParams(guidance_scale=w, sc_cfg=s)
    rows = schedule.guidance_rows(params, config, conditional=True)
    weights = schedule.guidance_weights(rows, params, config, np.array([0.3]), conditional=True)[0]
    assert sum(value[row] * weight for row, weight in zip(rows, weights, strict=True)) == pytest.approx(want)
    assert rows[0].sees_source  # the decoding call makes only this row
    assert len(rows) <= (1 if w == 1 else 2) * (1 if s in (0, 1) else 2) + (w == 0)


def test_one_row_is_enough_where_guidance_is_a_token():
    for params, conditional in ((SamplingParams(sc_cfg=3.0), True), (SamplingParams(guidance_scale=2.0), False)):
        assert schedule.guidance_rows(params, CONFIG, conditional=conditional) == (MAIN,)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("s", [0.0, 1.0, 3.0])
def test_in_and_outside_the_guidance_interval_the_formulas_hold(w, s):
    config = dataclasses.replace(CONFIG, num_self_cond_cfg_tokens=0)
    params = SamplingParams(guidance_scale=w, sc_cfg=s, guidance_from=0.4, guidance_until=0.6)
    rows = schedule.guidance_rows(params, config, conditional=True)
    weights = schedule.guidance_weights(rows, params, config, np.array([0.3, 0.5, 0.7]), conditional=True)
    np.testing.assert_allclose(weights.sum(1), 1.0)
    sees_source = np.array([row.sees_source for row in rows])
    np.testing.assert_allclose(weights[:, sees_source].sum(1), [1.0, w, 1.0])  # the guidance scale of each step
    assert rows[0].sees_source


def test_logit_normal_grid_has_the_stated_distribution():
    grid = schedule.make_grid(SamplingParams(steps=65), CONFIG, np.arange(400, dtype=np.uint64))
    assert np.all(np.diff(grid) >= 0) and np.all(grid[:, 0] == 0) and np.all(grid[:, -1] == 1)
    logits = np.log(grid[:, 1:-1] / (1 - grid[:, 1:-1]))
    assert logits.mean() == pytest.approx(-1.5, abs=0.02)
    assert logits.std() == pytest.approx(0.8, abs=0.02)


def test_shifted_grid():
    """As ELF-MMD's teachers have it, 1 - σu / (1 + (σ - 1)u), sorted: with σ = 32 half of the steps end by t = 1/33."""
    u = np.linspace(0, 1, 65)
    want = np.sort(1 - u * 32 / (1 + 31 * u))
    params = SamplingParams(steps=64, schedule="shift", time_shift=32.0)
    grid = schedule.make_grid(params, CONFIG, np.arange(2, dtype=np.uint64))
    np.testing.assert_allclose(grid, [want, want], atol=1e-15)
    assert grid[0, 32] == pytest.approx(1 / 33)


def test_a_sample_has_its_own_grid():
    params = SamplingParams(steps=9)
    together = schedule.make_grid(params, CONFIG, np.array([3, 4], np.uint64))
    np.testing.assert_array_equal(together[1:], schedule.make_grid(params, CONFIG, np.array([4], np.uint64)))
    assert not np.array_equal(together[0], together[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"steps": -3},
        {"sampler": "euler"},
        {"schedule": "cosine"},
        {"gamma": -1.0},
        {"sc_cfg": np.nan},
        {"time_shift": 0.0},
    ],
)
def test_bad_parameters_name_the_valid_ones(changes):
    with pytest.raises(InputError, match="must be"):
        SamplingParams(**changes)


@pytest.mark.parametrize("grid", [[0.0], [0.0, 0.9], [0.1, 1.0], [0.0, 0.7, 0.3, 1.0], [[0.0, np.nan, 1.0]]])
def test_bad_grids(grid):
    with pytest.raises(InputError, match="time grid"):
        schedule.check_grid(np.array(grid))
