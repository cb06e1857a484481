"""The few CUDA runtime calls that GPU backends and the device engine need, each checked; and which GPU there is.

``cuda.bindings`` is imported at the first call. Its functions return (error, result, ...) and never raise, also
without a driver, so ``find_gpu`` is safe everywhere.
"""

import ctypes
import importlib
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from elf_rt.errors import BackendError, GpuMemoryError
from elf_rt.libraries import why_absent

MODULE = "cuda.bindings.runtime"


@dataclass(frozen=True)
class Gpu:
    """The first visible NVIDIA GPU. sm: compute capability, 89 for 8.9."""

    name: str
    sm: int


def find_gpu() -> Gpu | str:
    """The first visible GPU (CUDA_VISIBLE_DEVICES chooses), or why there is none."""
    if reason := why_absent(MODULE, "cudaGetDeviceCount", "pip install cuda-bindings"):
        return f"cuda-bindings is {reason}"
    cudart = _module()
    error, count = cudart.cudaGetDeviceCount()
    if error == cudart.cudaError_t.cudaErrorInsufficientDriver:
        return "no NVIDIA driver, or one too old for CUDA " + str(getattr(cudart, "CUDART_VERSION", 0) // 1000 or "")
    if error or not count:
        return "no NVIDIA GPU is visible"
    attribute = cudart.cudaDeviceAttr
    major = call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, 0)
    minor = call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, 0)
    name = call("cudaGetDeviceProperties", 0).name
    return Gpu(name.decode() if isinstance(name, bytes) else str(name), 10 * int(major) + int(minor))


def call(function: str, *arguments: Any) -> Any:
    """Call one CUDA runtime function and return its result, if it has one.

    Raises:
        BackendError: the call failed; names it and CUDA's reason. GpuMemoryError where that is a lack of memory.
    """
    cudart = _module()
    error, *result = getattr(cudart, function)(*arguments)
    if error:
        _, reason = cudart.cudaGetErrorString(error)
        message = f"CUDA: {function} failed: {reason.decode()}"
        if error == cudart.cudaError_t.cudaErrorMemoryAllocation:
            raise GpuMemoryError(f"{message}: use a smaller batch, or a GPU with more free memory")
        raise BackendError(message)
    return result[0] if result else None


def _module() -> ModuleType:
    return importlib.import_module(MODULE)


class Owned:
    """What a CUDA function made. ``close`` gives it back to another one, the first time."""

    def __init__(self, made: Any, destroy: str) -> None:
        self._made, self._destroy = made, destroy

    def close(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            call(self._destroy, made)


class DeviceMemory(Owned):
    """Device memory of a fixed size, zeroed, aligned to 256 bytes."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.pointer = int(call("cudaMalloc", max(1, num_bytes)))
        super().__init__(self.pointer, "cudaFree")
        try:
            call("cudaMemset", self.pointer, 0, num_bytes)
            synchronize(0)  # zeroed on the default stream, for which the others do not wait
        except BackendError:
            self.close()
            raise


class PinnedArray(Owned):
    """A zeroed array in page-locked host memory, which the GPU copies from and to at full speed. After ``close``,
    ``array`` must not be touched."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype | type) -> None:
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        pointer = int(call("cudaMallocHost", num_bytes))
        super().__init__(pointer, "cudaFreeHost")
        ctypes.memset(pointer, 0, num_bytes)
        raw = (ctypes.c_byte * num_bytes).from_address(pointer)
        self.array: np.ndarray = np.frombuffer(memoryview(raw), dtype).reshape(shape)


class Stream(Owned):
    """A stream that does not wait for the default one."""

    def __init__(self) -> None:
        stream = call("cudaStreamCreateWithFlags", _module().cudaStreamNonBlocking)
        super().__init__(stream, "cudaStreamDestroy")
        self.handle = int(stream)

    def upload(self, device: int, host: np.ndarray) -> None:
        """A page-locked array, which must stay as it is until the copy is made, to a device address."""
        self._copy(device, host.ctypes.data, host.nbytes, "HostToDevice")

    def download(self, host: np.ndarray, device: int) -> None:
        """The other way."""
        self._copy(host.ctypes.data, device, host.nbytes, "DeviceToHost")

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """On the device."""
        self._copy(target, source, num_bytes, "DeviceToDevice")

    def zero(self, device: int, num_bytes: int) -> None:
        call("cudaMemsetAsync", device, 0, num_bytes, self._made)

    def synchronize(self) -> None:
        call("cudaStreamSynchronize", self._made)

    def _copy(self, target: int, source: int, num_bytes: int, direction: str) -> None:
        kind = getattr(_module().cudaMemcpyKind, f"cudaMemcpy{direction}")
        call("cudaMemcpyAsync", target, source, num_bytes, kind, self._made)


class Event(Owned):
    """A point on a stream that the host can wait for, and the time between two of them."""

    def __init__(self) -> None:
        super().__init__(call("cudaEventCreate"), "cudaEventDestroy")

    def record(self, stream: Stream) -> None:
        call("cudaEventRecord", self._made, stream.handle)

    def wait(self) -> None:
        call("cudaEventSynchronize", self._made)

    def seconds_since(self, begin: "Event") -> float:
        """After both were waited for."""
        return float(call("cudaEventElapsedTime", begin._made, self._made)) / 1e3


def synchronize(stream: int) -> None:
    """Wait until all work on a stream (a handle as an integer) is done."""
    call("cudaStreamSynchronize", stream)
