"""The weights of a bundle's graphs as torch tensors: what the exporter decided for each product is read off the graphs.

Letters: P prefix tokens, H hidden, D head width (padded).
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from elf_rt.backends.torch_pointwise import finished
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError

TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True)
class Linear:
    weight: Tensor  # (outputs, inputs)
    scale: Tensor | None  # float32, of the product
    bias: Tensor | None  # float32, added after it

    @property
    def type(self) -> torch.dtype:
        return self.weight.dtype

    def product(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs) in the weight's type, without scale and bias."""
        return F.linear(x.to(self.type), self.weight)

    def unfinished(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The product, the scale and the bias, for what ``finished`` is fused into."""
        return self.product(x), self.scale, self.bias

    def __call__(self, x: Tensor) -> Tensor:
        """The whole layer, float32."""
        return finished(*self.unfinished(x))


@dataclass(frozen=True)
class Block:
    norm1: Tensor
    qkv: Linear
    head_bias: Tensor  # (2, heads, D), of q and k
    head_norms: Tensor  # (2, D): of q and k
    eps: Tensor  # (2, 1, 1): of q's and k's norm
    cos: Tensor  # (P + max_length, 2, 1, D): q's and k's norm weights are in it
    sin: Tensor
    attention_type: torch.dtype
    proj: Linear
    norm2: Tensor
    w12: Linear
    w3: Linear


class GraphWeights:
    """The initializers of both graphs of one variant, by name.

    Raises:
        BackendError: the graphs are of another elf-rt, or spell RMSNormalization out, which hides its constants.
    """

    def __init__(self, bundle: Bundle, precision: str, device: str) -> None:
        self.device = device
        files = bundle.variant(precision)
        self._data = np.memmap(files["weights"], np.uint8, "r")
        self._tensors: dict[str, TensorProto] = {}
        self._reader: dict[str, str] = {}  # the operator that reads a weight
        self._eps: dict[str, float] = {}
        for part in ("denoiser", "discretizer"):
            self._read(files[part])
        if "blocks.0.norm1.weight" not in self._eps:
            raise BackendError("torch: these graphs were exported for older engines: export again without --opset")

    def tensor(self, name: str) -> Tensor:
        if name not in self:
            raise BackendError(f"torch: the graphs hold no {name}: export the checkpoint again with this elf-rt")
        proto = self._tensors[name]
        place = {entry.key: entry.value for entry in proto.external_data}
        start, length = int(place["offset"]), int(place["length"])
        flat = torch.from_numpy(np.array(self._data[start : start + length]))
        return flat.view(TYPES[proto.data_type]).reshape(tuple(proto.dims)).to(self.device)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def eps(self, name: str) -> float:
        return self._eps[f"{name}.weight"]

    def linear(self, name: str) -> Linear:
        weight, reader = self.tensor(f"{name}.weight"), self._reader[f"{name}.weight"]
        if reader == "MatMul":
            weight = weight.T
        elif reader == "Conv":
            weight = weight[..., 0]
        scale, bias = (
            self.tensor(f"{name}.{part}") if f"{name}.{part}" in self else None for part in ("scale", "bias")
        )
        return Linear(weight.contiguous(), scale, bias)

    def _read(self, path: Path) -> None:
        graph = onnx.load(str(path), load_external_data=False).graph
        self._tensors |= {tensor.name: tensor for tensor in graph.initializer if tensor.external_data}
        for node in graph.node:
            self._reader |= dict.fromkeys(node.input, node.op_type)
            if node.op_type == "RMSNormalization":
                self._eps[node.input[1]] = next(a.f for a in node.attribute if a.name == "epsilon")


def whole_unembedding(weights: GraphWeights) -> Linear:
    """One layer, where the graph has that of a large vocabulary in parts."""
    if "unembed.weight" in weights:
        return weights.linear("unembed")
    names = itertools.takewhile(lambda name: f"{name}.weight" in weights, (f"unembed.{i}" for i in itertools.count()))
    parts = [weights.linear(name) for name in names]
    biases = [part.bias for part in parts if part.bias is not None]
    return Linear(torch.cat([part.weight for part in parts]), None, torch.cat(biases))


def make_block(weights: GraphWeights, name: str, cos: Tensor, sin: Tensor, attention_type: torch.dtype) -> Block:
    """cos, sin (S, D), both halves alike. The head norms' weights w are multiplied into them:
    rotary(w x) = (w cos) x + (±w' sin) x', where ' swaps the halves."""
    norms = torch.stack([weights.tensor(f"{name}.attn.{part}_norm.weight") for part in "qk"])[:, None]  # (2, 1, D)
    half = cos.shape[-1] // 2
    sign = torch.ones_like(cos[0])
    sign[:half] = -1
    qkv = weights.linear(f"{name}.attn.qkv")
    if qkv.bias is None:
        biases = [weights.tensor(f"{name}.attn.{part}.bias")[:, 0] for part in "qk"]
    else:  # a float32 product: one bias for all three, which is zero for v
        biases = list(qkv.bias.view(3, -1, cos.shape[-1])[:2])
        qkv = dataclasses.replace(qkv, bias=None)
    return Block(
        norm1=weights.tensor(f"{name}.norm1.weight"),
        qkv=qkv,
        head_bias=torch.stack(biases),
        head_norms=norms[:, 0],
        eps=torch.tensor([weights.eps(f"{name}.attn.{part}_norm") for part in "qk"], device=cos.device)[:, None, None],
        cos=cos[:, None, None] * norms,
        sin=sign * sin[:, None, None] * norms.roll(half, -1),
        attention_type=attention_type,
        proj=weights.linear(f"{name}.attn.proj"),
        norm2=weights.tensor(f"{name}.norm2.weight"),
        w12=weights.linear(f"{name}.mlp.w12"),
        w3=weights.linear(f"{name}.mlp.w3"),
    )


def why_not(blocks: list[Block]) -> str | None:
    """Why ``torch_kernels`` cannot run these blocks, or None: they want one 16-bit type, and layers as exported."""
    types = {t for b in blocks for t in (b.qkv.type, b.attention_type, b.proj.type, b.w12.type, b.w3.type)}
    if torch.float32 in types or len(types) > 1:
        return "the precision plan keeps a part of the blocks in float32"
    if any(b.qkv.scale is not None or b.w12.scale is not None or b.w12.bias is None for b in blocks):
        return "the graphs are not as this elf-rt exports them"
    return None
