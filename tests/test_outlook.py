"""How long texts will take: known answers, and the driver's turns run call by call."""

import random
from collections import deque

import pytest

from elf_rt.sampling.outlook import FEW, OTHERS, Load, Outlook, Pace

LINEAR = {8: Pace(4, 4, {1: 1.0, 2: 2.0, 4: 4.0})}  # a millisecond a row
ONE_ROW = {8: Pace(1, 1, {1: 1.0})}


def text(calls: int, rows: float = 1.0, length: int = 8) -> Load:
    return Load(calls, calls, rows, length)


def test_alone_a_text_takes_its_calls():
    assert Outlook([], 8, LINEAR).finishes([text(9)]) == pytest.approx([0.009])


def test_a_cheap_wide_call_is_shared():
    flat = {8: Pace(4, 4, {1: 1.0, 2: 1.0, 4: 1.0})}
    assert Outlook([], 8, flat).finishes([text(5)] * 4) == pytest.approx([0.005] * 4)


def test_a_short_text_takes_turns_with_a_long_one():
    outlook = Outlook([text(64)], 8, LINEAR)
    assert outlook.finishes([text(4)]) == pytest.approx([0.008])
    assert outlook.finishes() == pytest.approx([0.064])


def test_where_calls_are_full_a_short_text_has_two_of_three():
    outlook = Outlook([text(64)] * 8, 16, ONE_ROW)
    assert outlook.finishes([text(4)]) == pytest.approx([0.006])


def test_a_short_text_has_shorter_calls():
    """Calls of four rows take 4 ms, and of two rows 3 ms: one is the short text's."""
    pace = {8: Pace(4, 2, {1: 2.0, 2: 3.0, 4: 4.0})}
    assert Outlook([text(64)] * 8, 16, pace).finishes([text(4)]) == pytest.approx([0.012])
    assert Outlook([text(64)] * 8, 16, pace).finishes()[0] == pytest.approx(64 * 0.008)


def test_texts_wait_where_slots_are_taken():
    assert Outlook([text(3), text(5)], 2, LINEAR).finishes([text(1)]) == pytest.approx([0.008])


def test_lengths_take_calls_of_their_own():
    pace = {**LINEAR, 16: Pace(4, 4, {1: 3.0})}
    assert Outlook([text(2)], 8, pace).finishes([text(2, length=16)]) == pytest.approx([0.008])


def test_texts_that_follow_take_turns_too():
    """Rounds of 3 ms, then of 2 ms while one of the two others, or one that followed, is left."""
    outlook = Outlook([text(10), text(10)], 8, LINEAR)
    for followed, seconds in ((0.0, 0.030 + 0.020), (0.5, 0.030 + 0.020 + 0.010), (1.0, 0.090)):
        assert outlook.finishes([text(30)], followed, [text(10)]) == pytest.approx([seconds])
    (mixed,) = outlook.finishes([text(30)], 1.0, [text(10), text(40)])
    assert mixed == pytest.approx(0.090)  # a longer one is not less of a load


def test_calls_under_way_come_first():
    outlook = Outlook([text(64)] * 2, 8, LINEAR, 2.0, under_way=0.003)
    assert outlook.finishes([text(4)]) == pytest.approx([2 * (0.003 + 0.012)])


def test_lengths_without_a_call_are_not_known():
    assert not Outlook([], 8, {8: Pace(4, 4, {})}).known([text(1)])
    assert Outlook([], 8, LINEAR).known([text(1)])


@pytest.mark.parametrize(("max_rows", "short_rows"), [(2, 2), (8, 2), (8, 4), (16, 8)])
@pytest.mark.parametrize("seed", range(5))
def test_kinds_are_the_turns_run_in_full(seed, max_rows, short_rows):
    """Call by call, as the driver does it, with whole rows."""
    draw = random.Random(seed)
    loads = [text(draw.choice([2, 3, 5, 5, 9, 17, 33, 65]), float(draw.choice([1, 1, 2]))) for _ in range(40)]
    pace = Pace(max_rows, short_rows, {1: 1.0, 2: 1.4, 4: 2.2, 8: 4.0})
    told = Outlook([], 16, {8: pace}).finishes(loads)
    waiting, ring, left, now = deque(range(40)), deque[int](), [load.calls for load in loads], 0.0
    ends, owed = [0.0] * 40, 0.0
    while waiting or ring:
        while waiting and len(ring) < 16:
            ring.append(waiting.popleft())
        few, others = ([k for k in ring if (loads[k].whole <= FEW) is short] for short in (True, False))
        few.sort()
        theirs = others and owed >= OTHERS * loads[others[0]].rows
        taken, rows = [], 0.0
        for k in (*others, *few) if theirs else (*few, *others):
            if not taken or rows + loads[k].rows <= (short_rows if few and others else max_rows):
                taken.append(k)
                rows += loads[k].rows
        owed = owed + rows - OTHERS * sum(loads[k].rows for k in taken if k in others) if others else 0.0
        owed = max((1 - OTHERS) * rows, owed)
        now += rows * pace.of_row(rows)
        for k in taken:
            ring.remove(k)
            left[k] -= 1
            ends[k] = now
            if left[k]:
                ring.append(k)
    errors = [abs(a - b) / b for a, b in zip(told, ends, strict=True)]
    long = sorted(error for error, load in zip(errors, loads, strict=True) if load.calls > 2 * FEW)
    assert long[len(long) // 2] < 0.05 and long[-1] < 0.2
    assert sorted(errors)[20] < 0.1  # a text of two calls may wait for a third one
