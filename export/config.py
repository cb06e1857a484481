"""A model's `ModelConfig`: sizes from its tensors, the other numbers from its YAML, its file or a released preset."""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from elf_rt.errors import CheckpointError
from elf_rt.params import RELEASED, ModelConfig

Shape = tuple[int | None, ...]  # None: a size that no tensor tells

TIME_FREQUENCIES = 256  # width of the cosine and sine features that enter every embedder
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
_ABOVE_ZERO = ("denoiser_noise_scale", "t_eps", "latent_std")
_FROM_ZERO = ("denoiser_p_std", "self_cond_prob")


def read_sizes(state: Mapping[str, Any]) -> dict[str, int | None]:
    """The sizes of `ModelConfig` that tensors tell; None where the tensor is absent or has another rank."""

    def size(name: str, axis: int, rank: int) -> int | None:
        tensor = state.get(name)
        return tensor.shape[axis] if isinstance(tensor, torch.Tensor) and tensor.ndim == rank else None

    blocks = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
    hidden, head_dim = size("final_layer.norm_final.weight", 0, 1), size("blocks.0.attn.q_norm.weight", 0, 1)
    divides = hidden and head_dim and hidden % head_dim == 0
    return {
        "depth": min(max(blocks, default=0) + 1, len(state)),  # a stray high index must not ask for a huge list
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


def expected_shapes(sizes: Mapping[str, int | None]) -> dict[str, Shape]:
    """Name and shape of every tensor of an ELF with these sizes (the state dict of the official code).

    Linear weights are (out, in); `proj_kernel` and `unembed_kernel` are stored (in, out).
    """
    H, D, M = sizes["hidden_size"], sizes["head_dim"], sizes["mlp_dim"]
    C, P, V = sizes["latent_dim"], sizes["bottleneck_dim"], sizes["vocab_size"]
    shapes: dict[str, Shape] = {}

    def linear(name: str, n_out: int | None, n_in: int | None) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    def times(factor: int, n: int | None) -> int | None:
        return None if n is None else factor * n

    def embedder(name: str) -> None:
        linear(f"{name}.mlp_0", H, TIME_FREQUENCIES)
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


def find_settings(folders: Sequence[Path], named: Path | None) -> tuple[Path, dict[str, Any]] | None:
    """The YAML mapping that describes the run: `named`, else `config.yml`/`config.yaml`, else the folder's only YAML.

    Raises:
        CheckpointError: the YAML cannot be read, is not a mapping or lacks max_length; or several could be meant.
    """
    if named is not None:
        return named, _read_yaml(named)
    for folder in folders:
        files = sorted(f for f in folder.iterdir() if f.suffix in (".yml", ".yaml"))
        files = [f for f in files if f.stem == "config"][:1] or files
        if len(files) > 1:
            names = ", ".join(f.name for f in files)
            raise CheckpointError(f"{folder} holds several YAML files ({names}): name one with --config")
        if files:
            return files[0], _read_yaml(files[0])
    return None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} must hold a YAML mapping (max_length: ...), got a {type(settings).__name__}")
    if "max_length" not in settings:
        raise CheckpointError(f"{path} lacks max_length, the number of positions that the model was trained on")
    return settings


def make_config(sizes: Mapping[str, int | None], settings: Mapping[str, Any], where: Path) -> ModelConfig:
    """Joins the sizes with the settings found in `where`.

    Without a max_length in `settings`, the sizes must be those of a released model, which gives the rest (L = 1024).

    Raises:
        CheckpointError: a setting is out of range, or there is none and the sizes are of no released model.
    """
    known: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    known["self_cond"] = _self_cond(sizes, settings, where)
    known["decoder_head_norm"] = bool(sizes["decoder_head_norm"])
    if "max_length" not in settings:
        for name, released in RELEASED.items():
            if all(getattr(released, size) == known[size] for size in _PRESET_SIZES):
                warnings.warn(
                    f"{where} has no YAML beside it and is taken for {name}: unconditional, {released.max_length} "
                    "tokens. If it was trained otherwise, name its config with --config",
                    stacklevel=2,
                )
                return dataclasses.replace(released, **known)
        raise CheckpointError(
            f"{where} has no YAML beside it and is of no released size ({', '.join(RELEASED)}): "
            "name its config with --config (it must give max_length)"
        )
    _check_sizes(known, settings, where)
    max_length = _integer(settings, "max_length", 1, where)
    max_input_length = _integer(settings, "max_input_length", 0, where)
    if max_input_length >= max_length:
        raise CheckpointError(f"{where}: max_input_length {max_input_length} must be below max_length {max_length}")
    numbers: dict[str, Any] = {field: _number(settings, key, where) for field, key in _KEYS.items() if key in settings}
    if absent := [key for key in _KEYS.values() if key not in settings]:
        warnings.warn(f"{where} lacks {', '.join(absent)}: ELF-B's values are taken", stacklevel=2)
    return ModelConfig(**known, **numbers, max_length=max_length, max_input_length=max_input_length)


def _check_sizes(known: Mapping[str, Any], settings: Mapping[str, Any], where: Path) -> None:
    """A YAML that gives other sizes than the weights have is another model's."""
    for name, value in known.items():
        if name in settings and name != "self_cond" and str(settings[name]) != str(value):
            raise CheckpointError(
                f"{where} is not the config of these weights: it says {name} {settings[name]}, they have {value}"
            )


def _self_cond(sizes: Mapping[str, int | None], settings: Mapping[str, Any], where: Path) -> bool:
    """Official checkpoints hold `self_cond_proj` even where the model was trained without it (`self_cond_prob: 0`)."""
    if "self_cond_prob" not in settings:
        return bool(sizes["self_cond"])
    trained_with = _number(settings, "self_cond_prob", where) > 0
    if trained_with and not sizes["self_cond"]:
        raise CheckpointError(f"{where} has self_cond_prob above 0, but the weights hold no self_cond_proj")
    return trained_with


def _integer(settings: Mapping[str, Any], key: str, least: int, where: Path) -> int:
    value = settings.get(key) or 0  # an official YAML may say null
    try:
        whole = int(str(value))  # str: neither 3.5 nor true passes for a number
    except ValueError:
        whole = least - 1
    if whole < least:
        raise CheckpointError(f"{where}: {key} must be a whole number from {least} up, got {value!r}")
    return whole


def _number(settings: Mapping[str, Any], key: str, where: Path) -> float:
    try:
        value = float(str(settings[key]))  # YAML 1.1 reads 1e-3 as text
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (key in _ABOVE_ZERO and value <= 0) or (key in _FROM_ZERO and value < 0):
        limit = " above 0" if key in _ABOVE_ZERO else " from 0 up" if key in _FROM_ZERO else ""
        raise CheckpointError(f"{where}: {key} must be a finite number{limit}, got {settings[key]!r}")
    return value
