"""TensorRT and TensorRT-RTX: runs the plans that ``elf-rt build-engine`` put into the bundle.

A plan is checked against its record before the library sees a byte of it. Everything that a network call needs (engine,
execution contexts, inputs, outputs, scratch memory) is allocated and bound once, when the network is; from then on a
call is one enqueue on the caller's stream, with no synchronisation, so that a whole sample can be one CUDA graph.
"""

import ctypes
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from elf_rt.bundle import Bundle
from elf_rt.cudart import DeviceMemory, Gpu, PinnedMemory, Stream, find_gpu, synchronize
from elf_rt.errors import BackendError
from elf_rt.plans import GRAPHS, TENSORRT, Library, Record, find_plans, make_log, this_machine

NAME = TENSORRT.name
PRECISIONS = ("fp16", "bf16", "fp32")
ITEM_BYTES = {"FLOAT": 4, "INT64": 8}  # the types of a bundle's graphs at their borders, whatever is inside


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    return why_unavailable(TENSORRT)


def open_backend(bundle: Bundle, precision: str, threads: int | None = None) -> "TrtBackend":
    """Load the bundle's plan for this machine. ``threads`` has no meaning on a GPU.

    Raises:
        BackendError: no library, driver, GPU or plan; says which, and the command that mends it.
    """
    return TrtBackend(bundle, precision, TENSORRT)


def why_unavailable(library: Library) -> str | None:
    """Why a library cannot be used here, or None: it must be installed, and a GPU and its driver must be there."""
    reason = library.unavailable()
    if reason is None:
        gpu = find_gpu()
        reason = None if isinstance(gpu, Gpu) else gpu
    return reason


class TrtBackend:
    """The plans of one bundle in one precision. Safe to share between threads; networks made by it are not."""

    device = "cuda"

    def __init__(self, bundle: Bundle, precision: str, library: Library) -> None:
        if reason := why_unavailable(library):
            raise BackendError(f"{library.name}: {reason}")
        self.name = library.name
        self.precision = precision
        self._title = library.title
        self._trt = library.load()
        self._machine = this_machine()
        self._bundle = bundle
        self._plans = find_plans(bundle, precision, library, self._trt.__version__, self._machine)
        self._log = make_log(self._trt)
        self._runtime: Any = self._trt.Runtime(self._log)
        self._loaded: dict[Path, dict[str, Any]] = {}
        self._networks: list[TrtNetwork] = []
        self._encoder: Any = None
        self._lock = threading.Lock()
        self._load(*self._plans[0])  # what the library refuses is refused now, so that another backend can be tried

    def max_rows(self, length: int) -> int:
        """The most network rows of this length that a plan takes; 0 if none takes this length."""
        profiles = [profile for _, record in self._plans for profile in record.profiles]
        return max((profile.rows.most for profile in profiles if length in profile.length), default=0)

    def device_network(self, rows: int, length: int, stream: int) -> "TrtNetwork":
        """Buffers and contexts for R network rows of length L, to be enqueued on ``stream`` (a CUstream as an integer).

        Fewer rows than the plans take are padded with rows of zeros.

        Raises:
            BackendError: no plan takes this shape, or GPU memory ran out.
        """
        with self._lock:
            if self._runtime is None:
                raise BackendError(f"{self.name}: the backend is closed")
            folder, record, profile, padded = self._choose(rows, length)
            engines = self._load(folder, record)
            network = TrtNetwork(self._trt, engines, profile, (rows, padded, length), stream, self._failure)
            self._networks = [known for known in self._networks if known.buffers] + [network]  # closed ones have none
            return network

    def bind(self, rows: int, length: int) -> "TrtHostNetwork":
        """The same through arrays on the host, one synchronisation a call: for ``elf-rt verify``, not for speed."""
        with ExitStack() as stack:
            stream = Stream()
            stack.callback(stream.close)
            network = self.device_network(rows, length, stream.handle)
            stack.callback(network.close)
            bound = TrtHostNetwork(network, stream)
            stack.pop_all()
            return bound

    def encode(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(B, S) int64 ids and mask -> (B, S, C) float32 latents: once a text, so on the CPU, by ONNX Runtime."""
        with self._lock:
            if self._encoder is None:
                self._encoder = _open_encoder(self._bundle)
        return np.asarray(self._encoder.run(None, {"ids": ids, "mask": mask})[0])

    def describe(self) -> Mapping[str, str]:
        folder, record = next((plan for plan in self._plans if plan[0] in self._loaded), self._plans[0])
        denoiser = record.engines["denoiser"]
        gpu = self._machine.gpu
        return {
            "library": f"{self._title} {record.version}",
            "precision": self.precision,
            "gpu": f"{gpu.name}, sm_{gpu.sm}" if gpu else "none",
            "plan": folder.name,
            "matrix products": ", ".join(f"{count} {name}" for name, count in denoiser.matmuls.items()),
        }

    def close(self) -> None:
        """Free every network, engine and byte of GPU memory that this backend made."""
        with self._lock:
            for network in self._networks:
                network.close()
            self._networks.clear()
            self._loaded.clear()  # engines before the runtime that made them
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
                f"run elf-rt build-engine {self._bundle.folder} --{self.precision} --batch {rows} --seq-len {length}"
            )
        padded, _, folder, record, index = min(options, key=lambda option: option[:2])
        return folder, record, index, padded

    def _load(self, folder: Path, record: Record) -> dict[str, Any]:
        if folder not in self._loaded:
            record.check_files(folder)
            engines = {}
            for name in GRAPHS:
                path = folder / record.engines[name].file
                engines[name] = self._runtime.deserialize_cuda_engine(path.read_bytes())
                if engines[name] is None:
                    raise self._failure(f"refused {path}")
            self._loaded[folder] = engines
        return self._loaded[folder]

    def _failure(self, what: str) -> BackendError:
        """An error with what the library said since the last one."""
        said = self._log.errors()
        self._log.lines.clear()
        return BackendError(f"{self._title} {what}: {said}")


def _open_encoder(bundle: Bundle) -> Any:
    path = bundle.path("encoder.onnx")
    try:
        import onnxruntime
    except ImportError:
        raise BackendError(
            "the text encoder of a conditional model runs in ONNX Runtime: pip install 'elf-rt[cpu]'"
        ) from None
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


class TrtNetwork:
    """The network bound to R rows of length L on the GPU: see ``elf_rt.device.network.DeviceNetwork``.

    buffers: device addresses of z, x_prev, t, s, mode, x, hidden and ids, each with the rows of the padded batch; the
    first ``rows`` are the caller's. Both graphs share one scratch memory: they run on one stream, one after the other.
    """

    def __init__(
        self,
        trt: Any,
        engines: Mapping[str, Any],
        profile: int,
        shape: tuple[int, int, int],
        stream: int,
        failure: Callable[[str], BackendError],
    ) -> None:
        self.rows, padded_rows, self.length = shape
        self.shapes: dict[str, tuple[int, ...]] = {}  # as the engines have them: the padded rows
        self.buffers: dict[str, int] = {}
        self._failure = failure
        self._contexts: dict[str, Any] = {}
        self._memory: list[DeviceMemory] = []
        try:
            scratch_bytes = 0
            for name in GRAPHS:
                context = self._context(trt, engines[name], name, profile, stream)
                needed = self._shape(trt, engines[name], context, name, (padded_rows, self.length))
                scratch_bytes = max(scratch_bytes, needed)
            scratch = self._allocate(scratch_bytes)
            for context in self._contexts.values():
                context.set_device_memory(scratch, scratch_bytes)
        except BaseException:
            self.close()
            raise

    def enqueue_denoise(self, stream: int) -> None:
        """z, x_prev, t, s, mode -> x, hidden. Only puts work on the stream; can be captured after it ran once."""
        self._enqueue("denoiser", stream)

    def enqueue_discretize(self, stream: int) -> None:
        """hidden -> ids."""
        self._enqueue("discretizer", stream)

    def close(self) -> None:
        """Free the contexts and the memory. The stream must be idle."""
        self._contexts.clear()  # before the memory that they use
        self.buffers.clear()
        for memory in self._memory:
            memory.close()
        self._memory.clear()

    def _enqueue(self, name: str, stream: int) -> None:
        if name not in self._contexts:
            raise BackendError("this network is closed")
        if not self._contexts[name].execute_async_v3(stream):
            raise self._failure(f"could not run the {name}")

    def _context(self, trt: Any, engine: Any, name: str, profile: int, stream: int) -> Any:
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise self._failure(f"could not make a context for the {name}")
        self._contexts[name] = context
        if not context.set_optimization_profile_async(profile, stream):
            raise self._failure(f"could not select profile {profile} of the {name}")
        synchronize(stream)  # the profile may be switched on the stream; after this, nothing here ever waits
        return context

    def _shape(self, trt: Any, engine: Any, context: Any, name: str, size: tuple[int, int]) -> int:
        """Fix all shapes, allocate and bind all buffers; returns the bytes of scratch that this shape needs."""
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        for tensor in names:
            if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT:
                dynamic = tuple(engine.get_tensor_shape(tensor))
                shape = tuple(size[axis] if extent == -1 else extent for axis, extent in enumerate(dynamic))
                if not context.set_input_shape(tensor, shape):
                    raise self._failure(f"refused shape {shape} for {tensor} of the {name}")
        if missing := context.infer_shapes():
            raise self._failure(f"does not know the shape of {', '.join(missing)} in the {name}")
        for tensor in names:
            shape = tuple(context.get_tensor_shape(tensor))
            kind = engine.get_tensor_dtype(tensor).name
            if kind not in ITEM_BYTES or min(shape) < 1:
                raise BackendError(f"{tensor} of the {name} has type {kind} and shape {shape}: export and build again")
            if self.shapes.setdefault(tensor, shape) != shape:
                raise BackendError(f"{tensor} has shape {self.shapes[tensor]} and {shape}: export and build again")
            if tensor not in self.buffers:
                self.buffers[tensor] = self._allocate(math.prod(shape) * ITEM_BYTES[kind])
            if not context.set_tensor_address(tensor, self.buffers[tensor]):
                raise self._failure(f"refused the address of {tensor} in the {name}")
        return int(context.update_device_memory_size_for_shapes())

    def _allocate(self, num_bytes: int) -> int:
        self._memory.append(DeviceMemory(num_bytes))
        return self._memory[-1].pointer


class TrtHostNetwork:
    """A TrtNetwork behind page-locked host arrays: see ``elf_rt.backends.base.BoundNetwork``."""

    def __init__(self, network: TrtNetwork, stream: Stream) -> None:
        self._network = network
        self._stream = stream
        self._pinned: list[PinnedMemory] = []
        self._inputs = [name for name in network.buffers if name not in ("x", "hidden", "ids")]
        self._arrays: dict[str, np.ndarray] = {}
        try:
            for name in (*self._inputs, "x", "ids"):
                self._arrays[name] = self._array(name)
        except BaseException:
            self._free()
            raise
        self.z, self.x, self.t = (self._arrays[name] for name in ("z", "x", "t"))
        self.x_prev, self.s, self.mode = (self._arrays.get(name) for name in ("x_prev", "s", "mode"))

    def denoise(self) -> None:
        for name in self._inputs:
            array = self._arrays[name]
            self._stream.copy_to_device(self._network.buffers[name], array.ctypes.data, array.nbytes)
        self._network.enqueue_denoise(self._stream.handle)
        self._fetch("x")

    def discretize(self) -> np.ndarray:
        self._network.enqueue_discretize(self._stream.handle)
        self._fetch("ids")
        return self._arrays["ids"].copy()

    def close(self) -> None:
        if not self._pinned:
            return
        self._network.close()
        del self.z, self.x, self.t, self.x_prev, self.s, self.mode  # arrays over memory that is about to go
        self._free()
        self._stream.close()

    def _fetch(self, name: str) -> None:
        array = self._arrays[name]
        self._stream.copy_to_host(array.ctypes.data, self._network.buffers[name], array.nbytes)
        self._stream.synchronize()

    def _array(self, name: str) -> np.ndarray:
        """A zeroed array of the caller's rows in page-locked memory."""
        shape = (self._network.rows, *self._network.shapes[name][1:])
        dtype = np.dtype(np.int64 if name == "ids" else np.float32)
        memory = PinnedMemory(math.prod(shape) * dtype.itemsize)
        self._pinned.append(memory)
        raw = (ctypes.c_byte * memory.num_bytes).from_address(memory.pointer)
        array = np.frombuffer(raw, dtype).reshape(shape)
        array[:] = 0
        return array

    def _free(self) -> None:
        self._arrays.clear()
        for memory in self._pinned:
            memory.close()
        self._pinned.clear()
