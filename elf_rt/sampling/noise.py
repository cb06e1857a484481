"""Noise as a pure function of (seed, step, element), with the same bits in numpy, C++ and CUDA.

Philox4x32-10 is the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3" (SC11). The key is the sample's 64-bit seed; the counter is (element >> 2, step, stream, 0). One call gives the
normals of elements 4q .. 4q + 3, so a sample's noise depends neither on the batch it is in nor on the backend.

Box–Muller runs in float32 on polynomials of our own. They use only +, -, × and sqrt, each correctly rounded and none
contracted into a fused multiply-add: any IEEE machine that keeps this order of operations gives these bits.
``cpp_ext/integrator.h`` repeats the order for C++ and CUDA.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

LATENT, TIME_GRID = 0, 1  # streams: one seed draws both its noise and its time grid

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

# Fits at Chebyshev nodes, rounded to float32, highest power first.
# log(1 + f) = f - f²/2 + f³ P(f) on [√½ - 1, √2 - 1], relative error 2e-8.
_LOG = tuple(
    map(np.float32, (-0.07902744, 0.12622319, -0.12998183, 0.14214496, -0.16641282, 0.20001045, -0.25000307, 0.3333333))
)
# sin(π/2 y) = y P(y²), cos(π/2 y) = 1 + y² P(y²) on [-½, ½]: y is a fraction of a quarter turn; errors 4e-8, 9e-9.
_SIN = tuple(map(np.float32, (-0.004602149, 0.07968022, -0.6459635, 1.5707964)))
_COS = tuple(map(np.float32, (0.0009067399, -0.020861529, 0.2536694, -1.2337005)))
_LN2_HIGH = np.float32(0.693359375)  # 9 bits, so that exponent * _LN2_HIGH is exact
_LN2_LOW = np.float32(-2.1219444e-4)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
_ONE_BITS = np.int32(0x3F800000)
_MANTISSA = np.int32(0x007FFFFF)


@dataclass(frozen=True)
class NoiseKey:
    """The noise of one text in one pass: its seed and the index of its table's row."""

    seed: int
    index: int


def normal(seeds: np.ndarray, step: int, shape: tuple[int, ...], stream: int = LATENT) -> np.ndarray:
    """Standard normals (B, L, C) float32 for seeds (B,) uint64 and shape (L, C); element = l·C + c.

    |normal| is at most 6.67: 32 bits of radius end where the density is 1e-10.
    """
    seeds = np.asarray(seeds, dtype=np.uint64).reshape(-1, 1)
    size = math.prod(shape)
    quads = np.arange((size + 3) // 4, dtype=np.uint64)
    words = philox4x32([quads, np.uint64(step), np.uint64(stream), np.uint64(0)], [seeds & _LOW, seeds >> _HALF])
    out = np.empty((len(seeds), len(quads), 4), np.float32)
    for i in (0, 2):
        out[..., i], out[..., i + 1] = box_muller(words[i].astype(np.uint32), words[i + 1].astype(np.uint32))
    return np.ascontiguousarray(out.reshape(len(seeds), -1)[:, :size]).reshape(len(seeds), *shape)


def box_muller(radius: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two uint32 words -> two independent float32 normals: r cos 2πa, r sin 2πa with r = √(-2 ln u).

    u = (radius + 1) / 2³² rounded to float32, in (0, 1]; a = angle / 2³² exactly.
    """
    sine, cosine = _sin_cos_turn(angle)
    r = np.sqrt(np.float32(-2) * _log_fraction(radius))
    return r * cosine, r * sine


def philox4x32(counter: list[Any], key: list[Any]) -> list[np.ndarray]:
    """Ten rounds of Philox. Words are uint64 that hold 32 bits, so that a product keeps its high half; four of the
    counter and two of the key broadcast to four of the result."""
    c0, c1, c2, c3 = counter
    k0, k1 = (k.astype(np.uint64) for k in key)
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
    return [c0, c1, c2, c3]


def _log_fraction(word: np.ndarray) -> np.ndarray:
    """ln u in float32, u = (word + 1) / 2³² rounded to float32."""
    bits = (word.astype(np.float32) + np.float32(1)).view(np.int32)
    bits = bits + (_ONE_BITS - _SQRT_HALF_BITS)
    exponent = ((bits >> 23) - np.int32(127 + 32)).astype(np.float32)
    f = ((bits & _MANTISSA) + _SQRT_HALF_BITS).view(np.float32) - np.float32(1)  # exact
    square = f * f
    tail = (f * square) * _polynomial(f, _LOG)
    tail = tail + exponent * _LN2_LOW
    tail = tail - np.float32(0.5) * square
    return (f + tail) + exponent * _LN2_HIGH


def _sin_cos_turn(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sin and cos of 2π word / 2³² in float32: the nearest quarter turn is exact, a polynomial does the rest."""
    quarter = (word + np.uint32(1 << 29)) >> np.uint32(30)
    y = (word << np.uint32(2)).view(np.int32).astype(np.float32) * np.float32(2.0**-32)  # in [-1/2, 1/2]
    square = y * y
    sine = y * _polynomial(square, _SIN)
    cosine = np.float32(1) + square * _polynomial(square, _COS)
    swap = (quarter & np.uint32(1)).astype(bool)
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    return (
        _flip_sign(sine, quarter & np.uint32(2)),
        _flip_sign(cosine, (quarter + np.uint32(1)) & np.uint32(2)),
    )


def _flip_sign(value: np.ndarray, two_if_negative: np.ndarray) -> np.ndarray:
    return (value.view(np.uint32) ^ (two_if_negative << np.uint32(30))).view(np.float32)


def _polynomial(x: np.ndarray, coefficients: tuple[np.float32, ...]) -> np.ndarray:
    value = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value
