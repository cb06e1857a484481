"""A graph parsed into a TensorRT network: its attention layers, and the types that its layers compute in.

Works through the classes that TensorRT 10.3, 10.16, 11 and TensorRT-RTX share; networks are always strongly typed, so
the types in the graph are the types of the engine.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from elf_rt.engines.recipe import Recipe
from elf_rt.errors import BackendError

# Layers that move or name data; the share of a type counts the ones that compute.
MOVES = {"ATTENTION_INPUT", "CAST", "CONCATENATION", "CONSTANT", "GATHER", "IDENTITY", "SHAPE", "SHUFFLE", "SLICE"}
PRODUCTS = {"CONVOLUTION", "MATRIX_MULTIPLY"}  # a float32 product in an FP16 graph is a convolution of width 1
TYPE_NAMES = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32"}


def parse(trt: ModuleType, builder: Any, log: Any, graph: Path, recipe: Recipe) -> tuple[Any, Any]:
    """(network, parser); the parser owns the weights and must live as long as the network is used.

    Raises:
        BackendError: the library does not know the graph's operators, or cannot read the file.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        complaints = [parser.get_error(i).desc() for i in range(parser.num_errors)] or [log.errors()]
        complaint = " ".join("; ".join(dict.fromkeys(complaints)).split())
        too_old = recipe.too_old_for(trt.__version__, complaint)
        if too_old:
            raise BackendError(f"{graph.name}: {too_old}: update it, or export the checkpoint with --opset 20")
        raise BackendError(f"{recipe.library.title} {trt.__version__} cannot read {graph}: {complaint}")
    return network, parser


def layers(network: Any) -> Iterator[Any]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def count_types(network: Any) -> tuple[dict[str, int], dict[str, int]]:
    """(matrix products by type, all computing layers by type): {"fp16": 96, "fp32": 9}. Integer layers do not count."""
    products: Counter[str] = Counter()
    computing: Counter[str] = Counter()
    for layer in layers(network):
        kind = layer.type.name
        precision = TYPE_NAMES.get(layer.get_output(0).dtype.name)
        if precision is None or kind in MOVES:
            continue
        computing[precision] += 1
        if kind in PRODUCTS:
            products[precision] += 1
    return dict(products), dict(computing)


def set_attention(trt: ModuleType, network: Any, *, insist: bool) -> dict[str, int]:
    """Say of each attention layer whether the library may take it apart.

    A layer that may not makes the build fail where there is no fused kernel for it: a build that succeeds has it
    fused. With ``insist``, that is asked of every layer whose queries are 16-bit, or were before a cast that asks for
    float32 sums; float32 attention has no fused kernel anywhere.

    Returns:
        {"fused": how many, "open": how many}; empty for a library or graph without attention layers.
    """
    producers = {layer.get_output(i).name: layer for layer in layers(network) for i in range(layer.num_outputs)}
    counts: Counter[str] = Counter()
    for layer in layers(network):
        if layer.type.name != "ATTENTION_INPUT":
            continue
        queries = layer.get_input(0)
        types = {queries.dtype.name}
        if (producer := producers.get(queries.name)) is not None and producer.type.name == "CAST":
            types.add(producer.get_input(0).dtype.name)
        fused = insist and types != {"FLOAT"}
        layer.__class__ = trt.IAttentionInputLayer  # get_layer gives the base class
        layer.attention.decomposable = not fused
        counts["fused" if fused else "open"] += 1
    return dict(counts)
