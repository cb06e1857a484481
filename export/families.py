"""Public models whose checkpoints differ from the official code's: their names and settings in its terms.

- ELF-MMD, students of few steps and their teachers (github.com/yandex-research/dlm-mmd): a folder with `ckpt.pt`, a
  YAML, and, where its `latent_mean` names it, a file of statistics; `decoder_head_norm` in some.
- ELF-pytorch, the reproduction in Lightning (github.com/Ugness/ELF-pytorch), and what is derived from it, ELF on
  T5Gemma-2 embeddings (github.com/la0ka1/diffusing-scaled-text-embeddings, `{config, ema}`): the GELU of the token head
  is the exact one, which no tensor and no setting tells, but the name of the last norm does.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elf_rt.errors import CheckpointError
from elf_rt.export.foreign import printable
from elf_rt.export.hub import download
from elf_rt.export.layouts import read_stored
from elf_rt.export.settings import Settings

_REPRODUCTION_NORM = "final_layer.norm.weight"
_T5GEMMA_SETTINGS = {"max_length": "seq_len", "latent_mean": "mean", "latent_std": "std"}
_T5GEMMA_CONSTANTS = {"denoiser_noise_scale": 2.0, "denoiser_p_mean": -1.5, "denoiser_p_std": 0.8, "t_eps": 0.05}


def official_names(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The tensors under the official names, and the GELU of the head, as ``ModelConfig.head_gelu``."""
    if _REPRODUCTION_NORM not in tensors:
        return dict(tensors), "tanh"
    renamed = dict(tensors)
    renamed["final_layer.norm_final.weight"] = renamed.pop(_REPRODUCTION_NORM)
    return renamed, "none"


def official_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings found inside a checkpoint, with the official keys beside those of the T5Gemma-2 models."""
    if not all(key in settings for key in _T5GEMMA_SETTINGS.values()):
        return dict(settings)
    official = {key: settings[theirs] for key, theirs in _T5GEMMA_SETTINGS.items()}
    return dict(settings) | official | _T5GEMMA_CONSTANTS


def family_of(settings: Mapping[str, Any]) -> str:
    """Which presets a checkpoint's settings ask for: a key of ``presets.FAMILY_PRESETS``, or "" for none."""
    if _is_student(settings):
        return "ELF-MMD conditional" if settings.get("max_input_length") else "ELF-MMD"
    if settings.get("task") == "tinygsm":
        return "ELF on TinyGSM"
    encoder = str(settings.get("encoder", "")).lower()
    if "seq_len" in settings and ("t5gemma-2" in encoder or encoder.endswith(".pt")):
        distilled = "distilled" if "distilled" in encoder or encoder.endswith(".pt") else ""
        return f"{settings.get('model')}-T5Gemma2{distilled}"
    return ""


def _is_student(settings: Mapping[str, Any]) -> bool:
    """Whether a YAML is of ELF-MMD's post-training (MMD, or IRD after it), or samples by iterative refinement."""
    sampled = settings.get("sampling_configs")
    methods = [entry.get("sampling_method") for entry in sampled or () if isinstance(entry, Mapping)]
    named = Path(str(settings.get("sampling_configs_path") or "")).stem.startswith("elf-mmd")
    return settings.get("objective") in ("mmd", "ird") or "iterative_refinement" in methods or named


def split_statistics(settings: Settings, latent_dim: int) -> tuple[Settings, np.ndarray | None]:
    """Settings whose `latent_mean` is a number, and the statistics of the file that it named instead, if it did.

    The statistics are (2, P, C) float32: mean and deviation of each channel at position 0 .. P - 1; the last position
    stands for all that follow. They become a part of the bundle's encoder: the settings then have mean 0, deviation 1.

    Raises:
        CheckpointError: no such file, or it holds no statistics of `latent_dim` channels.
    """
    named = settings.get("latent_mean")
    if not isinstance(named, str) or _is_number(named):
        return settings, None
    tensors = read_stored(_statistics_file(named, settings.where)).leaves
    normalised = Settings({**settings.values, "latent_mean": 0.0, "latent_std": 1.0}, settings.where)
    return normalised, _statistics(tensors, named, latent_dim)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _statistics_file(named: str, where: Path) -> Path:
    """As ELF-MMD looks for it: a path here, or beside the YAML, or org/repo/path on the Hub."""
    for path in (Path(named), where.parent / named, where.parent / Path(named).name):
        if path.is_file():
            return path
    on_hub = re.fullmatch(r"(?:hf://)?([\w-][\w.-]*/[\w-][\w.-]*)/([\w-][\w./-]*)", named)
    if on_hub is None:
        raise CheckpointError(f"{where}: latent_mean is neither a number nor a file here: {printable(named)}")
    path = download(on_hub[1], [on_hub[2]]) / on_hub[2]
    if not path.is_file():
        raise CheckpointError(f"{where}: the Hub model {on_hub[1]} has no {on_hub[2]}, which latent_mean names")
    return path


def _statistics(tensors: Mapping[str, Any], named: str, latent_dim: int) -> np.ndarray:
    names = ["mean_pos0", "mean", "std_pos0", "std"] if "mean_pos0" in tensors else ["mean", "std"]
    rows = [tensors.get(name) for name in names]
    if not all(isinstance(row, torch.Tensor) and row.numel() == latent_dim for row in rows):
        raise CheckpointError(
            f"{printable(named)} must hold {', '.join(names)}, tensors of {latent_dim} channels each: "
            "it is not the file of statistics that this model was trained with"
        )
    statistics = np.stack([row.float().reshape(-1).numpy() for row in rows]).reshape(2, -1, latent_dim)  # type: ignore[union-attr]
    if not np.isfinite(statistics).all() or not (statistics[1] > 0).all():
        raise CheckpointError(f"{printable(named)}: every deviation must be above 0, and every number finite")
    return statistics
