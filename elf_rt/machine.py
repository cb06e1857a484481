"""What this machine is: processor, vector instructions, memory in use, and where caches go."""

import atexit
import math
import os
import platform
import shutil
import sys
import tempfile
from functools import cache
from numbers import Integral
from pathlib import Path

from elf_rt.errors import InputError

# Linux's names of the instructions that decide how fast a network runs, slowest first.
ISA_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
BF16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))


def user_cache() -> Path:
    """elf-rt's folder in the user's cache, by the platform's custom. It may not exist yet.

    A user without a home (a container's, under a number of its own) has it for the time of this process. A variable
    that names no absolute path counts as unset, by the XDG specification: it would mean a place in any folder.
    """
    variable, usual = ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    named, home = Path(os.environ.get(variable, "")), Path(os.path.expanduser("~"))  # "~" itself where there is none
    if not named.is_absolute():
        named = (home if home.is_absolute() else _passing_home()) / usual
    return named / "elf-rt"


@cache
def _passing_home() -> Path:
    """Under a name that nobody else can have taken before: what is found in a cache is believed."""
    folder = tempfile.mkdtemp(prefix="elf-rt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def cores() -> int:
    """CPU cores that this process may use: by its affinity, and by its container's share of processor time, rounded up.

    More threads than that wait for each other once the share is used up: 16 threads in one CPU run 14 x slower.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cpus()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def check_threads(threads: int | None) -> int:
    """How many threads to compute with: what is asked for, or one for each core.

    Raises:
        InputError: fewer than 1, or more than 4 for each core: they would only wait for each other.
    """
    here = cores()
    if threads is None:
        return here
    if not isinstance(threads, Integral) or isinstance(threads, bool) or not 1 <= threads <= 4 * here:
        raise InputError(f"threads must be a whole number between 1 and {4 * here} (4 x {here} cores), got {threads!r}")
    return int(threads)


@cache
def cgroup_cpus(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that Linux's control groups (version 1 or 2) grant this process; None: no limit.

    A group's limit holds for those inside it, so the least of all groups on the way is taken. Inside a container the
    path in /proc may be the host's: what is mounted is then the container's own group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits: list[float] = []
    for line in lines:  # "0::/a/b" is version 2, "4:cpu,cpuacct:/a/b" version 1
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (controllers, "cpu") if controllers else ("", "unified"):
            top = root / "sys/fs/cgroup" / mount
            inner = top / group.lstrip("/")
            limits += [limit for place in (inner, *inner.parents) if (limit := _quota(place))]
    return min(limits, default=None)


def _quota(group: Path) -> float | None:
    """Quota / period of one control group."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # not there, or "max"
        return None


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
    """Bytes of this process that are resident "now", and "private", without pages of files; empty if not Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {"now": "VmRSS", "private": "RssAnon"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items() if field in fields}


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
