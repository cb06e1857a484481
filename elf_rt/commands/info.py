"""``elf-rt info``: what a bundle holds."""

import dataclasses
from pathlib import Path

import click

from elf_rt.bundle import Bundle
from elf_rt.commands.options import bundle_argument
from elf_rt.console import print_json
from elf_rt.errors import BackendError
from elf_rt.fields import read_json
from elf_rt.manifest import MANIFEST, PrecisionPart
from elf_rt.params import SamplingParams
from elf_rt.plans import Record, graph_hashes, plan_folders

MAIN = ("steps", "sampler", "schedule", "guidance_scale", "sc_cfg", "gamma")  # that every preset shows


@click.command("info")
@bundle_argument
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def command(bundle: Path, as_json: bool) -> None:
    """Show the model, presets, precisions and plans of BUNDLE, after checking every file."""
    opened = Bundle.open(bundle)
    opened.check()
    if as_json:
        print_json(read_json(bundle / MANIFEST), indent=1)
        return
    for name, value in _lines(opened):
        click.echo(f"{name:12} {value}")


def _lines(bundle: Bundle) -> list[tuple[str, str]]:
    c, source = bundle.config, bundle.manifest.source
    size = sum((bundle.folder / name).stat().st_size for name in bundle.manifest.files)
    kind = f"sources of up to {c.max_input_length} tokens" if c.max_input_length else "unconditional"
    lines = [
        ("bundle", f"{bundle.folder}, {size / 1e6:.1f} MB, every file as exported"),
        ("source", f"{source.checkpoint} ({source.weights} weights, sha256 {source.sha256[:12]}…)"),
        ("model", f"{c.depth} blocks of width {c.hidden_size}, {c.num_heads} heads of {c.head_dim}"),
        ("", f"{c.max_length} tokens, {kind}, latents of {c.latent_dim}, vocabulary {c.vocab_size}"),
        ("encoder", bundle.encoder.kind if bundle.encoder else "none"),
        ("tokenizer", bundle.tokenizer.file or "none: token ids only"),
    ]
    for name, params in bundle.presets.items():
        lines.append(("preset", f"{name}: " + _preset(params)))
    for name, files in bundle.variants.items():
        weights = (bundle.folder / files["weights"]).stat().st_size
        lines.append(("precision", f"{name}: weights {weights / 1e6:.1f} MB"))
        plan = bundle.manifest.precision.get(name, PrecisionPart())
        lines += [("", f"{item.name}: {item.reason}") for item in plan.items if item.reason]
        if doubt := bundle.unproven.get(name):
            lines.append(("", f"not proven, so only by name: {doubt}"))
    lines += [("left out", f"{name}: {reason}") for name, reason in bundle.left_out.items()]
    return lines + describe_plans(bundle)


def describe_plans(bundle: Bundle) -> list[tuple[str, str]]:
    """(name, text) lines about every plan of a bundle."""
    lines: list[tuple[str, str]] = []
    for folder in plan_folders(bundle):
        try:
            record = Record.read(folder)
            record.check_files(folder, bundle.digest)
        except BackendError as error:
            lines.append(("plan", str(error)))
            continue
        shapes = ", ".join(f"{profile.rows} rows of {profile.length} tokens" for profile in record.profiles)
        stale = record.precision not in bundle.variants or record.graphs != graph_hashes(bundle, record.precision)
        lines.append(("plan", f"{folder.name}: {record.precision}, {shapes}{', of other weights' if stale else ''}"))
        lines.append(("", record.proof()))
        lines += [("", f"{name}: {engine.summary(record.precision)}") for name, engine in record.engines.items()]
    return lines


def _preset(params: SamplingParams) -> str:
    """The main values, and of the others those that are not the usual ones."""
    shown = [f.name for f in dataclasses.fields(params) if f.name in MAIN or getattr(params, f.name) != f.default]
    return ", ".join(f"{name} {getattr(params, name)}" for name in shown)
