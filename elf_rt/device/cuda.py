"""The GPU as the device engine sees it: launches of its kernel, and graph capture.

Kernels are launched through cuda.core. Graphs are captured through the CUDA runtime's own functions, not cuda.core's
GraphBuilder: a capture that an engine broke has to be ended and its error cleared before the stream works again, and
only the plain functions say which of these steps failed.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from elf_rt.device import cudart
from elf_rt.device.kernels import BLOCK, load_kernel
from elf_rt.errors import BackendError, first_line


class Graph(cudart.Owned):
    """A captured graph on the stream that it was captured from."""

    def __init__(self, executable: Any, stream: int) -> None:
        super().__init__(executable, "cudaGraphExecDestroy")
        self._stream = stream

    def launch(self) -> None:
        cudart.call("cudaGraphLaunch", self._made, self._stream)


class Cuda:
    """The first visible GPU with the integrator's kernel loaded.

    Raises:
        BackendError: no driver, one too old, no GPU, no NVRTC, or the driver refuses the kernel.
    """

    def __init__(self) -> None:
        gpu = cudart.find_gpu()
        if isinstance(gpu, str):  # cuda.core does not return without a driver, so it is not asked
            raise BackendError(f"CUDA: {gpu}")
        self._core = importlib.import_module("cuda.core")
        self._core.Device(0).set_current()  # in this thread, the only one that uses it
        self._kernel = load_kernel(gpu.sm)
        self._core_stream = functools.cache(self._core.Stream.from_handle)  # from_handle makes a class for each stream

    def step(self, stream: int, grid: tuple[int, int, int], *arguments: int | np.int32) -> None:
        """Enqueue the integrator's kernel: Python integers pass as 64 bits, np.int32 as 32.

        Raises:
            BackendError: CUDA refused it, as it refuses grids of more than 65535 slots.
        """
        try:
            config = self._core.LaunchConfig(grid=grid, block=BLOCK)
            self._core.launch(self._core_stream(stream), config, self._kernel, *arguments)
        except Exception as error:  # cuda.core raises CUDAError, which is not public in every version
            raise BackendError(f"CUDA: could not launch the integrator: {first_line(error)}") from error

    def capture(self, stream: int, body: Callable[[], None]) -> Graph:
        """Record what ``body`` enqueues on the stream; nothing of it runs.

        Raises:
            BackendError: something in it cannot be captured. The stream is usable again.
        """
        runtime = importlib.import_module(cudart.MODULE)
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cudart.call("cudaStreamBeginCapture", stream, mode)
        try:
            body()
        except BaseException:
            _, graph = runtime.cudaStreamEndCapture(stream)  # broken, or cut short: either way of no use
            if graph is not None and int(graph):
                runtime.cudaGraphDestroy(graph)
            runtime.cudaGetLastError()
            raise
        try:
            graph = cudart.call("cudaStreamEndCapture", stream)
        except BackendError:
            runtime.cudaGetLastError()  # an engine would take it for its own
            raise
        try:
            executable = cudart.call("cudaGraphInstantiate", graph, 0)
        finally:
            runtime.cudaGraphDestroy(graph)
        captured = Graph(executable, stream)
        try:
            cudart.call("cudaGraphUpload", executable, stream)
        except BackendError:
            captured.close()
            raise
        return captured
