"""Folders of plans that appear whole or not at all, also when builds are killed or run at the same time."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from elf_rt.errors import BackendError
from elf_rt.files import UNFINISHED, locked, remove_abandoned, unfinished_folder
from elf_rt.plans import Record


def find_built(target: Path, key: str) -> Record | None:
    """The record of a plan that was built before with this key and is still whole, or None."""
    if not target.is_dir():
        return None
    try:
        record = Record.read(target)
        record.check_files(target)
    except BackendError:
        return None  # damaged: to be built again and replaced
    return record if record.key == key else None


@contextlib.contextmanager
def new_plan(target: Path, key: str) -> Iterator[Path]:
    """A hidden folder to write a plan into; it takes the name ``target`` when the block succeeds.

    When another build of the same key was faster, its plan stays and ours is dropped. An exception in the block leaves
    nothing, and the command line makes one of each signal that ends it; what a killed process leaves is removed by the
    next build.
    """
    plans = target.parent
    plans.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(plans) as work:
        yield work
        work.chmod(0o755)
        _publish(work, target, key)


def _publish(work: Path, target: Path, key: str) -> None:
    with locked(target.parent):
        if find_built(target, key):
            return
        if target.exists():  # damaged: moved aside whole, so that nobody ever sees half of it
            os.replace(target, Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=target.parent)) / "damaged")
        os.replace(work, target)
        remove_abandoned(target.parent)
