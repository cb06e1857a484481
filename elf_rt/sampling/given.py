"""Programs of arrays that a caller gives: what ``Model.sample`` runs, below text."""

from collections.abc import Sequence

import numpy as np

from elf_rt.errors import InputError
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.sampling import schedule
from elf_rt.sampling.program import Program
from elf_rt.sampling.schedule import Table


def make_programs(
    config: ModelConfig,
    params: SamplingParams,
    seeds: Sequence[int],
    length: int,
    *,
    z0: np.ndarray | None = None,
    grid: np.ndarray | None = None,
    eps: np.ndarray | None = None,
    source: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    x_prev: np.ndarray | None = None,
    table: Table | None = None,
    latents: bool = True,
) -> list[Program]:
    """One program for each seed; the arguments are those of ``Model.sample``, with seeds and length checked.

    Raises:
        InputError: an array has another shape than it should, or does not hold numbers.
    """
    batch, shape = len(seeds), (len(seeds), length, config.latent_dim)
    if (source is None) != (mask is None):
        raise InputError("source and mask go together: give both or neither")
    given = {"z0": z0, "source": source, "x_prev": x_prev}
    held = {name: as_floats(name, array, shape) for name, array in given.items() if array is not None}
    if mask is not None:
        held["mask"] = np.ascontiguousarray(as_numbers("mask", mask), bool)
        _check_shape("mask", held["mask"], shape[:2])
    if table is None:
        tables = _tables(config, params, seeds, grid, conditional=source is not None)
    elif isinstance(table, Table):
        tables = [table] * batch
    else:
        raise InputError(f"table must be an elf_rt.sampling.schedule.Table, got {type(table).__name__}")
    if eps is not None:
        noisy = max(table.noisy_steps for table in tables)
        eps = as_floats("eps", np.atleast_1d(as_numbers("eps", eps))[:noisy], (noisy, *shape))
        held["eps"] = np.ascontiguousarray(eps.swapaxes(0, 1))
    mine = [{name: array[b] for name, array in held.items()} for b in range(batch)]
    return [Program(tables[b], length, seeds[b], params.sc_cfg, latents=latents, **mine[b]) for b in range(batch)]


def as_floats(name: str, array: object, shape: tuple[int | None, ...]) -> np.ndarray:
    """A caller's array as contiguous float32 of this shape, where None is any size; the same on every backend."""
    floats = np.ascontiguousarray(as_numbers(name, array), np.float32)
    _check_shape(name, floats, shape)
    return floats


def as_numbers(name: str, array: object) -> np.ndarray:
    """A caller's array of real numbers, as it is."""
    try:
        numbers = np.asarray(array)
        if numbers.dtype.kind == "V":  # bfloat16 of ml_dtypes
            numbers = numbers.astype(np.float32)
    except (TypeError, ValueError, RuntimeError):  # lists of different lengths, torch's tensors that are elsewhere
        raise InputError(f"{name} must be an array of numbers") from None
    if numbers.dtype.kind not in "biuf":
        raise InputError(f"{name} must hold numbers, got {numbers.dtype}")
    return numbers


def _tables(
    config: ModelConfig, params: SamplingParams, seeds: Sequence[int], grid: np.ndarray | None, *, conditional: bool
) -> list[Table]:
    if grid is None:
        grid = schedule.make_grid(params, config, np.array(seeds, np.uint64))
    else:
        grid = schedule.check_grid(as_numbers("grid", grid))
        grid = np.repeat(grid, len(seeds), axis=0) if len(grid) == 1 else grid
        _check_shape("grid", grid, (len(seeds), grid.shape[1]))
    return [schedule.make_table(params, config, row, conditional=conditional) for row in grid]


def _check_shape(name: str, array: np.ndarray, want: tuple[int | None, ...]) -> None:
    fits = array.ndim == len(want) and all(size in (None, got) for size, got in zip(want, array.shape, strict=True))
    if not fits:
        told = ", ".join("any" if size is None else str(size) for size in want)
        raise InputError(f"{name} must have shape ({told}{',' * (len(want) == 1)}), got {array.shape}")
