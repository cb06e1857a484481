"""TensorRT and TensorRT-RTX: runs the plans that ``elf-rt build-engine`` put into the bundle.

A plan is checked against its record before the library sees a byte of it. Everything that a network call needs (engine,
execution contexts, inputs, outputs, scratch memory) is allocated and bound once, when the network is; from then on a
call is one enqueue on the caller's stream, with no synchronisation, so that it can be captured in a CUDA graph.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elf_rt import device
from elf_rt.backends.trt_engine import LoadedEngine
from elf_rt.backends.trt_graph import TrtGraph
from elf_rt.bundle import Bundle
from elf_rt.device.kernels import default_cache
from elf_rt.errors import BackendError
from elf_rt.network import GRAPHS, DeviceBackend, Graph
from elf_rt.plans import TENSORRT, Library, Record, find_plans, make_log, this_machine


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    return why_unavailable(TENSORRT)


def open_backend(bundle: Bundle, precision: str, threads: int | None = None) -> "TrtBackend":
    """Load the bundle's plan for this machine. ``threads`` has no meaning on a GPU.

    Raises:
        BackendError: no library or plan for this machine; says which, and the command that mends it.
    """
    return TrtBackend(bundle, precision, TENSORRT)


def why_unavailable(library: Library) -> str | None:
    """Why a library cannot be used here, or None: it needs a GPU, its driver, and NVRTC for the sampler."""
    return library.unavailable() or device.unavailable()


class TrtBackend(DeviceBackend):
    """The plans of one bundle in one precision."""

    def __init__(
        self, bundle: Bundle, precision: str, library: Library, plans: Sequence[tuple[Path, Record]] | None = None
    ) -> None:
        """``plans``: those to run, where it is not all that fit."""
        self.name = library.name
        self.precision = precision
        self._library = library
        self._trt = library.load()
        self.library = f"{library.title} {self._trt.__version__}"
        self._machine = this_machine()
        self._bundle = bundle
        self._plans = list(plans or find_plans(bundle, precision, library, self._trt.__version__, self._machine))
        self._log = make_log(self._trt)
        self._runtime: Any = self._trt.Runtime(self._log)
        self._loaded: dict[Path, dict[str, LoadedEngine]] = {}
        self._load(*self._plans[0])  # what the library refuses is refused now, so that another backend can be tried

    def max_rows(self, length: int, needed: int = 1) -> int:
        profiles = [profile for _, record in self._plans for profile in record.profiles]
        most = max((profile.rows.most for profile in profiles if length in profile.length), default=0)
        if most < needed:
            self._choose(needed, length)  # it raises, and names a plan that would take them
        return most

    def bind(self, graph: Graph, rows: int, length: int, stream: int) -> TrtGraph:
        """Fewer rows than the plans take are padded with rows of zeros."""
        folder, record, profile, padded = self._choose(rows, length)
        engine = self._load(folder, record)[graph]
        return TrtGraph(self._trt, engine, graph, profile, (padded, length), stream, self._failure)

    def describe(self) -> Mapping[str, str]:
        folder, record = next((plan for plan in self._plans if plan[0] in self._loaded), self._plans[0])
        denoiser = record.engines["denoiser"]
        gpu = self._machine.gpu
        return {
            **super().describe(),
            "gpu": f"{gpu.name}, sm_{gpu.sm}" if gpu else "none",
            "plan": folder.name,
            "matrix products": ", ".join(f"{count} {name}" for name, count in denoiser.matmuls.items()),
        }

    def close(self) -> None:
        """Free the engines."""
        for engines in self._loaded.values():
            for engine in engines.values():
                engine.close()
        self._loaded.clear()  # engines must go before the runtime that made them
        self._runtime = None

    def _choose(self, rows: int, length: int) -> tuple[Path, Record, int, int]:
        """(folder, record, profile index, padded rows): least padding, then an engine that is loaded already."""
        options = [
            (padded, folder not in self._loaded, folder, record, index)
            for folder, record in self._plans
            for index, profile in enumerate(record.profiles)
            if (padded := profile.padded_rows(rows, length)) is not None
        ]
        if not options:
            profiles = [profile for _, record in self._plans for profile in record.profiles]
            have = ", ".join(f"{profile.rows} rows of {profile.length}" for profile in profiles)
            raise BackendError(
                f"{self.name}: the plan takes {have} tokens, this call needs {rows} rows of {length}: "
                f"run elf-rt build-engine {self._bundle.folder} --precision {self.precision} "
                f"--batch {rows} --length {length}"
            )
        padded, _, folder, record, index = min(options, key=lambda option: option[:2])
        return folder, record, index, padded

    def _load(self, folder: Path, record: Record) -> dict[str, LoadedEngine]:
        if folder not in self._loaded:
            record.check_files(folder, self._bundle.digest)
            engines: dict[str, LoadedEngine] = {}
            for name in GRAPHS:
                path = folder / record.engines[name].file
                engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
                if engine is None:
                    raise self._failure(f"refused {path}")
                finished = default_cache() / f"{record.key}-{name}.rtx" if self._library.finishes_kernels else None
                engines[name] = LoadedEngine(self._trt, engine, finished)
            self._loaded[folder] = engines
        return self._loaded[folder]

    def _failure(self, what: str) -> BackendError:
        """An error with what the library said since the last one."""
        said = self._log.errors()
        self._log.lines.clear()
        return BackendError(f"{self._library.title} {what}: {said}")
