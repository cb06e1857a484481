"""What was measured on this machine, in sealed files of the user's cache: one for each entry and set of things that it
holds for.

An entry of another set has another name; one that was cut short or altered counts as none.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elf_rt.files import read_sealed, write_sealed
from elf_rt.machine import user_cache

NO_TUNE = "ELF_RT_NO_TUNE"  # environment variable: where it is set nothing is measured at load


class TuningCache:
    """Entries by key. made_with: the GPU, versions and sources that they hold for."""

    def __init__(self, name: str, made_with: Sequence[str], folder: Path | None = None) -> None:
        self._name, self._made_with = name, tuple(made_with)
        self._folder = folder or user_cache() / "tuning"

    def path(self, key: str) -> Path:
        """The file of an entry."""
        digest = hashlib.sha256("\0".join((*self._made_with, key)).encode()).hexdigest()
        return self._folder / f"{self._name}-{digest[:16]}"

    def get(self, key: str) -> Any:
        """What ``put`` was given, or None."""
        return json.loads(read_sealed(self.path(key)) or b"null")

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Atomically. A cache that cannot be written costs a measurement at the next start, not this one."""
        write_sealed(self.path(key), json.dumps(entry).encode(), "measurements")
