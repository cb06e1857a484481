"""How many rows a call should hold: found out on costs that are known."""

from itertools import count

import numpy as np
import pytest

from elf_rt.sampling.cost import CallCost


def cost_of_calls() -> CallCost:
    return CallCost(most=lambda length: 64)


def settle(seconds) -> tuple[int, list[int]]:
    """What it settles at, and the rows that it asked for on the way; seconds: of a call, by rows."""
    asked, cost = [], cost_of_calls()
    for _ in range(500):
        rows = cost.max_rows(16, wanted=64)
        if cost.settled(16):
            return rows, asked
        asked.append(rows)
        cost.record(rows, 16, seconds(rows))
    raise AssertionError(f"not settled: {asked}")


@pytest.mark.parametrize(
    ("seconds", "want"),
    [
        (lambda rows: 1.0 + 0.1 * max(0, rows - 8) * 20, 8),  # as dear as one row up to 8
        (lambda rows: 1.0 * rows, 1),  # no row is cheaper beside others
        (lambda rows: 0.8 + 0.5 * rows, 32),  # a row of 64 is cheaper by 2.4% only
        (lambda rows: rows * (1.3 if rows > 1 else 1.0), 1),  # worse than alone
    ],
)
def test_a_call_holds_the_fewest_rows_that_pay(seconds, want):
    rows, asked = settle(seconds)
    assert rows == want
    assert max(asked) <= 4 * want  # two larger sizes were tried, no more


@pytest.mark.parametrize("period", [7, 12, 19, 31, 53])
def test_a_size_is_not_chosen_by_the_pace_of_the_machine(period):
    """It is slower by two thirds every other `period` calls; a row of eight is cheaper than others by 15 % and more."""
    calls = count()

    def seconds(rows):
        slow = next(calls) // period % 2
        return (1.0 + 0.6 * slow) * rows * (1.0 + 0.15 * abs(np.log2(rows / 8)) ** 0.5)

    rows, _ = settle(seconds)
    assert rows == 8


def test_no_larger_call_is_tried_for_rows_that_are_not_there():
    """Three texts of two rows want 6: a call of 4 pays, and 8 was tried; so nothing is left to find out for them."""
    cost = cost_of_calls()
    for rows, seconds in ((2, 2.0), (4, 3.0), (6, 4.5)):
        for _ in range(10):
            cost.record(rows, 16, seconds)
    assert cost.max_rows(16, wanted=6) == cost.max_rows(16, wanted=8) == 4
    assert cost.max_rows(16, wanted=9) == 16 and not cost.settled(16)


def test_costs_are_found_through_noise():
    noise = np.random.default_rng(0)
    rows, _ = settle(lambda rows: (1.0 + 2.0 * max(0, rows - 8)) * (1 + noise.exponential(0.3)))
    assert rows in (4, 8, 16)
    cost = cost_of_calls()
    assert cost.seconds(4, 16) is None
    for seconds in (9.0, 0.1, 0.2, 0.3):  # the first call sets something up
        cost.record(3, 16, seconds)
    assert cost.by_rows(16) == {4: pytest.approx(1e3 * 0.2 / 3 * 4)}
    assert cost.by_rows(15) == {}
