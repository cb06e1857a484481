"""The reference network in PyTorch as a backend of the sampler, for ``elf-rt bench --vs`` to compare with.

It has the interface of the runtime's backends (elf_rt.backends.base), so that everything but the network is the same.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elf_rt.errors import BackendError
from elf_rt.export.reference import ELF, Attention, rotate
from elf_rt.params import ModelConfig


class FusedAttention(Attention):
    """The reference's attention by torch's own fused kernel: what a comparison has to be with."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.heads, self.head_dim)  # (R, S, 3, heads, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (R, heads, S, D)
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)  # autocast leaves rotary in float32
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (R, S, heads, D)
        return self.proj(mixed.reshape(rows, length, -1))


class TorchBackend:
    """ELF on the CPU: eager float32, or compiled, in bfloat16 autocast where ``bf16`` says so."""

    device = "cpu"
    encode: Callable[[np.ndarray, np.ndarray], np.ndarray]  # set by who opens it: the text encoder is no part of this

    def __init__(
        self, config: ModelConfig, state: dict[str, torch.Tensor], *, compiled: bool, bf16: bool, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self.name = "torch-compile" if compiled else "torch-eager"
        self.precision = "bf16" if bf16 else "fp32"
        self.config = config
        self.model = ELF(config)
        for block in self.model.blocks:
            block.attn = FusedAttention(config.hidden_size, config.num_heads, config.head_dim)
        self.model.load_state_dict(state)
        self.model.eval()
        self._threads = threads
        with _clear_errors(self.name):
            self.forward: Any = torch.compile(self.model, dynamic=False) if compiled else self.model

    def bind(self, rows: int, length: int) -> "TorchNetwork":
        return TorchNetwork(self, rows, length)

    def describe(self) -> Mapping[str, str]:
        return {
            "library": f"PyTorch {torch.__version__}",
            "precision": self.precision,
            "threads": str(self._threads),
        }

    def close(self) -> None:
        del self.model, self.forward


class TorchNetwork:
    """Numpy arrays that share their memory with torch tensors."""

    def __init__(self, backend: TorchBackend, rows: int, length: int) -> None:
        config = backend.config
        self._backend = backend
        self.z = np.zeros((rows, length, config.latent_dim), np.float32)
        self.x_prev = np.zeros_like(self.z) if config.self_cond else None
        self.t = np.zeros(rows, np.float32)
        self.s = np.zeros(rows, np.float32) if config.num_self_cond_cfg_tokens else None
        self.mode = np.zeros(rows, np.float32) if config.num_model_mode_tokens else None
        self.x = np.zeros_like(self.z)
        self._hidden: torch.Tensor | None = None

    @torch.inference_mode()
    def denoise(self) -> None:
        arrays = (self.z, self.x_prev, self.t, self.s, self.mode)
        call = [None if array is None else torch.from_numpy(array) for array in arrays]
        backend = self._backend
        with _clear_errors(backend.name), torch.autocast("cpu", torch.bfloat16, enabled=backend.precision == "bf16"):
            x, self._hidden = backend.forward(*call)
        self.x[:] = x.float().numpy()

    @torch.inference_mode()
    def discretize(self) -> np.ndarray:
        assert self._hidden is not None
        return self._backend.model.discretize_logits(self._hidden.float()).argmax(-1).numpy()

    def close(self) -> None:
        self._hidden = None


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """torch.compile needs a C++ compiler and more; what it raises without them has no common base."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendError(f"{name} does not work here: {reason[0]}") from error
