"""The CUDA kernel run against the numpy step: on the host through an emulator, and on a GPU where there is one."""

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import cuda_emulator
import numpy as np
import pytest
from test_integrator import ROWS, SHAPES, assert_same_bits, make_slot, mixed, run

from elf_rt.device import cudart, kernels
from elf_rt.device.cuda import Cuda
from elf_rt.device.kernels import SLOT_STEP
from elf_rt.sampling.integrator import SlotStep, step_numpy
from elf_rt.sampling.noise import NoiseKey
from elf_rt.sampling.schedule import DECODE, DRAFT

GUARD = 0xA5
UNTOUCHED = 77  # in t, s and mode of rows that nobody writes
T, S = 0.25, 3.0  # of the first text; each one behind it has 1 more


class Emulated:
    """Host memory and the kernel compiled for the host."""

    def __init__(self) -> None:
        self._emulator = cuda_emulator.load()
        self._arrays: dict[int, np.ndarray] = {}
        self._guards: list[tuple[np.ndarray, np.ndarray]] = []

    def put(self, array: np.ndarray | None, shift: int = 0) -> int:
        """Copy an array to the device, `shift` bytes past an aligned address; returns the address."""
        if array is None:
            return 0
        memory = np.full(array.nbytes + 768, GUARD, np.uint8)
        start = 256 - memory.ctypes.data % 256 + shift
        memory[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        address = int(memory.ctypes.data) + start
        self._arrays[address] = memory[start : start + array.nbytes]
        self._guards.append((memory[:start], memory[start + array.nbytes :]))
        return address

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        assert all((guard == GUARD).all() for pair in self._guards for guard in pair), "written out of bounds"
        return np.frombuffer(self._arrays[address].tobytes(), like.dtype).reshape(like.shape)

    def step(self, grid: tuple[int, int, int], *arguments: int | np.int32) -> None:
        self._emulator.launch(kernels.NAME, grid, kernels.BLOCK, *arguments)


class OnGpu:
    """A GPU, launched as the device engine launches."""

    def __init__(self) -> None:
        self._cuda = _cuda()
        self._stream = cudart.Stream()
        self._memory: list[cudart.DeviceMemory] = []

    def put(self, array: np.ndarray | None, shift: int = 0) -> int:
        if array is None:
            return 0
        data = np.ascontiguousarray(array)
        memory = cudart.DeviceMemory(data.nbytes + shift)
        self._memory.append(memory)
        cudart.call("cudaMemcpy", memory.pointer + shift, data.ctypes.data, data.nbytes, _copy("HostToDevice"))
        cudart.synchronize(0)
        return memory.pointer + shift

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        out = np.empty_like(like)
        self._stream.synchronize()
        cudart.call("cudaMemcpy", out.ctypes.data, address, out.nbytes, _copy("DeviceToHost"))
        return out

    def step(self, grid: tuple[int, int, int], *arguments: int | np.int32) -> None:
        self._cuda.step(self._stream.handle, grid, *arguments)

    def close(self) -> None:
        for part in (self._stream, *self._memory):
            part.close()


@functools.cache
def _cuda() -> Cuda:
    return Cuda()


def _copy(direction: str) -> Any:
    from cuda.bindings import runtime

    return getattr(runtime.cudaMemcpyKind, f"cudaMemcpy{direction}")


Device = Emulated | OnGpu


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "emulated":
        yield Emulated()
        return
    reason = cudart.find_gpu()
    if isinstance(reason, str):
        pytest.skip(reason)
    gpu = OnGpu()
    yield gpu
    gpu.close()


class Call:
    """Texts in one launch: what each writes, whether its z was finite, and t, s and mode of all rows and one more.

    Args:
        shift: bytes past an aligned address, by array.
        padding: around and between the texts stand copies of their entries without z, which must do nothing.
        signals: whether the network has t, s and mode.
    """

    def __init__(
        self,
        device: Device,
        slots: Sequence[SlotStep],
        shift: dict[str, int] | None = None,
        padding: bool = False,
        signals: bool = True,
    ) -> None:
        shift, num_rows, entries = shift or {}, sum(len(slot.rows) for slot in slots), []
        written, flag = [], np.zeros(1, np.int32)
        for number, slot in enumerate(slots):
            entry = np.zeros((), SLOT_STEP)
            for name in ("z", "x_last", "x_rows", "next_z", "next_x_prev", "source", "mask"):
                entry[name] = device.put(getattr(slot, name), shift.get(name, 0))
            if isinstance(slot.noise, NoiseKey):
                entry["seed"], entry["noise_index"] = slot.noise.seed, slot.noise.index
            else:
                entry["noise"] = device.put(slot.noise, shift.get("noise", 0))
            entry["not_finite"] = device.put(flag)
            entry["coef"] = slot.coef
            if slot.x_rows is not None and slot.weights is not None:
                entry["num_outputs"] = len(slot.x_rows)
                entry["weights"] = np.nan  # of rows that it does not have
                entry["weights"][: len(slot.weights)] = slot.weights
            entry["rows"], entry["num_rows"] = kernels.row_flags(slot.rows), len(slot.rows)
            entry["first_row"] = sum(len(before.rows) for before in slots[:number])
            entry["t"], entry["s"] = T + number, S + number
            written.append({name: int(entry[name]) for name in run(step_numpy, slot)[0]})
            entries += [_without_z(entry), entry] if padding else [entry]
        entries += [_without_z(entries[-1])] * padding
        inputs = [np.full(num_rows + 1, UNTOUCHED, np.float32) for _ in range(3)]
        addresses = [device.put(array) if signals else 0 for array in inputs]
        length, width = slots[0].z.shape
        grid = kernels.grid(len(entries), length, width)
        device.step(grid, device.put(np.array(entries)), *addresses, np.int32(length), np.int32(width))
        self.written = [
            {name: device.get(address, getattr(slot, name)) for name, address in addresses_of.items()}
            for slot, addresses_of in zip(slots, written, strict=True)
        ]
        real = [entry for entry in entries if entry["z"]]
        self.not_finite = [int(device.get(int(entry["not_finite"]), flag)[0]) for entry in real]
        if signals:
            self.t, self.s, self.mode = (device.get(a, like) for a, like in zip(addresses, inputs, strict=True))


def _without_z(entry: np.ndarray) -> np.ndarray:
    padded = entry.copy()
    padded["z"] = 0
    return padded


def assert_numpys_bits(device: Device, slots: Sequence[SlotStep], **options: Any) -> Call:
    call = Call(device, slots, **options)
    for result, slot in zip(call.written, slots, strict=True):
        assert_same_bits(result, run(step_numpy, slot)[0])
    return call


def test_the_entries_are_the_structs_of_the_kernel(tmp_path: Path) -> None:
    """Names, places and sizes, as the C++ compiler has them."""
    members = "".join(
        f"*out++ = offsetof(elf::SlotStep, {name}); *out++ = sizeof(elf::SlotStep::{name});\n"
        for name in SLOT_STEP.names or ()
    )
    source = tmp_path / "layout.cpp"
    source.write_text(
        '#include <cstddef>\n#include "integrator.h"\nextern "C" void layout(size_t* out) {\n'
        f"*out++ = sizeof(elf::SlotStep); *out++ = alignof(elf::SlotStep);\n{members}}}\n",
        encoding="utf-8",
    )
    cuda_emulator.compile_library(source, tmp_path / "layout.so", "-I", str(resources.files("elf_rt._csrc")))
    out = (ctypes.c_size_t * 64)()
    ctypes.CDLL(str(tmp_path / "layout.so")).layout(out)
    fields = [SLOT_STEP.fields[name] for name in SLOT_STEP.names or ()]  # type: ignore[index]
    expected = [SLOT_STEP.itemsize, SLOT_STEP.alignment]
    for dtype, offset, *_ in fields:
        expected += [offset, dtype.itemsize]
    assert list(out[: len(expected)]) == expected


@pytest.mark.parametrize("noise", ["key", "given"])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [*SHAPES, (130, 16)])  # the last: more than one block
def test_numpys_bits(
    device: Device, shape: tuple[int, int], num_rows: int, outputs: bool, draft: bool, conditional: bool, noise: str
) -> None:
    slot = make_slot(shape, num_rows, conditional, noise, draft, outputs, seed=num_rows)
    call = assert_numpys_bits(device, [slot])
    decodes = [0.0] * num_rows + [1.0] * draft
    assert call.t.tolist() == [T] * num_rows + [1.0] * draft + [UNTOUCHED]
    assert call.mode.tolist() == [*decodes, UNTOUCHED]
    assert call.s.tolist() == [S] * len(decodes) + [UNTOUCHED]
    assert call.not_finite == [0]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 16), (67, 257)])
def test_texts_of_different_states_in_one_launch(device: Device, shape: tuple[int, int], padding: bool) -> None:
    """Guided, drafting, without outputs, decoding, waiting, without x_prev; entries without z change nothing."""
    slots = mixed(shape) + mixed(shape, seed=10)
    call = assert_numpys_bits(device, slots, padding=padding)
    flat = [(number, row) for number, slot in enumerate(slots) for row in slot.rows]
    assert {DECODE, DRAFT} < {row for _, row in flat}
    assert call.t.tolist() == [1.0 if row.decodes else T + number for number, row in flat] + [UNTOUCHED]
    assert call.s.tolist() == [S + number for number, _ in flat] + [UNTOUCHED]
    assert call.mode.tolist() == [float(row.decodes) for _, row in flat] + [UNTOUCHED]
    assert call.not_finite == [0] * len(slots)


@pytest.mark.parametrize("name", ["z", "x_last", "x_rows", "next_z", "next_x_prev", "source", "noise"])
def test_an_unaligned_address(device: Device, name: str) -> None:
    slot = make_slot((7, 16), 2, conditional=True, noise="given", draft=True)
    assert_numpys_bits(device, [slot], shift={name: 4})


@pytest.mark.parametrize("seed", [2**64 - 1, 2**63 + 2**31])
def test_noise_at_large_counters(device: Device, seed: int) -> None:
    assert_numpys_bits(device, [replace(make_slot((1088, 512)), noise=NoiseKey(seed, 2**31 + 5))])


def test_without_the_inputs_that_a_model_lacks(device: Device) -> None:
    """The start: garbage in z, x_last and the outputs is not used; no x_prev, t, s or mode."""
    slot = replace(make_slot((7, 16), 2), next_x_prev=None, coef=np.float32([0, 0, 0, 2, 0]))
    assert slot.x_rows is not None and slot.weights is not None
    for array in (slot.z, slot.x_last, slot.x_rows):
        array[:] = np.nan
    slot.weights[:] = 0
    call = assert_numpys_bits(device, [slot], signals=False)
    assert np.isfinite(call.written[0]["z"]).all() and not call.written[0]["x_last"].any()


def test_an_entry_without_outputs_keeps_its_estimate(device: Device) -> None:
    """As a text that was advanced while it waited: z and the estimate stay, and its inputs are written."""
    coef = np.float32([1, 0, 0, 0, 1])
    slot = replace(make_slot((7, 16), 2, draft=True, outputs=False), coef=coef, rows=(*ROWS[:2], DRAFT))
    (result,) = assert_numpys_bits(device, [slot]).written
    np.testing.assert_array_equal(result["z"], slot.z)
    np.testing.assert_array_equal(result["x_last"], slot.x_last)
    np.testing.assert_array_equal(result["next_z"], [slot.z, slot.z, slot.x_last])
    np.testing.assert_array_equal(result["next_x_prev"], [slot.x_last, slot.x_last, 0 * slot.z])


SPOILT: dict[str, Callable[[np.ndarray], None]] = {
    "first": lambda z: z.__setitem__((0, 0), np.inf),
    "last": lambda z: z.__setitem__((-1, -1), -np.inf),
    "not a number": lambda z: z.__setitem__((1, 2), np.nan),
}


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("shape", [(3, 5), (7, 16), (130, 16)])
def test_z_that_is_not_finite_is_told_of_its_text_alone(device: Device, shape: tuple[int, int], spoil: str) -> None:
    slots = [replace(make_slot(shape, 1, seed=k), coef=np.float32([1, 0, 0, 0, 0])) for k in range(4)]
    SPOILT[spoil](slots[1].z)
    slots[2].z[:] = np.finfo(np.float32).max  # finite still
    held = slots[3] = replace(slots[3], source=np.ones(shape, np.float32), mask=np.ones(shape[0], bool))
    held.z[:] = np.nan  # and gone
    call = assert_numpys_bits(device, slots)
    assert call.not_finite == [0, 1, 0, 0]
