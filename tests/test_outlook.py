"""How long texts will take: known answers, and the driver's ring run in full."""

import math
import random
from collections import deque

import pytest

from elf_rt.sampling.outlook import Load, Outlook, Pace

LINEAR = {8: Pace(4, {1: 1.0, 2: 2.0, 4: 4.0})}  # a millisecond a row


def test_alone_a_text_takes_its_calls():
    assert Outlook([], 8, LINEAR).finishes([Load(9, 1.0, 8)]) == pytest.approx([0.009])


def test_a_cheap_wide_call_is_shared():
    flat = {8: Pace(4, {1: 1.0, 2: 1.0, 4: 1.0})}
    assert Outlook([], 8, flat).finishes([Load(5, 1.0, 8)] * 4) == pytest.approx([0.005] * 4)


def test_a_short_text_does_not_wait_for_a_long_one():
    outlook = Outlook([Load(64, 1.0, 8)], 8, LINEAR)
    long, short = outlook.finishes([Load(4, 1.0, 8)])
    assert (short, long) == pytest.approx((0.008, 0.068))


def test_texts_wait_where_slots_are_taken():
    outlook = Outlook([Load(3, 1.0, 8), Load(5, 1.0, 8)], 2, LINEAR)
    assert outlook.finishes([Load(1, 1.0, 8)])[-1] == pytest.approx(0.008)


def test_lengths_take_calls_of_their_own():
    pace = {**LINEAR, 16: Pace(4, {1: 3.0})}
    assert Outlook([Load(2, 1.0, 8)], 8, pace).finishes([Load(2, 1.0, 16)]) == pytest.approx([0.008, 0.008])


def test_texts_to_come_take_turns_too():
    outlook = Outlook([], 8, LINEAR)
    (alone,) = outlook.finishes([Load(10, 1.0, 8)])
    (crowded,) = outlook.finishes([Load(10, 1.0, 8)], ((0.005 * k, Load(100, 1.0, 8)) for k in range(99)))
    assert alone == pytest.approx(0.010)
    # Every 5 ms a row more, up to 8: rounds of 2, 3, … ms, of which ten are to be done.
    rounds = sum(5 / rows for rows in range(2, 8))
    assert crowded == pytest.approx(1e-3 * (30 + 8 * (10 - rounds)))


def test_lengths_without_a_call_are_not_known():
    assert not Outlook([], 8, {8: Pace(4, {})}).known([Load(1, 1.0, 8)])
    assert Outlook([], 8, LINEAR).known([Load(1, 1.0, 8)])


@pytest.mark.parametrize("seed", range(5))
def test_rounds_are_the_ring_run_in_full(seed):
    """Call by call, as the driver does it, with whole rows."""
    draw = random.Random(seed)
    loads = [Load(draw.randint(2, 64), float(draw.choice([1, 1, 2])), 8) for _ in range(40)]
    pace = Pace(8, {1: 1.0, 2: 1.4, 4: 2.2, 8: 4.0})
    told = Outlook([], 16, {8: pace}).finishes(loads)
    waiting, ring, left, now = deque(range(40)), deque[int](), [load.calls for load in loads], 0.0
    ends = [0.0] * 40
    while waiting or ring:
        while waiting and len(ring) < 16:
            ring.append(waiting.popleft())
        taken, room = [], pace.max_rows
        while ring and room >= loads[ring[0]].rows:
            taken.append(ring.popleft())
            room -= int(loads[taken[-1]].rows)
        rows = pace.max_rows - room
        size = 1 << math.ceil(math.log2(rows))
        now += 1e-3 * pace.ms[size] / size * rows
        for text in taken:
            left[text] -= 1
            ends[text] = now
            if left[text]:
                ring.append(text)
    errors = sorted(abs(a - b) / b for a, b in zip(told, ends, strict=True))
    assert errors[20] < 0.05 and errors[-1] < 0.25, errors
