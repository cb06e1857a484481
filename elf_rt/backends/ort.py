"""ONNX Runtime on the CPU: the backend that is always there."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elf_rt.backends.base import check_widths, token_slices
from elf_rt.backends.rounding import rounded_graph
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, first_line
from elf_rt.libraries import import_library, why_absent
from elf_rt.machine import cores

if TYPE_CHECKING:
    import onnxruntime

NAME = "onnxruntime"
PRECISIONS = ("fp32", "int8", "fp16", "bf16")  # the last two are computed in float32 and rounded, to check them
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    return why_absent("onnxruntime", "InferenceSession", "pip install 'elf-rt[cpu]'")


def open_backend(bundle: Bundle, precision: str, threads: int | None = None) -> "OrtBackend":
    reason = unavailable()
    if reason:
        raise BackendError(f"{NAME}: {reason}")
    return OrtBackend(bundle, precision, threads)


class OrtBackend:
    """Two sessions over one copy of the weights; every bound network has its own IO binding."""

    name = NAME
    device = "cpu"

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        self._ort = import_library("onnxruntime")
        self.precision = precision
        self.config = bundle.config
        self._bundle = bundle
        self._threads = threads or cores()
        files = bundle.variant(precision)
        rounded = precision in ("fp16", "bf16")
        self.denoiser = self._session(str(files["denoiser"]), rounded)
        self.discretizer = self._session(str(files["discretizer"]), rounded)
        check_widths(NAME, self.config, {output.name: output.shape[-1] for output in self.denoiser.get_outputs()})
        self._encoder: onnxruntime.InferenceSession | None = None
        self._lock = threading.Lock()

    def _session(self, path: str, rounded: bool = False) -> "onnxruntime.InferenceSession":
        """`rounded`: the graph has 16-bit types, which this provider does not compute in."""
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4  # what goes wrong is raised, and told once
        # Threads wait actively inside a call, never after it: between calls the cores belong to the integrator.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        graph: str | bytes = path
        if rounded:
            graph = rounded_graph(Path(path))
            options.add_session_config_entry(EXTERNAL_FOLDER, str(Path(path).parent))
        try:
            return self._ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors have no common base
            raise BackendError(f"{NAME} cannot load {path}: {first_line(error)}") from error

    def bind(self, rows: int, length: int) -> "OrtNetwork":
        return OrtNetwork(self, rows, length)

    def encode(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with self._lock:
            if self._encoder is None:
                self._encoder = self._session(str(self._bundle.encoder_graph()))
        (latents,) = self._encoder.run(None, {"ids": ids, "mask": mask})
        return np.asarray(latents)

    def describe(self) -> Mapping[str, str]:
        return {
            "library": f"ONNX Runtime {self._ort.__version__}",
            "precision": self.precision,
            "threads": str(self._threads),
        }

    def close(self) -> None:
        self._encoder = None
        del self.denoiser, self.discretizer


class OrtNetwork:
    """Numpy arrays bound to the inputs and outputs of both sessions, so that a call copies nothing."""

    def __init__(self, backend: OrtBackend, rows: int, length: int) -> None:
        config = backend.config
        inputs = {i.name for i in backend.denoiser.get_inputs()}

        def array(name: str, *shape: int) -> Any:
            return np.zeros(shape, np.float32) if name in inputs else None

        self.z = array("z", rows, length, config.latent_dim)
        self.x_prev = array("x_prev", rows, length, config.latent_dim)
        self.t = array("t", rows)
        self.s = array("s", rows)
        self.mode = array("mode", rows)
        self.x = np.zeros((rows, length, config.latent_dim), np.float32)
        hidden = np.zeros((rows, length, config.hidden_size), np.float32)
        self._ids = np.zeros((rows, length), np.int64)
        self._backend = backend
        self._values: list[Any] = []  # an OrtValue over a numpy array shares its memory, and must outlive its binding
        outputs = {"x": self.x, "hidden": hidden}
        # int8 products take the range of their whole input: a call for each row keeps one text from changing another.
        size = 1 if backend.precision == "int8" else rows
        self._denoise = [
            self._bind(backend.denoiser, _part(self._inputs(), part), _part(outputs, part))
            for part in (slice(start, start + size) for start in range(0, rows, size))
        ]
        tokens, ids = hidden.reshape(1, -1, config.hidden_size), self._ids.reshape(1, -1)
        self._discretize = [
            self._bind(backend.discretizer, {"hidden": tokens[:, part]}, {"ids": ids[:, part]})
            for part in token_slices(ids.size)
        ]

    def _bind(
        self,
        session: "onnxruntime.InferenceSession",
        inputs: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
    ) -> "onnxruntime.IOBinding":
        binding = session.io_binding()
        for arrays, bind in ((inputs, binding.bind_ortvalue_input), (outputs, binding.bind_ortvalue_output)):
            for name, array in arrays.items():
                value = self._backend._ort.OrtValue.ortvalue_from_numpy(array)
                self._values.append(value)
                bind(name, value)
        return binding

    def _inputs(self) -> dict[str, np.ndarray]:
        named = {"z": self.z, "x_prev": self.x_prev, "t": self.t, "s": self.s, "mode": self.mode}
        return {name: value for name, value in named.items() if value is not None}

    def denoise(self) -> None:
        for part in self._denoise:
            self._backend.denoiser.run_with_iobinding(part)

    def discretize(self) -> np.ndarray:
        for part in self._discretize:
            self._backend.discretizer.run_with_iobinding(part)
        return self._ids.copy()

    def close(self) -> None:
        for binding in (*self._denoise, *self._discretize):
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()


def _part(arrays: Mapping[str, np.ndarray], rows: slice) -> dict[str, np.ndarray]:
    return {name: array[rows] for name, array in arrays.items()}
