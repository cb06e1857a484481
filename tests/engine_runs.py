"""Programs for the tests of both engines, and a driver to run them on."""

from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from plan_bundles import golden_bundle
from stub_engine import running

from elf_rt.bundle import Bundle
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.sampling.driver import Driver
from elf_rt.sampling.engine import Engine
from elf_rt.sampling.given import make_programs
from elf_rt.sampling.program import Event, Program, StepDone, Written

SOURCE_LENGTHS = (3, 1, 5, 2)


def golden_bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """By golden case, each made once."""
    folder, made = tmp_path_factory.mktemp("bundles"), dict[str, Bundle]()

    def bundle(case: str) -> Bundle:
        if case not in made:
            made[case] = golden_bundle(folder / f"{case}.elfrt", case, ("fp32",))
        return made[case]

    return bundle


def programs_of(
    config: ModelConfig, seeds: Sequence[int], *, drafts_every: int = 0, length: int | None = None, **params: Any
) -> list[Program]:
    """One for each seed; sources are random latents of different lengths."""
    length = length or config.max_length
    source = mask = None
    if config.max_input_length:
        shape = (len(seeds), length, config.latent_dim)
        source = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        mask = np.arange(length) < np.resize(SOURCE_LENGTHS, len(seeds))[:, None]
    made = make_programs(
        config, SamplingParams(**{"steps": 6} | params), seeds, length, source=source, mask=mask, latents=True
    )
    return [Program(**vars(program) | {"drafts_every": drafts_every}) for program in made]


class Runs:
    """An engine behind a driver; what ``run`` gives are the events of each text, the last of them how it ended."""

    def __init__(self, make: Callable[[], Engine[Any]], length: int) -> None:
        self.driver = Driver(running(make), length)

    def submit(self, programs: Sequence[Program]) -> list["SimpleQueue[Event]"]:
        queues: list[SimpleQueue[Event]] = [SimpleQueue() for _ in programs]
        self.driver.submit(programs, [queue.put for queue in queues], object())
        return queues

    def run(self, programs: Sequence[Program]) -> list[list[Event]]:
        return [events_of(queue) for queue in self.submit(programs)]

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *error: object) -> None:
        self.driver.close()


def events_of(queue: "SimpleQueue[Event]") -> list[Event]:
    events: list[Event] = []
    while not events or isinstance(events[-1], StepDone):
        events.append(queue.get(timeout=60))
    return events


def written(events: Sequence[Event]) -> Written:
    if isinstance(events[-1], BaseException):
        raise events[-1]
    assert isinstance(events[-1], Written)
    return events[-1]


def assert_same(ours: Sequence[Event], theirs: Sequence[Event], atol: float = 1e-5) -> None:
    """Same events, steps, drafts and ids; latents that differ by what other numbers of rows change in a product."""
    assert [type(event) for event in ours] == [type(event) for event in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, StepDone) and isinstance(other, StepDone):
            assert (mine.step, mine.t) == (other.step, other.t)
            np.testing.assert_array_equal(mine.draft, other.draft)
        elif isinstance(mine, Written) and isinstance(other, Written):
            np.testing.assert_array_equal(mine.ids, other.ids)
            np.testing.assert_allclose(mine.latents, other.latents, atol=atol)
            assert mine.timings.calls == other.timings.calls
