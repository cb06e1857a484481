"""A block of the network as four Triton products with epilogues, and attention between them: no norm, gate or rotary
kernel remains.

RMSNorm is a scale of each row, and a scale of rows commutes with a product: (diag(r) x) W^T = diag(r) (x W^T). So what
writes the residual h leaves x = h * norm weight * scale in 16 bits, and sums of squares of h; the product that reads x
applies r. `scale`, of each row, is a power of two near the norm that the row had one branch before: x stays in the
range of FP16 wherever h is, and no rounding is added.

Letters: M rows of tokens, H hidden, D head width, I inner width, S tokens of a text. Weights are (outputs, inputs),
their outputs in pairs that lie side by side: the two halves of a rotary pair, a and b of SwiGLU (`paired`).
`stats` (1 + tiles, M) float32: the scales, and below them the sums of squares of each tile of columns of h.
Each function here has a twin in plain torch, in ``tests/torch_kernels_twin.py``, that it is tested against.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from elf_rt.backends.torch_pointwise import LEVEL

SCALED = tl.constexpr(LEVEL)
MOST_TILES = tl.constexpr(32)  # tiles of columns that h may have
GROUP = tl.constexpr(8)  # tiles of rows that go through all columns together, for the cache
# Triton's interpreter multiplies the bits of 16-bit numbers that numpy does not know.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Tile:
    """What one program computes: `rows` x `columns`, `depth` inputs at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = True  # loads by the unit that GPUs have from sm 90 on

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
        if not self.tma:
            return x, weight
        return (
            TensorDescriptor.from_tensor(x, [self.rows, self.depth]),
            TensorDescriptor.from_tensor(weight, [self.columns, self.depth]),
        )

    @property
    def options(self) -> dict[str, int]:
        sizes = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "TMA": self.tma}
        return sizes | {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def grid(self, rows: int, columns: int, step: int | None = None) -> tuple[int]:
        return (triton.cdiv(rows, self.rows) * triton.cdiv(columns, step or self.columns),)


@triton.jit
def _place(M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's tile: row and column numbers."""
    program, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    first = program // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % size, within // size


@triton.jit
def _product(
    x, weight, row, column, M, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) float32 of x (M, K) @ weight (N, K)^T. What lies beyond the edges of both counts as zero."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    rows, columns, inputs = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    for k in range(0, K, DEPTH):
        if TMA:
            a, b = x.load([row, k]), weight.load([column, k])
        else:
            some = (k + inputs < K)[None, :]
            a = tl.load(
                x + rows.to(tl.int64)[:, None] * K + (k + inputs)[None, :], mask=(rows < M)[:, None] & some, other=0.0
            )
            b = tl.load(
                weight + columns[:, None] * K + (k + inputs)[None, :], mask=(columns < N)[:, None] & some, other=0.0
            )
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b.T, total)
    return total


@triton.jit
def _norm(stats, rows, M, H, eps, tiles):
    """1 / root mean square of rows of h, and their scales."""
    tile = tl.arange(0, MOST_TILES)
    there = (tile < tiles)[:, None] & (rows < M)[None, :]
    squares = tl.sum(tl.load(stats + (1 + tile)[:, None] * M + rows[None, :], mask=there, other=0.0), 0)
    return tl.rsqrt(squares / H + eps), tl.load(stats + rows, mask=rows < M, other=1.0)


@triton.jit
def _row_factor(stats, rows, M, H, eps, tiles):
    norm, scale = _norm(stats, rows, M, H, eps, tiles)
    return norm / scale


@triton.jit(do_not_specialize=["M", "S", "tiles"])
def heads_kernel(
    x, weight, out, stats, bias, norm_weight, cos, sin, M, N, H, S, eps, q_eps, k_eps, tiles,
    D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = COLUMNS // D
    PAIRS: tl.constexpr = COLUMNS // 2
    tile_m, tile_n = _place(M, N, ROWS, HEADS * D)
    row, column = tile_m * ROWS, tile_n * HEADS * D
    rows, pairs = row + tl.arange(0, ROWS), tl.arange(0, PAIRS)
    total = _product(x, weight, row, column, M, N, H, ROWS, COLUMNS, DEPTH, TMA)
    total *= _row_factor(stats, rows, M, H, eps, tiles)[:, None]
    first, second = tl.split(tl.reshape(total, (ROWS, PAIRS, 2)))
    columns = column + 2 * pairs
    inside = columns < N
    first += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    second += tl.load(bias + columns + 1, mask=inside, other=0.0)[None, :]
    squares = first * first + second * second
    head = 2 * pairs // D
    norm = tl.zeros_like(first)
    head_eps = tl.where(columns < N // 3, q_eps, k_eps)
    for h in tl.static_range(HEADS):
        mean = tl.sum(tl.where((head == h)[None, :], squares, 0.0), 1) / D
        norm = tl.where((head == h)[None, :], tl.rsqrt(mean[:, None] + head_eps[None, :]), norm)
    plain = (columns >= N // 3 * 2)[None, :]  # the columns of v, which has no norm and no rotary
    norm = tl.where(plain, 1.0, norm)
    first *= norm * tl.load(norm_weight + columns, mask=inside, other=0.0)[None, :]
    second *= norm * tl.load(norm_weight + columns + 1, mask=inside, other=0.0)[None, :]
    angles = (rows % S)[:, None] * (D // 2) + (pairs - head * (D // 2))[None, :]
    turns = (head < HEADS)[None, :] & (rows < M)[:, None] & (columns < N // 3 * 2)[None, :]
    c = tl.load(cos + angles, mask=turns, other=1.0)
    s = tl.load(sin + angles, mask=turns, other=0.0)
    turned = tl.reshape(tl.join(first * c - second * s, second * c + first * s), (ROWS, COLUMNS))
    columns = tl.arange(0, COLUMNS)
    mask = (rows < M)[:, None] & ((columns < HEADS * D) & (column + columns < N))[None, :]
    at = out + rows.to(tl.int64)[:, None] * N + (column + columns)[None, :]
    tl.store(at, turned.to(out.dtype.element_ty), mask=mask)


def heads(
    x: Tensor, weight: Tensor, stats: Tensor, bias: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float, head_eps: tuple[float, float], tile: Tile,
) -> Tensor:  # fmt: skip
    """x (M, H) -> q, k and v side by side (M, 3 heads D): normed, with the bias, q and k normed by head and rotated.

    bias, norm_weight (3 heads D,): 0 and 1 for v. cos, sin (S, D / 2). head_eps: of q and of k.
    """
    (M, H), N, (S, half) = x.shape, len(weight), cos.shape
    out = x.new_empty(M, N)
    heads_kernel[tile.grid(M, N, tile.columns // (2 * half) * 2 * half)](
        *tile.operands(x, weight), out, stats, bias, norm_weight, cos, sin, M, N, H, S, eps, *head_eps,
        len(stats) - 1, D=2 * half, **tile.options,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["M", "tiles"])
def gate_kernel(
    x, weight, out, stats, bias, M, N, H, eps, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _place(M, N, ROWS, COLUMNS)
    row, column = tile_m * ROWS, tile_n * COLUMNS
    rows, pairs = row + tl.arange(0, ROWS), tile_n * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    total = _product(x, weight, row, column, M, N, H, ROWS, COLUMNS, DEPTH, TMA)
    total *= _row_factor(stats, rows, M, H, eps, tiles)[:, None]
    a, b = tl.split(tl.reshape(total, (ROWS, COLUMNS // 2, 2)))
    inside = pairs < N // 2
    a += tl.load(bias + 2 * pairs, mask=inside, other=0.0)[None, :]
    b += tl.load(bias + 2 * pairs + 1, mask=inside, other=0.0)[None, :]
    at = out + rows.to(tl.int64)[:, None] * (N // 2) + pairs[None, :]
    tl.store(at, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), mask=(rows < M)[:, None] & inside[None, :])


def gate(x: Tensor, weight: Tensor, stats: Tensor, bias: Tensor, eps: float, tile: Tile) -> Tensor:
    """SwiGLU: x (M, H) -> silu(a) b (M, I), where a and b are the normed products with the bias (2 I,), in pairs."""
    (M, H), N = x.shape, len(weight)
    out = x.new_empty(M, N // 2)
    gate_kernel[tile.grid(M, N)](
        *tile.operands(x, weight), out, stats, bias, M, N, H, eps, len(stats) - 1, **tile.options
    )
    return out


@triton.jit(do_not_specialize=["M", "tiles"])
def add_kernel(
    x, weight, h, out, stats, new_stats, factor, bias, norm_weight, M, K, H, eps, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _place(M, H, ROWS, COLUMNS)
    row, column = tile_m * ROWS, tile_n * COLUMNS
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    total = _product(x, weight, row, column, M, H, K, ROWS, COLUMNS, DEPTH, TMA)
    inside = columns < H
    mask = (rows < M)[:, None] & inside[None, :]
    at = rows.to(tl.int64)[:, None] * H + columns[None, :]
    total = total * tl.load(factor + columns, mask=inside, other=0.0)[None, :]
    total += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    total += tl.load(h + at, mask=mask, other=0.0)
    tl.store(h + at, total, mask=mask)
    norm, _ = _norm(stats, rows, M, H, eps, tiles)
    scale = (norm.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * SCALED
    total_next = total * scale[:, None] * tl.load(norm_weight + columns, mask=inside, other=0.0)[None, :]
    tl.store(out + at, total_next.to(out.dtype.element_ty), mask=mask)
    tl.store(new_stats + rows, scale, mask=rows < tl.where(tile_n == 0, M, 0))
    squares = tl.sum(tl.where(mask, total * total, 0.0), 1)
    tl.store(new_stats + (1 + tile_n) * M + rows, squares, mask=rows < M)


def add(
    x: Tensor, weight: Tensor, h: Tensor, stats: Tensor, factor: Tensor, bias: Tensor, norm_weight: Tensor,
    eps: float, tile: Tile,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add x (M, K) @ weight^T * factor + bias to the residual h (M, H) float32, in place.

    Returns:
        what the next product reads: (M, H) 16 bits, of the norm whose weight is given, and its stats.
    """
    (M, K), H = x.shape, len(weight)
    out, new_stats = x.new_empty(M, H), stats.new_empty(1 + triton.cdiv(H, tile.columns), M)
    add_kernel[tile.grid(M, H)](
        *tile.operands(x, weight), h, out, stats, new_stats, factor, bias, norm_weight, M, K, H, eps,
        len(stats) - 1, **tile.options,
    )  # fmt: skip
    return out, new_stats


def paired(x: Tensor, groups: int) -> Tensor:
    """(outputs, ...) in groups of halves (first, second) -> the same with both of a pair side by side."""
    return x.view(groups, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
