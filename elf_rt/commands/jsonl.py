"""JSON lines: read with a reason for each line that cannot be used, and written so that a stop loses nothing."""

import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from elf_rt.errors import InputError
from elf_rt.files import atomic_file, writable_target

MAX_LINE = 1 << 26  # bytes; /dev/zero has no end of line
MAX_DEPTH = 100  # lists and objects inside each other; Python's own limit depends on what calls it


def read_jsonl(path: Path, field: str = "input") -> list[dict[str, Any]]:
    """Records whose ``field`` is a string; ``-`` is standard input.

    Raises:
        InputError: the file cannot be read, or a line is not such a record, or could not be written as JSON again.
    """
    name = "standard input" if str(path) == "-" else str(path)
    records = []
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            # Only "\n" ends a line: JSON may contain U+2028.
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1):
                try:
                    if line.strip():
                        records.append(_record(line, field))
                except InputError as error:
                    raise InputError(f"{name} line {number} {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    if not records:
        raise InputError(f"{name} has no line in it")
    return records


def _record(line: bytes, field: str) -> dict[str, Any]:
    """A line's record. Raises InputError with what is wrong with the line."""
    if len(line) > MAX_LINE:
        raise InputError(f"is longer than {MAX_LINE >> 20} MB")
    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse)
        if _depth(record) > MAX_DEPTH:
            raise RecursionError
    except RecursionError as error:
        raise InputError(f"is nested more than {MAX_DEPTH} deep") from error
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 (byte {error.start})") from error
    except InputError:
        raise
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        raise InputError(f'is not a JSON object with a text "{field}"')
    if field == "input" and not record[field].strip():
        raise InputError("has an empty input")
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise InputError("holds half of a surrogate pair, which cannot be written as UTF-8") from error
    except ValueError as error:
        raise InputError("holds a number that is too large") from error
    return record


def _refuse(name: str) -> NoReturn:
    raise InputError(f"holds {name}, which is not JSON")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


class Part:
    """The lines of a file that are there already. ``<path>.part`` holds them until all are; then it takes the name.
    What they are made from stands beside them, so that another run's are not taken for its own.

    Raises:
        InputError: there are lines of a stopped run, and they are not to be, or not those that are asked for.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any], *, resume: bool) -> None:
        self.path = writable_target(path)
        self.part = self.path.with_name(f"{self.path.name}.part")
        self._run, self._made_from = self.part.with_name(f"{self.part.name}.json"), dict(made_from)
        self.kept = _kept(self.part) if resume else []
        if not resume and self.part.exists() and self.part.stat().st_size:
            raise InputError(
                f"{self.part} holds texts of a run that was stopped: give --resume to write the rest, or remove it"
            )
        if self.kept and self._run.is_file():
            self._check_run()

    def _check_run(self) -> None:
        try:
            run = json.loads(self._run.read_bytes())
            others = [name for name, value in self._made_from.items() if run.get(name) != value]
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{self._run} is not what a stopped run leaves: remove it") from error
        if others:
            given = ", ".join(f"{name} {run.get(name)}" for name in others)
            raise InputError(f"{self.part} is of a run with {given}: give that, or remove it")

    @contextmanager
    def open(self, kept: int, total: int) -> Iterator[TextIO]:
        """Append to the first ``kept`` lines, of ``total`` in all.

        Raises:
            Whatever the block raises, with a note that says how much is done, where anything is.
        """
        with atomic_file(self._run) as work:
            work.write_text(json.dumps(self._made_from), encoding="utf-8")
        with self.part.open("r+b" if kept else "wb") as raw:
            for _ in range(kept):
                raw.readline()
            raw.truncate(raw.tell())
        try:
            with self.part.open("a", encoding="utf-8", newline="\n") as file:
                yield file
        except BaseException as error:
            if done := self.part.read_bytes().count(b"\n"):
                told = f"{done} of {total} texts are in {self.part}: the same command with --resume writes the rest"
                error.add_note(told)
            else:
                self.part.unlink()
                self._run.unlink(missing_ok=True)
            raise
        if self.path.exists():
            self.part.chmod(stat.S_IMODE(self.path.stat().st_mode))
        os.replace(self.part, self.path)
        self._run.unlink(missing_ok=True)


def _kept(part: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may end in the middle of one."""
    if not part.exists():
        return []
    try:
        lines = part.read_bytes().split(b"\n")[:-1] if part.is_file() else [b""]
        records = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        records = [None]
    if not all(isinstance(record, dict) and type(record.get("seed")) is int for record in records):
        raise InputError(f"{part} is not what a stopped run leaves: remove it")
    return records
