"""The blocks of the network by the kernels of ``torch_kernels``: five launches each, attention among them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from elf_rt.backends import torch_kernels as kernels
from elf_rt.backends.torch_attention import Attention
from elf_rt.backends.torch_kernels import Tile, paired
from elf_rt.backends.torch_pointwise import Branch, first_norm
from elf_rt.backends.torch_weights import Block, Linear


@dataclass(frozen=True)
class FusedBlock:
    norm1: Tensor
    qkv: Tensor  # (3 heads D, H)
    qkv_bias: Tensor  # (3 heads D,), zero for v
    head_norms: Tensor  # (3 heads D,), one for v
    head_eps: tuple[float, float]
    proj: Linear
    norm2: Tensor
    w12: Tensor  # (2 inner, H)
    w12_bias: Tensor
    w3: Linear


class FusedBlocks:
    """The same blocks with outputs in the order that the kernels want: about 0.6 of the blocks' weights once more.

    cos, sin: (P + max_length, D), both halves alike.
    """

    def __init__(self, blocks: list[Block], cos: Tensor, sin: Tensor, eps: float, head_dim: int) -> None:
        self._eps, self._scale = eps, head_dim**-0.5
        self.heads, self.width = blocks[0].head_bias.shape[1:]
        half = self.width // 2
        self._cos, self._sin = cos[:, :half].contiguous(), sin[:, :half].contiguous()
        self.blocks = [fused_block(block, self.heads, self.width) for block in blocks]

    def run(self, h: Tensor, do: SimpleNamespace, attention: Attention, tiles: dict[str, Tile]) -> Branch:
        """h (R, S, H) float32 -> h with all branches but the last added, and that one. tiles: of each of `products`."""
        rows, size, width = h.shape
        tokens, first = h.view(-1, width), self.blocks[0]
        x, stats = do.first_norm(tokens, first.norm1, self._eps, first.qkv.dtype)
        for block, after in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            qkv = self.qkv(block, x, stats, size, tiles["qkv"]).view(rows, size, 3, self.heads, self.width)
            q, k, v = qkv.unbind(2)
            mixed = attention.run(q, k, v, self._scale).reshape(len(tokens), -1).contiguous()
            x, stats = self.add(block.proj, mixed, tokens, stats, block.norm2, tiles["proj"])
            gated = kernels.gate(x, block.w12, stats, block.w12_bias, self._eps, tiles["w12"])
            if after is not None:
                x, stats = self.add(block.w3, gated, tokens, stats, after.norm1, tiles["w3"])
        return h, *block.w3.unfinished(gated.view(rows, size, -1))

    def qkv(self, block: FusedBlock, x: Tensor, stats: Tensor, size: int, tile: Tile) -> Tensor:
        """x (M, H) -> (M, 3 heads D)."""
        angles = self._cos[:size], self._sin[:size]
        return kernels.heads(
            x, block.qkv, stats, block.qkv_bias, block.head_norms, *angles, self._eps, block.head_eps, tile
        )

    def products(self, normal: Callable[..., Tensor], rows: int, size: int) -> dict[str, Callable[[Tile], object]]:
        """The four products of the first block as functions of a tile alone. normal: makes random numbers."""
        block, tokens = self.blocks[0], rows * size
        h = normal(tokens, len(block.norm1))
        x, stats = first_norm(h, block.norm1, self._eps, block.qkv.dtype)
        mixed, gated = (normal(tokens, layer.weight.shape[1]).to(x.dtype) for layer in (block.proj, block.w3))
        return {
            "qkv": lambda tile: self.qkv(block, x, stats, size, tile),
            "proj": lambda tile: self.add(block.proj, mixed, h, stats, block.norm2, tile),
            "w12": lambda tile: kernels.gate(x, block.w12, stats, block.w12_bias, self._eps, tile),
            "w3": lambda tile: self.add(block.w3, gated, h, stats, block.norm2, tile),
        }

    def add(
        self, linear: Linear, x: Tensor, h: Tensor, stats: Tensor, norm: Tensor, tile: Tile
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's output to h (M, H); what follows of its norm."""
        assert linear.scale is not None and linear.bias is not None
        return kernels.add(x, linear.weight, h, stats, linear.scale, linear.bias, norm, self._eps, tile)


def fused_block(block: Block, heads: int, width: int) -> FusedBlock:
    q_eps, k_eps = block.eps.flatten().tolist()
    qk = 2 * heads * width
    bias, norms = (x.new_zeros(3 * heads * width) for x in (block.head_bias, block.head_norms))
    bias[:qk] = paired(block.head_bias.reshape(-1), 2 * heads)
    norms[:qk] = paired(block.head_norms[:, None].expand(2, heads, width).reshape(-1), 2 * heads)
    norms[qk:] = 1
    assert block.w12.bias is not None
    return FusedBlock(
        norm1=block.norm1,
        qkv=torch.cat([paired(block.qkv.weight[:qk], 2 * heads), block.qkv.weight[qk:]]),
        qkv_bias=bias,
        head_norms=norms,
        head_eps=(q_eps, k_eps),
        proj=whole(block.proj),
        norm2=block.norm2,
        w12=paired(block.w12.weight, 1),
        w12_bias=paired(block.w12.bias, 1),
        w3=whole(block.w3),
    )


def whole(linear: Linear) -> Linear:
    """With a scale and a bias, also where they are 1 and 0."""
    ones = torch.ones(len(linear.weight), device=linear.weight.device)
    scale, bias = linear.scale, linear.bias
    scale = ones if scale is None else scale.expand(len(ones)).contiguous()
    return Linear(linear.weight, scale, 0 * ones if bias is None else bias)
