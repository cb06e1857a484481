"""What a graph file says of itself, read without its engine: inputs and outputs, and where its weights lie.

ONNX is protobuf (https://protobuf.dev/programming-guides/encoding, field numbers of onnx.proto); OpenVINO's IR is XML.
"""

import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elf_rt.errors import BundleError

Shape = tuple[int | None, ...]  # None: any size

MODEL_GRAPH, INITIALIZER, INPUT, OUTPUT = 7, 5, 11, 12
TENSOR_EXTERNAL, ENTRY_KEY, ENTRY_VALUE = 13, 1, 2
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_SHAPE, SHAPE_DIM, DIM_VALUE = 1, 2, 1, 2, 1, 1
VARINT, BYTES, SIZES = 0, 2, {1: 8, 5: 4}  # wire types; of fixed width: bytes
IR_WEIGHTS = re.compile(rb'<data [^>]*\boffset="(\d{1,18})" size="(\d{1,18})"')


@dataclass(frozen=True)
class GraphFile:
    """ports: shapes of inputs and outputs by name; None where the file does not tell (OpenVINO's IR).
    weights: name of the file beside it -> where the last weight ends in it."""

    ports: Mapping[str, Shape] | None
    weights: Mapping[str, int]


def read_graph(path: Path) -> GraphFile:
    """Raises BundleError: the file is neither ONNX nor OpenVINO's IR."""
    with path.open("rb") as file:
        try:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            return _read_ir(path, data) if path.suffix == ".xml" else _read_onnx(data)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise BundleError(f"{path} is no graph, or damaged: export the checkpoint again") from error


def _read_ir(path: Path, data: memoryview) -> GraphFile:
    ends = [int(offset) + int(size) for offset, size in IR_WEIGHTS.findall(data)]
    return GraphFile(None, {path.with_suffix(".bin").name: max(ends)})


def _read_onnx(data: memoryview) -> GraphFile:
    (graph,) = _all(data, MODEL_GRAPH)
    ports = [*_all(graph, INPUT), *_all(graph, OUTPUT)]
    ends: dict[str, int] = {}
    for tensor in _all(graph, INITIALIZER):
        entries = _all(tensor, TENSOR_EXTERNAL)
        if entries:
            place = {_text(entry, ENTRY_KEY): _text(entry, ENTRY_VALUE) for entry in entries}
            end = int(place["offset"]) + int(place["length"])
            ends[place["location"]] = max(end, ends.get(place["location"], 0))
    return GraphFile({_text(port, VALUE_NAME): _shape(port) for port in ports}, ends)


def _shape(value: memoryview) -> Shape:
    for field in (VALUE_TYPE, TYPE_TENSOR, TENSOR_SHAPE):
        (value,) = _all(value, field)
    return tuple(dict(_fields(dim)).get(DIM_VALUE) for dim in _all(value, SHAPE_DIM))


def _text(data: memoryview, wanted: int) -> str:
    (text,) = _all(data, wanted)
    return str(text, "utf-8")


def _all(data: memoryview, wanted: int) -> list[Any]:
    """Every value of a field."""
    return [value for field, value in _fields(data) if field == wanted]


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message; a value is a number, or the bytes of text or of another message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if kind == BYTES else (SIZES[kind], at)
        if at + size > len(data):
            raise ValueError("cut")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(number, position behind it)"""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        number |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return number, at
    raise ValueError("a number of more than ten bytes")
