"""How long texts will take, told before they start: the driver's ring, run ahead in thought.

Texts take turns, so one round of the ring advances each text by one call and lasts as long as the calls that hold all
their rows. Between two moments at which a text joins or leaves, rounds are equal: time is counted in rounds there.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What a text still asks for. calls: until it is written; rows: of each of them, on average."""

    calls: int
    rows: float
    length: int


@dataclass(frozen=True)
class Pace:
    """Calls of one length. max_rows: of one call; ms: of a call by its rows, in sizes 1, 2, 4, …"""

    max_rows: int
    ms: Mapping[int, float]

    def seconds(self, rows: float) -> float:
        """One round of so many rows. Sizes that were not measured cost a row what the nearest one costs."""
        size = 1 << (math.ceil(min(rows, self.max_rows)) - 1).bit_length()
        nearest = min(self.ms, key=lambda known: abs(math.log2(known / size)))
        return 1e-3 * self.ms[nearest] / nearest * rows


@dataclass(frozen=True)
class Outlook:
    """texts: in flight and waiting, first come first. slots: texts that may be in flight. pace: by length."""

    texts: Sequence[Load]
    slots: int
    pace: Mapping[int, Pace]

    def known(self, new: Sequence[Load] = ()) -> bool:
        """Whether calls of all lengths were made before, so that their milliseconds are known."""
        return all(load.length in self.pace and self.pace[load.length].ms for load in (*self.texts, *new))

    def finishes(self, new: Sequence[Load] = (), expected: Iterable[tuple[float, Load]] = ()) -> list[float]:
        """Seconds until each text is over: those of the outlook, then the new ones, which come now.

        Args:
            expected: texts that will come, by the seconds until then, in this order.
        """
        ours = [*self.texts, *new]
        ends, coming = [0.0] * len(ours), iter(expected)
        ring, waiting = _Ring(self.pace), enumerate(ours)
        for index, load in waiting:
            ring.join(index, load)
            if len(ring) == self.slots:
                break
        left, now, arrival = len(ours), 0.0, next(coming, None)
        while left:
            end = now + ring.seconds_to_next()
            if arrival is not None and arrival[0] < end:
                now += ring.run(max(0.0, arrival[0] - now))
                if len(ring) < self.slots and arrival[1].length in self.pace:
                    ring.join(None, arrival[1])
                arrival = next(coming, None)
                continue
            now, over = end, ring.leave()
            if over is not None:
                ends[over], left = now, left - 1
            _join_next(ring, waiting)
        return ends


def _join_next(ring: "_Ring", waiting: Iterator[tuple[int, Load]]) -> None:
    for index, load in waiting:
        ring.join(index, load)
        return


class _Ring:
    """Texts that take turns, each until its last round."""

    def __init__(self, pace: Mapping[int, Pace]) -> None:
        self._pace = pace
        self._rounds = 0.0  # so far
        self._rows: defaultdict[int, float] = defaultdict(float)  # of a round, by length
        self._texts: list[tuple[float, int, int | None, Load]] = []  # a heap by last round
        self._joined = 0

    def __len__(self) -> int:
        return len(self._texts)

    def join(self, index: int | None, load: Load) -> None:
        self._joined += 1
        self._rows[load.length] += load.rows
        heapq.heappush(self._texts, (self._rounds + load.calls, self._joined, index, load))

    def leave(self) -> int | None:
        """The text whose last round it is."""
        self._rounds, _, index, load = heapq.heappop(self._texts)
        self._rows[load.length] -= load.rows
        return index

    def seconds_to_next(self) -> float:
        return (self._texts[0][0] - self._rounds) * self._round() if self._texts else 0.0

    def run(self, seconds: float) -> float:
        """Let time pass in which nobody leaves."""
        if self._texts:
            self._rounds += seconds / self._round()
        return seconds

    def _round(self) -> float:
        return sum(self._pace[length].seconds(rows) for length, rows in self._rows.items() if rows > 1e-6)
