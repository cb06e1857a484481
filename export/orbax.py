"""Orbax checkpoints, which the official JAX code writes, read by tensorstore alone.

A folder `checkpoint_<step>/` holds one zarr array a leaf: in a database (OCDBT), or in a folder of its own as older
versions wrote. `_METADATA` lists the leaves. Only the arrays that are asked for are read, never the optimizer's.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from elf_rt.errors import CheckpointError
from elf_rt.export.foreign import AGAIN, MOST_INDEX, printable, read_json
from elf_rt.export.stored import FLOATS, Leaves, Stored, refuse_type

LISTING, DATABASE = "_METADATA", "manifest.ocdbt"
_MARKS = (LISTING, "_CHECKPOINT_METADATA", DATABASE, "_sharding")
_ITEMS = ("default", "state", "train_state", "model", "params")  # what a CheckpointManager calls the folder of arrays
_HEADERS = {"/.zarray": "zarr", "/zarr.json": "zarr3"}  # file that starts an array -> tensorstore's driver
_TYPES = {*(str(kind).removeprefix("torch.") for kind in FLOATS), "int32", "int64", "uint32"}  # integers: the step
MOST_ELEMENTS = 1 << 31  # elements of one array; the largest of ELF-L has 16 million
_UNFINISHED = re.compile(r".*\.orbax-checkpoint-tmp(-\d+)?")
_BLOCK = re.compile(r"(?:^|(?<=\.))(blocks)_(\d+)(?=\.)")


def is_orbax(folder: Path) -> bool:
    """Orbax's own files, or the arrays that its oldest versions wrote without any of them."""
    marks = (*_MARKS, *(f"{item}/{LISTING}" for item in _ITEMS))
    if any((folder / mark).is_file() for mark in marks) or _UNFINISHED.fullmatch(folder.name):
        return True
    return any(next(folder.glob(f"*{header}"), None) for header in _HEADERS)


def read_orbax(folder: Path) -> Stored:
    """Names become those of a state dict: `blocks_0.….kernel` is the transpose of `blocks.0.….weight`.

    Raises:
        CheckpointError: tensorstore is absent, the checkpoint is unfinished or damaged; the message names the leaf.
    """
    if _UNFINISHED.fullmatch(folder.name):
        raise CheckpointError(f"{folder} is an Orbax checkpoint that was never finished: take an earlier one")
    folder = _item(folder).absolute()
    arrays = _Arrays(folder)
    listing = _listing(folder)
    if gone := [leaf for leaf in listing.leaves if leaf not in arrays.drivers]:
        raise CheckpointError(f"{folder} lacks the leaf {printable(gone[0])}: the checkpoint is unfinished: {AGAIN}")
    if not arrays.drivers:
        raise CheckpointError(f"{folder} is an Orbax checkpoint without arrays, so it was never finished: {AGAIN}")
    paths = {_torch_name(leaf): leaf for leaf in arrays.drivers}

    def read(name: str) -> Any:
        leaf = paths[name]
        array = arrays.read(leaf, whole=listing.stores_zeros)
        return array.T.contiguous() if leaf.endswith(".kernel") and array.ndim == 2 else array

    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    kind = "OCDBT" if arrays.in_database else "a folder a leaf"
    return Stored(f"Orbax (JAX), {kind}", Leaves(paths, read), files)


def _item(folder: Path) -> Path:
    """Where the arrays lie: the folder, or in it the only item that a CheckpointManager wrote."""
    if (folder / LISTING).is_file() or (folder / DATABASE).is_file():
        return folder
    items = [child for child in folder.iterdir() if child.is_dir() and (child / LISTING).is_file()]
    if len(items) > 1:
        names = ", ".join(sorted(printable(item.name) for item in items))
        raise CheckpointError(f"{folder} holds several items ({names}): give the one that holds the weights")
    return items[0] if items else folder


def _torch_name(leaf: str) -> str:
    name = _BLOCK.sub(r"\1.\2", leaf)
    return f"{name.removesuffix('.kernel')}.weight" if name.endswith(".kernel") else name


class _Listing(NamedTuple):
    """What `_METADATA` says: the leaves, and whether arrays of zeros are stored (older versions leave them out)."""

    leaves: list[str]
    stores_zeros: bool


def _listing(folder: Path) -> _Listing:
    path = folder / LISTING
    if not path.is_file():
        return _Listing([], False)
    content = read_json(path, MOST_INDEX)
    try:
        leaves = [
            ".".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in content["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] not in ("None", "Dict", "List", "scalar", "string")
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({printable(error)}): {AGAIN}") from error
    return _Listing(leaves, content.get("store_array_data_equal_to_fill_value") is True)


class _Arrays:
    """The zarr arrays of a folder, each by the path of its leaf."""

    def __init__(self, folder: Path) -> None:
        try:
            import tensorstore
        except ImportError as error:
            raise CheckpointError(
                f"{folder} is an Orbax checkpoint (JAX), which needs tensorstore: pip install 'elf-rt[orbax]'"
            ) from error
        self._ts = tensorstore
        self._folder = folder
        self.in_database = (folder / DATABASE).is_file()
        keys = self._keys()
        self.drivers = {
            key.removesuffix(header): driver
            for key in keys
            for header, driver in _HEADERS.items()
            if key.endswith(header)
        }
        self._chunks: dict[str, int] = dict.fromkeys(self.drivers, 0)
        for key in keys:
            leaf = key.split("/")[0]
            if leaf in self._chunks and not key.endswith(tuple(_HEADERS)):
                self._chunks[leaf] += 1

    def _base(self) -> dict[str, Any]:
        base = {"driver": "file", "path": f"{self._folder}/"}
        return {"driver": "ocdbt", "base": base} if self.in_database else base

    def _keys(self) -> list[str]:
        try:
            listed = self._ts.KvStore.open(self._base()).result().list().result()
            return [key.decode() for key in listed]
        except (ValueError, RuntimeError, OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self._folder} is damaged ({_first(error)}): {AGAIN}") from error

    def read(self, leaf: str, *, whole: bool) -> torch.Tensor:
        """One array. `whole`: every chunk must be there, because those of zeros are stored too."""
        store = self._base()
        store = {**store, "path": f"{store['path']}{leaf}/" if "path" in store else f"{leaf}/"}
        try:
            array = self._ts.open({"driver": self.drivers[leaf], "kvstore": store}, open=True, read=True).result()
            self._check(leaf, array, whole)
            values = array.read().result()
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            raise CheckpointError(
                f"{self._folder}: the leaf {printable(leaf)} is damaged ({_first(error)}): {AGAIN}"
            ) from error
        if values.dtype.name == "bfloat16":  # numpy and torch share no such type
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.ascontiguousarray(values).reshape(values.shape))

    def _check(self, leaf: str, array: Any, whole: bool) -> None:
        kind = array.dtype.name
        if kind not in _TYPES:
            raise refuse_type(self._folder, leaf, kind)
        chunk_shape = array.chunk_layout.write_chunk.shape or ()
        chunks = math.prod(math.ceil(n / c) for n, c in zip(array.shape, chunk_shape, strict=True))
        if self._chunks[leaf] < chunks and (whole or self._chunks[leaf] or array.shape == ()):
            raise CheckpointError(
                f"{self._folder}: the leaf {printable(leaf)} has {self._chunks[leaf]} of its {chunks} chunks, so the "
                f"checkpoint is unfinished or damaged: {AGAIN}"
            )
        if math.prod(array.shape) > MOST_ELEMENTS:
            raise CheckpointError(f"{self._folder}: the leaf {printable(leaf)} claims the shape {array.shape}: damaged")


def _first(error: BaseException) -> str:
    """tensorstore's reason without the specification that follows it."""
    return printable(" ".join(str(error).split(" [")[0].split())[:300])
