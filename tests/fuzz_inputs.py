"""Bad inputs, made from good ones by a seeded random generator.

An input is a folder to work in, a command, and what may come of it (`Case`). A kind of input is a function (sources,
folder, generator) -> Case; KINDS lists them.
"""

import io
import json
import random
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

PROMPT = "a la"
GENERATE = ["generate", "b.elfrt", "--prompt", PROMPT, "--steps", "2", "--seed", "0", "--json"]
EXPORT = ["-o", "b.elfrt", "--precision", "fp32"]


@dataclass(frozen=True)
class Sources:
    """Good inputs. checkpoint: a folder with checkpoint_10, config.yml, tokenizer.json and encoder.safetensors.
    bundles: of it ("table") and with a T5 encoder ("t5")."""

    checkpoint: Path
    bundles: Mapping[str, Path]


@dataclass(frozen=True)
class Case:
    """args: of elf-rt. what: was done, for whoever reads the report. same: exit code 0 only with what the good input
    gives. leaves: what may be there afterwards when all went well."""

    args: list[str]
    what: str
    same: bool = False
    leaves: tuple[str, ...] = ()
    env: Mapping[str, str | None] = field(default_factory=dict)


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


# Checkpoints


def _checkpoint(sources: Sources, folder: Path) -> Path:
    target = folder / "ckpt"
    shutil.copytree(sources.checkpoint, target)
    return target


def _export(what: str, *, same: bool = False, source: str = "ckpt") -> Case:
    return Case(["export", source, *EXPORT], what, same, leaves=("b.elfrt",))


def checkpoint_bytes(sources: Sources, folder: Path, rng: random.Random) -> Case:
    what = break_file(_checkpoint(sources, folder) / "checkpoint_10", rng)
    return _export(what, same=True)


def checkpoint_tensors(sources: Sources, folder: Path, rng: random.Random) -> Case:
    import torch

    path = _checkpoint(sources, folder) / "checkpoint_10"
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content["ema_params1"]
    name = rng.choice(sorted(state))
    tensor = state[name]
    ways: dict[str, Callable[[], Any]] = {
        "gone": lambda: None,
        "empty": lambda: tensor[:0],
        "of one more axis": lambda: tensor[None],
        "flat": lambda: tensor.reshape(-1),
        "transposed": lambda: tensor.T if tensor.ndim == 2 else tensor[:-1],
        "one row short": lambda: tensor[:-1],
        "twice": lambda: torch.cat([tensor, tensor]),
        "NaN": lambda: tensor * float("nan"),
        "infinite": lambda: torch.full_like(tensor, float("inf")),
        "1e38": lambda: torch.full_like(tensor, 1e38),
        "int64": lambda: tensor.long(),
        "bool": lambda: tensor > 0,
        "complex": lambda: tensor.to(torch.complex64),
        "float64": lambda: tensor.double(),
        "bfloat16": lambda: tensor.bfloat16(),
        "float8_e4m3fn": lambda: tensor.to(torch.float8_e4m3fn),
        "float8_e5m2": lambda: tensor.to(torch.float8_e5m2),
        "expanded from one element": lambda: tensor.flatten()[:1].expand(10**9) if tensor.numel() else tensor,
        "sparse": lambda: tensor.to_sparse(),
        "a text": lambda: "weights",
        "a list": lambda: tensor.flatten()[:10].tolist(),
        "a number": lambda: 1.0,
    }
    way = rng.choice(sorted(ways))
    new = ways[way]()
    if new is None:
        del state[name]
    else:
        state[name] = new
    if rng.random() < 0.2:
        content, way = state, f"{way}, as a plain state dict"
    elif rng.random() < 0.2:
        key = rng.choice(sorted(content))
        value = rng.choice([None, {}, [], 3, "x", torch.zeros(2)])
        content, way = {**content, key: value}, f"{way}, {key} = {value!r}"[:80]
    torch.save(content, path)
    return _export(f"{name} is {way}")


def config(sources: Sources, folder: Path, rng: random.Random) -> Case:
    path = _checkpoint(sources, folder) / "config.yml"
    text = path.read_text(encoding="utf-8")
    bombs = [
        "a: &a [x, x]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in pairwise("abcdefghi")),
        text + "when: 2024-13-45\n",
        text + "a: &a [*a]\n",
        text + "max_length: " + "9" * 5000 + "\n",
        text + "!!python/object/apply:os.system ['true']\n",
        text + "\tx: 1\n",
        text.replace("max_length", "max_length: 8\nmax_length"),
        "[" * 20_000,
        text + "x: .nan\n? [1, 2]\n: 3\n",
        "- 1\n",
        "just a text\n",
        text + "é: \x85\x00\n",
    ]  # fmt: skip
    way = rng.random()
    if way < 0.6:
        tree, what = break_tree(yaml.safe_load(text), rng)
        path.write_text(yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "replace").decode(), encoding="utf-8")
        return _export(f"config.yml: {what}")
    if way < 0.8:
        bomb = rng.choice(bombs)
        path.write_text(bomb, encoding="utf-8")
        return _export(f"config.yml: {bomb[-60:]!r}")
    return _export(break_file(path, rng))


def tokenizer(sources: Sources, folder: Path, rng: random.Random) -> Case:
    path = _checkpoint(sources, folder) / "tokenizer.json"
    if rng.random() < 0.3:
        return _export(break_file(path, rng))
    tree, what = break_tree(json.loads(path.read_text(encoding="utf-8")), rng)
    write_json(path, tree)
    return _export(f"tokenizer.json: {what}")


def safetensors(sources: Sources, folder: Path, rng: random.Random) -> Case:
    """The network's weights or the encoder's table: bytes, or the header's tree."""
    import torch
    from safetensors.torch import save_file

    made = _checkpoint(sources, folder)
    path = made / "encoder.safetensors"
    if rng.random() < 0.6:
        checkpoint = made / "checkpoint_10"
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["ema_params1"]
        checkpoint.unlink()
        path = made / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    if rng.random() < 0.3:
        return _export(break_file(path, rng))
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    tree, what = break_tree(json.loads(data[8 : 8 + size]), rng)
    header = json.dumps(tree).encode()
    length = rng.choice((len(header),) * 5 + (0, 2**63, len(data) * 2, 10**9))
    path.write_bytes(struct.pack("<Q", length) + header + data[8 + size :])
    return _export(f"{path.name}: header {what}, {length} bytes")


def t5(sources: Sources, folder: Path, rng: random.Random) -> Case:
    made = _checkpoint(sources, folder)
    (made / "encoder.safetensors").unlink()
    shutil.copytree(Path(__file__).parent / "data" / "golden" / "t5" / "encoder", made / "encoder")
    if rng.random() < 0.3:
        return _export(break_file(made / "encoder" / "model.safetensors", rng))
    path = made / "encoder" / "config.json"
    tree, what = break_tree(json.loads(path.read_text(encoding="utf-8")), rng)
    write_json(path, tree)
    return _export(f"encoder/config.json: {what}")


# Bundles


def _bundle(sources: Sources, folder: Path, rng: random.Random) -> Path:
    target = folder / "b.elfrt"
    shutil.copytree(sources.bundles[rng.choice(("table", "table", "t5"))], target)
    return target


def _rehash(bundle: Path) -> None:
    """What someone does who alters a bundle knowingly."""
    from elf_rt.bundle import MANIFEST, sha256

    path = bundle / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"] = {name: sha256(bundle / name) for name in manifest["files"] if (bundle / name).is_file()}
    write_json(path, manifest)


def _read(path: Path, rng: random.Random) -> list[str]:
    """A command that opens a bundle, and reads this file of it."""
    backend = ["--backend", rng.choice(("onnxruntime", "onnxruntime", "openvino"))]
    generate, verify = [*GENERATE, *backend], ["verify", "b.elfrt", *backend]
    if path.suffix == ".npz":
        return verify
    return rng.choice((generate, generate, verify, ["info", "b.elfrt"] if path.suffix == ".json" else generate))


def manifest(sources: Sources, folder: Path, rng: random.Random) -> Case:
    path = _bundle(sources, folder, rng) / "manifest.json"
    if rng.random() < 0.2:
        return Case(_read(path, rng), break_file(path, rng))
    tree, what = break_tree(json.loads(path.read_text(encoding="utf-8")), rng)
    write_json(path, tree)
    return Case(_read(path, rng), f"manifest.json: {what}")


def bundle_bytes(sources: Sources, folder: Path, rng: random.Random) -> Case:
    """Any file of a bundle, with its old sha256: only the text of the good bundle may come."""
    made = _bundle(sources, folder, rng)
    path = rng.choice(sorted(p for p in made.iterdir() if p.name != "manifest.json"))
    what = break_file(path, rng)
    return Case(_read(path, rng), what, same=True)


def bundle_contents(sources: Sources, folder: Path, rng: random.Random) -> Case:
    """Any file of a bundle, with its sha256 computed again."""
    made = _bundle(sources, folder, rng)
    path = rng.choice(sorted(p for p in made.iterdir() if p.name != "manifest.json"))
    if path.suffix == ".npy" and rng.random() < 0.8:
        what = _break_array(path, rng)
    elif path.suffix == ".npz" and rng.random() < 0.8:
        what = _break_archive(path, rng)
    elif path.name == "weights.bin" and rng.random() < 0.5:
        values = np.fromfile(path, np.uint8)
        odd = rng.choice((float("nan"), float("inf"), 1e38, 1e30))
        floats = values[: len(values) // 4 * 4].view(np.float32)
        floats[rng.randrange(len(floats)) :: rng.choice((1, 100, 10_000))] = odd
        values.tofile(path)
        what = f"weights.bin: {odd} here and there"
    elif path.name == "tokenizer.json" and rng.random() < 0.7:
        tree, what = break_tree(json.loads(path.read_text(encoding="utf-8")), rng)
        write_json(path, tree)
    else:
        what = break_file(path, rng)
    _rehash(made)
    return Case(_read(path, rng), f"{path.name} (sha256 computed again): {what}")


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


def _break_array(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.2:
        path.write_bytes(_huge(rng))
        return "claims to be huge"
    arrays = _arrays(np.load(path))
    way = rng.choice(sorted(arrays))
    np.save(path, arrays[way](), allow_pickle=True)
    return way


def _break_archive(path: Path, rng: random.Random) -> str:
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


# What a caller gives


def jsonl(sources: Sources, folder: Path, rng: random.Random) -> Case:
    shutil.copytree(sources.bundles["table"], folder / "b.elfrt")
    records = [{"input": PROMPT, "id": k} for k in range(3)]
    way = rng.random()
    if way < 0.4:
        trees = [break_tree(record, rng) for record in records]
        text = "\n".join(json.dumps(tree) for tree, _ in trees)
        data, what = text.encode("utf-8", "surrogatepass"), str([what for _, what in trees])
    elif way < 0.7:
        good = "\n".join(json.dumps(record) for record in records).encode()
        data, what = break_bytes(good, rng)
    else:
        bad = rng.choice(
            [
                b'{"input": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
                b'{"input": "a", "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
                b'{"input": "a", "x": NaN}',
                b'{"input": "a", "x": -Infinity}',
                b'{"input": "a", "x": 1e999}',
                b'{"input": "a", "x": ' + b"9" * 5000 + b"}",
                b'{"input": "a", "input": "b"}',
                b'{"input": "' + b"a " * 500_000 + b'"}',
                b'{"input": "\\u0000\\u0001"}',
                b'{"input": "a"}\r\r\n\x1a',
                b'\xef\xbb\xbf{"input": "a"}',
                '{"input": "a"}'.encode("utf-16"),
                b'[{"input": "a"}]',
                b'{"input": ["a"]}',
                b'{"input": "\\ud83d"}',
                b'{"input": "   "}',
                b'{"input": "a"}{"input": "b"}',
                b'{"INPUT": "a"}',
                b'{"input": "a", "text": {"seed": NaN}}',
            ]
        )
        data, what = bad, repr(bad[:60])
    (folder / "in.jsonl").write_bytes(data)
    args = ["generate", "b.elfrt", "--input", "in.jsonl", "--steps", "1", "--seed", "0", "--backend", "onnxruntime"]
    output = rng.choice(([], ["--json"], ["--output", "out.jsonl"], ["--output", "-"]))
    return Case(args + output, f"JSONL: {what}", leaves=("out.jsonl",))


NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "1e3",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "99999999999999999999",
    "999999999999",
    "4000000000",
    "x",
    "0x1",
    "١",
    "1_0",
    "1,2",
]
NUMBERS += ["", " "]
TEXTS = ["", " ", "\t", "a la", "x" * 20_000, "a [2] b", "é🙂", "日本語", "\u202e", "\ufeff", "a\nb"]
TEXTS += ["[2]", "[0]", "[99999999999]", "[", "]", "<pad>", "</s>", "-", "--"]
PATHS = [
    "-",
    ".",
    "..",
    "/",
    "/dev/null",
    "/dev/full",
    "/dev/zero",
    "/proc/self/mem",
    "missing",
    "no/where",
    "b.elfrt",
    "~",
    "$HOME",
    "in.jsonl",
]
PATHS += ["", "x" * 300, "b.elfrt/manifest.json"]
SAMPLING = [
    "--guidance-scale",
    "--sc-cfg",
    "--gamma",
    "--temperature",
    "--gamma-power",
    "--grid-mean",
    "--grid-std",
    "--x-prev-scale",
]
SAMPLING += ["--guidance-from", "--guidance-until", "--steps"]
SHAPES = [*NUMBERS, "1:2", "1:2:3", "3:2:1"]
OPTIONS: dict[str, dict[str, list[str]]] = {
    "generate": {
        **dict.fromkeys(["-n", "--seed", "--length", "--threads", *SAMPLING], NUMBERS),
        **dict.fromkeys(["--prompt", "--template"], TEXTS),
        **dict.fromkeys(["--input", "--output"], PATHS),
        "--sampler": ["ode", "sde", "ab2", "euler", ""],
        "--schedule": ["uniform", "quantile", "logit_normal", "cosine"],
        "--preset": ["default", "fast", ""],
        "--backend": ["auto", "openvino", "onnxruntime", "tensorrt", "torch", "jax"],
        "--precision": ["auto", "fp32", "bf16", "fp16", "int8", "fp4"],
    },
    "bench": {
        **dict.fromkeys(["--steps", "--batch", "--repeats", "--length", "--seed", "--threads"], NUMBERS),
        **dict.fromkeys(["--input", "--plot", "--checkpoint"], PATHS),
        "--backends": ["onnxruntime", "onnxruntime:fp32", "onnxruntime:fp4", "jax", "", ",", ":", "openvino:int8"],
        "--vs": ["torch-eager", "jax", "", ","],
        "--random": ["tiny", "ELF-X"],
    },
    "eval": {
        **dict.fromkeys(["-n", "--seed", "--seeds", "--steps", "--threads"], NUMBERS),
        **dict.fromkeys(["--input", "--references", "--against", "--lm", "--tokenizer"], PATHS),
        "--metric": ["fluency", "accuracy", "agreement", "self-bleu", "bleu"],
    },
    "verify": {"--replay": PATHS, "--threads": NUMBERS, "--backend": ["auto", "tensorrt", "onnxruntime"]},
    "build-engine": {
        **dict.fromkeys(["--batch", "--seq-len", "--opt-level", "--sm"], SHAPES),
        "--timing-cache": PATHS,
        "--target": ["auto", "tensorrt", "tensorrt-rtx", "x"],
    },
    "info": {},
    "export": {
        **dict.fromkeys(["--config", "--tokenizer", "--encoder", "--prompts", "--presets"], PATHS),
        "--precision": ["fp32", "fp4", "", ",", "fp32,fp32"],
        "--opset": ["20", "23", "24", "x"],
    },
}  # fmt: skip
SHORT = {"generate": ["--steps", "1"], "bench": ["--steps", "1", "--repeats", "1"], "eval": ["--steps", "1"]}


def options(sources: Sources, folder: Path, rng: random.Random) -> Case:
    shutil.copytree(sources.bundles["table"], folder / "b.elfrt")
    (folder / "in.jsonl").write_text(json.dumps({"input": PROMPT, "output": PROMPT, "text": PROMPT}) + "\n")
    command = rng.choice(("generate", "generate", "generate", "bench", "eval", "verify", "build-engine", "export"))
    target = {"export": "missing.pt", "bench": "b.elfrt"}.get(command, "b.elfrt")
    args = [command, rng.choice((target,) * 8 + tuple(PATHS)), *SHORT.get(command, [])]
    if command == "build-engine":
        args.append("--dry-run")
    for option in rng.sample(sorted(OPTIONS[command]), rng.choice((1, 1, 2, 3))):
        args += [option, rng.choice(OPTIONS[command][option])]
    if rng.random() < 0.1:
        args.append(rng.choice(("--json", "--watch", "--fp64", "-", "extra", "--help")))
    leaves = [args[i + 1] for i, a in enumerate(args) if a in ("--output", "--plot", "-o")]
    return Case(args, "options", leaves=tuple(leaves))


def environment(sources: Sources, folder: Path, rng: random.Random) -> Case:
    """The text must be the same wherever it is written at all."""
    shutil.copytree(sources.bundles["table"], folder / "b.elfrt")
    (folder / "file").write_text("")
    values: dict[str, list[str | None]] = {
        "HOME": [None, "", "/nonexistent", "file", "/proc", "relative"],
        "XDG_CACHE_HOME": [None, "", "/nonexistent/x", "file", "/proc/1", "/dev/null"],
        "PYTHONIOENCODING": ["ascii", "cp1252", "utf-16", "latin-1:strict"],
        "LANG": [None, "C", "xx_YY.UTF-8", "ja_JP.SJIS"],
        "LC_ALL": [None, "C", "POSIX", "xx"],
        "TERM": [None, "", "dumb", "xx"],
        "COLUMNS": ["0", "-1", "x", "99999999999"],
        "NO_COLOR": ["1"],
        "FORCE_COLOR": ["1"],
        "OMP_NUM_THREADS": ["0", "x", "-5", "99999"],
        "CUDA_VISIBLE_DEVICES": ["", "7", "x"],
        "TMPDIR": ["/nonexistent", "file", ""],
        "USER": [None, ""],
        "ORT_DISABLE_TELEMETRY": ["0"],
        "HF_HOME": ["/nonexistent", "file"],
        "PATH": [None, ""],
        "TZ": ["x", ""],
        "http_proxy": ["http://127.0.0.1:1"],
    }
    env = {name: rng.choice(values[name]) for name in rng.sample(sorted(values), rng.choice((1, 2, 4)))}
    backend = ["--backend", rng.choice(("onnxruntime", "openvino"))]
    return Case([*GENERATE, *backend], f"environment {env}", same=True, env=env)


KINDS: dict[str, Callable[[Sources, Path, random.Random], Case]] = {
    function.__name__: function
    for function in (
        checkpoint_bytes,
        checkpoint_tensors,
        config,
        tokenizer,
        safetensors,
        t5,
        manifest,
        bundle_bytes,
        bundle_contents,
        jsonl,
        options,
        environment,
    )
}
