"""The engine of rows: one network call for whatever texts are in flight, each at its own step.

A **slot** holds a text's state: z and the last estimate. A **row** is one row of a network call: a text takes one, or
one per guidance row, one more for a draft, and one for its decoding call. ``enqueue`` advances the slots that it is
given by one pass, packs their rows behind each other, and calls the network once on all of them. A slot that was in the
last call and is not in this one is advanced too, since its outputs would be overwritten; its inputs are written when
its turn comes.

``HostEngine`` computes on the CPU; ``elf_rt.device.engine.DeviceEngine`` is the same on a GPU.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeVar

import numpy as np

from elf_rt.errors import BackendError
from elf_rt.network import BoundGraph, Graph, HostBackend
from elf_rt.sampling import integrator
from elf_rt.sampling.cost import CallCost
from elf_rt.sampling.integrator import SlotStep
from elf_rt.sampling.program import Event, Program, StepDone, Written
from elf_rt.sampling.schedule import Row, X

MAX_BOUND = 12  # graphs of different shapes that stay bound
MAX_TOKENS = 16384  # rows x length of one call, whatever pays
HEAD_TOKENS = 256  # positions whose logits, each V wide, are in memory at the same time


@dataclass
class Call:
    """One finished call: what it did for each text, in the order of the slots, and seconds.

    Of a text's last call that is ``Written``, of the others ``StepDone``, with step 0 of the first, which ends none.
    """

    events: list[Event]
    rows: int
    network: float
    integrator: float


class Slot(Protocol):
    """The state of a text in an engine."""

    program: Program
    j: int  # the pass that comes next


S = TypeVar("S", bound=Slot)
Turn = tuple[S, tuple[Row, ...], slice]  # of a slot in a call: its rows, and where they are


class Engine(Protocol[S]):
    """Used by one thread: the driver's. S: its slots."""

    depth: int  # calls that may be under way before the oldest is waited for
    cost: CallCost  # of this engine's calls, and how many rows they should have

    @property
    def captures(self) -> int:
        """CUDA graphs captured so far."""
        ...

    def open(self, program: Program) -> S:
        """A slot for a text, started.

        Raises:
            BackendError: the engine takes no call of so many rows or this length. Nothing else is disturbed.
        """
        ...

    def enqueue(self, slots: Sequence[S]) -> None:
        """Advance slots of one length by one pass, and call the network on their rows.

        Raises:
            GpuMemoryError: no memory for so many rows, of which ``cost`` knows now. No slot was touched.
            BackendError: the call failed, and with it these slots.
        """
        ...

    def collect(self) -> Call:
        """Wait for the oldest call under way."""
        ...

    def free(self, slot: S) -> None:
        """Give a slot back, at any time."""
        ...

    def num_bytes(self) -> int:
        """Bytes of the slots and of the buffers of bound graphs."""
        ...

    def close(self) -> None: ...


@dataclass(eq=False)
class HostSlot:
    """outputs: (K, L, C) of the last call, a view of the network's own array. advanced: pass j was done without inputs
    being written, because the slot was not in that call."""

    program: Program
    z: np.ndarray
    x_last: np.ndarray
    j: int = 1
    outputs: np.ndarray | None = None
    advanced: bool = False

    def step(
        self, rows: Sequence[Row] = (), next_z: np.ndarray | None = None, next_x_prev: np.ndarray | None = None
    ) -> SlotStep:
        """Pass j as a step of the integrator; one that was done already only writes the inputs."""
        program, weights = self.program, None
        coef = program.table.coef[self.j].astype(np.float32)
        if self.advanced:
            coef[:X] = 1, 0, 0, 0
        elif self.outputs is not None:
            weights = program.table.weights[self.j, : len(self.outputs)].astype(np.float32)
        return SlotStep(
            self.z,
            self.x_last,
            coef,
            program.noise(self.j),
            None if self.advanced else self.outputs,
            weights,
            program.source,
            program.mask,
            next_z,
            next_x_prev,
            rows,
        )


class HostEngine:
    """Runs texts on a CPU backend: a call is over when ``enqueue`` returns."""

    depth = 1
    captures = 0

    def __init__(self, backend: HostBackend, latent_dim: int, max_rows: int | None = None) -> None:
        self.cost = CallCost(self._most)
        self._backend, self._latent_dim, self._limit = backend, latent_dim, max_rows
        self._bound: OrderedDict[tuple[Graph, int, int], BoundGraph] = OrderedDict()
        self._slots: set[HostSlot] = set()
        self._called: list[HostSlot] = []  # those of the last call, whose outputs are still to be read
        self._done: deque[Call] = deque()

    def _most(self, length: int) -> int:
        limits = (max(1, MAX_TOKENS // length), self._limit, self._backend.max_rows(length))
        return min(limit for limit in limits if limit)

    def open(self, program: Program) -> HostSlot:
        self._backend.max_rows(program.length, program.max_rows)
        shape = (program.length, self._latent_dim)
        x_last = np.zeros(shape, np.float32) if program.x_prev is None else program.x_prev.copy()
        z = np.zeros(shape, np.float32) if program.z0 is None else program.z0.copy()
        if program.z0 is None:
            coef = program.table.coef[0].astype(np.float32)
            integrator.step([SlotStep(z, x_last, coef, program.noise(0), source=program.source, mask=program.mask)])
        slot = HostSlot(program, z, x_last)
        self._slots.add(slot)
        return slot

    def enqueue(self, slots: Sequence[HostSlot]) -> None:
        begun = time.perf_counter()
        length, turns = slots[0].program.length, pack(slots)
        rows = [row for _, mine, _ in turns for row in mine]
        network = self._graph("denoiser", len(rows), length)
        self._integrate(turns, network.arrays)
        _fill(network.arrays, turns)
        between = time.perf_counter()
        network.run()
        ids = self._discretize(network.arrays["hidden"], [r for r, row in enumerate(rows) if row.decodes], length)
        ended = time.perf_counter()
        self.cost.record(len(rows), length, ended - begun)
        x = network.arrays["x"]
        events = [self._finish_pass(slot, x[place], ids.get(place.stop - 1)) for slot, _, place in turns]
        self._called = [slot for slot in slots if slot.outputs is not None]
        self._done.append(Call(events, len(rows), ended - between, between - begun))

    def collect(self) -> Call:
        return self._done.popleft()

    def free(self, slot: HostSlot) -> None:
        self._slots.discard(slot)
        if slot in self._called:
            self._called.remove(slot)

    def num_bytes(self) -> int:
        slots, graphs = list(self._slots), list(self._bound.values())  # copies, as another thread may be asking
        arrays = [array for graph in graphs for array in list(graph.arrays.values())]
        return sum(slot.z.nbytes + slot.x_last.nbytes for slot in slots) + sum(array.nbytes for array in arrays)

    def close(self) -> None:
        self._slots.clear()
        self._called.clear()
        while self._bound:
            self._bound.popitem()[1].close()

    def _integrate(self, turns: Sequence[Turn[HostSlot]], arrays: Mapping[str, np.ndarray]) -> None:
        """The next pass of these slots, into the inputs of their call; and of those that wait, before it."""
        slots = [slot for slot, *_ in turns]
        left = [slot for slot in self._called if slot not in set(slots)]
        z, x_prev = arrays["z"], arrays.get("x_prev")
        integrator.step([slot.step() for slot in left])  # apart from the others, as their length may be another
        integrator.step(
            [slot.step(rows, z[place], None if x_prev is None else x_prev[place]) for slot, rows, place in turns]
        )
        for slot in (*left, *slots):
            slot.advanced, slot.outputs = True, None
        self._called = []

    def _finish_pass(self, slot: HostSlot, x: np.ndarray, decoded: np.ndarray | None) -> Event:
        """What the call did for a slot, which goes on to its next pass. x: (K, L, C) of its rows."""
        program, j = slot.program, slot.j
        slot.j, slot.advanced = j + 1, False
        if j < program.last:
            slot.outputs = x[: len(x) - (decoded is not None)]
            return StepDone(j - 1, float(program.table.t[j]), decoded)
        if not np.isfinite(slot.z).all():
            return not_finite(self._backend.name, self._backend.precision)
        assert decoded is not None  # the last row of a program decodes
        return Written(decoded, slot.z if program.latents else None)

    def _discretize(self, hidden: np.ndarray, rows: list[int], length: int) -> dict[int, np.ndarray]:
        """(L,) ids of each of these rows of the last call, whose tokens go through the head in pieces."""
        tokens = hidden[rows].reshape(-1, hidden.shape[-1])
        ids = np.empty(len(tokens), np.int64)
        for start in range(0, len(tokens), HEAD_TOKENS):
            piece = tokens[start : start + HEAD_TOKENS]
            head = self._graph("discretizer", 1, len(piece))
            head.arrays["hidden"][0] = piece
            head.run()
            ids[start : start + len(piece)] = head.arrays["ids"][0]
        return dict(zip(rows, ids.reshape(-1, length), strict=True))

    def _graph(self, graph: Graph, rows: int, length: int) -> BoundGraph:
        key = (graph, rows, length)
        if key not in self._bound:
            if len(self._bound) >= MAX_BOUND:
                self._bound.popitem(last=False)[1].close()
            self._bound[key] = self._backend.bind(graph, rows, length)
        self._bound.move_to_end(key)
        return self._bound[key]


def pack(slots: Sequence[S]) -> list[Turn[S]]:
    """The rows of texts, behind each other in one call."""
    packed = [slot.program.rows(slot.j) for slot in slots]
    ends = accumulate(map(len, packed))
    return [(slot, rows, slice(end - len(rows), end)) for slot, rows, end in zip(slots, packed, ends, strict=True)]


def _fill(arrays: Mapping[str, np.ndarray], turns: Sequence[Turn[HostSlot]]) -> None:
    """The time, guidance scale and mode of each row."""
    flat = [(slot, row) for slot, rows, _ in turns for row in rows]
    arrays["t"][:] = [1.0 if row.decodes else slot.program.table.t[slot.j] for slot, row in flat]
    if "s" in arrays:
        arrays["s"][:] = [slot.program.sc_cfg for slot, _ in flat]
    if "mode" in arrays:
        arrays["mode"][:] = [row.decodes for _, row in flat]


def not_finite(name: str, precision: str) -> BackendError:
    """What a text ends with whose latents are not numbers."""
    return BackendError(
        f"the network gave latents that are not finite ({name} {precision}): "
        "check the bundle with elf-rt verify, or take another precision"
    )
