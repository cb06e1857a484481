"""What a network call costs by its rows, measured on the calls that are made anyway."""

from collections import deque
from dataclasses import dataclass, field

SAMPLES = 16  # recent calls of each size
ENOUGH = 4  # calls that say what a size costs; the first one, which may set something up, does not count
TOLERANCE = 1.02  # a call of fewer rows is as good as the best one when a row of it costs at most so much more
SHORT = 1.5  # the same while a short call is wanted


@dataclass
class _Size:
    calls: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))  # of a row


@dataclass
class CallCost:
    """Seconds of calls by length and by rows, in sizes 1, 2, 4, … to which rows are rounded up."""

    _sizes: dict[tuple[int, int], _Size] = field(default_factory=dict)

    def record(self, rows: int, length: int, seconds: float) -> None:
        """A call of so many rows of this length took so long."""
        size = self._sizes.setdefault((length, round_up(rows)), _Size())
        size.calls += 1
        if size.calls > 1:
            size.seconds.append(seconds / rows)

    def worth(self, length: int, limit: int, wanted: int) -> tuple[int, bool]:
        """How many rows a call should hold, and whether that is settled: the fewest, up to the limit, of which one
        costs about as little as in any other size. Where more rows are wanted than any call had, larger calls are
        tried, until two sizes in a row did not pay."""
        costs = self._known(length, limit)
        if not costs:
            return 1, limit == 1
        best, largest = min(costs, key=costs.__getitem__), max(costs)
        settled = largest > 2 * best or 2 * largest > limit
        if not settled and wanted > largest:
            return 2 * largest, False
        return _fewest(costs, TOLERANCE), settled

    def short(self, length: int, limit: int) -> int:
        """The rows of a call that is soon over, at a price: a row may cost half as much again as in the best size."""
        costs = self._known(length, limit)
        return _fewest(costs, SHORT) if costs else 1

    def _known(self, length: int, limit: int) -> dict[int, float]:
        """Seconds of a row, by size."""
        return {
            rows: min(size.seconds)
            for (at, rows), size in sorted(self._sizes.items())
            if at == length and rows <= limit and len(size.seconds) >= ENOUGH
        }

    def seconds(self, rows: int, length: int) -> float | None:
        """The usual seconds of a call of so many rows, or None when none was made."""
        size = self._sizes.get((length, round_up(rows)))
        return None if size is None or not size.seconds else sorted(size.seconds)[len(size.seconds) // 2] * rows

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
