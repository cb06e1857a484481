"""The Triton kernels against their twins in float64: on a GPU if there is one, else in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_kernels_twin as twin
from conftest import HAS_GPU
from golden_cases import relative_error

pytest.importorskip("triton")
from elf_rt.backends import torch_kernels as kernels  # after conftest chose the interpreter
from elf_rt.backends.torch_kernels import Tile
from elf_rt.backends.torch_pointwise import first_norm, power_of_two

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
DEVICE = "cuda" if HAS_GPU else "cpu"
EPS = 1e-6
TEXT = 37  # tokens: rows that no tile divides
# (rows, hidden, heads, head width, inner width): no dimension is a multiple of a tile.
SIZES = [
    (1, 48, 2, 16, 72),
    (127, 104, 3, 24, 200),
    (127, 128, 2, 64, 176),
    (50, 160, 4, 80, 232),
    (50, 136, 5, 72, 56),
]
HAS_TMA = not HAS_GPU or torch.cuda.get_device_capability() >= (9, 0)
SMALL, WIDE = Tile(32, 64, 32, 4, 2, tma=False), Tile(64, 256, 64, 4, 2, tma=HAS_TMA)
TYPES = [torch.float16, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, garbage: int = 0) -> torch.Tensor:
    """Normal numbers; `garbage` rows of NaN follow in memory, where a kernel must not look."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = scale * torch.randn(shape[0] + garbage, *shape[1:], generator=generator)
    x[shape[0] :] = torch.nan
    return x.to(DEVICE, dtype)[: shape[0]]


def normed(rows: int, hidden: int, dtype: torch.dtype, tiles: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """x and stats whose sums of squares come in `tiles` parts; rows differ by powers of ten, up to 1e6."""
    h = random(rows, hidden) * 10.0 ** (torch.arange(rows, device=DEVICE) % 10 - 3)[:, None]
    x, stats = first_norm(h, 1 + 0.3 * random(1, hidden)[0], EPS, dtype)
    parts = stats[1] * torch.tensor([0.5, 0.25, 0.25][:tiles] if tiles > 1 else [1.0], device=DEVICE)[:, None]
    return x, torch.cat([stats[:1], parts])


def wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """At most twice the error of rounding the exact result."""
    rounded = expected.to(actual.dtype)
    if actual.dtype is torch.bfloat16 and not HAS_GPU:  # the interpreter cuts bits off where a GPU rounds
        rounded = (expected.float().view(torch.int32) & ~0xFFFF).view(torch.float32)
    limit = 2 * relative_error(rounded.double().cpu(), expected.cpu())
    assert relative_error(actual.double().cpu(), expected.cpu()) <= limit


@pytest.mark.parametrize("tile", [SMALL, WIDE])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_heads(dtype: torch.dtype, size: tuple[int, ...], tile: Tile) -> None:
    rows, hidden, heads, width, _ = size
    if width > tile.columns:
        pytest.skip("no head fits")
    weight = random(3 * heads * width, hidden, dtype=dtype, scale=hidden**-0.5, garbage=64)
    bias, norm_weight = random(3 * heads * width), 1 + 0.2 * random(3 * heads * width)
    bias[2 * heads * width :], norm_weight[2 * heads * width :] = 0, 1
    angles = 3 * random(TEXT, width // 2)
    x, stats = normed(rows, hidden, dtype)
    given = bias, norm_weight, angles.cos(), angles.sin()
    actual = kernels.heads(x, weight, stats, *given, EPS, (1e-6, 3e-2), tile)
    check(actual, twin.heads(x, weight, *wide(stats, *given), EPS, (1e-6, 3e-2)))


@pytest.mark.parametrize("tile", [SMALL, WIDE])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_gate(dtype: torch.dtype, size: tuple[int, ...], tile: Tile) -> None:
    rows, hidden, _, _, inner = size
    weight, bias = random(2 * inner, hidden, dtype=dtype, scale=hidden**-0.5, garbage=64), random(2 * inner)
    x, stats = normed(rows, hidden, dtype, tiles=1)
    actual = kernels.gate(x, weight, stats, bias, EPS, tile)
    check(actual, twin.gate(x, weight, *wide(stats, bias), EPS))


@pytest.mark.parametrize("tile", [SMALL, WIDE])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_add(dtype: torch.dtype, size: tuple[int, ...], tile: Tile) -> None:
    rows, hidden, _, _, inner = size
    x, weight = random(rows, inner, dtype=dtype, garbage=64), random(hidden, inner, dtype=dtype, garbage=64)
    h = random(rows, hidden, scale=100.0, garbage=64)
    _, stats = first_norm(h, torch.ones(hidden, device=DEVICE), EPS, dtype)
    given = 2.0 ** random(hidden).round(), random(hidden), 1 + 0.2 * random(hidden)
    expected_h = h.double()
    expected, expected_stats = twin.add(x, weight, expected_h, *wide(stats, *given), EPS)
    actual, new_stats = kernels.add(x, weight, h, stats, *given, EPS, tile)
    assert relative_error(h.cpu(), expected_h.cpu()) < 1e-6
    assert relative_error(new_stats[1:].sum(0).cpu(), expected_stats[1].cpu()) < 1e-6
    assert torch.equal(new_stats[0].log2(), new_stats[0].log2().round())
    check(actual, expected * (new_stats[0] / expected_stats[0])[:, None])


def test_a_text_of_full_length() -> None:
    """1036 tokens, of which tiles leave 12 over, and each has its own position; one launch after the other."""
    (rows, hidden, heads, width, inner), dtype = (1036, 64, 2, 16, 80), torch.float16
    tile, channels = Tile(128, 128, 64, 8, 3, tma=HAS_TMA), 3 * heads * width
    h, norms = random(rows, hidden, scale=100.0), 1 + 0.2 * random(channels)
    x, stats = first_norm(h, norms[:hidden], EPS, dtype)
    angles, bias, norms = 3 * random(rows, width // 2), random(channels), norms.clone()
    bias[2 * heads * width :], norms[2 * heads * width :] = 0, 1
    given = bias, norms, angles.cos(), angles.sin()
    qkv = random(channels, hidden, dtype=dtype, scale=0.1)
    out = kernels.heads(x, qkv, stats, *given, EPS, (EPS, EPS), tile)
    check(out, twin.heads(x, qkv, *wide(stats, *given), EPS, (EPS, EPS)))
    w12, bias = random(2 * inner, hidden, dtype=dtype, scale=0.1), random(2 * inner)
    gated = kernels.gate(x, w12, stats, bias, EPS, tile)
    check(gated, twin.gate(x, w12, *wide(stats, bias), EPS))
    w3, expected_h = random(hidden, inner, dtype=dtype, scale=0.1), h.double()
    given = torch.full((hidden,), 4.0, device=DEVICE), random(hidden), norms[:hidden]
    expected, scales = twin.add(gated, w3, expected_h, *wide(stats, *given), EPS)
    x, stats = kernels.add(gated, w3, h, stats, *given, EPS, tile)
    assert relative_error(h.cpu(), expected_h.cpu()) < 1e-6
    check(x, expected * (stats[0] / scales[0])[:, None])


def test_a_residual_that_fp16_cannot_hold() -> None:
    """Trained models have rows of 1e5 and more, and branches that make them hundreds of times larger or smaller."""
    rows, hidden = 6, 96
    h, ones = 1e3 * random(rows, hidden), torch.ones(hidden, device=DEVICE)
    _, stats = first_norm(h, ones, EPS, torch.float16)
    x, weight = torch.eye(rows, 8, device=DEVICE).half(), torch.zeros(hidden, 8, device=DEVICE).half()
    weight[:, :rows] = random(hidden, rows).half()
    for factor, largest in ((5e5, 3e6), (-5e5, 1e4)):  # it jumps, and all but cancels again
        actual, stats = kernels.add(x, weight, h, stats, factor * ones, 0 * ones, ones, EPS, SMALL)
        assert largest / 10 < h.abs().max() < largest
        check(actual, h.double() * stats[0][:, None])


@pytest.mark.parametrize("x", [1e-3, 0.7, 1.0, 1.99, 3e4])
def test_power_of_two(x: float) -> None:
    (power,) = power_of_two(torch.tensor([x]))
    assert power <= x < 2 * power and power.log2() == power.log2().round()


def test_paired_puts_halves_side_by_side() -> None:
    assert kernels.paired(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def compiled_for(folder: Path, *sms: int) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    program = [sys.executable, str(Path(__file__).with_name("triton_compile.py")), *map(str, sms)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_they_compile_without_a_gpu(tmp_path: Path) -> None:
    """For Ampere with its asynchronous copies, for Hopper with its own products and loads, for GeForce Blackwell."""
    uses = {
        80: ("mma.sync", "cp.async"),
        90: ("wgmma", "cp.async.bulk.tensor"),
        120: ("mma.sync", "cp.async.bulk.tensor"),
    }
    for found in compiled_for(tmp_path, *uses):
        assert all(found[instruction] for instruction in uses[found["sm"]]), found
        assert found["shared"] <= 99 * 1024, found  # what the smallest of these GPUs has


@pytest.mark.slow
def test_they_compile_for_the_other_gpus(tmp_path: Path) -> None:
    assert {found["sm"] for found in compiled_for(tmp_path, 86, 87, 89, 100, 103)} == {86, 87, 89, 100, 103}
