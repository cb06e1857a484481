"""Arrays in files, .npy and .npz: what numpy makes of a damaged one, or takes memory for, is told in a line of ours."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from elf_rt.errors import BundleError, ElfError, InputError, first_line

# Arrays may be so many times larger than their archive, beyond SPARED_BYTES: noise does not shrink.
MOST_SHRINKING = 16
SPARED_BYTES = 1 << 26


def open_table(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The table of finite float16 or float32 numbers in a .npy file, mapped and not read.

    Raises:
        BundleError: the file holds something else.
    """
    with _as_errors(BundleError, f"{path} is no table of numbers"):
        table = np.lib.format.open_memmap(path, mode="r")
    kind, size = f"{table.dtype} of shape {table.shape}", path.stat().st_size
    if table.dtype not in (np.float16, np.float32) or table.shape != shape:
        raise BundleError(f"{path} must hold float16 or float32 of shape {shape}, not {kind}: export again")
    if size != table.offset + table.nbytes:
        raise BundleError(f"{path} has {size} bytes, {kind} take {table.offset + table.nbytes}: export again")
    if not np.isfinite([table.min(), table.max()]).all():  # both are NaN where one item is
        raise BundleError(f"{path} holds numbers that are not finite: export the checkpoint again")
    return table


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file.

    Raises:
        InputError: it is no such file, or its arrays would take far more memory than the file has bytes.
    """
    what = f"{path} is no .npz file of arrays, or damaged"
    with _as_errors(InputError, what), zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
    if total > SPARED_BYTES + MOST_SHRINKING * path.stat().st_size:
        raise InputError(f"{path} would grow to {total / 1e9:.1f} GB in memory: it is no file of recorded runs")
    with _as_errors(InputError, what), np.load(path) as members:
        arrays = dict(members)
        if len(arrays) < len(members.files) or not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("a member is no array, or there twice")
    return arrays


@contextmanager
def _as_errors(kind: type[ElfError], what: str) -> Iterator[None]:
    """What numpy, zipfile and Python's parser, which reads headers, say of a file."""
    try:
        yield
    except FileNotFoundError as error:
        raise BundleError(f"no file at {error.filename}") from error
    except MemoryError as error:  # of a header that claims more than the file holds
        raise kind(f"{what} (its arrays need more memory than there is)") from error
    except Exception as error:  # they have no common base
        raise kind(f"{what} ({type(error).__name__}: {first_line(error)})") from error
