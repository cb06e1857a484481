"""Matrix products of float32 tensors as float16 products, for GPUs that have no other here (Turing, in TensorRT-RTX).

x·W = m_x m_W · (x / m_x)(W / m_W), with m_x the largest magnitude in each row of x and m_W that of W. Both factors then
lie in [-1, 1], so nothing overflows whatever the range of x (a trained residual passes 65504), and the result has the
relative error of a float16 product: the same as everywhere else in an FP16 engine. W is scaled and rounded while the
plan is built.
"""

from types import ModuleType
from typing import Any

import numpy as np

from elf_rt.engines.network import layers
from elf_rt.errors import BackendError

TINY = np.float32(1e-30)  # keeps a row of zeros from dividing by zero


def halve_products(trt: ModuleType, network: Any) -> int:
    """Rewrite every float32 matrix product of the network in place, and return how many there were."""
    found = [layer for layer in layers(network) if layer.type.name == "MATRIX_MULTIPLY"]
    found = [layer for layer in found if layer.get_input(0).dtype == trt.DataType.FLOAT]
    readers: dict[str, list[tuple[Any, int]]] = {}
    for layer in layers(network):
        for index in range(layer.num_inputs):
            tensor = layer.get_input(index)
            if tensor is not None:
                readers.setdefault(tensor.name, []).append((layer, index))
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    for layer in found:
        layer.__class__ = trt.IMatrixMultiplyLayer  # get_layer gives the base class
        if {layer.op0, layer.op1} != {trt.MatrixOperation.NONE}:
            raise BackendError(f"{layer.name}: a transposed float32 product cannot be built for this GPU")
        product = layer.get_output(0)
        left, left_size = _scaled(trt, network, layer.get_input(0), last_axis_only=True)
        right, right_size = _scaled(trt, network, layer.get_input(1), last_axis_only=False)
        layer.set_input(0, left)
        layer.set_input(1, right)
        result = network.add_cast(product, trt.DataType.FLOAT).get_output(0)
        for size in (left_size, right_size):
            result = network.add_elementwise(result, size, trt.ElementWiseOperation.PROD).get_output(0)
        for reader, index in readers.get(product.name, []):
            reader.set_input(index, result)
        if product.name in outputs:
            _take_over_output(network, product, result)
    return len(found)


def _scaled(trt: ModuleType, network: Any, x: Any, *, last_axis_only: bool) -> tuple[Any, Any]:
    """(x / size as float16, size), size being the largest magnitude along the last axis or the last two."""
    rank = len(x.shape)
    axes = 1 << (rank - 1) | (0 if last_axis_only else 1 << (rank - 2))
    magnitude = network.add_unary(x, trt.UnaryOperation.ABS).get_output(0)
    size = network.add_reduce(magnitude, trt.ReduceOperation.MAX, axes, True).get_output(0)
    tiny = network.add_constant([1] * rank, np.full(1, TINY)).get_output(0)
    size = network.add_elementwise(size, tiny, trt.ElementWiseOperation.MAX).get_output(0)
    unit = network.add_elementwise(x, size, trt.ElementWiseOperation.DIV).get_output(0)
    return network.add_cast(unit, trt.DataType.HALF).get_output(0), size


def _take_over_output(network: Any, old: Any, new: Any) -> None:
    name = old.name
    network.unmark_output(old)
    old.name = f"{name}.half"
    new.name = name
    network.mark_output(new)
