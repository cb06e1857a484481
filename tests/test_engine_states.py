"""The engine under any order of submits, cancels, calls and a close, against each text written alone."""

from concurrent.futures import CancelledError
from functools import cache

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from stub_engine import LONG, Gate, alone, close_while_calls_run, pend, program, stub_driver

from elf_rt.errors import BackendError

KINDS = st.tuples(
    st.sampled_from((1, 2, 4, 5, 9, 20)),  # steps: of those that go first, and of others
    st.integers(0, 5),  # seed
    st.sampled_from((3, 4)),  # length
    st.integers(0, 3),  # drafts_every
)


def made(kind):
    steps, seed, length, drafts_every = kind
    return program(steps, seed=seed, length=length, drafts_every=drafts_every, latents=True)


@cache
def expected(kind):
    return alone(made(kind))


class Texts(RuleBasedStateMachine):
    """Calls are let through by a rule, so texts come and go between any two of them."""

    def __init__(self):
        super().__init__()
        self.gate = Gate()
        self.driver = stub_driver(self.gate, max_rows=3)
        self.texts, self.cancelled = [], set()

    @rule(kind=KINDS)
    def submit(self, kind):
        self.texts.append((kind, pend(self.driver, made(kind))))

    @rule(calls=st.integers(1, 12))
    def let_calls_through(self, calls):
        self.gate.let(calls)

    @rule(which=st.integers(0, 50))
    def cancel(self, which):
        if self.texts:
            _, pending = self.texts[which % len(self.texts)]
            if pending.cancel():
                self.cancelled.add(pending)

    @invariant()
    def nothing_is_counted_twice(self):
        stats = self.driver.stats()
        told = stats.slots + stats.waiting + stats.finished + stats.cancelled
        assert len(self.texts) - 1 <= told <= len(self.texts) and not stats.failed  # one may be about to get its slot

    def teardown(self):
        self.gate.let(100_000)
        for kind, pending in self.texts:
            try:
                written = pending.result(LONG)
            except CancelledError:
                assert pending in self.cancelled
            else:
                assert np.array_equal(written.ids, expected(kind).ids)
                assert np.array_equal(written.latents, expected(kind).latents)
        stats = self.driver.stats()
        assert (stats.slots, stats.waiting, stats.rows) == (0, 0, 0)
        assert stats.finished + stats.cancelled == len(self.texts)
        self.driver.close()
        assert not self.driver._thread.is_alive()


TestTexts = Texts.TestCase
TestTexts.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_close_at_any_moment_ends_every_text():
    for calls in range(12):
        gate = Gate()
        driver = stub_driver(gate, max_rows=3)
        texts = [pend(driver, program(1 + k, seed=k)) for k in range(6)]
        for _ in range(calls):
            gate.let()
        close_while_calls_run(driver, gate)
        for pending in texts:
            try:
                assert len(pending.result(LONG).ids) == 4
            except BackendError as error:
                assert "the model is closed" in str(error)
