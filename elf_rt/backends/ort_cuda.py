"""ONNX Runtime on the GPU: for machines that have neither TensorRT nor torch.

Inputs and outputs stay in GPU memory through IO binding, and the integrator runs there too. But ONNX Runtime has
streams of its own, so the host waits before and after each network call, and nothing is captured.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from elf_rt import device
from elf_rt.backends.cpu_encoder import CpuEncoder
from elf_rt.bundle import Bundle
from elf_rt.device.cudart import DeviceMemory, synchronize
from elf_rt.device.host import HostNetwork
from elf_rt.device.network import Enqueued, Launchable
from elf_rt.errors import BackendError, first_line
from elf_rt.libraries import import_library, why_absent

NAME = "onnxruntime-cuda"
PRECISIONS = ("fp16", "bf16", "fp32")
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


def open_backend(bundle: Bundle, precision: str, threads: int | None = None) -> "OrtCudaBackend":
    """``threads`` has no meaning on a GPU."""
    if reason := unavailable():
        raise BackendError(f"{NAME}: {reason}")
    return OrtCudaBackend(bundle, precision)


class OrtCudaBackend:
    """Two sessions in GPU memory. Safe to share between threads; networks made by it are not."""

    name = NAME
    device = "cuda"

    def __init__(self, bundle: Bundle, precision: str) -> None:
        self._ort = import_library("onnxruntime")
        self.precision = precision
        self.config = bundle.config
        self.encode = CpuEncoder(bundle)
        files = bundle.variant(precision)
        if MEMORY == "cuda":
            self._ort.preload_dlls()  # CUDA and cuDNN from their pip packages, where they are installed
        self.denoiser = self._session(str(files["denoiser"]))
        self.discretizer = self._session(str(files["discretizer"]))

    def device_network(self, rows: int, length: int, stream: int) -> "OrtCudaNetwork":
        return OrtCudaNetwork(self, rows, length)

    def capture(self, stream: int, body: Callable[[], None]) -> Launchable:
        """See ``elf_rt.device.network.Capturing``: never a graph."""
        return Enqueued(body)

    def bind(self, rows: int, length: int) -> HostNetwork:
        return HostNetwork(self, self.config.latent_dim, rows, length)

    def describe(self) -> Mapping[str, str]:
        return {"library": f"ONNX Runtime {self._ort.__version__} ({PROVIDER})", "precision": self.precision}

    def close(self) -> None:
        del self.denoiser, self.discretizer

    def _session(self, path: str) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # its errors are raised too
        # float32 means float32: TF32 would change tokens.
        providers = [(PROVIDER, {"use_tf32": "0"})] if MEMORY == "cuda" else [PROVIDER]
        try:
            session = self._ort.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime's own errors have no common base
            raise BackendError(f"{NAME} cannot load {path}: {first_line(error)}") from error
        if session.get_providers()[0] != PROVIDER:  # it falls back to the CPU in silence
            raise BackendError(f"{NAME}: CUDA or cuDNN could not be loaded: pip install 'onnxruntime-gpu[cuda,cudnn]'")
        return session


class OrtCudaNetwork:
    """GPU memory bound to both sessions for R rows of length L: see ``elf_rt.device.network.DeviceNetwork``."""

    def __init__(self, backend: OrtCudaBackend, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        config = backend.config
        latents = (rows, length, config.latent_dim)
        inputs = [value.name for value in backend.denoiser.get_inputs()]
        self.shapes: dict[str, tuple[int, ...]] = {n: latents if n in ("z", "x_prev") else (rows,) for n in inputs}
        self.shapes |= {"x": latents, "hidden": (rows, length, config.hidden_size), "ids": (rows, length)}
        self.buffers: dict[str, int] = {}
        self._memory: list[DeviceMemory] = []
        try:
            for name, shape in self.shapes.items():
                self._memory.append(DeviceMemory(math.prod(shape) * _type(name).itemsize))
                self.buffers[name] = self._memory[-1].pointer
            self._denoise = self._bind(backend.denoiser, inputs, ["x", "hidden"])
            self._discretize = [
                self._bind(
                    backend.discretizer, ["hidden"], ["ids"], start, min(DISCRETIZED_TOKENS, rows * length - start)
                )
                for start in range(0, rows * length, DISCRETIZED_TOKENS)
            ]
        except BaseException:
            self.close()
            raise

    def enqueue_denoise(self, stream: int) -> None:
        """Not only enqueued: it waits for the stream, and for the result."""
        self._run(self._denoise, stream)

    def enqueue_discretize(self, stream: int) -> None:
        """Not only enqueued: it waits for the stream, and for the result."""
        for part in self._discretize:
            self._run(part, stream)

    def close(self) -> None:
        for memory in self._memory:
            memory.close()
        self._memory.clear()
        self.buffers.clear()

    def _bind(
        self, session: Any, inputs: list[str], outputs: list[str], token: int = 0, tokens: int | None = None
    ) -> tuple[Any, Any]:
        """Bind whole buffers, or `tokens` positions of them from position `token` on, as one row."""
        binding = session.io_binding()
        for names, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name in names:
                shape, item = self.shapes[name], _type(name).itemsize
                address = self.buffers[name] + token * math.prod(shape[2:]) * item
                bind(name, MEMORY, 0, _type(name), shape if tokens is None else (1, tokens, *shape[2:]), address)
        return session, binding

    def _run(self, bound: tuple[Any, Any], stream: int) -> None:
        session, binding = bound
        synchronize(stream)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's own errors have no common base
            reason = str(error).splitlines()[0]
            raise BackendError(
                f"{NAME}: a call of {self.rows} rows of {self.length} tokens failed: {reason}"
            ) from error


def _type(name: str) -> np.dtype:
    return np.dtype(np.int64 if name == "ids" else np.float32)
