"""Weights in one safetensors file, or in several files that an index names (Hugging Face's layouts)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from elf_rt.errors import CheckpointError
from elf_rt.export.foreign import MOST_INDEX, printable, read_json, refuse_other_kinds
from elf_rt.export.stored import FLOATS, Leaves, Stored, flatten, refuse_type
from elf_rt.export.torch_file import read_torch

INDEX = ".index.json"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")


def read_safetensors(path: Path) -> Stored:
    """One file. Raises CheckpointError: it is damaged or of another kind."""
    leaves, settings = _open_safetensors(path)
    return Stored("safetensors", leaves, (path,), settings)


def _open_safetensors(path: Path) -> tuple[Leaves, Mapping[str, Any]]:
    refuse_other_kinds(path)
    try:
        file = safe_open(path, framework="pt")
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping
        settings = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({printable(error)}): copy or download it again"
        ) from error

    def read(name: str) -> torch.Tensor:
        if kinds[name] not in FLOATS.values():
            raise refuse_type(path, name, kinds[name])
        return file.get_tensor(name)

    return Leaves(kinds, read), settings


def index_of(place: Path) -> Path | None:
    """The index of the sharded weights that `place` means: an index, a folder with one, or one of its parts."""
    if place.name.endswith(INDEX):
        return place
    if place.is_dir():
        found = sorted(place.glob(f"*{INDEX}"), key=lambda path: not path.name.endswith(f".safetensors{INDEX}"))
        return found[0] if found else None
    part = _PART.fullmatch(place.name)
    return place.with_name(f"{part['stem']}{part['suffix']}{INDEX}") if part else None


def parts_in(folder: Path) -> list[Path]:
    """Shards in a folder, with or without their index."""
    return sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name))


def read_sharded(place: Path) -> Stored:
    """Several files. Raises CheckpointError: one is missing or damaged, or the index names what is not there."""
    index = index_of(place)
    folder = place if place.is_dir() else place.parent
    # Where the index was not copied, the parts tell how many they are.
    named = _read_index(index) if index is not None and index.is_file() else _without_index(folder)
    files = tuple(sorted({folder / file for file in named.values()}))
    if gone := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(gone[:3])}, which hold part of the weights: copy them too")
    readers = {file.name: _open_part(file) for file in files}
    if absent := [name for name, file in named.items() if name not in readers[file]]:
        raise CheckpointError(f"{folder}: {named[absent[0]]} lacks {printable(absent[0])}, which its index names")
    kind = "safetensors" if files[0].suffix == ".safetensors" else "torch files"
    return Stored(f"{kind}, {len(files)} shards", Leaves(named, lambda name: readers[named[name]][name]), files)


def _read_index(index: Path) -> dict[str, str]:
    named = read_json(index, MOST_INDEX).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{index} has no weight_map, so it does not say where the weights are")
    for file in named.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"{index} names {printable(file)}, which is no weight file beside it: refused")
    return named


def _without_index(folder: Path) -> dict[str, str]:
    parts = parts_in(folder)
    match = _PART.fullmatch(parts[0].name)
    assert match is not None
    names = [f"{match['stem']}-{i + 1:05d}-of-{match['count']}{match['suffix']}" for i in range(int(match["count"]))]
    if gone := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(gone[:3])}, which hold part of the weights: copy them too")
    return {name: part for part in names for name in _open_part(folder / part)}


def _open_part(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)[0]
    content = read_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a mapping of weights")
    return flatten(content)
