"""The encoder of T5 as an ONNX graph: ids and mask in, latents out.

Sources: T5, arXiv 1910.10683; gated feed-forward of T5 1.1, arXiv 2002.05202; weight names of Hugging Face's layout.
Letters: B samples, S source length, C model width, D head width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from elf_rt.errors import CheckpointError
from elf_rt.export.foreign import shown
from elf_rt.export.graph import linear, rms_norm
from elf_rt.export.graph_builder import GraphBuilder, Value
from elf_rt.export.precision import Precision
from elf_rt.export.rewrite import Linear
from elf_rt.export.settings import Settings

MASKED = -1e9  # added to the scores of padding: exp of it is exactly 0, and a row of nothing but padding stays finite
FAMILIES = ("t5", "mt5")  # mt5 differs from T5 1.1 in its vocabulary alone
RANGES = {  # bounds of the numbers in config.json: T5-XXL's, and some more
    "d_model": (1, 1 << 16),
    "d_kv": (1, 1 << 12),
    "d_ff": (1, 1 << 18),
    "num_layers": (1, 500),
    "num_heads": (1, 1 << 10),
    "vocab_size": (1, 1 << 22),
    "relative_attention_num_buckets": (4, 1 << 12),
    "relative_attention_max_distance": (2, 1 << 16),
}
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {  # feed_forward_proj -> operator
    "relu": ("Relu", {}),
    "gated-gelu": ("Gelu", {"approximate": "tanh"}),
}


@dataclass(frozen=True)
class T5Sizes:
    """What config.json says of the encoder; the defaults are those of transformers."""

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int
    feed_forward_proj: str = "relu"
    layer_norm_epsilon: float = 1e-6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128

    @classmethod
    def read(cls, config: Mapping[str, Any], where: Path) -> "T5Sizes":
        """Raises CheckpointError: the config is of another architecture, or incomplete."""
        if config.get("model_type") not in FAMILIES:
            raise CheckpointError(
                f"{where} is a {shown(config.get('model_type'))} model: "
                f"the encoder must be one of {', '.join(FAMILIES)}, gpt2"
            )
        settings = Settings(config, where)
        known: dict[str, Any] = settings.integers(RANGES, defaults=vars(cls))
        if "layer_norm_epsilon" in settings:
            known["layer_norm_epsilon"] = settings.number("layer_norm_epsilon", 0, 1)
        activation = config.get("feed_forward_proj", cls.feed_forward_proj)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise CheckpointError(
                f"{where}: feed_forward_proj must be one of {', '.join(ACTIVATIONS)}, got {shown(activation)}"
            )
        sizes = cls(**known, feed_forward_proj=activation)
        if sizes.relative_attention_max_distance <= sizes.relative_attention_num_buckets // 4:
            raise CheckpointError(f"{where}: relative_attention_max_distance must be above a quarter of the buckets")
        return sizes

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight; Linear weights are (out, in)."""
        C, inner = self.d_model, self.num_heads * self.d_kv
        shapes: dict[str, tuple[int, ...]] = {
            "shared.weight": (self.vocab_size, C),
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
                self.relative_attention_num_buckets,
                self.num_heads,
            ),
            "encoder.final_layer_norm.weight": (C,),
        }
        for i in range(self.num_layers):
            attention, feed_forward = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
            shapes |= {f"{attention}.SelfAttention.{name}.weight": (inner, C) for name in "qkv"}
            shapes[f"{attention}.SelfAttention.o.weight"] = (C, inner)
            for name in ("wi_0", "wi_1") if self.gated else ("wi",):
                shapes[f"{feed_forward}.DenseReluDense.{name}.weight"] = (self.d_ff, C)
            shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (C, self.d_ff)
            shapes |= {f"{layer}.layer_norm.weight": (C,) for layer in (attention, feed_forward)}
        return shapes

    def latents(
        self, g: GraphBuilder, state: Mapping[str, np.ndarray], ids: Value, mask: Value, position: Value
    ) -> Value:
        """ids, mask (B, S) at positions (S,) -> (B, S, C) by the weights that `shapes()` names. Nothing attends to
        padding."""
        h = g.op("Gather", g.weight("shared.weight", state["shared.weight"]), ids, axis=0)  # (B, S, C)
        bias = g.op("Add", _position_bias(g, self, state, position), _mask_bias(g, mask))  # (B, heads, S, S)
        for i in range(self.num_layers):
            h = g.op("Add", h, _attention(g, self, state, f"encoder.block.{i}.layer.0", h, bias))
            h = g.op("Add", h, _feed_forward(g, self, state, f"encoder.block.{i}.layer.1", h))
        return _norm(g, self, state, "encoder.final_layer_norm", h)


def relative_buckets(distance: torch.Tensor, num_buckets: int, max_distance: int) -> torch.Tensor:
    """The bias bucket of each distance (key position - query position), integers of any shape.

    Half of the buckets are for keys to the right. Of each half, half stand for one distance each, the others for
    ranges that grow geometrically up to `max_distance`. Computed in torch's float32, as the models were trained:
    a bucket's edge may fall on the other side in exact arithmetic.
    """
    half = num_buckets // 2
    single = half // 2
    size = distance.abs()
    octave = torch.log(size.float() / single) / math.log(max_distance / single) * (half - single)
    ranged = (single + octave.clamp(min=0).long()).clamp(max=half - 1)
    return torch.where(size < single, size, ranged) + half * (distance > 0)


def _position_bias(g: GraphBuilder, sizes: T5Sizes, state: Mapping[str, np.ndarray], position: Value) -> Value:
    """(1, heads, S, S). All distances beyond the maximum share a bucket, so a table of clipped distances is exact."""
    g.scope = "relative_attention_bias"
    most = sizes.relative_attention_max_distance
    buckets = relative_buckets(torch.arange(-most, most + 1), sizes.relative_attention_num_buckets, most)
    learned = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]  # (buckets, heads)
    table = g.weight("relative_attention_bias", learned[buckets.numpy()].T)  # (heads, 2 most + 1)
    distance = g.integer_op("Sub", position, g.integer_op("Unsqueeze", position, g.integers(1)))  # (query, key)
    near = g.integer_op("Max", g.integer_op("Min", distance, g.integers(most)), g.integers(-most))
    bias = g.op("Gather", table, g.integer_op("Add", near, g.integers(most)), axis=1)  # (heads, S, S)
    return g.op("Unsqueeze", bias, g.integers(0))


def _mask_bias(g: GraphBuilder, mask: Value) -> Value:
    """(B, 1, 1, S): 0 at source tokens, a huge negative number at padding."""
    g.scope = "mask"
    is_token = g.op("Cast", g.op("Unsqueeze", mask, g.integers(1, 2)), to=TensorProto.BOOL)
    return g.op("Where", is_token, g.scalar(0.0), g.scalar(MASKED), precision=Precision.FP32)


def _attention(
    g: GraphBuilder, sizes: T5Sizes, state: Mapping[str, np.ndarray], name: str, h: Value, bias: Value
) -> Value:
    """(B, S, C) residual -> (B, S, C) to be added to it. T5 does not scale the scores."""
    normed = _norm(g, sizes, state, f"{name}.layer_norm", h)

    def heads(part: str, perm: list[int]) -> Value:
        x = _project(g, state, f"{name}.SelfAttention.{part}", normed)
        x = g.op("Reshape", x, g.integers(0, 0, sizes.num_heads, sizes.d_kv))  # (B, S, heads, D)
        return g.op("Transpose", x, perm=perm)

    q, k, v = heads("q", [0, 2, 1, 3]), heads("k", [0, 2, 3, 1]), heads("v", [0, 2, 1, 3])
    scores = g.op("Add", g.op("MatMul", q, k), bias)  # (B, heads, S, S)
    mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)  # (B, heads, S, D)
    mixed = g.op("Transpose", mixed, perm=[0, 2, 1, 3])
    mixed = g.op("Reshape", mixed, g.integers(0, 0, sizes.num_heads * sizes.d_kv))
    return _project(g, state, f"{name}.SelfAttention.o", mixed)


def _feed_forward(g: GraphBuilder, sizes: T5Sizes, state: Mapping[str, np.ndarray], name: str, h: Value) -> Value:
    normed = _norm(g, sizes, state, f"{name}.layer_norm", h)
    kind, attributes = ACTIVATIONS[sizes.feed_forward_proj]
    inner = _project(g, state, f"{name}.DenseReluDense.{'wi_0' if sizes.gated else 'wi'}", normed)
    inner = g.op(kind, inner, **attributes)
    if sizes.gated:
        inner = g.op("Mul", inner, _project(g, state, f"{name}.DenseReluDense.wi_1", normed))
    return _project(g, state, f"{name}.DenseReluDense.wo", inner)


def _project(g: GraphBuilder, state: Mapping[str, np.ndarray], name: str, x: Value) -> Value:
    g.scope = name
    return linear(g, name, x, Linear(state[f"{name}.weight"].T, None))


def _norm(g: GraphBuilder, sizes: T5Sizes, state: Mapping[str, np.ndarray], name: str, x: Value) -> Value:
    g.scope = name
    return rms_norm(g, x, g.weight(f"{name}.weight", state[f"{name}.weight"]), sizes.layer_norm_epsilon)
