"""Every sampler as a table of coefficients, computed in float64 before the first network call.

ELF integrates dz/dt = (x̂ - z) / (1 - t) from noise (t = 0) to text latents (t = 1), arXiv 2605.10938.
The table of a text has N + 2 rows, one for each pass of the integrator (``elf_rt.sampling.integrator``):

    row 0          the start, z = noise_scale * noise; no network call follows it
    rows 1 .. N    prepare the N denoising calls
    row N + 1      prepares the decoding call

Row j does   x̂ = Σ_k weights[j, k] x_k,   z <- A z + B x̂ + C x̂_last + D noise_j,   next x_prev = X x̂,
so one engine runs every sampler. Each text has its own table: its time grid comes from its own seed, and it does not
depend on what else is in a call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

from elf_rt.errors import InputError
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.sampling.noise import TIME_GRID, normal

A, B, C, D, X = range(5)  # columns of Table.coef

MAX_ROWS = 4  # guidance rows of one text in one network call; a draft may come to them
MAX_EXTRAPOLATION = 4.0  # longest continuation of a line through two estimates, in units of their distance


@dataclass(frozen=True)
class Row:
    """One row of a network call: does it see the source, and the previous estimate? Does it decode, in mode 1 at t = 1,
    and is its z the estimate itself?"""

    sees_source: bool
    sees_prev: bool
    decodes: bool = False
    of_estimate: bool = False

    @cached_property
    def flags(self) -> int:
        """For the integrator: see ``cpp_ext/integrator.h``."""
        return self.sees_source | self.sees_prev << 1 | self.decodes << 2 | self.of_estimate << 3


MAIN = Row(sees_source=True, sees_prev=True)
DECODE = Row(sees_source=True, sees_prev=False, decodes=True)
DRAFT = Row(sees_source=True, sees_prev=False, decodes=True, of_estimate=True)


@dataclass(frozen=True)
class Table:
    """J = N + 2 rows for one text, K guidance rows a call.

    t: (J,) the time given to the network call that follows row j.
    coef: (J, 5) A, B, C, D, X.
    weights: (J, K) how row j combines the K outputs of the call before it.
    rows: the K guidance rows; the first sees the source.

    Raises:
        InputError: an array does not have its shape, or is not finite.
    """

    t: np.ndarray
    coef: np.ndarray
    weights: np.ndarray
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        count = len(self.t) if np.ndim(self.t) == 1 else 0
        if count < 2:
            raise InputError(f"t of a table must have shape (N + 2,), got {np.shape(self.t)}")
        for name, shape in (("coef", (count, 5)), ("weights", (count, len(self.rows))), ("t", (count,))):
            array = np.asarray(getattr(self, name))
            if array.shape != shape:
                raise InputError(f"{name} of a table must have shape {shape}, got {array.shape}")
            if not np.all(np.isfinite(array)):
                raise InputError(f"{name} of a table must be finite")
        if not self.rows or not self.rows[0].sees_source:
            raise InputError("the first guidance row of a table must see the source")
        if len(self.rows) > MAX_ROWS or any(row.decodes or row.of_estimate for row in self.rows):
            raise InputError(f"a table must have at most {MAX_ROWS} guidance rows, of which none decodes")

    @property
    def num_steps(self) -> int:
        return len(self.t) - 2

    @property
    def noisy_steps(self) -> int:
        """Steps up to the last that noise is added before."""
        return int(np.flatnonzero(self.coef[1:, D]).max(initial=-1)) + 1

    @cached_property
    def calls(self) -> tuple[int, ...]:
        """How many guidance rows the call that follows row j needs, for j = 0 .. N: those that row j + 1 gives a
        weight."""
        needed = (self.weights[1:] != 0) * np.arange(1, len(self.rows) + 1)
        return tuple(map(int, needed.max(axis=1, initial=1)))


@dataclass(frozen=True)
class Moves:
    """What a sampler does in its N steps; arrays (N,). Step i opens with z <- keep z + noise ε, calls the network at
    time t, and ends with z <- (1 - kappa) z + kappa x̂ + last (x̂ - x̂_last)."""

    t: np.ndarray
    keep: np.ndarray
    noise: np.ndarray
    kappa: np.ndarray
    last: np.ndarray


def ode(grid: np.ndarray, params: SamplingParams, config: ModelConfig) -> Moves:
    """Euler steps of the flow, in the exact form that a constant x̂ has."""
    t, t_next, zero = grid[:-1], grid[1:], np.zeros(len(grid) - 1)
    return Moves(t, zero + 1.0, zero, _kappa(t, t_next, config), zero)


def sde(grid: np.ndarray, params: SamplingParams, config: ModelConfig) -> Moves:
    """The official stochastic sampler: each step but the last goes back to α t with fresh noise, then to t'."""
    t, t_next, zero = grid[:-1], grid[1:], np.zeros(len(grid) - 1)
    gamma = params.gamma * (1.0 - t) ** params.gamma_power
    alpha = np.clip(1.0 - gamma * (t_next - t), 0.0, 1.0)
    alpha[-1] = 1.0
    noise = (1.0 - alpha) * config.noise_scale * params.temperature
    return Moves(alpha * t, alpha, noise, _kappa(alpha * t, t_next, config), zero)


def ab2(grid: np.ndarray, params: SamplingParams, config: ModelConfig) -> Moves:
    """The two-step exponential Adams-Bashforth method: see ``second_order``."""
    first = ode(grid, params, config)
    return Moves(first.t, first.keep, first.noise, first.kappa, second_order(grid[:-1], grid[1:]))


def refine(grid: np.ndarray, params: SamplingParams, config: ModelConfig) -> Moves:
    """Iterative refinement, of students distilled to few steps (ELF-MMD): every call is at t = 0 whatever the grid,
    sees the estimate of the call before, and the last estimate is the text. The noise stays (gamma 0) or is drawn anew
    before each call but the first (gamma 1)."""
    zero = np.zeros(len(grid) - 1)
    keep, kappa = np.full_like(zero, max(0.0, 1.0 - params.gamma)), zero.copy()
    keep[0] = kappa[-1] = 1.0
    return Moves(zero, keep, (1.0 - keep) * config.noise_scale * params.temperature, kappa, zero)


Sampler = Callable[[np.ndarray, SamplingParams, ModelConfig], Moves]  # of a time grid (N + 1,)
SAMPLERS: dict[str, Sampler] = {"ode": ode, "sde": sde, "ab2": ab2, "refine": refine}


def make_table(params: SamplingParams, config: ModelConfig, grid: np.ndarray, *, conditional: bool) -> Table:
    """The table of a sampler on a time grid.

    Args:
        grid: (N + 1,) rising from 0 to 1.
        conditional: whether any source position is held; without one, guidance_scale has no effect.
    """
    moves, n = SAMPLERS[params.sampler](grid, params, config), len(grid) - 1
    t = np.zeros(n + 2)
    t[1:-1], t[-1] = moves.t, 1.0
    coef = np.zeros((n + 2, 5))
    coef[0, D] = config.noise_scale * params.temperature
    # Row i + 1 ends step i - 1 and opens step i; nothing opens after the last.
    opens = np.append(moves.keep, 1.0)  # of rows 1 .. N + 1
    coef[1, A] = opens[0]
    coef[2:, A] = opens[1:] * (1.0 - moves.kappa)
    coef[2:, B] = opens[1:] * (moves.kappa + moves.last)
    coef[2:, C] = opens[1:] * -moves.last
    coef[1:-1, D] = moves.noise
    coef[1:-1, X] = params.x_prev_scale  # in row 1, x̂ holds the source alone
    rows = guidance_rows(params, config, conditional=conditional)
    weights = np.zeros((n + 2, len(rows)))
    weights[2:] = guidance_weights(rows, params, config, moves.t, conditional=conditional)
    return Table(t, coef, weights, rows)


def _kappa(t: np.ndarray, t_next: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The share of the way to x̂ that the flow goes from t to t'."""
    return (t_next - t) / np.maximum(1.0 - t, config.t_eps)


def second_order(t: np.ndarray, t_next: np.ndarray) -> np.ndarray:
    """c (N,) of the two-step exponential Adams-Bashforth method, z' = (1 - κ) z + κ x̂ + c (x̂ - x̂_last).

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
    w, w_next, last = (1.0 - t)[1:-1], (1.0 - t_next)[1:-1], np.diff(t)[:-1]
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
    rows: Sequence[Row], params: SamplingParams, config: ModelConfig, t: np.ndarray, *, conditional: bool
) -> np.ndarray:
    """(N, K) weights of the rows at times t (N,); those of a time add up to 1.

    Outside guidance_from <= t <= guidance_until there is no classifier-free guidance (Kynkäänniemi et al. 2024), so the
    rows without the source weigh nothing, and `Table.calls` leaves them out of the call.
    """
    s = _self_cond_scale(params, config)
    inside = np.array([_weight(row, params.guidance_scale if conditional else 1.0, s) for row in rows])
    outside = np.array([_weight(row, 1.0, s) for row in rows])
    active = (t >= params.guidance_from) & (t <= params.guidance_until)
    return np.where(active[:, None], inside, outside)


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
        draws = normal(seeds, 0, (n - 1, 1), TIME_GRID)[:, :, 0].astype(np.float64)
        grid[:, 1:-1] = np.sort(1.0 / (1.0 + np.exp(-(mean + std * draws))), axis=1)
    return grid


def check_grid(grid: np.ndarray) -> np.ndarray:
    """A caller's grid as (1 or batch, N + 1) float64, or InputError."""
    grid = np.atleast_2d(np.asarray(grid, np.float64))
    if grid.ndim != 2 or grid.shape[1] < 2 or np.any(grid[:, 0] != 0) or np.any(grid[:, -1] != 1):
        raise InputError("a time grid must have shape (N + 1,) or (batch, N + 1) and run from 0 to 1")
    if not np.all(np.diff(grid, axis=1) >= 0):
        raise InputError("a time grid must not fall")
    return grid
