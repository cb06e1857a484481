"""How long texts will take, told before they start: the driver's turns, run ahead in thought.

Texts take turns, those that are nearly done before the others (``elf_rt.sampling.driver``). So there are two crowds,
each of which advances at one speed, and between two moments at which a text joins, leaves, or comes near its end, both
speeds are constant.
"""

import heapq
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

NEARLY_DONE = 5  # calls left from which on a text goes first: those of 4 steps
SHARE = 2 / 3  # of the rows of all calls that go to such texts, where others wait


@dataclass(frozen=True)
class Load:
    """What a text still asks for. calls: until it is written; whole: of the whole text; rows: of each of them, on
    average."""

    calls: int
    whole: int
    rows: float
    length: int


@dataclass(frozen=True)
class Pace:
    """Calls of one length. max_rows: of one call; ms: of a call by its rows, in sizes 1, 2, 4, …"""

    max_rows: int
    ms: Mapping[int, float]

    def seconds(self, rows: float) -> float:
        """Of so many rows, in as few calls as hold them. A size that was not measured costs a row what the nearest one
        costs."""
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

    def finishes(self, new: Sequence[Load] = (), followed: float = 0.0) -> list[float]:
        """Seconds until each of the new texts is over, which come now; without new ones, until each of the others is.

        Args:
            followed: the share of the texts that are over after which another one like it comes: 1 where a server
                stays as busy as it is, 0 where nothing comes any more.
        """
        asked = len(new) or len(self.texts)
        waiting = deque(enumerate([*self.texts, *new], asked - len(self.texts) - len(new)))
        ends: dict[int, float] = {}  # those that were asked for are 0, 1, …
        turns, now, owed = _Turns(self.pace), 0.0, 0.0
        while not ends.keys() >= set(range(asked)):
            while waiting and len(turns) < self.slots:
                turns.join(*waiting.popleft())
            seconds, index, load = turns.next_over()
            now += seconds
            ends[index] = now
            owed += followed
            if owed >= 1:
                owed -= 1
                waiting.append((-1, replace(load, calls=load.whole)))
        return [ends[index] for index in range(asked)]


@dataclass
class _Text:
    left: float  # calls
    joined: int
    index: int
    load: Load


class _Turns:
    """The texts in flight. Those that are nearly done go by the calls that they have left. The others take turns, so
    they advance together: `_rounds` counts the calls of each, and a heap holds them by the round that is their last
    one before they are nearly done."""

    def __init__(self, pace: Mapping[int, Pace]) -> None:
        self._pace = pace
        self._nearly_done: list[_Text] = []
        self._others: list[tuple[float, int, int, Load]] = []
        self._rows: dict[int, float] = dict.fromkeys(pace, 0.0)  # of a round of the others, by length
        self._rounds = 0.0
        self._joined = 0

    def __len__(self) -> int:
        return len(self._nearly_done) + len(self._others)

    def join(self, index: int, load: Load) -> None:
        self._joined += 1
        if load.calls <= NEARLY_DONE:
            self._come_near(_Text(load.calls, self._joined, index, load))
        else:
            last = self._rounds + load.calls - NEARLY_DONE
            heapq.heappush(self._others, (last, self._joined, index, load))
            self._rows[load.length] += load.rows

    def _come_near(self, text: _Text) -> None:
        self._nearly_done.append(text)
        self._nearly_done.sort(key=lambda text: (text.left, text.joined))

    def next_over(self) -> tuple[float, int, Load]:
        """Let time pass until a text is over: the seconds of it, and which one it is."""
        passed = 0.0
        while True:
            first = self._next_call()
            fast, slow = self._speeds(first)
            seconds = first[0].left / fast if first else math.inf
            others = (self._others[0][0] - self._rounds) / slow if self._others else math.inf
            now = min(seconds, others)
            passed += now
            self._rounds += now * slow if self._others else 0
            for text in first:
                text.left -= now * fast
            if seconds <= others:
                over = self._nearly_done.pop(0)
                return passed, over.index, over.load
            self._rounds, joined, index, load = heapq.heappop(self._others)
            self._rows[load.length] -= load.rows
            self._come_near(_Text(NEARLY_DONE, joined, index, load))

    def _next_call(self) -> list[_Text]:
        """Those of the nearly done that fit in a call, with the fewest calls left."""
        chosen, room = [], 0.0
        for text in self._nearly_done:
            if not chosen:
                length, room = text.load.length, float(self._pace[text.load.length].max_rows)
            elif text.load.length != length or text.load.rows > room:
                continue
            chosen.append(text)
            room -= text.load.rows
        return chosen

    def _speeds(self, first: Sequence[_Text]) -> tuple[float, float]:
        """Calls a second of each of these texts, and of those that are not nearly done."""
        rows = dict(self._rows)
        for text in first:
            rows[text.load.length] += text.load.rows
        of_row = {n: self._pace[n].seconds(count) / count for n, count in rows.items() if count > 1e-6}
        of_first = sum(text.load.rows * of_row[text.load.length] for text in first)
        of_others = sum(count * of_row[n] for n, count in self._rows.items() if count > 1e-6)
        together = 1 / (of_first + of_others)
        if not first or not self._others or all(rows[n] <= self._pace[n].max_rows for n in of_row):
            return together, together
        length = first[0].load.length
        whole_call = min(rows[length], self._pace[length].max_rows) * of_row[length]
        fast = max(together, min(1 / whole_call, SHARE / of_first))
        return fast, (1 - fast * of_first) / of_others
