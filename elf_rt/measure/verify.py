"""Replay recorded runs of the reference model through a backend, and compare."""

import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elf_rt.bundle import MIN_AGREEMENT
from elf_rt.errors import BundleError, InputError
from elf_rt.measure.evaluation import edit_distance
from elf_rt.model import Model, load
from elf_rt.params import SamplingParams
from elf_rt.sampling.schedule import MAIN, A, B, Table, X

MAX_LATENT_ERROR = 5e-5  # relative, float32
MAX_EDIT_DISTANCE = 0.01


@dataclass(frozen=True)
class Check:
    """One comparison. latent_error is relative, token_agreement and the normalised edit_distance are of all ids."""

    name: str
    latent_error: float
    token_agreement: float
    edit_distance: float
    passed: bool


@dataclass(frozen=True)
class Report:
    precision: str
    backend: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def summary(self) -> str:
        worst = max(check.latent_error for check in self.checks)
        tokens = min(check.token_agreement for check in self.checks)
        return f"latent error {worst:.1e}, token agreement {tokens:.4f} ({self.backend}, {self.precision})"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def verify(model: Model, replay: Path | None = None) -> Report:
    """Replay a file (the bundle's own by default) and judge it.

    float32 must give latents within 5e-5 and every token id; other precisions 99 % of the ids and an edit distance of
    at most 0.01. Every id of the decoding call counts, also at the source and behind the end of the text.

    Raises:
        InputError: the file is no replay, or its shapes are not those of the model.
    """
    arrays = _read(replay or model.bundle.path("replay.npz"))
    checks = []
    for name, latent, ids, want_latent, want_ids in _compared(model, arrays):
        error = float(np.linalg.norm(latent - want_latent) / np.linalg.norm(want_latent))
        agreement = float(np.mean(ids == want_ids))
        distance = float(np.mean([edit_distance(a, b) for a, b in zip(ids, want_ids, strict=True)]))
        if model.backend.precision == "fp32":
            passed = error < MAX_LATENT_ERROR and agreement == 1.0
        else:
            passed = agreement >= MIN_AGREEMENT and distance <= MAX_EDIT_DISTANCE
        checks.append(Check(name, error, agreement, distance, passed))
    if not checks:
        raise InputError(f"{replay or 'replay.npz'} holds no run to compare with")
    return Report(model.backend.precision, model.backend.name, tuple(checks))


def verify_folder(
    folder: Path,
    replay: Path | None = None,
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> Report:
    """Open a bundle and ``verify`` it."""
    with load(folder, backend, precision=precision, threads=threads) as model:
        if precision not in ("auto", model.backend.precision):
            raise InputError(
                f"{model.backend.name} runs {model.backend.precision} here, so {precision} is not verified"
            )
        return verify(model, replay)


def _compared(model: Model, arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, Any, Any, Any, Any]]:
    """(name, latents, ids, expected latents, expected ids) of every recorded call and run."""
    try:
        if "fwd_z" in arrays:
            yield "network call", *_call(model, arrays)
        for i in range(sum(name.endswith("_spec") for name in arrays)):
            run = {k.removeprefix(f"run{i}_"): v for k, v in arrays.items() if k.startswith(f"run{i}_")}
            params = _parse_spec(str(run["spec"]))
            source, mask = run.get("cond"), run["cond_mask"] > 0.5 if "cond" in run else None
            outcome = model.sample(
                z0=run["z0"],
                grid=run["t"],
                eps=run["eps"] if len(run.get("eps", ())) else None,
                source=source,
                mask=mask,
                params=params,
            )
            guidance = f", w = {params.guidance_scale:g}" if source is not None else ""
            name = f"{params.sampler} {params.steps} steps, s = {params.sc_cfg:g}{guidance}"
            yield name, outcome.latents, outcome.ids, run["latent"], run["ids"]
            if "final_ids" in run:
                final = model.codec.finish(outcome.ids, None if mask is None else mask.sum(1))
                yield name + ", final ids", outcome.latents, final, run["latent"], run["final_ids"]
    except KeyError as error:
        raise InputError(f"the replay lacks {error.args[0]}") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"the replay does not fit the model, or is damaged: {error}") from None


def _call(model: Model, arrays: dict[str, np.ndarray]) -> tuple[Any, Any, Any, Any]:
    """One denoising call, and the decoding call at the same z."""
    rows, length, width = arrays["fwd_z"].shape
    if width != model.config.latent_dim or length > model.config.max_length:
        raise InputError(f"the replay is of another model: its latents have shape {arrays['fwd_z'].shape}")
    want_ids = arrays["dec_ids"] if "dec_ids" in arrays else arrays["dec_logits"].argmax(-1)
    xs, ids = [], []
    for b in range(rows):
        z0, x_prev, t = arrays["fwd_z"][b : b + 1], arrays["fwd_x_prev"][b : b + 1], float(arrays["fwd_t"][b])
        params = SamplingParams(sc_cfg=float(arrays["fwd_sc"][b]))
        xs.append(model.sample(z0=z0, x_prev=x_prev, params=params, table=single_call(t)).latents)
        ids.append(model.sample(z0=z0, params=params, table=DECODE_ALONE, latents=False).ids)
    return np.concatenate(xs), np.concatenate(ids), arrays["fwd_x"], want_ids


def single_call(t: float) -> Table:
    """One denoising call at time t on the given start and estimate, whose output becomes z."""
    coef = np.zeros((3, 5))
    coef[1, [A, X]] = coef[2, B] = 1.0
    return Table(np.array([0.0, t, 1.0]), coef, np.array([[0.0], [0.0], [1.0]]), (MAIN,))


DECODE_ALONE = Table(np.array([0.0, 1.0]), np.array([[1.0, 0, 0, 0, 0]] * 2), np.zeros((2, 1)), (MAIN,))


def _parse_spec(text: str) -> SamplingParams:
    """The official sampler, whatever the bundle's presets are."""
    spec = dict(line.split(": ", 1) for line in text.strip().splitlines())
    return SamplingParams(
        sampler=spec["method"],
        steps=int(spec["steps"]),
        schedule=spec["schedule"],
        gamma=float(spec.get("gamma", 0.0)),
        guidance_scale=float(spec.get("cfg", 1.0)),
        sc_cfg=float(spec.get("sc", 1.0)),
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise BundleError(f"no replay at {path}") from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:  # TypeError: a single array
        raise InputError(f"{path} is no replay file (.npz of arrays): {type(error).__name__}") from None
