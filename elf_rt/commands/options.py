"""Options that several commands share."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from elf_rt.bundle import find_bundle
from elf_rt.params import SAMPLERS, SCHEDULES, SamplingParams

F = TypeVar("F", bound=Callable[..., Any])


def _bundle(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path:
    return find_bundle(Path.cwd()) if value is None else value


bundle_argument = click.argument(
    "bundle", type=click.Path(path_type=Path), required=False, callback=_bundle, metavar="[BUNDLE]"
)


def backend_options(command: F) -> F:
    """--backend, --precision, --threads."""
    for option in reversed(
        [
            click.option("--backend", default="auto", help="Engine library; elf-rt doctor lists them."),
            click.option("--precision", default="auto", help="auto, fp32, bf16, fp16 or int8."),
            click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]"),
        ]
    ):
        command = option(command)
    return command


def sampling_options(command: F) -> F:
    """--preset and one option for each field of SamplingParams; the bundle's preset gives what is not named."""
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}

    def help_text(text: str, name: str) -> str:
        return f"{text}  [default: the preset's; {defaults[name]} for ELF-B]"

    for option in reversed(
        [
            click.option("--preset", default="default", help="A named set of the values below, kept in the bundle."),
            click.option("--steps", type=int, help=help_text("Network calls before the decoding one.", "steps")),
            click.option("--sampler", type=click.Choice(SAMPLERS), help=help_text("Sampler.", "sampler")),
            click.option("--schedule", type=click.Choice(SCHEDULES), help=help_text("Time grid.", "schedule")),
            click.option(
                "--guidance-scale", type=float, help=help_text("Classifier-free guidance w.", "guidance_scale")
            ),
            click.option("--sc-cfg", type=float, help=help_text("Self-conditioning guidance s.", "sc_cfg")),
            click.option("--gamma", type=float, help=help_text("Noise of the SDE sampler.", "gamma")),
        ]
    ):
        command = option(command)
    return command


SAMPLING_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))
