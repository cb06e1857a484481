"""What a network call costs by its rows, with the pass before it, measured on the calls that are made anyway."""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

ENOUGH = 4  # calls that say what a size costs; the first one, which may set something up, does not count
SAMPLES = 16  # calls that say it well, which a size gets that is close to the best one
CLOSE = 1.15  # a size whose row costs at most so much more may turn out to be the best one
FOLLOWING = 0.5  # how fast the pace of the machine is followed while sizes are compared
RECENT = 64  # calls of any size that say what the usual pace is
TOLERANCE = 1.03  # a call of fewer rows is as good as the best one when a row of it costs at most so much more
SHORT = 1.5  # the same while a short call is wanted


@dataclass
class _Size:
    """costs: of a row, of the first SAMPLES calls, in seconds over the pace of then."""

    calls: int = 0
    costs: list[float] = field(default_factory=list)

    @property
    def cost(self) -> float:
        return statistics.median(self.costs)

    @property
    def known(self) -> bool:
        return len(self.costs) >= ENOUGH


@dataclass
class CallCost:
    """What calls cost by length and by rows, in sizes 1, 2, 4, … to which rows are rounded up.

    A machine that others use too is now faster, now slower, by more than sizes differ. So what a size costs is told
    apart from the pace of the machine: seconds = pace x cost of a row x rows.

    Attributes:
        most: the most rows that a call of a length can have.
    """

    most: Callable[[int], int]
    _sizes: dict[tuple[int, int], _Size] = field(default_factory=dict)
    _pace: float = 0.0  # of the last calls
    _paces: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _last: tuple[int, int] | None = None  # length and size of the last call

    def record(self, rows: int, length: int, seconds: float) -> None:
        """A call of so many rows of this length took so long."""
        self._last = length, round_up(rows)
        size = self._sizes.setdefault(self._last, _Size())
        size.calls += 1
        if size.calls == 1:
            return
        of_row = seconds / rows
        self._pace = self._pace or of_row
        if size.known:
            self._paces.append(of_row / size.cost)
            self._pace *= (self._paces[-1] / self._pace) ** FOLLOWING
        if len(size.costs) < SAMPLES:
            size.costs.append(of_row / self._pace)

    def max_rows(self, length: int, wanted: int = 0) -> int:
        """The rows that a call should hold now, where so many are wanted; with 0, nothing is tried."""
        return self._worth(length, wanted)[0]

    def settled(self, length: int) -> bool:
        """Whether it is found out how many rows are worth it."""
        return self._worth(length, self.most(length))[1]

    def share(self, length: int) -> int:
        """The rows that one caller may have in flight: those of a call, or enough for two larger sizes to be tried."""
        rows, settled = self._worth(length, self.most(length))
        return rows if settled else min(4 * rows, self.most(length))

    def short_rows(self, length: int) -> int:
        """The rows of a call that is soon over, at a price: a row may cost half as much again as in the best size."""
        costs = self._known(length)
        return _fewest(costs, SHORT) if costs else 1

    def _worth(self, length: int, wanted: int) -> tuple[int, bool]:
        """How many rows a call should hold, and whether that is settled: the fewest of which one costs about as little
        as in any other size. Where more rows are wanted than any call had, larger calls are tried, until two sizes in a
        row did not pay. Sizes that are close to the best one are tried until all are known well. What is tried takes
        turns with the best one, which tells the pace."""
        costs, limit = self._known(length), self.most(length)
        if not costs:
            return 1, limit == 1
        best, largest = min(costs, key=costs.__getitem__), max(costs)
        settled = largest > 2 * best or 2 * largest > limit
        if not settled and wanted > largest:
            return self._in_turns(length, 2 * largest, best), False
        calls = {rows: len(self._sizes[length, rows].costs) for rows in costs if costs[rows] <= CLOSE * costs[best]}
        open_sizes = [rows for rows, count in calls.items() if count < SAMPLES and rows < 2 * wanted]
        if len(calls) > 1 and open_sizes:
            return self._in_turns(length, min(open_sizes, key=calls.__getitem__), best), False
        return _fewest(costs, TOLERANCE), settled

    def _in_turns(self, length: int, tried: int, best: int) -> int:
        return best if self._last == (length, tried) else tried

    def _known(self, length: int) -> dict[int, float]:
        """What a row costs, by size."""
        most, sizes = self.most(length), sorted(self._sizes.items())
        return {rows: size.cost for (at, rows), size in sizes if at == length and rows <= most and size.known}

    def seconds(self, rows: int, length: int) -> float | None:
        """The usual seconds of a call of so many rows, or None when none was made."""
        size = self._sizes.get((length, round_up(rows)))
        if size is None or not size.costs:
            return None
        return (statistics.median(self._paces) if self._paces else self._pace) * size.cost * rows

    def by_rows(self, length: int) -> dict[int, float]:
        """The usual milliseconds of a call by its size."""
        return {
            rows: round(1e3 * seconds, 4)
            for at, rows in sorted(self._sizes)
            if at == length and (seconds := self.seconds(rows, length)) is not None
        }


def _fewest(costs: dict[int, float], tolerance: float) -> int:
    best = min(costs.values())
    return next(rows for rows, cost in costs.items() if cost <= tolerance * best)


def round_up(rows: int) -> int:
    """The smallest of 1, 2, 4, … that is not less."""
    return 1 << (rows - 1).bit_length()
