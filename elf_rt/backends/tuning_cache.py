"""What was measured on this machine, in sealed files of the user's cache: one for each set of things that it holds for.

A file of another set has another name; one that was cut short or altered counts as empty.
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
        self._made_with = list(made_with)
        digest = hashlib.sha256("\0".join(made_with).encode()).hexdigest()
        self.path = (folder or user_cache() / "tuning") / f"{name}-{digest[:16]}"

    def get(self, key: str) -> Any:
        """What ``put`` was given, or None."""
        return self._entries().get(key)

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Atomically. A cache that cannot be written costs a measurement at the next start, not this one."""
        content = {"made_with": self._made_with, "entries": self._entries() | {key: entry}}
        write_sealed(self.path, json.dumps(content).encode(), "measurements")

    def _entries(self) -> dict[str, Any]:
        content = json.loads(read_sealed(self.path) or b"{}")
        return dict(content["entries"]) if content.get("made_with") == self._made_with else {}
