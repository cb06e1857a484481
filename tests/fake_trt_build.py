"""The half of ``fake_tensorrt`` that builds: networks read from ONNX, plans that say what they were asked for."""

import json
from typing import TYPE_CHECKING, Any

import onnx

if TYPE_CHECKING:
    from fake_tensorrt import Making

LAYERS = {"MatMul": "MATRIX_MULTIPLY", "Cast": "CAST", "Concat": "CONCATENATION", "Slice": "SLICE"}
TYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.BFLOAT16: "BF16"}
SINCE = {"Attention": (10, 14), "RMSNormalization": (10, 15)}  # parsers, from NVIDIA's changelog


def add_builder(making: "Making") -> None:
    trt, api, strict, version = making.trt, making.api, making.strict, making.version
    parses = (99,) if making.is_rtx else tuple(int(part) for part in version.split("."))

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
                self._log.log(
                    trt.ILogger.ERROR, "Error Code 4: API Usage Error: no optimization profile has been defined"
                )
                return None
            if any(layer.attention._refused for layer in network._layers if layer._kind == "ATTENTION_INPUT"):
                self._log.log(trt.ILogger.ERROR, "Attention operation was not supported by a dedicated kernel")
                return None
            for line in ("Total Activation Memory: 12345 bytes", "Total Weights Memory: 678 bytes"):
                self._log.log(trt.ILogger.INFO, line)
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

        def set_flag(self, flag: Any) -> None:
            assert flag in trt.BuilderFlag

        def set_compute_capability(self, capability: Any, index: int) -> None:
            assert capability in trt.ComputeCapability and index < self.num_compute_capabilities

        def create_timing_cache(self, known: bytes) -> Any:
            return ITimingCache(known)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self._timings = cache
            return not cache._known.startswith(b"another GPU")

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
                if parses < SINCE.get(node.op_type, (0,)):
                    self._errors.append(ParserError(f"No importer registered for op: {node.op_type}"))
            if not self._errors:
                self._network._read(path)
            return not self._errors
