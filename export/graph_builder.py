"""A small ONNX writer: nodes with tracked types, and weights streamed into one external file.

onnx.helper is used directly, not torch.onnx.export: the type of every tensor and the form of every node are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from elf_rt.export.precision import Precision

PAGE = 4096  # large tensors start on a page, so that engines can map the file instead of reading it
ALIGNMENT = 64
IR_VERSION = 10
ONNX_TYPE = {
    Precision.FP32: TensorProto.FLOAT,
    Precision.FP16: TensorProto.FLOAT16,
    Precision.BF16: TensorProto.BFLOAT16,
}
NUMPY_TYPE = {
    Precision.FP32: np.dtype(np.float32),
    Precision.FP16: np.dtype(np.float16),
    Precision.BF16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Value:
    """A tensor in the graph. `precision` is None for integers."""

    name: str
    precision: Precision | None


class WeightFile:
    """The external-data file that all graphs of a variant share. A name is stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._names: set[str] = set()

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        """The tensor for a graph's initializers, in the array's type."""
        if name in self._names:
            raise ValueError(f"{name} would be stored twice")
        self._names.add(name)
        data = np.ascontiguousarray(array)
        alignment = PAGE if data.nbytes >= 16 * PAGE else ALIGNMENT
        self._file.write(b"\0" * (-self._file.tell() % alignment))
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(data.dtype), dims=data.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", self._file.tell()), ("length", data.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._file.write(data.view(np.uint8).data)
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class GraphBuilder:
    """One graph in the making. Operator methods take and return `Value`s; `scope` names the nodes that follow.

    avoid_float32_gemm: for engines that have none.
    """

    def __init__(self, name: str, opset: int, weights: WeightFile, avoid_float32_gemm: bool = False) -> None:
        self.name, self.opset, self.scope = name, opset, name
        self.avoid_float32_gemm = avoid_float32_gemm
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._count = 0

    def input(self, name: str, shape: Sequence[int | str]) -> Value:
        """A float32 graph input; a string in the shape is a dynamic axis."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return Value(name, Precision.FP32)

    def integer_input(self, name: str, shape: Sequence[int | str]) -> Value:
        """An int64 graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
        return Value(name, None)

    def output(self, value: Value, name: str, shape: Sequence[int | str]) -> None:
        """Publish `value` as graph output: float32, or int64 when it is not a float."""
        kind = TensorProto.INT64 if value.precision is None else TensorProto.FLOAT
        self._nodes.append(helper.make_node("Identity", [value.name], [name], name=f"{name}/output"))
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def weight(self, name: str, array: np.ndarray, precision: Precision = Precision.FP32) -> Value:
        """A parameter, rounded to `precision`, in the external file."""
        self._initializers[name] = self._weights.add(name, np.asarray(array, NUMPY_TYPE[precision]))
        return Value(name, precision)

    def integers(self, *values: int) -> Value:
        """A one-dimensional int64 constant, kept inside the graph."""
        return self._constant(np.array(values, np.int64), None)

    def scalar(self, value: float, precision: Precision = Precision.FP32) -> Value:
        return self._constant(np.array(value, NUMPY_TYPE[precision]), precision)

    def op(self, kind: str, *inputs: Value, precision: Precision | None = None, **attributes: Any) -> Value:
        """Append a node with one output, whose type is that of the first input unless `precision` is given."""
        (value,) = self.ops(kind, 1, *inputs, precision=precision, **attributes)
        return value

    def ops(
        self, kind: str, outputs: int, *inputs: Value, precision: Precision | None = None, **attributes: Any
    ) -> list[Value]:
        """Append a node with several outputs."""
        node = f"{self.scope}/{kind}_{self._count}"
        self._count += 1
        names = [node if i == 0 else f"{node}:{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, [v.name for v in inputs], names, name=node, **attributes))
        return [Value(name, precision or inputs[0].precision) for name in names]

    def integer_op(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        """Append a node whose output is int64."""
        return Value(self.op(kind, *inputs, **attributes).name, None)

    def cast(self, x: Value, precision: Precision) -> Value:
        """`x` in `precision`; no node when it already is."""
        if x.precision is precision:
            return x
        return self.op("Cast", x, precision=precision, to=ONNX_TYPE[precision])

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the graph. The same calls give the same bytes."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        model = helper.make_model(
            graph, producer_name="elf-rt", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", self.opset)]
        )
        helper.set_model_props(model, metadata)
        path.write_bytes(model.SerializeToString(deterministic=True))

    def _constant(self, array: np.ndarray, precision: Precision | None) -> Value:
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
            self._constants[key] = Value(name, precision)
        return self._constants[key]
