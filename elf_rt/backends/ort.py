"""ONNX Runtime on the CPU: the backend that is always there."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elf_rt.backends.rounding import rounded_graph
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, first_line
from elf_rt.libraries import import_library, why_absent
from elf_rt.machine import cores
from elf_rt.network import GRAPHS, Graph, HostBackend, tensor_shapes

if TYPE_CHECKING:
    import onnxruntime

NAME = "onnxruntime"
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    return why_absent("onnxruntime", "InferenceSession", "pip install 'elf-rt[cpu]'")


class OrtBackend(HostBackend):
    """Two sessions over one copy of the weights; every bound graph has its own IO binding.

    fp16 and bf16 graphs are computed in float32 and rounded, to check them.
    """

    name = NAME

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        self._ort = import_library("onnxruntime")
        self.library = f"ONNX Runtime {self._ort.__version__}"
        self.precision = precision
        self.config = bundle.config
        self.threads = threads or cores()
        files = bundle.variant(precision)
        self.sessions: dict[Graph, onnxruntime.InferenceSession] = {
            graph: self._session(files[graph]) for graph in GRAPHS
        }

    def _session(self, path: Path) -> "onnxruntime.InferenceSession":
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4  # errors are raised, so the log need not tell them again
        # Threads wait actively inside a call, never after it: between calls the cores belong to the integrator.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        graph: str | bytes = str(path)
        if self.precision in ("fp16", "bf16"):  # types that this provider does not compute in
            graph = rounded_graph(path)
            options.add_session_config_entry(EXTERNAL_FOLDER, str(path.parent))
        try:
            return self._ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors have no common base
            raise BackendError(f"{NAME} cannot load {path}: {first_line(error)}") from error

    def bind(self, graph: Graph, rows: int, length: int) -> "OrtGraph":
        """In int8 a call for each row: products take the range of their whole input, which must be one text."""
        shapes = tensor_shapes(graph, self.config, rows, length)
        return OrtGraph(self._ort, self.sessions[graph], shapes, 1 if self.precision == "int8" else rows)

    def close(self) -> None:
        self.sessions.clear()


open_backend = OrtBackend


class OrtGraph:
    """Numpy arrays bound to the inputs and outputs of a session, so that a call copies nothing. size: rows of one call
    of the session."""

    def __init__(self, ort: Any, session: Any, shapes: Mapping[str, tuple[int, ...]], size: int) -> None:
        self._ort, self._session = ort, session
        self._values: list[Any] = []  # an OrtValue over a numpy array shares its memory, and must outlive its binding
        self.arrays = {
            name: np.zeros(shape, np.int64 if name == "ids" else np.float32) for name, shape in shapes.items()
        }
        starts = range(0, len(self.arrays["hidden"]), size)
        self._calls = [self._bind(slice(start, start + size)) for start in starts]

    def run(self) -> None:
        for call in self._calls:
            self._session.run_with_iobinding(call)

    def close(self) -> None:
        for binding in self._calls:
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()

    def _bind(self, rows: slice) -> Any:
        binding = self._session.io_binding()
        for values, bind in (
            (self._session.get_inputs(), binding.bind_ortvalue_input),
            (self._session.get_outputs(), binding.bind_ortvalue_output),
        ):
            for name in (value.name for value in values):
                self._values.append(self._ort.OrtValue.ortvalue_from_numpy(self.arrays[name][rows]))
                bind(name, self._values[-1])
        return binding
