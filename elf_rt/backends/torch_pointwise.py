"""What stands between the products of the network, as functions that torch.compile may fuse into one kernel each. A
function that is used on one width alone has it as a constant.

Letters: R rows, L text length, S tokens with the prefix, C latents, H hidden, D head width (padded), V vocabulary.
"""

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Branch = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # h (R, S, H), and a product that is to be added to it
COMPILED_FORMS = 64  # of one function: it is compiled for each set of shapes, types and absent scales
LEVEL = 2.0**-3  # the root mean square that `first_norm` brings a row below: room for 10^4 above it, and 10^3 below


def text_input(z: Tensor, x_prev: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z, x_prev (R, L, C) side by side, in the type of the product that reads them."""
    return (z if x_prev is None else torch.cat([z, x_prev], -1)).to(dtype)


def angles(scalars: list[Tensor], frequencies: Tensor) -> Tensor:
    """E scalars, (R,) each -> their cosines and sines (E, R, 2 frequencies) float32."""
    x = torch.stack(scalars)[..., None] * frequencies
    return torch.cat([x.cos(), x.sin()], -1)


def activated(product: Tensor, bias: Tensor) -> Tensor:
    """SiLU of a product with its bias."""
    return F.silu(product + bias)


def finished(product: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """A product of any type, in float32 times the scale plus the bias; in the type of the product that reads it."""
    if scale is None:
        x = product.float() if bias is None else product + bias
    else:
        x = product * scale if bias is None else torch.addcmul(bias, product, scale)
    return x.to(dtype)


def residual(
    tables: list[Tensor],
    embeddings: Tensor,
    embedding_bias: Tensor,
    mode: Tensor | None,
    mode_tokens: Tensor | None,
    product: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Prefix and text -> h (R, S, H) float32. The prefix: E tables (tokens, H), each plus the embedding of its scalar,
    whose products are (E, R, H); then mode (R,) times its tokens."""
    vectors = (embeddings + embedding_bias)[:, :, None]
    prefix = [table + vector for table, vector in zip(tables, vectors, strict=True)]  # (R, tokens, H) each
    if mode is not None and mode_tokens is not None:
        prefix.append(mode[:, None, None] * mode_tokens)
    return torch.cat([*prefix, finished(product, scale, bias)], 1)


def norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm of x (..., H) float32, in the type of the product that reads it."""
    return F.rms_norm(x, weight.shape, weight, eps).to(dtype)


def first_norm(h: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual (M, H) float32 -> x and stats as ``torch_kernels.add`` leaves them for the kernels that follow."""
    squares = h.square().sum(-1)
    scale = LEVEL * power_of_two(torch.rsqrt(squares / h.shape[1] + eps))
    return (h * scale[:, None] * weight).to(dtype), torch.stack([scale, squares])


def power_of_two(x: Tensor) -> Tensor:
    """The largest that is not above x > 0: its exponent alone."""
    return (x.float().view(torch.int32) & 0x7F800000).view(torch.float32).to(x.dtype)


def rotated_heads(qkv: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
    """qkv (R, S, 3 heads D) -> q and k (R, S, 2, heads, D): bias, RMSNorm of each head and half-split rotary, whose
    `sin` carries the sign. The product comes whole: a compiler does not know that a part of it is aligned."""
    x = qkv.view(*qkv.shape[:2], 3, *bias.shape[1:])[:, :, :2] + bias
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(dtype)


def gate(ab: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """SwiGLU: (R, S, 2 inner) -> silu(a) b (R, S, inner), in the type of the product that reads it."""
    a, b = finished(ab, scale, bias).chunk(2, -1)
    return (F.silu(a) * b).to(dtype)


def added_norm(
    h: Tensor,
    product: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The residual with a branch added, and the norm of it that comes next."""
    h = h + finished(product, scale, bias)
    return h, norm(h, weight, eps, dtype)


def final_norm(
    h: Tensor,
    product: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    hidden: Tensor,
) -> Tensor:
    """`added_norm` of the text alone, whose residual is written to `hidden` (R, L, H)."""
    text = h.shape[1] - hidden.shape[1]  # where it begins
    # Not `added_norm` of the slices: of theirs a compiler does not know the length, of `hidden` it does, and fuses.
    hidden.copy_(h[:, text:] + finished(product[:, text:], scale, bias))
    return norm(hidden, weight, eps, dtype)


def write_finished(product: Tensor, scale: Tensor | None, bias: Tensor | None, to: Tensor) -> None:
    """`finished` into a float32 tensor."""
    to.copy_(finished(product, scale, bias))


def likeliest(product: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Logits (tokens, V) -> ids (tokens,)."""
    return finished(product, scale, bias).argmax(-1)


FUSED = (
    text_input, angles, activated, finished, residual, norm, first_norm, rotated_heads, gate, added_norm, final_norm,
    write_finished, likeliest,
)  # fmt: skip
EAGER = SimpleNamespace(**{function.__name__: function for function in FUSED})


def compiled() -> SimpleNamespace:
    """EAGER by torch.compile: fewer launches, less memory traffic. It needs Triton on a GPU, and seconds at the start.
    Sizes that differ between calls become variables: R, L and S."""
    # A thread count or a default type that somebody sets must not compile anew while a graph is captured: what is
    # compiled here depends on none, and always runs in inference mode.
    guards: dict[str, Any] = {"guard_filter_fn": _without_global_state}
    limits: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # torch 2.13
        limits = {"recompile_limit": COMPILED_FORMS, "isolate_recompiles": True}
    else:  # counted for all models of the process together
        torch._dynamo.config.recompile_limit = max(COMPILED_FORMS, torch._dynamo.config.recompile_limit)
    functions = {f.__name__: torch.compile(f, options=dict(guards), **limits) for f in FUSED}  # it pops the options
    return SimpleNamespace(**functions)


def _without_global_state(guards: Sequence[Any]) -> list[bool]:
    return [guard.guard_type != "GLOBAL_STATE" for guard in guards]
