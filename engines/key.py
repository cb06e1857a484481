"""The key of a plan: a hash of everything that made it, so that the same request finds the same plan."""

import hashlib
import json
from typing import Any

KEY_LETTERS = 16


def plan_key(**made_from: Any) -> str:
    """16 hex letters of the sha256 of the canonical JSON of all arguments."""
    text = json.dumps(made_from, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LETTERS]


def _plain(value: Any) -> Any:
    return vars(value)  # the frozen dataclasses of elf_rt.plans


def folder_name(*, sms: tuple[int, ...], gpu: str | None, library: str, version: str, key: str) -> str:
    """The folder of a plan, for people: nothing reads meaning from it."""
    place = "-".join(f"sm{sm}" for sm in sms)
    if gpu:
        place += "-" + "".join(letter if letter.isalnum() else "-" for letter in gpu.lower()).strip("-")
    return f"{place}-{library}-{version}-{key}"
