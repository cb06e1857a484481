"""16-bit graphs on a processor that has no 16-bit arithmetic.

ONNX Runtime's CPU provider has no bfloat16 MatMul, and runs float16 graphs in float32 without rounding what lies
between two operators: activations beyond 65504 would pass there and overflow on a GPU. So a proof on the CPU needs
the rounding written out. `rounded_graph` computes every operator in float32 and rounds its result to the type that
the graph gives it, which is what a GPU does that accumulates in float32.
"""

from pathlib import Path
from typing import Any

from elf_rt.errors import BackendError

# These move numbers and do not make new ones, so their results need no rounding.
MOVES = frozenset(
    ("Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)


def rounded_graph(path: Path) -> bytes:
    """The ONNX file at `path` with float32 operators and explicit rounding; a float32 graph comes back as it is.

    Weights stay in the external file: give its folder to ONNX Runtime as
    `session.model_external_initializers_file_folder_path`.

    Raises BackendError: the onnx package is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendError("16-bit graphs run on the CPU only to be checked: pip install 'elf-rt[export]'") from error

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    small = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    kinds: dict[str, int] = {}  # 16-bit tensors of the original graph and their types
    nodes: list[Any] = []

    def cast(source: str, target: str, kind: int) -> None:
        nodes.append(onnx.helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=kind))

    for tensor in graph.initializer:
        if tensor.data_type in small:
            kinds[tensor.name] = tensor.data_type
            stored = f"{tensor.name}/stored"
            cast(stored, tensor.name, onnx.TensorProto.FLOAT)
            tensor.name = stored

    for node in graph.node:
        kind = _result_kind(node, kinds, onnx.TensorProto.FLOAT)
        nodes.append(node)
        if kind in small:
            kinds.update(dict.fromkeys(node.output, kind))
        if node.op_type == "Cast":
            _set_cast(node, onnx.TensorProto.FLOAT if kind in small else kind)
        if kind in small and (node.op_type == "Cast" or node.op_type not in MOVES):
            for i, name in enumerate(node.output):
                node.output[i] = f"{name}/exact"
                cast(f"{name}/exact", f"{name}/rounded", kind)
                cast(f"{name}/rounded", name, onnx.TensorProto.FLOAT)

    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return bytes(model.SerializeToString())


def _result_kind(node: Any, kinds: dict[str, int], default: int) -> int:
    """Type of a node's outputs: what it casts to, or that of its first 16-bit input, or `default`."""
    if node.op_type == "Cast":
        return int(next(a.i for a in node.attribute if a.name == "to"))
    if node.op_type == "Shape":
        return default
    return next((kinds[name] for name in node.input if name in kinds), default)


def _set_cast(node: Any, kind: int) -> None:
    next(a for a in node.attribute if a.name == "to").i = kind
