"""The fused pass between two network calls: one row of a sampler's table (``elf_rt.schedule``).

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
from elf_rt.noise import NoiseKey, normal
from elf_rt.schedule import Row

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
        outputs = [] if x_rows is None else [(weights[k, b], to_float32(x_rows[k, b])) for k in _used(weights[:, b])]
        x_hat = _sum(outputs, z[b].shape)
        if mask is not None:
            x_hat[mask[b]] = source[b][mask[b]]
        scale_z, scale_x, scale_last, scale_noise, scale_prev = coef[b]
        terms = [(scale_z, z[b]), (scale_x, x_hat), (scale_last, x_last[b])]
        if noise is not None and scale_noise != 0:
            terms.append((scale_noise, _noise(noise, b, z[b].shape)))
        z[b] = _sum(terms, z[b].shape)
        if mask is not None:
            z[b][mask[b]] = source[b][mask[b]]
        x_last[b] = x_hat
        for k, row in enumerate(rows):
            hidden = mask[b] if mask is not None and not row.sees_source else None
            if next_z is not None:
                _write(next_z[k, b], z[b], hidden)
            if next_x_prev is not None:
                seen = row.sees_prev and scale_prev != 0
                _write(next_x_prev[k, b], scale_prev * x_hat if seen else np.zeros_like(x_hat), hidden)


step = step_numpy
IMPLEMENTATION = "numpy"


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


def _used(weights: np.ndarray) -> np.ndarray:
    return np.flatnonzero(weights)


def _sum(terms: list[tuple[np.float32, np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    """Left to right; a new array. Terms with factor 0 are not read."""
    total: np.ndarray | None = None
    for factor, values in terms:
        if factor != 0:
            total = factor * values if total is None else np.add(total, factor * values, out=total)
    return np.zeros(shape, np.float32) if total is None else total


def _noise(noise: np.ndarray | NoiseKey, b: int, shape: tuple[int, int]) -> np.ndarray:
    if isinstance(noise, NoiseKey):
        return normal(noise.seeds[b : b + 1], noise.index, shape)[0]
    return noise[b]


def _write(out: np.ndarray, values: np.ndarray, hidden: np.ndarray | None) -> None:
    out[...] = from_float32(values, out.dtype)
    if hidden is not None:
        out[hidden] = 0


def _check(z, x_last, x_rows, weights, coef, noise, source, mask, next_z, next_x_prev, rows) -> None:
    """The boundary: everything after it trusts shapes and types."""
    if z.ndim != 3:
        raise InputError(f"z must have shape (B, L, C), got {z.shape}")
    full = z.shape
    need = [("z", z, full, "float32"), ("x_last", x_last, full, "float32"), ("coef", coef, (full[0], 5), "float32")]
    if (x_rows is None) != (weights is None):
        raise InputError("x_rows and weights go together")
    if (source is None) != (mask is None):
        raise InputError("source and mask go together")
    if x_rows is not None:
        need += [
            ("x_rows", x_rows, (len(weights), *full), None),
            ("weights", weights, (len(x_rows), full[0]), "float32"),
        ]
        if len(x_rows) > MAX_ROWS:
            raise InputError(f"x_rows must have at most {MAX_ROWS} guidance rows, got {len(x_rows)}")
    if isinstance(noise, NoiseKey):
        need.append(("noise.seeds", noise.seeds, full[:1], "uint64"))
    elif noise is not None:
        need.append(("noise", noise, full, "float32"))
    if source is not None:
        need += [("source", source, full, "float32"), ("mask", mask, full[:2], "bool")]
    for name, value in (("next_z", next_z), ("next_x_prev", next_x_prev)):
        if value is not None:
            need.append((name, value, (len(rows), *full), None))
    for name, value, shape, dtype in need:
        if value.shape != shape:
            raise InputError(f"{name} must have shape {shape}, got {value.shape}")
        if (dtype is None and value.dtype.name not in _NETWORK_TYPES) or (dtype and value.dtype.name != dtype):
            raise InputError(f"{name} must be {dtype or 'float32, float16 or uint16'}, got {value.dtype.name}")
