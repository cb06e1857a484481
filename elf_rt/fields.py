"""JSON files that a bundle holds, as dataclasses: manifest.json, plan.json. Their types say what must be there."""

import dataclasses
import json
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, get_args, get_origin

from elf_rt.errors import InputError, first_line

MOST_BYTES = 1 << 24
MOST = 1e18  # of a number's size
NAME = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def read_json(path: Path) -> Any:
    """Raises InputError: it cannot be read, is no JSON, or larger than any such file."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MB")
        return json.loads(path.read_bytes(), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(first_line(error)) from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def parse(kind: Any, value: Any, path: str = "") -> Any:
    """A value of the JSON as a type: a dataclass, dict[str, ...], tuple[..., ...], ... | None, or one that NAME names.

    Of a dataclass every field must be there, but for those that may be None; what else is there is ignored.

    Args:
        path: of the value, for messages such as "source.sha256 must be text, got null".

    Raises:
        InputError: a field is missing, or of another type, or its dataclass refuses it; the message names it.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:  # the other one is None
        return None if value is None else parse(args[0], value, path)
    if origin is dict:
        return {key: parse(args[1], item, _join(path, key)) for key, item in _plain(dict, value, path).items()}
    if origin is tuple:
        return tuple(parse(args[0], item, f"{path}[{i}]") for i, item in enumerate(_plain(list, value, path)))
    if dataclasses.is_dataclass(kind):
        return _parse_fields(kind, _plain(dict, value, path), path)
    return value if kind is Any else _plain(kind, value, path)


def _parse_fields(kind: Any, values: dict[str, Any], path: str) -> Any:
    fields = {}
    for field in dataclasses.fields(kind):
        if field.name not in values and get_origin(field.type) is not UnionType:
            raise InputError(f"{_join(path, field.name)} is missing")
        fields[field.name] = parse(field.type, values.get(field.name), _join(path, field.name))
    try:
        return kind(**fields)
    except InputError as error:
        raise InputError(f"{path}: {error}".removeprefix(": ")) from error


def _plain(kind: type, value: Any, path: str) -> Any:
    fits = type(value) in ((int, float) if kind is float else (kind,))
    if not fits or (kind in (int, float) and not abs(value) < MOST):  # nor infinite, nor of a thousand digits
        raise InputError(f"{path} must be {NAME[kind]}, got {json.dumps(value, ensure_ascii=False)[:60]}")
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}".lstrip(".")
