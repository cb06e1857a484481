"""Bad inputs, made from good ones by a seeded random generator.

An input is a folder to work in, a command, and what may come of it (`Case`). A kind of input is a function (sources,
folder, generator) -> Case; KINDS lists them.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fuzz_breaks import break_archive, break_array, break_bytes, break_file, break_tree, write_json
from fuzz_options import OPTIONS, PATHS, SHORT

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
        what = break_array(path, rng)
    elif path.suffix == ".npz" and rng.random() < 0.8:
        what = break_archive(path, rng)
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
