"""The bundle: a folder ``name.elfrt/`` that is all that passes between export, engines and the runtime.

manifest.json      schema version, model sizes, presets, variants, precision plan, sha256 of every file
denoiser.onnx      (z, x_prev, t, s, mode) -> (x, hidden)       float32
discretizer.onnx   hidden -> ids
weights.bin        the tensors of both graphs, each stored once
fp16/ bf16/        the same two graphs in another precision
tokenizer.json     Hugging Face tokenizers format
embedding.npy or encoder.onnx    the text encoder of a conditional model
replay.npz         inputs and outputs of the reference model, for ``elf-rt verify``
plans/             TensorRT engines, each with its own record
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from elf_rt.errors import BundleError
from elf_rt.params import ModelConfig, SamplingParams

FORMAT = "elf-rt-bundle"
SCHEMA_VERSION = 1
MIN_AGREEMENT = 0.99  # share of float32's tokens that another precision must write to count as the same text
SUFFIX = ".elfrt"
MANIFEST = "manifest.json"


class Bundle:
    """An opened bundle. A file is checked against its sha256 the first time its path is asked for.

    Raises:
        BundleError: the folder is no bundle, a file is missing or altered, or the schema is newer than this elf-rt.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._checked: set[str] = set()
        try:
            self.config = ModelConfig.from_json(manifest["model"])
            self.presets = {name: SamplingParams(**values) for name, values in manifest["presets"].items()}
            self.variants: dict[str, dict[str, str]] = manifest["variants"]
            self.tokenizer: dict[str, Any] = manifest["tokenizer"]
            self.encoder: dict[str, Any] | None = manifest["encoder"]
            self.agreement: dict[str, float] = manifest.get("agreement", {})  # absent: not measured
            self.left_out: dict[str, str] = manifest.get("left_out", {})  # variants that were not proven, and why
            self.unproven: dict[str, str] = manifest.get("unproven", {})  # those that are here all the same
            self._sha256: dict[str, str] = manifest["files"]
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{folder / MANIFEST} is incomplete or altered ({error}): export the checkpoint again"
            ) from None

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        folder = Path(folder)
        path = folder / MANIFEST
        if not folder.is_dir():
            raise BundleError(f"no bundle at {folder}: make one with elf-rt export")
        if not path.is_file():
            raise BundleError(f"{folder} has no {MANIFEST}, so it is not a bundle: make one with elf-rt export")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BundleError(f"{path} is not JSON ({error}): export the checkpoint again") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise BundleError(f"{path} is not the manifest of an elf-rt bundle")
        version = manifest.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{folder} has bundle schema {version}, this elf-rt reads {SCHEMA_VERSION}: "
                "update elf-rt, or export the checkpoint again"
            )
        return cls(folder, manifest)

    @property
    def name(self) -> str:
        return self.folder.name.removesuffix(SUFFIX)

    @property
    def plans_dir(self) -> Path:
        return self.folder / "plans"

    def path(self, name: str) -> Path:
        """The path of one of the bundle's files, checked."""
        path = self.folder / name
        if name in self._checked:
            return path
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise BundleError(f"{self.folder / MANIFEST} names a file outside the bundle: {name}")
        if name not in self._sha256:
            raise BundleError(f"{self.folder} has no {name}: export the checkpoint again with it")
        if not path.is_file():
            raise BundleError(f"{path} is missing: export the checkpoint again")
        if sha256(path) != self._sha256[name]:
            raise BundleError(f"{path} was altered after export (its sha256 differs): export the checkpoint again")
        self._checked.add(name)
        return path

    def variant(self, precision: str) -> dict[str, Path]:
        """The checked files of one precision: denoiser, discretizer, weights."""
        if precision not in self.variants:
            have = ", ".join(self.variants)
            raise BundleError(
                f"{self.folder} holds {have}, not {precision}{self.why_left_out(precision)}: "
                f"export the checkpoint again with --precision {precision}"
            )
        return {part: self.path(name) for part, name in self.variants[precision].items()}

    def why_left_out(self, precision: str) -> str:
        """In brackets, why export left a precision out; empty where it did not."""
        reason = self.left_out.get(precision)
        return f" (export left it out: {reason}; --keep-unproven keeps it)" if reason else ""

    def check(self) -> None:
        """Check every file."""
        for name in self._sha256:
            self.path(name)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with the sha256 of every other file now in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        **manifest,
        "files": {p.relative_to(folder).as_posix(): sha256(p) for p in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def find_bundle(folder: Path) -> Path:
    """The only bundle in a folder, for commands that are given none."""
    found = sorted(p for p in folder.glob(f"*{SUFFIX}") if p.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        raise BundleError(f"no *{SUFFIX} folder here: name a bundle, or make one with elf-rt export")
    raise BundleError(f"several bundles here ({', '.join(p.name for p in found)}): name one")


def sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its name when the block succeeds, and vanishes when it does not."""
    if target.exists() and not (target / MANIFEST).is_file():
        raise BundleError(f"{target} exists and is not a bundle: name another output")
    if target.exists() and not os.access(target, os.W_OK):
        raise BundleError(f"{target} is read-only: name another output")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        raise BundleError(f"cannot write in {target.parent}")
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / target.name)
            os.replace(work, target)
            shutil.rmtree(old)
        else:
            os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that takes its name when the block succeeds.

    A file that is there keeps its mode and the links to it; a device or a pipe is written to directly.
    """
    if target.is_dir():
        raise BundleError(f"{target} is a folder: name a file")
    if target.exists() and not target.is_file():  # asked first: /dev/stdout may lead to a pipe, which has no path
        yield target
        return
    target = target.resolve()
    if not target.parent.is_dir():
        raise BundleError(f"the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise BundleError(f"cannot write in {target.parent}")
    work = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    os.close(os.open(work, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        if target.exists():
            work.chmod(stat.S_IMODE(target.stat().st_mode))
        yield work
        os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)
