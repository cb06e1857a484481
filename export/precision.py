"""Which parts of the network run in 16 bits, and by which powers of two their tensors are scaled first.

A plan is applied by `elf_rt.export.graph` (types) and `elf_rt.export.rewrite` (powers of two), made by
`elf_rt.export.planner` from ranges measured by `elf_rt.export.ranges`, and kept in the manifest.

Names are those of the state dict without `.weight`: `blocks.0.attn.qkv`, `.attn.proj`, `.mlp.w12`, `.mlp.w3`,
`text_proj.proj1` (with self_cond_proj), `text_proj.proj2`, `final_layer.linear`; and `blocks.0.attn` (the attention
itself), `blocks.0.attn.q`, `.k`, `.v` and `blocks.0.mlp.b` (parts of a projection's output; `b` stands for the SwiGLU
product as well), `proj` and `unembed` (the token head).
"""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np

LIMIT = 6e4  # nothing above it is rounded to FP16, whose largest number is 65504
MARGIN = 4.0  # measured ranges are multiplied by it, for trajectories that were not measured


class Precision(Enum):
    """Type of the large matrix products. The residual stream and all statistics are float32 in each."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


# The official bfloat16 run keeps these in float32 and so do we: 8 bits of mantissa would show in the latents. FP16 has
# as many as TF32, which GPUs use for float32 products anyway; only the head's first projection, which reads the
# residual without a norm, stays float32 there.
KEPT_IN_FP32 = {
    Precision.FP32: frozenset[str](),
    Precision.BF16: frozenset({"text_proj.proj1", "text_proj.proj2", "final_layer.linear", "proj"}),
    Precision.FP16: frozenset({"proj"}),
}


@dataclass(frozen=True)
class Item:
    """What was decided about one operation or tensor.

    exponents: the tensor is divided by 2^exponent, per channel or, with one entry, as a whole; empty: not scaled.
    measured: the largest magnitude over the measured calls, of any partial sum where the tensor is a GEMM's output.
    bound: the largest that any input can give, from the weights alone. reason: empty where there is nothing to say.
    """

    name: str
    precision: Precision
    exponents: tuple[int, ...] = ()
    measured: float | None = None
    bound: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry. Exponents shrink to the largest and how many channels have one."""
        entry: dict[str, Any] = {"name": self.name, "precision": self.precision.value}
        if any(self.exponents):
            entry["exponent"] = max(self.exponents, key=abs)
            entry["scaled_channels"] = int(np.count_nonzero(self.exponents))
        for name, value in (("measured", self.measured), ("bound", self.bound)):
            if value is not None:
                entry[name] = float(f"{value:.4g}")
        return entry | ({"reason": self.reason} if self.reason else {})


@dataclass(frozen=True)
class PrecisionPlan:
    """`precision` everywhere but where an item says otherwise. Without items: nothing measured, nothing scaled."""

    precision: Precision
    items: tuple[Item, ...] = ()

    def padded(self, width: int, multiple: int) -> int:
        """The width as the graphs have it: a multiple of what tensor cores like, unless all is float32."""
        return width if self.precision is Precision.FP32 else -(-width // multiple) * multiple

    def precision_of(self, name: str) -> Precision:
        """Type of an operation."""
        if name in self._by_name:
            return self._by_name[name].precision
        return Precision.FP32 if name in KEPT_IN_FP32[self.precision] else self.precision

    def exponents(self, name: str) -> np.ndarray:
        """(channels,), (1,) or () integers: the tensor comes out divided by 2^exponents."""
        item = self._by_name.get(name)
        return np.array(item.exponents if item and item.exponents else 0, np.int64)

    def to_json(self) -> dict[str, Any]:
        items = [item.to_json() for item in self.items]
        return {"precision": self.precision.value, "limit": LIMIT, "margin": MARGIN, "items": items}

    @cached_property
    def _by_name(self) -> dict[str, Item]:
        return {item.name: item for item in self.items}


FP32 = PrecisionPlan(Precision.FP32)
