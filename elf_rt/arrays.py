"""Arrays in files, .npy and .npz: headers are read and checked before memory is taken for what they promise."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np

from elf_rt.errors import BundleError, ElfError, InputError, first_line

MOST_HEADER_BYTES = 10_000
# Arrays may be so many times larger than their archive, beyond SPARED_BYTES: noise does not shrink.
MOST_SHRINKING = 16
SPARED_BYTES = 1 << 26
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class Header:
    """Of an array in a file. offset: bytes before its data."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_header(file: IO[bytes]) -> Header:
    """Raises ValueError: these are not the bytes of an array of numbers or text in C order."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"version {version} of the format")
    try:
        shape, fortran, dtype = HEADERS[version](file, max_header_size=MOST_HEADER_BYTES)
    except (SyntaxError, TokenError, RecursionError, MemoryError, TypeError) as error:  # of Python's parser, by numpy
        raise ValueError(f"a header that is none ({type(error).__name__})") from None
    if fortran and len(shape) > 1:
        raise ValueError("columns first")
    if dtype.hasobject or dtype.names is not None or any(size < 0 for size in shape):
        raise ValueError(f"items of type {dtype}")
    return Header(shape, dtype, file.tell())


def open_table(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The table of finite float16 or float32 numbers in a .npy file, mapped and not read.

    Raises:
        BundleError: the file holds something else.
    """
    with _as_errors(BundleError, f"{path} is no table of numbers"), path.open("rb") as file:
        header = read_header(file)
    kind = f"{header.dtype} of shape {header.shape}"
    if header.dtype not in (np.float16, np.float32) or header.shape != shape:
        raise BundleError(f"{path} must hold float16 or float32 of shape {shape}, not {kind}: export again")
    if path.stat().st_size != header.num_bytes:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, {kind} take {header.num_bytes}: export again")
    table = np.memmap(path, header.dtype, "r", header.offset, shape)
    if not np.isfinite([table.min(), table.max()]).all():  # both are NaN where one item is
        raise BundleError(f"{path} holds numbers that are not finite: export the checkpoint again")
    return table


class Archive:
    """A .npz file. Its headers are read and checked when it is opened, its arrays when they are asked for.

    Raises:
        InputError: it is no such file, or its arrays would take far more memory than the file has bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, Header] = {}
        with self._errors(), zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    header = read_header(file)
                if name in self.headers or name == member.filename or header.num_bytes != member.file_size:
                    raise ValueError(f"{member.filename} is not one whole array")
                self.headers[name] = header
        total = sum(header.num_bytes for header in self.headers.values())
        if total > SPARED_BYTES + MOST_SHRINKING * path.stat().st_size:
            raise InputError(f"{path} would grow to {total / 1e9:.1f} GB in memory: it is no file of recorded runs")

    def read(self) -> dict[str, np.ndarray]:
        with self._errors(), np.load(self.path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in self.headers}

    def _errors(self) -> AbstractContextManager[None]:
        return _as_errors(InputError, f"{self.path} is no .npz file of arrays, or damaged")


@contextmanager
def _as_errors(kind: type[ElfError], what: str) -> Iterator[None]:
    """What numpy and zipfile say of a file, in one line of ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise BundleError(f"no file at {error.filename}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise kind(f"{what} ({type(error).__name__}: {first_line(error)})") from error
