"""A TensorRT plan bound to one shape: buffers and contexts on the GPU."""

import math
from collections.abc import Callable
from typing import Any

from elf_rt.backends.trt_engine import LoadedEngine
from elf_rt.device.cudart import DeviceMemory, synchronize
from elf_rt.errors import BackendError
from elf_rt.network import Graph

ITEM_BYTES = {"FLOAT": 4, "INT64": 8}  # the types of a bundle's graphs at their borders, whatever is inside


class TrtGraph:
    """One engine of a plan bound to R rows of length L: see ``elf_rt.network.DeviceGraph``.

    buffers: device addresses by tensor name, each with the rows of the padded batch.
    """

    def __init__(
        self,
        trt: Any,
        engine: LoadedEngine,
        graph: Graph,
        profile: int,
        shape: tuple[int, int],
        stream: int,
        failure: Callable[[str], BackendError],
    ) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}  # the engine's shapes, with the rows that pad a call
        self.buffers: dict[str, int] = {}
        self._name, self._stream, self._failure = graph, stream, failure
        self._memory: list[DeviceMemory] = []
        self._context: Any = None
        try:
            self._context = self._make_context(engine, profile)
            scratch_bytes = self._shape(trt, engine.engine, shape)
            self._context.set_device_memory(self._allocate(scratch_bytes), scratch_bytes)
        except BaseException:
            self.close()
            raise

    def enqueue(self) -> None:
        """Only puts work on the stream; can be captured after it ran once."""
        if not self._context.execute_async_v3(self._stream):
            raise self._failure(f"could not run the {self._name}")

    def close(self) -> None:
        """Free the context and the memory. The stream must be idle."""
        self._context = None  # the context must go before the memory that it uses
        self.buffers.clear()
        for memory in self._memory:
            memory.close()
        self._memory.clear()

    def _make_context(self, engine: LoadedEngine, profile: int) -> Any:
        context = engine.new_context()
        if context is None:
            raise self._failure(f"could not make a context for the {self._name}")
        if not context.set_optimization_profile_async(profile, self._stream):
            raise self._failure(f"could not select profile {profile} of the {self._name}")
        synchronize(self._stream)  # the profile may be switched on the stream; after this, nothing here ever waits
        return context

    def _shape(self, trt: Any, engine: Any, size: tuple[int, int]) -> int:
        """Fix all shapes, allocate and bind all buffers; returns the bytes of scratch that this shape needs."""
        context, name = self._context, self._name
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
            self.shapes[tensor] = shape
            self.buffers[tensor] = self._allocate(math.prod(shape) * ITEM_BYTES[kind])
            if not context.set_tensor_address(tensor, self.buffers[tensor]):
                raise self._failure(f"refused the address of {tensor} in the {name}")
        return int(context.update_device_memory_size_for_shapes())

    def _allocate(self, num_bytes: int) -> int:
        self._memory.append(DeviceMemory(num_bytes))
        return self._memory[-1].pointer
