"""The kernels of ``torch_kernels`` in plain torch, in the type of `stats`: what they have to compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

from elf_rt.backends.torch_pointwise import LEVEL, power_of_two


def heads(
    x: Tensor, weight: Tensor, stats: Tensor, bias: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float, head_eps: tuple[float, float],
) -> Tensor:  # fmt: skip
    (M, _), (S, half) = x.shape, cos.shape
    y = (normed_product(x, weight, stats, eps) + bias).view(M, 3, -1, half, 2)
    squares = y.square().mean((-2, -1), keepdim=True)
    added = torch.tensor([*head_eps, 0.0], dtype=y.dtype, device=y.device)[:, None, None, None]
    turned = y * torch.rsqrt(squares + added) * norm_weight.view(3, -1, half, 2)
    positions = torch.arange(M, device=x.device) % S
    c, s = cos[positions][:, None, None], sin[positions][:, None, None]  # (M, 1, 1, D / 2)
    first, second = turned.unbind(-1)
    turned = torch.stack([first * c - second * s, second * c + first * s], -1)
    return torch.cat([turned[:, :2], y[:, 2:]], 1).view(M, -1)


def gate(x: Tensor, weight: Tensor, stats: Tensor, bias: Tensor, eps: float) -> Tensor:
    a, b = (normed_product(x, weight, stats, eps) + bias).view(len(x), -1, 2).unbind(-1)
    return F.silu(a) * b


def add(
    x: Tensor, weight: Tensor, h: Tensor, stats: Tensor, factor: Tensor, bias: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    scale = power_of_two(row_norm(stats, len(weight), eps)) * LEVEL
    h += F.linear(x.to(h.dtype), weight.to(h.dtype)) * factor + bias
    return h * scale[:, None] * norm_weight, torch.stack([scale, h.square().sum(-1)])


def normed_product(x: Tensor, weight: Tensor, stats: Tensor, eps: float) -> Tensor:
    factor = row_norm(stats, x.shape[1], eps) / stats[0]
    return F.linear(x.to(stats.dtype), weight.to(stats.dtype)) * factor[:, None]


def row_norm(stats: Tensor, width: int, eps: float) -> Tensor:
    """1 / root mean square of each row (M,)."""
    return torch.rsqrt(stats[1:].sum(0) / width + eps)
