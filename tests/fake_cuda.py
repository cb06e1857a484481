"""A CUDA runtime without a GPU: memory is on the host, and a stream does nothing until something waits for it.

Because work runs only when its stream is synchronised, a result that is read too early is still NaN or zero, and
``events`` tells every allocation, copy and wait in order. Types and constants are those of the real bindings. Without
a driver the real function is called first, each time: it converts its arguments, which is an error where they do not
fit, and answers that there is no driver.
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from cuda.bindings import runtime
from cuda.bindings.runtime import cudaDeviceAttr, cudaError_t, cudaMemcpyKind

PAGE = 256  # cudaMalloc's alignment, in bytes
HAS_DRIVER = runtime.cudaGetDeviceCount()[0] != cudaError_t.cudaErrorInsufficientDriver

T = TypeVar("T")


def like_the_bindings(fake: type[T]) -> type[T]:
    """Hold every function of the fake to the real one's parameters and to the number of its results."""

    def held(name: str, method: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        @functools.wraps(method)
        def call(self: Any, *arguments: Any) -> tuple[Any, ...]:
            real = () if HAS_DRIVER else getattr(runtime, name)(*arguments)
            results = method(self, *arguments)
            assert isinstance(results[0], cudaError_t)
            assert HAS_DRIVER or len(results) == len(real)
            return results

        return call

    for name, method in list(vars(fake).items()):
        if name.startswith("cuda"):
            setattr(fake, name, held(name, method))
    return fake


@like_the_bindings
class FakeCuda:
    """Stands in for the module ``cuda.bindings.runtime``: the functions that elf-rt calls, and all of its types."""

    def __init__(self, sm: int = 89, name: bytes = b"NVIDIA GeForce RTX 4090", memory: int = 1 << 30) -> None:
        self._sm, self._name, self._free = sm, name, memory
        self._blocks: dict[int, tuple[Any, int, str]] = {}  # address -> (owner, bytes, "device" or "host")
        self._streams: dict[int, list[Callable[[], None]]] = {
            0: []
        }  # the default one, for which the others do not wait
        self.events: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """The real types and constants."""
        value = getattr(runtime, name)
        if callable(value) and not isinstance(value, type):
            raise AttributeError(f"the fake CUDA has no {name}")
        return value

    # What the fake TensorRT and the tests use.

    def add_stream(self) -> int:
        handle = 0x1000 + len(self._streams)
        self._streams[handle] = []
        return handle

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        self._streams[int(stream)].append(work)

    def check_device(self, pointer: int, num_bytes: int) -> None:
        """A range must lie inside one live device allocation."""
        inside = [a for a, (_, size, kind) in self._blocks.items() if kind == "device" and a <= pointer < a + size]
        assert inside, f"{pointer:#x} is not in device memory"
        assert pointer + num_bytes <= inside[0] + self._blocks[inside[0]][1], "past the end of a device allocation"

    def allocated(self, kind: str = "device") -> int:
        return sum(size for _, size, where in self._blocks.values() if where == kind)

    @property
    def num_streams(self) -> int:
        return len(self._streams) - 1

    # The CUDA runtime.

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return cudaError_t.cudaSuccess, 1

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        is_major = attribute == cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
        return cudaError_t.cudaSuccess, self._sm // 10 if is_major else self._sm % 10

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        return cudaError_t.cudaSuccess, SimpleNamespace(name=self._name)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return runtime.cudaGetErrorString(error)

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        return self._allocate(size, "device")

    def cudaMallocHost(self, size: int) -> tuple[int, int | None]:
        return self._allocate(size, "host")

    def cudaFree(self, pointer: int) -> tuple[int]:
        return self._release(pointer, "device")

    def cudaFreeHost(self, pointer: int) -> tuple[int]:
        return self._release(pointer, "host")

    def cudaMemset(self, pointer: int, value: int, count: int) -> tuple[int]:
        self.check_device(pointer, count)
        self.enqueue(0, lambda: ctypes.memset(pointer, value, count))
        return (cudaError_t.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert flags == runtime.cudaStreamNonBlocking
        return cudaError_t.cudaSuccess, runtime.cudaStream_t(self.add_stream())

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        assert not self._streams.pop(int(stream)), "a stream was destroyed with work on it"
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        self.events.append("sync")
        queue = self._streams[int(stream or 0)]  # None is the default one, as for the bindings
        while queue:
            queue.pop(0)()
        return (cudaError_t.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: int, stream: int) -> tuple[int]:
        to_device = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        self.check_device(target if to_device else source, count)
        self.events.append("upload" if to_device else "download")
        self.enqueue(stream, lambda: ctypes.memmove(target, source, count))
        return (cudaError_t.cudaSuccess,)

    def _allocate(self, size: int, kind: str) -> tuple[int, int | None]:
        if kind == "device" and self.allocated() + size > self._free:
            return cudaError_t.cudaErrorMemoryAllocation, None
        owner = ctypes.create_string_buffer(size + PAGE)
        pointer = -(-ctypes.addressof(owner) // PAGE) * PAGE
        ctypes.memset(pointer, 0xFF, size)  # NaN until somebody writes
        self._blocks[pointer] = (owner, size, kind)
        self.events.append(f"allocate {kind}")
        return cudaError_t.cudaSuccess, pointer

    def _release(self, pointer: int, kind: str) -> tuple[int]:
        assert not any(self._streams.values()), "memory was freed while work was waiting"
        assert self._blocks.pop(pointer)[2] == kind
        return (cudaError_t.cudaSuccess,)


def install_cuda(monkeypatch: pytest.MonkeyPatch, **options: Any) -> FakeCuda:
    cuda = FakeCuda(**options)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)  # type: ignore[arg-type]
    return cuda
