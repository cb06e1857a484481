"""``elf-rt bench``: how fast engines are on this machine, and whether their text is the float32 one."""

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from elf_rt import machine
from elf_rt.backends import BACKENDS, discover, held_precisions, variant_of
from elf_rt.bundle import Bundle, find_bundle
from elf_rt.commands.jsonl import read_jsonl
from elf_rt.commands.options import commas
from elf_rt.console import note, print_json, progress
from elf_rt.errors import BackendError, InputError
from elf_rt.files import atomic_file
from elf_rt.libraries import needs, why_absent
from elf_rt.measure.bench import BenchReport, Load, Opened, Work, measure, open_contender
from elf_rt.measure.bench_report import describe_machine, draw, lines
from elf_rt.model import Model, load
from elf_rt.params import RELEASED, ModelConfig
from elf_rt.request import preset_of
from elf_rt.text.tokenizer import TextTokenizer

TINY = ModelConfig(
    depth=2,
    hidden_size=64,
    num_heads=2,
    head_dim=32,
    mlp_dim=128,
    latent_dim=32,
    bottleneck_dim=16,
    vocab_size=512,
    max_length=64,
)
RANDOM = {"tiny": TINY, **RELEASED}
TORCH = ("torch-eager", "torch-compile")
RANDOM_STEPS = 4  # a step takes as long in a run of 4 as in one of 64
RANDOM_PROMPTS = 16
NUMBERS = commas(click.IntRange(1, 9999))


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--random", "random_size", type=click.Choice(tuple(RANDOM)), help="Random weights of this size instead.")
@click.option(
    "--backends",
    callback=commas(click.STRING),
    help="NAME or NAME:PRECISION, with commas between.  [default: all that work here]",
)
@click.option("--vs", callback=commas(click.Choice(TORCH)), help="Also PyTorch: torch-eager, torch-compile, or both.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="With --vs: what the bundle was exported from.  [with BUNDLE]"
)
@click.option("--preset", default="default", help="Sampling parameters kept in the bundle.")
@click.option(
    "--steps",
    callback=NUMBERS,
    help=f"Steps, with commas between.  [default: the preset's; {RANDOM_STEPS} with --random]",
)
@click.option("--batch", "batches", default="1", callback=NUMBERS, help="Texts at once, with commas between.")
@click.option("--repeats", type=click.IntRange(1), default=5, help="Requests that are timed, after one that is not.")
@click.option("--length", type=click.IntRange(1), help="Tokens of canvas.  [default: the length of training]")
@click.option(
    "--input", "input_path", type=click.Path(path_type=Path), help="JSONL of prompts.  [default: random tokens]"
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the first text.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads, up to 4 for each core.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw latency against steps and batch.")
def command(bundle: Path | None, **options: Any) -> None:
    """Time all engines on BUNDLE (by default the only *.elfrt folder here), one after the other in each round.

    All write the same texts from the same noise. "agree" is the share of tokens, and "exact" of texts, that equal
    those of the reference, which runs in float32.
    """
    if bundle is not None and options["random_size"]:
        raise click.UsageError("give a BUNDLE or --random, not both")
    if options["checkpoint"] and not options["vs"]:
        raise click.UsageError("--checkpoint has no use without --vs")
    wanted = [_parse(name) for name in options["backends"]]
    with ExitStack() as stack:
        picture = None if options["plot"] is None else _picture(stack, options["plot"])
        state = None
        if options["random_size"]:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="elf-rt-bench-")))
            state = _write_random(folder, options["random_size"], wanted)
            bundle = folder
        opened_bundle = Bundle.open(bundle or find_bundle(Path.cwd()))
        choices = _with_reference(wanted or _all_here(opened_bundle))
        contenders: dict[str, Load] = {
            f"{name} {p}": partial(load, opened_bundle.folder, name, precision=p, threads=options["threads"])
            for name, p in choices
        }
        contenders |= _torch_contenders(opened_bundle, state, options) if options["vs"] else {}
        report = _run(contenders, _work(opened_bundle, options), options["vs"], strict=bool(wanted))
        machine_here, name = describe_machine(), options["random_size"] or opened_bundle.name
        if picture is not None:
            title = f"{name} on {machine_here['cpu']}, {machine_here['cores']} cores"
            draw(report, title, picture, options["plot"].suffix[1:].lower())
    result = {"machine": machine_here, "model": name, **asdict(report)}
    if options["as_json"]:
        print_json(result, indent=1)
    else:
        click.echo("\n".join(lines(result, report)))


def _picture(stack: ExitStack, path: Path) -> Path:
    """Where to draw, checked before anything is measured; it takes its name when all went well."""
    if reason := why_absent("matplotlib", "__version__", "pip install 'elf-rt[plot]'"):
        raise BackendError(f"--plot needs matplotlib, which is {reason}")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path} must end with .png, .svg or .pdf")
    return stack.enter_context(atomic_file(path))


def _run(contenders: Mapping[str, Load], work: Work, vs: Sequence[str], *, strict: bool) -> BenchReport:
    """Open all, leave out what is the same engine in the same precision or, unless ``strict``, cannot be opened."""
    opened: dict[str, Opened] = {}
    try:
        with progress("opening") as ticker:
            for name, opening in contenders.items():
                ticker.describe(f"opening {name}")
                try:
                    candidate = open_contender(opening, work)
                except BackendError as error:
                    if strict or not opened:
                        raise
                    note(f"left out: {error}")
                    continue
                if candidate.name in opened:
                    candidate.model.close()
                else:
                    opened[candidate.name] = candidate
        baseline = next((name for name in opened if vs and name.startswith(vs[0])), next(iter(opened)))
        with progress("measuring", total=1.0) as ticker:
            return measure(list(opened.values()), work, baseline, ticker.update)
    finally:
        for candidate in opened.values():
            candidate.model.close()


def _parse(name: str) -> tuple[str, str]:
    """NAME or NAME:PRECISION."""
    backend, _, precision = name.partition(":")
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend, precision or "auto"


def _all_here(bundle: Bundle) -> list[tuple[str, str]]:
    """Every backend that works here in its best precision, in float32, and in int8 where the bundle has it."""
    choices = []
    for backend, reason in discover().items():
        if reason is None:
            held = held_precisions(bundle, backend)
            choices += [(backend, p) for p in held if p in (held[0], "fp32", "int8")]
    if not choices:
        raise BackendError("no backend works here: elf-rt doctor tells why")
    return choices


def _with_reference(choices: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A float32 backend first: one of the choices, or ONNX Runtime."""
    exact = [(name, "fp32") for name, p in choices if "fp32" in (p, BACKENDS[name].precisions[0])]
    reference = exact[0] if exact else ("onnxruntime", "fp32")
    return [reference, *(choice for choice in choices if choice != reference)]


def _torch_contenders(bundle: Bundle, state: Any, options: dict[str, Any]) -> dict[str, Load]:
    if state is None and options["checkpoint"] is None:
        raise InputError("--vs needs the weights: give --checkpoint, from which the bundle was exported")
    with needs("--vs", "pip install 'elf-rt[export]'"):
        from elf_rt.export.checkpoint import load_checkpoint
        from elf_rt.export.torch_cpu import TorchCpuBackend
    if state is None:
        source = bundle.manifest.source
        checkpoint = load_checkpoint(options["checkpoint"], raw=source.weights == "raw")
        if checkpoint.sha256 != source.sha256:
            raise InputError(f"{bundle.folder} was not exported from {options['checkpoint']}: export it again")
        state = checkpoint.state
    threads = machine.check_threads(options["threads"])

    def open_torch(name: str) -> Model:
        compiled = name == "torch-compile"
        bf16 = compiled and machine.has_bf16()
        backend = TorchCpuBackend(bundle.config, state, compiled=compiled, bf16=bf16, threads=threads)
        return Model(bundle, lambda _: (backend, "asked for"), threads=threads)

    return {name: partial(open_torch, name) for name in options["vs"]}


def _write_random(folder: Path, size: str, wanted: Sequence[tuple[str, str]]) -> Any:
    """A bundle of random weights with the variants that the wanted backends read; its weights."""
    with needs("--random", "pip install 'elf-rt[export]'"):
        from elf_rt.export.random_bundle import write_random_bundle
    variants = {variant_of(*choice) for choice in wanted if choice[1] != "auto"}
    if not wanted:
        variants = {"int8", "int8-openvino"} if importlib.util.find_spec("nncf") else {"int8"}
    with progress(f"writing random weights of {size}"):
        return write_random_bundle(folder, RANDOM[size], sorted(variants))


def _work(bundle: Bundle, options: dict[str, Any]) -> Work:
    params = preset_of(bundle.presets, options["preset"])
    steps = RANDOM_STEPS if options["random_size"] else params.steps
    return Work(
        steps=options["steps"] or (steps,),
        batches=options["batches"],
        repeats=options["repeats"],
        seed=options["seed"],
        length=options["length"],
        prompts=_prompts(bundle, options["input_path"]),
        preset=options["preset"],
    )


def _prompts(bundle: Bundle, path: Path | None) -> list[str] | None:
    """Those of a file, or texts of random tokens that fill half of a conditional model's source."""
    if path is not None:
        return [record["input"] for record in read_jsonl(path)]
    config = bundle.config
    if bundle.encoder is None or bundle.tokenizer.file is None:
        return None
    tokenizer = TextTokenizer(bundle.path(bundle.tokenizer.file))
    ids = np.random.default_rng(0).integers(
        2, config.vocab_size, (RANDOM_PROMPTS, max(1, config.max_input_length // 2))
    )
    return [tokenizer.decode(row.tolist()) for row in ids]
