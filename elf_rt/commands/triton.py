"""``elf-rt triton``: a model repository for NVIDIA's Triton Inference Server."""

from pathlib import Path

import click

from elf_rt.commands.options import backend_options, bundle_argument
from elf_rt.console import note


@click.command("triton")
@bundle_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The new folder.")
@backend_options
@click.option("--max-batch", type=click.IntRange(1), default=16, help="Texts that start together.")
@click.option("--max-queue", type=click.IntRange(1), default=128, help="Requests that may wait; more are refused.")
def command(bundle: Path, output: Path, backend: str, precision: str, threads: int | None, **queues: int) -> None:
    """Write a model repository that serves BUNDLE (by default the only *.elfrt folder here) with Triton.

    Two texts are written to measure how long requests may wait for each other: run it on a machine like the server.
    """
    from elf_rt.model import load
    from elf_rt.scale.triton import write_repository

    with load(bundle, backend, precision=precision, threads=threads) as model:
        delay_ms = write_repository(model, output, backend=backend, precision=precision, threads=threads, **queues)
        note(
            f"{output}: models elf and elf_stream on {model.backend_reason}; requests wait {delay_ms:.1f} ms for others"
        )
