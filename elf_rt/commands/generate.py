"""``elf-rt generate``: text from a bundle."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from elf_rt.bundle import atomic_file
from elf_rt.commands.options import SAMPLING_NAMES, backend_options, bundle_argument, sampling_options
from elf_rt.console import note, progress
from elf_rt.errors import InputError


@click.command("generate")
@bundle_argument
@click.option("--prompt", "prompts", multiple=True, help="A source text; may be given several times.")
@click.option(
    "--input",
    "input_path",
    type=click.Path(allow_dash=True, path_type=Path),
    help="JSONL with a field input; its other fields are kept, but text, seed and ms; - reads standard input.",
)
@click.option(
    "--output",
    "output_path",
    type=click.Path(allow_dash=True, path_type=Path),
    help="Write JSONL to this file, when all is done; - writes to standard output.",
)
@click.option("-n", "n", type=click.IntRange(1), default=1, help="Texts for each prompt.")
@click.option("--seed", type=click.IntRange(0), help="Text k has seed SEED + k.  [default: drawn at random and told]")
@click.option("--length", type=click.IntRange(1), help="Tokens of canvas.  [default: the length of training]")
@click.option("--template", help='Text with blanks of n tokens to fill: "The train to [2] leaves at [5]."')
@sampling_options
@backend_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: text, seed, input, timings.")
@click.option("--watch", is_flag=True, help="Show the text forming in the terminal.")
def command(
    bundle: Path,
    prompts: tuple[str, ...],
    input_path: Path | None,
    output_path: Path | None,
    n: int,
    seed: int | None,
    length: int | None,
    template: str | None,
    backend: str,
    precision: str,
    threads: int | None,
    as_json: bool,
    watch: bool,
    **sampling: Any,
) -> None:
    """Write text from BUNDLE (by default the only *.elfrt folder here)."""
    from elf_rt.model import load

    if prompts and input_path:
        raise click.UsageError("give --prompt or --input, not both")
    records = [{"input": p} for p in prompts] if input_path is None else read_jsonl(input_path)
    with ExitStack() as stack:
        sink = stack.enter_context(_sink(output_path, as_json))
        model = stack.enter_context(load(bundle, backend, precision=precision, threads=threads))
        params = model.params(**sampling)
        arguments = {
            "prompts": [r["input"] for r in records] or None,
            "n": n,
            "seed": seed,
            "preset": sampling["preset"],
            "length": length,
            "pinned": template,
            **{name: sampling[name] for name in SAMPLING_NAMES},
        }
        total = n * max(1, len(records))
        show = _watch if watch and sys.stdout.isatty() else _wait
        written = 0
        for results in show(model, arguments, total):
            for result in results:
                source = records[written // n] if records else {}
                sink({**source, **_record(result)}, single=total == 1)
                written += 1
        if not as_json and written:
            note(f"seed {results[-1].seed - (total - 1)}, {params.steps} steps, {model.backend_reason}")


def _wait(model: Any, arguments: dict[str, Any], total: int) -> Iterator[list[Any]]:
    """Batches of results behind a progress bar."""
    done = 0
    with progress(f"writing {total} text{'s' * (total > 1)}", total=total) as ticker:
        for event in model.stream(drafts_every=0, **arguments):
            if isinstance(event, list):
                done += len(event)
                with ticker.hidden():
                    yield event
            else:
                ticker.update(done + event.batch * event.step / event.steps)


def _watch(model: Any, arguments: dict[str, Any], total: int) -> Iterator[list[Any]]:
    """Batches of results behind a live view of the first text of each batch."""
    from rich.console import Console
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    events = model.stream(drafts_every=1, **arguments)
    results: list[Any] | None = []
    while results is not None:
        text, results = "", None
        with Live(console=Console(stderr=True), transient=True, refresh_per_second=20) as live:
            for event in events:
                if isinstance(event, list):
                    results = event
                    break
                if event.texts is not None:
                    text = event.texts[0] or ""
                live.update(Panel(Text(text), title=f"step {event.step} of {event.steps}, t = {event.t:.3f}"))
        if results is not None:  # printed where the view was
            yield results


class _sink:
    """Where results go: a JSONL file that appears when all is done, JSON lines, or plain text."""

    def __init__(self, path: Path | None, as_json: bool) -> None:
        self._as_json = as_json or path is not None
        self._stack = ExitStack()
        self._file = sys.stdout
        if path is not None and str(path) != "-":
            work = self._stack.enter_context(atomic_file(path))
            self._file = self._stack.enter_context(work.open("w", encoding="utf-8"))

    def __enter__(self) -> "_sink":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def __call__(self, record: dict[str, Any], single: bool) -> None:
        if self._as_json:
            line = json.dumps(record, ensure_ascii=False)
        else:
            text = record["text"] if record["text"] is not None else " ".join(map(str, record["ids"]))
            line = text if single or "\n" not in text else text + "\n"
            if self._file.isatty() and record["input"] is not None and not single:
                line = click.style(record["input"], dim=True) + "\n  " + line
        print(line, file=self._file, flush=True)


def _record(result: Any) -> dict[str, Any]:
    record = {"input": result.prompt, "text": result.text, "seed": result.seed}
    if result.text is None:
        record["ids"] = result.ids.tolist()
    timings = result.timings
    record["ms"] = {
        "total": round(timings.total_ms, 3),
        "waited": round(timings.waited_ms, 3),
        "network": round(timings.network_ms, 3),
    }
    return record


def read_jsonl(path: Path, field: str = "input") -> list[dict[str, Any]]:
    """Records whose ``field`` is a string; ``-`` is standard input."""
    name = "standard input" if str(path) == "-" else str(path)
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")  # splitlines also cuts at U+2028, which JSON may contain
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise InputError(f'{name} line {number} is not a JSON object with a text "{field}"')
        if field == "input" and not record[field].strip():
            raise InputError(f"{name} line {number} has an empty input")
        if not _is_unicode(record):
            raise InputError(f"{name} line {number} holds half of a surrogate pair, which cannot be written as UTF-8")
        records.append(record)
    if not records:
        raise InputError(f"{name} has no line in it")
    return records


def _is_unicode(record: dict[str, Any]) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
