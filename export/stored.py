"""`Stored`: what a checkpoint holds, whatever its layout, before anyone has decided what to take of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from elf_rt.errors import CheckpointError
from elf_rt.export.foreign import printable

FLOATS = {  # types that weights may be stored in -> safetensors' name
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


class Leaves(Mapping[str, Any]):
    """Values by dotted path. Each is read when it is asked for, so that what nobody needs costs nothing."""

    def __init__(self, paths: Iterable[str], read: Callable[[str], Any]) -> None:
        self._paths = dict.fromkeys(paths)
        self._read = read

    def __getitem__(self, path: str) -> Any:
        if path not in self._paths:
            raise KeyError(path)
        return self._read(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


@dataclass(frozen=True)
class Stored:
    """A checkpoint as it lies on disk.

    layout: its name, for people. leaves: values by dotted path, tensors and others. files: what was read, for the
    checksum. settings: a mapping that was kept beside the weights. step: of the training, where it is known.
    top: the top-level mapping, or an empty one, for layouts that are told by their keys.
    """

    layout: str
    leaves: Mapping[str, Any]
    files: tuple[Path, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    top: Mapping[str, Any] = field(default_factory=dict)


def flatten(tree: Mapping[Any, Any], most: int = 1_000_000) -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists stay values. A mapping that holds itself is refused, and a
    tensor that is no plain one becomes None."""
    flat: dict[str, Any] = {}
    left: list[tuple[str, Any]] = [(str(key), value) for key, value in reversed(list(tree.items()))]
    while left:
        path, value = left.pop()
        most -= 1
        if most < 0 or len(path) > 1000:
            raise CheckpointError(f"{printable(path.split('.')[0])} is nested without end: not a checkpoint")
        if isinstance(value, Mapping):
            left += [(f"{path}.{key}", inner) for key, inner in reversed(list(value.items()))]
        else:
            flat[path] = _plain(value) if isinstance(value, torch.Tensor) else value
    return flat


def flatten_lists(path: str, value: Any, most: int = 100_000) -> Iterator[tuple[str, Any]]:
    """A value with its path; of lists, and of mappings in them, what they hold, up to so many values."""
    left = [(path, value)]
    while left and most > 0 and len(path) < 1000:
        most -= 1
        path, value = left.pop()
        if isinstance(value, list | tuple):
            left += [(f"{path}.{index}", inner) for index, inner in enumerate(value)]
        elif isinstance(value, Mapping):
            left += [(f"{path}.{key}", inner) for key, inner in value.items()]
        else:
            yield path, value


def _plain(value: torch.Tensor) -> torch.Tensor | None:
    """A dense tensor on the CPU whose every element is stored: no stride trick that grows when it is copied, no list of
    tensors in one, no sign or scale kept apart."""
    dense = value.layout is torch.strided and not value.is_nested and not value.is_quantized
    if not dense or value.device.type != "cpu":
        return None
    return value.resolve_neg() if value.numel() * value.element_size() <= value.untyped_storage().nbytes() else None


def refuse_type(where: object, name: str, kind: str) -> CheckpointError:
    """The error for a tensor of a type that weights of an ELF cannot have."""
    return CheckpointError(
        f"{where}: {printable(name)} is stored as {printable(kind)}, not in 16, 32 or 64-bit floats: quantized weights "
        "cannot be exported, save the model as it was before that"
    )
