"""The bundle: a folder ``name.elfrt/`` that is all that passes between export, engines and the runtime.

manifest.json      schema version, model sizes, presets, variants, precision plan, sha256 of every file: manifest.py
denoiser.onnx      (z, x_prev, t, s, mode) -> (x, hidden)       float32
discretizer.onnx   hidden -> ids
weights.bin        the tensors of both graphs, each stored once
fp16/ bf16/        the same two graphs in another precision
tokenizer.json     Hugging Face tokenizers format
embedding.npy, or encoder.onnx and encoder.bin    the text encoder of a conditional model
replay.npz         inputs and outputs of the reference model, for ``elf-rt verify``
plans/             TensorRT engines, each with its own record
"""

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any, Self

from elf_rt.errors import BundleError
from elf_rt.files import is_utf8, locked, remembered_sha256, sha256, unfinished_folder, why_not_here
from elf_rt.graph_file import Shape, read_graph
from elf_rt.machine import user_cache
from elf_rt.manifest import FORMAT, MANIFEST, SCHEMA_VERSION, Manifest, listed_files
from elf_rt.network import GRAPHS, tensor_shapes

MIN_AGREEMENT = 0.99  # share of float32's tokens that another precision must write to count as the same text
SUFFIX = ".elfrt"
AGAIN = "export the checkpoint again"
PUBLISH_SECONDS = 600.0  # that a whole export waits for another one to move its files
COPIES = ".elf-rt-links-"  # how folders with copies of files that are links begin


class Bundle:
    """An opened bundle. A file is checked against its sha256 the first time its path is asked for, and an engine's
    files all together.

    Raises:
        BundleError: the folder is no bundle, a file is missing or altered, or the schema is another than this elf-rt's.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.config = manifest.model
        self.presets = manifest.presets
        self.variants = manifest.variants
        self.tokenizer = manifest.tokenizer
        self.encoder = manifest.encoder
        self.agreement = manifest.agreement
        self.left_out = manifest.left_out
        self.unproven = manifest.unproven
        self.digest = remembered_sha256  # how files of this bundle, and plans made from them, are hashed
        self._checked: dict[str, Path] = {}
        self._copies: Path | None = None  # the folder with copies of files that are links

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        folder = Path(folder)
        if not is_utf8(folder):
            raise BundleError(f"{str(folder)!r} is not UTF-8, and engine libraries take no other paths: rename it")
        path = folder / MANIFEST
        try:
            absent = not path.exists() and not path.is_symlink()
        except OSError as error:
            raise BundleError(f"{folder} cannot be read: {error.strerror}") from error
        if not folder.is_dir():
            raise BundleError(f"no bundle at {folder}: make one with elf-rt export")
        if absent:
            raise BundleError(f"{folder} has no {MANIFEST}, so it is not a bundle: make one with elf-rt export")
        return cls(folder, Manifest.read(path))

    @property
    def name(self) -> str:
        return self.folder.name.removesuffix(SUFFIX)

    @property
    def plans_dir(self) -> Path:
        return self.folder / "plans"

    def path(self, name: str) -> Path:
        """The path of one of the bundle's files, checked."""
        if name not in self._checked:
            path = self.folder / name
            if name not in self.manifest.files:
                raise BundleError(f"{self.folder} has no {name}: export the checkpoint again with it")
            if not path.is_file():
                raise BundleError(f"{path} {why_not_here(path) or 'is no file: export the checkpoint again'}")
            if self.digest(path) != self.manifest.files[name]:
                reason = why_not_here(path)
                altered = "was altered after export (its sha256 differs): download it or export the checkpoint again"
                raise BundleError(f"{path} {reason or altered}")
            self._checked[name] = self._copy(name) if self._is_link(name) else path
        return self._checked[name]

    def part(self, files: Mapping[str, str]) -> dict[str, Path]:
        """The checked files of one part by role. A graph must read no other files than these, and these to their end.

        Raises:
            BundleError: a file is altered, or a graph is not the one of its role and of the manifest's sizes.
        """
        paths = {role: self.path(name) for role, name in files.items()}
        if any(map(self._is_link, files.values())):  # an engine looks for the weights beside their graph
            paths = {role: self._copy(name) for role, name in files.items()}
        ends: dict[Path, int] = {}
        for role in sorted(paths.keys() & {*GRAPHS, "encoder"}):
            graph = read_graph(paths[role])
            if graph.ports is not None:
                self._check_ports(role, paths[role], graph.ports)
            for name, end in graph.weights.items():
                weights = paths[role].with_name(name)
                if weights not in paths.values():
                    raise BundleError(f"{paths[role]} reads {name}, which {MANIFEST} does not name: {AGAIN}")
                ends[weights] = max(end, ends.get(weights, 0))
        for path, end in ends.items():
            size = path.stat().st_size
            if size < end or (size > end and path == paths.get("weights")):
                raise BundleError(f"{path} has {size} bytes, its graphs have weights of {end}: {AGAIN}")
        return paths

    def variant(self, precision: str) -> dict[str, Path]:
        """The checked files of one precision: denoiser, discretizer, weights, and what else its engine reads."""
        if precision not in self.variants:
            have = ", ".join(self.variants)
            raise BundleError(
                f"{self.folder} holds {have}, not {precision}{self.why_left_out(precision)}: "
                f"export the checkpoint again with --precision {precision}"
            )
        return self.part(self.variants[precision])

    def why_left_out(self, precision: str) -> str:
        """In brackets, why export left a precision out; empty where it did not."""
        reason = self.left_out.get(precision)
        return f" (export left it out: {reason}; --keep-unproven keeps it)" if reason else ""

    def check(self) -> None:
        """Check every file, by reading it: nothing that is remembered of earlier checks counts from now on."""
        self.digest = sha256
        self._checked.clear()
        for name in self.manifest.files:
            self.path(name)

    def _check_ports(self, role: str, path: Path, ports: Mapping[str, Shape]) -> None:
        """Names of a graph's inputs and outputs, and their widths behind rows and length."""
        want = {name: shape[2:] for name, shape in tensor_shapes(role, self.config, 1, 1).items()}
        found = {name: shape[2:] for name, shape in ports.items()}
        wrong = sorted(name for name in want.keys() | found.keys() if want.get(name) != found.get(name))
        if wrong:
            names = ", ".join(wrong)
            raise BundleError(f"{path} is no {role} of the model in {MANIFEST} (see its {names}): {AGAIN}")

    def _is_link(self, name: str) -> bool:
        """As the Hub's cache, DVC and git-annex make them, of all files or of the large ones."""
        return (self.folder / name).resolve() != self.folder.resolve() / name

    def _copy(self, name: str) -> Path:
        """A file where an engine may read it, for none follows links out of a graph's folder. What they lead to is
        linked hard into a folder of ours, or copied where that cannot be."""
        real = (self.folder / name).resolve()
        if self._copies is None:
            cache = user_cache()
            with contextlib.suppress(OSError):
                cache.mkdir(parents=True, exist_ok=True)
            place, held = cache if os.access(cache, os.W_OK) else Path(tempfile.gettempdir()), contextlib.ExitStack()
            self._copies = held.enter_context(unfinished_folder(place, COPIES))
            weakref.finalize(self, held.close)
        copy = self._copies / name
        if copy.exists():
            return copy
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(real, copy)
        except OSError:
            shutil.copyfile(real, copy)
        return copy


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json with the sha256 of every other file now in the folder.

    Args:
        manifest: "model", "presets" and "variants" at least, with dataclasses as they are; what else is left out is
            that of a model without a text side, of which nothing was measured.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    values = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "source": {"checkpoint": "", "sha256": "", "weights": "unknown"},
        "tokenizer": {"pad_id": 0, "eos_id": 1, "append_eos": True, "ends_at_eos": True},
        "encoder": None,
        "precision": {},
        "agreement": {},
        "left_out": {},
        "unproven": {},
        **manifest,
        "files": {p.relative_to(folder).as_posix(): sha256(p) for p in files},
    }
    (folder / MANIFEST).write_text(dumps(values, indent=1, ensure_ascii=False, default=asdict) + "\n", encoding="utf-8")


def find_bundle(folder: Path) -> Path:
    """The only bundle in a folder, for commands that are given none."""
    found = sorted(p for p in folder.glob(f"*{SUFFIX}") if p.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        raise BundleError(f"no *{SUFFIX} folder here: name a bundle, or make one with elf-rt export")
    raise BundleError(f"several bundles here ({', '.join(p.name for p in found)}): name one")


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder whose files become the bundle ``target`` when the block succeeds, and vanish when it does not.

    Of a bundle that is there, its own files and plans are replaced, and nothing else is touched: a model card, notes,
    the .git of a clone, links to the folder.
    """
    target = target.resolve()
    there = target.exists()
    old = _old_files(target) if there else []
    if there and not all(os.access(path, os.W_OK) for path in {target, *((target / name).parent for name in old)}):
        raise BundleError(f"{target} is read-only: name another output")
    if not there:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise BundleError(f"cannot write in {target.parent}")
    place = (target,) if there else (target.parent, f".{target.name}.unfinished-")
    with unfinished_folder(*place) as work:
        yield work
        if there:
            _publish(work, target, old)
            return
        with locked(target.parent, seconds=PUBLISH_SECONDS):
            if target.exists():  # since a moment ago, by another export
                _publish(work, target, _old_files(target))
            else:
                work.chmod(0o755)
                os.replace(work, target)


def _old_files(target: Path) -> list[str]:
    """The files of the bundle at ``target``, which a new one replaces; none for an empty folder.

    Raises:
        BundleError: something else is there.
    """
    if target.is_dir() and not any(target.iterdir()):
        return []
    try:
        return [name for name in listed_files(target / MANIFEST) if (target / name).parent.is_dir()]
    except BundleError as error:
        if target.suffix == SUFFIX and (target / MANIFEST).is_file():
            return []  # a damaged bundle may be mended by exporting over it
        raise BundleError(f"{target} exists and is not a bundle: name another output") from error


def _publish(work: Path, target: Path, old: Iterable[str]) -> None:
    """Move all files of ``work`` into ``target``, the manifest last, and drop the old ones that have no successor."""
    new = sorted(p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file())
    new.sort(key=lambda name: name == MANIFEST)
    folders = [target / name for name in new if (target / name).is_dir()]
    if folders:
        raise BundleError(f"{folders[0]} is a folder, where a file of the bundle goes: move it away")
    with locked(target, seconds=PUBLISH_SECONDS):
        shutil.rmtree(target / "plans", ignore_errors=True)  # built from the old graphs
        for name in set(old) - set(new):
            (target / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files are in it
                (target / name).parent.rmdir()
        for name in new:
            folder = (target / name).parent
            if folder != target and folder.is_symlink():
                folder.unlink()  # the link goes; what it leads to belongs to somebody else
            folder.mkdir(parents=True, exist_ok=True)
            os.replace(work / name, target / name)
