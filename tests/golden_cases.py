"""The golden runs of the official code (tests/data/golden): sizes, EMA weights and recorded arrays of one case."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml

from elf_rt.params import ModelConfig

GOLDEN = Path(__file__).parent / "data" / "golden"
CASES = ("uncond", "cond", "no_sc_tokens", "no_self_cond", "head_dim_66")  # those with recorded network calls


@dataclass(frozen=True)
class Golden:
    config: ModelConfig
    state: dict[str, torch.Tensor]  # float32
    arrays: dict[str, np.ndarray]

    def call(self, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(z, x_prev, t, s, mode) of the recorded denoise call ("fwd") or decode call ("dec")."""
        z, x_prev, t, s = (torch.from_numpy(self.arrays[f"fwd_{name}"]) for name in ("z", "x_prev", "t", "sc"))
        if kind == "fwd":
            return z, x_prev, t, s, torch.zeros_like(t)
        return z, torch.zeros_like(x_prev), torch.ones_like(t), s, torch.ones_like(t)


@cache
def golden(case: str) -> Golden:
    folder = GOLDEN / case
    with np.load(folder / "golden.npz") as arrays:
        loaded = {name: arrays[name] for name in arrays.files}
    return Golden(*official_checkpoint(folder / "checkpoint_10", folder / "config.yml"), loaded)


def official_checkpoint(weights: Path, settings: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Sizes read off the tensors here, independently of elf_rt.export.checkpoint."""
    state = {k: v.float() for k, v in torch.load(weights, weights_only=True)["ema_params1"].items()}
    yml = yaml.safe_load(settings.read_text(encoding="utf-8"))
    if not yml["self_cond_prob"]:  # the official code saves the projection all the same, and never calls it
        state = {name: value for name, value in state.items() if not name.startswith("self_cond_proj.")}
    hidden = state["blocks.0.norm1.weight"].numel()
    head_dim = state["blocks.0.attn.q_norm.weight"].numel()

    def count(name: str) -> int:
        return state[name].shape[1] if name in state else 0

    config = ModelConfig(
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        hidden_size=hidden,
        num_heads=hidden // head_dim,
        head_dim=head_dim,
        mlp_dim=state["blocks.0.mlp.w3.weight"].shape[1],
        latent_dim=state["final_layer.linear.weight"].shape[0],
        bottleneck_dim=state["text_proj.proj1.weight"].shape[0],
        vocab_size=state["unembed_bias"].numel(),
        max_length=yml["max_length"],
        max_input_length=yml.get("max_input_length", 0),
        num_time_tokens=count("t_emb_tokens"),
        num_self_cond_cfg_tokens=count("self_cond_cfg_tokens"),
        num_model_mode_tokens=count("mode_tokens"),
        self_cond="self_cond_proj.weight" in state,
        noise_scale=yml["denoiser_noise_scale"],
    )
    return config, state


def relative_error(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    actual64, expected64 = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual64 - expected64) / np.linalg.norm(expected64))
