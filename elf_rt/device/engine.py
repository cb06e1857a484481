"""The engine of rows on a GPU: see ``elf_rt.sampling.engine``.

Calls come in buckets of 1, 2, 4, … rows. A bucket is one CUDA graph, captured when it is first needed: the integrator
over all its texts, then the network. What a call does is data, a ``SlotStep`` for each text, which is sent before the
graph is launched; so no step, sampler, guidance, draft, join or leave ever captures anew. Calls are enqueued ahead of
what the GPU has done, and the host waits for the oldest alone. Decoding is not in the graph: only rows that decode go
through the token head, a few kernels once a text.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np

from elf_rt.device import setup_lock
from elf_rt.device.calls import MAX_ENTRIES, Bucket, Calls
from elf_rt.device.cuda import Cuda
from elf_rt.device.cudart import DeviceMemory, Event, PinnedArray, Stream
from elf_rt.device.kernels import SLOT_STEP, grid, row_flags
from elf_rt.device.memory import Fields, StagedArrays
from elf_rt.errors import GpuMemoryError
from elf_rt.network import DeviceBackend, DeviceGraph
from elf_rt.params import ModelConfig
from elf_rt.sampling.cost import CallCost
from elf_rt.sampling.engine import Call, Progress, not_finite, row_slices
from elf_rt.sampling.noise import NoiseKey
from elf_rt.sampling.program import Program
from elf_rt.sampling.schedule import Row, X

DEPTH = 4  # calls under way: enough for the host to be late


class Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


@dataclass(eq=False)
class DeviceSlot:
    """arrays: z, x_last, source (L, C), mask (L,), entry, not_finite, and ids (DEPTH + 1, L) for the calls under way.
    outputs: the device address of the last call's (K, L, C), and K. advanced: see ``HostSlot``."""

    program: Program
    arrays: StagedArrays
    noise: StagedArrays | None
    sent: Event
    j: int = 1
    outputs: tuple[int, int] = (0, 0)
    advanced: bool = False

    def close(self) -> None:
        self.sent.close()
        self.arrays.close()
        if self.noise is not None:
            self.noise.close()


@dataclass
class _UnderWay:
    """A call that was enqueued: its texts with the pass and the rows of each, and where its ids will be."""

    turns: Sequence[tuple[DeviceSlot, int, Sequence[Row]]]
    rows: int
    number: int
    begin: Event
    end: Event


class DeviceEngine:
    """Runs texts on a CUDA backend. Everything it has is made in the thread that uses it: the driver's.

    Raises:
        BackendError: there is no GPU, or its memory is full.
    """

    depth = DEPTH

    def __init__(self, backend: DeviceBackend, config: ModelConfig, max_rows: int | None = None) -> None:
        self.cost = CallCost()
        self._backend, self._width, self._hidden = backend, config.latent_dim, config.hidden_size
        self._cuda = Cuda()
        self._stream = Stream()
        self._slots: dict[DeviceSlot, None] = {}
        self._idle: dict[int, list[DeviceSlot]] = {}  # length -> free slots
        self._called: list[DeviceSlot] = []  # slots of the last call, whose outputs are still to be read
        self._under_way: deque[_UnderWay] = deque()
        self._number = 0  # calls enqueued
        with ExitStack() as stack:

            def own(resource: T) -> T:
                stack.callback(resource.close)
                return resource

            own(self._stream)
            # Graphs read the entries of a call at one address; the host writes them anew for each call under way.
            self._entries = own(DeviceMemory(2 * MAX_ENTRIES * SLOT_STEP.itemsize))
            self._written = [own(PinnedArray((2, MAX_ENTRIES), SLOT_STEP)) for _ in range(DEPTH + 1)]
            self._events = [(own(Event()), own(Event())) for _ in range(DEPTH + 1)]
            self._calls = Calls(backend, self._cuda, self._stream, self._integrate_call, self._make_room, max_rows)
            self._resources = stack.pop_all()

    @property
    def captures(self) -> int:
        return self._calls.captures

    def max_rows(self, length: int, wanted: int = 0) -> int:
        return self.cost.worth(length, self._calls.most(length), wanted)[0]

    def settled(self, length: int) -> bool:
        return self.cost.settled(length, self._calls.most(length))

    def short_rows(self, length: int) -> int:
        return self.cost.short(length, self._calls.most(length))

    def share(self, length: int) -> int:
        return self.cost.share(length, self._calls.most(length))

    def open(self, program: Program) -> DeviceSlot:
        self._backend.max_rows(program.length, program.max_rows)
        self._calls.bucket(program.max_rows, program.length)  # first, or slots could leave no memory for any call
        with setup_lock:
            try:
                slot = self._take(program)
            except GpuMemoryError:
                if not self._make_room(program.length):
                    raise
                slot = self._take(program)
        self._slots[slot] = None
        arrays, stream = slot.arrays, self._stream
        stream.zero(arrays.address("x_last"), arrays["x_last"].nbytes)
        stream.zero(arrays.address("not_finite"), arrays["not_finite"].nbytes)
        given = {"z": program.z0, "x_last": program.x_prev, "source": program.source, "mask": program.mask}
        for name, array in given.items():
            if array is not None:
                arrays[name][...] = array
                stream.upload(arrays.address(name), arrays[name])
        if slot.noise is not None and program.eps is not None:
            slot.noise["noise"][...] = program.eps
            stream.upload(slot.noise.address("noise"), slot.noise["noise"])
        if program.z0 is None:
            arrays["entry"][...] = np.zeros((), SLOT_STEP)  # forgets the text that had the slot before
            self._write(arrays["entry"], 0, slot, 0)
            stream.upload(arrays.address("entry"), arrays["entry"])
            self._integrate(arrays.address("entry"), 1, program.length)
        slot.sent.record(stream)
        return slot

    def enqueue(self, slots: Sequence[DeviceSlot]) -> None:
        length, packed = slots[0].program.length, [slot.program.rows(slot.j) for slot in slots]
        rows = [row for mine in packed for row in mine]
        turn, places = self._number % (DEPTH + 1), row_slices(packed)
        bucket = self._calls.bucket(len(rows), length)
        begin, end = self._events[turn]
        begin.record(self._stream)
        self._advance_left(set(slots), turn)
        self._send_call(slots, packed, places, bucket, turn)
        bucket.graph.launch()
        self._decode(slots, rows, places, bucket.network, turn)
        end.record(self._stream)
        turns = [(slot, slot.j, mine) for slot, mine in zip(slots, packed, strict=True)]
        self._under_way.append(_UnderWay(turns, len(rows), turn, begin, end))
        self._number += 1
        for slot, mine, place in zip(slots, packed, places, strict=True):
            x = bucket.network.buffers["x"] + 4 * place.start * length * self._width
            slot.outputs = x, sum(not row.decodes for row in mine)
            slot.j, slot.advanced = slot.j + 1, False
        self._called = [slot for slot in slots if slot.j <= slot.program.last]

    def collect(self) -> Call:
        call = self._under_way.popleft()
        try:
            call.end.wait()
        except Exception:
            self._under_way.clear()  # what is behind it will not come either
            raise
        seconds = call.end.seconds_since(call.begin)
        self.cost.record(call.rows, call.turns[0][0].program.length, seconds)
        return Call([self._progress(*turn, call.number) for turn in call.turns], call.rows, seconds, 0.0)

    def free(self, slot: DeviceSlot) -> None:
        del self._slots[slot]
        if slot in self._called:
            self._called.remove(slot)
        slot.sent.record(self._stream)
        if slot.noise is not None:
            self._stream.synchronize()
            slot.noise.close()
            slot.noise = None
        self._idle.setdefault(slot.program.length, []).append(slot)

    def num_bytes(self) -> int:
        """Of slots, in use or idle; what a library allocates for a bound graph is its own."""
        idle = chain.from_iterable(list(self._idle.values()))
        return sum(slot.arrays.num_bytes for slot in (*list(self._slots), *idle))

    def close(self) -> None:
        """Wait for the stream, then free everything."""
        with setup_lock, self._resources as stack:
            for slot in (*self._slots, *chain.from_iterable(self._idle.values())):
                stack.callback(slot.close)
            stack.callback(self._calls.free)
            stack.callback(self._stream.synchronize)

    # Entries: what the kernel is told.

    def _write(
        self, entries: np.ndarray, index: int, slot: DeviceSlot, j: int, rows: Sequence[Row] = (), first_row: int = 0
    ) -> None:
        """Pass j of a slot; one that was done already only writes the inputs."""
        entry, program, at = entries[index], slot.program, slot.arrays.address
        table = program.table
        entry["z"], entry["x_last"], entry["coef"] = at("z"), at("x_last"), table.coef[j]
        if program.source is not None:
            entry["source"], entry["mask"] = at("source"), at("mask")
        if slot.advanced:
            entry["coef"] = (1, 0, 0, 0, table.coef[j, X])
        elif slot.outputs[1]:
            entry["x_rows"], entry["num_outputs"] = slot.outputs
            entry["weights"][: slot.outputs[1]] = table.weights[j, : slot.outputs[1]]
        noise = program.noise(j)
        if isinstance(noise, NoiseKey):
            entry["seed"], entry["noise_index"] = noise.seed, noise.index
        elif slot.noise is not None:
            entry["noise"] = slot.noise.address("noise") + (j - 1) * noise.nbytes
        if j == program.last:
            entry["not_finite"] = at("not_finite")
        entry["rows"], entry["num_rows"], entry["first_row"] = row_flags(rows), len(rows), first_row
        entry["t"], entry["s"] = table.t[j], program.sc_cfg

    def _send_call(
        self,
        slots: Sequence[DeviceSlot],
        packed: Sequence[Sequence[Row]],
        places: Sequence[slice],
        bucket: Bucket,
        turn: int,
    ) -> None:
        entries, buffers = self._written[turn].array[0, : bucket.rows], bucket.network.buffers
        entries[...] = np.zeros((), SLOT_STEP)
        for index, (slot, mine, place) in enumerate(zip(slots, packed, places, strict=True)):
            self._write(entries, index, slot, slot.j, mine, place.start)
            offset = 4 * place.start * slot.program.length * self._width
            entries[index]["next_z"] = buffers["z"] + offset
            if "x_prev" in buffers:
                entries[index]["next_x_prev"] = buffers["x_prev"] + offset
        self._stream.upload(self._entries.pointer, entries)

    def _advance_left(self, chosen: set[DeviceSlot], turn: int) -> None:
        """The pass of texts that were in the last call and wait now, before their outputs are overwritten."""
        left = [slot for slot in self._called if slot not in chosen]
        self._called = []
        if not left:
            return
        entries = self._written[turn].array[1, : len(left)]
        second_half = self._entries.pointer + MAX_ENTRIES * SLOT_STEP.itemsize
        entries[...] = np.zeros((), SLOT_STEP)
        for index, slot in enumerate(left):
            self._write(entries, index, slot, slot.j)
            slot.advanced, slot.outputs = True, (0, 0)
        self._stream.upload(second_half, entries)
        self._integrate(second_half, len(left), left[0].program.length)

    def _integrate_call(self, rows: int, length: int, buffers: Mapping[str, int]) -> None:
        """The pass of a call's texts, whose entries are padded to its rows."""
        self._integrate(self._entries.pointer, rows, length, buffers)

    def _integrate(self, entries: int, count: int, length: int, buffers: Mapping[str, int] | None = None) -> None:
        inputs = [0 if buffers is None else buffers.get(name, 0) for name in ("t", "s", "mode")]
        size = grid(count, length, self._width)
        self._cuda.step(self._stream.handle, size, entries, *inputs, np.int32(length), np.int32(self._width))

    # Decoding.

    def _decode(
        self, slots: Sequence[DeviceSlot], rows: Sequence[Row], places: Sequence[slice], network: DeviceGraph, turn: int
    ) -> None:
        """Send the rows that decode through the token head, and their ids on the way to the host."""
        decoding = [r for r, row in enumerate(rows) if row.decodes]
        if not decoding:
            return
        length, row_bytes = slots[0].program.length, 4 * slots[0].program.length * self._hidden
        ends = {place.stop - 1: slot for slot, place in zip(slots, places, strict=True)}
        head, most = self._calls.head(len(decoding), length)
        for start in range(0, len(decoding), most):
            piece = decoding[start : start + most]
            for first, count in _runs(piece):
                source = network.buffers["hidden"] + piece[first] * row_bytes
                self._stream.copy(head.buffers["hidden"] + first * row_bytes, source, count * row_bytes)
            head.enqueue()
            for index, row in enumerate(piece):
                self._fetch(ends[row], head.buffers["ids"] + index * 8 * length, turn)

    def _fetch(self, slot: DeviceSlot, ids: int, turn: int) -> None:
        """A text's ids, and behind its last call what else is told of it, on the way to the host."""
        arrays, program = slot.arrays, slot.program
        self._stream.download(arrays["ids"][turn], ids)
        if slot.j == program.last:
            self._stream.download(arrays["not_finite"], arrays.address("not_finite"))
            if program.latents:
                self._stream.download(arrays["z"], arrays.address("z"))

    def _progress(self, slot: DeviceSlot, j: int, rows: Sequence[Row], turn: int) -> Progress:
        program, arrays = slot.program, slot.arrays
        done = Progress(j - 1, float(program.table.t[j]))
        ids = arrays["ids"][turn].copy() if rows[-1].decodes else None
        if j < program.last:
            done.draft = ids
            return done
        done.ids, done.latents = ids, arrays["z"].copy() if program.latents else None
        if arrays["not_finite"][0]:
            done.error = not_finite(self._backend.name, self._backend.precision)
        return done

    def _take(self, program: Program) -> DeviceSlot:
        """An idle slot, or a new one; and memory for given noise."""
        idle = self._idle.get(program.length)
        with ExitStack() as made:
            noise = None
            if program.eps is not None:
                noise = StagedArrays({"noise": (program.eps.shape, np.float32)})
                made.callback(noise.close)
            if idle:
                arrays, sent = idle[-1].arrays, idle[-1].sent
                sent.wait()  # until then the GPU may still read the host's memory
                idle.pop()
            else:
                arrays = StagedArrays(_slot_fields(program.length, self._width))
                made.callback(arrays.close)
                sent = Event()
            made.pop_all()
        return DeviceSlot(program, arrays, noise, sent)

    def _make_room(self, length: int) -> bool:
        """Free what was made for other lengths; False where there is nothing."""
        busy = {slot for call in self._under_way for slot, *_ in call.turns}  # of a text that was cancelled
        idle = [slot for at, slots in self._idle.items() if at != length for slot in slots if slot not in busy]
        if not idle and not self._calls.others(length):
            return False
        self._advance_left(set(), self._number % (DEPTH + 1))  # the outputs of the last call may go with its bucket
        self._stream.synchronize()
        self._calls.free(but=length)
        for slot in idle:
            self._idle[slot.program.length].remove(slot)
            slot.close()
        return True


def _slot_fields(length: int, width: int) -> Fields:
    latents = ((length, width), np.float32)
    return {
        **dict.fromkeys(("z", "x_last", "source"), latents),
        "mask": ((length,), np.uint8),
        "entry": ((1,), SLOT_STEP),
        "not_finite": ((1,), np.int32),
        "ids": ((DEPTH + 1, length), np.int64),
    }


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(index of the first, count) of neighbours in a rising sequence: they are copied together."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield first, i - first
            first = i
