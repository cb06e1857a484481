"""Options that several commands share."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from elf_rt.backends import BACKENDS, PRECISIONS
from elf_rt.backends.table import NO_TUNE
from elf_rt.bundle import find_bundle
from elf_rt.params import SAMPLERS, SCHEDULES, SamplingParams

F = TypeVar("F", bound=Callable[..., Any])


def commas(kind: "click.ParamType[Any]") -> Callable[..., tuple[Any, ...]]:
    """The callback of an option that takes values with commas between: each once, none where it is not given."""

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[Any, ...]:
        parts = [] if value is None else value.split(",")
        return tuple(dict.fromkeys(kind.convert(part, param, ctx) for part in parts))

    return convert


def _bundle(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path:
    return find_bundle(Path.cwd()) if value is None else value


def _no_tune(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        os.environ[NO_TUNE] = "1"


bundle_argument = click.argument(
    "bundle", type=click.Path(path_type=Path), required=False, callback=_bundle, metavar="[BUNDLE]"
)


def backend_options(command: F) -> F:
    """--backend, --precision, --threads; and --no-tune, which is a setting of the process."""
    for option in reversed(
        [
            click.option(
                "--backend", type=click.Choice(("auto", *BACKENDS)), default="auto", help="Engine library; see doctor."
            ),
            click.option("--precision", type=click.Choice(PRECISIONS), default="auto", help="Of the large products."),
            click.option(
                "--threads", type=click.IntRange(1), help="CPU threads, up to 4 for each core.  [default: all cores]"
            ),
            click.option(
                "--no-tune",
                is_flag=True,
                expose_value=False,
                callback=_no_tune,
                help=f"Do not measure which way is the fastest on this GPU; also {NO_TUNE}=1.",
            ),
        ]
    ):
        command = option(command)
    return command


SAMPLING: dict[str, tuple[Any, str]] = {  # field of SamplingParams -> (type of the option, help)
    "steps": (int, "Network calls before the decoding one."),
    "sampler": (click.Choice(SAMPLERS), "Sampler."),
    "schedule": (click.Choice(SCHEDULES), "Time grid."),
    "guidance_scale": (float, "Classifier-free guidance w."),
    "sc_cfg": (float, "Self-conditioning guidance s."),
    "gamma": (float, "Noise of the samplers sde and refine."),
    "temperature": (float, "Factor on all noise."),
    "gamma_power": (float, "Anneals it: gamma (1 - t)^power."),
    "grid_mean": (float, "Mean of the logit-normal time grid."),
    "grid_std": (float, "Its standard deviation."),
    "time_shift": (float, "Of the schedule shift: above 1, more steps near the noise."),
    "x_prev_scale": (float, "Factor on the estimate fed back to the network."),
    "guidance_from": (float, "Guide only from this time on."),
    "guidance_until": (float, "Guide only up to this time."),
}


def sampling_options(command: F) -> F:
    """--preset and one option for each field of SamplingParams; the bundle's preset gives what is not named."""
    for field in reversed(dataclasses.fields(SamplingParams)):
        kind, text = SAMPLING[field.name]
        default = "the model's" if field.default is None else field.default
        text = f"{text}  [default: the preset's; {default} for ELF-B]"
        command = click.option(f"--{field.name.replace('_', '-')}", type=kind, help=text)(command)
    help_text = "A named set of the values below, kept in the bundle."
    return click.option("--preset", default="default", help=help_text)(command)


SAMPLING_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))
