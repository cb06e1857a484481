"""``elf-rt export``: a trained checkpoint becomes a bundle."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import click

from elf_rt.bundle import Bundle
from elf_rt.commands.options import commas
from elf_rt.console import is_verbose, note, progress
from elf_rt.errors import BackendError, BundleError
from elf_rt.libraries import needs

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-openvino")


@click.command("export")
@click.argument("checkpoint")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write.  [default: CHECKPOINT's name, .elfrt]"
)
@click.option("--config", type=click.Path(path_type=Path), help="YAML of the model.  [default: the one beside it]")
@click.option("--raw", is_flag=True, help="Take the trained weights, not their moving average (EMA).")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json.  [default: the one beside it]")
@click.option("--encoder", help="Text encoder: safetensors table, T5 folder or Hub id.  [default: the one beside it]")
@click.option(
    "--append-eos/--no-append-eos", default=None, help="End each source text with EOS.  [default: yes; not on GPT-2]"
)
@click.option(
    "--precision",
    callback=commas(click.Choice(PRECISIONS)),
    help=f"Graphs to write: {', '.join(PRECISIONS)}.  [default: fp32, and fp16 where it is proven]",
)
@click.option("--keep-unproven", is_flag=True, help="Keep graphs that --precision names although their text differs.")
@click.option("--dry-run", is_flag=True, help="Say what was found and what would be written, and write nothing.")
@click.option(
    "--opset",
    type=click.Choice(("23", "20")),
    default="23",
    help="Of the ONNX graphs; 20 for engines that lack fused operators, such as TensorRT 10.3 on JetPack 6.",
)
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="JSONL of sources to measure and replay with.  [default: random]"
)
@click.option("--presets", type=click.Path(path_type=Path), help="JSON of named sampling parameters to add.")
def command(
    checkpoint: str,
    output: Path | None,
    precision: tuple[str, ...],
    dry_run: bool,
    opset: str,
    prompts: Path | None,
    presets: Path | None,
    **given: Any,
) -> None:
    """Turn CHECKPOINT (a file, a folder, or a Hub id org/name) into a bundle, and prove it.

    Each precision is replayed, and becomes a part of the bundle only when its text is the reference model's. fp32
    graphs are always written. fp16 ones that are not proven keep more operations in float32, for two minutes at most,
    and are left out after that. int8 is the exception: its text is another, and it runs only where it is asked for.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads would fight for the cores of a busy machine
    with needs("export", "pip install 'elf-rt[export]'"):
        from elf_rt.export.pipeline import ExportOptions, default_output, export_bundle, read_presets
    if "int8-openvino" in precision and importlib.util.find_spec("nncf") is None:
        raise BackendError("int8-openvino needs nncf: pip install 'elf-rt[int8]'")
    from elf_rt.commands.jsonl import read_jsonl
    from elf_rt.measure.verify import VerifyReport, verify_folder

    output = output or default_output(checkpoint)
    options = ExportOptions(
        precisions=list(dict.fromkeys(["fp32", *(precision or ["fp16"])])),
        required=precision,
        verbose=is_verbose(),
        opset=int(opset),
        prompts=[record["input"] for record in read_jsonl(prompts)] if prompts else (),
        presets=read_presets(presets) if presets else {},
        **given,
    )
    if dry_run:
        from elf_rt.export.dry_run import describe_export

        for title, text in describe_export(checkpoint, output, options):
            click.echo(f"{title:12} {text}")
        return

    def prove(folder: Path, name: str) -> VerifyReport:
        precision, _, engine = name.partition("-")
        return verify_folder(folder, backend=engine or "onnxruntime", precision=precision)

    had_plans, had_presets = (output / "plans").is_dir(), _presets_of(output)
    with progress("reading the checkpoint") as ticker:
        notes = export_bundle(checkpoint, output, options, prove=prove, say=ticker.describe)
    for line in notes:
        note(line)
    bundle = Bundle.open(output)
    if had_plans:
        note("warning: the engines of the bundle that was here are gone with it: elf-rt build-engine builds new ones")
    if lost := [name for name in had_presets if name not in bundle.presets]:
        note(f"warning: the bundle that was here had presets that this one has not: {', '.join(lost)}")
    if bundle.config.max_input_length > 0 and bundle.encoder is None:
        note("warning: no text encoder found, so this bundle takes no prompts: export again with --encoder")
    if bundle.tokenizer.file is None:
        note("warning: no tokenizer.json found, so this bundle gives token ids only: export again with --tokenizer")
    click.echo(output)


def _presets_of(folder: Path) -> list[str]:
    """The names of a bundle's presets, as far as there is one."""
    try:
        return list(Bundle.open(folder).presets)
    except BundleError:
        return []
