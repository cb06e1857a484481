"""ELF once more, in numpy and float64, from the public definitions of its variants: what elf-rt is compared with.

It shares no code with elf-rt, and takes a checkpoint's own tensors under their own names.
"""

import itertools
import math

import numpy as np

EPS = 1e-6


class NumpyElf:
    """state: a checkpoint's tensors. exact_gelu: of the token head. final_norm: the name of the norm before x."""

    def __init__(self, state, *, exact_gelu=False, final_norm="final_layer.norm_final"):
        self.w = {name: np.asarray(tensor, np.float64) for name, tensor in state.items()}
        self.exact_gelu, self.final_norm = exact_gelu, final_norm
        self.depth = 1 + max(int(name.split(".")[1]) for name in self.w if name.startswith("blocks."))

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def norm(self, name, x):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * self.w[f"{name}.weight"]

    def embed(self, name, scalar):
        angles = scalar * np.exp(-math.log(10000) * np.arange(128) / 128)
        return self.linear(f"{name}.mlp_2", silu(self.linear(f"{name}.mlp_0", np.r_[np.cos(angles), np.sin(angles)])))

    def attention(self, name, x, prefix):
        q, k, v = np.split(self.linear(f"{name}.qkv", x), 3, axis=-1)  # each (S, H)
        width = self.w[f"{name}.q_norm.weight"].size
        q, k, v = (part.reshape(len(x), -1, width).swapaxes(0, 1) for part in (q, k, v))  # (heads, S, D)
        q, k = (turn(self.norm(f"{name}.{n}_norm", part), prefix) for n, part in (("q", q), ("k", k)))
        scores = q @ k.swapaxes(1, 2) / math.sqrt(width)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        return self.linear(f"{name}.proj", mixed.swapaxes(0, 1).reshape(len(x), -1))

    def call(self, z, x_prev, t, s, mode=0.0):
        """z, x_prev (L, C) -> the clean estimate (L, C) and the last hidden state (L, H)."""
        text = self.linear("self_cond_proj", np.concatenate([z, x_prev], axis=-1))
        text = self.linear("text_proj.proj2", self.linear("text_proj.proj1", text))
        tokens = [
            self.w["t_emb_tokens"][0] + self.embed("t_embedder", t),
            self.w["self_cond_cfg_tokens"][0] + self.embed("self_cond_cfg_embedder", s),
            self.w["mode_tokens"][0] * mode,
        ]
        h = np.concatenate([*tokens, text])
        prefix = len(h) - len(text)
        for i in range(self.depth):
            h = h + self.attention(f"blocks.{i}.attn", self.norm(f"blocks.{i}.norm1", h), prefix)
            a, b = np.split(self.linear(f"blocks.{i}.mlp.w12", self.norm(f"blocks.{i}.norm2", h)), 2, axis=-1)
            h = h + self.linear(f"blocks.{i}.mlp.w3", silu(a) * b)
        hidden = h[prefix:]
        return self.linear("final_layer.linear", self.norm(self.final_norm, hidden)), hidden

    def ids(self, z, s):
        """Token ids (L,) of the decoding call."""
        hidden = self.call(z, np.zeros_like(z), 1.0, s, mode=1.0)[1]
        if "decoder_head_norm.weight" in self.w:
            hidden = self.norm("decoder_head_norm", hidden)
        features = hidden @ self.w["proj_kernel"] + self.w["proj_bias"]
        if self.exact_gelu:
            features = features * 0.5 * (1 + np.vectorize(math.erf)(features / math.sqrt(2)))
        else:
            cubic = math.sqrt(2 / math.pi) * (features + 0.044715 * features**3)
            features = features * 0.5 * (1 + np.tanh(cubic))
        return np.argmax(features @ self.w["unembed_kernel"] + self.w["unembed_bias"], axis=-1)

    def refine(self, z, eps, steps, s, *, noise_scale, renew, source=None, held=0):
        """ELF-MMD's sampler: passes at t = 0 that feed back their estimate; the last is the text. eps[i] for pass i."""
        x = hold(np.zeros_like(z), source, held)
        for i in range(steps):
            if renew and i:
                z = noise_scale * eps[i]
            z = hold(z, source, held)
            x = hold(self.call(z, x, 0.0, s)[0], source, held)
        return x

    def sde(self, z, grid, eps, s, *, noise_scale, gamma):
        """The T5Gemma-2 models' sampler: every step but the last first goes back in time with fresh noise."""
        x = np.zeros_like(z)
        for i, (t, t_next) in enumerate(itertools.pairwise(grid)):
            if i < len(grid) - 2:
                keep = min(1.0, max(0.0, 1 - gamma * (t_next - t)))
                z, t = keep * z + (1 - keep) * noise_scale * eps[i], keep * t
            x = self.call(z, x, t, s)[0]
            z = z + (t_next - t) * (x - z) / max(1 - t, 0.05)
        return z


def silu(x):
    return x / (1 + np.exp(-x))


def turn(x, prefix):
    """Rotary of interleaved pairs of x (heads, S, D); the prefix stands still."""
    width = x.shape[-1]
    angles = np.outer(np.arange(x.shape[1] - prefix), 10000.0 ** (-np.arange(0, width, 2) / width))
    angles = np.concatenate([np.zeros((prefix, width // 2)), angles])
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def hold(x, source, held):
    """The first `held` positions are the source's."""
    return x if source is None else np.concatenate([source[:held], x[held:]])
