"""TensorRT plans inside a bundle, and the libraries that make and run them.

    plans/<sm or GPU>-<library version>-<key>/
        plan.json           the record below: what it was made from, for which machine, with which result
        denoiser.plan       one serialised engine for each graph
        discretizer.plan

A plan runs only on the GPU generation, library version and operating system that it was built for. A library that is
given another one fails late and obscurely, so the record is checked before a single byte of the plan is read.
"""

import dataclasses
import json
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from elf_rt.bundle import Bundle
from elf_rt.device.cudart import Gpu, find_gpu
from elf_rt.errors import BackendError, InputError
from elf_rt.fields import parse, read_json
from elf_rt.files import atomic_file, is_inside, sha256
from elf_rt.libraries import import_library, why_absent
from elf_rt.network import GRAPHS

RECORD = "plan.json"
FORMAT = "elf-rt-plan"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX: one Python API under two import names."""

    name: str  # the name of the backend, and of --target
    module: str
    title: str
    install: str
    finishes_kernels: bool = False  # whether kernels are finished on the GPU, when a plan first runs

    def load(self) -> ModuleType:
        """Import it. Raises BackendError when it is not installed or cannot start."""
        if reason := self.unavailable():
            raise BackendError(f"{self.name}: {reason}")
        return import_library(self.module)

    def unavailable(self) -> str | None:
        """Why it cannot be imported, or None."""
        return why_absent(self.module, "Runtime", self.install)


TENSORRT = Library("tensorrt", "tensorrt", "TensorRT", "pip install 'elf-rt[tensorrt]', or use JetPack's own")
TENSORRT_RTX = Library(
    "tensorrt-rtx", "tensorrt_rtx", "TensorRT-RTX", "pip install 'elf-rt[tensorrt-rtx]'", finishes_kernels=True
)
LIBRARIES = {library.name: library for library in (TENSORRT, TENSORRT_RTX)}


def make_log(trt: ModuleType) -> Any:
    """A logger for the library: ``lines`` of (severity, text), and ``errors()`` as one line."""

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]  # a base class known only at run time
        """Keeps what the library says instead of printing it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []  # (severity, text)

        def log(self, severity: Any, message: str) -> None:
            if severity != trt.ILogger.VERBOSE:
                self.lines.append((str(severity).rpartition(".")[2], message))

        def errors(self) -> str:
            """The errors as one line, or the last warning, or a plain statement that there are none."""
            for wanted in (("ERROR", "INTERNAL_ERROR"), ("WARNING",)):
                found = [" ".join(text.split()) for severity, text in self.lines if severity in wanted]
                if found:
                    return "; ".join(dict.fromkeys(found[-4:]))
            return "the library gave no reason"

    return Log()


@dataclass(frozen=True)
class Range:
    """Sizes of one axis that a plan takes: from ``least`` to ``most``, tuned for ``best``."""

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most:
            raise InputError(f"must rise from 1 or more, got {self.least}:{self.best}:{self.most}")

    def __str__(self) -> str:
        return str(self.best) if self.least == self.most else f"{self.least}:{self.best}:{self.most}"

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= self.most


@dataclass(frozen=True)
class Profile:
    """One set of shapes that a plan is tuned for. rows: network rows R. length: text length L."""

    rows: Range
    length: Range

    def padded_rows(self, rows: int, length: int) -> int | None:
        """The fewest rows that this profile can run ``rows`` texts of ``length`` in; None if it cannot."""
        if length not in self.length or rows > self.rows.most:
            return None
        return max(rows, self.rows.least)


@dataclass(frozen=True)
class Machine:
    """Where a plan is to run."""

    os: str  # "linux-x86_64"
    gpu: Gpu | None
    no_gpu: str = ""  # why there is no GPU


def this_machine() -> Machine:
    system = f"{platform.system().lower()}-{platform.machine().lower()}"
    gpu = find_gpu()
    return Machine(system, gpu) if isinstance(gpu, Gpu) else Machine(system, None, gpu)


@dataclass(frozen=True)
class Engine:
    """One plan file and what building it told.

    scratch_bytes: device memory that one call needs beyond weights, inputs and outputs (None: the library did not say).
    attention: number of attention layers "fused" into one kernel, and "open", where the library may fall back to three.
    matmuls, layers: how many there are of each type (fp16, bf16, fp32), by the graph's own types.
    """

    file: str
    sha256: str
    num_bytes: int
    seconds: float
    weights_bytes: int | None = None
    scratch_bytes: int | None = None
    attention: dict[str, int] = field(default_factory=dict)
    matmuls: dict[str, int] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_inside(self.file):
            raise InputError(f"file must be the name of a file beside it, got {self.file!r}")

    def summary(self, precision: str) -> str:
        """Size, scratch memory, attention, and how much computes in a precision, by the graph's own types."""
        parts = [f"{self.num_bytes / 1e6:.1f} MB"]
        if self.scratch_bytes is not None:
            parts.append(f"{self.scratch_bytes / 1e6:.1f} MB of scratch memory")
        if self.attention:
            parts.append("attention not fused" if self.attention.get("open") else "attention fused")
        counts = [(self.matmuls, "matrix products"), (self.layers, "layers")]
        shares = [f"{kinds.get(precision, 0)} of {sum(kinds.values())} {what}" for kinds, what in counts]
        return ", ".join([*parts, " and ".join(shares) + f" in {precision.upper()}"])


@dataclass(frozen=True)
class Record:
    """What plan.json holds. ``key`` was made of all before ``engines``.

    replayed: rows of the calls that repeated the reference model's on a GPU. not_replayed: why there are none.
    """

    key: str
    library: str
    version: str
    sms: tuple[int, ...]
    gpu: str | None  # the GPU that it was tuned on; None when it was built without one
    os: str
    precision: str
    profiles: tuple[Profile, ...]
    graphs: dict[str, str]  # sha256 of denoiser, discretizer and weights
    settings: dict[str, Any]
    engines: dict[str, Engine]
    replayed: tuple[int, ...] | None = None
    not_replayed: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]+", self.key):  # it becomes a part of file names
            raise InputError(f"key must be hexadecimal digits, got {self.key!r}")
        if self.library not in LIBRARIES:
            raise InputError(f"library must be one of {', '.join(LIBRARIES)}, got {self.library!r}")
        for name in GRAPHS:
            if name not in self.engines:
                raise InputError(f"engines.{name} is missing")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises BackendError when the record is missing, damaged or of another schema."""
        path = folder / RECORD
        mend = "delete that folder and run elf-rt build-engine"
        try:
            values = parse(dict[str, Any], read_json(path), "it")
            if (values.get("format"), values.get("schema_version")) != (FORMAT, SCHEMA_VERSION):
                raise BackendError(f"{path} was written by another version of elf-rt: {mend}")
            return parse(cls, values)
        except InputError as error:
            raise BackendError(f"{path} is damaged ({error}): {mend}") from error

    def write(self, folder: Path) -> None:
        values = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        with atomic_file(folder / RECORD) as work:
            work.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    def proof(self) -> str:
        """What is known of the texts that the plan writes, in one line."""
        if not self.replayed:
            return f"not replayed: {self.not_replayed or 'it was built by an older elf-rt'}"
        return f"replayed in calls of {', '.join(map(str, self.replayed))} rows: the reference model's tokens"

    def call_sizes(self, length: int) -> list[int]:
        """The rows of calls that the profiles are tried with: the ends, what each is tuned for, and powers of two."""
        rows = [profile.rows for profile in self.profiles if length in profile.length]
        powers = {1 << k for k in range(max((r.most for r in rows), default=0).bit_length())}
        sizes = {size for r in rows for size in (r.least, r.best, r.most)}
        return sorted(sizes | {size for size in powers if any(size in r for r in rows)})

    def mismatch(self, machine: Machine, version: str) -> str | None:
        """Why this machine cannot run the plan, as "built for ...; this machine is ...", or None if it can."""
        title = LIBRARIES[self.library].title
        sm = machine.gpu.sm if machine.gpu else None
        if sm in self.sms and version == self.version and machine.os == self.os:
            return None
        here = f"is sm_{sm} with" if sm else "has no GPU and"
        where, at = ("", "") if machine.os == self.os else (f" on {self.os}", f" on {machine.os}")
        made_for = "/".join(f"sm_{sm}" for sm in self.sms)
        return f"built for {made_for} with {title} {self.version}{where}; this machine {here} {version}{at}"

    def check_files(self, folder: Path, digest: Callable[[Path], str] = sha256) -> None:
        """Raises BackendError when a plan file is missing, truncated or altered."""
        for engine in self.engines.values():
            path = folder / engine.file
            if not path.is_file():
                problem = "is missing"
            elif path.stat().st_size != engine.num_bytes:
                problem = f"is truncated ({path.stat().st_size} bytes of {engine.num_bytes})"
            elif digest(path) != engine.sha256:
                problem = "was altered after it was built (its sha256 differs)"
            else:
                continue
            raise BackendError(f"{path} {problem}: run elf-rt build-engine --precision {self.precision} again")


def plan_folders(bundle: Bundle) -> list[Path]:
    """Every plan of a bundle. Unfinished builds are hidden."""
    folders = bundle.plans_dir.iterdir() if bundle.plans_dir.is_dir() else ()
    return sorted(folder for folder in folders if folder.is_dir() and not folder.name.startswith("."))


def find_plans(
    bundle: Bundle, precision: str, library: Library, version: str, machine: Machine
) -> list[tuple[Path, Record]]:
    """The plans of a bundle that this machine can run in this precision, those tuned on its own GPU first.

    Raises:
        BackendError: there is none. Says what the nearest one was built for, and how to build one.
    """
    graphs = graph_hashes(bundle, precision)
    command = f"run elf-rt build-engine {bundle.folder} --precision {precision} --target {library.name}"
    fitting: list[tuple[Path, Record]] = []
    reasons: list[str] = []
    for folder in plan_folders(bundle):
        try:
            record = Record.read(folder)
        except BackendError as error:
            reasons.append(str(error))
            continue
        if (record.library, record.precision) != (library.name, precision):
            continue
        reason = record.mismatch(machine, version)
        if reason is None and record.graphs != graphs:
            reason = "built from other weights than the bundle now holds"
        if reason is None:
            fitting.append((folder, record))
        else:
            reasons.append(f"{folder.name} was {reason}: {command}")
    if fitting:
        name = machine.gpu.name if machine.gpu else None
        return sorted(fitting, key=lambda plan: plan[1].gpu != name)
    if reasons:
        raise BackendError(f"{library.name}: {reasons[-1]}")
    where = f" for sm_{machine.gpu.sm}" if machine.gpu else ""
    raise BackendError(f"{library.name}: no {precision} plan{where} in {bundle.folder}: {command}")


def graph_hashes(bundle: Bundle, precision: str) -> dict[str, str]:
    """sha256 of each file of a variant, as the manifest has them: running a plan does not read the graphs."""
    if precision not in bundle.variants:
        raise BackendError(f"{bundle.folder} has no {precision} graphs: export the checkpoint again with them")
    files = bundle.variants[precision]
    return {role: bundle.manifest.files[name] for role, name in sorted(files.items())}
