"""A text as the engine sees it: the rows of its own table, and what is told of it, and of all, on the way."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from elf_rt.sampling.noise import NoiseKey
from elf_rt.sampling.schedule import DECODE, DRAFT, Row, Table


@dataclass(frozen=True)
class Program:
    """One text to write: its table's passes, one network call after each but the start, the last of them decoding.

    length: L tokens of canvas. source: (L, C) float32 clean latents with mask: (L,) bool where they stand, or None.
    z0: (L, C) a given start instead of noise. x_prev: (L, C) a given first estimate instead of zeros.
    eps: (N, L, C) given noise, eps[i] for step i, instead of Philox. drafts_every: steps from draft to draft, 0: none.
    latents: whether ``Written`` must hold them, which from a GPU takes a copy.
    """

    table: Table
    length: int
    seed: int
    sc_cfg: float
    source: np.ndarray | None = None
    mask: np.ndarray | None = None
    z0: np.ndarray | None = None
    x_prev: np.ndarray | None = None
    eps: np.ndarray | None = None
    drafts_every: int = 0
    latents: bool = False

    @cached_property
    def last(self) -> int:
        """The pass before the decoding call."""
        return self.table.num_steps + 1

    @property
    def max_rows(self) -> int:
        """The most rows that this text takes in one call."""
        return len(self.table.rows) + (0 < self.drafts_every < self.table.num_steps)

    @property
    def mean_rows(self) -> float:
        """Rows of a call, on average; a guidance interval counts as if it were the whole way."""
        return mean_rows(self.table.num_steps, len(self.table.rows), self.drafts_every)

    def drafts(self, j: int) -> bool:
        """Whether the call after pass j decodes a draft too, which is the estimate of step j - 1."""
        return self.drafts_every > 0 and 1 < j < self.last and (j - 1) % self.drafts_every == 0

    def rows(self, j: int) -> tuple[Row, ...]:
        """The rows of the call after pass j."""
        if j == self.last:
            return (DECODE,)
        return (*self.table.rows[: self.table.calls[j]], *((DRAFT,) if self.drafts(j) else ()))

    def noise(self, j: int) -> np.ndarray | NoiseKey:
        """What pass j adds. The start has no given noise but z0."""
        return NoiseKey(self.seed, j) if self.eps is None or not 1 <= j <= len(self.eps) else self.eps[j - 1]


def mean_rows(steps: int, guidance_rows: int, drafts_every: int) -> float:
    """Rows of a call of a text, on average: those of its steps, its drafts, and the decoding one."""
    drafts = (steps - 1) // drafts_every if drafts_every else 0
    return (steps * guidance_rows + drafts + 1) / (steps + 1)


@dataclass
class Timings:
    """What one text took.

    Attributes:
        total_ms: milliseconds from its submission to its ids.
        waited_ms: until its first network call.
        network_ms: of the network calls that it took part in, which other texts may share.
        integrator_ms: of the integrator's passes beside them; 0 on a GPU, where a call holds its pass.
        calls: network calls, and one for each draft.
    """

    total_ms: float = 0.0
    waited_ms: float = 0.0
    network_ms: float = 0.0
    integrator_ms: float = 0.0
    calls: int = 0


@dataclass(frozen=True)
class Stats:
    """What a model is doing.

    Attributes:
        slots: texts in flight.
        waiting: texts that have no slot yet.
        rows: of the last network call; 0 when nothing is in flight.
        max_rows: the most that a call should hold, at the trained length.
        settled: whether it is found out that so many pay.
        call_ms: the usual milliseconds of a call by its rows, in sizes 1, 2, 4, …, at the trained length.
        calls: network calls so far.
        steps: steps of all texts so far.
        captures: CUDA graphs captured so far.
        bytes: of slots and of the buffers of calls.
        finished, cancelled, failed: texts so far.
    """

    slots: int
    waiting: int
    rows: int
    max_rows: int
    settled: bool
    call_ms: dict[int, float]
    calls: int
    steps: int
    captures: int
    bytes: int
    finished: int
    cancelled: int
    failed: int


@dataclass(frozen=True)
class StepDone:
    """Step 1 .. N of N is done, at time t; draft: (L,) int64 raw ids where one was asked for."""

    step: int
    t: float
    draft: np.ndarray | None = None


@dataclass(frozen=True)
class Written:
    """ids: (L,) int64 as the decoding call gave them. latents: (L, C) z at t = 1, where they were asked for."""

    ids: np.ndarray
    latents: np.ndarray | None = None
    timings: Timings = field(default_factory=Timings)


Event = StepDone | Written | BaseException  # in this order: steps, then one of the other two
