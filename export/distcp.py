"""Folders of torch.distributed.checkpoint: `.metadata`, a pickle that says where each chunk lies, and `.distcp` files.

torch itself reads that pickle without restrictions. Here stand-ins take the place of the few classes that it may hold.
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch

from elf_rt.errors import CheckpointError
from elf_rt.export.foreign import AGAIN, printable, shown
from elf_rt.export.stored import FLOATS, Leaves, Stored, refuse_type
from elf_rt.export.torch_file import check_archive, unpickle

METADATA = ".metadata"
_WHOLE = (
    "merge it with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt` and give that"
)
_CHECKPOINT, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_CLASSES = {
    *(
        (_CHECKPOINT, name)
        for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")
    ),
    *((_CHECKPOINT, name) for name in ("BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    (_FILES, "_StorageInfo"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    ("pathlib._local", "PosixPath"),
    ("torch.serialization", "_get_layout"),
}

_TYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Record:
    """Stands in for a class of the metadata: its fields by name, its arguments and nothing else."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.args = tuple(state)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _Record
        if (module, name) in (("torch", "Size"), ("builtins", "tuple")):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def read_distcp(folder: Path) -> Stored:
    """Raises CheckpointError: the metadata is damaged or holds more than data, or a file is missing."""
    metadata = _read_metadata(folder / METADATA)
    try:
        kinds = dict(metadata.state_dict_metadata)
        chunks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in kinds}
        ends: dict[Path, int] = {}  # file -> where the last chunk in it ends
        for index, info in metadata.storage_data.items():
            chunks[index.fqn].append((index, info))
            file = _file(folder, info.relative_path)
            ends[file] = max(ends.get(file, 0), info.offset + info.length)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / METADATA} is damaged ({printable(error)}): {AGAIN}") from error
    for file, end in ends.items():
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {file.name}, which holds part of the weights: copy it too")
        if file.stat().st_size < end:
            raise CheckpointError(f"{file} is truncated: {AGAIN}")

    def read(name: str) -> Any:
        try:
            if not hasattr(kinds[name], "size"):
                return _stored(folder, *chunks[name][0]) if chunks[name] else None
            return _assemble(folder, name, kinds[name], chunks[name])
        except (AttributeError, IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: {printable(name)} is damaged ({printable(error)}): {AGAIN}") from error

    return Stored("torch.distributed.checkpoint", Leaves(kinds, read), (folder / METADATA, *sorted(ends)))


def _read_metadata(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks {METADATA}, which is written last: it is unfinished") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        if str(error).startswith("GLOBAL "):
            raise CheckpointError(
                f"{path} holds more than data ({printable(str(error)[7:])}) and was refused; nothing in it was run. "
                f"Where you trust it, {_WHOLE}"
            ) from error
        raise CheckpointError(f"{path} is damaged: {AGAIN}") from error
    except Exception as error:  # a damaged pickle can raise anything at all
        raise CheckpointError(f"{path} is damaged: {AGAIN}") from error
    return metadata


def _file(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{folder / METADATA} names a file outside its folder ({printable(name)}): refused")
    return folder / name


def _assemble(folder: Path, name: str, kind: Any, chunks: list[tuple[Any, Any]]) -> torch.Tensor:
    """One tensor from its chunks; what no chunk covers stays NaN, which no checkpoint may have."""
    size, dtype = tuple(kind.size), kind.properties.args[0]
    if dtype not in FLOATS:
        raise refuse_type(folder, name, str(dtype).removeprefix("torch."))
    held = sum(info.length for _, info in chunks)
    if math.prod(size) * dtype.itemsize > held:
        raise CheckpointError(f"{folder}: {printable(name)} is larger than its {len(chunks)} chunks: {AGAIN}")
    whole = torch.full(size, torch.nan, dtype=dtype)
    for index, info in chunks:
        part = _stored(folder, index, info)
        offset = tuple(index.offset or (0,) * len(size))
        place = tuple(slice(start, start + length) for start, length in zip(offset, part.shape, strict=True))
        if part.dtype != dtype or whole[place].shape != part.shape:
            raise CheckpointError(f"{folder}: a chunk of {printable(name)} does not fit into it: {AGAIN}")
        whole[place] = part
    return whole


def _stored(folder: Path, index: Any, info: Any) -> Any:
    """One chunk or object: a file of torch.save inside a .distcp file."""
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(f"{folder} is compressed ({shown(info.transform_descriptors)}): {_WHOLE}")
    with (folder / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        content = io.BytesIO(file.read(info.length))
    where = f"{folder / info.relative_path} ({printable(index.fqn)})"
    if content.read(2) == b"PK":
        check_archive(content, where)
    content.seek(0)
    return unpickle(content, where)
