"""The reference network in PyTorch as a backend of the sampler, for ``elf-rt bench --vs`` to compare with.

It has the interface of the runtime's backends (elf_rt.network), so that everything but the network is the same.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elf_rt.errors import BackendError, first_line
from elf_rt.export.reference import ELF, Attention, rotate
from elf_rt.network import Graph, HostBackend, tensor_shapes
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


class TorchCpuBackend(HostBackend):
    """ELF on the CPU: eager float32, or compiled, in bfloat16 autocast where ``bf16`` says so."""

    def __init__(
        self, config: ModelConfig, state: dict[str, torch.Tensor], *, compiled: bool, bf16: bool, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self.name = "torch-compile" if compiled else "torch-eager"
        self.library, self.precision, self.threads = f"PyTorch {torch.__version__}", "bf16" if bf16 else "fp32", threads
        self.config = config
        self.model = ELF(config)
        for block in self.model.blocks:
            block.attn = FusedAttention(config.hidden_size, config.num_heads, config.head_dim)
        self.model.load_state_dict(state)
        self.model.eval()
        with _clear_errors(self.name):
            self.forward: Any = torch.compile(self.model, dynamic=False) if compiled else self.model

    def bind(self, graph: Graph, rows: int, length: int) -> "TorchGraph":
        return TorchGraph(self, graph, tensor_shapes(graph, self.config, rows, length))

    def close(self) -> None:
        del self.model, self.forward


class TorchGraph:
    """Numpy arrays whose memory torch tensors share."""

    def __init__(self, backend: TorchCpuBackend, graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._backend, self._graph = backend, graph
        self.arrays = {n: np.zeros(shape, np.int64 if n == "ids" else np.float32) for n, shape in shapes.items()}

    @torch.inference_mode()
    def run(self) -> None:
        backend, arrays = self._backend, self.arrays
        if self._graph == "discretizer":
            logits = backend.model.discretize_logits(torch.from_numpy(arrays["hidden"]))
            arrays["ids"][:] = logits.argmax(-1).numpy()
            return
        call = [torch.from_numpy(arrays[n]) if n in arrays else None for n in ("z", "x_prev", "t", "s", "mode")]
        with _clear_errors(backend.name), torch.autocast("cpu", torch.bfloat16, enabled=backend.precision == "bf16"):
            x, hidden = backend.forward(*call)
        arrays["x"][:], arrays["hidden"][:] = x.float().numpy(), hidden.float().numpy()

    def close(self) -> None:
        self.arrays.clear()


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """torch.compile needs a C++ compiler and more; what it raises without them has no common base."""
    try:
        yield
    except Exception as error:
        raise BackendError(f"{name} does not work here: {first_line(error)}") from error
