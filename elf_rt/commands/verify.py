"""``elf-rt verify``: does this bundle, on this machine, write what the reference model writes?"""

import sys
from pathlib import Path

import click

from elf_rt.commands.options import backend_options, bundle_argument
from elf_rt.console import note, print_json


@click.command("verify")
@bundle_argument
@click.option("--replay", type=click.Path(path_type=Path), help="Recorded runs (.npz).  [default: the bundle's own]")
@backend_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    bundle: Path, replay: Path | None, backend: str, precision: str, threads: int | None, as_json: bool
) -> None:
    """Replay recorded runs of the reference model through BUNDLE; exit code 1 if its text differs.

    float32 must repeat latents to 5e-5 and every token; other precisions must agree on 99 % of the tokens, with a
    normalised edit distance of at most 0.01.
    """
    from elf_rt.measure.verify import verify_folder

    report = verify_folder(bundle, replay, backend=backend, precision=precision, threads=threads)
    if as_json:
        print_json(report.to_json(), indent=1)
    else:
        click.echo(f"{report.backend}, {report.precision}")
        click.echo(f"{'':44}latent error   token agreement   edit distance")
        for check in report.checks:
            mark = "ok  " if check.passed else "FAIL"
            click.echo(
                f"{mark} {check.name:38} {check.latent_error:13.1e} {check.token_agreement:17.4f}"
                f" {check.edit_distance:15.4f}"
            )
    if not report.passed:
        note("this is not the reference model's text: try --precision fp32, another --backend, or export again")
        sys.exit(1)
