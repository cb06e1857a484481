"""From measured ranges to a precision plan.

FP16 ends at 65504 and starts to lose digits below 2^-14. Three things keep every rounded tensor inside:

- Bounds. Behind an RMSNorm with gain g, |W x| <= sqrt(H) |W * g| for any input (Cauchy-Schwarz), partial sums
  included. Where that is below LIMIT the tensor is safe for good.
- Powers of two, per channel, that bring a bound below LIMIT. They come from weights and go back in weights, or in
  float32 after the cast, so in float32 they change no bit.
- Measured ranges times MARGIN in place of the bound, where that is so wide that typical values would lose digits.

What none of these makes safe stays float32, by name.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elf_rt.export import rewrite
from elf_rt.export.precision import FP32, KEPT_IN_FP32, LIMIT, MARGIN, Item, Precision, PrecisionPlan
from elf_rt.export.ranges import Range, Ranges
from elf_rt.params import ModelConfig

SMALLEST_NORMAL = 2.0**-14  # FP16's smallest normal number
WEIGHT_ERROR = 2.0**-12  # largest relative rounding error of a matrix, weighted by the energy of its inputs
HEAD_AGREEMENT = 0.995  # the unembedding leaves float32 if so many tokens stay: half of what verify allows
LARGEST_SHIFT = 24
SHIFTS = (0, *(s for shift in range(1, LARGEST_SHIFT + 1) for s in (shift, -shift)))  # tried in this order

State = Mapping[str, np.ndarray]
Check = Callable[[np.ndarray], str]  # exponents -> what is wrong with them, or ""


def plan_precision(
    precision: Precision, config: ModelConfig, state: State, ranges: Ranges, kept: Mapping[str, float] | None = None
) -> PrecisionPlan:
    """What runs in `precision`, which is scaled, and what stays float32, for weights and ranges of one model.

    `state` holds float32 arrays under the official names; `ranges` comes from `measure_ranges` on the same weights;
    `kept`, of layers that stay float32 although nothing overflows, from `elf_rt.export.sensitivity`.
    """
    if precision is Precision.FP32:
        return FP32
    items = [
        Item(name, Precision.FP32, reason="float32, as in the official run") for name in sorted(KEPT_IN_FP32[precision])
    ]
    reasons = {n: f"float32: {precision.value} alone would change x by {e:.2%}" for n, e in (kept or {}).items()}
    planned = _Fp16Planner(config, state, ranges).plan() if precision is Precision.FP16 else []
    for item in planned:  # what was to be rounded and is not keeps its powers of two, which change no bit
        reason = reasons.pop(item.name, "") if item.precision is Precision.FP16 else ""
        items.append(dataclasses.replace(item, precision=Precision.FP32, reason=reason) if reason else item)
    done = {item.name for item in planned}
    items += [Item(name, Precision.FP32, reason=reason) for name, reason in reasons.items() if name not in done]
    return PrecisionPlan(precision, (*items, _unembedding(precision, ranges)))


def _unembedding(precision: Precision, ranges: Ranges) -> Item:
    agreement = ranges.head_agreement.get(precision)
    if agreement is None:
        return Item("unembed", Precision.FP32, reason="float32: no decode call was measured")
    largest = ranges.logits
    if precision is Precision.FP16 and not MARGIN * largest <= LIMIT:
        return Item("unembed", Precision.FP32, measured=largest, reason=f"float32: logits reach {largest:.3g}")
    if agreement < HEAD_AGREEMENT:
        reason = f"float32: in {precision.value} {1 - agreement:.2%} of the tokens would change"
        return Item("unembed", Precision.FP32, measured=largest, reason=reason)
    return Item("unembed", precision, measured=largest)


@dataclass(frozen=True)
class _Tensor:
    """One tensor to be rounded: its measured range and what the weights allow at most, per channel."""

    measured: Range
    bound: np.ndarray

    @property
    def reach(self) -> np.ndarray:
        """The range to make room for."""
        return np.minimum(self.bound, MARGIN * self.measured.maximum)

    @property
    def needs(self) -> list[np.ndarray]:
        """Smallest exponents, per channel, that keep the tensor below LIMIT: for any input, then as far as measured."""
        return [_exponents(range_) for range_ in (self.bound, self.reach) if np.isfinite(range_).all()]

    def lost(self, exponents: np.ndarray) -> str:
        """Whether FP16's steps are too coarse for a tensor divided by 2^exponents.

        A step must stay below 2^-11 of what is typical in the channel, or in the tensor where the channel is small.
        """
        typical = np.maximum(self.measured.typical, np.median(self.measured.typical))
        lost = (typical * np.exp2(-exponents) < SMALLEST_NORMAL) & (self.measured.maximum > 0)
        return f"its range is too wide for FP16 (up to {self.reach.max():.3g})" if lost.any() else ""

    def item(self, name: str, exponents: np.ndarray) -> Item:
        """The record of a tensor that is rounded, divided by 2^exponents."""
        reason = ""
        if exponents.any():
            most, (measured, bound) = max(exponents.tolist(), key=abs), self.extremes
            proved = bound is not None and bool((self.bound <= LIMIT * np.exp2(exponents)).all())
            reason = f"reaches {measured:.3g}, at most {bound:.3g}" if proved else f"reaches {measured:.3g}"
            reason += f": divided by 2^{most}"
            if exponents.size > 1:
                reason += f" in {np.count_nonzero(exponents)} of {exponents.size} channels"
        kept = tuple(exponents.tolist()) if exponents.any() else ()
        return Item(name, Precision.FP16, kept, *self.extremes, reason)

    @property
    def extremes(self) -> tuple[float, float | None]:
        bound = float(self.bound.max())
        return float(self.measured.maximum.max()), bound if np.isfinite(bound) else None


def _exponents(largest: np.ndarray) -> np.ndarray:
    return np.ceil(np.log2(np.maximum(largest / LIMIT, 2.0**-LARGEST_SHIFT))).astype(np.int64)


class _Fp16Planner:
    def __init__(self, config: ModelConfig, state: State, ranges: Ranges) -> None:
        self.config, self.state, self.ranges = config, state, ranges
        self.items: list[Item] = []

    def plan(self) -> list[Item]:
        self.input_projections()
        for block in range(self.config.depth):
            self.attention(f"blocks.{block}")
            self.mlp(f"blocks.{block}")
        self.output_projection()
        return self.items

    def input_projections(self) -> None:
        tensors, merged = self.ranges.tensors, rewrite.input_projection(self.config, self.state)
        entry = _Tensor(tensors["text_proj.input"], np.full(len(merged.weight), np.inf))
        inner = _Tensor(tensors["text_proj.proj1"], np.full(merged.weight.shape[1], np.inf))
        problem = (
            self.unscaled("the latents", entry)
            or self.unscaled("its output", inner)
            or weights_lost(merged.weight, entry.measured.rms)
        )
        self.add("text_proj.proj1", problem, inner)
        weight = self.state["text_proj.proj2.weight"].T
        unfolded = np.zeros(len(weight), np.int64)
        self.output("text_proj.proj2", weight, unfolded, np.full(len(weight), np.inf), inner.measured.rms)

    def output_projection(self) -> None:
        weight, gain, bound = self.behind_norm("final_layer.norm_final", "final_layer.linear")
        out = _Tensor(self.ranges.tensors["final_layer.linear"], bound)
        problem = self.norm_lost(gain) or self.unscaled("its output", out) or weights_lost(weight, gain)
        self.add("final_layer.linear", problem, out)

    def attention(self, block: str) -> None:
        name, tensors = f"{block}.attn", self.ranges.tensors
        weight, gain, bound = self.behind_norm(f"{block}.norm1", f"{name}.qkv")
        weights, bounds = np.split(weight, 3, axis=1), np.split(bound, 3)
        q, k, v = (_Tensor(tensors[f"{name}.{part}"], b) for part, b in zip("qkv", bounds, strict=True))
        problem = self.norm_lost(gain)
        problem = problem or self.head_part(f"{name}.q", q, weights[0], gain)
        problem = problem or self.head_part(f"{name}.k", k, weights[1], gain)
        e_v, v_wrong = search(v.needs, v.lost)
        if not v_wrong:
            e_v, weights_wrong = search(v.needs, lambda e: v.lost(e) or weights_lost(weights[2], gain, out=e))
            problem = problem or (weights_wrong and f"v: {weights_wrong}")
        if v_wrong:
            self.add(f"{name}.v", v_wrong, v)
            problem = problem or f"v: {v_wrong}"
        else:
            self.items.append(v.item(f"{name}.v", e_v))
        self.add(f"{name}.qkv", problem)
        self.add(name, self.scores_lost(name) or (v_wrong and f"v: {v_wrong}"))
        out_weight = self.state[f"{name}.proj.weight"].T
        if v_wrong:
            self.add(f"{name}.proj", f"v: {v_wrong}")
        else:
            # An average of values is no larger than the largest.
            self.output(f"{name}.proj", out_weight, e_v, v.bound, tensors[f"{name}.mix"].rms)

    def head_part(self, name: str, tensor: _Tensor, weight: np.ndarray, gain: np.ndarray) -> str:
        """Queries or keys: a norm follows, so one exponent serves all channels. Returns what is wrong, if anything."""
        needs = [need.max(keepdims=True) for need in tensor.needs]
        exponent, wrong = search(needs, lambda e: tensor.lost(e) or weights_lost(weight, gain, out=e))
        self.items.append(tensor.item(name, exponent))
        return wrong and f"{name[-1]}: {wrong}"

    def mlp(self, block: str) -> None:
        name, tensors = f"{block}.mlp", self.ranges.tensors
        weight, gain, bound = self.behind_norm(f"{block}.norm2", f"{name}.w12")
        (w_a, w_b), (bound_a, bound_b) = np.split(weight, 2, axis=1), np.split(bound, 2)
        a, b = _Tensor(tensors[f"{name}.a"], bound_a), _Tensor(tensors[f"{name}.b"], bound_b)
        bias_a, bias_b = np.abs(np.split(self.state[f"{name}.w12.bias"], 2))
        bound_product = (bound_a + bias_a) * (bound_b + bias_b)  # |silu(a)| <= |a|
        product = _Tensor(tensors[f"{name}.product"], bound_product)
        gate_wrong = self.norm_lost(gain) or self.unscaled("the gate", a) or weights_lost(w_a, gain)

        e_b, wrong = search(
            [np.maximum(*pair) for pair in zip(b.needs, product.needs, strict=True)],
            lambda e: b.lost(e) or product.lost(e) or weights_lost(w_b, gain, out=e),
        )
        product_wrong = ""
        if wrong:  # the product then is left to float32, and b alone decides
            product_wrong = f"the product: {wrong}"
            e_b, wrong = search(b.needs, lambda e: b.lost(e) or weights_lost(w_b, gain, out=e))
        problem = gate_wrong or wrong
        e_b = np.zeros_like(e_b) if problem and product_wrong else e_b
        self.items.append(product.item(f"{name}.b", e_b))
        self.add(f"{name}.w12", problem, a)
        if product_wrong:
            self.add(f"{name}.w3", product_wrong, product)
        else:
            self.output(f"{name}.w3", self.state[f"{name}.w3.weight"].T, e_b, product.bound, product.measured.rms)

    def output(self, name: str, weight: np.ndarray, e_in: np.ndarray, bound_in: np.ndarray, rms: np.ndarray) -> None:
        """A layer whose float32 output is added to the residual: any power of two can be taken off it.

        weight (inputs, outputs); inputs come divided by 2^e_in, are at most bound_in and typically rms.
        """
        out = _Tensor(self.ranges.tensors[name], bound_in @ np.abs(weight))
        exponents, problem = search(out.needs, lambda e: out.lost(e) or weights_lost(weight, rms, e_in, e))
        if problem:
            self.add(name, problem, out)
        else:
            self.items.append(out.item(name, exponents))

    def behind_norm(self, norm: str, layer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weight (inputs, outputs) of a layer that reads an RMSNorm, the norm's gain, and the bound of its output."""
        gain = np.abs(self.state[f"{norm}.weight"].astype(np.float64))
        weight = self.state[f"{layer}.weight"].T
        length = np.sqrt(self.config.hidden_size)
        bound = length * np.sqrt(np.square(gain) @ np.square(weight.astype(np.float64)))
        return weight, gain, bound

    def norm_lost(self, gain: np.ndarray) -> str:
        largest = np.sqrt(self.config.hidden_size) * gain.max()
        return "" if largest <= LIMIT else f"its input reaches {largest:.3g}"

    def scores_lost(self, name: str) -> str:
        """q.k before the softmax scale, and q and k themselves, after norm and rotary."""
        width = self.config.head_dim
        lengths = []
        for part in "qk":
            bound = np.sqrt(width) * np.abs(self.state[f"{name}.{part}_norm.weight"]).max()
            lengths.append(min(bound, MARGIN * self.ranges.tensors[f"{name}.{part}_norm"].maximum.max()))
        largest = max(*lengths, lengths[0] * lengths[1])
        return "" if largest <= LIMIT else f"q.k reaches {largest:.3g}"

    def unscaled(self, what: str, tensor: _Tensor) -> str:
        """What is wrong with a tensor that no power of two can be taken off."""
        if tensor.reach.max() > LIMIT:
            return f"{what} reaches {tensor.measured.maximum.max():.3g}"
        return tensor.lost(np.zeros(1)) and f"{what}: {tensor.lost(np.zeros(1))}"

    def add(self, name: str, problem: str, tensor: _Tensor | None = None) -> None:
        """Record an operation: FP16, or float32 because of `problem`."""
        precision = Precision.FP32 if problem else Precision.FP16
        reason = f"float32: {problem}" if problem else ""
        measured, bound = tensor.extremes if tensor else (None, None)
        self.items.append(Item(name, precision, (), measured, bound, reason))


def search(needs: Sequence[np.ndarray], check: Check) -> tuple[np.ndarray, str]:
    """The exponents nearest to zero that are at least `needs[0]` and pass the check; else those for the next need.

    Returns them and ""; or zeros and what was wrong with the first ones of the last need.
    """
    problem = ""
    for needed in needs:
        problem = ""
        for shift in SHIFTS:
            exponents = np.maximum(needed, shift)
            wrong = check(exponents)
            if not wrong:
                return exponents, ""
            problem = problem or wrong
    return np.zeros_like(needs[-1]), problem


def weights_lost(weight: np.ndarray, rms: np.ndarray, e_in: np.ndarray | int = 0, out: np.ndarray | int = 0) -> str:
    """What FP16 does to a weight (inputs, outputs) scaled by 2^(e_in - out), or "" where it keeps it.

    rms (inputs,): of the inputs before they were divided by 2^e_in, so that weights count by what they contribute.
    """
    shift = np.reshape(e_in, (-1, 1)) - np.reshape(out, (1, -1))
    scaled = np.ldexp(weight, shift)
    largest = np.abs(scaled).max()
    if not largest <= LIMIT:
        return f"a weight reaches {largest:.3g}"
    error = np.ldexp(scaled.astype(np.float16).astype(np.float32) - scaled, -shift)
    energy = np.square(rms)
    lost = np.sqrt(energy @ np.square(error, dtype=np.float64).sum(1))
    total = np.sqrt(energy @ np.square(weight, dtype=np.float64).sum(1))
    return f"its weights lose {lost / total:.1e} of their value" if lost > WEIGHT_ERROR * total else ""
