"""Which tensors of the network are rounded to 16 bits, and by which powers of two they are scaled first."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Precision(Enum):
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


@dataclass(frozen=True)
class PrecisionPlan:
    precision: Precision
    exceptions: Mapping[str, Precision] = field(default_factory=dict)
    exponents: Mapping[str, int] = field(default_factory=dict)

    @property
    def alignment(self) -> int:
        """Widths are padded with zeros to a multiple of this, as tensor cores and fused attention want."""
        return 1 if self.precision is Precision.FP32 else 8

    def precision_of(self, name: str) -> Precision:
        return self.exceptions.get(name, self.precision)

    def exponent(self, name: str) -> int:
        return self.exponents.get(name, 0)


FP32 = PrecisionPlan(Precision.FP32)
