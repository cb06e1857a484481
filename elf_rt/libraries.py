"""The one door through which engine libraries come: with their telemetry off, and with the reason where they do not."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from elf_rt.errors import BackendError, first_line

ORT_TELEMETRY = "ORT_DISABLE_TELEMETRY"  # the switch that ONNX Runtime's Privacy.md names; it is read at its import


def import_library(name: str) -> ModuleType:
    """Import a library that may be absent, or may tell a web service that it was imported.

    ONNX Runtime (1.29 and later) makes a device identifier and sends events, unless ORT_DISABLE_TELEMETRY is 1; a user
    who wants that sets it to 0. OpenVINO and NNCF start a process of their own, but take a stub in place of
    openvino_telemetry where that is not installed.
    """
    if os.environ.get(ORT_TELEMETRY) != "0":
        os.environ[ORT_TELEMETRY] = "1"
    hide = name in ("openvino", "nncf") and "openvino_telemetry" not in sys.modules
    if hide:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(name)
    finally:
        if hide:
            sys.modules.pop("openvino_telemetry", None)  # another thread that imports may have removed it


def why_absent(name: str, needed: str, install: str) -> str | None:
    """Why a library cannot be used, or None. needed: what it must have to be whole; install: how to get it."""
    try:
        library = import_library(name)
    except ModuleNotFoundError as error:
        missing = "" if f"{name}.".startswith(f"{error.name}.") else f" completely ({error.name} is missing)"
        return f"not installed{missing}: {install}"
    except Exception as error:  # importing may raise anything: for a shared library, another numpy, a cut file
        return f"installed, but cannot be imported ({first_line(error)}): {install}"
    return None if hasattr(library, needed) else f"a broken install: {install}"


@contextmanager
def needs(what: str, install: str) -> Iterator[None]:
    """Around the imports of a command, or of a part of it. Raises BackendError where they fail."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).startswith("elf_rt."):
            reason, install = "is not in the source folder that Python found here", "pip install -e . in the clone"
        else:
            reason = f"needs {error.name}"
        raise BackendError(f"{what} {reason}: {install}") from error
    except (ImportError, OSError) as error:  # OSError: torch's, for a shared library
        reason = f"cannot import a library that is installed ({first_line(error)})"
        raise BackendError(f"{what} {reason}: {install}") from error
