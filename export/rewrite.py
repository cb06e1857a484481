"""Exact rewrites of the weights before a graph is written: same network, a form that engines run fast.

- Rotary pairs (2i, 2i + 1) are moved to (i, i + D/2) by permuting the rows of q and k and their norms: rotary then is
  one contiguous split, which engines fuse, and q.k does not change.
- In 16-bit plans widths are padded with zeros, to multiples of HEAD, INNER and VOCABULARY.
- self_cond_proj and proj1 have nothing between them, so they become one matrix.
- The rows of a softmax sum to one, so the bias of v passes attention unchanged and moves into that of proj.
- Powers of two from the precision plan are folded in: a tensor named in the plan comes out of its product divided by
  2^exponent, and what reads it multiplies back. In float32 that changes no bit.

Linear weights come out input-first (inputs, outputs), ready for MatMul.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from elf_rt.export.precision import PrecisionPlan
from elf_rt.export.reference import NORM_EPS, ROPE_BASE, TIME_FREQUENCIES
from elf_rt.params import ModelConfig

HEAD, INNER, VOCABULARY = 8, 16, 128  # 16-bit plans pad to what a tensor core loads, and to whole tiles of 32100 ids

State = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Linear:
    """x @ weight * scale + bias."""

    weight: np.ndarray  # (inputs, outputs)
    bias: np.ndarray | None  # (outputs,)
    scale: np.ndarray | None = None  # (outputs,) powers of two


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of the queries or keys of a head. Padding keeps the divisor of the true width."""

    weight: np.ndarray  # (D padded,)
    eps: float


@dataclass(frozen=True)
class AttentionWeights:
    qkv: np.ndarray  # (H, 3 * heads * D padded)
    bias: np.ndarray  # (3, heads, 1, D padded), zero for v
    q_norm: HeadNorm
    k_norm: HeadNorm
    proj: Linear  # (heads * D padded, H)


@dataclass(frozen=True)
class MlpWeights:
    w12: Linear  # (H, 2 * inner padded)
    w3: Linear  # (inner padded, H)


def attention_weights(config: ModelConfig, state: State, block: int, plan: PrecisionPlan) -> AttentionWeights:
    name = f"blocks.{block}.attn"
    width, heads = config.head_dim, config.num_heads
    wide = plan.padded(width, HEAD)
    half_split, plain = _half_split(width, wide), _padded_index(width, wide)
    exponents = {part: _channels(plan, f"{name}.{part}", heads * width).reshape(heads, width) for part in "qkv"}
    weight = dict(zip("qkv", state[f"{name}.qkv.weight"].reshape(3, heads, width, -1), strict=True))
    bias = dict(zip("qkv", state[f"{name}.qkv.bias"].reshape(3, heads, width), strict=True))

    def head_norm(part: str) -> HeadNorm:
        # mean over `wide` = mean over `width` * width / wide, and eps moves with the statistics
        ratio = width / wide
        return HeadNorm(
            _take(state[f"{name}.{part}_norm.weight"], half_split, axis=0) * np.float32(math.sqrt(ratio)),
            math.ldexp(NORM_EPS * ratio, -2 * int(exponents[part][0, 0])),
        )

    order = {"q": half_split, "k": half_split, "v": plain}
    rows = [_take(np.ldexp(weight[part], -exponents[part][..., None]), order[part], axis=1) for part in "qkv"]
    biases = [_take(np.ldexp(bias[part], -exponents[part]), half_split, axis=1) for part in "qk"]
    biases.append(np.zeros_like(biases[0]))
    qkv = np.stack(rows).reshape(3 * heads * wide, -1).T
    out = state[f"{name}.proj.weight"].T.reshape(heads, width, -1)  # (heads, D, H)
    moved = np.einsum("hd,hdo->o", bias["v"].astype(np.float64), out)
    proj_bias = (state[f"{name}.proj.bias"] + moved).astype(np.float32)
    e_out = plan.exponents(f"{name}.proj")
    out = _take(np.ldexp(out, exponents["v"][..., None] - e_out), plain, axis=1)  # (heads, D padded, H)
    proj = Linear(out.reshape(heads * wide, -1), proj_bias, _scale(e_out))
    return AttentionWeights(qkv, np.stack(biases)[:, :, None], head_norm("q"), head_norm("k"), proj)


def mlp_weights(config: ModelConfig, state: State, block: int, plan: PrecisionPlan) -> MlpWeights:
    name = f"blocks.{block}.mlp"
    index = _padded_index(config.mlp_dim, plan.padded(config.mlp_dim, INNER))
    e_b, e_out = _channels(plan, f"{name}.b", config.mlp_dim), plan.exponents(f"{name}.w3")

    weight = state[f"{name}.w12.weight"].reshape(2, config.mlp_dim, -1)  # (2, inner, H)
    bias = state[f"{name}.w12.bias"].reshape(2, -1)
    rows = [_take(weight[0], index, axis=0), _take(np.ldexp(weight[1], -e_b[:, None]), index, axis=0)]
    biases = [_take(bias[0], index, axis=0), _take(np.ldexp(bias[1], -e_b), index, axis=0)]
    w12 = Linear(np.concatenate(rows).T, np.concatenate(biases))

    out = _take(np.ldexp(state[f"{name}.w3.weight"].T, e_b[:, None] - e_out), index, axis=0)
    return MlpWeights(w12, Linear(out, state[f"{name}.w3.bias"], _scale(e_out)))


def text_projection(state: State, plan: PrecisionPlan) -> Linear:
    """bottleneck -> H, what starts the residual of the text."""
    exponents = plan.exponents("text_proj.proj2")
    weight = np.ldexp(state["text_proj.proj2.weight"].T, -exponents)
    return Linear(weight, state["text_proj.proj2.bias"], _scale(exponents))


def input_projection(config: ModelConfig, state: State) -> Linear:
    """[z, x_prev] or z -> bottleneck: self_cond_proj and proj1 multiplied in float64."""
    proj1 = state["text_proj.proj1.weight"].astype(np.float64)  # (bottleneck, C)
    if not config.self_cond:
        return Linear(proj1.T.astype(np.float32), None)
    weight = proj1 @ state["self_cond_proj.weight"].astype(np.float64)  # (bottleneck, 2C)
    bias = proj1 @ state["self_cond_proj.bias"].astype(np.float64)
    return Linear(weight.T.astype(np.float32), bias.astype(np.float32))


def head_projection(state: State) -> Linear:
    """H -> C, the first projection of the token head."""
    return Linear(state["proj_kernel"], state["proj_bias"])


def unembedding(config: ModelConfig, state: State, plan: PrecisionPlan) -> Linear:
    """C -> V padded. A padded id has the lowest float32 as bias, so no argmax names it."""
    index = _padded_index(config.vocab_size, plan.padded(config.vocab_size, VOCABULARY))
    bias = np.where(index < 0, np.finfo(np.float32).min, _take(state["unembed_bias"], index, axis=0))
    return Linear(_take(state["unembed_kernel"], index, axis=1), bias)


def rotary_tables(config: ModelConfig, plan: PrecisionPlan) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each (P + max_length, D padded), both halves alike. Prefix tokens are not rotated: cos 1, sin 0."""
    width, wide = config.head_dim, plan.padded(config.head_dim, HEAD)
    inverse = np.zeros(wide // 2)  # the padding turns by 0
    inverse[: width // 2] = ROPE_BASE ** (-np.arange(0, width, 2) / width)
    positions = np.concatenate([np.zeros(config.num_prefix_tokens), np.arange(config.max_length)])
    angles = np.outer(positions, np.tile(inverse, 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def scalar_frequencies() -> np.ndarray:
    """(1, 128) float32: 10000^(-k/128)."""
    return (ROPE_BASE ** (-np.arange(TIME_FREQUENCIES) / TIME_FREQUENCIES)).astype(np.float32)[None]


def _channels(plan: PrecisionPlan, name: str, channels: int) -> np.ndarray:
    """(channels,) exponents of a tensor."""
    return np.broadcast_to(plan.exponents(name), channels)


def _scale(exponents: np.ndarray) -> np.ndarray | None:
    return np.ldexp(np.float32(1), exponents) if exponents.any() else None


def _padded_index(width: int, wide: int) -> np.ndarray:
    """Source index of each padded position; -1 marks padding."""
    return np.concatenate([np.arange(width), np.full(wide - width, -1)])


def _half_split(width: int, wide: int) -> np.ndarray:
    """Even positions, padded to wide / 2, then odd positions, padded likewise."""
    even = _padded_index(width // 2, wide // 2)
    return np.concatenate([np.where(even < 0, -1, 2 * even), np.where(even < 0, -1, 2 * even + 1)])


def _take(array: np.ndarray, index: np.ndarray, axis: int) -> np.ndarray:
    """numpy.take with zeros where the index is -1."""
    taken = np.take(array, index, axis=axis)
    np.moveaxis(taken, axis, 0)[index < 0] = 0
    return taken
