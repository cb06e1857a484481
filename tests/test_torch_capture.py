"""The torch backend under the device engine without a GPU: torch's CUDA calls go to the fake GPU, its work to the CPU.

What is real: the engine, the kernels, the network's arithmetic, and the signatures of torch.cuda that are called.
"""

import contextlib
import ctypes
import inspect
import math
import warnings
import weakref
from collections.abc import Iterator
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from fake_gpu import FakeGpu, install_gpu
from plan_bundles import golden_bundle

from elf_rt.backends.ort import OrtBackend
from elf_rt.backends.torch_cuda import TorchBackend, TorchGraph
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
        self.freed: list[int] = []  # addresses that torch keeps for itself
        self.workspace = ""  # of cuBLAS: "graphs" or "shared", which of torch's pools it was taken from
        for name in ("CUDAGraph", "ExternalStream", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear_workspace, raising=False)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty_cache)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "fake")
        monkeypatch.setattr(torch, "zeros", self.zeros)
        monkeypatch.setattr(TorchGraph, "run", self.deferred(TorchGraph.run))

    def deferred(self, work: Any) -> Any:
        """What runs on torch's current stream waits in it, or is recorded."""

        def enqueue(graph: TorchGraph) -> None:
            pool = "graphs" if self.current and self.gpu.is_capturing(self.current[-1]) else "shared"
            self.workspace = self.workspace or pool
            assert self.workspace == pool, "memory that goes with another graph"
            self.gpu.enqueue(self.current[-1], lambda: work(graph))

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
        ctypes.memset(pointer, 0, num_bytes)
        raw = (ctypes.c_byte * num_bytes).from_address(pointer)
        tensor = torch.frombuffer(memoryview(raw), dtype=dtype).reshape(shape)
        weakref.finalize(tensor, self.freed.append, pointer)
        return tensor

    def empty_cache(self) -> None:
        while self.freed:
            self.gpu.cudaFree(self.freed.pop())


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


@pytest.fixture
def model(bundle: Bundle, backend: TorchBackend, fake: FakeTorchCuda) -> Iterator[Model]:
    with Model(bundle, lambda _: (backend, "test")) as model:
        yield model


def write(model: Model, guidance_scale: float = 1.0, count: int = 1) -> np.ndarray:
    """Ids of texts of four steps; guidance doubles their rows, so that calls of another size are made."""
    config, params = model.config, model.params(steps=4, guidance_scale=guidance_scale)
    shape = (count, config.max_length, config.latent_dim)
    source = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    mask = np.tile(np.arange(config.max_length) < 3, (count, 1))
    return model.sample(seeds=range(count), source=source, mask=mask, params=params).ids


def test_golden_runs(bundle: Bundle, gpu: FakeGpu, model: Model) -> None:
    report = verify(model, GOLDEN / CASE / "golden.npz")
    assert report.passed, report
    write(model)  # captured by now
    before = model.stats()
    gpu.launches = dict.fromkeys(gpu.launches, 0)
    write(model)
    after = model.stats()
    assert after.captures == before.captures > 0
    assert gpu.launches["graph"] == after.calls - before.calls == 5  # one for each step, one to decode
    assert gpu.launches["kernel"] == 1  # the start
    model.close()
    assert gpu.allocated() == len(gpu.graphs) == gpu.num_streams == 0


def test_a_refused_capture_falls_back(bundle: Bundle, gpu: FakeGpu, fake: FakeTorchCuda, model: Model) -> None:
    captured = write(model)
    gpu.refuses_capture = True
    with pytest.warns(UserWarning, match=r"torch cannot be captured.*slower: torch: .* during capture$"):
        enqueued = write(model, guidance_scale=2.0)
    assert not fake.current
    np.testing.assert_array_equal(write(model), captured)
    with Model(bundle, lambda _: (OrtBackend(bundle, "fp32", 1), "test")) as host:
        np.testing.assert_array_equal(enqueued, write(host, guidance_scale=2.0))


@pytest.mark.parametrize("breaks", [False, True])
def test_out_of_memory_in_a_capture_is_no_refusal(
    breaks: bool, gpu: FakeGpu, fake: FakeTorchCuda, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the capture cannot be ended after it, which is then the error that torch raises."""
    run = TorchGraph.run

    def scarce(graph: TorchGraph) -> None:
        if gpu.is_capturing(fake.current[-1]):
            gpu.refuses_capture = gpu._broken = breaks
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")
        run(graph)

    with monkeypatch.context() as patch:
        patch.setattr(TorchGraph, "run", scarce)
        with pytest.raises(GpuMemoryError, match=r"^torch: no GPU memory for a network call of 1 rows of \d+ tokens"):
            write(model)
    gpu.refuses_capture = False
    write(model)
    assert gpu.launches["graph"] == 5 and model.stats().captures == 1


def test_what_torch_refuses_is_a_backend_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    expected = write(model)
    for kind, name in ((FakeGraph, "replay"), (TorchGraph, "run")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, refuse)
            with pytest.raises(BackendError, match=r"^torch: CUDA error: an illegal memory access was encountered$"):
                write(model)
    np.testing.assert_array_equal(write(model), expected)


def test_out_of_memory_shrinks_the_calls(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for calls of two rows: sixteen texts are written all the same, and a warning says so."""

    def sixteen(memory: int, max_rows: int | None) -> tuple[np.ndarray, int]:
        gpu, backend = install_gpu(monkeypatch, memory=memory), TorchBackend(bundle, "fp32", "cpu")
        with monkeypatch.context() as patch:
            FakeTorchCuda(gpu, patch)
            backend.device = "cuda"
            with Model(bundle, lambda _: (backend, "test"), max_rows=max_rows) as model:
                return write(model, count=16), gpu.allocated()

    expected, room = sixteen(2**30, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids, _ = sixteen(room + 4096, None)
    np.testing.assert_array_equal(ids, expected)
    assert caught and all("rows from now on" in str(each.message) for each in caught)
