"""What this machine is: processor, vector instructions, memory in use, and where caches go."""

import importlib
import os
import platform
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

# Linux's names of the instructions that decide how fast a network runs, slowest first.
ISA_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
BF16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))


def user_cache() -> Path:
    """elf-rt's folder in the user's cache, by the platform's custom. It may not exist yet."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "elf-rt"


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def isa() -> tuple[str, ...]:
    """Those of ISA_FLAGS that the processor has; empty where the system does not tell (not Linux)."""
    found = set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())
    return tuple(flag for flag in ISA_FLAGS if flag in found)


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16."""
    return not BF16_FLAGS.isdisjoint(isa())


def cpu_name() -> str:
    """The processor's own name, with the part that tells one generation from another where the name does not."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    return f"{name} (family {family}, model {model})" if family else name


def memory() -> dict[str, int]:
    """Bytes of this process: "now" and "peak" resident, and "private", without pages of files; empty if not Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {"now": "VmRSS", "peak": "VmHWM", "private": "RssAnon"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items() if field in fields}


def reset_peak_memory() -> None:
    """Let "peak" of ``memory`` begin again from what is resident now, where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # then "peak" is that of the whole process


def import_without_telemetry(name: str) -> ModuleType:
    """Import OpenVINO or NNCF, which otherwise tell a web service so, from a process of their own.

    Both take a stub in place of openvino_telemetry where that is not installed.
    """
    hide = "openvino_telemetry" not in sys.modules
    if hide:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(name)
    finally:
        if hide:
            del sys.modules["openvino_telemetry"]


@cache
def _cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == field), ""
    )
