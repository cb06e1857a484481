"""Files of torch.save: checked as archives, then read by torch's weights-only unpickler, which runs nothing in them."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from elf_rt.errors import CheckpointError, warn
from elf_rt.export.foreign import AGAIN, printable, refuse_other_kinds

_MEMBER = re.compile(
    r"(?P<root>.+?)/(?:(?P<pickle>data\.pkl)|data/(?P<storage>\d+)|version|byteorder"
    r"|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
_STORAGE_BYTES = {  # storage class -> bytes of an element
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
}


class Inert:
    """Stands in for every harmless object that a training run pickles beside its weights (numpy scalars, paths).

    The unpickler builds it instead of the real class, so that no code of another library runs on a file's bytes.
    """

    def __init__(self, *args: Any) -> None:
        pass

    def __new__(cls, *args: Any) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((Inert, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *((Inert, f"numpy.{core}.numeric._frombuffer") for core in ("core", "_core")),
    *((Inert, f"numpy.{name}") for name in ("dtype", "ndarray")),
    *((Inert, f"numpy.dtypes.{name}DType") for name in ("Float64", "Float32", "Int64", "Int32", "UInt32", "Bool")),
    *((Inert, name) for name in ("argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath")),
    *((Inert, f"pathlib.{name}") for name in ("Path", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *((Inert, f"deepspeed.runtime.{name}") for name in ("zero.config.ZeroStageEnum", "fp16.loss_scaler.LossScaler")),
    *((Inert, f"deepspeed.runtime.fp16.loss_scaler.{name}") for name in ("DynamicLossScaler", "LossScaleProfile")),
    *(
        (dict, f"{package}.AttributeDict")
        for package in ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data")
    ),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
]


def read_torch(path: Path) -> Any:
    """What torch.save wrote, its tensors mapped from disk.

    Raises:
        CheckpointError: the file is of another kind, is damaged, or holds anything but data.
    """
    head = refuse_other_kinds(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is a file of torch.save that is named .safetensors: rename it to .pt")
    zipped = head.startswith(b"PK")
    if zipped:
        with path.open("rb") as file:
            check_archive(file, path)
    elif all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        raise CheckpointError(f"{path} is a text file, not a checkpoint")
    elif head[257:262] == b"ustar":
        raise CheckpointError(f"{path} is a tar archive: unpack it first")
    return unpickle(path, path, mmap=zipped)  # files from before torch 1.6 cannot be mapped


def check_archive(file: IO[bytes], name: object) -> None:
    """Compares a zip of torch.save with its own checksums and with the sizes in its pickle, before torch reads it.

    Raises:
        CheckpointError: a member is damaged, short, named twice, compressed or of no use to torch.save.
    """
    damaged = f"{name} is truncated or damaged"
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_members(entries, name)
            if sum(entry.file_size for entry in entries) > file.seek(0, 2):
                raise CheckpointError(f"{name} holds members that share their bytes, which torch.save never writes")
            bad = None if _without_checksums(entries, name) else archive.testzip()
            if bad is not None:
                raise CheckpointError(f"{damaged} (the checksum of {printable(bad)} differs): {AGAIN}")
            _check_storages(archive, entries, name)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, EOFError) as error:  # ValueError: bad names
        raise CheckpointError(f"{damaged}: {AGAIN}") from error


def _check_members(entries: list[zipfile.ZipInfo], name: object) -> None:
    members = [_MEMBER.fullmatch(entry.filename) for entry in entries]
    pickles = {match["root"] for match in members if match and match["pickle"]}
    if not pickles:
        raise CheckpointError(f"{name} is a zip archive, but not one that torch.save wrote")
    if any(entry.filename.endswith(("/constants.pkl", ".py")) for entry in entries):
        raise CheckpointError(f"{name} is a TorchScript archive: save the state_dict() of its model with torch.save")
    names = [entry.filename for entry in entries]
    odd = [entry for entry, match in zip(entries, members, strict=True) if not match or match["root"] not in pickles]
    if len(pickles) > 1 or odd or len(set(names)) < len(names):
        twice = [member for member in names if names.count(member) > 1]
        more = printable(odd[0].filename if odd else twice[0] if twice else f"{len(pickles)} pickles")
        raise CheckpointError(f"{name} holds more than torch.save writes ({more}): refused, nothing in it was run")
    # torch.save stores without compression; only another writer's file can grow when it is read
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise CheckpointError(f"{name} is a compressed zip archive, which torch.save never writes: refused")


def _without_checksums(entries: list[zipfile.ZipInfo], name: object) -> bool:
    """torch.serialization.set_crc32_options(False) writes zeros."""
    absent = all(entry.CRC == 0 for entry in entries)
    if absent:
        warn(f"{name} was saved without checksums, so damage in its weights cannot be seen")
    return absent


def _check_storages(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], name: object) -> None:
    """A storage shorter than its pickle says would be filled up with the bytes that follow it in the file."""
    stored = {entry.filename.rpartition("/")[2]: entry.file_size for entry in entries if "/data/" in entry.filename}
    (pickled,) = (entry.filename for entry in entries if entry.filename.endswith("/data.pkl"))
    with archive.open(pickled) as file:
        walk = _StorageWalk(file)
        try:
            walk.load()
        except Exception:  # torch's unpickler says better what is wrong with it
            return
    short = [key for key, size in walk.sizes.items() if stored.get(key, 0) < size]
    if short:
        raise CheckpointError(f"{name} is truncated or damaged (its storage {printable(short[0])} is short): {AGAIN}")


class _Walked(Inert):
    """Inert, and takes what a container is given."""

    def append(self, item: Any) -> None:
        pass

    extend = append

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _StorageWalk(pickle.Unpickler):
    """Reads the sizes of the storages that a pickle names. Every class in it becomes `_Walked`: nothing runs."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Walked,), {"element": _STORAGE_BYTES.get(name, 1) if module == "torch" else 1})

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid
        self.sizes[str(key)] = int(count) * int(kind.element)
        return _Walked()


def unpickle(file: Path | IO[bytes], name: object, *, mmap: bool = False) -> Any:
    """The content of a torch.save file, by the weights-only unpickler.

    Raises:
        CheckpointError: it is damaged, or holds more than data.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|function <[\w-]+ (?:\w+ )?(\S+?)>", str(error))
        if found is None:
            raise CheckpointError(f"{name} is not a checkpoint, or is damaged: {AGAIN}") from error
        raise CheckpointError(
            f"{name} holds more than data ({printable(found[1] or found[2])}) and was refused; nothing in it was run. "
            "Where you trust it, save its state dict alone again"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything at all
        raise CheckpointError(f"{name} is not a checkpoint, or is damaged: {AGAIN}") from error
