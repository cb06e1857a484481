"""The standard streams, and what the command line shows beside its results: progress, warnings, errors, on stderr."""

import contextlib
import io
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress


def open_streams() -> None:
    """Make the standard streams usable, whatever the shell did with them.

    A stream that is closed (``>&-``) gets /dev/null in its place, or the next file that is opened would get its number,
    and what a library prints would go into that. What is written to a closed standard output fails all the same. Text
    goes to a terminal in its own encoding, with ? for what it cannot show, and anywhere else in UTF-8, unless
    PYTHONIOENCODING names another.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stays = stream.isatty() or "PYTHONIOENCODING" in os.environ
            stream.reconfigure(encoding=None if stays else "utf-8", errors="replace")


def utf8_output() -> None:
    """Standard output in UTF-8, whatever the terminal's encoding: for JSON."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def print_json(value: Any, indent: int | None = None) -> None:
    """One JSON value on standard output; a number that is not finite, which JSON has not, is null."""
    utf8_output()
    click.echo(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def close_streams() -> OSError | None:
    """Write out what is left in the streams; why standard output could not be written, or None. A stream that failed
    leads to /dev/null afterwards, so that Python does not complain of it once more."""
    failed = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            _silence(stream)
            failed = error if stream is sys.stdout else failed
    return failed


def _silence(stream: Any) -> None:
    with contextlib.suppress(OSError, AttributeError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


QUIET, NORMAL, VERBOSE = -1, 0, 1
_verbosity = NORMAL


def set_verbosity(level: int) -> None:
    """QUIET, NORMAL or VERBOSE, for the whole process."""
    global _verbosity
    _verbosity = level


def is_verbose() -> bool:
    return _verbosity >= VERBOSE


def note(text: str) -> None:
    """One line for people, on stderr, unless they want none."""
    if _verbosity >= NORMAL:
        complain(text)


def complain(text: str, error: BaseException | None = None) -> None:
    """One line on stderr, and where ``error`` comes from if the user wants that. Nothing where stderr is closed or
    full, for the results matter more."""
    try:
        if error is not None and _verbosity >= VERBOSE:
            click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        click.echo(text, err=True)
    except OSError:
        _silence(sys.stderr)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings as one line each, without a source location; each only once."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        # Other libraries' deprecations are not the user's business, unless that is asked for.
        if (issubclass(category, UserWarning) or _verbosity >= VERBOSE) and str(message) not in seen:
            seen.add(str(message))
            note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator["Ticker"]:
    """A progress bar with elapsed time on a terminal (a spinner when ``total`` is None); silent elsewhere."""
    if not sys.stderr.isatty() or _verbosity < NORMAL:
        yield Ticker(None, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = [] if total is None else [BarColumn(), TextColumn("{task.percentage:>3.0f}%")]
    columns = [SpinnerColumn(), TextColumn("{task.description}"), *bar, TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield Ticker(shown, shown.add_task(description, total=total))


class Ticker:
    """Moves a progress bar; does nothing when there is none."""

    def __init__(self, shown: "Progress | None", task: Any) -> None:
        self._shown = shown
        self._task = task

    def update(self, done: float, total: float | None = None) -> None:
        if self._shown is not None:
            self._shown.update(self._task, completed=done, total=total)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside the context the bar is off the screen, so that results can be printed there."""
        if self._shown is not None:
            self._shown.stop()
        yield
        if self._shown is not None:
            self._shown.start()

    def describe(self, description: str) -> None:
        if self._shown is not None:
            self._shown.update(self._task, description=description)
