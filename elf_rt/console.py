"""What the command line shows beside its results: progress, warnings, errors. All of it goes to stderr."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress


def note(text: str) -> None:
    """One line for people, on stderr."""
    click.echo(text, err=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings as one line each, without a source location; each only once."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        # Other libraries' deprecations are not the user's business.
        if issubclass(category, UserWarning) and str(message) not in seen:
            seen.add(str(message))
            note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator["Ticker"]:
    """A progress bar with elapsed time on a terminal (a spinner when ``total`` is None); silent elsewhere."""
    if not sys.stderr.isatty():
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
