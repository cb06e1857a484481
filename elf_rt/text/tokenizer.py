"""A tokenizer.json: checked before the library reads it, and every call to the library behind one guard.

The library (https://github.com/huggingface/tokenizers) panics on some files, which Python sees as an exception that is
no ``Exception``, and takes memory without bound for others.
"""

import base64
import binascii
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elf_rt.errors import InputError, first_line

MOST_BYTES = 1 << 28
PANIC = "PanicException"  # pyo3's class cannot be imported, so its name tells it


class TextTokenizer:
    """A tokenizer as it was trained, but for what belongs to training alone: padding, cutting and dropout are off.

    Args:
        content: the JSON, where it is not that of the file.

    Raises:
        InputError: the file is no tokenizer.
    """

    def __init__(self, path: Path, content: str | None = None) -> None:
        from tokenizers import Tokenizer

        self.path = path
        content = _checked(path, content)
        with self._guard("is not a tokenizer.json"):
            self._library = Tokenizer.from_str(content)
            self._library.no_padding()
            self._library.no_truncation()
            if getattr(self._library.model, "dropout", None):  # dropout of merges would give other ids at each call
                self._library.model.dropout = None
            self.vocab: dict[str, int] = self._library.get_vocab(with_added_tokens=True)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.vocab.values(), default=-1) + 1

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without special tokens, and where each begins and ends in the text."""
        with self._guard("cannot encode this text"):
            encoding = self._library.encode(text, add_special_tokens=False)
            return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        with self._guard("cannot decode these ids"):
            return str(self._library.decode(ids, skip_special_tokens=True))

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == PANIC:  # the library raises nothing narrower
                raise InputError(f"{self.path} {what}: {first_line(error)}") from error
            raise


def _checked(path: Path, content: str | None) -> str:
    """The JSON, whose parts that the library trusts blindly are sound."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MB")
        content = content or path.read_text(encoding="utf-8")
        values = json.loads(content, object_hook=_sound)
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise ValueError("it has no model")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:  # the middle ones of merges that are none
        raise InputError(f"{path} is not a tokenizer.json: {first_line(error)}") from error
    return content


def _sound(part: dict[str, Any]) -> dict[str, Any]:
    """An object of the JSON as it is. Raises ValueError where the library would panic, or take memory as it says."""
    kind = part.get("type")
    if kind == "Precompiled":  # a trie behind its size in bytes, then the texts that it points to
        try:
            data = base64.b64decode(part.get("precompiled_charsmap") or "", validate=True)
        except (binascii.Error, TypeError):
            data = b""
        size = int.from_bytes(data[:4], "little")
        if len(data) < 4 or size % 4 or size == 0 or size > len(data) - 4:
            raise ValueError("its precompiled_charsmap is damaged")
    if kind == "FixedLength" and part.get("length") == 0:
        raise ValueError("its pieces have no length")
    prefix, merges = part.get("continuing_subword_prefix"), part.get("merges")
    if prefix and isinstance(merges, list):
        seconds = [merge.split(" ")[-1] if isinstance(merge, str) else merge[-1] for merge in merges if merge]
        if not all(isinstance(piece, str) and piece.startswith(prefix) for piece in seconds):
            raise ValueError("a merge lacks the prefix that all but the first piece of a word have")
    return part
