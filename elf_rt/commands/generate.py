"""``elf-rt generate``: text from a bundle."""

import json
import secrets
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, TypeGuard

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
    from elf_rt.model import Text, load
    from elf_rt.request import check_seed, preset_of

    if prompts and input_path:
        raise click.UsageError("give --prompt or --input, not both")
    if (resume or ray_address) and not _is_file(output_path):
        raise click.UsageError("--resume goes on with the file of --output, and --ray writes one: name it")
    records: list[dict[str, Any]] = [{"input": p} for p in prompts] if input_path is None else read_jsonl(input_path)
    sources, total = [record["input"] for record in records], n * max(1, len(records))
    opened = Bundle.open(bundle)
    params = preset_of(opened.presets, sampling["preset"]).replace(**{name: sampling[name] for name in SAMPLING_NAMES})
    part = None
    if _is_file(output_path):
        made_from = {"n": n if records else 1, "length": length, "template": template, **sampling}
        made_from |= {"backend": backend, "precision": precision}
        part = _open_part(output_path, input_path, opened, made_from, resume)
    done, seed = (0, seed) if part is None else _resumed(part, records, n, seed)
    seed = check_seed(secrets.randbits(32) if seed is None else seed, total)
    engine: dict[str, Any] = {"backend": backend, "precision": precision, "threads": threads}
    canvas: dict[str, Any] = {"length": length, "pinned": template}
    with ExitStack() as stack:
        watched = watch and ray_address is None and sys.stdout.isatty()
        begin: Callable[[], Any]
        if ray_address is None:
            model = stack.enter_context(load(bundle, **engine))
            left: dict[str, Any] = {"prompts": sources[done // n :] or None, "n": n if records else n - done}
            begin = partial(model.stream, **left, seed=seed + done, drafts_every=int(watched), **canvas, **sampling)
            where = model.backend_reason
        else:
            from elf_rt.scale.ray_data import write_shards

            each = [prompt for prompt in sources for _ in range(n)] or [None] * n
            texts = [Text(prompt, seed + k, params=params, **canvas) for k, prompt in enumerate(each)]
            begin = partial(write_shards, texts[done:], bundle.resolve(), **engine, address=ray_address)
            where = f"on Ray at {ray_address}"
        in_json = as_json or output_path is not None
        file = stack.enter_context(part.open(done, total)) if part else _stream(stack, output_path, in_json)
        write = partial(_write_json, file) if in_json else partial(_write_text, file, total == 1)
        batches = stack.enter_context(closing(_watch(begin) if watched else _wait(begin, total - done)))
        for k, result in enumerate(chain.from_iterable(batches) if done < total else (), done):
            source = records[k // n] if records else {}
            write({**source, **result.to_json()})
        if not as_json:
            note(f"seed {seed}, {params.steps} steps, {where}")


def _open_part(output: Path, source: Path | None, bundle: Bundle, made_from: dict[str, Any], resume: bool) -> Part:
    """Where the texts are kept until all are there."""
    manifest = bundle.folder / MANIFEST
    own = {manifest, *(bundle.folder / name for name in bundle.manifest.files), source}
    if output.exists() and any(path and path.exists() and path.samefile(output) for path in own):
        raise click.UsageError(f"{output} is what the texts are made from: name another --output")
    return Part(output, {"bundle": sha256(manifest), **made_from}, resume=resume)


def _wait(begin: Callable[[], Any], total: int) -> Generator[list[Any], None, None]:
    """Batches of results behind a progress bar."""
    done = 0
    with progress(f"writing {total} text{'s' * (total > 1)}", total=total) as ticker, closing(begin()) as events:
        for event in events:
            if isinstance(event, list):
                done += len(event)
                with ticker.hidden():
                    yield event
                ticker.update(done)
            else:
                ticker.update(done + event.batch * event.step / event.steps)


def _watch(begin: Callable[[], Any]) -> Generator[list[Any], None, None]:
    """Batches of results behind a live view of the first text of each batch."""
    from rich.console import Console
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    events = begin()
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


def _is_file(path: Path | None) -> TypeGuard[Path]:
    """Whether an output is a file, or will be; a pipe or a device is written to directly."""
    return path is not None and str(path) != "-" and (path.is_file() or path.is_dir() or not path.exists())


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
