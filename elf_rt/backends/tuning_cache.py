"""What was measured on this machine, in JSON files of the user's cache: one for each set of things that it holds for.

A file of another set has another name; one that was cut short, or is not what it should be, counts as empty.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elf_rt.machine import user_cache

NO_TUNE = "ELF_RT_NO_TUNE"  # environment variable: where it is set nothing is measured at load
_log = logging.getLogger(__name__)


class TuningCache:
    """Entries by key. made_with: the GPU, versions and sources that they hold for."""

    def __init__(self, name: str, made_with: Sequence[str], folder: Path | None = None) -> None:
        self._made_with = list(made_with)
        digest = hashlib.sha256("\0".join(made_with).encode()).hexdigest()
        self.path = (folder or user_cache() / "tuning") / f"{name}-{digest[:16]}.json"

    def get(self, key: str) -> Any:
        """What ``put`` was given, or None."""
        return self._entries().get(key)

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Atomically. A cache that cannot be written costs a measurement at the next start, not this one."""
        content = {"made_with": self._made_with, "entries": self._entries() | {key: entry}}
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                temporary = Path(file.name)
                json.dump(content, file, indent=1)
            temporary.replace(self.path)
        except OSError as error:
            _log.warning("measurements are not kept: %s", error)
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _entries(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("made_with") != self._made_with:
            return {}
        entries = content.get("entries")
        return entries if isinstance(entries, dict) else {}
