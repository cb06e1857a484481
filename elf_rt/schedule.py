"""Every sampler as a table of coefficients, computed in float64 before the first network call.

ELF integrates dz/dt = (x̂ - z) / (1 - t) from noise (t = 0) to text latents (t = 1), arXiv 2605.10938.
One table has N + 2 rows, one for each pass of the integrator (``elf_rt.integrator``):

    row 0          the start, z = noise_scale * noise; no network call follows it
    rows 1 .. N    prepare the N denoising calls
    row N + 1      prepares the decoding call

Row j does   x̂ = Σ_k weights[j, k] x_k,   z <- A z + B x̂ + C x̂_last + D noise_j,   next x_prev = X x̂,
so one loop, or one CUDA graph, runs every sampler. Each sample has its own column: its time grid comes from its own
seed, and its text does not depend on what else is in the batch.
"""

from dataclasses import dataclass

import numpy as np

from elf_rt.errors import InputError
from elf_rt.noise import normal
from elf_rt.params import ModelConfig, SamplingParams

A, B, C, D, X = range(5)  # columns of Table.coef


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

    def calls(self, j: int) -> int:
        """How many guidance rows the call that follows row j needs: those that row j + 1 gives a weight."""
        if j == len(self.t) - 1:
            return 1
        return max(1, 1 + int(np.flatnonzero(np.any(self.weights[j + 1] != 0, axis=1)).max(initial=0)))


def make_table(params: SamplingParams, config: ModelConfig, grid: np.ndarray, *, conditional: bool) -> Table:
    """The table of a sampler on a time grid.

    Args:
        grid: (batch, N + 1) rising from 0 to 1.
        conditional: whether any source position is held; without one, guidance_scale has no effect.
    """
    rows, weights = guidance_rows(params, config, conditional=conditional)
    batch, n = grid.shape[0], grid.shape[1] - 1
    t, t_next = grid[:, :-1].T, grid[:, 1:].T  # (N, batch)
    alpha = np.ones((n, batch))
    if params.sampler == "sde":
        alpha[:-1] = np.clip(1.0 - params.gamma * (t_next - t)[:-1], 0.0, 1.0)
    t_in = alpha * t
    kappa = (t_next - t_in) / np.maximum(1.0 - t_in, config.t_eps)

    table_t = np.zeros((n + 2, batch))
    table_t[1:-1], table_t[-1] = t_in, 1.0
    coef = np.zeros((n + 2, batch, 5))
    coef[0, :, D] = config.noise_scale
    # Row i + 1 ends step i - 1, z <- (1 - κ) z + κ x̂, and opens step i, z <- α z + (1 - α) noise.
    coef[1:-1, :, A] = alpha
    coef[-1, :, A] = 1.0
    coef[2:, :, B] = coef[2:, :, A] * kappa
    coef[2:, :, A] *= 1.0 - kappa
    coef[1:-1, :, D] = (1.0 - alpha) * config.noise_scale
    coef[1:-1, :, X] = 1.0  # in row 1, x̂ holds the source alone; the decoding call gets zeros
    table_weights = np.zeros((n + 2, len(rows), batch))
    table_weights[2:] = np.asarray(weights)[:, None]
    return Table(table_t, coef, table_weights, rows)


def guidance_rows(
    params: SamplingParams, config: ModelConfig, *, conditional: bool
) -> tuple[tuple[Row, ...], tuple[float, ...]]:
    """The rows of one call and their weights in x̂.

    Classifier-free guidance: x̂ = x̂_u + w (x̂_c - x̂_u). Self-conditioning guidance of models without guidance
    tokens: x̂ = x̂(0) + s (x̂(x_prev) - x̂(0)). Both together are the product of the two.
    """
    w = params.guidance_scale if conditional else 1.0
    by_two_calls = config.self_cond and config.num_self_cond_cfg_tokens == 0
    s = params.sc_cfg if by_two_calls else 1.0
    pairs = [
        (Row(sees_source, sees_prev), w_source * w_prev)
        for sees_source, w_source in ((True, w), (False, 1.0 - w))
        for sees_prev, w_prev in ((True, s), (False, 1.0 - s))
    ]
    kept = [(row, weight) for row, weight in pairs if weight != 0]
    if not any(row.sees_source for row, _ in kept):
        kept.insert(0, (MAIN, 0.0))  # the decoding call sees the source whatever the guidance
    return tuple(row for row, _ in kept), tuple(weight for _, weight in kept)


def make_grid(params: SamplingParams, config: ModelConfig, seeds: np.ndarray) -> np.ndarray:
    """(batch, N + 1) float64 time grids from 0 to 1, one for each seed.

    logit_normal: N - 1 sorted draws of sigmoid(p_mean + p_std * noise), as the official sampler; uniform: even steps;
    """
    n, batch = params.steps, len(seeds)
    if params.schedule == "uniform":
        return np.broadcast_to(np.linspace(0.0, 1.0, n + 1), (batch, n + 1))
    grid = np.zeros((batch, n + 1))
    grid[:, -1] = 1.0
    if n > 1:
        draws = normal(seeds, 0, (n - 1, 1), stream=1)[:, :, 0].astype(np.float64)
        grid[:, 1:-1] = np.sort(1.0 / (1.0 + np.exp(-(config.p_mean + config.p_std * draws))), axis=1)
    return grid


def check_grid(grid: np.ndarray) -> np.ndarray:
    """A caller's grid as (batch, N + 1) float64, or InputError."""
    grid = np.atleast_2d(np.asarray(grid, np.float64))
    if grid.ndim != 2 or grid.shape[1] < 2 or np.any(grid[:, 0] != 0) or np.any(grid[:, -1] != 1):
        raise InputError("a time grid must have shape (N + 1,) or (batch, N + 1) and run from 0 to 1")
    if not np.all(np.diff(grid, axis=1) >= 0):
        raise InputError("a time grid must not fall")
    return grid
