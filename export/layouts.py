"""Where a checkpoint's weights lie: the file of a folder or Hub id, and the state dict inside the file.

Every layout in the wild ends as a `WeightFile`: one or two mappings from names to tensors, plus the settings stored
beside them. Files are read with torch's weights-only unpickler or safetensors, so a hostile file runs nothing.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from elf_rt.errors import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_STEP = re.compile(r"checkpoint_(\d+)")
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<sub>[^\\]+))?")
_ORBAX_FILES = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "_sharding")
_NO_MODELS = ("encoder", "latent_stats")  # other tensors that lie beside a model
_WRAPPERS = ("module.", "_orig_mod.")  # left in names by DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class WeightFile:
    """The content of a checkpoint file: `ema` or `raw` is None where the layout has no such weights."""

    ema: Mapping[str, Any] | None
    raw: Mapping[str, Any] | None
    settings: Mapping[str, Any]


class Inert:
    """Stands in for every harmless object that a training run pickles beside its weights (numpy scalars, paths).

    The unpickler builds it instead of the real class, so that no code of another library runs on a file's bytes.
    """

    def __init__(self, *args: Any) -> None:
        pass

    def __new__(cls, *args: Any) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((Inert, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *((Inert, f"numpy.{name}") for name in ("dtype", "ndarray")),
    *((Inert, name) for name in ("argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath")),
    *(
        (dict, f"{package}.AttributeDict")
        for package in ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data")
    ),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
]


def printable(name: object) -> str:
    """A name out of a file, safe to show on one line of a terminal."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def find_weights(source: str | Path) -> tuple[Path, list[Path]]:
    """The weight file that `source` means, and the folders where its YAML may lie.

    `source` is a file, a folder (the highest `checkpoint_<step>` in it, else its only weight file) or a Hub id
    `org/name[/sub]`, which is looked at only where no such path exists.

    Raises:
        CheckpointError: nothing there, several candidates, or the JAX layout.
    """
    path = Path(source)
    if path.exists():
        file = path if path.is_file() else _in_folder(path)
        return file, [file.parent]
    match = _HUB_ID.fullmatch(str(source))
    if match is None:
        raise CheckpointError(f"no such file or folder: {source}")
    sub = match["sub"]
    root = download(match["repo"], [sub, f"{sub}/*", "*.yml", "*.yaml", "*.json"] if sub else None)
    path = root / (sub or "")
    if not path.exists():
        raise CheckpointError(f"the Hub model {match['repo']} has no {sub}")
    file = path if path.is_file() else _in_folder(path)
    return file, [file.parent, root]


def download(repo: str, patterns: list[str] | None = None) -> Path:
    """The local snapshot of a Hub model: the files that match one of `patterns`, all of them by default.

    Raises:
        CheckpointError: the Hub is out of reach, or has no such model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise CheckpointError(
            f"{repo} is no file or folder here, and the Hugging Face Hub cannot be reached: go online once, "
            "or copy the model here and give its path"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(
            f"{repo} is no file or folder here, and the Hugging Face Hub gives no such model "
            "(check the name; a private or gated one needs `hf auth login`)"
        ) from error


def _in_folder(folder: Path) -> Path:
    if any((folder / name).exists() for name in _ORBAX_FILES):
        raise CheckpointError(f"{folder}: this is the JAX layout; use the -torch conversion")
    steps = {int(m[1]): child for child in folder.iterdir() if (m := _STEP.fullmatch(child.name))}
    if steps:
        latest = steps[max(steps)]
        return latest if latest.is_file() else _in_folder(latest)
    files = sorted(f for f in folder.iterdir() if f.suffix in WEIGHT_SUFFIXES and f.stem not in _NO_MODELS)
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(f"{folder} holds several weight files, name one: {', '.join(f.name for f in files)}")
    raise CheckpointError(f"{folder} holds no checkpoint_<step> and no weight file ({', '.join(WEIGHT_SUFFIXES)})")


def read_weights(path: Path) -> WeightFile:
    """The weights and settings of a file, tensors mapped from disk where the format allows it.

    Raises:
        CheckpointError: the file is not a checkpoint, is damaged, or holds anything but data.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    _refuse_other_files(path)
    content = _unpickle(path)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a mapping of weights")
    return _sort_out(path, content)


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            settings = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from error
    return WeightFile(ema=_clean(state), raw=None, settings=settings)


def _refuse_other_files(path: Path) -> None:
    """Names what a file is when it cannot be a checkpoint, before torch reads any of it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty: copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if head.startswith(b"PK"):
        _refuse_other_zips(path, size)
    elif all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        raise CheckpointError(f"{path} is a text file, not a checkpoint")


def _refuse_other_zips(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:  # ValueError: names not UTF-8
        raise CheckpointError(f"{path} is truncated or damaged: copy or download it again") from error
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote")
    # torch.save stores without compression; only another writer's file can grow when it is read
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(f"{path} is a compressed zip archive, which torch.save never writes: refused")


def _unpickle(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be mapped
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)|function <[\w-]+ (?:\w+ )?(\S+?)>", str(error))
        if name is None:
            raise CheckpointError(f"{path} is not a checkpoint, or is damaged") from error
        raise CheckpointError(
            f"{path} holds more than data ({printable(name[1] or name[2])}) and was refused; nothing in it was run. "
            "Where you trust it, save its state dict alone again"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything at all
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged: copy or download it again") from error


def _sort_out(path: Path, content: Mapping[str, Any]) -> WeightFile:
    """Tells the layouts apart: official, Lightning, `{config, ema}`, `{state_dict, metadata}`, plain state dict."""
    kept = (content.get(key) for key in ("config", "metadata"))
    settings: Mapping[str, Any] = next((value for value in kept if isinstance(value, Mapping)), {})
    if "ema_params1" in content or "params" in content:
        return WeightFile(_mapping(content, "ema_params1"), _mapping(content, "params"), settings)
    if "ema" in content or "state_dict" in content:
        ema = _mapping(content, "ema")
        state = _mapping(content, "state_dict" if "state_dict" in content else "model")
        if ema is None and "state_dict" in content and state is not None and not _is_lightning(content["state_dict"]):
            return WeightFile(state, None, settings)  # a file made to be shared holds one set of weights
        return WeightFile(ema, state, settings)
    if any(isinstance(value, torch.Tensor) for value in content.values()):
        return WeightFile(_clean(content), None, settings)
    raise CheckpointError(f"{path} holds no weights of a known layout, only: {', '.join(map(printable, content))}")


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    value = content.get(key)
    if isinstance(value, Mapping) and isinstance(value.get("shadow"), Mapping):
        value = value["shadow"]
    return _clean(value) if isinstance(value, Mapping) and value else None


def _is_lightning(state: Mapping[str, Any]) -> bool:
    return any(str(name).startswith("model.") for name in state)


def _clean(state: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the prefixes that training wrappers add; a Lightning module's other members are not the model."""
    names = {str(name): value for name, value in state.items()}
    if _is_lightning(names):
        names = {name.removeprefix("model."): value for name, value in names.items() if name.startswith("model.")}
    for wrapper in _WRAPPERS:
        names = {name.removeprefix(wrapper): value for name, value in names.items()}
    return names
