"""``elf-rt build-engine``: TensorRT plans from a bundle."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elf_rt.bundle import Bundle
from elf_rt.commands.options import bundle_argument, commas
from elf_rt.console import note, progress
from elf_rt.errors import BackendError, InputError

if TYPE_CHECKING:
    from elf_rt.engines.build import Spec
    from elf_rt.engines.recipe import Recipe
    from elf_rt.plans import Machine, Record

MB = 1e6
CALL_TOKENS = 8192  # rows x length of a call that texts share: more hardly pay
LEAST_ROWS = 8  # one text takes up to five: four of guidance, and a draft


class ComputeCapability(click.IntRange):
    """86, sm_86 or 8.6."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return super().convert(value.strip().lower().removeprefix("sm_").replace(".", ""), param, ctx)


@click.command("build-engine")
@bundle_argument
@click.option(
    "--precision",
    type=click.Choice(("fp16", "bf16", "fp32")),
    default="fp16",
    help="Of the large products. bf16: Ampere or later; fp32: exact, several times slower.",
)
@click.option("--fp16", "precision", flag_value="fp16", help="The same as --precision fp16.")
@click.option(
    "--target",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    help="Library. auto: TensorRT where it and a GPU are present, else TensorRT-RTX.",
)
@click.option(
    "--sm",
    "sms",
    callback=commas(ComputeCapability(1)),
    metavar="86,89,120",
    help="Compute capabilities to build for (TensorRT-RTX, with or without a GPU here).  "
    "[default: the GPU here; without one, all but 75]",
)
@click.option(
    "--batch",
    metavar="1 | 1:8:32",
    help="Network rows of one call: one number, or least:best:most; several with commas. A text takes one row, and two "
    "or more where guidance is done by extra calls.  [default: one text, and a range for calls that texts share]",
)
@click.option("--length", metavar="L", help="Tokens of canvas, or least:best:most.  [default: the length of training]")
@click.option("--opt-level", type=click.IntRange(0, 5), default=3, help="How long to search: 0 quick, 5 thorough.")
@click.option(
    "--timing-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of kernel timings to reuse and extend (TensorRT only).",
)
@click.option("--dry-run", is_flag=True, help="Show what would be built, with its size and memory.")
def command(
    bundle: Path,
    precision: str,
    target: str,
    sms: tuple[int, ...],
    batch: str | None,
    length: str | None,
    opt_level: int,
    timing_cache: Path | None,
    dry_run: bool,
) -> None:
    """Compile BUNDLE's graphs into TensorRT plans, kept in the bundle.

    A plan that exists already is not built again. Plans run on the GPU generation, library version and operating
    system that they were built for; elf-rt checks this when it loads one.
    """
    from elf_rt.engines.build import PlanRequest, plan_spec
    from elf_rt.engines.shapes import parse_profiles
    from elf_rt.plans import this_machine

    opened, machine = Bundle.open(bundle), this_machine()
    recipe = _recipe(target, sms, machine)
    if timing_cache is not None and not recipe.timing_cache:
        raise InputError(f"--timing-cache has no use: {recipe.library.title} times nothing. Leave it out")
    profiles = parse_profiles(batch or _default_batch(opened), length, opened.config)
    for group in recipe.groups(sms, precision, machine):
        spec = plan_spec(opened, recipe, machine, PlanRequest(precision, group, profiles, opt_level))
        if dry_run:
            _show_plan(opened, spec)
        else:
            _build(opened, spec, timing_cache, machine)


def _recipe(target: str, sms: tuple[int, ...], machine: "Machine") -> "Recipe":
    """The library to build with. TensorRT builds only for a GPU that is here, so --sm alone asks for TensorRT-RTX."""
    from elf_rt.engines.recipe import RECIPES

    if target != "auto":
        recipe = RECIPES[target]
        recipe.library.load()
        return recipe
    reasons = []
    for name, recipe in RECIPES.items():
        reason = recipe.library.unavailable() or recipe.cannot_target(sms, machine)
        if reason is None:
            return recipe
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"no library can build here: {'; '.join(reasons)}")


def _default_batch(bundle: Bundle) -> str:
    """--batch for one text at its fastest, and for the calls of 1, 2, 4, … rows that texts share."""
    from elf_rt.device.calls import MAX_ENTRIES
    from elf_rt.sampling.schedule import guidance_rows

    config = bundle.config
    rows = guidance_rows(bundle.presets["default"], config, conditional=config.max_input_length > 0)
    most = LEAST_ROWS
    while 2 * most <= min(CALL_TOKENS // config.max_length, MAX_ENTRIES):
        most *= 2
    return f"{len(rows)},1:{most}:{most}"


def _build(bundle: Bundle, spec: "Spec", timing_cache: Path | None, machine: "Machine") -> None:
    from elf_rt.engines.build import build
    from elf_rt.engines.store import find_built

    record = find_built(spec.target, spec.key)
    if record is not None:
        if not record.replayed:  # it was built where there was no GPU
            record = _replay(bundle, machine, spec.target, record)
            record.write(spec.target)
        click.echo(f"already built {spec.target}")
    else:
        with progress(f"{spec.recipe.library.title} {spec.version}") as ticker:

            def on_graph(name: str) -> None:
                ticker.describe(f"{spec.recipe.library.title} {spec.version} builds the {name} for {_where(spec)}")

            def prove(folder: Path, record: "Record") -> "Record":
                ticker.describe(f"replaying the plan for {_where(spec)}")
                return _replay(bundle, machine, folder, record)

            record = build(spec, timing_cache, on_graph, prove)
        click.echo(f"built {spec.target}")
    _show_record(record)


def _replay(bundle: Bundle, machine: "Machine", folder: Path, record: "Record") -> "Record":
    """Run the plan in calls of every size that it is for, against what the reference model gave: a library may give
    right numbers for one size and wrong ones for another (https://github.com/NVIDIA/TensorRT/issues/4853).

    Raises:
        BackendError: it writes other text.
    """
    from elf_rt.backends.trt import TrtBackend, why_unavailable
    from elf_rt.measure.verify import REPLAY, verify_rows
    from elf_rt.plans import LIBRARIES

    library, sizes = LIBRARIES[record.library], record.call_sizes(bundle.config.max_length)
    why_not = (
        (None if machine.gpu else f"no GPU here ({machine.no_gpu})")
        or record.mismatch(machine, record.version)
        or why_unavailable(library)
        or (None if REPLAY in bundle.manifest.files else "the bundle has no replay")
        or (None if sizes else f"no profile takes the replay's {bundle.config.max_length} tokens")
    )
    if why_not:
        return dataclasses.replace(record, not_replayed=why_not)
    backend = TrtBackend(bundle, record.precision, library, [(folder, record)])
    with contextlib.closing(backend):
        report = verify_rows(backend, bundle, sizes)
    if wrong := [check for check in report.checks if not check.passed]:
        raise BackendError(
            f"{library.title} {record.version} built a plan that writes other text ({wrong[0].name}: token agreement "
            f"{wrong[0].token_agreement:.4f}): build with --precision fp32, another --opt-level or another version"
        )
    return dataclasses.replace(record, replayed=tuple(sizes), not_replayed="")


def _show_record(record: "Record") -> None:
    for name, engine in record.engines.items():
        click.echo(f"  {name:12} {engine.summary(record.precision)}, built in {engine.seconds:.1f} s")
    click.echo(f"  {'proof':12} {record.proof()}")
    opened = record.engines["denoiser"].attention.get("open", 0)
    if opened and record.precision != "fp32":
        note(f"warning: {opened} attention layers have no fused kernel and need L x L scratch memory")


def _show_plan(bundle: Bundle, spec: "Spec") -> None:
    from elf_rt.engines.shapes import buffer_bytes
    from elf_rt.engines.store import find_built

    record = find_built(spec.target, spec.key)
    click.echo(f"{'has' if record else 'would build'} {spec.target}")
    weights = spec.graphs["weights"].stat().st_size
    lines = [
        ("library", f"{spec.recipe.library.title} {spec.version}, optimisation level {spec.request.opt_level}"),
        ("for", f"{_where(spec)} on {spec.os}"),
        ("precision", spec.request.precision),
        ("weights", f"{weights / MB:.1f} MB, and as much for the plans"),
    ]
    for profile in spec.request.profiles:
        rows, length = profile.rows.most, profile.length.most
        memory = buffer_bytes(bundle.config, rows, length) / MB
        lines.append(("shape", f"{profile.rows} rows of {profile.length} tokens: {memory:.1f} MB of buffers"))
    for name, value in lines:
        click.echo(f"  {name:12} {value}")
    if record is None:
        click.echo("  scratch      told when it is built")
    else:
        _show_record(record)


def _where(spec: "Spec") -> str:
    names = "/".join(f"sm_{sm}" for sm in spec.request.sms)
    return f"{spec.gpu} ({names})" if spec.gpu else names
