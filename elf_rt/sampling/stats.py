"""What a model is doing, as ``Model.stats`` tells it."""

from dataclasses import dataclass


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
