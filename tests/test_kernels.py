"""The CUDA kernels run against the numpy step: on the host through an emulator, and on a GPU where there is one."""

import functools
from dataclasses import replace

import cuda_emulator
import numpy as np
import pytest
from test_integrator import SHAPES, make_case, run

from elf_rt.device import cudart, kernels
from elf_rt.device.cuda import Cuda
from elf_rt.device.kernels import StepArguments
from elf_rt.sampling.integrator import step_numpy, to_float32
from elf_rt.sampling.noise import NoiseKey
from elf_rt.sampling.schedule import Row

NUMPY_TYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
GUARD = 0xA5


class Emulated:
    """Host memory and the kernels compiled for the host."""

    def __init__(self):
        self._emulator, self._arrays, self._guards = cuda_emulator.load(), {}, []

    def put(self, array, shift=0):
        """Copy an array to the device, `shift` bytes past an aligned address; returns the address."""
        if array is None:
            return 0
        memory = np.full(array.nbytes + 768, GUARD, np.uint8)
        start = 256 - memory.ctypes.data % 256 + shift
        memory[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        address = memory.ctypes.data + start
        self._arrays[address] = memory[start : start + array.nbytes]
        self._guards.append((memory[:start], memory[start + array.nbytes :]))
        return address

    def get(self, address, like):
        assert all((guard == GUARD).all() for pair in self._guards for guard in pair), "written out of bounds"
        return np.frombuffer(self._arrays[address].tobytes(), like.dtype).reshape(like.shape)

    def launch(self, name, grid, *arguments):
        self._emulator.launch(name, grid, kernels.threads(name), *arguments)


class Gpu:
    """A GPU, launched as the device sampler launches."""

    def __init__(self):
        self._cuda, self._memory = _cuda(), []
        self._stream = self._cuda.stream()

    def put(self, array, shift=0):
        if array is None:
            return 0
        data = np.ascontiguousarray(array)
        memory = self._cuda.allocate(data.nbytes + shift)
        self._memory.append(memory)
        cudart.call("cudaMemcpy", memory.pointer + shift, data.ctypes.data, data.nbytes, _copy("HostToDevice"))
        cudart.synchronize(0)
        return memory.pointer + shift

    def get(self, address, like):
        out = np.empty_like(like)
        self._stream.synchronize()
        cudart.call("cudaMemcpy", out.ctypes.data, address, out.nbytes, _copy("DeviceToHost"))
        return out

    def launch(self, name, grid, *arguments):
        self._cuda.launch(self._stream.handle, name, grid, *arguments)

    def close(self):
        for part in (self._stream, *self._memory):
            part.close()


@functools.cache
def _cuda():
    return Cuda()


def _copy(direction):
    from cuda.bindings import runtime

    return getattr(runtime.cudaMemcpyKind, f"cudaMemcpy{direction}")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "emulated":
        yield Emulated()
        return
    reason = cudart.find_gpu()
    if isinstance(reason, str):
        pytest.skip(reason)
    gpu = Gpu()
    yield gpu
    gpu.close()


ROW, LAST = 2, 4  # the table's row of the case, and its number of steps


def put_step(device, case, *, row=ROW, last=LAST, base=0, shift=0) -> StepArguments:
    """The case as row `row` of a table on the device; the other rows are NaN, so that reading one would show."""
    num_rows, batch, length, width = case["x_rows"].shape
    t = np.full((last + 2, batch), np.nan, np.float32)
    coef = np.full((last + 2, batch, 5), np.nan, np.float32)
    weights = np.full((last + 2, num_rows, batch), np.nan, np.float32)
    t[row], coef[row], weights[row] = np.linspace(0.25, 0.75, batch), case["coef"], case["weights"]
    noise = case.get("noise")
    given = None
    if isinstance(noise, np.ndarray):
        given = np.full((last + 2, *noise.shape), np.nan, np.float32)
        given[row] = noise
    seeds = noise.seeds if isinstance(noise, NoiseKey) else np.zeros(batch, np.uint64)
    signals = np.full((num_rows, batch), 77, np.float32)
    return StepArguments(
        *(device.put(case[name], shift) for name in ("z", "x_last", "x_rows", "next_z", "next_x_prev")),
        *(device.put(signals) for _ in range(3)),
        device.put(case.get("source"), shift),
        device.put(case.get("mask")),
        device.put(seeds),
        device.put(given, shift),
        *(device.put(array) for array in (t, coef, weights)),
        device.put(np.arange(batch, dtype=np.float32) + 3),
        device.put(kernels.make_progress(base, last, case["rows"])),
        length,
        width,
        table_rows=num_rows,
        rows=num_rows,
        next_rows=num_rows,
        offset=row - base,
    )


def launch_step(device, case, arguments, dtype="float32"):
    grid = kernels.grid(*case["z"].shape, dtype)
    device.launch(f"elf_step_{dtype}", grid, *arguments.packed())
    return {name: device.get(getattr(arguments, name), case[name]) for name in ("z", "x_last", "next_z", "next_x_prev")}


def assert_same_bits(result, expected):
    for name, value in result.items():
        integer = f"uint{8 * value.itemsize}"
        np.testing.assert_array_equal(value.view(integer), expected[name].view(integer), err_msg=name)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 130, 16)])  # the last: more than one block
@pytest.mark.parametrize("dtype", kernels.TYPES)
def test_step_gives_numpys_bits(device, dtype, shape, num_rows, conditional):
    case = make_case(shape, num_rows, NUMPY_TYPES[dtype], conditional, seed=num_rows)
    case["noise"] = replace(case["noise"], index=ROW)
    result = launch_step(device, case, put_step(device, case), dtype)
    assert_same_bits(result, run(step_numpy, case))


@pytest.mark.parametrize("dtype", kernels.TYPES)
def test_unaligned_addresses(device, dtype):
    case = make_case((2, 7, 16), 2, NUMPY_TYPES[dtype], conditional=True)
    case["noise"] = replace(case["noise"], index=ROW)
    result = launch_step(device, case, put_step(device, case, shift=4), dtype)
    assert_same_bits(result, run(step_numpy, case))


def test_given_noise(device):
    case = make_case((2, 7, 16), 2, noise="given")
    assert_same_bits(launch_step(device, case, put_step(device, case)), run(step_numpy, case))


def test_zero_factors_and_absent_inputs(device):
    """The start: garbage in z, x_last and the outputs is not used; no self-conditioning, no prefix inputs."""
    case = make_case((2, 7, 16), 2)
    for name in ("z", "x_last", "x_rows"):
        case[name][:] = np.nan
    case["weights"][:], case["coef"][:] = 0, np.float32([0, 0, 0, 2, 0])
    case["noise"] = replace(case["noise"], index=0)
    arguments = put_step(device, case, row=0)
    arguments = replace(arguments, next_x_prev=0, next_t=0, next_s=0, next_mode=0, s=0)
    grid = kernels.grid(*case["z"].shape, "float32")
    device.launch("elf_step_float32", grid, *arguments.packed())
    expected = run(step_numpy, case)
    names = ("z", "x_last", "next_z")
    assert_same_bits({name: device.get(getattr(arguments, name), case[name]) for name in names}, expected)


@pytest.mark.parametrize("final", [0, 1])
def test_signals_of_the_next_call(device, final):
    """t, s and mode of every network row; the decoding row is found by `final`, wherever base and offset point."""
    case = make_case((2, 3, 8), 3)
    arguments = replace(put_step(device, case, row=LAST + 1 if final else ROW), final=final)
    if final:
        arguments = replace(arguments, offset=99)
    launch_step(device, case, arguments)
    like = np.empty((3, 2), np.float32)
    np.testing.assert_array_equal(device.get(arguments.next_t, like), [[0.25, 0.75]] * 3)
    np.testing.assert_array_equal(device.get(arguments.next_s, like), [[3, 4]] * 3)
    np.testing.assert_array_equal(device.get(arguments.next_mode, like), [[final] * 2] * 3)


def test_a_step_past_the_last_does_nothing(device):
    case = make_case((2, 3, 8), 2)
    arguments = put_step(device, case, row=LAST + 1)
    assert_same_bits(launch_step(device, case, arguments), case)
    assert (device.get(arguments.next_t, np.empty((2, 2), np.float32)) == 77).all()


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_graphs_of_any_length_run_any_number_of_steps(device, steps, chunk):
    """A whole sampler in launches of `chunk` steps, each closed by elf_advance, against the loop on the host."""
    shape, rows = (2, 3, 8), (Row(True, True), Row(False, False))
    case = make_case(shape, 2, conditional=True) | {"rows": rows}
    rng = np.random.default_rng(steps)
    table = {
        "t": rng.random((steps + 2, 2), dtype=np.float32),
        "coef": rng.standard_normal((steps + 2, 2, 5), dtype=np.float32),
        "weights": rng.standard_normal((steps + 2, 2, 2), dtype=np.float32),
    }
    expected = run_on_host(case, table)

    arguments = replace(
        put_step(device, case, last=steps, row=0),
        **{name: device.put(array) for name, array in table.items()},
        progress=device.put(kernels.make_progress(0, steps, rows)),
    )
    arguments = replace(arguments, next_z=(network := device.put(case["next_z"])), x_rows=network)  # x = z
    grid = kernels.grid(*shape, "float32")
    for _ in range(-(-(steps + 1) // chunk)):
        for offset in range(chunk):
            device.launch("elf_step_float32", grid, *replace(arguments, offset=offset).packed())
        device.launch("elf_advance", (1, 1, 1), arguments.progress, np.int32(chunk))
    device.launch("elf_step_float32", grid, *replace(arguments, final=1, next_rows=1).packed())
    for name in ("z", "x_last"):
        np.testing.assert_array_equal(device.get(getattr(arguments, name), case[name]), expected[name], err_msg=name)


def run_on_host(case, table):
    """The loop of the host sampler, for a network that returns z."""
    state = {name: case[name].copy() for name in ("z", "x_last", "next_z", "next_x_prev")}
    for j in range(len(table["t"])):
        step_numpy(
            **state,
            x_rows=state["next_z"].copy(),
            weights=table["weights"][j],
            coef=table["coef"][j],
            noise=NoiseKey(case["noise"].seeds, j),
            source=case["source"],
            mask=case["mask"],
            rows=case["rows"],
        )
    return state


@pytest.mark.parametrize("dtype", kernels.TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 16)])
def test_draft_decodes_the_estimate(device, dtype, shape):
    case = make_case(shape, 1, NUMPY_TYPES[dtype])
    x_last, next_z, next_x_prev = (device.put(case[name]) for name in ("x_last", "next_z", "next_x_prev"))
    t, s, mode = (device.put(np.full(shape[0], 77, np.float32)) for _ in range(3))
    scale = device.put(np.full(shape[0], 3, np.float32))
    signals = (next_z, next_x_prev, t, s, mode, scale)
    grid = kernels.grid(*shape, dtype)
    device.launch(f"elf_draft_{dtype}", grid, x_last, *signals, np.int32(shape[1]), np.int32(shape[2]))
    ulp = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(to_float32(device.get(next_z, case["next_z"]))[0], case["x_last"], rtol=ulp, atol=1e-7)
    assert not device.get(next_x_prev, case["next_x_prev"]).any()
    for address, value in ((t, 1), (s, 3), (mode, 1)):
        assert (device.get(address, np.empty(shape[0], np.float32)) == value).all()
