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
from elf_rt.sampling.program import Program
from elf_rt.sampling.schedule import Row, X

MAX_BOUND = 12  # graphs of different shapes that stay bound
MAX_TOKENS = 16384  # rows x length of one call, whatever pays


@dataclass
class Progress:
    """What one call did for one text: the step that its pass ended, at time t of the next; 0 for the first call.

    draft and ids: (L,) raw ids of a draft and of the decoding call; latents: (L, C) where the program asks for them.
    """

    step: int
    t: float
    draft: np.ndarray | None = None
    ids: np.ndarray | None = None
    latents: np.ndarray | None = None
    error: BackendError | None = None


@dataclass
class Call:
    """One finished call: progress in the order of the slots, and seconds."""

    progress: list[Progress]
    rows: int
    network: float
    integrator: float


class Slot(Protocol):
    """The state of a text in an engine."""

    program: Program
    j: int  # the pass that comes next


S = TypeVar("S", bound=Slot)


class Engine(Protocol[S]):
    """Used by one thread: the driver's. S: its slots."""

    depth: int  # calls that may be under way before the oldest is waited for
    cost: CallCost

    @property
    def captures(self) -> int:
        """CUDA graphs captured so far."""
        ...

    def max_rows(self, length: int, wanted: int = 0) -> int:
        """The rows that a call of this length should hold now, where so many are wanted; with 0, nothing is tried."""
        ...

    def settled(self, length: int) -> bool:
        """Whether it is found out how many rows that is."""
        ...

    def short_rows(self, length: int) -> int:
        """The rows of a call of this length that should be over soon."""
        ...

    def share(self, length: int) -> int:
        """The rows that one caller may have in flight: those of a call, or more while it is not known what pays."""
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
            GpuMemoryError: no memory for so many rows; ``max_rows`` is smaller now, and no slot was touched.
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
    coef: np.ndarray  # float32 copies of the table's
    weights: np.ndarray
    j: int = 1
    outputs: np.ndarray | None = None
    advanced: bool = False

    def step(
        self, rows: Sequence[Row] = (), next_z: np.ndarray | None = None, next_x_prev: np.ndarray | None = None
    ) -> SlotStep:
        """Pass j as a step of the integrator; one that was done already only writes the inputs."""
        program, coef, weights = self.program, self.coef[self.j], None
        if self.advanced:
            coef = np.array([1, 0, 0, 0, coef[X]], np.float32)
        elif self.outputs is not None:
            weights = self.weights[self.j, : len(self.outputs)]
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
        self.cost = CallCost()
        self._backend, self._latent_dim, self._limit = backend, latent_dim, max_rows
        self._bound: OrderedDict[tuple[Graph, int, int], BoundGraph] = OrderedDict()
        self._slots: set[HostSlot] = set()
        self._called: list[HostSlot] = []  # those of the last call, whose outputs are still to be read
        self._done: deque[Call] = deque()

    def max_rows(self, length: int, wanted: int = 0) -> int:
        return self.cost.worth(length, self._most(length), wanted)[0]

    def settled(self, length: int) -> bool:
        return self.cost.settled(length, self._most(length))

    def short_rows(self, length: int) -> int:
        return self.cost.short(length, self._most(length))

    def share(self, length: int) -> int:
        return self.cost.share(length, self._most(length))

    def _most(self, length: int) -> int:
        limits = (max(1, MAX_TOKENS // length), self._limit, self._backend.max_rows(length))
        return min(limit for limit in limits if limit)

    def open(self, program: Program) -> HostSlot:
        self._backend.max_rows(program.length, program.max_rows)
        shape, table = (program.length, self._latent_dim), program.table
        coef, weights = table.coef.astype(np.float32), table.weights.astype(np.float32)
        x_last = np.zeros(shape, np.float32) if program.x_prev is None else program.x_prev.copy()
        z = np.zeros(shape, np.float32) if program.z0 is None else program.z0.copy()
        if program.z0 is None:
            start = SlotStep(z, x_last, coef[0], program.noise(0), source=program.source, mask=program.mask)
            integrator.step([start])
        slot = HostSlot(program, z, x_last, coef, weights)
        self._slots.add(slot)
        return slot

    def enqueue(self, slots: Sequence[HostSlot]) -> None:
        begun = time.perf_counter()
        length, packed = slots[0].program.length, [slot.program.rows(slot.j) for slot in slots]
        places = row_slices(packed)
        rows = [row for mine in packed for row in mine]
        network = self._graph("denoiser", len(rows), length)
        self._integrate(slots, packed, places, network.arrays)
        _fill(network.arrays, slots, packed)
        between = time.perf_counter()
        network.run()
        ids = self._discretize(network.arrays["hidden"], [r for r, row in enumerate(rows) if row.decodes], length)
        ended = time.perf_counter()
        self.cost.record(len(rows), length, ended - begun)
        x = network.arrays["x"]
        progress = [
            self._progress(slot, x[place], ids.get(place.stop - 1)) for slot, place in zip(slots, places, strict=True)
        ]
        self._called = [slot for slot in slots if slot.outputs is not None]
        self._done.append(Call(progress, len(rows), ended - between, between - begun))

    def collect(self) -> Call:
        return self._done.popleft()

    def free(self, slot: HostSlot) -> None:
        self._slots.discard(slot)
        if slot in self._called:
            self._called.remove(slot)

    def num_bytes(self) -> int:
        slots = sum(slot.z.nbytes + slot.x_last.nbytes for slot in list(self._slots))  # another thread may be asking
        return slots + sum(array.nbytes for graph in list(self._bound.values()) for array in graph.arrays.values())

    def close(self) -> None:
        self._slots.clear()
        self._called.clear()
        while self._bound:
            self._bound.popitem()[1].close()

    def _integrate(
        self,
        slots: Sequence[HostSlot],
        packed: Sequence[Sequence[Row]],
        places: Sequence[slice],
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        """The next pass of these slots, into the inputs of their call; and of those that wait, before it."""
        left = [slot for slot in self._called if slot not in set(slots)]
        z, x_prev = arrays["z"], arrays.get("x_prev")
        integrator.step([slot.step() for slot in left])  # apart from the others, as their length may be another
        steps = []
        for slot, rows, place in zip(slots, packed, places, strict=True):
            steps.append(slot.step(rows, z[place], None if x_prev is None else x_prev[place]))
        integrator.step(steps)
        for slot in (*left, *slots):
            slot.advanced, slot.outputs = True, None
        self._called = []

    def _progress(self, slot: HostSlot, x: np.ndarray, decoded: np.ndarray | None) -> Progress:
        """What the call did for a slot, which goes on to its next pass. x: (K, L, C) of its rows."""
        program, j = slot.program, slot.j
        slot.j, slot.advanced = j + 1, False
        done = Progress(j - 1, float(program.table.t[j]))
        if j < program.last:
            done.draft, slot.outputs = decoded, x[: len(x) - (decoded is not None)]
            return done
        done.ids, done.latents = decoded, slot.z if program.latents else None
        if not np.isfinite(slot.z).all():
            done.error = not_finite(self._backend.name, self._backend.precision)
        return done

    def _discretize(self, hidden: np.ndarray, rows: list[int], length: int) -> dict[int, np.ndarray]:
        """(L,) ids of each of these rows of the last call."""
        if not rows:
            return {}
        head = self._graph("discretizer", len(rows), length)
        np.take(hidden, rows, axis=0, out=head.arrays["hidden"], mode="clip")  # "raise" would copy twice
        head.run()
        return dict(zip(rows, head.arrays["ids"].copy(), strict=True))

    def _graph(self, graph: Graph, rows: int, length: int) -> BoundGraph:
        key = (graph, rows, length)
        if key not in self._bound:
            if len(self._bound) >= MAX_BOUND:
                self._bound.popitem(last=False)[1].close()
            self._bound[key] = self._backend.bind(graph, rows, length)
        self._bound.move_to_end(key)
        return self._bound[key]


def row_slices(packed: Sequence[Sequence[Row]]) -> list[slice]:
    """Where each text's rows are in a call that holds them behind each other."""
    ends = list(accumulate(map(len, packed)))
    return [slice(end - len(rows), end) for end, rows in zip(ends, packed, strict=True)]


def _fill(arrays: Mapping[str, np.ndarray], slots: Sequence[Slot], packed: Sequence[Sequence[Row]]) -> None:
    """The time, guidance scale and mode of each row."""
    flat = [(slot, row) for slot, rows in zip(slots, packed, strict=True) for row in rows]
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
