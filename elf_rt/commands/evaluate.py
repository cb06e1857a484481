"""``elf-rt eval``: how good the text is, of a JSONL file or of texts written now."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

from elf_rt.bundle import Bundle
from elf_rt.commands.jsonl import read_jsonl
from elf_rt.commands.options import SAMPLING_NAMES, backend_options, sampling_options
from elf_rt.console import note, print_json, progress
from elf_rt.errors import InputError
from elf_rt.measure import evaluation
from elf_rt.text.tokenizer import TextTokenizer

METRICS = ("fluency", "accuracy", "agreement", "self-bleu")
WRITING = ("n", "seed", "seeds", "preset", *SAMPLING_NAMES, "backend", "precision", "threads")


@click.command("eval")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--input",
    "input_path",
    type=click.Path(allow_dash=True, path_type=Path),
    help="JSONL: texts to evaluate (field text), or with BUNDLE prompts (field input).",
)
@click.option(
    "--references",
    "references_path",
    type=click.Path(path_type=Path),
    help="JSONL with a field output.  [default: the field output of --input]",
)
@click.option(
    "--against",
    "against_path",
    type=click.Path(path_type=Path),
    help="JSONL of another run (field text), to measure agreement.",
)
@click.option(
    "--lm",
    "lm_path",
    type=click.Path(path_type=Path),
    help="Local folder of a Hugging Face causal language model, for perplexity.",
)
@click.option(
    "--tokenizer",
    "tokenizer_path",
    type=click.Path(path_type=Path),
    help="Bundle or tokenizer.json whose tokens are counted.  [default: BUNDLE's, else --lm's, else words]",
)
@click.option(
    "--metric",
    "metrics",
    type=click.Choice(METRICS),
    multiple=True,
    help="Only this; may be given several times.  [default: all that the files allow, but self-bleu]",
)
@click.option(
    "-n", "n", type=click.IntRange(1), default=1, help="With BUNDLE: texts for each prompt, or texts without one."
)
@click.option("--seed", type=click.IntRange(0), default=0, help="With BUNDLE: the first seed.")
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    help="With BUNDLE: how often to write all texts; gives mean and deviation.",
)
@sampling_options
@backend_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object: runs, mean, deviation.")
def command(bundle: Path | None, **options: Any) -> None:
    """Measure texts: fluency, and agreement with references or with another run.

    Perplexity, entropy and repetition are always shown together, because repetitive text has a low perplexity.
    """
    if bundle is None:
        _without_bundle(options)
    field = "text" if bundle is None else "input"
    records = [] if options["input_path"] is None else read_jsonl(options["input_path"], field)
    references = _references(records, options)
    against = options["against_path"]
    other = None if against is None else [record["text"] for record in read_jsonl(against, "text")]
    wanted = _wanted(options["metrics"], references, other)
    evaluation.require_libraries(wanted)  # a missing library is told before texts are written
    model = None if options["lm_path"] is None else evaluation.LanguageModel(options["lm_path"])
    tokenize, unit = _tokenizer(bundle, options["tokenizer_path"], model)
    inputs = [record[field] for record in records]
    runs = [(None, inputs)] if bundle is None else _generated_runs(bundle, inputs or None, options)

    results = []
    for seed, texts in runs:
        expected = None if references is None else [r for r in references for _ in range(len(texts) // len(references))]
        measured = _measure(texts, wanted, expected, other, model, tokenize)
        results.append({"seed": seed, "texts": len(texts), **measured})
    summary = _summary(results, unit)
    if options["as_json"]:
        print_json(summary)
    else:
        _show(summary)


def _without_bundle(options: dict[str, Any]) -> None:
    """Refuse what has a meaning only where texts are written."""
    if options["input_path"] is None:
        raise click.UsageError("give --input FILE.jsonl with texts to evaluate, or a BUNDLE to write some")
    context = click.get_current_context()
    for param in context.command.params:
        if param.name in WRITING and context.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{param.opts[0]} has no use without a BUNDLE: no text is written")


def _measure(
    texts: list[str],
    wanted: set[str],
    references: list[str] | None,
    other: list[str] | None,
    model: evaluation.LanguageModel | None,
    tokenize: Callable[[str], evaluation.Tokens],
) -> dict[str, float | None]:
    """The wanted numbers of one run, by name."""
    values: dict[str, float | None] = {}
    tokens = [tokenize(text) for text in texts]
    if "fluency" in wanted:
        perplexity = None
        if model is not None:
            with progress("perplexity", total=len(texts)) as ticker:
                perplexity = model.perplexity(texts, ticker.update)
        values |= evaluation.fluency(tokens, perplexity)
    if "accuracy" in wanted:
        assert references is not None
        values |= evaluation.accuracy(texts, references)
    if "agreement" in wanted:
        assert other is not None
        values |= evaluation.agreement(tokens, [tokenize(text) for text in other])
    if "self-bleu" in wanted:
        with progress("self-BLEU", total=len(texts)) as ticker:
            values["self_bleu"] = evaluation.self_bleu(texts, ticker.update)
    return values


def _wanted(metrics: tuple[str, ...], references: list[str] | None, other: list[str] | None) -> set[str]:
    if not metrics:
        given = (("accuracy", references), ("agreement", other))
        return {"fluency"} | {name for name, needs in given if needs is not None}
    if "accuracy" in metrics and references is None:
        raise InputError(
            "there are no references for exact match, BLEU and ROUGE: give --references FILE.jsonl, "
            'or a field "output" in --input'
        )
    if "agreement" in metrics and other is None:
        raise InputError("there is no other run to agree with: give --against FILE.jsonl")
    return set(metrics)


def _references(records: list[dict[str, Any]], options: dict[str, Any]) -> list[str] | None:
    """One reference for each record; None when there are none at all."""
    if options["references_path"] is not None:
        references = [record["output"] for record in read_jsonl(options["references_path"], "output")]
        if len(references) != len(records):
            raise InputError(
                f"{options['references_path']} has {len(references)} references for {len(records)} records"
            )
        return references
    missing = [number for number, record in enumerate(records, 1) if not isinstance(record.get("output"), str)]
    if len(missing) == len(records):
        return None
    if missing:
        raise InputError(f'{options["input_path"]}: record {missing[0]} has no text "output", but others have')
    return [record["output"] for record in records]


def _tokenizer(
    bundle: Path | None, path: Path | None, model: evaluation.LanguageModel | None
) -> tuple[Callable[[str], evaluation.Tokens], str]:
    """How a text is cut into the tokens that are counted, and the name of these tokens."""
    if path is None and bundle is not None and Bundle.open(bundle).tokenizer.file:
        path = bundle
    if path is None:
        return (str.split, "words") if model is None else (model.tokenize, f"tokens of {model.path.name}")
    if path.is_dir():
        opened = Bundle.open(path)
        if opened.tokenizer.file is None:
            raise InputError(f"{path} has no tokenizer: give --tokenizer tokenizer.json")
        file, name = opened.path(opened.tokenizer.file), opened.name
    else:
        file, name = path, path.name
    if not file.is_file():
        raise InputError(f"no tokenizer at {file}")
    tokenizer = TextTokenizer(file)
    return (lambda text: tokenizer.encode(text)[0]), f"tokens of {name}"


def _generated_runs(
    bundle: Path, prompts: list[str] | None, options: dict[str, Any]
) -> Iterator[tuple[int, list[str]]]:
    """The seed and the texts of each run. Runs share no sample: each takes n seeds of its own."""
    from elf_rt.model import load

    sampling = {name: options[name] for name in ("preset", *SAMPLING_NAMES)}
    with load(bundle, options["backend"], precision=options["precision"], threads=options["threads"]) as model:
        for k in range(options["seeds"]):
            seed = options["seed"] + k * options["n"] * len(prompts or [""])
            with progress(f"writing, run {k + 1} of {options['seeds']}", total=1.0) as ticker:
                results = model.generate(prompts, options["n"], seed=seed, on_step=ticker.update, **sampling)
            texts = [result.text for result in results if result.text is not None]
            if len(texts) < len(results):
                raise InputError(f"{bundle} has no tokenizer, so there is no text to evaluate: export with --tokenizer")
            yield seed, texts
        note(f"{model.params(**sampling).steps} steps, {model.backend_reason}")


def _summary(results: list[dict[str, Any]], unit: str) -> dict[str, Any]:
    """Mean and sample deviation over runs; the deviation of one run is None."""
    mean, deviation = {}, {}
    for name in [key for key in results[0] if key not in ("seed", "texts")]:
        values = [result[name] for result in results]
        known = None not in values
        mean[name] = float(np.mean(values)) if known else None
        deviation[name] = float(np.std(values, ddof=1)) if known and len(values) > 1 else None
    return {"unit": unit, "runs": results, "mean": mean, "deviation": deviation}


def _show(summary: dict[str, Any]) -> None:
    mean, deviation = summary["mean"], summary["deviation"]

    def value(name: str, digits: int) -> str:
        if mean[name] is None:
            return "not measured (no --lm)"
        spread = "" if deviation[name] is None else f" ± {deviation[name]:.{digits}f}"
        return f"{mean[name]:.{digits}f}{spread}"

    runs = summary["runs"]
    click.echo(f"{runs[0]['texts']} texts" + (f", {len(runs)} seeds: mean ± deviation" if len(runs) > 1 else ""))
    if "entropy" in mean:
        click.echo(
            f"perplexity {value('perplexity', 2)}, entropy {value('entropy', 3)} nats, "
            f"repeated 5-grams {value('repetition', 4)}"
        )
        click.echo(f"distinct-1 {value('distinct_1', 3)}, distinct-2 {value('distinct_2', 3)} ({summary['unit']})")
    if "exact_match" in mean:
        rouge = " / ".join(value(f"rouge_{kind}", 1) for kind in ("1", "2", "l"))
        click.echo(f"exact match {value('exact_match', 4)}, BLEU {value('bleu', 2)}, ROUGE-1/2/L {rouge}")
    if "token_agreement" in mean:
        click.echo(f"token agreement {value('token_agreement', 4)}, edit distance {value('edit_distance', 4)}")
    if "self_bleu" in mean:
        click.echo(f"self-BLEU {value('self_bleu', 2)}")
