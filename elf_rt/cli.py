"""The command line. Each command lives in ``elf_rt/commands`` and is imported when it is called."""

import importlib
import io
import signal
import sys
from typing import Any

import click

from elf_rt import __version__
from elf_rt.console import note, plain_warnings
from elf_rt.errors import ElfError

COMMANDS = {  # name -> (module in elf_rt.commands, one line for --help)
    "export": ("export", "Turn a trained checkpoint into a bundle."),
    "build-engine": ("build_engine", "Compile a bundle's graphs into TensorRT engines."),
    "generate": ("generate", "Write text from a bundle."),
    "serve": ("serve", "Serve a bundle over HTTP, with a page that shows text forming."),
    "eval": ("evaluate", "Measure how good the text is."),
    "bench": ("bench", "Measure how fast the engines are here, and whether their text is the same."),
    "verify": ("verify", "Prove that a bundle writes what the reference model writes."),
    "info": ("info", "Show what is in a bundle."),
    "doctor": ("doctor", "Show which backends work on this machine, and why the others do not."),
}


class LazyGroup(click.Group):
    """Lists the commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"elf_rt.commands.{COMMANDS[cmd_name][0]}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="elf-rt")
def group() -> None:
    """Low-latency text from trained ELF models: export a checkpoint, then generate."""


def main(args: list[str] | None = None) -> Any:
    """Run a command; an error that elf-rt raises on purpose is one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no such character shows ? instead
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are taken away
    try:
        with plain_warnings():
            group.main(args=args, standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        note("stopped")
        sys.exit(130)
    except ElfError as error:
        note(f"error: {' '.join(str(error).split())}")  # one line, also where a library's reason has several
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        note(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        sys.exit(1)
