"""replay.npz: runs of the reference model, read and checked before any of it is run. The format is in
``elf_rt.export.replay``, and that of the official golden runs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elf_rt.arrays import read_archive
from elf_rt.errors import InputError
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.sampling import schedule

Arrays = Mapping[str, np.ndarray]

CALL = {"z": "RLC", "x_prev": "RLC", "t": "R", "sc": "R", "x": "RLC"}
RUN = {"spec": "", "t": "T", "z0": "BLC", "eps": "EBLC", "latent": "BLC", "ids": "BL"}
SOURCE = {"cond": "BLC", "cond_mask": "BL"}
SEEN = {"final_ids": "BM", "text": "B"}  # what a reader sees; M: tokens of text
KINDS = {"spec": "U", "text": "U", "ids": "iu", "final_ids": "iu", "dec_ids": "iu", "cond_mask": "fb"}  # others: "f"


@dataclass(frozen=True)
class RecordedCall:
    """A denoising call, and the decoding call at the same z. z, x_prev, x: (R, L, C). t, s: (R,). ids: (R, L)."""

    z: np.ndarray
    x_prev: np.ndarray
    t: np.ndarray
    s: np.ndarray
    x: np.ndarray
    ids: np.ndarray


@dataclass(frozen=True)
class RecordedRun:
    """A sampling run: what it starts from, and what the reference model made of it.

    grid: (N + 1,). z0, latents, source: (B, L, C). eps: (n, B, L, C), one for each step that adds noise, or None.
    mask: (B, L) bool. ids: (B, L). final_ids: (B, M), texts: B of them, where they were recorded.
    """

    params: SamplingParams
    grid: np.ndarray
    z0: np.ndarray
    eps: np.ndarray | None
    source: np.ndarray | None
    mask: np.ndarray | None
    latents: np.ndarray
    ids: np.ndarray
    final_ids: np.ndarray | None
    texts: list[str] | None


def read_replay(
    path: Path, config: ModelConfig, needed: Sequence[str] = ()
) -> tuple[RecordedCall | None, list[RecordedRun]]:
    """The recorded call, where there is one, and the runs of a file.

    Args:
        needed: what must be there beside the runs, and may be absent otherwise: "call", "final_ids", "text".

    Raises:
        InputError: it is no such file, an array is missing or of another type or shape, or it is of another model.
    """
    arrays = read_archive(path)
    groups = {match[0] for name in arrays if (match := re.match(r"fwd_|dec_|run\d+_", name))}
    runs = sorted(groups - {"fwd_", "dec_"}, key=lambda name: int(name[3:-1]))
    if runs != [f"run{i}_" for i in range(len(runs))]:
        raise InputError(f"{path} lacks a run: it holds {', '.join(name.strip('_') for name in runs)}")
    if not groups:
        raise InputError(f"{path} holds no run to compare with")
    called = bool({"fwd_", "dec_"} & groups) or "call" in needed
    if called:
        ids = {"dec_ids": "RL"} if "dec_ids" in arrays else {"dec_logits": "RLV"}
        _check(path, arrays, config, {f"fwd_{name}": sizes for name, sizes in CALL.items()} | ids)
    for run in runs:
        _check_run(path, arrays, config, run, needed)
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"{path}: {name} has numbers that are not finite")
    return _call(arrays) if called else None, [_run(path, config, arrays, name) for name in runs]


def _check_run(path: Path, arrays: Arrays, config: ModelConfig, prefix: str, needed: Sequence[str]) -> None:
    sourced = any(prefix + name in arrays for name in SOURCE)
    _check(path, arrays, config, {prefix + name: sizes for name, sizes in (RUN | SOURCE if sourced else RUN).items()})
    batch, length, _ = arrays[f"{prefix}z0"].shape
    room = max(1, length - config.max_input_length) if sourced else length
    seen = {prefix + n: sizes for n, sizes in SEEN.items() if prefix + n in arrays or n in needed}
    _check(path, arrays, config, seen, B=batch, M=room)


def _check(path: Path, arrays: Arrays, config: ModelConfig, wanted: Mapping[str, str], **known: int) -> None:
    """Check types and shapes. Sizes that several share are told by letters, L and C by the model too."""
    sizes: dict[str, int] = {"C": config.latent_dim, "V": config.vocab_size, **known}
    for name, letters in wanted.items():
        if name not in arrays:
            raise InputError(f"{path} lacks {name}")
        shape, dtype = arrays[name].shape, arrays[name].dtype
        want = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
        sizes = dict(zip(letters, shape, strict=False)) | sizes
        if len(shape) != len(letters) or shape != tuple(sizes[letter] for letter in letters):
            raise InputError(f"{path}: {name} must have shape ({want}), got {shape}: is it of another model?")
        if dtype.kind not in KINDS.get(re.sub(r"run\d+_", "", name), "f"):
            raise InputError(f"{path}: {name} must not hold {dtype}")
        most = config.max_length
        if sizes.get("L", 1) > most or any(sizes[letter] < 1 for letter in letters if letter != "E"):
            raise InputError(f"{path}: {name} has shape {shape}, the model takes texts of 1 to {most} tokens")


def _call(arrays: Arrays) -> RecordedCall:
    ids = arrays["dec_ids"] if "dec_ids" in arrays else arrays["dec_logits"].argmax(-1)
    z, x_prev, t, s, x = (arrays[f"fwd_{name}"] for name in CALL)
    return RecordedCall(z, x_prev, t, s, x, ids)


def _run(path: Path, config: ModelConfig, arrays: Arrays, prefix: str) -> RecordedRun:
    run = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    params = _parse_spec(path, str(run["spec"]))
    try:
        grid = schedule.check_grid(run["t"])
    except InputError as error:
        raise InputError(f"{path}: {prefix}t: {error}") from error
    noisy = max(schedule.make_table(params, config, row, conditional="cond" in run).noisy_steps for row in grid)
    if grid.shape[1] != params.steps + 1 or len(run["eps"]) < noisy:
        raise InputError(f"{path}: {prefix}t and {prefix}eps are not those of {params.steps} steps")
    return RecordedRun(
        params,
        run["t"],
        run["z0"],
        run["eps"] if noisy else None,
        run.get("cond"),
        run["cond_mask"] > 0.5 if "cond_mask" in run else None,
        run["latent"],
        run["ids"],
        run.get("final_ids"),
        [str(text) for text in run["text"]] if "text" in run else None,
    )


def _parse_spec(path: Path, text: str) -> SamplingParams:
    """The official sampler, whatever the bundle's presets are."""
    spec = dict(re.findall(r"^(\w+): (\S+)$", text, re.MULTILINE))
    try:
        return SamplingParams(
            sampler=spec["method"],
            steps=int(spec["steps"]),
            schedule=spec["schedule"],
            gamma=float(spec.get("gamma", 0.0)),
            guidance_scale=float(spec.get("cfg", 1.0)),
            sc_cfg=float(spec.get("sc", 1.0)),
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: a run's spec is damaged ({error}): {text[:60]!r}") from error
