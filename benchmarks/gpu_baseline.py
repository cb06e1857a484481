"""ELF on a GPU as somebody who knows torch well would write it: what elf-rt has to be compared with.

Weights of the blocks in bfloat16, attention by torch's fused kernels (cuDNN first), TF32 for what stays float32, the
network compiled, a step of the sampler captured in a CUDA graph, noise and the sampler's update on the GPU. Residual
and statistics are float32, as in the official code. Without a GPU the same runs without graphs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from elf_rt.export import reference
from elf_rt.export.random_init import random_state
from elf_rt.export.torch_cpu import FusedAttention
from elf_rt.params import ModelConfig, SamplingParams

ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Block(nn.Module):
    """The reference's block with bfloat16 products; the residual h (R, S, H) stays float32."""

    def __init__(self, block: reference.Block, config: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp.bfloat16()
        self.attn = FusedAttention(config.hidden_size, config.num_heads, config.head_dim)
        self.attn.load_state_dict(block.attn.state_dict())
        self.attn.qkv.bfloat16()
        self.attn.proj.bfloat16()

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = h + self.attn(self.norm1(h).bfloat16(), cos, sin)
        return h + self.mlp(self.norm2(h).bfloat16())


class Network(nn.Module):
    """The reference with its tables kept on the device, where a graph can be captured."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = reference.ELF(config)
        self.model.load_state_dict(random_state(config, seed=0))
        self.model.blocks = nn.ModuleList(Block(block, config) for block in self.model.blocks)
        cos, sin = reference.rotary_tables(config.num_prefix_tokens, config.max_length, config.head_dim)
        self.register_buffer("cos", cos.float())
        self.register_buffer("sin", sin.float())
        self.register_buffer("frequencies", reference.scalar_frequencies())

    def embedded(self, embedder: reference.ScalarEmbedder, scalar: Tensor) -> Tensor:
        angles = scalar[:, None] * self.frequencies
        return embedder.mlp_2(nn.functional.silu(embedder.mlp_0(torch.cat([angles.cos(), angles.sin()], -1))))[:, None]

    def forward(self, z: Tensor, x_prev: Tensor, t: Tensor, s: Tensor, mode: Tensor) -> tuple[Tensor, Tensor]:
        """As ``reference.ELF``."""
        model = self.model
        prefix = [model.t_emb_tokens + self.embedded(model.t_embedder, t)]
        prefix.append(model.self_cond_cfg_tokens + self.embedded(model.self_cond_cfg_embedder, s))
        prefix.append(model.mode_tokens * mode[:, None, None])
        x = model.self_cond_proj(torch.cat([z, x_prev], -1))
        h = torch.cat([*prefix, model.text_proj["proj2"](model.text_proj["proj1"](x))], 1)
        for block in model.blocks:
            h = block(h, self.cos, self.sin)
        hidden = h[:, -z.shape[1] :]
        return model.final_layer["linear"](model.final_layer["norm_final"](hidden)), hidden


@dataclass
class Sampler:
    """Texts of one batch size. Every step runs `step` on tensors that stay where they are."""

    network: Callable[..., tuple[Tensor, Tensor]]
    logits: Callable[[Tensor], Tensor]
    config: ModelConfig
    params: SamplingParams
    batch: int
    device: str

    def __post_init__(self) -> None:
        shape = self.batch, self.config.max_length, self.config.latent_dim
        with torch.device(self.device):
            self.z, self.x_prev, self.noise = torch.zeros(3, *shape).unbind()
            self.t, self.mode = torch.zeros(2, self.batch).unbind()
            self.s = torch.full((self.batch,), self.params.sc_cfg)
            self.row = torch.zeros(4)  # t, alpha, 1 - alpha times the noise's scale, kappa
            self.ids = torch.zeros(shape[:2], dtype=torch.int64)
        self.run_step, self.run_decode = self.step, self.decode
        if self.device == "cuda":
            self.run_step, self.run_decode = captured(self.step), captured(self.decode)

    def step(self) -> None:
        t, alpha, noise, kappa = self.row.unbind()
        z = alpha * self.z + noise * self.noise
        x, _ = self.network(z, self.x_prev, self.t.copy_(t.expand_as(self.t)), self.s, self.mode)
        self.z.copy_((1 - kappa) * z + kappa * x)
        self.x_prev.copy_(x)

    def decode(self) -> None:
        _, hidden = self.network(self.z, torch.zeros_like(self.z), self.t, self.s, torch.ones_like(self.mode))
        self.ids.copy_(self.logits(hidden).argmax(-1))

    def sample(self, seed: int) -> Tensor:
        """(B, L) ids on the host."""
        torch.manual_seed(seed)
        table = step_table(self.config, self.params).to(self.device)
        self.z.normal_().mul_(self.config.noise_scale)
        self.x_prev.zero_()
        for row in table:
            self.row.copy_(row)
            self.noise.normal_()
            self.run_step()
        self.t.fill_(1.0)
        self.run_decode()
        return self.ids.cpu()


def step_table(config: ModelConfig, params: SamplingParams) -> Tensor:
    """(N, 4) of the official SDE sampler, whose last step is deterministic."""
    inner = torch.sigmoid(config.p_mean + config.p_std * torch.randn(params.steps - 1)).sort().values
    grid = torch.cat([torch.zeros(1), inner, torch.ones(1)]).double()
    h = grid.diff()
    alpha = (1 - params.gamma * h).clamp(0, 1)
    alpha[-1] = 1
    t = alpha * grid[:-1]
    kappa = (grid[1:] - t) / (1 - t).clamp(min=config.t_eps)
    return torch.stack([t, alpha, (1 - alpha) * config.noise_scale, kappa], 1).float()


def captured(body: Callable[[], None]) -> Callable[[], None]:
    """A graph of what `body` does, after it ran a few times, which compiles it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            body()
        stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        body()
    return graph.replay


@contextmanager
def strong(config: ModelConfig, params: SamplingParams, device: str, mode: str | None) -> Iterator[Callable[..., Any]]:
    """(batch, seed) -> ids. mode: of torch.compile, "" for its default; None: not compiled."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32
    samplers: dict[int, Sampler] = {}
    try:
        network = Network(config).to(device).requires_grad_(False)
        compiled: Any = network if mode is None else torch.compile(network, dynamic=False, mode=mode or None)

        @torch.inference_mode()
        def sample(batch: int, seed: int) -> Tensor:
            with sdpa_kernel(ATTENTION, set_priority=True):
                if batch not in samplers:
                    samplers.clear()  # the memory of the last size
                    logits = network.model.discretize_logits
                    samplers[batch] = Sampler(compiled, logits, config, params, batch, device)
                return samplers[batch].sample(seed)

        yield sample
    finally:
        samplers.clear()
        torch.set_float32_matmul_precision(precision)
