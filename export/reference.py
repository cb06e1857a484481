"""ELF in plain torch and float32: the oracle that every graph, engine and precision is compared with.

Sources:
- ELF: Embedded Language Flows, arXiv 2605.10938, and its official PyTorch code, which wins where the two differ.
- RMSNorm: arXiv 1910.07467.  SwiGLU: arXiv 2002.05202.  Rotary embedding (interleaved pairs): arXiv 2104.09864.
- Query and key norms: arXiv 2302.05442.

Letters: R network rows, L text length, P prefix tokens, S = P + L, C latent, H hidden, D head width, V vocabulary.
Parameter names are those of the official state dict.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elf_rt.params import ModelConfig

ROPE_BASE = 10000.0
NORM_EPS = 1e-6
TIME_FREQUENCIES = 128  # cos and sin of t times 128 geometric frequencies: 256 features


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the statistics are float32 whatever the type of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + NORM_EPS) * self.weight).to(x.dtype)


class ScalarEmbedder(nn.Module):
    """A scalar per row to one token: cosines and sines at geometric frequencies, then a two-layer MLP."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp_0 = nn.Linear(2 * TIME_FREQUENCIES, hidden)
        self.mlp_2 = nn.Linear(hidden, hidden)

    def forward(self, value: Tensor) -> Tensor:
        angles = value[:, None] * scalar_frequencies().to(value)  # (R, 128)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (R, 256)
        return self.mlp_2(F.silu(self.mlp_0(features)))  # (R, H)


class Attention(nn.Module):
    """Bidirectional attention without a mask; RMSNorm, then rotary, on queries and keys of each head."""

    def __init__(self, hidden: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(hidden, 3 * heads * head_dim)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.proj = nn.Linear(heads * head_dim, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.heads, self.head_dim)  # (R, S, 3, heads, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (R, heads, S, D)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        probabilities = torch.softmax(q @ k.transpose(-1, -2) * self.head_dim**-0.5, dim=-1)  # (R, heads, S, S)
        mixed = (probabilities @ v).transpose(1, 2).reshape(rows, length, -1)  # (R, S, heads * D)
        return self.proj(mixed)


class SwiGLU(nn.Module):
    """w3(silu(a) * b) where [a, b] = w12(x)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden, 2 * inner)
        self.w3 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)  # each (R, S, inner)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.attn = Attention(config.hidden_size, config.num_heads, config.head_dim)
        self.norm2 = RMSNorm(config.hidden_size)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_dim)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = h + self.attn(self.norm1(h), cos, sin)
        return h + self.mlp(self.norm2(h))


class ELF(nn.Module):
    """The network: noisy latents to clean latents, and the last hidden state to token logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, latent = config.hidden_size, config.latent_dim
        if config.self_cond:
            self.self_cond_proj = nn.Linear(2 * latent, latent)
        self.text_proj = nn.ModuleDict(
            {
                "proj1": nn.Linear(latent, config.bottleneck_dim, bias=False),
                "proj2": nn.Linear(config.bottleneck_dim, hidden),
            }
        )
        self.t_embedder = ScalarEmbedder(hidden)
        self.t_emb_tokens = nn.Parameter(torch.zeros(1, config.num_time_tokens, hidden))
        if config.num_self_cond_cfg_tokens:
            self.self_cond_cfg_embedder = ScalarEmbedder(hidden)
            self.self_cond_cfg_tokens = nn.Parameter(torch.zeros(1, config.num_self_cond_cfg_tokens, hidden))
        if config.num_model_mode_tokens:
            self.mode_tokens = nn.Parameter(torch.zeros(1, config.num_model_mode_tokens, hidden))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = nn.ModuleDict({"norm_final": RMSNorm(hidden), "linear": nn.Linear(hidden, latent)})
        if config.decoder_head_norm:
            self.decoder_head_norm = RMSNorm(hidden)
        # The token head is stored input-first, unlike Linear weights.
        self.proj_kernel = nn.Parameter(torch.zeros(hidden, latent))
        self.proj_bias = nn.Parameter(torch.zeros(latent))
        self.unembed_kernel = nn.Parameter(torch.zeros(latent, config.vocab_size))
        self.unembed_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def prefix(self, t: Tensor, s: Tensor | None, mode: Tensor | None) -> Tensor:
        """Prefix tokens (R, P, H). Mode tokens are zero in denoise mode, yet attended: they are never dropped."""
        tokens = [self.t_emb_tokens + self.t_embedder(t)[:, None]]
        if self.config.num_self_cond_cfg_tokens:
            assert s is not None
            tokens.append(self.self_cond_cfg_tokens + self.self_cond_cfg_embedder(s)[:, None])
        if self.config.num_model_mode_tokens:
            assert mode is not None
            tokens.append(self.mode_tokens * mode[:, None, None])
        return torch.cat(tokens, dim=1)

    def forward(
        self, z: Tensor, x_prev: Tensor | None, t: Tensor, s: Tensor | None, mode: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One call of the network.

        z (R, L, C) noisy latents; x_prev (R, L, C) the last clean estimate or zeros; t (R,) in [0, 1]; s (R,)
        self-conditioning guidance scale; mode (R,) 0 to denoise, 1 to decode. Inputs that the model has no
        parameters for are ignored and may be None.
        Returns x (R, L, C), the clean estimate, and hidden (R, L, H), the last residual before `norm_final`.
        """
        x = z
        if self.config.self_cond:
            assert x_prev is not None
            x = self.self_cond_proj(torch.cat([z, x_prev], dim=-1))
        text = self.text_proj["proj2"](self.text_proj["proj1"](x))  # (R, L, H)
        prefix = self.prefix(t, s, mode)  # (R, P, H)
        cos, sin = (table.to(z) for table in rotary_tables(prefix.shape[1], z.shape[1], self.config.head_dim))
        h = torch.cat([prefix, text], dim=1)  # (R, S, H)
        for block in self.blocks:
            h = block(h, cos, sin)
        hidden = h[:, prefix.shape[1] :]  # (R, L, H)
        return self.final_layer["linear"](self.final_layer["norm_final"](hidden)), hidden

    def head_features(self, hidden: Tensor) -> Tensor:
        """hidden (R, L, H) of a decode call -> (R, L, C), what the unembedding reads. Official models have no norm."""
        if self.config.decoder_head_norm:
            hidden = self.decoder_head_norm(hidden)
        return F.gelu(hidden @ self.proj_kernel + self.proj_bias, approximate=self.config.head_gelu)

    def discretize_logits(self, hidden: Tensor) -> Tensor:
        """hidden (R, L, H) of a decode call -> logits (R, L, V)."""
        return self.head_features(hidden) @ self.unembed_kernel + self.unembed_bias


def scalar_frequencies() -> Tensor:
    """(128,) float32: 10000^(-k/128)."""
    return ROPE_BASE ** (-torch.arange(TIME_FREQUENCIES, dtype=torch.float32) / TIME_FREQUENCIES)


def rotary_tables(prefix: int, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (P + L, D / 2). Position 0 is the first text token; prefix tokens are not rotated."""
    inverse = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)  # (D / 2,)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inverse)  # (L, D / 2)
    angles = F.pad(angles, (0, 0, prefix, 0))  # an angle of 0: cos 1, sin 0
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary: the pair (2i, 2i + 1) of x (R, heads, S, D) turns by the angle of cos, sin (S, D / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]  # each (R, heads, S, D / 2)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
