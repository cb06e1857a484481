"""Replay recorded runs of the reference model through a backend, and compare."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from elf_rt.bundle import MIN_AGREEMENT, Bundle
from elf_rt.engine import open_engine
from elf_rt.errors import InputError
from elf_rt.measure.evaluation import edit_distance
from elf_rt.measure.replay import RecordedCall, RecordedRun, read_replay
from elf_rt.model import Model, load
from elf_rt.network import Backend
from elf_rt.sampling.engine import Engine
from elf_rt.sampling.program import Program, Written
from elf_rt.sampling.schedule import MAIN, A, B, Table, X

Write = Callable[[Sequence[Program]], list[Written]]

MAX_LATENT_ERROR = 5e-5  # relative, float32
MAX_EDIT_DISTANCE = 0.01
TINY = 1e-30
REPLAY = "replay.npz"


@dataclass(frozen=True)
class Check:
    """One comparison. latent_error is relative, token_agreement and the normalised edit_distance are of all ids."""

    name: str
    latent_error: float
    token_agreement: float
    edit_distance: float
    passed: bool


@dataclass(frozen=True)
class VerifyReport:
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


def verify(model: Model, replay: Path | None = None) -> VerifyReport:
    """Replay a file (the bundle's own by default) and judge it.

    float32 must give latents within 5e-5 and every token id; other precisions 99 % of the ids and an edit distance of
    at most 0.01. Every id of the decoding call counts, also at the source and behind the end of the text.

    Where the replay has texts, the tokenizer must make them of the recorded ids, letter by letter.

    Raises:
        InputError: the file is no replay, or its shapes are not those of the model.
    """
    if replay is None:
        replay, needed = model.bundle.path(REPLAY), ["call", "final_ids", *(["text"] if model.codec.tokenizer else [])]
    else:  # a file of another program, such as the official code, may have less
        needed = []
    call, runs = read_replay(replay, model.config, needed)
    checks = [] if call is None else [_check(model.backend, "network call", *_call(model.run, call))]
    for run in runs:
        checks += _run(model, run)
    return VerifyReport(model.backend.precision, model.backend.name, tuple(checks))


def verify_rows(backend: Backend, bundle: Bundle, rows: Sequence[int]) -> VerifyReport:
    """Repeat the recorded network call in calls of these numbers of rows.

    Raises:
        InputError: the bundle's replay is damaged, or has no such call.
    """
    call, _ = read_replay(bundle.path(REPLAY), bundle.config, ["call"])
    assert call is not None
    checks, engine = [], open_engine(backend, bundle.config)
    try:
        for count in rows:
            index = np.arange(count) % len(call.z)
            repeated = RecordedCall(*(getattr(call, field.name)[index] for field in fields(RecordedCall)))
            compared = _call(partial(_in_one_call, engine), repeated)
            checks.append(_check(backend, f"network call of {count} rows", *compared))
    finally:
        engine.close()
    return VerifyReport(backend.precision, backend.name, tuple(checks))


def verify_folder(
    folder: Path,
    replay: Path | None = None,
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> VerifyReport:
    """Open a bundle, read every file of it, and ``verify`` it."""
    with load(folder, backend, precision=precision, threads=threads, check=True) as model:
        if precision not in ("auto", model.backend.precision):
            raise InputError(
                f"{model.backend.name} runs {model.backend.precision} here, so {precision} is not verified"
            )
        return verify(model, replay)


def _check(
    backend: Backend, name: str, latents: np.ndarray, ids: np.ndarray, want_latents: np.ndarray, want_ids: np.ndarray
) -> Check:
    error = float(np.linalg.norm(latents - want_latents) / (np.linalg.norm(want_latents) + TINY))
    agreement = float(np.mean(ids == want_ids))
    distance = float(np.mean([edit_distance(a, b) for a, b in zip(ids, want_ids, strict=True)]))
    if backend.precision == "fp32":
        passed = error < MAX_LATENT_ERROR and agreement == 1.0
    else:
        passed = agreement >= MIN_AGREEMENT and distance <= MAX_EDIT_DISTANCE
    return Check(name, error, agreement, distance, passed)


def _run(model: Model, run: RecordedRun) -> Iterator[Check]:
    """The ids of the decoding call; then the final ones, and the texts, where they were recorded."""
    outcome = model.sample(z0=run.z0, grid=run.grid, eps=run.eps, source=run.source, mask=run.mask, params=run.params)
    guidance = f", w = {run.params.guidance_scale:g}" if run.source is not None else ""
    name = f"{run.params.sampler} {run.params.steps} steps, s = {run.params.sc_cfg:g}{guidance}"
    yield _check(model.backend, name, outcome.latents, outcome.ids, run.latents, run.ids)
    final = model.codec.finish(outcome.ids, None if run.mask is None else run.mask.sum(1))
    if run.final_ids is not None:
        yield _check(model.backend, f"{name}, final ids", outcome.latents, final, run.latents, run.final_ids)
    if run.texts is not None and model.codec.tokenizer is not None:
        recorded = final if run.final_ids is None else run.final_ids
        texts = [model.codec.decode(row) for row in recorded]
        same = float(np.mean([text == want for text, want in zip(texts, run.texts, strict=True)]))
        yield Check(f"{name}, texts", 0.0, same, 1.0 - same, same == 1.0)


def _call(write: Write, call: RecordedCall) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, ids, expected x, expected ids) of one denoising call, and the decoding call at the same z."""
    length, rows = call.z.shape[1], list(zip(call.z, call.x_prev, call.t, call.s, strict=True))
    once = [
        Program(single_call(float(t)), length, 0, float(s), z0=z, x_prev=x_prev, latents=True)
        for z, x_prev, t, s in rows
    ]
    decoded = [Program(DECODE_ALONE, length, 0, float(s), z0=z) for z, _, _, s in rows]
    x = [each.latents for each in write(once) if each.latents is not None]
    return np.stack(x), np.stack([each.ids for each in write(decoded)]), call.x, call.ids


def _in_one_call(engine: Engine[Any], programs: Sequence[Program]) -> list[Written]:
    """All rows of the programs together in each call, as many as they are."""
    slots = [engine.open(program) for program in programs]
    for _ in range(programs[0].last):
        engine.enqueue(slots)
        done = engine.collect()
    for slot in slots:
        engine.free(slot)
    return [event for event in done.events if isinstance(event, Written)]


def single_call(t: float) -> Table:
    """One denoising call at time t on the given start and estimate, whose output becomes z."""
    coef = np.zeros((3, 5))
    coef[1, [A, X]] = coef[2, B] = 1.0
    return Table(np.array([0.0, t, 1.0]), coef, np.array([[0.0], [0.0], [1.0]]), (MAIN,))


DECODE_ALONE = Table(np.array([0.0, 1.0]), np.array([[1.0, 0, 0, 0, 0]] * 2), np.zeros((2, 1)), (MAIN,))
