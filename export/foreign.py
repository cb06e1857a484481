"""Files that others wrote, read once and with bounds: what a file is, and its text, JSON or YAML."""

import json
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from elf_rt.errors import CheckpointError
from elf_rt.files import remembered_sha256, why_not_here

AGAIN = "copy or download it again"
MOST_TEXT = 4 << 20  # bytes of a JSON
MOST_YAML = 1 << 17  # bytes of a config, of which PyYAML reads 40 kB a second; the released ones have 2 kB
MOST_INDEX = 256 << 20  # bytes of a JSON that lists tensors, or of a tokenizer
MOST_ALIASES, MOST_MERGED = 1_000, 10_000  # a YAML's aliases can multiply until they fill the memory
_HEAD = 512
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

# Formats, by a file's first bytes, that cannot be used: what to do then.
_OTHER_FORMATS = (
    (b"GGUF", "a GGUF file, which holds no ELF: give the checkpoint that it was made from"),
    (b"\x89HDF", "an HDF5 file (Keras): save the weights with torch or safetensors"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"\x93NUMPY", "one numpy array: save the whole state dict with torch or safetensors"),
)


def printable(name: object) -> str:
    """A name out of a file, safe to show on one line of a terminal."""
    text = str(name)
    text = text if len(text) <= 200 else text[:200] + "…"
    return text if text.isprintable() else ascii(text)


def few(names: Sequence[str], most: int = 8) -> str:
    """The first of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def shown(value: object) -> str:
    """A value out of a file, short whatever it is."""
    short = reprlib.Repr()
    short.maxdict = short.maxlist = short.maxtuple = 2
    short.maxlevel = 2
    return printable(short.repr(value))


def refuse_other_kinds(path: Path) -> bytes:
    """The first bytes of a file that can be what its reader wants.

    Raises:
        CheckpointError: it is not there, empty, of another kind, or damaged since the Hub gave it; the message says
            which and what to do.
    """
    if reason := why_not_here(path):
        raise CheckpointError(f"{path} {reason}")
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise CheckpointError(f"{path} is empty: {AGAIN}")
    for signature, kind in _OTHER_FORMATS:
        if head.startswith(signature):
            raise CheckpointError(f"{path} is {kind}")
    blob = path.resolve()  # the Hub's cache names large files after their sha256
    if blob.parent.name == "blobs" and len(blob.name) == 64 and blob.name != remembered_sha256(blob):
        raise CheckpointError(f"{path} is not what the Hub has (its sha256 differs): delete {blob} and {AGAIN}")
    return head


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """A text file of at most `most` bytes.

    Raises:
        CheckpointError: it cannot be read, is longer, or is no text.
    """
    refuse_other_kinds(path)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise CheckpointError(f"{path} is longer than {most >> 10} kB, so it is not what its name says")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text in UTF-8: save it as UTF-8, or {AGAIN}") from error


def read_json(path: Path, most: int = MOST_TEXT) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError as `read_text` does, and where the text is no JSON object."""
    text = read_text(path, most)
    try:
        content = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()  # half a pair is no text, and cannot be written again
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; its tags build nothing. Raises CheckpointError as `read_text` does, or where it is no mapping."""
    text = read_text(path, MOST_YAML)
    try:
        settings = yaml.load(text, Loader=_PlainLoader)
    except Exception as error:  # its constructors raise whatever int(), dict() and the like do
        raise CheckpointError(f"{path} is not YAML: {_reason(error)}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} must hold a YAML mapping (max_length: ...), got a {type(settings).__name__}")
    return settings


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error).split())) if not isinstance(error, RecursionError) else "nested too deep"


class _PlainLoader(yaml.SafeLoader):
    """YAML as plain data: dates stay text, unknown tags are dropped, aliases cannot multiply."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > MOST_ALIASES:
                raise yaml.YAMLError(f"more than {MOST_ALIASES} aliases")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            raise yaml.YAMLError(f"merge keys that make more than {MOST_MERGED} entries")

    def text(self, node: yaml.ScalarNode) -> Any:
        return self.construct_scalar(node)

    def plain(self, _tag: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        return self.construct_scalar(node)  # type: ignore[arg-type]


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_constructor("tag:yaml.org,2002:timestamp", _PlainLoader.text)
_PlainLoader.add_multi_constructor("", _PlainLoader.plain)
