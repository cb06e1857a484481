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
MOVES = {"Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


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
        nodes.append(node)
        kind = _result_kind(node, kinds)
        if kind not in small:
            continue
        kinds |= dict.fromkeys(node.output, kind)
        if node.op_type == "Cast":
            _target(node).i = onnx.TensorProto.FLOAT
        if node.op_type not in MOVES:
            for i, name in enumerate(node.output):
                node.output[i] = f"{name}/exact"
                cast(f"{name}/exact", f"{name}/rounded", kind)
                cast(f"{name}/rounded", name, onnx.TensorProto.FLOAT)

    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return bytes(model.SerializeToString())


def _result_kind(node: Any, kinds: dict[str, int]) -> int | None:
    """Type of a node's outputs: what it casts to, or that of its first 16-bit input, or None for any other."""
    if node.op_type == "Cast":
        return int(_target(node).i)
    if node.op_type == "Shape":
        return None
    return next((kinds[name] for name in node.input if name in kinds), None)


def _target(node: Any) -> Any:
    """The attribute of a Cast that is the type."""
    return next(attribute for attribute in node.attribute if attribute.name == "to")
