"""Attention in torch on a GPU: which library computes it is chosen, and named, not left to torch.

cuDNN comes first: it was measured to be 1.4 to 2.2 times as fast as torch's own FlashAttention-2. Torch passes it over
where its version has known faults.
"""

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from elf_rt.errors import first_line

PROBE = (1, 12, 1036, 64)  # (R, heads, S, D) of ELF-B


@dataclass(frozen=True)
class Attention:
    """A library's attention. run: q, k, v (R, S, heads, D) of one type, scale -> (R, S, heads D)."""

    name: str  # short: "cudnn"
    library: str  # name and version
    run: Callable[[Tensor, Tensor, Tensor, float], Tensor]


def sdpa(backend: SDPBackend | None) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """torch's own function, held to one of its ways. None: left to torch."""

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (R, heads, S, D)
            mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return mixed.transpose(1, 2).flatten(2)

    return run


def flash_3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from fa3_fwd_interface import flash_attn_func

    out = flash_attn_func(q, k, v, softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).flatten(2)


TORCH = Attention("torch", "torch's own choice", sdpa(None))


def usable(dtype: torch.dtype, shape: tuple[int, int, int, int] = PROBE) -> tuple[list[Attention], dict[str, str]]:
    """For q, k and v of (R, heads, S, D) on the current GPU: what can be asked for, best first; why others cannot."""
    found, absent = [], {}
    q = torch.empty(shape, dtype=dtype, device="cuda")
    ways = (
        ("cudnn", f"cuDNN {cudnn_version()}", SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.can_use_cudnn_attention),
        ("flash", "FlashAttention-2 of torch", SDPBackend.FLASH_ATTENTION, torch.backends.cuda.can_use_flash_attention),
    )
    for name, library, backend, can_use in ways:
        if reason := refusal(can_use, torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)):
            absent[name] = reason
        else:
            found.append(Attention(name, library, sdpa(backend)))
    if reason := flash_3_missing(dtype):
        absent["flash-3"] = reason
    else:
        version = importlib.metadata.version("fa3-fwd")
        found.append(Attention("flash-3", f"FlashAttention-3 (fa3-fwd {version})", flash_3))
    return [*found, TORCH], absent


def refusal(can_use: Callable[..., bool], params: object) -> str | None:
    """Why torch does not take this way, in its own words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if can_use(params, True):
            return None
    return first_line(caught[-1].message) if caught else "torch does not say why"  # type: ignore[arg-type]


def flash_3_missing(dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("fa3_fwd_interface") is None:
        return "fa3-fwd is not installed"
    if torch.cuda.get_device_capability() != (9, 0):
        return "fa3-fwd is for Hopper"
    return None if dtype is torch.bfloat16 else "fa3-fwd has only bfloat16"


def cudnn_version() -> str:
    """9.15.0 for 91500; empty where this torch has none."""
    version = torch.backends.cudnn.version() or 0
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else ""
