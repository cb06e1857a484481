"""Every error that elf-rt raises on purpose: one clear line that says how to mend it. And its warnings."""

import sys
import warnings


class ElfError(Exception):
    """Base class. The command line prints it as one line and exits with code 1."""


class CheckpointError(ElfError):
    """A checkpoint or its config cannot be read, or does not describe an ELF model."""


class BundleError(ElfError):
    """A bundle is missing, incomplete, altered, or of a newer schema."""


class BackendError(ElfError):
    """An engine library is absent, or refused the model."""


class GpuMemoryError(BackendError):
    """GPU memory ran out: the same may work with less in it."""


class InputError(ElfError, ValueError):
    """A value given by the caller is out of range; the message names the valid ones."""


# How libraries, and what loads them, say that the machine has no memory left. What a GPU lacks is GpuMemoryError's.
_NO_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "failed to allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "failed to map segment",
    "can't allocate",
    "can't start new thread",
)
LESS_MEMORY = "ask for fewer texts at once or a shorter length, or use a machine with more"


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: the first, and where colons lead further, the one that they lead to.
    With what helps, where memory ran out."""
    lines = str(error).splitlines() or [type(error).__name__]
    if lines[0].endswith(":"):
        lines[0] += f" {next((line for line in lines[1:] if not line.endswith(':')), lines[-1])}"
    return _with_remedy(lines[0], error)


def last_line(error: BaseException) -> str:
    """The same of a library that says what it was doing first, and the cause last."""
    return _with_remedy((str(error).strip() or type(error).__name__).splitlines()[-1], error)


def lack_of_memory(error: BaseException | None) -> BaseException | None:
    """The error, or the one behind it, that says that memory ran out; None where none does."""
    while error is not None and not _says_no_memory(error):
        error = error.__cause__ or error.__context__
    return error


def _with_remedy(line: str, error: BaseException) -> str:
    return f"memory ran out ({line}): {LESS_MEMORY}" if _says_no_memory(error) else line


def _says_no_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY)


def warn(message: str) -> None:
    """Warn at the line outside of elf_rt that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "elf_rt":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
