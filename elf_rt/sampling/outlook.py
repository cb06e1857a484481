"""How long texts will take, told before they start: the driver's turns, run ahead in thought.

Texts take turns, those of few steps before the others (``elf_rt.sampling.driver``). Between two moments at which a text
joins or leaves, all of a kind advance at one speed.
"""

import heapq
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from elf_rt.sampling.cost import round_up

FEW = 5  # calls of a text that goes first: 4 steps and the decoding one
OTHERS = 3  # one row of so many is for the other texts, where some wait


@dataclass(frozen=True)
class Load:
    """What a text still asks for. calls: until it is written; whole: of the whole text; rows: of each of them, on
    average."""

    calls: int
    whole: int
    rows: float
    length: int

    @property
    def few(self) -> bool:
        """Whether it goes first."""
        return self.whole <= FEW


@dataclass(frozen=True)
class Pace:
    """Calls of one length. max_rows: of one call, and short_rows while texts of few steps are in flight beside others;
    ms: of a call by its rows, in sizes 1, 2, 4, …"""

    max_rows: int
    short_rows: int
    ms: Mapping[int, float]

    def of_row(self, rows: float) -> float:
        """Seconds of a row in a call of so many. A size that was not measured costs a row what the nearest one does."""
        size = round_up(math.ceil(rows))
        nearest = min(self.ms, key=lambda known: abs(math.log2(known / size)))
        return 1e-3 * self.ms[nearest] / nearest


@dataclass(frozen=True)
class Outlook:
    """texts: in flight and waiting, first come first. slots: texts that may be in flight. pace: by length.
    overhead: what calls and the time between them took lately, over what the calls usually take. under_way: seconds
    until the calls that come before all others are over."""

    texts: Sequence[Load]
    slots: int
    pace: Mapping[int, Pace]
    overhead: float = 1.0
    under_way: float = 0.0

    def known(self, new: Sequence[Load] = ()) -> bool:
        """Whether calls of all lengths were made before, so that their milliseconds are known."""
        return all(load.length in self.pace and self.pace[load.length].ms for load in (*self.texts, *new))

    def finishes(self, new: Sequence[Load] = (), followed: float = 0.0, following: Sequence[Load] = ()) -> list[float]:
        """Seconds until each of the new texts is over, which come now; without new ones, until each of the others is.

        Args:
            followed: the share of the texts that are over after which another one comes: 1 where a server stays as
                busy as it is, 0 where nothing comes any more.
            following: what comes then, in turns.
        """
        left = asked = len(new) or len(self.texts)
        waiting = deque(enumerate([*self.texts, *new], asked - len(self.texts) - len(new)))
        ends = [0.0] * asked  # texts that were not asked for have an index below 0
        turns, now, owed = _Turns(self.pace), self.under_way, 0.0
        to_come = cycle(load for load in following if load.length in self.pace)
        while left:
            while waiting and len(turns) < self.slots:
                turns.join(*waiting.popleft())
            seconds, index = turns.next_over()
            now += seconds
            if index >= 0:
                ends[index], left = now, left - 1
            owed += followed
            if owed >= 1 and (load := next(to_come, None)):
                owed -= 1
                waiting.append((-1, load))
        return [self.overhead * end for end in ends]


@dataclass(eq=False)
class _Text:
    """A text of few steps. left: calls."""

    left: float
    index: int
    load: Load


class _Turns:
    """The texts in flight. Those of few steps go first, in the order in which they came. The others advance together:
    `_rounds` counts the calls of each, and a heap holds them by the round that is their last one."""

    def __init__(self, pace: Mapping[int, Pace]) -> None:
        self._pace = pace
        self._few: list[_Text] = []
        self._others: list[tuple[float, int, int, Load]] = []
        self._rows: dict[int, float] = dict.fromkeys(pace, 0.0)  # of a round of the others, by length
        self._rounds = 0.0
        self._joined = 0

    def __len__(self) -> int:
        return len(self._few) + len(self._others)

    def join(self, index: int, load: Load) -> None:
        if load.few:
            self._few.append(_Text(load.calls, index, load))
            return
        self._joined += 1
        heapq.heappush(self._others, (self._rounds + load.calls, self._joined, index, load))
        self._rows[load.length] += load.rows

    def next_over(self) -> tuple[float, int]:
        """Let time pass until a text is over: the seconds of it, and which one it is."""
        first = self._first()
        fast, slow = self._speeds([text.load for text in first])
        until_first = min((text.left for text in first), default=math.inf) / fast
        until_other = (self._others[0][0] - self._rounds) / slow if self._others else math.inf
        passed = min(until_first, until_other)
        self._rounds += passed * slow
        for text in first:
            text.left -= passed * fast
        if until_first <= until_other:
            over = min(first, key=lambda text: text.left)
            self._few.remove(over)
            return passed, over.index
        self._rounds, _, index, load = heapq.heappop(self._others)
        self._rows[load.length] -= load.rows
        return passed, index

    def _first(self) -> list[_Text]:
        """Those of few steps that are in the next call."""
        if not self._few:
            return []
        length = self._few[0].load.length
        chosen: list[_Text] = []
        room: float = self._pace[length].short_rows if self._others else self._pace[length].max_rows
        for text in self._few:
            if text.load.length == length and (not chosen or text.load.rows <= room):
                chosen.append(text)
                room -= text.load.rows
        return chosen

    def _speeds(self, first: Sequence[Load]) -> tuple[float, float]:
        """Calls a second of each of these texts, which go first, and of each of the others."""
        rows = dict(self._rows)
        for load in first:
            rows[load.length] += load.rows
        of_row, held = {}, {}
        for length, count in rows.items():
            if count > 1e-6:
                pace = self._pace[length]
                held[length] = min(count, pace.short_rows if first and self._others else pace.max_rows)
                of_row[length] = pace.of_row(held[length])
        of_first = sum(load.rows * of_row[load.length] for load in first)
        of_others = sum(self._rows[length] * seconds for length, seconds in of_row.items())
        together = 1 / (of_first + of_others)
        if not first or not self._others or all(rows[length] <= held[length] for length in held):
            return together, together
        length = first[0].length
        fast = max(together, min(1 / (held[length] * of_row[length]), (1 - 1 / OTHERS) / of_first))
        return fast, (1 - fast * of_first) / of_others
