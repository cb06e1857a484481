"""Ways to break what is good: bytes, trees of values, arrays. A seeded random generator chooses."""

import io
import json
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Bytes


def break_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = rng.randrange(max(1, len(data)))
    other = rng.choice(
        [
            b"",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
            b"<!doctype html><html><body>Sign in</body></html>",
            bytes(rng.randrange(256) for _ in range(200)),
            b"\x80\x04\x95",
            b"PK\x03\x04",
            b"{" * 50_000,
        ]
    )
    page = data[:at] + bytes(min(4096, len(data) - at)) + data[at + 4096 :]
    flipped = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data
    way = rng.randrange(7)
    return [
        (flipped, f"one bit of byte {at} is other"),
        (data[:at], f"cut to {at} bytes"),
        (page, f"4096 zeros at {at}"),
        (other, f"something else altogether: {other[:20]!r}"),
        (data + data[:at], f"{at} bytes too many"),
        (data[:at] + bytes(rng.randrange(256) for _ in range(64)) + data[at:], f"64 random bytes put in at {at}"),
        (data[: at // 2] + data[at // 2 + 1 :], f"byte {at // 2} left out"),
    ][way]


def break_file(path: Path, rng: random.Random) -> str:
    data, what = break_bytes(path.read_bytes(), rng)
    path.write_bytes(data)
    return f"{path.name}: {what}"


# Trees of JSON, YAML, tokenizers

ODD: list[Any] = [
    None, True, 0, -1, 1, 2, 7, 10**6, 10**9, 10**20, 10**400, 0.0, -0.5, 1e-300, 1e308, float("nan"), float("inf"),
    "", "x", "-1", "0x10", "\ud800", "\0", "a" * 5000, "../../etc/passwd", "/dev/zero", "é🙂", [], {}, [[]], [0] * 100,
    {"a": 1}, [None], [1, "a"], {"": {}},
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree but the root."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [found for key in keys for found in [(*path, key), *places(tree[key], (*path, key))]]


def break_tree(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """A tree with one value, or two, gone, replaced, renamed or nested."""
    tree = json.loads(json.dumps(tree))
    done = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        shallow = sorted(places(tree), key=len)
        if not shallow:
            break
        *path, key = shallow[min(rng.randrange(len(shallow)), rng.randrange(len(shallow)))]  # rather the outer ones
        inner = tree
        for step in path:
            inner = inner[step]
        value = rng.choice(ODD)
        way = rng.choice(("gone", "odd", "odd", "odd", "renamed", "nested"))
        if way == "gone":
            del inner[key]
        elif way == "renamed" and isinstance(inner, dict):
            inner[f"{key}_"] = inner.pop(key)
        elif way == "nested":
            inner[key] = {"a": inner[key]} if rng.random() < 0.5 else [inner[key]]
        else:
            way, inner[key] = f"= {value!r}"[:60], value
        done.append(f"{'.'.join(map(str, [*path, key]))} {way}")
    return tree, ", ".join(done)


def write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree), encoding="utf-8")


# Arrays


def _arrays(good: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    """Other arrays than a good one."""
    return {
        "empty": lambda: good[:0],
        "flat": lambda: good.reshape(-1),
        "of one more axis": lambda: good[None],
        "without axes": lambda: good.reshape(-1)[0],
        "short": lambda: good[: max(1, len(good) // 2)] if good.ndim else good,
        "narrow": lambda: good[..., : max(1, good.shape[-1] // 2)] if good.ndim else good,
        "int64": lambda: np.nan_to_num(good).astype(np.int64),
        "complex": lambda: good.astype(np.complex64),
        "objects": lambda: np.array([None, {}], object),
        "text": lambda: good.astype("U8"),
        "float64": lambda: good.astype(np.float64),
        "NaN": lambda: np.full_like(good, np.nan, np.float32),
        "infinite": lambda: np.full_like(good, np.inf, np.float32),
        "negative": lambda: -np.abs(good) - 1,
        "big-endian": lambda: good.astype(good.dtype.newbyteorder(">")),
    }


def _huge(rng: random.Random) -> bytes:
    """The header of an array that claims 10^10 .. 10^14 elements, and a little of it."""
    stream = io.BytesIO()
    shape = (10 ** rng.randrange(5, 8), 10 ** rng.randrange(5, 8))
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(4096)


def break_array(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.2:
        path.write_bytes(_huge(rng))
        return "claims to be huge"
    arrays = _arrays(np.load(path))
    way = rng.choice(sorted(arrays))
    np.save(path, arrays[way](), allow_pickle=True)
    return way


def break_archive(path: Path, rng: random.Random) -> str:
    with np.load(path) as archive:
        content = {name: archive[name] for name in archive.files}
    name = rng.choice(sorted(content))
    if rng.random() < 0.15:
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
            warnings.simplefilter("ignore")  # that it is there twice
            archive.writestr(f"{name}.npy", _huge(rng))
        return f"{name} twice, once huge"
    if rng.random() < 0.15:
        del content[name]
        np.savez(path, **content)
        return f"{name} is gone"
    arrays = _arrays(content[name] if content[name].dtype.kind in "iufb" else np.zeros(3, np.float32))
    way = rng.choice(sorted(arrays))
    content[name] = arrays[way]()
    np.savez(path, **content)
    return f"{name} is {way}"
