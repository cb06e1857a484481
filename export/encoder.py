"""The text side of a bundle: the source encoder (an embedding table, a T5 or a GPT-2), and the tokenizer beside it."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elf_rt.errors import CheckpointError
from elf_rt.export.foreign import few, printable, read_json
from elf_rt.export.gpt2 import GPT2Sizes
from elf_rt.export.graph import normalised, positions
from elf_rt.export.graph_builder import GraphBuilder, WeightFile
from elf_rt.export.hub import download
from elf_rt.export.layouts import is_sharded, read_stored
from elf_rt.export.precision import Precision
from elf_rt.export.settings import Settings
from elf_rt.export.stored import FLOATS, refuse_type
from elf_rt.export.t5 import T5Sizes
from elf_rt.export.tokenizer import BYTE_LEVEL, is_byte_level
from elf_rt.libraries import import_library

TABLE = "embedding.weight"
OPSET = 20  # the first with Gelu; every engine reads it
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # T5's own names have no organisation: t5-small
_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "spiece.model"]
_HUB_FILES = ["config.json", "model.safetensors", *_TOKENIZER_FILES]
_OTHER_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"]
_MASKS = re.compile(r"\.attn\.(masked_)?bias$")  # GPT-2's causal masks, which older files keep beside the weights


def write_encoder(
    folder: Path,
    source: str | Path,
    *,
    latent_dim: int,
    vocab_size: int = 0,
    max_length: int = 0,
    statistics: np.ndarray | None = None,
) -> dict[str, Any]:
    """Writes the encoder into the bundle `folder` and returns its manifest entry: kind, files, source, vocab_size.

    `source` is a safetensors file with `embedding.weight` (V, C), or the folder or Hub id of a T5 or GPT-2 in
    Hugging Face's layout. The runtime normalises the latents with latent_mean and latent_std; `statistics`
    (2, P, C) of each channel (``elf_rt.export.families``) become a part of the encoder itself.

    Raises:
        CheckpointError: no such encoder, another architecture, damaged weights, another width than the model's
            `latent_dim`, fewer rows than `vocab_size` tokens, or fewer positions than `max_length`.
    """
    root = _local(source)
    if root.is_file():
        entry = _write_table(folder, root, latent_dim, vocab_size, statistics)
    else:
        entry = _write_network(folder, root, latent_dim, vocab_size, max_length, statistics)
    return entry | {"source": printable(Path(source).name if Path(source).exists() else source)}


def _local(source: str | Path, files: list[str] = _HUB_FILES) -> Path:
    """A file or folder here; of a Hub id, these files are downloaded."""
    if Path(source).exists():
        return Path(source)
    if not _HUB_NAME.fullmatch(str(source)):
        raise CheckpointError(f"no such encoder: {source}")
    root = download(str(source), files)
    if files is _HUB_FILES and not (root / "model.safetensors").is_file():
        download(str(source), _OTHER_WEIGHTS)  # T5 1.1 is there in torch's own format alone; large ones are sharded
    return root


def _write_table(
    folder: Path, path: Path, latent_dim: int, vocab_size: int, statistics: np.ndarray | None
) -> dict[str, Any]:
    table = read_stored(path).leaves.get(TABLE)
    if not isinstance(table, torch.Tensor) or table.ndim != 2:
        raise CheckpointError(f"{path} has no table {TABLE} (V, C)")
    if table.dtype not in FLOATS:
        raise refuse_type(path, TABLE, str(table.dtype).removeprefix("torch."))
    if table.dtype not in (torch.float16, torch.float32):
        table = table.float()  # numpy has no bfloat16
    _check_width(path, table.shape[1], latent_dim)
    _check_rows(path, table.shape[0], vocab_size)
    if not torch.isfinite(table).all():
        raise CheckpointError(f"{path}: {TABLE} is not finite")
    if statistics is not None:
        mean, std = (torch.from_numpy(rows) for rows in statistics)
        if len(mean) > 1:
            raise CheckpointError(f"{path}: a table cannot have statistics of its own for position 0 (mean_pos0)")
        table = (table.float() - mean) / std
    np.save(folder / "embedding.npy", table.numpy())
    return {"kind": "embedding", "files": {"table": "embedding.npy"}, "vocab_size": table.shape[0]}


def _write_network(
    folder: Path, root: Path, latent_dim: int, vocab_size: int, max_length: int, statistics: np.ndarray | None
) -> dict[str, Any]:
    config = _read_config(root)
    sizes = GPT2Sizes.read(config, root) if config.get("model_type") == "gpt2" else T5Sizes.read(config, root)
    _check_width(root, sizes.d_model, latent_dim)
    _check_rows(root, sizes.vocab_size, vocab_size)
    if isinstance(sizes, GPT2Sizes) and sizes.n_positions < max_length:
        raise CheckpointError(f"{root} has {sizes.n_positions} positions, fewer than the model's {max_length}")
    path = _weights_of(root)
    stored = read_stored(path).leaves
    paths = {name.removeprefix("transformer."): name for name in stored}
    if "shared.weight" not in paths and "encoder.embed_tokens.weight" in paths:
        paths["shared.weight"] = paths["encoder.embed_tokens.weight"]
    shapes = sizes.shapes()
    tensors = {name: stored[paths[name]] for name in shapes if name in paths}
    _check_network(path, tensors, shapes, paths)
    _write_graph(folder, sizes, {name: tensors[name].float().numpy() for name in shapes}, statistics)
    _prove(folder, sizes)
    files = {"encoder": "encoder.onnx", "weights": "encoder.bin"}
    return {"kind": "onnx", "files": files, "vocab_size": sizes.vocab_size}


def _write_graph(
    folder: Path, sizes: T5Sizes | GPT2Sizes, state: Mapping[str, np.ndarray], statistics: np.ndarray | None
) -> None:
    """Writes encoder.onnx and its weights, encoder.bin: ids, mask (B, S) int64 -> latents (B, S, C) float32.

    `state` holds the float32 arrays that `sizes.shapes()` names; `statistics` are those of ``graph.normalised``.
    """
    with WeightFile(folder / "encoder.bin") as weights:
        g = GraphBuilder("encoder", OPSET, weights)
        ids, mask = g.integer_input("ids", ("rows", "length")), g.integer_input("mask", ("rows", "length"))
        position = positions(g, ids)  # (S,)
        latents = normalised(g, sizes.latents(g, state, ids, mask, position), position, statistics)
        g.output(latents, "latents", ("rows", "length", sizes.d_model))
        g.save(folder / "encoder.onnx", {"precision": Precision.FP32.value})


def _weights_of(root: Path) -> Path:
    """The weights in Hugging Face's layout: one file, or the folder where there are several."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (root / name).is_file():
            return root / name
    if is_sharded(root):
        return root
    raise CheckpointError(
        f"{root} has no model.safetensors: save it with transformers (T5EncoderModel or GPT2Model, save_pretrained)"
    )


def _check_network(
    path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]
) -> None:
    """Raises one CheckpointError that lists what is missing, mis-shaped or not finite, and layers that nobody named."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in FLOATS:
            raise refuse_type(path, name, str(getattr(tensor, "dtype", "no tensor")).removeprefix("torch."))
    layers = [name for name in names if name.startswith(("encoder.block.", "h.")) and name not in shapes]
    faults = {
        "missing": [name for name in shapes if name not in tensors],
        "more layers than config.json says": [name for name in layers if not _MASKS.search(name)],
        "mis-shaped": [
            f"{name} {tuple(tensor.shape)} for {shapes[name]}"
            for name, tensor in tensors.items()
            if tuple(tensor.shape) != shapes[name]
        ],
        "not finite": [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()],
    }
    listed = "; ".join(f"{kind}: {few(found)}" for kind, found in faults.items() if found)
    if listed:
        raise CheckpointError(f"{path} is not the encoder that its config.json describes: {listed}")


def _read_config(root: Path) -> Mapping[str, Any]:
    path = root / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{root} has no config.json, so it is not an encoder in Hugging Face's layout")
    return read_json(path)


def _check_width(where: Path, width: int, latent_dim: int) -> None:
    if width != latent_dim:
        raise CheckpointError(
            f"{where} is {width} wide, the checkpoint's latents are {latent_dim}: name the encoder it was trained with"
        )


def _check_rows(where: Path, rows: int, vocab_size: int) -> None:
    if rows < vocab_size:
        raise CheckpointError(f"{where} knows {rows} tokens, fewer than the {vocab_size} of the tokenizer")


def _prove(folder: Path, sizes: T5Sizes | GPT2Sizes) -> None:
    """Runs the written graph once: what an engine refuses, or what overflows, must not reach a bundle."""
    ids = np.arange(2 * 7, dtype=np.int64).reshape(2, 7) % sizes.vocab_size
    mask = np.ones_like(ids)
    mask[1, 3:] = 0
    latents = run_encoder(folder / "encoder.onnx", ids, mask)
    if latents.shape != (2, 7, sizes.d_model) or not np.isfinite(latents).all():
        raise CheckpointError("the encoder's latents are not finite: its weights are damaged")


def run_encoder(path: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """ids and mask (B, S) int64 -> latents (B, S, C) of an encoder.onnx, in ONNX Runtime."""
    session = import_library("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (latents,) = session.run(None, {"ids": ids, "mask": mask})
    return np.asarray(latents)


def encoder_beside(folder: Path, settings: Settings) -> str | None:
    """The encoder that lies in a checkpoint's folder, or the one that its YAML names."""
    table = folder / "encoder.safetensors"
    named = settings.get("encoder_model_name")
    if table.is_file():
        return str(table)
    if isinstance(named, str) and (folder / named).is_dir():
        return str(folder / named)
    return named if isinstance(named, str) and named != "embedding" else None


def find_tokenizer(checkpoint_folder: Path, encoder_source: str | Path | None, *, alone: bool = False) -> Path | None:
    """The tokenizer.json beside the checkpoint, else beside the encoder or in its Hub snapshot; None: there is none.

    Args:
        alone: nothing else of the encoder will be wanted, so nothing else is downloaded.

    Raises:
        CheckpointError: there is only a SentencePiece model, which must be converted first; or the Hub is out of reach.
    """
    folders = [checkpoint_folder]
    if encoder_source is not None and not (checkpoint_folder / "tokenizer.json").is_file():
        root = _local(encoder_source, _TOKENIZER_FILES if alone else _HUB_FILES)
        folders.append(root.parent if root.is_file() else root)
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    for folder in folders:
        if is_byte_level(folder / BYTE_LEVEL):
            return folder / BYTE_LEVEL
    for folder in folders:
        if (folder / "spiece.model").is_file():
            raise CheckpointError(
                f"{folder} has spiece.model but no tokenizer.json: convert it with transformers, "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
    return None
