"""The engine of rows on a GPU: see ``elf_rt.sampling.engine``.

Calls come in buckets of 1, 2, 4, … rows. A bucket is one CUDA graph, captured when it is first needed: the integrator
over all its texts, then the network. What a call does is data, a ``SlotStep`` for each text, which is sent before the
graph is launched; so no step, sampler, guidance, draft, join or leave ever captures anew. Calls are enqueued ahead of
what the GPU has done, and the host waits for the oldest alone. Decoding is not in the graph: only rows that decode go
through the token head, a few kernels once a text.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from elf_rt.device import setup_lock
from elf_rt.device.calls import MAX_ENTRIES, Bucket, Calls
from elf_rt.device.cuda import Cuda
from elf_rt.device.cudart import DeviceMemory, Event, PinnedArray, Stream
from elf_rt.device.kernels import SLOT_STEP, grid, row_flags
from elf_rt.device.memory import Fields, StagedArrays
from elf_rt.errors import BackendError, GpuMemoryError
from elf_rt.network import DeviceBackend, DeviceGraph
from elf_rt.params import ModelConfig
from elf_rt.sampling.cost import CallCost
from elf_rt.sampling.engine import Call, Turn, not_finite, pack
from elf_rt.sampling.noise import NoiseKey
from elf_rt.sampling.program import Event as TextEvent
from elf_rt.sampling.program import Program, StepDone, Written
from elf_rt.sampling.schedule import Row, X

DEPTH = 4  # calls under way: enough for the host to be late


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
    """A call that was enqueued. texts: with the pass of each, and whether it decodes, into ids[place]."""

    texts: Sequence[tuple[DeviceSlot, int, bool]]
    rows: int
    place: int
    begin: Event
    end: Event


class DeviceEngine:
    """Runs texts on a CUDA backend. Everything it has is made in the thread that uses it: the driver's.

    Raises:
        BackendError: there is no GPU, or its memory is full.
    """

    depth = DEPTH

    def __init__(self, backend: DeviceBackend, config: ModelConfig, max_rows: int | None = None) -> None:
        self._backend, self._width, self._hidden = backend, config.latent_dim, config.hidden_size
        self._cuda = Cuda()
        self._stream = Stream()
        self._slots: dict[DeviceSlot, None] = {}
        self._idle: dict[int, list[DeviceSlot]] = {}  # length -> free slots
        self._called: list[DeviceSlot] = []  # slots of the last call, whose outputs are still to be read
        self._under_way: deque[_UnderWay] = deque()
        self._number = 0  # calls enqueued
        with ExitStack() as stack:
            stack.enter_context(closing(self._stream))
            # Graphs read the entries of a call at one address; the host writes them anew for each call under way.
            self._entries = stack.enter_context(closing(DeviceMemory(2 * MAX_ENTRIES * SLOT_STEP.itemsize)))
            self._written, self._events = [], []
            for _ in range(DEPTH + 1):
                self._written.append(stack.enter_context(closing(PinnedArray((2, MAX_ENTRIES), SLOT_STEP))))
                begin, end = (stack.enter_context(closing(Event())) for _ in range(2))
                self._events.append((begin, end))
            integrate = partial(self._integrate, self._entries.pointer)  # entries are padded to the rows of the call
            self._calls = Calls(backend, self._cuda, self._stream, integrate, self._make_room, max_rows)
            self.cost = CallCost(self._calls.most)
            self._resources = stack.pop_all()

    @property
    def captures(self) -> int:
        return self._calls.captures

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
        turns = pack(slots)
        bucket = self._calls.bucket(turns[-1][2].stop, slots[0].program.length)
        try:
            self._under_way.append(self._launch(turns, bucket))
        except Exception as error:
            self._stream.synchronize()  # what was enqueued still reads the entries
            if isinstance(error, GpuMemoryError):  # the call has begun, and must not be made again
                raise BackendError(str(error)) from error
            raise
        self._number += 1
        for slot, rows, place in turns:
            x = bucket.network.buffers["x"] + 4 * place.start * slot.program.length * self._width
            slot.outputs = x, sum(not row.decodes for row in rows)
            slot.j, slot.advanced = slot.j + 1, False
        self._called = [slot for slot in slots if slot.j <= slot.program.last]

    def _launch(self, turns: Sequence[Turn[DeviceSlot]], bucket: Bucket) -> _UnderWay:
        """Enqueue a call, from the pass before it to the ids behind it."""
        place = self._number % (DEPTH + 1)
        begin, end = self._events[place]
        begin.record(self._stream)
        self._advance_left({slot for slot, *_ in turns}, place)
        self._send_call(turns, bucket, place)
        bucket.graph.launch()
        self._decode(turns, bucket.network, place)
        end.record(self._stream)
        texts = [(slot, slot.j, rows[-1].decodes) for slot, rows, _ in turns]
        return _UnderWay(texts, turns[-1][2].stop, place, begin, end)

    def collect(self) -> Call:
        call = self._under_way.popleft()
        try:
            call.end.wait()
        except Exception:
            self._under_way.clear()  # what is behind it will not come either
            raise
        seconds = call.end.seconds_since(call.begin)
        self.cost.record(call.rows, call.texts[0][0].program.length, seconds)
        return Call([self._told(*text, call.place) for text in call.texts], call.rows, seconds, 0.0)

    def free(self, slot: DeviceSlot) -> None:
        del self._slots[slot]
        if slot in self._called:
            self._called.remove(slot)
        if any(slot is each for call in self._under_way for each, *_ in call.texts):  # of a text that was cancelled
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

    def _send_call(self, turns: Sequence[Turn[DeviceSlot]], bucket: Bucket, place: int) -> None:
        entries, buffers = self._written[place].array[0, : bucket.rows], bucket.network.buffers
        entries[...] = np.zeros((), SLOT_STEP)
        for index, (slot, rows, at) in enumerate(turns):
            self._write(entries, index, slot, slot.j, rows, at.start)
            offset = 4 * at.start * slot.program.length * self._width
            entries[index]["next_z"] = buffers["z"] + offset
            if "x_prev" in buffers:
                entries[index]["next_x_prev"] = buffers["x_prev"] + offset
        self._stream.upload(self._entries.pointer, entries)

    def _advance_left(self, chosen: set[DeviceSlot], place: int) -> None:
        """The pass of texts that were in the last call and wait now, before their outputs are overwritten."""
        left = [slot for slot in self._called if slot not in chosen]
        self._called = []
        if not left:
            return
        entries = self._written[place].array[1, : len(left)]
        second_half = self._entries.pointer + MAX_ENTRIES * SLOT_STEP.itemsize
        entries[...] = np.zeros((), SLOT_STEP)
        for index, slot in enumerate(left):
            self._write(entries, index, slot, slot.j)
            slot.advanced, slot.outputs = True, (0, 0)
        self._stream.upload(second_half, entries)
        self._integrate(second_half, len(left), left[0].program.length)

    def _integrate(self, entries: int, count: int, length: int, buffers: Mapping[str, int] | None = None) -> None:
        inputs = [0 if buffers is None else buffers.get(name, 0) for name in ("t", "s", "mode")]
        size = grid(count, length, self._width)
        self._cuda.step(self._stream.handle, size, entries, *inputs, np.int32(length), np.int32(self._width))

    # Decoding.

    def _decode(self, turns: Sequence[Turn[DeviceSlot]], network: DeviceGraph, place: int) -> None:
        """Send the rows that decode, each the last of its text, through the token head, and their ids to the host."""
        decoding = {at.stop - 1: slot for slot, rows, at in turns if rows[-1].decodes}
        if not decoding:
            return
        rows, length = list(decoding), turns[0][0].program.length
        row_bytes = 4 * length * self._hidden
        head, most = self._calls.head(len(rows), length)
        for start in range(0, len(rows), most):
            piece = rows[start : start + most]
            for first, count in _runs(piece):
                source = network.buffers["hidden"] + piece[first] * row_bytes
                self._stream.copy(head.buffers["hidden"] + first * row_bytes, source, count * row_bytes)
            head.enqueue()
            for index, row in enumerate(piece):
                self._fetch(decoding[row], head.buffers["ids"] + index * 8 * length, place)

    def _fetch(self, slot: DeviceSlot, ids: int, place: int) -> None:
        """A text's ids, and behind its last call what else is told of it, on the way to the host."""
        arrays, program = slot.arrays, slot.program
        self._stream.download(arrays["ids"][place], ids)
        if slot.j == program.last:
            self._stream.download(arrays["not_finite"], arrays.address("not_finite"))
            if program.latents:
                self._stream.download(arrays["z"], arrays.address("z"))

    def _told(self, slot: DeviceSlot, j: int, decodes: bool, place: int) -> TextEvent:
        """What a finished call did for a text."""
        program, arrays = slot.program, slot.arrays
        ids = arrays["ids"][place].copy() if decodes else None
        if j < program.last:
            return StepDone(j - 1, float(program.table.t[j]), ids)
        if arrays["not_finite"][0]:
            return not_finite(self._backend.name, self._backend.precision)
        assert ids is not None  # the last row of a program decodes
        return Written(ids, arrays["z"].copy() if program.latents else None)

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
        busy = {slot for call in self._under_way for slot, *_ in call.texts}  # of a text that was cancelled
        idle = [slot for at, slots in self._idle.items() if at != length for slot in slots if slot not in busy]
        if not idle and not self._calls.others(length):
            return False
        self._advance_left(set(), self._number % (DEPTH + 1))  # the outputs of the last call may go with its bucket
        self._stream.synchronize()
        for slot in idle:
            self._idle[slot.program.length].remove(slot)
            slot.close()
        self._calls.free(but=length)
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
