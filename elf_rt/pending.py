"""Texts on their way: the events of many, and one that a caller waits for, iterates over, or cancels."""

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from queue import SimpleQueue
from typing import NoReturn

import numpy as np

from elf_rt.errors import BackendError
from elf_rt.results import Draft, Result
from elf_rt.sampling.driver import Driver, Task
from elf_rt.sampling.program import Event, Program, StepDone, Written

Reader = Callable[[StepDone | None], object]  # of drafts; None: there will be no more


class EventStream:
    """The events of one caller's texts as they come, by the index of the text.

    Texts are made and submitted group by group, at most two groups ahead of those that are written. The first error is
    raised; then, or when this object is closed or forgotten, the texts that are left are cancelled. Without ``steps``
    the caller's thread sleeps until a text is written.
    """

    def __init__(self, driver: Driver, groups: Iterator[Sequence[Program]], steps: bool = True) -> None:
        self._driver, self._groups, self._steps = driver, groups, steps
        self._events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
        self._tasks: dict[int, Task] = {}
        self._submitted = 0
        self._size = 0  # texts in the last group
        self._feed()
        self._feed()

    def __iter__(self) -> "EventStream":
        return self

    def __next__(self) -> tuple[int, StepDone | Written]:
        if not self._tasks:
            raise StopIteration
        self._driver.check_process()
        index, event = self._events.get()
        if isinstance(event, BaseException):
            self.close()
            raise event
        if isinstance(event, Written):
            del self._tasks[index]
            if len(self._tasks) <= self._size:
                self._feed()
        return index, event

    def close(self) -> None:
        """Cancel what is not written yet."""
        self._driver.cancel(list(self._tasks.values()))
        self._tasks.clear()

    def __del__(self) -> None:
        self.close()

    def _feed(self) -> None:
        group = next(self._groups, None)
        if group is None:
            return
        indices = range(self._submitted, self._submitted + len(group))
        posts = [partial(_put, self._events, self._steps, index) for index in indices]
        self._tasks |= dict(zip(indices, self._driver.submit(group, posts, self._events), strict=True))
        self._submitted, self._size = indices.stop, len(group)


def by_group(run: EventStream, groups: Sequence[range], steps: int) -> Iterator[dict[int, Event]]:
    """The events of texts that all have the same steps, by index and group by group: a step when the whole group has
    done it, and last what was written. groups: of indices, to which more are added as texts are submitted."""
    events: defaultdict[int, dict[int, Event]] = defaultdict(dict)  # by step, of those not told yet; 0: written
    group, step = 0, 1  # the next to tell
    for index, event in run:
        events[event.step if isinstance(event, StepDone) else 0][index] = event
        while group < len(groups) and events[step].keys() >= set(groups[group]):
            yield {i: events[step].pop(i) for i in groups[group]}
            group, step = (group + 1, 1) if step == 0 else (group, (step + 1) % (steps + 1))


def _put(events: "SimpleQueue[tuple[int, Event]]", steps: bool, index: int, event: Event) -> None:
    if steps or not isinstance(event, StepDone):
        events.put((index, event))


class Pending:
    """A text that was submitted. Wait for it with ``result`` or ``await``; iterate, also with ``async for``, over its
    drafts; ``cancel`` it. Safe to share between threads."""

    def __init__(
        self,
        driver: Driver,
        program: Program,
        finish: Callable[[Written], Result],
        read: Callable[[np.ndarray], str | None],
    ) -> None:
        self._driver, self._steps, self._finish, self._read = driver, program.table.num_steps, finish, read
        self._written: Future[Written] = Future()
        self._written.set_running_or_notify_cancel()  # from now on the driver alone ends the future
        self._drafts: list[StepDone] = []
        self._readers: list[Reader] = []
        self._lock = threading.RLock()
        (self._task,) = driver.submit([program], [self._post], self)

    def result(self, timeout: float | None = None) -> Result:
        """The written text.

        Args:
            timeout: seconds to wait; None: until the text is over.

        Raises:
            TimeoutError: the time is over; the text goes on.
            concurrent.futures.CancelledError: it was cancelled.
            BackendError: it could not be written, the model was closed, or another process submitted it.
        """
        self._check_process()
        return self._finish(self._written.result(timeout))

    def done(self) -> bool:
        """Whether it is over: written, cancelled or failed."""
        return self._written.done()

    def cancelled(self) -> bool:
        """Whether it is over because it was cancelled."""
        return self.done() and isinstance(self._written.exception(), CancelledError)

    def cancel(self) -> bool:
        """Drop the text before the next network call; False when it is over already."""
        return self._driver.cancel([self._task])

    def add_done_callback(self, call: Callable[["Pending"], None]) -> None:
        """Call a function with this object when the text is over: in the driver's thread, so it must not block."""
        self._written.add_done_callback(lambda _: call(self))

    def __iter__(self) -> Iterator[Draft]:
        """The drafts from the first one on, each when it is there; ends when the text is over."""
        told: SimpleQueue[StepDone | None] = SimpleQueue()
        with self._reading(told.put):
            yield from map(self._draft, iter(told.get, None))

    def __await__(self) -> Generator[None, None, Result]:
        return self._wait().__await__()

    async def __aiter__(self) -> AsyncIterator[Draft]:
        told: asyncio.Queue[StepDone | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        with self._reading(lambda done: loop.call_soon_threadsafe(told.put_nowait, done)):
            while (done := await told.get()) is not None:
                yield self._draft(done)

    async def _wait(self) -> Result:
        self._check_process()
        try:
            return self._finish(await asyncio.wrap_future(self._written))
        except asyncio.CancelledError:  # the task that awaits was cancelled
            self.cancel()
            raise

    def __reduce__(self) -> NoReturn:
        raise BackendError("a text on its way belongs to its process: send its result(), which can be pickled")

    def _check_process(self) -> None:
        if not self.done():
            self._driver.check_process()

    def _draft(self, done: StepDone) -> Draft:
        assert done.draft is not None
        return Draft(done.step, self._steps, done.t, [self._read(done.draft)], 1)

    @contextlib.contextmanager
    def _reading(self, reader: Reader) -> Iterator[None]:
        """Tell a reader the drafts so far, and each one that comes."""
        self._check_process()
        with self._lock:
            for done in (*self._drafts, *[None] * self.done()):
                reader(done)
            self._readers.append(reader)
        try:
            yield
        finally:
            with self._lock:
                self._readers.remove(reader)

    def _post(self, event: Event) -> None:
        """In the driver's thread."""
        if isinstance(event, StepDone) and event.draft is None:
            return
        with self._lock:
            if isinstance(event, Written):
                self._written.set_result(event)
            elif isinstance(event, StepDone):
                self._drafts.append(event)
            else:
                self._written.set_exception(event)
            for reader in [*self._readers]:  # an abandoned one may go meanwhile
                with contextlib.suppress(RuntimeError):  # RuntimeError: the loop of its reader is closed
                    reader(event if isinstance(event, StepDone) else None)
