"""A text on its way, as its caller has it: timings, drafts, waiting, asyncio."""

import asyncio
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import pytest
from stub_engine import LONG, Gate, idle, pend, program, steps, stub_driver

import elf_rt
from elf_rt.model import Text
from elf_rt.pending import Pending


@pytest.fixture(scope="module")
def model(bundle):
    with elf_rt.load(bundle("cond"), "onnxruntime", threads=1) as opened:
        yield opened


def test_timings_are_the_texts_own():
    gate = Gate()
    driver = stub_driver(gate, max_rows=1)
    first = pend(driver, program(4, drafts_every=2))
    gate.reached()
    second = pend(driver, program(1, seed=1))
    time.sleep(0.05)
    gate.let(100)
    a, b = first.result(LONG).timings, second.result(LONG).timings
    assert a.calls == 5 + 1 and b.calls == 2  # a draft after step 2; after step 4 comes the text itself
    for times in (a, b):
        assert times.waited_ms + times.network_ms + times.integrator_ms <= times.total_ms
    assert b.waited_ms > 40 and a.network_ms > 40
    driver.close()


def test_a_slow_reader_is_not_counted(model):
    stream = model.stream(n=1, seed=0, steps=4, drafts_every=2)
    told = []
    for event in stream:
        told.append(event)
        time.sleep(0.1)
    (result,) = told[-1]
    assert [draft.step for draft in told[:-1]] == [1, 2, 3, 4] and result.timings.calls == 5 + 1
    assert result.timings.total_ms < 400


def test_drafts_of_a_pending(model):
    pending = model.submit(Text(seed=3, params=steps(model, 7)), drafts_every=2)
    assert [draft.step for draft in pending] == [2, 4, 6] and pending.done()
    assert [draft.step for draft in pending] == [2, 4, 6]  # again, from the first one on
    ended: list[Pending] = []
    pending.add_done_callback(ended.append)
    assert ended == [pending]
    assert np.array_equal(pending.result().ids, model.generate(seed=3, steps=7)[0].ids)


def test_a_reader_that_goes_takes_nothing_from_the_others():
    """A collection of garbage may close a forgotten iterator at any moment, in the driver's thread too."""
    gate = Gate()
    driver = stub_driver(gate)
    pending = pend(driver, program(3, drafts_every=1))
    gate.let(3)
    forgotten = iter(pending)
    next(forgotten)
    with pending._reading(lambda done: forgotten.close() if done is None else None):
        last = iter(pending)
        next(last), next(last)
        gate.let(100)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(list, last).result(LONG) == []
    driver.close()


def test_result_waits_no_longer_than_it_is_told():
    gate = Gate()
    driver = stub_driver(gate)
    pending = pend(driver, program(1))
    with pytest.raises(FutureTimeout):
        pending.result(0.01)
    assert not pending.done()
    gate.let(2)
    assert pending.result(LONG)
    driver.close()


def test_asyncio(model):
    async def use():
        pending = model.submit(Text(seed=3, params=steps(model, 6)), drafts_every=2)
        seen = [draft.step async for draft in pending]
        return seen, await pending, await asyncio.gather(*(model.submit(Text(seed=k)) for k in range(5)))

    seen, result, several = asyncio.run(asyncio.wait_for(use(), LONG))
    assert seen == [2, 4] and np.array_equal(result.ids, model.generate(seed=3, steps=6)[0].ids)
    for written, expected in zip(several, model.write([Text(seed=k) for k in range(5)]), strict=True):
        assert np.array_equal(written.ids, expected.ids)


def test_cancelling_the_task_that_awaits_cancels_the_text(model):
    async def use():
        pending = model.submit(Text(seed=0, params=steps(model, 500)))

        async def wait():
            await pending

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return pending

    pending = asyncio.run(asyncio.wait_for(use(), LONG))
    with pytest.raises(CancelledError):
        pending.result(LONG)
    assert pending.cancelled() and idle(model)
