"""The command line. Each command lives in ``elf_rt/commands`` and is imported when it is called."""

import contextlib
import errno
import importlib
import signal
import sys
import threading
from types import FrameType, ModuleType
from typing import Any

import click

from elf_rt import __version__
from elf_rt.console import (
    NORMAL,
    QUIET,
    VERBOSE,
    close_streams,
    complain,
    open_streams,
    plain_warnings,
    set_verbosity,
)
from elf_rt.errors import ElfError, first_line, lack_of_memory

# SIGHUP: the terminal, or the connection to it, is gone.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
IMPORT_SECONDS = 0.01  # after which a signal that came during an import is looked at again

COMMANDS = {  # name -> (module in elf_rt.commands, one line for --help)
    "export": ("export", "Turn a trained checkpoint into a bundle."),
    "build-engine": ("build_engine", "Compile a bundle's graphs into TensorRT engines."),
    "generate": ("generate", "Write text from a bundle."),
    "serve": ("serve", "Serve a bundle over HTTP, with a page that shows text forming."),
    "eval": ("evaluate", "Measure how good the text is."),
    "bench": ("bench", "Measure how fast the engines are here, and whether their text is the same."),
    "verify": ("verify", "Prove that a bundle writes what the reference model writes."),
    "triton": ("triton", "Write a model repository for NVIDIA's Triton server."),
    "info": ("info", "Show what is in a bundle."),
    "doctor": ("doctor", "Show which backends work on this machine, and why the others do not."),
}


def _set_verbosity(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        set_verbosity(VERBOSE if param.name == "verbose" else QUIET)


def _flag(short: str, long: str, help_text: str) -> click.Option:
    return click.Option([short, long], is_flag=True, help=help_text, expose_value=False, callback=_set_verbosity)


VERBOSITY = [  # options that every command has
    _flag("-v", "--verbose", "Tell where an error comes from, and all warnings of libraries."),
    _flag("-q", "--quiet", "Tell nothing but results and errors."),
]
EXIT_CODES = (
    "Exit codes: 0, done. 1, it failed, and one line tells why (verify: another text). 2, the arguments cannot be. "
    "128 + N, signal N stopped it."
)


class LazyGroup(click.Group):
    """Lists the commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"elf_rt.commands.{COMMANDS[cmd_name][0]}").command
        assert isinstance(command, click.Command)
        if VERBOSITY[0] not in command.params:
            command.params += VERBOSITY
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}, epilog=EXIT_CODES
)
@click.version_option(__version__, prog_name="elf-rt")
def group() -> None:
    """Low-latency text from trained ELF models: export a checkpoint, then generate."""


def main(args: list[str] | None = None) -> Any:
    """Run a command, and exit with one of EXIT_CODES."""
    open_streams()
    set_verbosity(NORMAL)
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPPING}  # None: another library's
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup and background jobs ignore signals on purpose
                signal.signal(number, _stop)
        code = _run(args)
        unwritten = close_streams()
        if unwritten is not None and code == 0:
            code = _report(unwritten)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(code)


_put_off: list[int] = []  # signals that came during an import


class Stopped(SystemExit):
    """A signal asks the process to end: half-written files are taken away, and what is finished is kept."""


def _stop(number: int, frame: FrameType | None) -> None:
    if _imports(frame):  # a library that is stopped half-way is broken from then on, and may keep the exception
        _put_off.append(number)
        again = threading.Timer(IMPORT_SECONDS, _send_again, [number])
        again.daemon = True
        again.start()
        return
    for other in STOPPING:  # the end is not to be cut short, but by a second Ctrl-C
        signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
    raise Stopped(128 + number)


def _send_again(number: int) -> None:
    """To the main thread, which may wait for input or for a lock by then."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _run(args: list[str] | None) -> int:
    """The exit code of a command."""
    try:
        _put_off.clear()
        with plain_warnings():
            code = group.main(args=args, standalone_mode=False)
            if _put_off:
                raise Stopped(128 + _put_off[0])
    except Stopped as stop:
        code = stop.code
        complain(_with_notes("stopped", stop))
    except SystemExit as stop:
        code = stop.code
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        return error.exit_code
    except Exception as error:
        return _report(error)
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    """Tell why a command failed, but not to somebody who has stopped to listen. Returns the exit code.

    Raises:
        Exception: this error, which nobody has foreseen.
    """
    if isinstance(error, ElfError):
        reason = str(error)
    elif (lack := lack_of_memory(error)) is not None:
        reason = first_line(lack)
    elif _is_of_a_library(error):
        reason = f"a library cannot be used here ({first_line(error)}): pip install --force-reinstall elf-rt"
    elif isinstance(error, RuntimeError) and "Symlink loop" in str(error):  # Path.resolve's, before Python 3.13
        reason = f"{first_line(error)}: a link that leads to itself"
    elif not isinstance(error, OSError):
        raise error
    elif error.errno is None:  # numpy's, which counts items
        reason = f"a file could not be read or written whole ({first_line(error)}): is the disk full?"
    elif error.errno == errno.EBADF:
        reason = "standard output is closed"
    else:
        reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    if not isinstance(error, BrokenPipeError):
        complain(f"error: {_with_notes(reason, error)}", error)
    return 1


def _is_of_a_library(error: Exception) -> bool:
    """Whether one is absent, cannot be imported, or is only half there."""
    name = error.name if isinstance(error, ImportError) else "elf_rt"
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        name = error.obj.__name__
    return str(name).split(".")[0] != "elf_rt"


def _with_notes(text: str, error: BaseException) -> str:
    """In one line, also where a library's reason has several."""
    return " ".join("; ".join([text, *getattr(error, "__notes__", ())]).split())
