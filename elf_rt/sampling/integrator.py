"""The fused pass between two network calls: one row of a sampler's table (``elf_rt.sampling.schedule``).

For sample b, with A, B, C, D, X = coef[b] and ε the noise of (seed, row):

    x̂      = Σ_k weights[k, b] · x_rows[k, b]                     then x̂ = source where mask
    z      <- A·z + B·x̂ + C·x_last + D·ε                          then z = source where mask
    x_last <- x̂
    next_z[k] = z        next_x_prev[k] = X·x̂, or 0 unless rows[k].sees_prev
    both are 0 at masked positions unless rows[k].sees_source

``step_numpy`` is the specification; the C++ extension and the CUDA kernel (``cpp_ext/``) give the same bits. So sums
run from left to right in float32, without fused multiply-adds, and a term whose factor is 0 is left out: what it
would have read may be uninitialised.
"""

from collections.abc import Sequence

import numpy as np

from elf_rt.errors import InputError
from elf_rt.machine import cores
from elf_rt.sampling.noise import NoiseKey, normal
from elf_rt.sampling.schedule import Row

MAX_ROWS = 4  # guidance rows in one network call

_NETWORK_TYPES = ("float32", "float16", "uint16")


def step_numpy(
    z: np.ndarray,
    x_last: np.ndarray,
    *,
    x_rows: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    coef: np.ndarray,
    noise: np.ndarray | NoiseKey | None = None,
    source: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    next_z: np.ndarray | None = None,
    next_x_prev: np.ndarray | None = None,
    rows: Sequence[Row] = (),
) -> None:
    """Advance z and x_last (B, L, C) float32 in place and write the inputs of the next call.

    x_rows (K, B, L, C) are the network's outputs, weights (K, B) float32, coef (B, 5) float32; noise is ε (B, L, C)
    float32 or the key to draw it; source (B, L, C) float32 goes with mask (B, L) bool; next_z and next_x_prev
    (K', B, L, C) have one entry for each of `rows`. Network tensors are float32, float16, or bfloat16 as uint16.
    Raises InputError when a shape or type differs.
    """
    _check(z, x_last, x_rows, weights, coef, noise, source, mask, next_z, next_x_prev, rows)
    for b in range(len(z)):
        x_hat = _combine(x_rows, weights, b, z[b].shape)
        held = None
        if source is not None and mask is not None:
            held = mask[b]
            x_hat[held] = source[b][held]
        scale_z, scale_x, scale_last, scale_noise, scale_prev = coef[b]
        terms = [(scale_z, z[b]), (scale_x, x_hat), (scale_last, x_last[b])]
        if noise is not None and scale_noise != 0:
            terms.append((scale_noise, _noise(noise, b, z[b].shape)))
        z[b] = _sum(terms, z[b].shape)
        if source is not None and held is not None:
            z[b][held] = source[b][held]
        x_last[b] = x_hat
        for k, row in enumerate(rows):
            hidden = None if row.sees_source else held
            if next_z is not None:
                _write(next_z[k, b], z[b], hidden)
            if next_x_prev is not None:
                seen = row.sees_prev and scale_prev != 0
                _write(next_x_prev[k, b], scale_prev * x_hat if seen else np.zeros_like(x_hat), hidden)


try:
    from elf_rt._csrc import _integrator
except ImportError:  # no compiler when elf-rt was installed
    step = step_numpy
    IMPLEMENTATION = "numpy"
else:
    step = _integrator.step
    IMPLEMENTATION = "c++"


def set_threads(threads: int) -> None:
    """The most threads that a step may use, the calling one included: for all models of the process.

    One step moves a few MB: more than 8 threads wait for memory, and for each other.
    """
    if IMPLEMENTATION == "c++":
        _integrator.set_num_threads(min(8, threads))


set_threads(cores())


def to_float32(values: np.ndarray) -> np.ndarray:
    """float32 of a network tensor: float32, float16, or bfloat16 as uint16."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def from_float32(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round float32 to the nearest, ties to even, in a network type: float32, float16, or bfloat16 as uint16."""
    if dtype == np.uint16:
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
    with np.errstate(over="ignore"):  # the network's own overflow, not ours
        return values.astype(dtype, copy=False)


def _combine(x_rows: np.ndarray | None, weights: np.ndarray | None, b: int, shape: tuple[int, ...]) -> np.ndarray:
    """x̂ of sample b from the guidance rows that have a weight."""
    if x_rows is None or weights is None:
        return np.zeros(shape, np.float32)
    return _sum([(weights[k, b], to_float32(x_rows[k, b])) for k in np.flatnonzero(weights[:, b])], shape)


def _sum(terms: list[tuple[np.float32, np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    """Left to right; a new array. Terms with factor 0 are not read."""
    total: np.ndarray | None = None
    for factor, values in terms:
        if factor != 0:
            total = factor * values if total is None else np.add(total, factor * values, out=total)
    return np.zeros(shape, np.float32) if total is None else total


def _noise(noise: np.ndarray | NoiseKey, b: int, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(noise, NoiseKey):
        return normal(noise.seeds[b : b + 1], noise.index, shape)[0]
    return noise[b]


def _write(out: np.ndarray, values: np.ndarray, hidden: np.ndarray | None) -> None:
    out[...] = from_float32(values, out.dtype)
    if hidden is not None:
        out[hidden] = 0


def _check(
    z: np.ndarray,
    x_last: np.ndarray,
    x_rows: np.ndarray | None,
    weights: np.ndarray | None,
    coef: np.ndarray,
    noise: np.ndarray | NoiseKey | None,
    source: np.ndarray | None,
    mask: np.ndarray | None,
    next_z: np.ndarray | None,
    next_x_prev: np.ndarray | None,
    rows: Sequence[Row],
) -> None:
    """The same checks and messages as in ``cpp_ext/bindings.cpp``."""
    if z.ndim != 3:
        raise InputError(f"z must have shape (B, L, C), got {z.shape}")
    if (x_rows is None) != (weights is None):
        raise InputError("x_rows and weights go together")
    if (source is None) != (mask is None):
        raise InputError("source and mask go together")
    full, batch, num_outputs = z.shape, z.shape[:1], 0 if x_rows is None else len(x_rows)
    for name, count in (("x_rows", num_outputs), ("rows", len(rows))):
        if count > MAX_ROWS:
            raise InputError(f"{name} must have at most {MAX_ROWS} guidance rows, got {count}")
    _check_array("z", z, full)
    _check_array("x_last", x_last, full)
    _check_array("coef", coef, (*batch, 5))
    _check_array("x_rows", x_rows, (num_outputs, *full), *_NETWORK_TYPES)
    _check_array("weights", weights, (num_outputs, *batch))
    if isinstance(noise, NoiseKey):
        _check_array("noise.seeds", noise.seeds, batch, "uint64")
    else:
        _check_array("noise", noise, full)
    _check_array("source", source, full)
    _check_array("mask", mask, full[:2], "bool")
    _check_array("next_z", next_z, (len(rows), *full), *_NETWORK_TYPES)
    _check_array("next_x_prev", next_x_prev, (len(rows), *full), *_NETWORK_TYPES)


def _check_array(name: str, array: np.ndarray | None, shape: tuple[int, ...], *types: str) -> None:
    if array is None:
        return
    if array.shape != shape:
        raise InputError(f"{name} must have shape {shape}, got {array.shape}")
    if not array.flags.c_contiguous:
        raise InputError(f"{name} must be C-contiguous")
    if array.dtype.name not in (types or ("float32",)):
        expected = "float32, float16 or uint16" if len(types) == 3 else (types or ("float32",))[0]
        raise InputError(f"{name} must be {expected}, got {array.dtype.name}")
