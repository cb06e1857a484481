"""The network in torch, with the weights of a bundle's graphs, for the torch backend.

The graphs hold every decision of the precision plan: a weight's type is that of its product, `.scale` tensors undo the
powers of two that were folded in, widths are padded, rotary is half-split. So this follows them and decides nothing.
The residual stream, all statistics and what stands between two products are float32.

Letters: R rows, L text length, P prefix tokens, S = P + L, C latents, H hidden, D head width (padded), V vocabulary.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError

TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VARIANTS = 64  # of one compiled function: shapes, types, absent scales
LOGITS_AT_ONCE = 4096 * 32100  # of all tokens together: 0.5 GB


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


@dataclass(frozen=True)
class Pointwise:
    """What stands between the products, as functions that a compiler may fuse into one kernel each. A function that is
    used on one width alone has it as a constant."""

    text_input: Callable[..., Tensor]
    angles: Callable[..., Tensor]
    activated: Callable[..., Tensor]
    tokens: Callable[..., Tensor]
    finished: Callable[..., Tensor]
    residual: Callable[..., Tensor]
    norm: Callable[..., Tensor]
    rotated_heads: Callable[..., Tensor]
    gate: Callable[..., Tensor]
    added_norm: Callable[..., tuple[Tensor, Tensor]]
    final_norm: Callable[..., Tensor]
    write_finished: Callable[..., None]
    likeliest: Callable[..., Tensor]

    @classmethod
    def eager(cls) -> "Pointwise":
        return cls(*(globals()[field.name] for field in dataclasses.fields(cls)))

    @classmethod
    def compiled(cls) -> "Pointwise":
        """By torch.compile: fewer launches, less memory traffic. It needs Triton on a GPU, and seconds at the start.
        Sizes that differ between calls become variables: R, L and S."""
        # A thread count or a default type that somebody sets must not compile anew while a graph is captured: what is
        # compiled here depends on none, and always runs in inference mode.
        guards: dict[str, Any] = {"guard_filter_fn": _without_global_state}
        limits: dict[str, Any] = {}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # torch 2.13
            limits = {"recompile_limit": VARIANTS, "isolate_recompiles": True}
        else:  # counted for all models of the process together
            torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
        functions = vars(cls.eager()).values()
        return cls(*(torch.compile(function, options=dict(guards), **limits) for function in functions))  # it pops them


class Network:
    """The denoiser and the discretizer. Exchange `pointwise` for ``Pointwise.compiled()`` to make it faster."""

    def __init__(self, bundle: Bundle, precision: str, device: str) -> None:
        self.config = config = bundle.config
        self.pointwise = Pointwise.eager()
        weights = GraphWeights(bundle, precision, device)
        items = bundle.manifest.get("precision", {}).get(precision, {}).get("items", [])
        exceptions = {item["name"]: item["precision"] for item in items}
        self._eps = weights.eps("final_layer.norm_final")
        self._frequencies = weights.tensor("frequencies")
        tokens = ("t_emb_tokens", "self_cond_cfg_tokens", "mode_tokens")
        self._tokens = {name: weights.tensor(name) for name in tokens if name in weights}
        self._embedders = {
            name: (weights.linear(f"{name}.mlp_0"), weights.linear(f"{name}.mlp_2"))
            for name in ("t_embedder", "self_cond_cfg_embedder")
            if f"{name}.mlp_0.weight" in weights
        }
        self._proj1, self._proj2 = weights.linear("text_proj.proj1"), weights.linear("text_proj.proj2")
        cos, sin = weights.tensor("rotary.cos"), weights.tensor("rotary.sin")
        self._blocks = [
            make_block(weights, f"blocks.{i}", cos, sin, PRECISIONS[exceptions.get(f"blocks.{i}.attn", precision)])
            for i in range(config.depth)
        ]
        self._norm_final = weights.tensor("final_layer.norm_final.weight")
        self._final = weights.linear("final_layer.linear")
        self._head_norm = weights.tensor("decoder_head_norm.weight") if config.decoder_head_norm else None
        self._head, self._unembed = weights.linear("proj"), whole_unembedding(weights)

    def denoise(
        self,
        z: Tensor,
        x_prev: Tensor | None,
        t: Tensor,
        s: Tensor | None,
        mode: Tensor | None,
        x: Tensor,
        hidden: Tensor,
    ) -> None:
        """z, x_prev (R, L, C), t, s, mode (R,) float32: writes x (R, L, C) and hidden (R, L, H) float32."""
        do, first = self.pointwise, self._blocks[0]
        text = do.finished(*self._proj1.unfinished(do.text_input(z, x_prev, self._proj1.type)), self._proj2.type)
        h = do.residual(self._prefix(t, s, mode), *self._proj2.unfinished(text))
        normed = do.norm(h, first.norm1, self._eps, first.qkv.type)
        for block, after in itertools.pairwise(self._blocks):
            branch = self._branches(block, h, normed)
            h, normed = do.added_norm(*branch, after.norm1, self._eps, after.qkv.type)
        branch = self._branches(self._blocks[-1], h, normed)
        normed = do.final_norm(*branch, self._norm_final, self._eps, self._final.type, hidden)
        do.write_finished(*self._final.unfinished(normed), x)

    def discretize(self, hidden: Tensor) -> Tensor:
        """hidden (R, L, H) -> ids (R, L): the lowest of the ids with the largest logit."""
        parts = []
        for tokens in hidden.flatten(0, 1).split(max(1, LOGITS_AT_ONCE // self.config.vocab_size)):
            if self._head_norm is not None:
                tokens = norm(tokens, self._head_norm, self._eps, self._head.type)
            features = F.gelu(self._head(tokens), approximate=self.config.head_gelu)  # (tokens, C)
            parts.append(self.pointwise.likeliest(*self._unembed.unfinished(features)))  # of (tokens, V)
        return torch.cat(parts).view(hidden.shape[:2])

    def _branches(self, block: Block, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The residual h (R, S, H) float32 and its norm x -> h with attention added, and the MLP's unfinished product,
        which what comes next adds to it."""
        (rows, size, _), do = h.shape, self.pointwise
        qkv = block.qkv.product(x)  # (R, S, 3 heads D)
        qk = do.rotated_heads(qkv, block.head_bias, block.cos[:size], block.sin[:size], block.eps, block.attention_type)
        v = qkv.view(rows, size, 3, *qk.shape[3:])[:, :, 2].to(block.attention_type)  # (R, S, heads, D)
        q, k, v = (x.transpose(1, 2) for x in (qk[:, :, 0], qk[:, :, 1], v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.config.head_dim**-0.5)  # (R, heads, S, D)
        proj = block.proj.unfinished(mixed.transpose(1, 2).flatten(2))
        h, x = do.added_norm(h, *proj, block.norm2, self._eps, block.w12.type)
        gated = do.gate(*block.w12.unfinished(x), block.w3.type)  # (R, S, inner)
        return h, *block.w3.unfinished(gated)

    def _prefix(self, t: Tensor, s: Tensor | None, mode: Tensor | None) -> list[Tensor]:
        """(R, tokens, H) each: time, self-conditioning scale, mode."""
        tokens = [self._scalar_tokens("t_embedder", "t_emb_tokens", t)]
        if s is not None:
            tokens.append(self._scalar_tokens("self_cond_cfg_embedder", "self_cond_cfg_tokens", s))
        if mode is not None:
            tokens.append(mode[:, None, None] * self._tokens["mode_tokens"])
        return tokens

    def _scalar_tokens(self, embedder: str, tokens: str, scalar: Tensor) -> Tensor:
        do, (first, second) = self.pointwise, self._embedders[embedder]
        x = do.activated(*first.unfinished(do.angles(scalar, self._frequencies, first.type)), second.type)  # (R, H)
        return do.tokens(self._tokens[tokens], *second.unfinished(x))


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
        eps=torch.tensor([weights.eps(f"{name}.attn.{part}_norm") for part in "qk"], device=cos.device)[:, None, None],
        cos=cos[:, None, None] * norms,
        sin=sign * sin[:, None, None] * norms.roll(half, -1),
        attention_type=attention_type,
        proj=weights.linear(f"{name}.attn.proj"),
        norm2=weights.tensor(f"{name}.norm2.weight"),
        w12=weights.linear(f"{name}.mlp.w12"),
        w3=weights.linear(f"{name}.mlp.w3"),
    )


def text_input(z: Tensor, x_prev: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z, x_prev (R, L, C) side by side, in the type of the product that reads them."""
    return (z if x_prev is None else torch.cat([z, x_prev], -1)).to(dtype)


def angles(scalar: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """scalar (R,) -> its cosines and sines (R, 2 frequencies), in the type of the product that reads them."""
    x = scalar[:, None] * frequencies
    return torch.cat([x.cos(), x.sin()], -1).to(dtype)


def activated(product: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """SiLU, in the type of the product that reads it."""
    return F.silu(finished(product, scale, bias)).to(dtype)


def tokens(table: Tensor, product: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """table (tokens, H) plus the embedding (R, H) of a scalar -> (R, tokens, H)."""
    return table + finished(product, scale, bias)[:, None]


def finished(product: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """A product of any type, in float32 times the scale plus the bias; in the type of the product that reads it."""
    if scale is None:
        x = product.float() if bias is None else product + bias
    else:
        x = product * scale if bias is None else torch.addcmul(bias, product, scale)
    return x.to(dtype)


def residual(prefix: list[Tensor], product: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """The prefix tokens, (R, tokens, H) each, and the text (R, L, H) after them -> h (R, S, H) float32."""
    return torch.cat([*prefix, finished(product, scale, bias)], 1)


def norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm of x (..., H) float32, in the type of the product that reads it."""
    return F.rms_norm(x, weight.shape, weight, eps).to(dtype)


def rotated_heads(qkv: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
    """qkv (R, S, 3 heads D) -> q and k (R, S, 2, heads, D): bias, RMSNorm of each head and half-split rotary, whose
    `sin` carries the sign. The product comes whole: a compiler does not know that a part of it is aligned."""
    x = qkv.view(*qkv.shape[:2], 3, *bias.shape[1:])[:, :, :2] + bias
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(dtype)


def gate(ab: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """SwiGLU: (R, S, 2 inner) -> silu(a) b (R, S, inner), in the type of the product that reads it."""
    a, b = finished(ab, scale, bias).chunk(2, -1)
    return (F.silu(a) * b).to(dtype)


def added_norm(
    h: Tensor,
    product: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The residual with a branch added, and the norm of it that comes next."""
    h = h + finished(product, scale, bias)
    return h, norm(h, weight, eps, dtype)


def final_norm(
    h: Tensor,
    product: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    hidden: Tensor,
) -> Tensor:
    """`added_norm` of the text alone, whose residual is written to `hidden` (R, L, H)."""
    text = h.shape[1] - hidden.shape[1]  # where it begins
    # Not `added_norm` of the slices: of theirs a compiler does not know the length, of `hidden` it does, and fuses.
    hidden.copy_(h[:, text:] + finished(product[:, text:], scale, bias))
    return norm(hidden, weight, eps, dtype)


def write_finished(product: Tensor, scale: Tensor | None, bias: Tensor | None, to: Tensor) -> None:
    """`finished` into a float32 tensor."""
    to.copy_(finished(product, scale, bias))


def likeliest(product: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Logits (tokens, V) -> ids (tokens,)."""
    return finished(product, scale, bias).argmax(-1)


def _without_global_state(guards: Sequence[Any]) -> list[bool]:
    return [guard.guard_type != "GLOBAL_STATE" for guard in guards]
