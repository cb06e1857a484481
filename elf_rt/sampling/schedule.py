"""Every sampler as a table of coefficients, computed in float64 before the first network call.

ELF integrates dz/dt = (x̂ - z) / (1 - t) from noise (t = 0) to text latents (t = 1), arXiv 2605.10938.
One table has N + 2 rows, one for each pass of the integrator (``elf_rt.sampling.integrator``):

    row 0          the start, z = noise_scale * noise; no network call follows it
    rows 1 .. N    prepare the N denoising calls
    row N + 1      prepares the decoding call

Row j does   x̂ = Σ_k weights[j, k] x_k,   z <- A z + B x̂ + C x̂_last + D noise_j,   next x_prev = X x̂,
so one loop, or one CUDA graph, runs every sampler. Each sample has its own column: its time grid comes from its own
seed, and its text does not depend on what else is in the batch.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from elf_rt.errors import InputError
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.sampling.noise import normal

A, B, C, D, X = range(5)  # columns of Table.coef

MAX_EXTRAPOLATION = 4.0  # longest continuation of a line through two estimates, in units of their distance


@dataclass(frozen=True)
class Row:
    """One guidance row of a network call: does it see the source, does it see the previous estimate?"""

    sees_source: bool
    sees_prev: bool


MAIN = Row(sees_source=True, sees_prev=True)


@dataclass(frozen=True)
class Table:
    """J = N + 2 rows for a batch of samples, K guidance rows a call. Arrays are float64.

    t: (J, batch) the time given to the network call that follows row j.
    coef: (J, batch, 5) A, B, C, D, X.
    weights: (J, K, batch) how row j combines the K outputs of the call before it.
    rows: the K guidance rows; the first sees the source, and the decoding call makes only that one.
    """

    t: np.ndarray
    coef: np.ndarray
    weights: np.ndarray
    rows: tuple[Row, ...]

    @property
    def num_steps(self) -> int:
        return len(self.t) - 2

    @property
    def noisy_steps(self) -> int:
        """Steps up to the last that noise is added before."""
        return int(np.flatnonzero(np.any(self.coef[1:, :, D] != 0, axis=1)).max(initial=-1)) + 1

    def calls(self, j: int) -> int:
        """How many guidance rows the call that follows row j needs: those that row j + 1 gives a weight."""
        if j == len(self.t) - 1:
            return 1
        return max(1, 1 + int(np.flatnonzero(np.any(self.weights[j + 1] != 0, axis=1)).max(initial=0)))


def make_table(params: SamplingParams, config: ModelConfig, grid: np.ndarray, *, conditional: bool) -> Table:
    """The table of a sampler on a time grid.

    refine is iterative refinement, of students distilled to few steps (ELF-MMD): every call is at t = 0, sees the
    estimate of the call before, and the last estimate is the text. So its grid is 0, ..., 0, 1, whatever is given; the
    noise stays (gamma 0) or is drawn anew before each call but the first (gamma 1).

    Args:
        grid: (batch, N + 1) rising from 0 to 1.
        conditional: whether any source position is held; without one, guidance_scale has no effect.
    """
    batch, n = grid.shape[0], grid.shape[1] - 1
    if params.sampler == "refine":
        grid = np.where(np.arange(n + 1) < n, 0.0, np.ones_like(grid))
    t, t_next = grid[:, :-1].T, grid[:, 1:].T  # (N, batch)
    alpha = np.ones((n, batch))
    if params.sampler == "sde":
        gamma = params.gamma * (1.0 - t) ** params.gamma_power
        alpha[:-1] = np.clip(1.0 - gamma * (t_next - t), 0.0, 1.0)[:-1]
    elif params.sampler == "refine":
        alpha[1:] = max(0.0, 1.0 - params.gamma)
    t_in = alpha * t
    kappa = (t_next - t_in) / np.maximum(1.0 - t_in, config.t_eps)
    noise = config.noise_scale * params.temperature
    previous = second_order(t_in, t_next) if params.sampler == "ab2" else np.zeros((n, batch))

    table_t = np.zeros((n + 2, batch))
    table_t[1:-1], table_t[-1] = t_in, 1.0
    coef = np.zeros((n + 2, batch, 5))
    coef[0, :, D] = noise
    # Row i + 1 ends step i - 1, z <- (1 - κ) z + (κ + c) x̂ - c x̂_last, and opens step i, z <- α z + (1 - α) noise.
    opens = np.concatenate([alpha, np.ones((1, batch))])  # of rows 1 .. N + 1; nothing opens after the last
    coef[1, :, A] = opens[0]
    coef[2:, :, A] = opens[1:] * (1.0 - kappa)
    coef[2:, :, B] = opens[1:] * (kappa + previous)
    coef[2:, :, C] = opens[1:] * -previous
    coef[1:-1, :, D] = (1.0 - alpha) * noise
    coef[1:-1, :, X] = params.x_prev_scale  # in row 1, x̂ holds the source alone
    rows = guidance_rows(params, config, conditional=conditional)
    weights = np.zeros((n + 2, len(rows), batch))
    weights[2:] = guidance_weights(rows, params, config, t_in, conditional=conditional)
    return Table(table_t, coef, weights, rows)


def second_order(t: np.ndarray, t_next: np.ndarray) -> np.ndarray:
    """c (N, batch) of the two-step exponential Adams-Bashforth method, z' = (1 - κ) z + κ x̂ + c (x̂ - x̂_last).

    The exact solution over a step from t to t' is z' = (1 - κ) z + (1 - t') ∫ x̂ / (1 - τ)² dτ. With x̂ continued in
    a straight line through its last two values, that is κ x̂ + c (x̂ - x̂_last), where
    c = (w - w' - w' ln(w / w')) / (t - t_last), w = 1 - t, w' = 1 - t'. This is the idea of DPM-Solver++(2M),
    Lu et al. 2022, with x̂ linear in t instead of the log signal-to-noise ratio, which is infinite at t = 0.

    c is 0 in the first step, which has no x̂_last; in the last, whose x̂ is the text; and after a step so short that the
    line would be continued to more than MAX_EXTRAPOLATION times its length.
    """
    c = np.zeros_like(t)
    if len(t) < 3:
        return c
    w, w_next, last = (1.0 - t)[1:-1], (1.0 - t_next)[1:-1], np.diff(t, axis=0)[:-1]
    usable = (w - w_next <= MAX_EXTRAPOLATION * last) & (last > 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # where not usable, or a step before the last that reaches 1
        slope = (w - w_next - np.where(w_next > 0, w_next * np.log(w / w_next), 0.0)) / last
    c[1:-1] = np.where(usable, slope, 0.0)
    return c


def guidance_rows(params: SamplingParams, config: ModelConfig, *, conditional: bool) -> tuple[Row, ...]:
    """The rows of one call: all that have a weight in some step, those that see the source first.

    Classifier-free guidance: x̂ = x̂_u + w (x̂_c - x̂_u). Self-conditioning guidance of models without guidance
    tokens: x̂ = x̂(0) + s (x̂(x_prev) - x̂(0)). Both together are the product of the two.
    """
    inside = params.guidance_scale if conditional else 1.0
    everywhere = params.guidance_from == 0 and params.guidance_until == 1
    scales = (inside,) if everywhere else (inside, 1.0)
    s = _self_cond_scale(params, config)
    rows = [Row(sees_source, sees_prev) for sees_source in (True, False) for sees_prev in (True, False)]
    kept = [row for row in rows if any(_weight(row, w, s) != 0 for w in scales)]
    if not any(row.sees_source for row in kept):
        kept.insert(0, MAIN)  # the decoding call sees the source whatever the guidance
    return tuple(kept)


def guidance_weights(
    rows: tuple[Row, ...], params: SamplingParams, config: ModelConfig, t: np.ndarray, *, conditional: bool
) -> np.ndarray:
    """(N, K, batch) weights of the rows at times t (N, batch); those of a time add up to 1.

    Outside guidance_from <= t <= guidance_until there is no classifier-free guidance (Kynkäänniemi et al. 2024), so the
    rows without the source weigh nothing, and `Table.calls` leaves them out of the call.
    """
    s = _self_cond_scale(params, config)
    inside = np.array([_weight(row, params.guidance_scale if conditional else 1.0, s) for row in rows])
    outside = np.array([_weight(row, 1.0, s) for row in rows])
    active = (t >= params.guidance_from) & (t <= params.guidance_until)
    return np.where(active[:, None], inside[:, None], outside[:, None])


def _weight(row: Row, w: float, s: float) -> float:
    return (w if row.sees_source else 1.0 - w) * (s if row.sees_prev else 1.0 - s)


def _self_cond_scale(params: SamplingParams, config: ModelConfig) -> float:
    """s where it is applied by two calls; 1, which needs one, where it is a token or there is no self-conditioning."""
    return params.sc_cfg if config.self_cond and config.num_self_cond_cfg_tokens == 0 else 1.0


def make_grid(params: SamplingParams, config: ModelConfig, seeds: np.ndarray) -> np.ndarray:
    """(batch, N + 1) float64 time grids from 0 to 1, one for each seed.

    logit_normal: N - 1 sorted draws of sigmoid(mean + std * noise), as the official sampler. quantile: the i/N
    quantiles of that distribution, the same for each seed, and never two at nearly one time. uniform: even steps u.
    shift: u / (σ - (σ - 1) u), where 1 - t is what Esser et al. 2024 (arXiv 2403.03206) shift by σ = time_shift.
    """
    n, batch = params.steps, len(seeds)
    mean = config.p_mean if params.grid_mean is None else params.grid_mean
    std = config.p_std if params.grid_std is None else params.grid_std
    grid = np.zeros((batch, n + 1))
    grid[:, -1] = 1.0
    if params.schedule == "uniform":
        grid[:] = np.linspace(0.0, 1.0, n + 1)
    elif params.schedule == "shift":
        even = np.linspace(0.0, 1.0, n + 1)
        grid[:] = even / (params.time_shift - (params.time_shift - 1.0) * even)
    elif params.schedule == "quantile":
        scores = np.array([NormalDist().inv_cdf(i / n) for i in range(1, n)])
        grid[:, 1:-1] = 1.0 / (1.0 + np.exp(-(mean + std * scores)))
    elif n > 1:
        draws = normal(seeds, 0, (n - 1, 1), stream=1)[:, :, 0].astype(np.float64)
        grid[:, 1:-1] = np.sort(1.0 / (1.0 + np.exp(-(mean + std * draws))), axis=1)
    return grid


def check_grid(grid: np.ndarray) -> np.ndarray:
    """A caller's grid as (batch, N + 1) float64, or InputError."""
    grid = np.atleast_2d(np.asarray(grid, np.float64))
    if grid.ndim != 2 or grid.shape[1] < 2 or np.any(grid[:, 0] != 0) or np.any(grid[:, -1] != 1):
        raise InputError("a time grid must have shape (N + 1,) or (batch, N + 1) and run from 0 to 1")
    if not np.all(np.diff(grid, axis=1) >= 0):
        raise InputError("a time grid must not fall")
    return grid
