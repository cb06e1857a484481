"""OpenVINO on the CPU: the fastest backend on x86, and the only one that computes in bfloat16 there.

The network is compiled for the length that the model was trained on and for any number of rows. A fixed length is what
OpenVINO needs to fuse rotary; fixed rows were measured to gain nothing, and would cost a compilation and a copy of
the weights for every batch size. Other lengths share one second network, compiled when the first of them is asked for.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elf_rt.backends.table import variant_of
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, BundleError, last_line, warn
from elf_rt.files import is_utf8, remove_oldest, sealed_folder
from elf_rt.libraries import import_library, why_absent
from elf_rt.machine import cores, user_cache
from elf_rt.network import Graph, HostBackend, tensor_shapes

if TYPE_CHECKING:
    import openvino

NAME = "openvino"
KEPT_NETWORKS = 8  # compiled ones in the user's cache, each as large as its weights: every export makes a new one
# OpenVINO sets the process's locale to "C" while it reads a cached network, and back. Of two threads that do so at the
# same time, one may put back what the other had set, and Python's open() then takes every file for ASCII.
_COMPILING = threading.Lock()
_closed = False  # whether threads of a network are left in this process, for the next one to use
_threads_are_gone = False  # the same in a forked child, which has none of them: the next network would wait for ever


def _note_fork() -> None:
    global _threads_are_gone
    _threads_are_gone |= _closed or _COMPILING.locked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    if _threads_are_gone:
        return "cannot be used in a process forked after a model was closed, or while one was loaded: start it by spawn"
    return why_absent("openvino", "Core", "pip install 'elf-rt[openvino]'")


class OpenVinoBackend(HostBackend):
    """Compiled networks that share one stream; every bound graph has its own request.

    Args:
        threads: None: all cores, each pinned; a number is not pinned.

    Raises:
        BackendError: OpenVINO cannot compile the graphs.
    """

    name = NAME

    def __init__(self, bundle: Bundle, precision: str, threads: int | None) -> None:
        self._ov = import_library("openvino")
        self.library = f"OpenVINO {self._ov.get_version().split('-')[0]}"
        self._core = self._ov.Core()
        self.config = bundle.config
        bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = _supported(precision, bf16)
        variant = variant_of(NAME, self.precision)
        self._files = bundle.variant(variant)
        self._bundle = bundle
        self.threads = threads or cores()
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 and self.precision != "fp32" else "f32",
            "INFERENCE_NUM_THREADS": self.threads,
            "ENABLE_CPU_PINNING": threads is None,
        }
        self._any_length: openvino.CompiledModel | None = None
        with contextlib.ExitStack() as held:
            cache = self._cache_option(variant, held)
            self._trained_length = self._compile(self._files["denoiser"], self.config.max_length, cache)
            self.discretizer = self._compile(self._files["discretizer"], -1, cache)
        self._check_ports(self._trained_length)

    def denoiser(self, length: int) -> "openvino.CompiledModel":
        """The network for texts of this length and any number of them."""
        if length == self.config.max_length:
            return self._trained_length
        if self._any_length is None:
            self._any_length = self._compile(self._files["denoiser"], -1)
        return self._any_length

    def bind(self, graph: Graph, rows: int, length: int) -> "OpenVinoGraph":
        compiled = self.denoiser(length) if graph == "denoiser" else self.discretizer
        return OpenVinoGraph(self._ov, compiled, tensor_shapes(graph, self.config, rows, length))

    def close(self) -> None:
        global _closed
        _closed = True
        self._any_length = None
        del self._trained_length, self.discretizer

    def _compile(self, path: Path, length: int, options: Mapping[str, Any] | None = None) -> "openvino.CompiledModel":
        """``length``: of the text axis; -1 for any."""
        try:
            with _COMPILING:
                model = self._core.read_model(path)
                model.reshape({port: _fixed(port.get_partial_shape(), length) for port in model.inputs})
                return self._core.compile_model(model, "CPU", self._options | dict(options or {}))
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter of a message with bytes of a damaged file
            raise BackendError(f"{NAME} cannot load {path}: {last_line(error)}") from error

    def _check_ports(self, denoiser: "openvino.CompiledModel") -> None:
        """The bundle cannot tell what goes in and out of a file in OpenVINO's own format."""
        ports = [*denoiser.inputs, *denoiser.outputs]
        widths = {name: tuple(port.get_partial_shape())[2:] for port in ports for name in port.names}
        for name, shape in tensor_shapes("denoiser", self.config, 1, 1).items():
            if widths.get(name) != shape[2:]:
                path = self._files["denoiser"]
                raise BundleError(f"{path} is no denoiser of this model (see its {name}): export the checkpoint again")

    def _cache_option(self, variant: str, held: contextlib.ExitStack) -> dict[str, str]:
        """OpenVINO keeps what it compiled in a folder of this bundle's own. It checks that against its own version, and
        nothing else: so the folder is sealed."""
        files = self._bundle.manifest.files
        key = hashlib.sha256("".join(files[name] for name in self._bundle.variants[variant].values()).encode())
        folder = user_cache() / "openvino" / key.hexdigest()[:16]
        if not is_utf8(folder):
            warn(f"compiled networks are not cached: {str(folder)!r} is not UTF-8")
            return {}
        try:
            if not folder.exists():
                remove_oldest(folder.parent, KEPT_NETWORKS - 1)
            held.enter_context(sealed_folder(folder, self._bundle.digest))
        except OSError as error:
            warn(f"compiled networks are not cached: {error.strerror or error}: {folder}")
            return {}
        return {"CACHE_DIR": str(folder)}


open_backend = OpenVinoBackend


class OpenVinoGraph:
    """A request over tensors of its own, so that a call copies nothing."""

    def __init__(self, ov: Any, compiled: "openvino.CompiledModel", shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._request = compiled.create_infer_request()
        types = {name: ov.Type.i64 if name == "ids" else ov.Type.f32 for name in shapes}
        self._tensors = {name: ov.Tensor(types[name], ov.Shape(shape)) for name, shape in shapes.items()}
        self.arrays: dict[str, np.ndarray] = {name: tensor.data for name, tensor in self._tensors.items()}
        for name, tensor in self._tensors.items():
            tensor.data[:] = 0
            self._request.set_tensor(name, tensor)

    def run(self) -> None:
        self._request.infer(share_outputs=True)

    def close(self) -> None:
        self.arrays.clear()
        del self._request


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
