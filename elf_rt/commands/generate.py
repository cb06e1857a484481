"""``elf-rt generate``: text from a bundle."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import click

from elf_rt.bundle import Bundle
from elf_rt.commands.jsonl import Part, read_jsonl
from elf_rt.commands.options import SAMPLING_NAMES, backend_options, bundle_argument, sampling_options
from elf_rt.console import note, progress, utf8_output
from elf_rt.errors import InputError
from elf_rt.files import sha256
from elf_rt.manifest import MANIFEST

WRITTEN = ("text", "seed", "ids", "ms")  # fields of a line that are not those of its record


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
    "-o",
    "--output",
    "output_path",
    type=click.Path(allow_dash=True, path_type=Path),
    help="Write JSONL to this file; - writes to standard output. What a run that is stopped has written is kept.",
)
@click.option("--resume", is_flag=True, help="Go on with the --output of a run that was stopped.")
@click.option("-n", "n", type=click.IntRange(1), default=1, help="Texts for each prompt.")
@click.option("--seed", type=click.IntRange(0), help="Text k has seed SEED + k.  [default: drawn at random and told]")
@click.option("--length", type=click.IntRange(1), help="Tokens of canvas.  [default: the length of training]")
@click.option("--template", help='Text with blanks of n tokens to fill: "The train to [2] leaves at [5]."')
@sampling_options
@backend_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: text, seed, input, timings.")
@click.option("--watch", is_flag=True, help="Show the text forming in the terminal.")
@click.option("--ray", "ray_address", metavar="ADDRESS|local", help="Spread the texts over a Ray cluster, to --output.")
def command(
    bundle: Path,
    prompts: tuple[str, ...],
    input_path: Path | None,
    output_path: Path | None,
    resume: bool,
    n: int,
    seed: int | None,
    length: int | None,
    template: str | None,
    backend: str,
    precision: str,
    threads: int | None,
    as_json: bool,
    watch: bool,
    ray_address: str | None,
    **sampling: Any,
) -> None:
    """Write text from BUNDLE (by default the only *.elfrt folder here)."""
    from elf_rt.model import load

    if prompts and input_path:
        raise click.UsageError("give --prompt or --input, not both")
    records: list[dict[str, Any]] = [{"input": p} for p in prompts] if input_path is None else read_jsonl(input_path)
    if resume and (output_path is None or not _is_file(output_path)):
        raise click.UsageError("--resume goes on with the file of --output: name it")
    total = n * max(1, len(records))
    if ray_address is not None:
        from elf_rt.scale.ray_data import Job

        sampling |= {"length": length, "pinned": template}
        job = Job(bundle.resolve(), seed, n if records else 1, sampling, backend, precision, threads)
        _spread(ray_address, records or [{}] * n, output_path, job, resume)
        return
    part = None
    if output_path is not None and _is_file(output_path):
        asked = {"n": n if records else 1, "length": length, "template": template, "backend": backend}
        manifest = bundle / MANIFEST
        own = {manifest, *(bundle / name for name in Bundle.open(bundle).manifest.files), input_path}
        if output_path.exists() and any(path and path.exists() and path.samefile(output_path) for path in own):
            raise click.UsageError(f"{output_path} is what the texts are made from: name another --output")
        made_from = {"bundle": sha256(manifest), "precision": precision, **asked, **sampling}
        part = Part(output_path, made_from, resume=resume)
    done, seed = (0, seed) if part is None else _resumed(part, records, n, seed)
    with ExitStack() as stack:
        model = stack.enter_context(load(bundle, backend, precision=precision, threads=threads))
        params = model.params(**sampling)
        arguments = {
            "prompts": [r["input"] for r in records[done // n :]] or None,
            "n": n if records else n - done,
            "seed": None if seed is None else seed + done,
            "preset": sampling["preset"],
            "length": length,
            "pinned": template,
            **{name: sampling[name] for name in SAMPLING_NAMES},
        }
        in_json = as_json or output_path is not None
        file = stack.enter_context(part.open(done, total)) if part else _stream(stack, output_path, in_json)
        write = partial(_write_json, file) if in_json else partial(_write_text, file, total == 1)
        watched = watch and sys.stdout.isatty()
        batches = _watch(model, arguments) if watched else _wait(model, arguments, total - done)
        written = done
        for results in batches if total > done else ():
            for result in results:
                source = records[written // n] if records else {}
                write({**source, **result.to_json()})
                written += 1
                seed = result.seed - (written - 1)
        if not as_json and written:
            note(f"seed {seed}, {params.steps} steps, {model.backend_reason}")


def _spread(address: str, records: list[dict[str, Any]], output: Path | None, job: Any, resume: bool) -> None:
    """Texts that a Ray cluster writes, behind a progress bar."""
    from elf_rt.scale.ray_data import write_jsonl

    if output is None or not _is_file(output):
        raise click.UsageError("--ray writes the file of --output: name it")
    total = job.n * len(records)
    with progress(f"writing {total} text{'s' * (total > 1)} on Ray", total=total) as ticker:
        seed = write_jsonl(
            records, output, job, address=address, resume=resume, on_shard=lambda each: ticker.update(each.done)
        )
    note(f"seed {seed}, on Ray at {address}")


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


def _watch(model: Any, arguments: dict[str, Any]) -> Iterator[list[Any]]:
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


def _is_file(path: Path) -> bool:
    """Whether an output is a file, or will be; a pipe or a device is written to directly."""
    return str(path) != "-" and (path.is_file() or path.is_dir() or not path.exists())


def _resumed(part: Part, records: list[dict[str, Any]], n: int, seed: int | None) -> tuple[int, int | None]:
    """How many texts of an earlier run stay, all of a prompt or none, and the first seed of the whole run."""
    done = len(part.kept) // n * n if records else len(part.kept)
    if done == 0:
        return 0, seed
    first = part.kept[0]["seed"]
    for k, kept in enumerate(part.kept[:done]):
        record = {"input": None, **(records[k // n] if k // n < len(records) else {})}
        same = all(kept.get(name) == value for name, value in record.items() if name not in WRITTEN)
        if not same or kept["seed"] != first + k or seed not in (None, first):
            raise InputError(f"{part.part} is of another run (line {k + 1}): give what it was given, or remove it")
    return done, first


def _stream(stack: ExitStack, path: Path | None, as_json: bool) -> TextIO:
    if path is None or str(path) == "-":
        if as_json:
            utf8_output()
        return sys.stdout
    return stack.enter_context(path.open("w", encoding="utf-8"))


def _write_json(file: TextIO, record: dict[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=False, allow_nan=False), file=file, flush=True)


def _write_text(file: TextIO, single: bool, record: dict[str, Any]) -> None:
    text = record["text"] if record["text"] is not None else " ".join(map(str, record["ids"]))
    line = text if single or "\n" not in text else text + "\n"
    if file.isatty() and record["input"] is not None and not single:
        line = click.style(record["input"], dim=True) + "\n  " + line
    print(line, file=file, flush=True)
