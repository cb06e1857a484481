"""TensorRT on a real GPU: run these where one is (``pytest -m gpu``); everything else about plans is tested without."""

from pathlib import Path

import numpy as np
import pytest
from golden_cases import GOLDEN, golden
from plan_bundles import golden_bundle

from elf_rt.backends import open_backend
from elf_rt.backends.trt import TrtBackend, why_unavailable
from elf_rt.bundle import Bundle
from elf_rt.device import cudart
from elf_rt.device.cudart import Gpu, Stream, find_gpu
from elf_rt.engines.build import PlanRequest, build, plan_spec
from elf_rt.engines.recipe import RECIPES
from elf_rt.engines.shapes import parse_profiles
from elf_rt.measure.verify import verify
from elf_rt.model import Model
from elf_rt.network import GRAPHS
from elf_rt.plans import LIBRARIES, this_machine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not isinstance(find_gpu(), Gpu), reason="no NVIDIA GPU")]


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def library(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    reason = why_unavailable(LIBRARIES[name]) or RECIPES[name].cannot_target((), this_machine())
    if reason:
        pytest.skip(f"{name}: {reason}")
    return name


def opened(folder: Path, library: str, precision: str, case: str = "uncond") -> tuple[Bundle, TrtBackend]:
    """A golden bundle with a plan for the GPU here, built and loaded."""
    bundle, machine = golden_bundle(folder / f"{case}.elfrt", case), this_machine()
    recipe = RECIPES[library]
    (sms,) = recipe.groups((), precision, machine)
    build(
        plan_spec(bundle, recipe, machine, PlanRequest(precision, sms, parse_profiles("1,1:4:16", None, bundle.config)))
    )
    backend, _ = open_backend(bundle, library, precision)
    assert isinstance(backend, TrtBackend)
    return bundle, backend


def used_bytes() -> int:
    cudart.call("cudaDeviceSynchronize")
    error, free, total = cudart._module().cudaMemGetInfo()
    assert not error
    return int(total) - int(free)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", ["uncond", "cond"])
def test_plans_write_what_the_official_code_writes(library: str, precision: str, case: str, tmp_path: Path) -> None:
    """FP32 exactly; FP16 the same tokens within 0.01; as one CUDA graph for each bucket of rows."""
    bundle, backend = opened(tmp_path, library, precision, case)
    with Model(bundle, lambda _: (backend, "test")) as model:
        report = verify(model, GOLDEN / case / "golden.npz")
        assert model.stats().captures > 0
    assert report.passed, report


def test_one_enqueue_can_be_captured_in_a_cuda_graph(library: str, tmp_path: Path) -> None:
    _, backend = opened(tmp_path, library, "fp16")
    data, stream = golden("uncond"), Stream()
    rows, length = data.arrays["fwd_z"].shape[:2]
    network = backend.bind("denoiser", rows, length, stream.handle)
    for name, value in zip(("z", "x_prev", "t", "s"), data.call("fwd"), strict=False):
        array = np.ascontiguousarray(value.numpy(), np.float32)
        kind = cudart._module().cudaMemcpyKind.cudaMemcpyHostToDevice
        cudart.call("cudaMemcpy", network.buffers[name], array.ctypes.data, array.nbytes, kind)
    cudart.synchronize(0)  # the network's stream does not wait for the default one

    def result() -> np.ndarray:
        x = np.zeros(data.arrays["fwd_x"].shape, np.float32)
        stream.synchronize()
        kind = cudart._module().cudaMemcpyKind.cudaMemcpyDeviceToHost
        cudart.call("cudaMemcpy", x.ctypes.data, network.buffers["x"], x.nbytes, kind)
        return x

    network.enqueue()
    plain = result()
    cudart.call("cudaMemset", network.buffers["x"], 0, plain.nbytes)
    cudart.synchronize(0)
    mode = cudart._module().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    cudart.call("cudaStreamBeginCapture", stream.handle, mode)
    network.enqueue()
    graph = cudart.call("cudaStreamEndCapture", stream.handle)
    executable = cudart.call("cudaGraphInstantiate", graph, 0)
    cudart.call("cudaGraphLaunch", executable, stream.handle)
    np.testing.assert_array_equal(result(), plain)
    assert np.abs(plain).max() > 0
    cudart.call("cudaGraphExecDestroy", executable)
    cudart.call("cudaGraphDestroy", graph)
    backend.close()
    stream.close()


def run_once(backend: TrtBackend, rows: int) -> None:
    stream = Stream()
    for graph in GRAPHS:
        bound = backend.bind(graph, rows, 16, stream.handle)
        bound.enqueue()
        stream.synchronize()
        bound.close()
    stream.close()


def test_close_gives_the_memory_back(library: str, tmp_path: Path) -> None:
    _, backend = opened(tmp_path, library, "fp16")  # the first use of the GPU takes memory that stays
    run_once(backend, 4)
    backend.close()
    before = used_bytes()
    for _ in range(3):
        _, backend = opened(tmp_path, library, "fp16")
        run_once(backend, 16)
        backend.close()
    assert used_bytes() - before < 8 << 20
