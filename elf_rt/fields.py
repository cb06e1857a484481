"""The fields of a JSON file that a bundle holds, checked where they are read: manifest.json, plan.json."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from elf_rt.errors import ElfError, first_line

MOST_BYTES = 1 << 24
MOST_COUNT = 1 << 60

T = TypeVar("T")


def read_json(path: Path) -> Any:
    """Raises Wrong: it cannot be read, is no JSON, or larger than any such file."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MB")
        return json.loads(path.read_bytes(), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise Wrong(first_line(error)) from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


class Wrong(Exception):
    """A field that is not as it must be; the message names it."""


@dataclass(frozen=True)
class Field:
    """A value of the JSON with its path, for messages such as "source.sha256 must be text, got null"."""

    path: str
    value: Any

    def fail(self, must: str) -> NoReturn:
        raise Wrong(f"{self.path} must be {must}, got {json.dumps(self.value, ensure_ascii=False)[:60]}")

    def object(self) -> dict[str, Any]:
        return self.value if isinstance(self.value, dict) else self.fail("an object")

    def get(self, key: str) -> "Field":
        path = f"{self.path}.{key}".lstrip(".")
        if key not in self.object():
            raise Wrong(f"{path} is missing")
        return Field(path, self.value[key])

    def optional(self, key: str) -> "Field | None":
        """None where it is not there, or null."""
        return None if self.object().get(key) is None else self.get(key)

    def items(self) -> "Iterable[tuple[str, Field]]":
        return [(key, self.get(key)) for key in self.object()]

    def list(self) -> "Iterable[Field]":
        values = self.value if isinstance(self.value, list) else self.fail("a list")
        return [Field(f"{self.path}[{i}]", value) for i, value in enumerate(values)]

    def text(self) -> str:
        return self.value if isinstance(self.value, str) else self.fail("text")

    def hex(self) -> str:
        """Text that may stand in the name of a file."""
        return self.text() if re.fullmatch("[0-9a-f]+", self.text()) else self.fail("hexadecimal digits")

    def flag(self) -> bool:
        return self.value if isinstance(self.value, bool) else self.fail("true or false")

    def one_of(self, valid: Iterable[str]) -> str:
        return self.text() if self.text() in valid else self.fail(f"one of {', '.join(valid)}")

    def whole(self, least: int, most: int) -> int:
        fits = type(self.value) is int and least <= self.value <= most
        return self.value if fits else self.fail(f"a whole number from {least} to {most}")

    def number(self, least: float, most: float) -> float:
        fits = type(self.value) in (int, float) and least <= self.value <= most
        return float(self.value) if fits else self.fail(f"a number from {least:g} to {most:g}")

    def counts(self) -> dict[str, int]:
        return {key: entry.whole(0, MOST_COUNT) for key, entry in self.items()}

    def file(self, files: Mapping[str, str]) -> str:
        return self.text() if self.text() in files else self.fail("a name that stands in files")

    def files(self, roles: Iterable[str], files: Mapping[str, str]) -> dict[str, str]:
        """Names of files by role; there may be more roles than those that must be there."""
        return {role: self.get(role).file(files) for role in dict.fromkeys((*roles, *self.object()))}

    def build(self, kind: type[T]) -> T:
        """A dataclass of the object's fields, all of which must be there; its own words about a value that does not
        fit."""
        values = {field.name: self.get(field.name).value for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        try:
            return kind(**values)
        except (ElfError, TypeError) as error:
            raise Wrong(f"{self.path}: {first_line(error)}") from error
