"""The half of ``fake_tensorrt`` that runs: engines are ONNX Runtime sessions over the fake GPU's memory."""

import ctypes
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from fake_tensorrt import Making

SCRATCH_BYTES_PER_ROW = 4096


def add_runtime(making: "Making") -> None:
    trt, api, strict, version, cuda = making.trt, making.api, making.strict, making.version, making.cuda
    is_rtx = making.is_rtx

    @strict
    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._log = logger

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            plan = json.loads(data)
            if plan["version"] != version:
                self._log.log(trt.ILogger.ERROR, "Error Code 1: Serialization (Version tag does not match.)")
                return None
            return ICudaEngine(plan, self._log)

    @strict
    class ICudaEngine:
        def __init__(self, plan: dict[str, Any], log: Any) -> None:
            self._plan, self._log = plan, log
            self._session = onnxruntime.InferenceSession(plan["graph"], providers=["CPUExecutionProvider"])
            values = [*self._session.get_inputs(), *self._session.get_outputs()]
            self._io = {value.name: value for value in values}
            self._inputs = [value.name for value in self._session.get_inputs()]

        @property
        def num_io_tensors(self) -> int:
            return len(self._io)

        def get_tensor_name(self, index: int) -> str:
            return list(self._io)[index]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name in self._inputs else trt.TensorIOMode.OUTPUT

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(size if isinstance(size, int) else -1 for size in self._io[name].shape)

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType["INT64" if "int64" in self._io[name].type else "FLOAT"]

        def create_execution_context(self, how: Any) -> Any:
            return IExecutionContext(self, how if is_rtx else RuntimeConfig(how))

        def create_runtime_config(self) -> Any:
            return IRuntimeConfig()

    class RuntimeConfig:
        """What a context is made with."""

        def __init__(self, strategy: Any = None) -> None:
            self._strategy, self._finished = strategy, None

    if "IRuntimeConfig" in api:

        @strict
        class IRuntimeConfig(RuntimeConfig):
            def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
                self._strategy = strategy

            def create_runtime_cache(self) -> Any:
                return IRuntimeCache()

            def set_runtime_cache(self, cache: Any) -> bool:
                strategies = trt.DynamicShapesKernelSpecializationStrategy
                assert self.dynamic_shapes_kernel_specialization_strategy == strategies.EAGER
                self._finished = cache
                return True

        @strict
        class IRuntimeCache:
            """The shapes that kernels were finished for, on one kind of GPU."""

            def __init__(self) -> None:
                self._gpu: str = cuda._name.decode()
                self._shapes: set[tuple[int, ...]] = set()

            def deserialize(self, blob: bytes) -> bool:
                gpu, shapes = json.loads(blob)
                if gpu == self._gpu:
                    self._shapes = {tuple(shape) for shape in shapes}
                return bool(gpu == self._gpu)

            def serialize(self) -> bytes:
                return json.dumps([self._gpu, sorted(self._shapes)]).encode()

            def _finish(self, shape: tuple[int, ...]) -> None:
                if shape not in self._shapes:
                    cuda.events.append("finish kernels")
                    self._shapes.add(shape)

    @strict
    class IExecutionContext:
        def __init__(self, engine: Any, config: Any) -> None:
            assert config._strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
            self._finished = config._finished
            self._engine, self._log = engine, engine._log
            self._profile: dict[str, Any] | None = None
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._scratch = (0, 0)
            self._ran = False

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            cuda.enqueue(stream, lambda: None)
            self._profile = self._engine._plan["profiles"][index]
            self._shapes.clear()
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert self._profile is not None, "a shape before its profile"
            least, _, most = self._profile[name]
            fits = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
            if fits:
                self._shapes[name] = tuple(shape)
            else:
                self._log.log(trt.ILogger.ERROR, f"Error Code 3: {name}: dimensions {shape} are outside the profile")
            return fits

        def infer_shapes(self) -> list[str]:
            return [name for name in self._engine._inputs if name not in self._shapes]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self._shapes:
                return self._shapes[name]
            rows, length = next(iter(self._shapes.values()))[0], max(s[1] for s in self._shapes.values() if len(s) > 1)
            full = self._engine.get_tensor_shape(name)
            return tuple((rows, length)[axis] if size == -1 else size for axis, size in enumerate(full))

        def update_device_memory_size_for_shapes(self) -> int:
            assert not self.infer_shapes()
            return SCRATCH_BYTES_PER_ROW * next(iter(self._shapes.values()))[0]

        def set_device_memory(self, pointer: int, size: int) -> None:
            assert pointer % 256 == 0
            cuda.check_device(pointer, size)
            self._scratch = (pointer, size)

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert name in self._engine._io and address % 256 == 0
            self._addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert stream != 0, "TensorRT synchronises on the default stream"
            if set(self._addresses) != set(self._engine._io):
                self._log.log(trt.ILogger.ERROR, "Error Code 3: API Usage Error: an address is not set")
                return False
            assert self._scratch[1] >= self.update_device_memory_size_for_shapes(), "too little scratch memory"
            is_capturing = getattr(cuda, "is_capturing", lambda stream: False)
            assert self._ran or not is_capturing(stream), "captured before it ran once"
            self._ran = True
            if self._finished is not None:
                self._finished._finish(next(iter(self._shapes.values())))
            cuda.events.append(f"enqueue {'denoiser' if 'x' in self._engine._io else 'discretizer'}")
            cuda.enqueue(stream, self._run)
            return True

        def _run(self) -> None:
            ctypes.memset(self._scratch[0], 0xFF, self._scratch[1])  # what lies there is lost
            feeds = {name: self._array(name).copy() for name in self._engine._inputs}
            names = [name for name in self._engine._io if name not in feeds]
            for name, value in zip(names, self._engine._session.run(names, feeds), strict=True):
                self._array(name)[...] = value

        def _array(self, name: str) -> np.ndarray:
            dtype = np.dtype(np.int64 if self._engine.get_tensor_dtype(name).name == "INT64" else np.float32)
            shape = self.get_tensor_shape(name)
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            cuda.check_device(self._addresses[name], num_bytes)
            raw = (ctypes.c_byte * num_bytes).from_address(self._addresses[name])
            return np.frombuffer(raw, dtype).reshape(shape)
