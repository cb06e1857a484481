"""The one thread that owns an engine: it lets texts in, gives each its turn, and tells what became of them.

Everything is decided between two calls: who joins, who is cancelled, which texts the next call holds. Texts take turns
in a ring, as many as a call should hold, so nobody waits for another's last step. Texts of few steps go first, in
shorter calls, up to two rows of three: so they are back at once, and yet all advance. Of one caller no more texts are
in flight than fit in a call, so a long request has its first texts early, and leaves slots to others.
"""

import contextlib
import os
import statistics
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from elf_rt.errors import BackendError, ElfError, GpuMemoryError, first_line
from elf_rt.sampling.engine import Engine, Slot
from elf_rt.sampling.outlook import OTHERS, Load, Outlook, Pace
from elf_rt.sampling.program import Event, Program, Stats, StepDone, Timings, Written

MAX_SLOTS = 128  # texts in flight
CLOSED = "the model is closed: load it again"

Post = Callable[[Event], None]


@dataclass(eq=False)
class Task:
    """A text on its way. post: is given its events, in the driver's thread, and must not block."""

    program: Program
    post: Post
    caller: object
    timings: Timings = field(default_factory=Timings)
    submitted: float = field(default_factory=time.perf_counter)
    slot: Slot | None = None
    cancelled: bool = False
    over: bool = False

    @property
    def rows(self) -> int:
        """Rows of its next call."""
        return len(self.program.rows(self.slot.j)) if self.slot is not None else 0

    @cached_property
    def few(self) -> bool:
        """Whether it goes first."""
        return self.load.few

    @property
    def passes_left(self) -> int:
        """Calls that are still to be enqueued."""
        return self.program.last + 1 - (self.slot.j if self.slot is not None else 1)

    @property
    def load(self) -> Load:
        """What it still asks for."""
        program = self.program
        return Load(max(1, self.passes_left), program.last, program.mean_rows, program.length)


class Driver:
    """Starts the thread, which opens the engine, uses it, and closes it.

    Args:
        running: the engine, for as long as the thread runs.
        length: that ``stats`` speaks of.

    Raises:
        BackendError: the engine could not be opened.
    """

    def __init__(self, running: AbstractContextManager[Engine[Any]], length: int) -> None:
        self._length = length
        self._wake = threading.Condition()
        self._waiting: OrderedDict[object, deque[Task]] = OrderedDict()  # by caller
        self._flying: dict[Task, None] = {}  # those that have a slot, in the order in which they got it
        self._ring: deque[Task] = deque()  # those of them that have calls left; each goes to the end after its call
        self._under_way: deque[Mapping[Task, int]] = deque()  # by call, with the rows of each; also the one being made
        self._rows_of: Counter[object] = Counter()  # in flight, by caller
        self._count: Counter[str] = Counter()
        self._last_rows = 0
        self._turn_began = 0.0  # when the call before was over, or the first one of a busy time begun
        self._overheads: deque[float] = deque(maxlen=64)  # what recent turns took, over the usual time of their calls
        self._owed = 0  # rows, times OTHERS, to texts that do not go first
        self._closing: str | None = None
        self._pid = os.getpid()
        opened: Future[Engine[Any]] = Future()
        self._thread = threading.Thread(target=self._main, args=(running, opened), name="elf-rt", daemon=True)
        self._thread.start()
        self._engine = opened.result()

    @property
    def forked(self) -> bool:
        """Whether this process is a child that was forked after the thread was started, and has none."""
        return self._pid != os.getpid()

    def submit(self, programs: Sequence[Program], post: Sequence[Post], caller: object) -> list[Task]:
        """Queue texts of one caller.

        Raises:
            BackendError: the driver is closed.
        """
        tasks = [Task(program, each, caller) for program, each in zip(programs, post, strict=True)]
        with self._wake:
            if self._closing is not None:
                raise BackendError(self._closing)
            if not tasks:
                return []
            self._waiting.setdefault(caller, deque()).extend(tasks)
            self._wake.notify()
        return tasks

    def check_process(self) -> None:
        """Raise where nobody will ever end a text.

        Raises:
            BackendError: this is a forked child, without the thread of its parent.
        """
        if self.forked:
            raise BackendError(
                "this text is written by the process that this one was forked from: submit it here again"
            )

    def cancel(self, tasks: Sequence[Task]) -> bool:
        """Drop texts before the next call is enqueued; False where all were over already, or are a parent process's."""
        if self.forked:
            return False
        with self._wake:
            open_tasks = [task for task in tasks if not task.over]
            for task in open_tasks:
                task.cancelled = True
            self._wake.notify()
        return bool(open_tasks)

    def share(self, length: int) -> int:
        """The rows that one caller may have in flight now."""
        return self._engine.cost.share(length)

    def stats(self) -> Stats:
        with self._wake:
            cost = self._engine.cost
            return Stats(
                slots=len(self._flying),
                waiting=sum(map(len, self._waiting.values())),
                rows=self._last_rows if self._flying else 0,
                max_rows=cost.max_rows(self._length),
                settled=cost.settled(self._length),
                call_ms=cost.by_rows(self._length),
                captures=self._engine.captures,
                bytes=self._engine.num_bytes(),
                **{name: self._count[name] for name in ("calls", "steps", "finished", "cancelled", "failed")},
            )

    def outlook(self, lengths: Iterable[int]) -> Outlook:
        """What is to be written, and how fast calls of its lengths and of these ones are."""
        with self._wake:
            texts, under_way = [task.load for task in self._everybody()], self._seconds_under_way()
            overhead = statistics.median(self._overheads or [1.0])
        cost, every = self._engine.cost, {*lengths, *(text.length for text in texts)}
        pace = {n: Pace(cost.max_rows(n), cost.short_rows(n), cost.by_rows(n)) for n in every}
        return Outlook(texts, MAX_SLOTS, pace, overhead, under_way)

    def _everybody(self) -> list[Task]:
        """In flight and waiting."""
        return [*self._flying, *(task for queue in self._waiting.values() for task in queue)]

    def _seconds_under_way(self) -> float:
        """Until the calls that come before all others are over."""
        calls = [(sum(call.values()), next(iter(call)).program.length) for call in list(self._under_way)]
        usual = sum(self._engine.cost.seconds(*call) or 0.0 for call in calls)
        return max(0.0, usual - (time.perf_counter() - self._turn_began))

    def close(self) -> None:
        """Stop after the calls under way; texts that are not over end with a BackendError. Waits for the thread."""
        if self.forked:
            return
        with self._wake:
            self._closing = self._closing or CLOSED
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # What follows runs in the driver's thread.

    def _main(self, running: AbstractContextManager[Engine[Any]], opened: "Future[Engine[Any]]") -> None:
        try:
            with running as engine:
                opened.set_result(engine)
                self._run(engine)
        except BaseException as error:
            if not opened.done():
                opened.set_exception(error)
            elif not isinstance(error, ElfError):  # of elf-rt itself; an engine that failed has told its texts
                raise

    def _run(self, engine: Engine[Any]) -> None:
        try:
            self._loop(engine)
        except BaseException as error:  # nobody must be left waiting
            self._closing = f"the engine stopped ({type(error).__name__}: {first_line(error)}): load the model again"
            raise
        finally:
            with self._wake:
                left = self._everybody()
            for task in left:
                with contextlib.suppress(Exception):  # of a slot that a broken GPU does not take back
                    self._end(engine, task, BackendError(self._closing or CLOSED))

    def _loop(self, engine: Engine[Any]) -> None:
        self._turn_began = time.perf_counter()
        while True:
            with self._wake:
                while self._closing is None and not (self._waiting or self._flying or self._under_way):
                    self._wake.wait()
                    self._turn_began = time.perf_counter()
                if self._closing is not None:
                    return
                dropped = [task for task in self._everybody() if task.cancelled]
            for task in dropped:
                self._end(engine, task, CancelledError("this text was cancelled"))
            self._admit(engine)
            while self._ring and len(self._under_way) < engine.depth:
                self._enqueue(engine)
            if self._under_way:
                self._collect(engine)

    def _admit(self, engine: Engine[Any]) -> None:
        """Give slots to waiting texts, one caller after the other."""
        while (task := self._next_waiting(engine)) is not None:
            try:
                task.slot = engine.open(task.program)
            except Exception as error:
                if isinstance(error, GpuMemoryError) and self._flying:  # some of which will be over
                    with self._wake:
                        self._waiting.setdefault(task.caller, deque()).appendleft(task)
                    return
                self._end(engine, task, _as_backend_error(error))
                continue
            with self._wake:
                self._flying[task] = None
                self._ring.append(task)
                self._rows_of[task.caller] += task.program.max_rows

    def _next_waiting(self, engine: Engine[Any]) -> Task | None:
        """The next text that may have a slot, out of its queue. A caller's last one goes behind the other callers."""
        with self._wake:
            if len(self._flying) >= MAX_SLOTS:
                return None
            for caller, queue in self._waiting.items():
                held, program = self._rows_of[caller], queue[0].program
                if held and held + program.max_rows > engine.cost.share(program.length):
                    continue
                task = queue.popleft()
                self._waiting.move_to_end(caller)
                if not queue:
                    del self._waiting[caller]
                return task
        return None

    def _enqueue(self, engine: Engine[Any]) -> None:
        """One call for the texts whose turn it is."""
        taken = self._take_turn(engine)
        tasks, slots = list(taken), [task.slot for task in taken if task.slot is not None]
        now = time.perf_counter()
        self._under_way.append(taken)
        try:
            engine.enqueue(slots)
        except Exception as error:
            self._under_way.pop()
            fewer = engine.cost.max_rows(tasks[0].program.length) < sum(taken.values())
            if isinstance(error, GpuMemoryError) and fewer and len(tasks) > 1:
                self._ring.extendleft(reversed(tasks))
            else:
                self._fail(engine, tasks, error)
            return
        self._owe(taken)
        for task in tasks:
            if not task.timings.calls:
                task.timings.waited_ms = 1e3 * (now - task.submitted)
            task.timings.calls += 1
            if task.passes_left:
                self._ring.append(task)

    def _take_turn(self, engine: Engine[Any]) -> dict[Task, int]:
        """The first text and those behind it of its length, as many as a call should hold; with the rows of each."""
        if len(self._ring) == 1:
            alone = self._ring.popleft()
            return {alone: alone.rows}
        few = sorted((task for task in self._ring if task.few), key=lambda task: task.submitted)
        others = [task for task in self._ring if not task.few]
        theirs = bool(others) and self._owed >= OTHERS * others[0].rows
        ring = [*others, *few] if theirs else [*few, *others]
        length = ring[0].program.length
        rows = {task: task.rows for task in ring if task.program.length == length}
        room = engine.cost.max_rows(length, sum(rows.values()))
        if few and others:
            room = min(room, engine.cost.short_rows(length))
        taken: dict[Task, int] = {}
        for task, count in rows.items():
            if not taken or count <= room:
                taken[task] = count
                room -= count
        self._ring = deque(task for task in self._ring if task not in taken)
        return taken

    def _owe(self, taken: Mapping[Task, int]) -> None:
        """Keep account of the share of the texts that do not go first, and of what a call gave them."""
        whole, had = sum(taken.values()), sum(count for task, count in taken.items() if not task.few)
        if had or not all(task.few for task in self._ring):
            self._owed = max((1 - OTHERS) * whole, self._owed + whole - OTHERS * had)
        else:
            self._owed = 0

    def _collect(self, engine: Engine[Any]) -> None:
        """Wait for the oldest call, and tell its texts what it did."""
        tasks = list(self._under_way.popleft())
        try:
            call = engine.collect()
        except Exception as error:  # the GPU failed: what is behind this call will not come either
            self._fail(engine, [*tasks, *(task for later in self._under_way for task in later)], error)
            self._under_way.clear()
            return
        now, usual = time.perf_counter(), engine.cost.seconds(call.rows, tasks[0].program.length)
        with self._wake:
            self._count["calls"] += 1
            self._last_rows = call.rows
            self._count["steps"] += len(tasks)
            self._overheads.append((now - self._turn_began) / (usual or call.network))
            self._turn_began = now
        for task, event in zip(tasks, call.events, strict=True):
            task.timings.network_ms += 1e3 * call.network
            task.timings.integrator_ms += 1e3 * call.integrator
            task.timings.calls += isinstance(event, StepDone) and event.draft is not None
            if not task.over:
                self._tell(engine, task, event)

    def _tell(self, engine: Engine[Any], task: Task, event: Event) -> None:
        if isinstance(event, Written):
            task.timings.total_ms = 1e3 * (time.perf_counter() - task.submitted)
            table = task.program.table
            if table.num_steps:  # the pass before the decoding call ended the last step
                task.post(StepDone(table.num_steps, float(table.t[-1])))
            self._end(engine, task, replace(event, timings=task.timings))
        elif not isinstance(event, StepDone):
            self._end(engine, task, event)
        elif event.step:
            task.post(event)

    def _fail(self, engine: Engine[Any], tasks: Sequence[Task], error: Exception) -> None:
        for task in dict.fromkeys(tasks):
            if not task.over:
                self._end(engine, task, _as_backend_error(error))

    def _end(self, engine: Engine[Any], task: Task, event: Written | BaseException) -> None:
        """A text is over: its slot is free before its caller hears of it."""
        kinds: dict[type, str] = {Written: "finished", CancelledError: "cancelled"}
        with self._wake:
            task.over = True
            self._count[kinds.get(type(event), "failed")] += 1
            if task.slot is None:
                queue = self._waiting.get(task.caller, deque())
                if task in queue:
                    queue.remove(task)
                if not queue:
                    self._waiting.pop(task.caller, None)
            else:
                del self._flying[task]
                self._rows_of[task.caller] -= task.program.max_rows
                self._rows_of = +self._rows_of  # callers that have nothing left go
                if task in self._ring:
                    self._ring.remove(task)
        try:
            if task.slot is not None:
                engine.free(task.slot)
        finally:
            task.post(event)


def _as_backend_error(error: Exception) -> ElfError:
    """What callers are told: one line, and the cause behind it."""
    if isinstance(error, ElfError):
        return error
    told = BackendError(f"the network call failed: {type(error).__name__}: {first_line(error)}")
    told.__cause__ = error
    return told
