"""A model's `ModelConfig`: sizes from its tensors, the other numbers from its YAML, its file or a released preset."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from elf_rt.errors import CheckpointError, warn
from elf_rt.export.foreign import shown
from elf_rt.export.reference import TIME_FREQUENCIES
from elf_rt.export.settings import LENGTH, Settings
from elf_rt.params import LIMITS, RELEASED, ModelConfig

TensorShape = tuple[int | None, ...]  # None: a size that no tensor tells

_PRESET_SIZES = (
    *("depth", "hidden_size", "num_heads", "head_dim", "mlp_dim", "latent_dim", "bottleneck_dim", "vocab_size"),
)
_KEYS = {  # field of ModelConfig -> key in the YAML
    "noise_scale": "denoiser_noise_scale",
    "t_eps": "t_eps",
    "p_mean": "denoiser_p_mean",
    "p_std": "denoiser_p_std",
    "latent_mean": "latent_mean",
    "latent_std": "latent_std",
}
USED = {  # fields of a config that are read, here or for the encoder and the presets
    *(*_KEYS.values(), *_PRESET_SIZES, LENGTH, "max_input_length", "self_cond_prob", "active_depth", "pad_token"),
    *("num_time_tokens", "num_self_cond_cfg_tokens", "num_model_mode_tokens", "decoder_head_norm"),
    *("encoder_model_name", "encoder_family", "encoder", "objective", "task", "model", "seq_len", "mean", "std"),
    *("sampling_configs", "sampling_configs_path"),
}
MOST_TOKENS = 1 << 16  # tokens of a text; attention over more would take 17 GB a head


def read_sizes(state: Mapping[str, Any]) -> dict[str, int | None]:
    """The sizes of `ModelConfig` that tensors tell; None where the tensor is absent or has another rank."""

    def size(name: str, axis: int, rank: int) -> int | None:
        tensor = state.get(name)
        return tensor.shape[axis] if isinstance(tensor, torch.Tensor) and tensor.ndim == rank else None

    blocks = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d{1,3})\.", name))]
    hidden, head_dim = size("final_layer.norm_final.weight", 0, 1), size("blocks.0.attn.q_norm.weight", 0, 1)
    divides = hidden and head_dim and hidden % head_dim == 0
    return {
        "depth": max(blocks, default=0) + 1,
        "hidden_size": hidden,
        "num_heads": hidden // head_dim if hidden and head_dim and divides else None,
        "head_dim": head_dim,
        "mlp_dim": size("blocks.0.mlp.w3.weight", 1, 2),
        "latent_dim": size("final_layer.linear.weight", 0, 2),
        "bottleneck_dim": size("text_proj.proj1.weight", 0, 2),
        "vocab_size": size("unembed_bias", 0, 1),
        "num_time_tokens": size("t_emb_tokens", 1, 3),
        "num_self_cond_cfg_tokens": size("self_cond_cfg_tokens", 1, 3) or 0,
        "num_model_mode_tokens": size("mode_tokens", 1, 3) or 0,
        "decoder_head_norm": int("decoder_head_norm.weight" in state),
        "self_cond": int(any(name.startswith("self_cond_proj.") for name in state)),
    }


def expected_shapes(sizes: Mapping[str, int | None]) -> dict[str, TensorShape]:
    """Name and shape of every tensor of an ELF with these sizes (the state dict of the official code).

    Linear weights are (out, in); `proj_kernel` and `unembed_kernel` are stored (in, out).
    """
    H, D, M = sizes["hidden_size"], sizes["head_dim"], sizes["mlp_dim"]
    C, P, V = sizes["latent_dim"], sizes["bottleneck_dim"], sizes["vocab_size"]
    shapes: dict[str, TensorShape] = {}

    def linear(name: str, n_out: int | None, n_in: int | None) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    def times(factor: int, n: int | None) -> int | None:
        return None if n is None else factor * n

    def embedder(name: str) -> None:
        linear(f"{name}.mlp_0", H, 2 * TIME_FREQUENCIES)
        linear(f"{name}.mlp_2", H, H)

    if sizes["self_cond"]:
        linear("self_cond_proj", C, times(2, C))
    shapes["text_proj.proj1.weight"] = (P, C)
    linear("text_proj.proj2", H, P)
    embedder("t_embedder")
    shapes["t_emb_tokens"] = (1, sizes["num_time_tokens"], H)
    if sizes["num_self_cond_cfg_tokens"]:
        embedder("self_cond_cfg_embedder")
        shapes["self_cond_cfg_tokens"] = (1, sizes["num_self_cond_cfg_tokens"], H)
    if sizes["num_model_mode_tokens"]:
        shapes["mode_tokens"] = (1, sizes["num_model_mode_tokens"], H)
    for i in range(sizes["depth"] or 0):
        block = f"blocks.{i}"
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (H,)
        shapes[f"{block}.attn.q_norm.weight"] = shapes[f"{block}.attn.k_norm.weight"] = (D,)
        linear(f"{block}.attn.qkv", times(3, H), H)
        linear(f"{block}.attn.proj", H, H)
        linear(f"{block}.mlp.w12", times(2, M), H)
        linear(f"{block}.mlp.w3", H, M)
    shapes["final_layer.norm_final.weight"] = (H,)
    linear("final_layer.linear", C, H)
    if sizes["decoder_head_norm"]:
        shapes["decoder_head_norm.weight"] = (H,)
    shapes["proj_kernel"], shapes["proj_bias"] = (H, C), (C,)
    shapes["unembed_kernel"], shapes["unembed_bias"] = (C, V), (V,)
    return shapes


def make_config(sizes: Mapping[str, int | None], settings: Settings) -> ModelConfig:
    """Joins the sizes with the settings.

    Without a max_length in `settings`, the sizes must be those of a released model, which gives the rest (L = 1024).

    Raises:
        CheckpointError: a setting is out of range, or there is none and the sizes are of no released model.
    """
    where = settings.where
    known: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    known["self_cond"] = _self_cond(sizes, settings)
    known["decoder_head_norm"] = bool(sizes["decoder_head_norm"])
    if LENGTH not in settings:
        for name, released in RELEASED.items():
            if all(getattr(released, size) == known[size] for size in _PRESET_SIZES):
                warn(
                    f"{where} has no YAML beside it and is taken for {name}: unconditional, {released.max_length} "
                    "tokens. If it was trained otherwise, name its config with --config"
                )
                return dataclasses.replace(released, **known)
        raise CheckpointError(
            f"{where} has no YAML beside it and is of no released size ({', '.join(RELEASED)}): "
            "name its config with --config (it must give max_length)"
        )
    _check_sizes(known, settings)
    max_length = settings.integer(LENGTH, 1, MOST_TOKENS)
    max_input_length = settings.integer("max_input_length", 0, MOST_TOKENS)
    if max_input_length >= max_length:
        raise CheckpointError(f"{where}: max_input_length {max_input_length} must be below max_length {max_length}")
    numbers: dict[str, Any] = {
        field: settings.number(key, *LIMITS[field]) for field, key in _KEYS.items() if key in settings
    }
    if absent := [key for key in _KEYS.values() if key not in settings]:
        warn(f"{where} lacks {', '.join(absent)}: ELF-B's values are taken")
    if max_input_length and settings.get("pad_token") == "pad":
        warn(
            f"{where} has pad_token: pad for a conditional model, which then never learns to end its texts; the "
            "released ones were trained with pad_token: eos"
        )
    return ModelConfig(**known, **numbers, max_length=max_length, max_input_length=max_input_length)


def active_depth(sizes: Mapping[str, int | None], settings: Settings) -> int:
    """How many blocks run: all, or the first `active_depth` of them where the run says so."""
    depth = sizes["depth"] or 0
    if "active_depth" not in settings:
        return depth
    active = settings.integer("active_depth", 1, depth)
    if active < depth:
        warn(f"{settings.where} has active_depth {active}: blocks {active} to {depth - 1} are left out")
    return active


def _check_sizes(known: Mapping[str, Any], settings: Settings) -> None:
    """A YAML that gives other sizes than the weights have is another model's."""
    for name, value in known.items():
        if name == "self_cond" or (name == "depth" and "active_depth" in settings):
            continue
        said = settings.get(name)
        if said is None or said is value:
            continue
        if isinstance(said, bool) or settings.number(name, 0, math.inf) != value:
            raise CheckpointError(
                f"{settings.where} is not the config of these weights: it says {name} {shown(said)}, they have {value}"
            )


def _self_cond(sizes: Mapping[str, int | None], settings: Settings) -> bool:
    """Official checkpoints hold `self_cond_proj` even where the model was trained without it (`self_cond_prob: 0`)."""
    if "self_cond_prob" not in settings:
        return bool(sizes["self_cond"])
    trained_with = settings.number("self_cond_prob", 0, 1) > 0
    if trained_with and not sizes["self_cond"]:
        raise CheckpointError(f"{settings.where} has self_cond_prob above 0, but the weights hold no self_cond_proj")
    return trained_with
