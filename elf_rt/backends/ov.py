"""OpenVINO on the CPU: the fastest backend on x86, and the only one that computes in bfloat16 there.

The network is compiled for the length that the model was trained on and for any number of rows. A fixed length is what
OpenVINO needs to fuse rotary; fixed rows were measured to gain nothing, and would cost a compilation and a copy of
the weights for every batch size. Other lengths share one second network, compiled when the first of them is asked for.
"""

import contextlib
import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elf_rt.backends.base import check_widths, token_slices
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, warn
from elf_rt.files import sealed_folder
from elf_rt.libraries import import_library, why_absent
from elf_rt.machine import cores, has_bf16, user_cache

if TYPE_CHECKING:
    import openvino

NAME = "openvino"
# Best first of those whose text can be float32's; int8's is not.
PRECISIONS = ("bf16", "fp32", "int8") if has_bf16() else ("fp32", "int8")
ACCEPTED = ("fp32", "bf16", "fp16", "int8")
VARIANTS = {"bf16": "fp32", "int8": "int8-openvino"}  # OpenVINO rounds the float32 graphs itself
# OpenVINO sets the process's locale to "C" while it reads a cached network, and back. Of two threads that do so at the
# same time, one may put back what the other had set, and Python's open() then takes every file for ASCII.
_COMPILING = threading.Lock()


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    return why_absent("openvino", "Core", "pip install 'elf-rt[openvino]'")


def open_backend(bundle: Bundle, precision: str, threads: int | None = None) -> "OpenVinoBackend":
    """Compile a bundle's float32 graphs. ``threads``: all cores, each pinned, by default; a number is not pinned.

    Raises:
        BackendError: OpenVINO is missing or cannot compile the graphs.
    """
    if reason := unavailable():
        raise BackendError(f"{NAME}: {reason}")
    return OpenVinoBackend(bundle, precision, threads)


class OpenVinoBackend:
    """Compiled networks that share one stream; every bound network has its own request, so threads may share this."""

    name = NAME
    device = "cpu"

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        self._ov = import_library("openvino")
        self._core = self._ov.Core()
        self.config = bundle.config
        bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = _supported(precision, bf16)
        variant = VARIANTS.get(self.precision, self.precision)
        self._files = bundle.variant(variant)
        self._bundle = bundle
        self._threads = threads or cores()
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 and self.precision != "fp32" else "f32",
            "INFERENCE_NUM_THREADS": self._threads,
            "ENABLE_CPU_PINNING": threads is None,
        }
        self._lock = threading.Lock()
        self._any_length: openvino.CompiledModel | None = None
        self._encoder: openvino.CompiledModel | None = None
        with contextlib.ExitStack() as held:
            cache = self._cache_option(variant, held)
            self._trained_length = self._compile(self._files["denoiser"], self.config.max_length, cache)
            self.discretizer = self._compile(self._files["discretizer"], -1, cache)
        ports = {name: self._trained_length.output(name) for name in ("x", "hidden")}
        widths = {name: port.get_partial_shape()[2].get_length() for name, port in ports.items()}
        check_widths(NAME, self.config, widths)

    def denoiser(self, length: int) -> "openvino.CompiledModel":
        """The network for texts of this length and any number of them."""
        if length == self.config.max_length:
            return self._trained_length
        with self._lock:
            if self._any_length is None:
                self._any_length = self._compile(self._files["denoiser"], -1)
            return self._any_length

    def bind(self, rows: int, length: int) -> "OpenVinoNetwork":
        return OpenVinoNetwork(self, rows, length)

    def encode(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with self._lock:
            if self._encoder is None:
                # It runs once a text and all steps depend on it: always float32.
                path = self._bundle.encoder_graph()
                self._encoder = self._compile(path, options={"INFERENCE_PRECISION_HINT": "f32"})
        results = self._encoder.create_infer_request().infer({"ids": ids, "mask": mask})
        return np.array(results[0])

    def describe(self) -> Mapping[str, str]:
        return {
            "library": f"OpenVINO {self._ov.get_version().split('-')[0]}",
            "precision": self.precision,
            "threads": str(self._threads),
        }

    def close(self) -> None:
        self._any_length = self._encoder = None
        del self._trained_length, self.discretizer

    def _compile(
        self, path: Path, length: int | None = None, options: Mapping[str, Any] | None = None
    ) -> "openvino.CompiledModel":
        """``length``: of the text axis; -1 for any; None leaves all axes as they are in the file."""
        try:
            with _COMPILING:
                model = self._core.read_model(path)
                if length is not None:
                    model.reshape({port: _fixed(port.get_partial_shape(), length) for port in model.inputs})
                return self._core.compile_model(model, "CPU", self._options | dict(options or {}))
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter of a message with bytes of a damaged file
            raise BackendError(f"{NAME} cannot load {path}: {str(error).strip().splitlines()[-1]}") from error

    def _cache_option(self, variant: str, held: contextlib.ExitStack) -> dict[str, str]:
        """OpenVINO keeps what it compiled in a folder of this bundle's own. It checks that against its own version, and
        nothing else: so the folder is sealed."""
        files = self._bundle.manifest.files
        key = hashlib.sha256("".join(files[name] for name in self._bundle.variants[variant].values()).encode())
        folder = user_cache() / "openvino" / key.hexdigest()[:16]
        try:
            held.enter_context(sealed_folder(folder, self._bundle.digest))
        except OSError as error:
            warn(f"compiled networks are not cached: {error}")
            return {}
        return {"CACHE_DIR": str(folder)}


class OpenVinoNetwork:
    """A request of each network over shared tensors, so that a call copies nothing."""

    def __init__(self, backend: OpenVinoBackend, rows: int, length: int) -> None:
        ov, config = backend._ov, backend.config
        compiled = backend.denoiser(length)
        self._denoise = compiled.create_infer_request()
        self._discretize = backend.discretizer.create_infer_request()
        names = {port.get_any_name() for port in compiled.inputs}

        def tensor(*shape: int) -> Any:
            made = ov.Tensor(ov.Type.f32, ov.Shape(shape))
            made.data[:] = 0.0
            return made

        def bound(name: str, *shape: int) -> Any:
            if name not in names:
                return None
            made = tensor(*shape)
            self._denoise.set_tensor(name, made)
            return made.data

        self.z = bound("z", rows, length, config.latent_dim)
        self.x_prev = bound("x_prev", rows, length, config.latent_dim)
        self.t = bound("t", rows)
        self.s = bound("s", rows)
        self.mode = bound("mode", rows)
        x = tensor(rows, length, config.latent_dim)
        self._hidden = tensor(rows, length, config.hidden_size)
        self._denoise.set_tensor("x", x)
        self._denoise.set_tensor("hidden", self._hidden)
        self.x = x.data
        self._ids = np.zeros((rows, length), np.int64)

    def denoise(self) -> None:
        self._denoise.infer(share_outputs=True)

    def discretize(self) -> np.ndarray:
        hidden, ids = self._hidden.data, self._ids.reshape(1, -1)
        tokens, Tensor = hidden.reshape(1, -1, hidden.shape[-1]), type(self._hidden)
        for part in token_slices(ids.size):
            self._discretize.set_tensor("hidden", Tensor(tokens[:, part], shared_memory=True))
            (found,) = self._discretize.infer(share_outputs=True).values()
            ids[:, part] = found
        return self._ids.copy()

    def close(self) -> None:
        del self._denoise, self._discretize


def _supported(precision: str, bf16: bool) -> str:
    """``precision``, or the nearest that the processor computes in, with a warning. bf16: whether it has that."""
    if precision in ("fp32", "int8") or (precision == "bf16" and bf16):
        return precision
    nearest = "bf16" if bf16 else "fp32"
    warn(f"{NAME} has no {precision} on this processor: {nearest} instead")
    return nearest


def _fixed(shape: Any, length: int) -> list[Any]:
    """(rows, length, width) or (rows,) with any rows and the given length."""
    return [-1, length, shape[2]] if len(shape) == 3 else [-1]
