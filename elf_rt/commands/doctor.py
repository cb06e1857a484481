"""``elf-rt doctor``: what works on this machine."""

import platform

import click

from elf_rt import __version__
from elf_rt.libraries import why_absent
from elf_rt.machine import cores


@click.command("doctor")
def command() -> None:
    """Show which backends work on this machine, why the others do not, and which integrator runs."""
    from elf_rt.backends import discover, torch_cuda
    from elf_rt.sampling import integrator

    click.echo(f"elf-rt {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    click.echo(f"{cores()} CPU cores, integrator in {integrator.IMPLEMENTATION}")
    if integrator.IMPLEMENTATION == "numpy":
        click.echo("  the C++ extension was not built: install a C++ compiler and reinstall elf-rt to make it faster")
    found = discover()
    for name, reason in found.items():
        click.echo(f"{'ok ' if reason is None else '-- '} {name:16} {reason or ''}".rstrip())
        if name == torch_cuda.NAME and reason is None:
            click.echo(f"     {torch_cuda.details()}")
    if reason := why_absent("tokenizers", "Tokenizer", "pip install tokenizers"):
        click.echo(f"tokenizers is {reason}: prompts and texts need it")
    if all(found.values()):
        click.echo("no backend works here: pip install 'elf-rt[cpu]'")
