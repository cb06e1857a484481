"""Timings of the same texts on several engines, taken in turns so that a busy machine is busy for all of them.

Every contender writes the same texts: same seeds, so same noise, same grid, same prompts. One is the reference, in
float32, and the token ids of all others are compared with its ids.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elf_rt import machine
from elf_rt.model import Draft, Model

Load = Callable[[], Model]  # of an engine in one precision


@dataclass(frozen=True)
class Work:
    """What every contender does. steps and batches: each of one with each of the other. prompts: for all texts."""

    steps: Sequence[int]
    batches: Sequence[int]
    repeats: int
    seed: int
    length: int | None = None
    prompts: Sequence[str] | None = None
    preset: str = "default"


@dataclass
class Opened:
    """A contender with its model. load_s: until it could be called; first_s: its first text, which may compile.
    memory_mb: growth of the process's resident memory until then; None where the system does not tell."""

    name: str
    model: Model
    load_s: float
    first_s: float = 0.0
    memory_mb: float | None = None


@dataclass
class RequestTimes:
    """One request of a batch, in seconds. steps: of all its texts, also where one call does not hold them.
    text: what is outside the sampler: tokenizer, encoder, ids to text."""

    steps: list[float] = field(default_factory=list)
    total: float = 0.0
    cpu: float = 0.0  # of all threads
    network: float = 0.0
    integrator: float = 0.0
    sampler: float = 0.0
    ids: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))  # (batch, L)

    @property
    def text(self) -> float:
        return self.total - self.sampler


@dataclass(frozen=True)
class Measured:
    """A contender at one setting. Milliseconds: of a step (one network call of the batch and what comes with it), of a
    request divided by its texts, and of all cores together for that. speed: how many times faster a step is than the
    baseline's. Shares of the request's time add up to 1. agreement: share of equal token ids, exact: of equal texts,
    against the reference, over so many texts."""

    name: str
    steps: int
    batch: int
    step_p50: float
    step_p90: float
    sample_p50: float
    sample_p90: float
    cpu_p50: float
    tokens_per_s: float
    speed: float
    network: float
    integrator: float
    host: float
    text: float
    agreement: float
    exact: float
    texts: int


@dataclass(frozen=True)
class BenchReport:
    reference: str
    baseline: str
    contenders: list[dict[str, Any]]
    rows: list[Measured]


def open_contender(load: Load, work: Work) -> Opened:
    """Load a model and write its first texts."""
    before = machine.memory().get("now")
    begun = time.perf_counter()
    model = load()
    opened = Opened(f"{model.backend.name} {model.backend.precision}", model, time.perf_counter() - begun)
    try:
        opened.first_s = run_once(model, work, work.steps[0], work.batches[0], work.seed).total
    except BaseException:
        model.close()
        raise
    if before is not None:
        opened.memory_mb = max(0, machine.memory()["now"] - before) / 1e6
    return opened


def measure(opened: Sequence[Opened], work: Work, baseline: str, on_run: Callable[[int, int], None]) -> BenchReport:
    """Run all contenders in turns.

    Args:
        opened: the reference first.
        baseline: the name of the contender that speeds are relative to.
        on_run: called after each run with (done, all).
    """
    settings = list(itertools.product(work.steps, work.batches))
    total = len(settings) * len(opened) * (1 + work.repeats)
    done = 0
    rows = []
    for steps, batch in settings:
        runs: dict[str, list[RequestTimes]] = {contender.name: [] for contender in opened}
        for repeat in range(-1, work.repeats):  # -1: to warm up
            for contender in opened:
                run = run_once(contender.model, work, steps, batch, work.seed + max(0, repeat) * batch)
                if repeat >= 0:
                    runs[contender.name].append(run)
                done += 1
                on_run(done, total)
        rows += list(_rows(runs, steps, batch, opened[0].name, baseline))
    return BenchReport(opened[0].name, baseline, [_describe(contender) for contender in opened], rows)


def run_once(model: Model, work: Work, steps: int, batch: int, seed: int) -> RequestTimes:
    """One request of ``batch`` texts."""
    prompts = None if work.prompts is None else [work.prompts[i % len(work.prompts)] for i in range(batch)]
    number = batch if prompts is None else 1
    run = RequestTimes()
    ids: list[np.ndarray] = []
    pieces: list[list[float]] = [[]]  # a batch that is more than one call holds is written in several
    told_late = model.backend.device == "cuda"  # calls are enqueued ahead there, and may be told of together
    begun_cpu = time.process_time()
    begun = last = time.perf_counter()
    for event in model.stream(
        prompts,
        number,
        seed=seed,
        preset=work.preset,
        length=work.length,
        drafts_every=0,
        steps=steps,
    ):
        now = time.perf_counter()
        if isinstance(event, Draft):
            if not told_late:
                pieces[-1].append(now - last)
        else:
            timings = event[0].timings
            in_calls = (timings.total_ms - timings.waited_ms) / 1e3
            if told_late:
                pieces[-1].append(in_calls / timings.calls)
            pieces.append([])
            run.network += timings.network_ms / 1e3
            run.integrator += timings.integrator_ms / 1e3
            run.sampler += in_calls
            ids += [result.ids for result in event]
        last = now
    run.total, run.cpu = last - begun, time.process_time() - begun_cpu
    run.steps = [sum(steps) for steps in zip(*pieces[:-1], strict=True)]
    run.ids = np.stack(ids)
    return run


def _rows(
    runs: dict[str, list[RequestTimes]], steps: int, batch: int, reference: str, baseline: str
) -> Iterator[Measured]:
    want = np.concatenate([run.ids for run in runs[reference]])
    base = np.median(np.concatenate([run.steps for run in runs[baseline]]))
    for name, mine in runs.items():
        step = np.concatenate([run.steps for run in mine])
        sample = np.array([run.total for run in mine]) / batch
        total = sum(run.total for run in mine)
        network, integrator, text = (
            sum(getattr(run, part) for run in mine) / total for part in ("network", "integrator", "text")
        )
        same = np.concatenate([run.ids for run in mine]) == want
        step_p50, step_p90 = np.quantile(step, (0.5, 0.9)) * 1e3
        sample_p50, sample_p90 = np.quantile(sample, (0.5, 0.9)) * 1e3
        yield Measured(
            name,
            steps,
            batch,
            step_p50=float(step_p50),
            step_p90=float(step_p90),
            sample_p50=float(sample_p50),
            sample_p90=float(sample_p90),
            cpu_p50=float(np.median([run.cpu for run in mine]) / batch * 1e3),
            tokens_per_s=float(want.shape[1] / sample_p50 * 1e3),
            speed=float(base / step_p50 * 1e3),
            network=network,
            integrator=integrator,
            host=1.0 - network - integrator - text,
            text=text,
            agreement=float(same.mean()),
            exact=float(same.all(axis=1).mean()),
            texts=len(same),
        )


def _describe(contender: Opened) -> dict[str, Any]:
    return {
        "name": contender.name,
        **contender.model.backend.describe(),
        "load_s": contender.load_s,
        "first_s": contender.first_s,
        "memory_mb": contender.memory_mb,
    }
