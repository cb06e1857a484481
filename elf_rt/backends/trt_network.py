"""A TensorRT plan bound to one shape: buffers and contexts on the GPU."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from elf_rt.backends.trt_engine import LoadedEngine
from elf_rt.device.cudart import DeviceMemory, synchronize
from elf_rt.errors import BackendError
from elf_rt.plans import GRAPHS

ITEM_BYTES = {"FLOAT": 4, "INT64": 8}  # the types of a bundle's graphs at their borders, whatever is inside


class TrtNetwork:
    """The network bound to R rows of length L on the GPU: see ``elf_rt.device.network.DeviceNetwork``.

    buffers: device addresses of z, x_prev, t, s, mode, x, hidden and ids, each with the rows of the padded batch; the
    first ``rows`` are the caller's. Both graphs share one scratch memory: they run on one stream, one after the other.
    """

    def __init__(
        self,
        trt: Any,
        engines: Mapping[str, LoadedEngine],
        profile: int,
        shape: tuple[int, int, int],
        stream: int,
        failure: Callable[[str], BackendError],
    ) -> None:
        self.rows, padded_rows, self.length = shape
        self.shapes: dict[str, tuple[int, ...]] = {}  # as the engines have them: the padded rows
        self.buffers: dict[str, int] = {}
        self._failure = failure
        self._contexts: dict[str, Any] = {}
        self._memory: list[DeviceMemory] = []
        try:
            scratch_bytes = 0
            for name in GRAPHS:
                context = self._context(engines[name], name, profile, stream)
                needed = self._shape(trt, engines[name].engine, context, name, (padded_rows, self.length))
                scratch_bytes = max(scratch_bytes, needed)
            scratch = self._allocate(scratch_bytes)
            for context in self._contexts.values():
                context.set_device_memory(scratch, scratch_bytes)
        except BaseException:
            self.close()
            raise

    def enqueue_denoise(self, stream: int) -> None:
        """z, x_prev, t, s, mode -> x, hidden. Only puts work on the stream; can be captured after it ran once."""
        self._enqueue("denoiser", stream)

    def enqueue_discretize(self, stream: int) -> None:
        """hidden -> ids."""
        self._enqueue("discretizer", stream)

    def close(self) -> None:
        """Free the contexts and the memory. The stream must be idle."""
        self._contexts.clear()  # before the memory that they use
        self.buffers.clear()
        for memory in self._memory:
            memory.close()
        self._memory.clear()

    def _enqueue(self, name: str, stream: int) -> None:
        if name not in self._contexts:
            raise BackendError("this network is closed")
        if not self._contexts[name].execute_async_v3(stream):
            raise self._failure(f"could not run the {name}")

    def _context(self, engine: LoadedEngine, name: str, profile: int, stream: int) -> Any:
        context = engine.new_context()
        if context is None:
            raise self._failure(f"could not make a context for the {name}")
        self._contexts[name] = context
        if not context.set_optimization_profile_async(profile, stream):
            raise self._failure(f"could not select profile {profile} of the {name}")
        synchronize(stream)  # the profile may be switched on the stream; after this, nothing here ever waits
        return context

    def _shape(self, trt: Any, engine: Any, context: Any, name: str, size: tuple[int, int]) -> int:
        """Fix all shapes, allocate and bind all buffers; returns the bytes of scratch that this shape needs."""
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        for tensor in names:
            if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT:
                dynamic = tuple(engine.get_tensor_shape(tensor))
                shape = tuple(size[axis] if extent == -1 else extent for axis, extent in enumerate(dynamic))
                if not context.set_input_shape(tensor, shape):
                    raise self._failure(f"refused shape {shape} for {tensor} of the {name}")
        if missing := context.infer_shapes():
            raise self._failure(f"does not know the shape of {', '.join(missing)} in the {name}")
        for tensor in names:
            shape = tuple(context.get_tensor_shape(tensor))
            kind = engine.get_tensor_dtype(tensor).name
            if kind not in ITEM_BYTES or min(shape) < 1:
                raise BackendError(f"{tensor} of the {name} has type {kind} and shape {shape}: export and build again")
            if self.shapes.setdefault(tensor, shape) != shape:
                raise BackendError(f"{tensor} has shape {self.shapes[tensor]} and {shape}: export and build again")
            if tensor not in self.buffers:
                self.buffers[tensor] = self._allocate(math.prod(shape) * ITEM_BYTES[kind])
            if not context.set_tensor_address(tensor, self.buffers[tensor]):
                raise self._failure(f"refused the address of {tensor} in the {name}")
        return int(context.update_device_memory_size_for_shapes())

    def _allocate(self, num_bytes: int) -> int:
        self._memory.append(DeviceMemory(num_bytes))
        return self._memory[-1].pointer
