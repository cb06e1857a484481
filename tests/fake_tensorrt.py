"""TensorRT without TensorRT: a module with exactly the names of one real version, over ONNX Runtime.

``data/tensorrt_api.json`` holds what ``dir()`` says of the classes in the real bindings of TensorRT 10.3.0 (JetPack 6),
10.16.1.11 and 11.4.0.106, so code that touches a name which that version does not have fails here as it would there.
The fake also insists on the order of calls: profile, shapes, scratch memory and addresses before an enqueue, and never
stream 0.
"""

import ctypes
import enum
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_cuda import FakeCuda

API: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text())
SCRATCH_BYTES_PER_ROW = 4096
LAYERS = {"MatMul": "MATRIX_MULTIPLY", "Cast": "CAST", "Concat": "CONCATENATION", "Slice": "SLICE"}
ENUMERATIONS = (
    "BuilderFlag",
    "DataType",
    "ExecutionContextAllocationStrategy",
    "LayerInformationFormat",
    "LayerType",
    "NetworkDefinitionCreationFlag",
    "ProfilingVerbosity",
    "TensorIOMode",
)
TYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.BFLOAT16: "BF16"}
SINCE = {"Attention": (10, 14), "RMSNormalization": (10, 15)}  # parsers, from NVIDIA's changelog


def install_tensorrt(monkeypatch: pytest.MonkeyPatch, version: str, cuda: FakeCuda, module: str = "tensorrt") -> Any:
    """Put a fake of one version where ``import tensorrt`` finds it."""
    fake = make_tensorrt(version, cuda)
    monkeypatch.setitem(sys.modules, module, fake)
    return fake


def make_tensorrt(version: str, cuda: FakeCuda) -> Any:
    api = {name: frozenset(names.split()) for name, names in API[version].items()}
    numbers = tuple(int(part) for part in version.split("."))
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = version

    def strict(cls: type) -> type:
        """Only the names that the real class has exist."""
        known = api[cls.__name__.lstrip("_")]

        def get(self: Any, name: str) -> Any:
            if not name.startswith("_") and name not in known:
                raise AttributeError(f"{cls.__name__} of TensorRT {version} has no {name}")
            return object.__getattribute__(self, name)

        def put(self: Any, name: str, value: Any) -> None:
            if not name.startswith("_") and name not in known:
                raise AttributeError(f"{cls.__name__} of TensorRT {version} has no {name}")
            object.__setattr__(self, name, value)

        cls.__getattribute__ = get  # type: ignore[method-assign, assignment]
        cls.__setattr__ = put  # type: ignore[method-assign, assignment]
        if cls.__name__ in api["module"]:
            setattr(trt, cls.__name__, cls)
        return cls

    def enumeration(name: str) -> Any:
        members = [member for member in sorted(api[name]) if member.isupper()]
        made = enum.IntEnum(name, members, start=0)
        if name in api["module"]:
            setattr(trt, name, made)
        return made

    for name in ENUMERATIONS:
        enumeration(name)

    class ILogger:
        Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    class IProgressMonitor: ...

    trt.ILogger, trt.IProgressMonitor = ILogger, IProgressMonitor

    @strict
    class Builder:
        def __init__(self, logger: Any) -> None:
            self._log = logger

        def create_network(self, flags: int) -> Any:
            assert flags == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED, "weakly typed"
            return INetworkDefinition()

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            if not config._profiles:
                self._log.log(ILogger.ERROR, "Error Code 4: API Usage Error: no optimization profile has been defined")
                return None
            if any(layer.attention._refused for layer in network._layers if layer._kind == "ATTENTION_INPUT"):
                self._log.log(ILogger.ERROR, "Attention operation was not supported by a dedicated kernel")
                return None
            for line in ("Total Activation Memory: 12345 bytes", "Total Weights Memory: 678 bytes"):
                self._log.log(ILogger.INFO, line)
            if config.progress_monitor is not None:
                config.progress_monitor.phase_start("Building Engine", None, 1)
                assert config.progress_monitor.step_complete("Building Engine", 0)
            plan = {
                "graph": network._path,
                "version": version,
                "profiles": [profile._shapes for profile in config._profiles],
                "tf32": trt.BuilderFlag.TF32 not in config._cleared,
                "opt_level": config.builder_optimization_level,
            }
            return json.dumps(plan).encode().ljust(4096)

    @strict
    class IBuilderConfig:
        def __init__(self) -> None:
            self._profiles: list[Any] = []
            self._cleared: set[Any] = set()
            self._timings: Any = None
            self.builder_optimization_level = 3
            self.progress_monitor: Any = None

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def clear_flag(self, flag: Any) -> None:
            self._cleared.add(flag)

        def create_timing_cache(self, known: bytes) -> Any:
            return ITimingCache(known)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self._timings = cache
            return True

        def get_timing_cache(self) -> Any:
            return self._timings

    @strict
    class ITimingCache:
        def __init__(self, known: bytes) -> None:
            self._known = known

        def serialize(self) -> bytes:
            return self._known + b"timed;"

    @strict
    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, list[list[int]]] = {}

        def set_shape(self, name: str, *sizes: tuple[int, ...]) -> None:
            self._shapes[name] = [list(size) for size in sizes]

    @strict
    class ITensor:
        def __init__(self, name: str, dtype: int, shape: tuple[int, ...] = ()) -> None:
            self.name, self.shape = name, shape
            self.dtype = trt.DataType[TYPES.get(dtype, "INT64")]

    @strict
    class ILayer:
        def __init__(self, kind: str, inputs: list[Any], outputs: list[Any]) -> None:
            self._kind, self._inputs, self._outputs = kind, inputs, outputs
            self.num_inputs, self.num_outputs, self.type = len(inputs), len(outputs), trt.LayerType[kind]

        def get_input(self, index: int) -> Any:
            return self._inputs[index]

        def get_output(self, index: int) -> Any:
            return self._outputs[index]

    if "IAttention" in api:

        @strict
        class IAttention:
            def __init__(self, layer: Any) -> None:
                self._layer = layer
                self.decomposable = False

            @property
            def _refused(self) -> bool:
                return not self.decomposable and self._layer._inputs[0].dtype.name == "FLOAT"

        @strict
        class IAttentionInputLayer(ILayer):
            @property
            def attention(self) -> Any:
                if not hasattr(self, "_attention"):
                    self._attention = IAttention(self)
                return self._attention

    @strict
    class INetworkDefinition:
        def __init__(self) -> None:
            self._path, self._layers, self._inputs = "", [], []

        @property
        def num_layers(self) -> int:
            return len(self._layers)

        @property
        def num_inputs(self) -> int:
            return len(self._inputs)

        def get_layer(self, index: int) -> Any:
            return self._layers[index]

        def get_input(self, index: int) -> Any:
            return self._inputs[index]

        def _read(self, path: str) -> None:
            model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
            graph, self._path = model.graph, path
            types = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.value_info, *graph.output]}
            types |= {w.name: w.data_type for w in graph.initializer}
            tensors = {name: ITensor(name, kind) for name, kind in types.items()}
            for value in graph.input:
                dims = tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)
                tensors[value.name] = ITensor(value.name, types[value.name], dims)
                self._inputs.append(tensors[value.name])
            for node in graph.node:
                inputs = [tensors.setdefault(name, ITensor(name, 7)) for name in node.input if name]
                outputs = [tensors.setdefault(name, ITensor(name, 7)) for name in node.output]
                if node.op_type == "Attention":
                    layer = ILayer("ATTENTION_INPUT", inputs, outputs)
                    self._layers.append(layer)
                    self._layers.append(ILayer("ATTENTION_OUTPUT", [], outputs))
                else:
                    self._layers.append(ILayer(LAYERS.get(node.op_type, "ELEMENTWISE"), inputs, outputs))

    @strict
    class ParserError:
        def __init__(self, text: str) -> None:
            self._text = text

        def desc(self) -> str:
            return self._text

    @strict
    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._errors = network, []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> Any:
            return self._errors[index]

        def parse_from_file(self, path: str) -> bool:
            try:
                model = onnx.load(path, load_external_data=False)
            except Exception:
                self._errors.append(ParserError(f"Failed to parse {path}"))
                return False
            for node in model.graph.node:
                if numbers < SINCE.get(node.op_type, (0,)):
                    self._errors.append(ParserError(f"No importer registered for op: {node.op_type}"))
            if not self._errors:
                self._network._read(path)
            return not self._errors

    @strict
    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._log = logger

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            plan = json.loads(data)
            if plan["version"] != version:
                self._log.log(ILogger.ERROR, "Error Code 1: Serialization (Version tag does not match.)")
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

        def create_execution_context(self, strategy: Any) -> Any:
            return IExecutionContext(self, strategy)

        def create_engine_inspector(self) -> Any:
            return EngineInspector()

    @strict
    class EngineInspector:
        def get_engine_information(self, form: Any) -> str:
            """As real ones answer: fused layers, short type names, a bare name where details were left out."""
            assert form == trt.LayerInformationFormat.JSON
            kinds = ["Half", "Half", "Float", "BFloat16", "Int64", "Row major linear FP16 format"]
            layers: list[Any] = [{"Name": "__myl_Fc", "Outputs": [{"Format/Datatype": kind}]} for kind in kinds]
            return json.dumps({"Layers": [*layers, "[Constant]", {"Name": "no output", "Outputs": []}], "Bindings": []})

    @strict
    class IExecutionContext:
        def __init__(self, engine: Any, strategy: Any) -> None:
            assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
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
                self._log.log(ILogger.ERROR, f"Error Code 3: {name}: dimensions {shape} are outside the profile")
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
                self._log.log(ILogger.ERROR, "Error Code 3: API Usage Error: an address is not set")
                return False
            assert self._scratch[1] >= self.update_device_memory_size_for_shapes(), "too little scratch memory"
            is_capturing = getattr(cuda, "is_capturing", lambda stream: False)
            assert self._ran or not is_capturing(stream), "captured before it ran once"
            self._ran = True
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

    return trt
