"""Noise against the generator's published vectors, float64 Box–Muller, and what normals must satisfy."""

import numpy as np
import pytest

from elf_rt.sampling.noise import box_muller, normal, philox4x32

# Random123, tests/kat_vectors, lines "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""
EDGES = [0, 1, 2, 2**29 - 1, 2**29, 2**29 + 1, 2**30, 2**31 - 1, 2**31, 3 * 2**29, 3 * 2**30, 2**32 - 129, 2**32 - 1]


def test_philox_gives_the_published_words():
    words = np.array([[int(w, 16) for w in line.split()] for line in KNOWN_ANSWERS.split("\n") if line], np.uint32)
    counter, key = words[:, :4].T.astype(np.uint64), words[:, 4:6].T
    np.testing.assert_array_equal(philox4x32(list(counter), list(key)), words[:, 6:].T)


def test_box_muller_matches_float64():
    rng = np.random.default_rng(0)
    radius = np.concatenate([np.repeat(np.uint32(EDGES), len(EDGES)), rng.integers(0, 2**32, 200_000, dtype=np.uint32)])
    angle = np.concatenate([np.tile(np.uint32(EDGES), len(EDGES)), rng.integers(0, 2**32, 200_000, dtype=np.uint32)])
    cosine, sine = box_muller(radius, angle)
    u = (radius.astype(np.float32) + np.float32(1)).astype(np.float64) / 2**32
    r, turn = np.sqrt(-2 * np.log(u)), 2 * np.pi * (angle / 2**32)
    # Errors are relative to the radius: near a zero of sin or cos only the angle's own rounding is left.
    assert np.max(np.abs(cosine - r * np.cos(turn)) / np.maximum(r, 1e-12)) < 4e-7
    assert np.max(np.abs(sine - r * np.sin(turn)) / np.maximum(r, 1e-12)) < 4e-7


def test_normals_are_finite_at_the_ends_of_the_range():
    edges = np.uint32(EDGES)
    cosine, sine = box_muller(np.repeat(edges, len(edges)), np.tile(edges, len(edges)))
    assert np.isfinite(cosine).all() and np.isfinite(sine).all()
    assert 6.6 < np.abs(cosine).max() < 6.7


def test_moments_and_tails():
    x = normal(np.arange(8, dtype=np.uint64), 3, (512, 512)).astype(np.float64)
    n = x.size  # 2.1 million: five standard errors everywhere
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert abs((np.abs(x) > 3).mean() - 0.0026998) < 5 * (0.0027 / n) ** 0.5


@pytest.mark.parametrize("other", ["step", "seed", "high half of the seed", "stream", "next element", "pair"])
def test_uncorrelated(other):
    shape = (512, 512)
    x = normal(np.uint64([7]), 3, shape)[0].ravel()
    y = {
        "step": normal(np.uint64([7]), 4, shape),
        "seed": normal(np.uint64([8]), 3, shape),
        "high half of the seed": normal(np.uint64([7 + 2**32]), 3, shape),
        "stream": normal(np.uint64([7]), 3, shape, stream=1),
        "next element": np.roll(x, 1),
        "pair": x.reshape(-1, 2)[:, ::-1],
    }[other].ravel()
    for f in (lambda v: v, lambda v: v * v - 1, np.abs):
        a, b = f(x.astype(np.float64)), f(y.astype(np.float64))
        a, b = a - a.mean(), b - b.mean()
        assert abs((a * b).mean()) < 5 * a.std() * b.std() * (2 if other == "pair" else 1) / len(a) ** 0.5


def test_a_sample_does_not_depend_on_its_batch_or_length():
    alone = normal(np.uint64([11]), 2, (6, 5))
    np.testing.assert_array_equal(normal(np.uint64([3, 11, 5]), 2, (6, 5))[1:2], alone)
    np.testing.assert_array_equal(normal(np.uint64([11]), 2, (9, 5))[:, :6], alone)


def test_element_order_and_counter():
    """Element 4q + i is normal i of the call with counter (q, step, stream, 0)."""
    seed, step, stream = 0x0123456789ABCDEF, 9, 1
    counter = [np.arange(4, dtype=np.uint64), *np.uint64([step, stream, 0])]
    words = [word.astype(np.uint32) for word in philox4x32(counter, list(np.uint64([seed & 0xFFFFFFFF, seed >> 32])))]
    first, second = box_muller(words[0], words[1]), box_muller(words[2], words[3])
    expected = np.stack([*first, *second], axis=1).ravel()[:15]
    np.testing.assert_array_equal(normal(np.uint64([seed]), step, (5, 3), stream).ravel(), expected)
