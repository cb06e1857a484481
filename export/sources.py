"""Where a checkpoint lies: a file, a folder of a run, or a Hub id, and the folders where its YAML may be."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elf_rt.errors import CheckpointError
from elf_rt.export.hub import download
from elf_rt.export.layouts import recognise, step_in_name
from elf_rt.export.weights import named_average
from elf_rt.files import is_utf8

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<sub>[^\\]+))?")
_NOT_WEIGHTS = re.compile(
    r"(encoder|optimizer|optim|scheduler|sampler|scaler|training_args|rng_state|random_states|latent_stats|dl_state"
    r"|custom_checkpoint)[\w.-]*"
)
_METRIC = re.compile(r"[\w/]+=[-+]?[\d.]+(e[-+]?\d+)?")  # in the names that Lightning gives: val_loss_avg=0.31
_SAME_MODEL = ("model.safetensors", "pytorch_model.bin")  # where Hugging Face's folders have both, they hold the same
_NEWEST = ("last", "latest")  # what training libraries call a run's newest file
_PARTS_OF_RUNS = ("checkpoints", "checkpoint", "ckpts", "ckpt", "ema", "weights")  # folders in that of their run


@dataclass(frozen=True)
class Source:
    """The checkpoint, and the folders to look for its config in: its own first, then those around it."""

    place: Path
    folders: tuple[Path, ...]
    around: tuple[Path, ...]


def find_source(source: str | Path) -> Source:
    """The checkpoint that `source` means.

    `source` is a file, a folder (a checkpoint, or a run that holds some: the newest counts) or a Hub id
    `org/name[/sub]`, which is looked at only where no such path exists.

    Raises:
        CheckpointError: nothing there, or several candidates.
    """
    path = Path(source).expanduser()
    if not is_utf8(path):
        raise CheckpointError(f"{str(path)!r} is not UTF-8, and libraries take no other paths: rename it")
    if _there(path):
        return _source(path, path)
    match = _HUB_ID.fullmatch(str(source))
    if match is None:
        raise CheckpointError(f"no such file or folder: {source}")
    sub = match["sub"]
    root = download(match["repo"], [sub, f"{sub}/*", "*.yml", "*.yaml", "*.json"] if sub else None)
    path = root / (sub or "")
    if not path.exists():
        raise CheckpointError(f"the Hub model {match['repo']} has no {sub or 'files'}")
    return _source(path, root)


def _there(path: Path) -> bool:
    try:
        if path.exists():
            return True
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link to {path.readlink()}, which is not there")
    return False


def _source(path: Path, given: Path) -> Source:
    place = locate(path)
    if (beside := _average_beside(place, path)) is not None:
        raise CheckpointError(f"{place} has averaged weights (EMA) beside it, in {beside.name}: name the one to export")
    own: dict[Path, None] = {}
    for start in (place, given, place.resolve()):  # config may lie beside a link, or beside what it leads to
        if start.is_dir():
            own[start] = None
        if not start.is_dir() or step_in_name(start.name) is not None:  # checkpoint_10/ lies in its run's folder
            own[start.parent] = None
    inside_run = [folder.resolve() for folder in own]
    around = [f.parent for f in inside_run if f.name in _PARTS_OF_RUNS or step_in_name(f.name) is not None]
    return Source(place, tuple(own), tuple(dict.fromkeys(around)))


def locate(path: Path) -> Path:
    """The checkpoint itself: `path`, or the newest one in a run's folder.

    Raises:
        CheckpointError: the folder holds none, or several files and nothing that says which.
    """
    if not path.is_dir() or recognise(path) is not None:
        return path
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    steps = {step: child for child in _numbered(children) if (step := step_in_name(child.name)) is not None}
    if steps:
        return locate(steps[max(steps)])
    files = [f for f in children if f.suffix in WEIGHT_SUFFIXES and f.is_file() and not _NOT_WEIGHTS.fullmatch(f.name)]
    if all(path / name in files for name in _SAME_MODEL):
        files.remove(path / _SAME_MODEL[1])
    newest = [f for f in files if f.stem in _NEWEST and path / _SAME_MODEL[0] not in files]
    if len(newest) == 1 or len(files) == 1:
        return (newest or files)[0]
    if files:
        raise CheckpointError(f"{path} holds several weight files, name one: {', '.join(f.name for f in files)}")
    nested = [child for child in children if child.name in _PARTS_OF_RUNS and child.is_dir()]
    if nested:
        return locate(nested[0])
    raise CheckpointError(f"{path} holds no checkpoint_<step> and no weight file ({', '.join(WEIGHT_SUFFIXES)})")


def _average_beside(place: Path, run: Path) -> Path | None:
    """A file or folder of averaged weights in a run, next to the checkpoint that was found there, or to its folder."""
    while place != run and not _named_average(place):
        for other in sorted(place.parent.iterdir()):
            if other != place and _named_average(other) and _holds_weights(other):
                return other
        place = place.parent
    return None


def _named_average(path: Path) -> bool:
    return named_average(_METRIC.sub("", path.name))


def _holds_weights(path: Path) -> bool:
    try:
        inside = list(path.iterdir()) if path.is_dir() else []
    except OSError:
        return False
    own = path.is_file() and path.suffix in (*WEIGHT_SUFFIXES, "")
    steps = (step_in_name(each.name) is not None and not each.name.isdigit() for each in inside)
    return own or any(each.suffix in WEIGHT_SUFFIXES for each in inside) or any(steps)


def _numbered(children: list[Path]) -> Iterator[Path]:
    """Checkpoints that are named by their step; bare numbers only where they are folders of one."""
    for child in children:
        if step_in_name(child.name) is not None and (not child.name.isdigit() or child.is_dir()):
            yield child
