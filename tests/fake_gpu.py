"""A whole GPU without a GPU: the fake CUDA runtime with graphs, and cuda.core launching the real kernels on the host.

What real hardware forbids is an error here. A wait or an allocation by a thread that captures breaks the capture, as in
CUDA, and so does a wait for the whole GPU in any thread; copies need page-locked memory; kernels may only touch live
device memory; a closed stream is gone.
"""

import ctypes
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cuda_emulator
import fake_cuda
import numpy as np
import pytest
from cuda.bindings import runtime
from cuda.bindings.runtime import cudaError_t
from engine_runs import Runs

from elf_rt.backends.ort import OrtBackend
from elf_rt.bundle import Bundle
from elf_rt.device import kernels
from elf_rt.device.cudart import DeviceMemory
from elf_rt.device.engine import DeviceEngine
from elf_rt.errors import BackendError
from elf_rt.network import Capture, Graph, Launchable, tensor_shapes
from elf_rt.sampling.engine import HostEngine

ADDRESS_BYTES = 8
OK = cudaError_t.cudaSuccess
UNSUPPORTED, INVALIDATED = cudaError_t.cudaErrorStreamCaptureUnsupported, cudaError_t.cudaErrorStreamCaptureInvalidated


@fake_cuda.like_the_bindings
class FakeGpu(fake_cuda.FakeCuda):
    """`launches` counts what the host put on streams itself; what a graph holds is not in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.emulator = cuda_emulator.load()
        self.refuses_capture = False
        self.launches: dict[str, int] = {"graph": 0, "kernel": 0, "network": 0}
        self.current: set[int] = set()  # threads with a current device
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self._event_ms: dict[int, float] = {}
        self._pending: dict[int, int] = {}  # times that each event is still to be recorded
        self._recording: dict[int, list[Callable[[], None]]] = {}
        self._recorder = 0  # the thread that captures
        self._broken = False

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        if int(stream) in self._recording:
            self._recording[int(stream)].append(work)
        else:
            super().enqueue(stream, work)

    def is_capturing(self, stream: int) -> bool:
        return int(stream) in self._recording

    def forbidden(self, anywhere: bool = False) -> cudaError_t:
        """The error of a call that a capture forbids to its thread, or to all, and that breaks it."""
        if not self._recording or not (anywhere or self._recorder == threading.get_ident()):
            return OK
        self._broken = True
        return UNSUPPORTED

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert not self._recording, "torch captures one graph at a time"
        self._recorder, self._broken = threading.get_ident(), self.refuses_capture
        self._recording[int(stream)] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int | None]:
        recorded = self._recording.pop(int(stream))
        if self._broken:
            return INVALIDATED, None
        return OK, runtime.cudaGraph_t(self._new_graph(recorded))

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        assert flags == 0
        return OK, runtime.cudaGraphExec_t(self._new_graph(self.graphs[int(graph)]))

    def cudaGraphUpload(self, executable: int, stream: int) -> tuple[int]:
        assert int(executable) in self.graphs
        return (OK,)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[int]:
        assert not self.is_capturing(stream)
        self.launches["graph"] += 1
        for work in self.graphs[int(executable)]:
            super().enqueue(stream, work)
        return (OK,)

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        del self.graphs[int(graph)]
        return (OK,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[int]:
        assert not any(self._streams.values()), "a graph was destroyed while it ran"
        del self.graphs[int(executable)]
        return (OK,)

    def cudaGetLastError(self) -> tuple[int]:
        return (OK,)

    def cudaDeviceSynchronize(self) -> tuple[int]:
        if error := self.forbidden(anywhere=True):
            return (error,)
        for stream in self._streams:
            super().cudaStreamSynchronize(stream)
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        if error := self.forbidden():
            return (error,)
        return super().cudaStreamSynchronize(stream)

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: int, stream: int) -> tuple[int]:
        places = {1: ("host", "device"), 2: ("device", "host"), 3: ("device", "device")}[kind]
        self._check(source, count, places[0])  # pageable memory would make the copy wait
        self._check(target, count, places[1])
        return super().cudaMemcpyAsync(target, source, count, kind, stream)

    def cudaEventCreate(self) -> tuple[int, Any]:
        number = 1 + max(self._event_ms, default=0)
        self._event_ms[number], self._pending[number] = math.nan, 0
        return OK, runtime.cudaEvent_t(number)

    def cudaEventRecord(self, event: Any, stream: int) -> tuple[int]:
        number = int(event)

        def record() -> None:
            self._pending[number] -= 1
            self._event_ms[number] = 1e3 * time.perf_counter()

        self._pending[number] += 1
        self.enqueue(stream, record)
        return (OK,)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple[int, float]:
        return OK, self._event_ms[int(end)] - self._event_ms[int(start)]

    def cudaEventSynchronize(self, event: Any) -> tuple[int]:
        """Runs the streams until the event was recorded; one that never was is no reason to wait."""
        if error := self.forbidden():
            return (error,)
        self.events.append("wait")
        for stream in list(self._streams.values()):
            while self._pending[int(event)] and stream:
                stream.pop(0)()
        return (OK,)

    def cudaMemsetAsync(self, pointer: int, value: int, count: int, stream: int) -> tuple[int]:
        self._check(pointer, count, "device")
        self.enqueue(stream, lambda: ctypes.memset(pointer, value, count))
        return (OK,)

    def cudaEventDestroy(self, event: Any) -> tuple[int]:
        del self._event_ms[int(event)]
        return (OK,)

    def _allocate(self, size: int, kind: str) -> tuple[int, int | None]:
        if error := self.forbidden():
            return error, None
        return super()._allocate(size, kind)

    def _release(self, pointer: int, kind: str) -> tuple[int]:
        if error := self.forbidden():
            return (error,)
        return super()._release(pointer, kind)

    def _new_graph(self, recorded: list[Callable[[], None]]) -> int:
        number = 1 + max(self.graphs, default=0)
        self.graphs[number] = recorded
        return number

    def _check(self, pointer: int, num_bytes: int, where: str) -> None:
        assert any(
            kind == where and address <= pointer and pointer + num_bytes <= address + size
            for address, (_, size, kind) in self._blocks.items()
        ), f"{pointer:#x} is not in {where} memory"

    # cuda.core

    def core(self) -> Any:
        """A stand-in, or in a process of test_cuda_core.py the real one."""
        if "ELF_RT_FAKE_DRIVER" in os.environ:
            import fake_driver

            return fake_driver.real_core(self)
        return SimpleNamespace(
            Device=lambda index: SimpleNamespace(set_current=lambda: self.current.add(threading.get_ident())),
            LaunchConfig=lambda grid, block: (grid, (block, 1, 1)),
            Stream=SimpleNamespace(from_handle=int),
            ObjectCode=SimpleNamespace(from_cubin=lambda cubin, name: SimpleNamespace(get_kernel=str)),
            launch=self._launch,
        )

    def _launch(self, stream: int, config: tuple[Any, Any], name: str, *arguments: Any) -> None:
        assert threading.get_ident() in self.current, "no device is current in this thread"
        self.enqueue_kernel(stream, name, *config, cuda_emulator.argument_bytes(arguments))

    def enqueue_kernel(self, stream: int, name: str, grid: Any, block: Any, arguments: list[bytes]) -> None:
        def run() -> None:
            for argument in arguments:
                if len(argument) == ADDRESS_BYTES and any(argument):
                    self._check(int.from_bytes(argument, sys.byteorder), 1, "device")
            self.emulator.run(name, grid, block, arguments)

        self.launches["kernel"] += not self.is_capturing(stream)
        self.enqueue(stream, run)


def install_gpu(monkeypatch: pytest.MonkeyPatch, **options: Any) -> FakeGpu:
    """Make cudart and elf_rt.device see this GPU."""
    gpu = FakeGpu(**options)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cuda.core", gpu.core())  # type: ignore[arg-type]
    monkeypatch.setattr(kernels, "get_cubin", lambda sm, cache=None: b"\x7fELF")
    return gpu


class FakeBackend(OrtBackend):
    """A CUDA backend whose graphs are ONNX Runtime sessions that read and write the fake GPU's memory.

    Args:
        most: rows of a call that "plans" take, by length; None: any.
    """

    name = "fake"
    device = "cuda"

    def __init__(self, bundle: Bundle, gpu: FakeGpu, most: dict[int, int] | None = None) -> None:
        super().__init__(bundle, "fp32", 2)
        self.gpu, self.most = gpu, most

    def bind(self, graph: Graph, rows: int, length: int, stream: int) -> "FakeGraph":
        self.max_rows(length, rows)
        return FakeGraph(self, graph, rows, length, stream)

    def max_rows(self, length: int, needed: int = 1) -> int | None:
        if self.most is None:
            return None
        if self.most.get(length, 0) < needed:
            raise BackendError(f"no plan takes {needed} rows of {length}")
        return self.most[length]

    def capture(self, plain: Capture, stream: int, body: Callable[[], None]) -> Launchable:
        return plain(stream, body)


class FakeGraph:
    def __init__(self, backend: FakeBackend, graph: Graph, rows: int, length: int, stream: int) -> None:
        self.graph, self.rows, self.length, self.closed, self.ran = graph, rows, length, False, False
        self._gpu, self._session, self._stream = backend.gpu, backend.sessions[graph], stream
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._memory: dict[str, DeviceMemory] = {}
        self._arrays: dict[str, np.ndarray] = {}
        try:
            for name, shape in tensor_shapes(graph, backend.config, rows, length).items():
                dtype = np.dtype(np.int64 if name == "ids" else np.float32)
                memory = self._memory[name] = DeviceMemory(math.prod(shape) * dtype.itemsize)
                raw = (ctypes.c_byte * memory.num_bytes).from_address(memory.pointer)
                self._arrays[name] = np.frombuffer(memoryview(raw), dtype).reshape(shape)
        except BaseException:
            self.close()
            raise
        self.buffers = {name: memory.pointer for name, memory in self._memory.items()}

    def enqueue(self) -> None:
        assert not self.closed
        assert self.ran or not self._gpu.is_capturing(self._stream), "an engine sets itself up in its first run"
        self.ran = True
        self._gpu.launches["network"] += not self._gpu.is_capturing(self._stream)

        def run() -> None:
            assert not self.closed
            results = self._session.run(self._outputs, {name: self._arrays[name] for name in self._inputs})
            for name, result in zip(self._outputs, results, strict=True):
                self._arrays[name][...] = result

        self._gpu.enqueue(self._stream, run)

    def close(self) -> None:
        self.closed = True
        for memory in self._memory.values():
            memory.close()


def on_device(bundle: Bundle, gpu: FakeGpu, max_rows: int | None = None, **options: Any) -> Runs:
    backend = FakeBackend(bundle, gpu, **options)
    return Runs(lambda: DeviceEngine(backend, bundle.config, max_rows), bundle.config.max_length)


def on_host(bundle: Bundle) -> Runs:
    backend = OrtBackend(bundle, "fp32", 2)
    return Runs(lambda: HostEngine(backend, bundle.config.latent_dim), bundle.config.max_length)


def assert_nothing_left(gpu: FakeGpu) -> None:
    assert gpu.allocated() == gpu.allocated("host") == gpu.num_streams == len(gpu.graphs) == len(gpu._event_ms) == 0
