"""`load_checkpoint`: any trained ELF checkpoint to float32 tensors, their sizes and their settings."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elf_rt.errors import CheckpointError, warn
from elf_rt.export.config import USED, TensorShape, active_depth, expected_shapes, make_config, read_sizes
from elf_rt.export.families import official_names, official_settings, split_statistics
from elf_rt.export.foreign import few, printable
from elf_rt.export.layouts import read_stored, step_of
from elf_rt.export.settings import Settings, find_settings
from elf_rt.export.sources import find_source
from elf_rt.export.stored import FLOATS, refuse_type
from elf_rt.export.weights import choose, is_unused
from elf_rt.files import sha256
from elf_rt.params import ModelConfig

_NAMES_OF_KINDS = {"ema": "EMA weights", "raw": "raw weights", "unknown": "weights of unknown kind (EMA or raw)"}


@dataclass(frozen=True)
class Checkpoint:
    """A checked model: every tensor of `state` is there, finite, float32, contiguous and of the size in `config`."""

    path: Path  # the file, or the folder where the layout has several
    folders: tuple[Path, ...]  # folders that it lies in: two, where a link leads to it
    sha256: str  # sha256 of the file; for several files, of their names and sums
    layout: str  # how it was kept
    step: int | None  # training step, where the checkpoint tells it
    weights: str  # "ema" | "raw" | "unknown": what the checkpoint proves
    config: ModelConfig
    settings: Settings  # of the YAML, or in the file; without values where a released preset was taken
    settings_from: Path | None  # the YAML
    statistics: np.ndarray | None  # (2, P, C) of the latents, per channel; None: config has one mean and deviation
    state: dict[str, torch.Tensor]

    @property
    def ignored(self) -> list[str]:
        """Fields of the config that have no meaning here."""
        return [printable(name) for name in self.settings.values if name not in USED]

    @property
    def folder(self) -> Path:
        """Where its tokenizer and encoder lie, if anywhere."""
        kept = (
            f for f in self.folders if any((f / name).exists() for name in ("tokenizer.json", "encoder.safetensors"))
        )
        return next(kept, self.folders[0])

    @property
    def summary(self) -> str:
        """What was found, in one line."""
        step = "" if self.step is None else f", step {self.step}"
        return f"{self.layout}, {_NAMES_OF_KINDS[self.weights]}{step}, sha256 {self.sha256[:12]}…"


def load_checkpoint(source: str | Path, *, config: Path | None = None, raw: bool = False) -> Checkpoint:
    """Reads the checkpoint that `source` means: a file, a folder, or a Hub id `org/name[/sub]`.

    `config` names the YAML, where it does not lie beside the weights. `raw` takes the trained weights instead of
    their moving average.

    Raises:
        CheckpointError: the file is unreadable, unsafe or incomplete; the message lists every tensor at fault.
    """
    found = find_source(source)
    path = found.place
    stored = read_stored(path)
    chosen = choose(stored, raw, path)
    tensors, head_gelu = official_names({name: stored.leaves[leaf] for name, leaf in chosen.names.items()})
    inside = Settings(official_settings(stored.settings), path)
    settings = find_settings(found.folders, found.around, inside, config)
    tensors, sizes = _active_blocks(tensors, settings)
    shapes = expected_shapes(sizes)
    tensors = _needed(tensors, shapes, path)
    _check(tensors, shapes, path)
    settings, statistics = split_statistics(settings, tensors["proj_bias"].numel())
    model = dataclasses.replace(make_config(sizes, settings), head_gelu=head_gelu)
    return Checkpoint(
        path=path,
        folders=found.folders,
        sha256=_fingerprint(stored.files, path),
        layout=stored.layout,
        step=step_of(stored, path),
        weights=chosen.kind,
        config=model,
        settings=settings,
        settings_from=settings.where if settings.where != path else None,
        statistics=statistics,
        state={
            name: tensor.detach().float().contiguous()
            for name, tensor in tensors.items()
            if model.self_cond or not name.startswith("self_cond_proj.")
        },
    )


def _active_blocks(tensors: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], dict[str, int | None]]:
    """The tensors of the blocks that run, and all others; their sizes."""
    sizes = read_sizes(tensors)
    active = active_depth(sizes, settings)
    left_out = tuple(f"blocks.{block}." for block in range(active, sizes["depth"] or 0))
    return {name: value for name, value in tensors.items() if not name.startswith(left_out)}, sizes | {"depth": active}


def _needed(tensors: Mapping[str, Any], shapes: Mapping[str, TensorShape], path: Path) -> dict[str, Any]:
    """Without the tensors that training kept beside the network, which are told in a warning."""
    unused = [name for name in tensors if name not in shapes and is_unused(name)]
    heads = [name for name in unused if isinstance(tensors[name], torch.Tensor) and tensors[name].ndim > 0]
    if heads:
        warn(f"{path} holds tensors that inference does not need, left out: {few(heads)}")
    return {name: value for name, value in tensors.items() if name not in unused}


def _fingerprint(files: Iterable[Path], path: Path) -> str:
    """The sha256 of the only file; of several, that of the text `sha256  name` for each."""
    sums = {file: sha256(file) for file in files}
    if list(sums) == [path]:
        return sums[path]
    root = path if path.is_dir() else path.parent
    lines = (f"{value}  {file.relative_to(root).as_posix()}\n" for file, value in sums.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check(tensors: Mapping[str, Any], shapes: Mapping[str, TensorShape], path: Path) -> None:
    """Raises one CheckpointError that lists every missing, unexpected, mis-shaped and non-finite tensor."""
    faults = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [printable(name) for name in tensors if name not in shapes],
        "not a plain tensor": [printable(name) for name in tensors if not torch.is_tensor(tensors[name])],
    }
    plain = {name: tensors[name] for name in shapes if torch.is_tensor(tensors.get(name))}
    for name, tensor in plain.items():
        if tensor.dtype not in FLOATS:
            raise refuse_type(path, name, str(tensor.dtype).removeprefix("torch."))
    wrong = {name: _mismatch(tensor, shapes[name]) for name, tensor in plain.items()}
    head_dim, hidden = (shapes[n][0] for n in ("blocks.0.attn.q_norm.weight", "final_layer.norm_final.weight"))
    if head_dim and hidden and (hidden % head_dim or head_dim % 2):
        wrong["blocks.0.attn.q_norm.weight"] = f"{head_dim}, which must be even and divide {hidden}"
    faults["mis-shaped"] = [f"{name} {text}" for name, text in wrong.items() if text]
    faults["not finite"] = [name for name, tensor in plain.items() if not torch.isfinite(tensor).all()]
    listed = "; ".join(f"{kind}: {few(names)}" for kind, names in faults.items() if names)
    if listed:
        raise CheckpointError(f"{path} is not a whole ELF model: {listed}")


def _mismatch(tensor: torch.Tensor, shape: TensorShape) -> str:
    fits = tensor.ndim == len(shape) and all(b is None or a == b for a, b in zip(tensor.shape, shape, strict=True))
    wanted = ", ".join("?" if n is None else str(n) for n in shape)
    return "" if fits and tensor.numel() else f"{tuple(tensor.shape)} for ({wanted})"
