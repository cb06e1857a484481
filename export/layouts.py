"""The layouts that checkpoints come in: one table, each row told by what lies there. Reading one runs nothing in it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from elf_rt.errors import CheckpointError
from elf_rt.export.distcp import METADATA, read_distcp
from elf_rt.export.foreign import printable, read_text
from elf_rt.export.orbax import is_orbax, read_orbax
from elf_rt.export.shards import INDEX, index_of, parts_in, read_safetensors, read_sharded
from elf_rt.export.stored import Stored, flatten
from elf_rt.export.torch_file import read_torch

_STEP_NAME = re.compile(r"(?:checkpoint|ckpt|step|global_step|iter|epoch)[-_=]?(\d{1,12})|(\d{1,12})")
_STEP_KEYS = ("global_step", "step", "global_steps", "iteration", "iter_num")
_SETTINGS_KEYS = ("config", "hyper_parameters", "hparams", "cfg", "model_config", "model_args", "metadata")
_WRITERS = (  # key at the top level -> who wrote it
    ("pytorch-lightning_version", "Lightning {}"),
    ("ds_version", "DeepSpeed {}"),
    ("ema_params1", "official PyTorch"),
    ("opt_state", "official PyTorch"),
)
_MODEL_STATES = "mp_rank_*_model_states.pt"  # DeepSpeed's
_ZERO_3 = "zero_pp_rank_*_model_states.pt"


def is_distcp(place: Path) -> bool:
    return place.is_dir() and ((place / METADATA).is_file() or any(place.glob("*.distcp")))


def is_deepspeed(place: Path) -> bool:
    return place.is_dir() and any(any(_deepspeed_folder(place).glob(names)) for names in (_MODEL_STATES, _ZERO_3))


def is_sharded(place: Path) -> bool:
    if place.is_dir():
        return index_of(place) is not None or bool(parts_in(place))
    return place.name.endswith(INDEX) or index_of(place) is not None


def is_safetensors(place: Path) -> bool:
    """The length of a JSON header, and its first character: files are often misnamed."""
    if not place.is_file():
        return False
    with place.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= place.stat().st_size:
        return True
    return place.suffix == ".safetensors" and not head.startswith(b"PK")


def read_deepspeed(place: Path) -> Stored:
    """Weights that are whole in one file. Raises CheckpointError: they are spread over processes (ZeRO 3, slices)."""
    folder = _deepspeed_folder(place)
    files = sorted(folder.glob(_MODEL_STATES))
    if any(folder.glob(_ZERO_3)) or len(files) != 1:
        raise CheckpointError(
            f"{folder} is a DeepSpeed checkpoint whose weights are spread over processes: join them with the "
            "zero_to_fp32.py in it (python zero_to_fp32.py . model) and give what that writes"
        )
    return read_torch_file(files[0])


def _deepspeed_folder(place: Path) -> Path:
    """`latest`, a text, names the newest of several folders."""
    latest = place / "latest"
    if latest.is_file() and latest.stat().st_size < 256:
        name = read_text(latest).strip()
        if name and Path(name).name == name and (place / name).is_dir():
            return place / name
    return place


def read_torch_file(path: Path) -> Stored:
    content = read_torch(path)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a mapping of weights")
    top = {str(key): value for key, value in content.items()}
    writer = next((name.format(printable(top[key])) for key, name in _WRITERS if key in top), "torch file")
    mappings = (value for key in _SETTINGS_KEYS if isinstance(value := top.get(key), Mapping))
    settings = next(filter(None, mappings), {})
    step = next((top[key] for key in _STEP_KEYS if type(top.get(key)) is int), None)
    return Stored(writer, flatten(top), (path,), settings, step, top)


# (whether a file or folder is of this layout, how to read it); the first that is decides.
LAYOUTS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Stored]], ...] = (
    (lambda place: place.is_dir() and is_orbax(place), read_orbax),
    (is_distcp, read_distcp),
    (is_deepspeed, read_deepspeed),
    (is_sharded, read_sharded),
    (is_safetensors, read_safetensors),
    (Path.is_file, read_torch_file),
)


def recognise(place: Path) -> Callable[[Path], Stored] | None:
    """What reads a file or folder; None: a folder that holds no checkpoint itself."""
    return next((read for is_of_this, read in LAYOUTS if is_of_this(place)), None)


def read_stored(place: Path) -> Stored:
    """What a checkpoint holds. Raises CheckpointError: it is damaged, unsafe, unfinished or of no known layout."""
    read = recognise(place)
    if read is None:
        raise CheckpointError(f"{place} holds no checkpoint")
    try:
        return read(place)
    except OSError as error:
        raise CheckpointError(f"{error.filename or place} cannot be read: {error.strerror}") from error


def step_of(stored: Stored, place: Path) -> int | None:
    """The training step that a checkpoint tells, in its content or its name."""
    if stored.step is not None:
        return stored.step
    value: Any = stored.leaves.get("step")
    if isinstance(value, int) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return int(value)
    return step_in_name(place.name)


def step_in_name(name: str) -> int | None:
    """95000 of checkpoint_95000, step-95000 or 95000."""
    match = _STEP_NAME.fullmatch(Path(name).stem if Path(name).suffix in (".pt", ".ckpt") else name)
    return int(match[1] or match[2]) if match else None
