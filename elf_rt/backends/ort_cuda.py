"""ONNX Runtime on the GPU: for machines that have neither TensorRT nor torch.

Inputs and outputs stay in GPU memory through IO binding, and the integrator runs there too. But ONNX Runtime has
streams of its own, so the host waits before and after each network call, and nothing is captured.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from elf_rt import device
from elf_rt.bundle import Bundle
from elf_rt.device.cudart import DeviceMemory, synchronize
from elf_rt.errors import BackendError, first_line
from elf_rt.libraries import import_library, why_absent
from elf_rt.network import GRAPHS, Capture, DeviceBackend, Enqueued, Graph, tensor_shapes

NAME = "onnxruntime-cuda"
PROVIDER = "CUDAExecutionProvider"
MEMORY = "cuda"  # the name of the GPU's memory in IO bindings
DISCRETIZED_TOKENS = 4096  # positions whose logits are in memory together: about 1 GB for 32100 ids


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    if reason := why_absent("onnxruntime", "InferenceSession", "pip install 'elf-rt[gpu]'"):
        return reason
    if PROVIDER not in import_library("onnxruntime").get_available_providers():
        return "this onnxruntime is the CPU build: pip uninstall onnxruntime, then pip install 'elf-rt[gpu]'"
    return device.unavailable()


class OrtCudaBackend(DeviceBackend):
    """Two sessions in GPU memory. ``threads`` has no meaning there."""

    name = NAME

    def __init__(self, bundle: Bundle, precision: str, threads: int | None = None) -> None:
        self._ort = import_library("onnxruntime")
        self.library = f"ONNX Runtime {self._ort.__version__} ({PROVIDER})"
        self.precision = precision
        self.config = bundle.config
        files = bundle.variant(precision)
        if MEMORY == "cuda":
            self._ort.preload_dlls()  # CUDA and cuDNN from their pip packages, where they are installed
        self.sessions: dict[Graph, Any] = {graph: self._session(str(files[graph])) for graph in GRAPHS}

    def bind(self, graph: Graph, rows: int, length: int, stream: int) -> "OrtCudaGraph":
        shapes = tensor_shapes(graph, self.config, rows, length)
        return OrtCudaGraph(self.sessions[graph], shapes, stream)

    def capture(self, plain: Capture, stream: int, body: Callable[[], None]) -> Enqueued:
        """Never a CUDA graph."""
        return Enqueued(body)

    def close(self) -> None:
        self.sessions.clear()

    def _session(self, path: str) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised, so the log need not tell them again
        # float32 means float32: TF32 would change tokens.
        providers = [(PROVIDER, {"use_tf32": "0"})] if MEMORY == "cuda" else [PROVIDER]
        try:
            session = self._ort.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime's own errors have no common base
            raise BackendError(f"{NAME} cannot load {path}: {first_line(error)}") from error
        if session.get_providers()[0] != PROVIDER:  # ONNX Runtime falls back to the CPU in silence
            raise BackendError(f"{NAME}: CUDA or cuDNN could not be loaded: pip install 'onnxruntime-gpu[cuda,cudnn]'")
        return session


open_backend = OrtCudaBackend


class OrtCudaGraph:
    """GPU memory bound to a session: see ``elf_rt.network.DeviceGraph``. The head runs on pieces of the tokens."""

    def __init__(self, session: Any, shapes: Mapping[str, tuple[int, ...]], stream: int) -> None:
        self._session, self._shapes, self._stream = session, shapes, stream
        self.buffers: dict[str, int] = {}
        self._memory: list[DeviceMemory] = []
        try:
            for name, shape in shapes.items():
                self._memory.append(DeviceMemory(math.prod(shape) * _type(name).itemsize))
                self.buffers[name] = self._memory[-1].pointer
            tokens = math.prod(shapes["ids"]) if "ids" in shapes else 0
            starts = range(0, tokens, DISCRETIZED_TOKENS)
            pieces = [(start, min(DISCRETIZED_TOKENS, tokens - start)) for start in starts]
            self._bindings = [self._bind(*piece) for piece in pieces] or [self._bind()]
        except BaseException:
            self.close()
            raise

    def enqueue(self) -> None:
        """Not only enqueued: it waits for the stream, and for the result."""
        for binding in self._bindings:
            synchronize(self._stream)
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:  # onnxruntime's own errors have no common base
                rows, length = next(iter(self._shapes.values()))[:2]
                raise BackendError(
                    f"{NAME}: a call of {rows} rows of {length} tokens failed: {first_line(error)}"
                ) from error

    def close(self) -> None:
        for memory in self._memory:
            memory.close()
        self._memory.clear()
        self.buffers.clear()

    def _bind(self, token: int = 0, tokens: int | None = None) -> Any:
        """Bind whole buffers, or `tokens` positions of them from position `token` on, as one row."""
        binding = self._session.io_binding()
        for values, bind in (
            (self._session.get_inputs(), binding.bind_input),
            (self._session.get_outputs(), binding.bind_output),
        ):
            for name in (value.name for value in values):
                shape, item = self._shapes[name], _type(name).itemsize
                address = self.buffers[name] + token * math.prod(shape[2:]) * item
                bind(name, MEMORY, 0, _type(name), shape if tokens is None else (1, tokens, *shape[2:]), address)
        return binding


def _type(name: str) -> np.dtype:
    return np.dtype(np.int64 if name == "ids" else np.float32)
