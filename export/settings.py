"""The settings of a training run: the YAML beside a checkpoint, or the mapping inside it. Every number has a range."""

import math
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from elf_rt.errors import CheckpointError
from elf_rt.export.foreign import read_json, read_yaml, shown

LENGTH = "max_length"
_SECTIONS = ("model", "data", "dataset", "training", "config", "cfg", "hparams", "args")  # where Hydra users put keys
_RUN_FILES = ("config.yml", "config.yaml", "hparams.yaml", ".hydra/config.yaml")  # training libraries' names
_INTERPOLATION = re.compile(r"\$\{([^${}]+)\}")
_MOST_STEPS = 20  # interpolations that may lead to each other


class Settings:
    """A run's settings, by key: at the top level, or in one of the usual sections.

    where: the file they come from. values: the mapping; empty where nothing was found.
    """

    def __init__(self, values: Mapping[str, Any], where: Path) -> None:
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> Any:
        """The value of a key, its interpolations resolved; None: it is not there, or null.

        Raises:
            CheckpointError: two sections disagree, or an interpolation leads nowhere.
        """
        if (value := self.values.get(key)) is not None:
            return self._resolve(key, value)
        inner = [self.values[name] for name in _SECTIONS if isinstance(self.values.get(name), Mapping)]
        found = [self._resolve(key, part[key]) for part in inner if part.get(key) is not None]
        if any(str(value) != str(found[0]) for value in found):
            raise CheckpointError(f"{self.where} gives {key} in several sections, {shown(found)}: write it at the top")
        return found[0] if found else None

    def _resolve(self, key: str, value: Any) -> Any:
        """What `${section.name}` stands for, as in OmegaConf; resolvers such as `${oc.env:X}` run nothing here."""
        said = value
        for _ in range(_MOST_STEPS):
            match = _INTERPOLATION.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 500 else None
            if match is None:
                if isinstance(value, str) and ("${" in value or value.strip() == "???"):
                    break
                return value
            value = self.values
            for part in match[1].strip().split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is None:
                break
        raise CheckpointError(f"{self.where}: {key} is {shown(said)}, which stands for nothing here: write its value")

    def integer(self, key: str, least: int, most: int) -> int:
        """A whole number; `least` where the key is absent or null. Raises CheckpointError: it is out of range."""
        value = self.get(key)
        if value is None:
            return least
        number = _as_number(value)
        if not (number.is_integer() and least <= number <= most):
            raise CheckpointError(
                f"{self.where}: {key} must be a whole number from {least} to {most}, got {shown(value)}"
            )
        return int(number)

    def integers(self, ranges: Mapping[str, tuple[int, int]], defaults: Container[str]) -> dict[str, int]:
        """Those of some whole numbers that are here, by key.

        Args:
            defaults: keys that may be absent.

        Raises:
            CheckpointError: another one is absent, or one is out of range.
        """
        if absent := [key for key in ranges if key not in self and key not in defaults]:
            raise CheckpointError(f"{self.where} is incomplete ({', '.join(map(repr, absent))})")
        return {key: self.integer(key, *limits) for key, limits in ranges.items() if key in self}

    def number(self, key: str, least: float, most: float) -> float:
        """A number in a range. Raises CheckpointError: it is none, or outside."""
        value = self.get(key)
        number = _as_number(value)
        if not least <= number <= most:  # also refuses NaN
            raise CheckpointError(
                f"{self.where}: {key} must be a number from {least:g} to {most:g}, got {shown(value)}"
            )
        return number


def _as_number(value: Any) -> float:
    """NaN for what is no number. YAML 1.1 reads 1e-3 as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    if isinstance(value, str) and (len(value) > 40 or "_" in value):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def find_settings(folders: Sequence[Path], around: Sequence[Path], inside: Settings, named: Path | None) -> Settings:
    """The settings of a checkpoint: the YAML `named`; else that beside it; else those inside the file; else those of
    the run around it or in a config.json. Without any, those inside, which then say little.

    Raises:
        CheckpointError: the YAML cannot be read, is not a mapping or lacks max_length; or several could be meant.
    """
    if named is not None:
        return _checked(Settings(read_yaml(named), named))
    for folder in folders:
        if (path := _only_yaml(folder)) is not None:
            return _checked(Settings(read_yaml(path), path))
    if LENGTH in inside:
        return inside
    for folder in (*folders, *around):
        for name in (*_RUN_FILES, "config.json"):
            path = folder / name
            if path.is_file():
                found = Settings(read_json(path) if name.endswith(".json") else read_yaml(path), path)
                if LENGTH in found:
                    return found
    return inside


def _only_yaml(folder: Path) -> Path | None:
    """config.yml of a folder, else its only YAML."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".yml", ".yaml") and f.is_file())
    files = [f for f in files if f.stem == "config"][:1] or files
    if len(files) > 1:
        names = ", ".join(f.name for f in files)
        raise CheckpointError(f"{folder} holds several YAML files ({names}): name one with --config")
    return files[0] if files else None


def _checked(settings: Settings) -> Settings:
    if LENGTH not in settings:
        raise CheckpointError(f"{settings.where} lacks {LENGTH}, the number of positions that the model was trained on")
    return settings
