"""GPT-2 as a text encoder, as an ONNX graph: ids and mask in, its last normed hidden states out.

Sources: Radford et al. 2019; weight names of Hugging Face's layout, whose Conv1D weights are stored input-first.
Letters: B samples, S source length, C model width, D head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elf_rt.errors import CheckpointError
from elf_rt.export.foreign import shown
from elf_rt.export.graph import linear
from elf_rt.export.graph_builder import GraphBuilder, Value
from elf_rt.export.precision import Precision
from elf_rt.export.rewrite import Linear
from elf_rt.export.settings import Settings
from elf_rt.export.t5 import MASKED

RANGES = {  # bounds of the numbers in config.json: GPT-2 XL's, and some more
    "n_embd": (1, 1 << 16),
    "n_layer": (1, 500),
    "n_head": (1, 1 << 10),
    "vocab_size": (1, 1 << 22),
    "n_positions": (1, 1 << 16),
    "n_inner": (1, 1 << 18),
}
_FIXED = {  # settings that every released GPT-2 has, and that this graph computes
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True)
class GPT2Sizes:
    """What config.json says; the defaults are those of transformers."""

    n_embd: int
    n_layer: int
    n_head: int
    vocab_size: int
    n_positions: int = 1024
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5

    @classmethod
    def read(cls, config: Mapping[str, Any], where: Path) -> "GPT2Sizes":
        """Raises CheckpointError: the config is of another kind of GPT-2, or incomplete."""
        for key, value in _FIXED.items():
            if config.get(key, value) != value:
                raise CheckpointError(f"{where}: {key} must be {value!r}, got {shown(config[key])}")
        settings = Settings(config, where)
        known: dict[str, Any] = settings.integers(RANGES, defaults=vars(cls))
        if "layer_norm_epsilon" in settings:
            known["layer_norm_epsilon"] = settings.number("layer_norm_epsilon", 0, 1)
        sizes = cls(**known)
        if sizes.n_embd % sizes.n_head:
            raise CheckpointError(f"{where}: n_head {sizes.n_head} must divide n_embd {sizes.n_embd}")
        return sizes

    @property
    def d_model(self) -> int:
        return self.n_embd

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight; those of products are (in, out)."""
        C, inner = self.n_embd, self.n_inner or 4 * self.n_embd
        products = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, inner), "mlp.c_proj": (inner, C)}
        norms = ["ln_f", *(f"h.{i}.{norm}" for i in range(self.n_layer) for norm in ("ln_1", "ln_2"))]
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocab_size, C),
            "wpe.weight": (self.n_positions, C),
        }
        shapes |= {f"{norm}.{part}": (C,) for norm in norms for part in ("weight", "bias")}
        for i in range(self.n_layer):
            for name, shape in products.items():
                shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        return shapes

    def latents(
        self, g: GraphBuilder, state: Mapping[str, np.ndarray], ids: Value, mask: Value, position: Value
    ) -> Value:
        """ids, mask (B, S) at positions (S,) -> (B, S, C) by the weights that `shapes()` names. A token sees those
        before it and itself, and never padding."""
        return _Writer(g, self, state).latents(ids, mask, position)


class _Writer:
    def __init__(self, g: GraphBuilder, sizes: GPT2Sizes, state: Mapping[str, np.ndarray]) -> None:
        self.g, self.sizes, self.state = g, sizes, state

    def latents(self, ids: Value, mask: Value, position: Value) -> Value:
        g = self.g
        tokens = g.op("Gather", self.stored("wte.weight"), ids, axis=0)  # (B, S, C)
        h = g.op("Add", tokens, g.op("Gather", self.stored("wpe.weight"), position, axis=0))
        bias = self.mask_bias(position, mask)  # (B, 1, S, S)
        for i in range(self.sizes.n_layer):
            h = g.op("Add", h, self.attention(f"h.{i}", h, bias))
            h = g.op("Add", h, self.mlp(f"h.{i}", h))
        return self.norm("ln_f", h)

    def mask_bias(self, position: Value, mask: Value) -> Value:
        """0 where a query may look, a huge negative number at later keys and at padding."""
        g = self.g
        g.scope = "mask"
        seen = g.integer_op("LessOrEqual", position, g.integer_op("Unsqueeze", position, g.integers(1)))  # (query, key)
        is_token = g.integer_op("Greater", g.integer_op("Unsqueeze", mask, g.integers(1, 2)), g.integers(0))
        allowed = g.integer_op("And", is_token, seen)  # (B, 1, S, S)
        return g.op("Where", allowed, g.scalar(0.0), g.scalar(MASKED), precision=Precision.FP32)

    def attention(self, block: str, h: Value, bias: Value) -> Value:
        """(B, S, C) residual -> (B, S, C) to be added to it."""
        g, sizes = self.g, self.sizes
        width = sizes.n_embd // sizes.n_head
        qkv = self.product(f"{block}.attn.c_attn", self.norm(f"{block}.ln_1", h))  # (B, S, 3C)
        qkv = g.op("Reshape", qkv, g.integers(0, 0, 3 * sizes.n_head, width))
        q, k, v = g.ops("Split", 3, g.op("Transpose", qkv, perm=[0, 2, 1, 3]), axis=1, num_outputs=3)
        q = g.op("Mul", q, g.scalar(width**-0.5))
        scores = g.op("Add", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), bias)  # (B, heads, S, S)
        mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)  # (B, heads, S, D)
        mixed = g.op("Reshape", g.op("Transpose", mixed, perm=[0, 2, 1, 3]), g.integers(0, 0, sizes.n_embd))
        return self.product(f"{block}.attn.c_proj", mixed)

    def mlp(self, block: str, h: Value) -> Value:
        inner = self.product(f"{block}.mlp.c_fc", self.norm(f"{block}.ln_2", h))
        return self.product(f"{block}.mlp.c_proj", self.g.op("Gelu", inner, approximate="tanh"))

    def product(self, name: str, x: Value) -> Value:
        self.g.scope = name
        return linear(self.g, name, x, Linear(self.state[f"{name}.weight"], self.state[f"{name}.bias"]))

    def norm(self, name: str, x: Value) -> Value:
        self.g.scope = name
        weight, bias = self.stored(f"{name}.weight"), self.stored(f"{name}.bias")
        return self.g.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=self.sizes.layer_norm_epsilon)

    def stored(self, name: str) -> Value:
        return self.g.weight(name, self.state[name])
