"""The fused pass between two network calls, over the slots of all texts that take part.

Each slot is at its own row of its own table (``elf_rt.sampling.schedule``). With A, B, C, D, X = coef:

    x̂      = Σ_k weights[k] · x_rows[k], or x_last where no call has been made   then x̂ = source where mask
    z      <- A·z + B·x̂ + C·x_last + D·noise                                       then z = source where mask
    x_last <- x̂
    next_z[k] = z, or x̂ for a draft        next_x_prev[k] = X·x̂, or 0 unless rows[k].sees_prev
    both are 0 at masked positions unless rows[k].sees_source

``step_numpy`` is the specification; the C++ extension and the CUDA kernel (``cpp_ext/``) give the same bits. So sums
run from left to right in float32, without fused multiply-adds, and a term whose factor is 0 is left out: what it
would have read may be uninitialised. The extension, which is given addresses, checks what it is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from elf_rt.machine import cores
from elf_rt.sampling.noise import NoiseKey, normal
from elf_rt.sampling.schedule import Row


@dataclass(slots=True)
class SlotStep:
    """One text in one pass. Arrays are float32 and C-contiguous; z and x_last (L, C) are advanced in place.

    coef (5,). x_rows (K, L, C) are the network's outputs, with weights (K,). noise is ε (L, C), or the key to draw it.
    source (L, C) goes with mask (L,) bool. next_z and next_x_prev (K', L, C) have one entry for each of `rows`;
    next_x_prev is None for a network without that input.
    """

    z: np.ndarray
    x_last: np.ndarray
    coef: np.ndarray
    noise: np.ndarray | NoiseKey
    x_rows: np.ndarray | None = None
    weights: np.ndarray | None = None
    source: np.ndarray | None = None
    mask: np.ndarray | None = None
    next_z: np.ndarray | None = None
    next_x_prev: np.ndarray | None = None
    rows: Sequence[Row] = ()


def step_numpy(slots: Sequence[SlotStep]) -> None:
    """Advance the slots, all of one shape (L, C)."""
    for slot in slots:
        _advance(slot)


Step = Callable[[Sequence[SlotStep]], None]

try:
    from elf_rt._csrc import _integrator
except ImportError:  # no compiler when elf-rt was installed
    step: Step = step_numpy
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


def _advance(slot: SlotStep) -> None:
    scale_z, scale_x, scale_last, scale_noise, scale_prev = slot.coef
    if slot.x_rows is None or slot.weights is None:
        x_hat = slot.x_last.copy()
    else:
        x_hat = _sum(list(zip(slot.weights, slot.x_rows, strict=True)), slot.z.shape)
    if slot.source is not None and slot.mask is not None:
        x_hat[slot.mask] = slot.source[slot.mask]
    terms = [(scale_z, slot.z), (scale_x, x_hat), (scale_last, slot.x_last)]
    if scale_noise != 0:
        terms.append((scale_noise, _noise(slot)))
    slot.z[...] = _sum(terms, slot.z.shape)
    if slot.source is not None and slot.mask is not None:
        slot.z[slot.mask] = slot.source[slot.mask]
    slot.x_last[...] = x_hat
    for k, row in enumerate(slot.rows):
        hidden = None if row.sees_source else slot.mask
        if slot.next_z is not None:
            _write(slot.next_z[k], x_hat if row.of_estimate else slot.z, hidden)
        if slot.next_x_prev is not None:
            seen = row.sees_prev and scale_prev != 0
            _write(slot.next_x_prev[k], scale_prev * x_hat if seen else np.zeros_like(x_hat), hidden)


def _sum(terms: list[tuple[np.float32, np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    """Left to right; a new array. Terms with factor 0 are not read."""
    total: np.ndarray | None = None
    for factor, values in terms:
        if factor != 0:
            total = factor * values if total is None else np.add(total, factor * values, out=total)
    return np.zeros(shape, np.float32) if total is None else total


def _noise(slot: SlotStep) -> np.ndarray:
    if isinstance(slot.noise, NoiseKey):
        return normal(np.array([slot.noise.seed], np.uint64), slot.noise.index, slot.z.shape)[0]
    return slot.noise


def _write(out: np.ndarray, values: np.ndarray, hidden: np.ndarray | None) -> None:
    out[...] = values
    if hidden is not None:
        out[hidden] = 0
