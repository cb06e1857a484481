"""`load_checkpoint`: any trained ELF checkpoint to float32 tensors, their sizes and their settings."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elf_rt.bundle import sha256
from elf_rt.errors import CheckpointError
from elf_rt.export.config import Shape, expected_shapes, find_settings, make_config, read_sizes
from elf_rt.export.layouts import WeightFile, find_weights, printable, read_weights
from elf_rt.export.variants import official_names, official_settings, split_statistics
from elf_rt.params import ModelConfig


@dataclass(frozen=True)
class Checkpoint:
    """A checked model: every tensor of `state` is there, finite, float32, contiguous and of the size in `config`."""

    path: Path  # the weight file
    sha256: str  # of that file
    weights: str  # "ema" | "raw"
    config: ModelConfig
    settings: dict[str, Any]  # the YAML mapping or the one in the file; empty where a released preset was taken
    statistics: np.ndarray | None  # (2, P, C) of the latents, per channel; None: config has one mean and deviation
    state: dict[str, torch.Tensor]


def load_checkpoint(source: str | Path, *, config: Path | None = None, raw: bool = False) -> Checkpoint:
    """Reads the checkpoint that `source` means: a file, a folder, or a Hub id `org/name[/sub]`.

    `config` names the YAML, where it does not lie beside the weights. `raw` takes the trained weights instead of
    their moving average.

    Raises:
        CheckpointError: the file is unreadable, unsafe or incomplete; the message lists every tensor at fault.
    """
    path, folders = find_weights(source)
    content = read_weights(path)
    tensors, head_gelu = official_names(_choose(content, raw, path))
    sizes = read_sizes(tensors)
    _check(tensors, expected_shapes(sizes), path)
    found = find_settings(folders, config)
    where, settings = found if found is not None else (path, official_settings(content.settings))
    settings, statistics = split_statistics(settings, where, tensors["proj_bias"].numel())
    model = dataclasses.replace(make_config(sizes, settings, where), head_gelu=head_gelu)
    return Checkpoint(
        path=path,
        sha256=sha256(path),
        weights="raw" if raw else "ema",
        config=model,
        settings=settings,
        statistics=statistics,
        state={
            name: tensor.detach().float().contiguous()
            for name, tensor in tensors.items()
            if model.self_cond or not name.startswith("self_cond_proj.")
        },
    )


def _choose(content: WeightFile, raw: bool, path: Path) -> Mapping[str, Any]:
    if raw and content.raw is None:
        raise CheckpointError(f"{path} holds only one set of weights (EMA): leave out --raw")
    if not raw and content.ema is None:
        raise CheckpointError(f"{path} holds no EMA weights: pass --raw to take the others")
    return (content.raw if raw else content.ema) or {}


def _check(tensors: Mapping[str, Any], shapes: Mapping[str, Shape], path: Path) -> None:
    """Raises one CheckpointError that lists every missing, unexpected, mis-shaped and non-finite tensor."""
    faults = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [printable(name) for name in tensors if name not in shapes],
        "not a plain tensor": [printable(name) for name in tensors if not _is_plain(tensors[name])],
    }
    plain = {name: tensors[name] for name in shapes if name in tensors and _is_plain(tensors[name])}
    wrong = {name: _mismatch(tensor, shapes[name]) for name, tensor in plain.items()}
    head_dim, hidden = (shapes[n][0] for n in ("blocks.0.attn.q_norm.weight", "final_layer.norm_final.weight"))
    if head_dim and hidden and (hidden % head_dim or head_dim % 2):
        wrong["blocks.0.attn.q_norm.weight"] = f"{head_dim}, which must be even and divide {hidden}"
    faults["mis-shaped"] = [f"{name} {text}" for name, text in wrong.items() if text]
    faults["not finite"] = [name for name, tensor in plain.items() if not torch.isfinite(tensor).all()]
    listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
    if listed:
        raise CheckpointError(f"{path} is not a whole ELF model: {listed}")


def _is_plain(value: Any) -> bool:
    """A dense float tensor on the CPU whose every element is stored (no stride trick that grows when copied)."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _mismatch(tensor: torch.Tensor, shape: Shape) -> str:
    fits = tensor.ndim == len(shape) and all(b is None or a == b for a, b in zip(tensor.shape, shape, strict=True))
    wanted = ", ".join("?" if n is None else str(n) for n in shape)
    return "" if fits else f"{tuple(tensor.shape)} for ({wanted})"
