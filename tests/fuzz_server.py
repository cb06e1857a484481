"""Runs command lines in children forked from a process that has all libraries loaded, one after the other.

Each line of standard input is JSON: args, folder, streams (files for standard output and error) and env. For each the
server prints the child's process id, and when it has ended, its exit code (negative: the signal that killed it).
"""

import atexit
import importlib
import io
import json
import os
import sys
import traceback
import warnings
from typing import Any


def preload() -> None:
    """Import what commands import. No session is opened, so there is no thread that a fork would lose."""
    from elf_rt.cli import COMMANDS

    for module, _ in COMMANDS.values():
        importlib.import_module(f"elf_rt.commands.{module}")
    for module in ("elf_rt.export.pipeline", "elf_rt.measure.verify", "tokenizers", "safetensors.torch"):
        importlib.import_module(module)
    from elf_rt.backends import discover

    discover()  # onnxruntime, openvino
    import torch

    torch.set_num_threads(1)  # tiny products on a busy machine: threads would only wait for each other


def run(request: dict[str, Any]) -> int:
    """What ``python -m elf_rt`` does, with files for streams. Returns the exit code."""
    os.chdir(request["folder"])
    for name, value in request["env"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(request["streams"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    encoding, _, errors = (os.environ.get("PYTHONIOENCODING") or "utf-8").partition(":")
    files = (os.fdopen(number, "rb" if number == 0 else "wb", closefd=False) for number in range(3))
    kinds = (errors or "strict", errors or "strict", "backslashreplace")
    wrapped = [io.TextIOWrapper(file, encoding, kind) for file, kind in zip(files, kinds, strict=True)]
    sys.stdin, sys.stdout, sys.stderr = wrapped
    code: object = 0
    try:
        from elf_rt.cli import main

        main(request["args"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def main() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preload()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = run(json.loads(line))
            atexit._run_exitfuncs()  # as an ordinary end does
            os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
