"""The torch backend under the device sampler without a GPU: torch's CUDA calls go to the fake GPU, its work to the CPU.

What is real: the sampler, the kernels, the network's arithmetic, and the signatures of torch.cuda that are called.
"""

import contextlib
import ctypes
import inspect
import math
from collections.abc import Iterator
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from fake_gpu import FakeGpu, install_gpu
from plan_bundles import golden_bundle

from elf_rt.backends.torch_cuda import TorchBackend, TorchNetwork
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, GpuMemoryError
from elf_rt.measure.verify import verify
from elf_rt.model import Model

CASE = "cond"
GRAPH_SIGNATURE = inspect.signature(torch.cuda.graph)


class FakeTorchCuda:
    """The parts of torch.cuda that the backend calls."""

    def __init__(self, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = gpu
        self.current: list[int] = []  # streams, innermost last
        self.workspace = ""  # of cuBLAS: "graphs" or "shared", which of torch's pools it was taken from
        for name in ("CUDAGraph", "ExternalStream", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear_workspace, raising=False)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "fake")
        monkeypatch.setattr(torch, "zeros", self.zeros)
        for name in ("denoise", "discretize"):
            monkeypatch.setattr(TorchNetwork, name, self.deferred(getattr(TorchNetwork, name)))

    def deferred(self, work: Any) -> Any:
        """What runs on torch's current stream waits in it, or is recorded."""

        def enqueue(network: TorchNetwork) -> None:
            assert torch.is_inference_mode_enabled()

            def run() -> None:
                with torch.inference_mode():
                    work(network)

            pool = "graphs" if self.current and self.gpu.is_capturing(self.current[-1]) else "shared"
            self.workspace = self.workspace or pool
            assert self.workspace == pool, "memory that goes with another graph"
            if self.current:
                self.gpu.enqueue(self.current[-1], run)
            else:
                run()

        return enqueue

    def ExternalStream(self, handle: int) -> int:
        return handle

    @contextlib.contextmanager
    def stream(self, stream: int) -> Iterator[None]:
        before = list(self.current)
        self.current.append(stream)
        try:
            yield
        finally:
            self.current[:] = before

    def CUDAGraph(self) -> "FakeGraph":
        return FakeGraph(self)

    def graph(self, *args: Any, **options: Any) -> "FakeCapture":
        bound = GRAPH_SIGNATURE.bind(*args, **options)  # as the real one would take it
        assert bound.arguments["capture_error_mode"] == "thread_local"
        return FakeCapture(self, bound.arguments["cuda_graph"], bound.arguments["stream"])

    def clear_workspace(self) -> None:
        self.workspace = ""

    def synchronize(self) -> None:
        if self.gpu.cudaDeviceSynchronize()[0]:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def zeros(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: str) -> torch.Tensor:
        assert device == "cuda"
        num_bytes = math.prod(shape) * dtype.itemsize
        error, pointer = self.gpu.cudaMalloc(num_bytes)
        if error:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert pointer is not None
        raw = (ctypes.c_byte * num_bytes).from_address(pointer)
        return torch.frombuffer(memoryview(raw), dtype=dtype).reshape(shape)


class FakeGraph:
    def __init__(self, cuda: FakeTorchCuda) -> None:
        self._cuda = cuda
        self.executable = 0

    def replay(self) -> None:
        self._cuda.gpu.cudaGraphLaunch(self.executable, self._cuda.current[-1])

    def reset(self) -> None:
        self._cuda.gpu.cudaGraphExecDestroy(self.executable)


class FakeCapture:
    def __init__(self, cuda: FakeTorchCuda, graph: FakeGraph, stream: int) -> None:
        self._cuda, self._graph, self._stream = cuda, graph, stream

    def __enter__(self) -> None:
        self._cuda.synchronize()
        self._cuda.current.append(self._stream)
        self._cuda.gpu.cudaStreamBeginCapture(self._stream, 1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        failed, graph = self._cuda.gpu.cudaStreamEndCapture(self._stream)
        if failed:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore lines")
        self._cuda.current.pop()
        assert graph is not None
        self._graph.executable = graph


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return golden_bundle(tmp_path_factory.mktemp("bundles") / "a.elfrt", CASE, ("fp32",))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return install_gpu(monkeypatch)


@pytest.fixture
def fake(backend: TorchBackend, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeTorchCuda:
    backend.device = "cuda"
    return FakeTorchCuda(gpu, monkeypatch)


@pytest.fixture
def backend(bundle: Bundle) -> TorchBackend:
    """Made before torch is faked."""
    return TorchBackend(bundle, "fp32", "cpu")


def test_golden_runs(bundle: Bundle, backend: TorchBackend, gpu: FakeGpu, fake: FakeTorchCuda) -> None:
    with Model(bundle, backend, "test") as model:
        report = verify(model, GOLDEN / CASE / "golden.npz")
        assert report.passed, report
        gpu.launches = dict.fromkeys(gpu.launches, 0)
        model.sample(seeds=[1, 2], params=model.params(steps=4))  # a new shape: captured, then launched
        assert gpu.launches["graph"] == 1
        model.sample(seeds=[3, 4], params=model.params(steps=4))
        assert gpu.launches["graph"] == 2
    assert not gpu.graphs


def test_a_refused_capture_falls_back(bundle: Bundle, backend: TorchBackend, gpu: FakeGpu, fake: FakeTorchCuda) -> None:
    with Model(bundle, backend, "test") as model:
        captured = model.sample(seeds=[1], params=model.params(steps=4))
        gpu.refuses_capture = True
        with pytest.warns(UserWarning, match=r"torch cannot be captured.*slower: torch: .* during capture$"):
            enqueued = model.sample(seeds=[1, 2], params=model.params(steps=4))
        assert not fake.current
    np.testing.assert_array_equal(enqueued.ids[0], captured.ids[0])


@pytest.mark.parametrize("breaks", [False, True])
def test_out_of_memory_in_a_capture_is_no_refusal(
    breaks: bool, bundle: Bundle, backend: TorchBackend, gpu: FakeGpu, fake: FakeTorchCuda, monkeypatch: Any
) -> None:
    """Also where the capture cannot be ended after it, which is then the error that torch raises."""

    def scarce(network: TorchNetwork) -> None:
        if gpu.is_capturing(fake.current[-1]):
            gpu.refuses_capture = gpu._broken = breaks
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    with Model(bundle, backend, "test") as model:
        with monkeypatch.context() as patch:
            patch.setattr(TorchNetwork, "discretize", scarce)
            with pytest.raises(
                GpuMemoryError, match=r"^torch: no GPU memory for a network call of 1 rows of \d+ tokens"
            ):
                model.sample(seeds=[1], params=model.params(steps=4))
        gpu.refuses_capture = False
        model.sample(seeds=[1], params=model.params(steps=4))
        assert gpu.launches["graph"] == 1


def test_what_torch_refuses_is_a_backend_error(
    bundle: Bundle, backend: TorchBackend, fake: FakeTorchCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    with Model(bundle, backend, "test") as model:
        monkeypatch.setattr(FakeGraph, "replay", refuse)
        with pytest.raises(BackendError, match=r"^torch: CUDA error: an illegal memory access was encountered$"):
            model.sample(seeds=[1], params=model.params(steps=4))
        monkeypatch.setattr(TorchNetwork, "denoise", refuse)
        with pytest.raises(BackendError, match=r"^torch: CUDA error: an illegal memory access was encountered$"):
            model.sample(seeds=[1], params=model.params(steps=4))


def test_out_of_memory_leaves_the_model_usable(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = install_gpu(monkeypatch, memory=2**20)
    backend = TorchBackend(bundle, "fp32", "cpu")
    FakeTorchCuda(gpu, monkeypatch)
    backend.device = "cuda"
    with Model(bundle, backend, "test") as model:
        with pytest.raises(BackendError, match=r"200 samples.*MiB free.*smaller batch"):
            model.sample(seeds=np.arange(200), params=model.params(steps=4))
        assert model.sample(seeds=[1], params=model.params(steps=4)).ids.shape == (1, bundle.config.max_length)
