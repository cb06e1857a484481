"""torch on the GPU: the fast path where TensorRT is not installed.

torch leads the capture of its graphs itself, through torch.cuda.graph on the engine's stream: its allocator has to
know of a capture, or it would hand the memory that a graph works in to somebody else afterwards. The integrator's
kernels are launched on the same stream meanwhile and end up in the same graph. Inputs and outputs are tensors that live
as long as the network, and whose addresses the kernels are given.
"""

import importlib.util
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from elf_rt import device
from elf_rt.backends.table import NO_TUNE
from elf_rt.bundle import Bundle
from elf_rt.device import setup_lock
from elf_rt.errors import BackendError, GpuMemoryError, first_line, warn
from elf_rt.libraries import why_absent
from elf_rt.network import GRAPHS, Capture, Graph, Launchable, Library, tensor_shapes

if TYPE_CHECKING:
    import torch

    from elf_rt.backends.torch_tuning import Tuner

NAME = "torch"
settings_lock = threading.RLock()  # held while settings are changed that torch has once a process


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    for package in ("torch", "onnx"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install torch onnx"
    if reason := device.unavailable():
        return reason
    if reason := why_absent("torch", "cuda", "pip install torch"):
        return f"torch is {reason}"
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA: install one from https://pytorch.org/get-started"
    if not torch.cuda.is_available():
        return f"torch for CUDA {torch.version.cuda} cannot use this driver: update it, or install an older torch"
    return None


def open_backend(bundle: Bundle, precision: str, threads: int | None = None) -> "TorchBackend":
    """``threads`` has no meaning on a GPU."""
    return TorchBackend(bundle, precision, tune=not os.environ.get(NO_TUNE))


def details() -> str:
    """Versions, and whose attention is asked for, where the backend can be used."""
    import torch

    from elf_rt.backends.torch_attention import cudnn_version, usable
    from elf_rt.backends.torch_tuning import triton_version

    attentions, absent = usable(torch.float16)
    why = "".join(f"; {name}: {reason}" for name, reason in absent.items())
    versions = f"torch {torch.__version__}, cuDNN {cudnn_version() or 'none'}, Triton {triton_version() or 'none'}"
    return f"{versions}; attention by {attentions[0].library}{why}"


class TorchBackend(Library):
    """One network in torch, whose weights all bound graphs share.

    Args:
        device: "cuda", or "cpu" to check the network's arithmetic without a GPU.
        tune: measure once, for each shape, which of several ways is the fastest here.
    """

    name = NAME

    def __init__(self, bundle: Bundle, precision: str, device: str = "cuda", tune: bool = True) -> None:
        import torch

        from elf_rt.backends.torch_network import PRECISIONS, Network
        from elf_rt.backends.torch_tuning import tuner_here

        self.library = f"torch {torch.__version__}"
        self.precision = precision
        self.device = device
        self.config = bundle.config
        self._torch = torch
        self._pool = None
        self.tuner: Tuner | None = None
        self.fused = False
        with setup_lock:
            try:
                self.network: Network = Network(bundle, precision, device)
            except torch.OutOfMemoryError as error:
                raise out_of_memory(torch, "the weights", error) from error
            if device == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
                self.fuse()
                self.tuner = tuner_here(self.network, PRECISIONS[precision], tune)

    def fuse(self) -> None:
        """Let torch.compile fuse what stands between the matrix products; keep torch's own kernels where it cannot."""
        from elf_rt.backends import torch_pointwise

        self.network.pointwise = torch_pointwise.compiled()
        try:
            for graph in GRAPHS:
                bound = TorchGraph(self, graph, 3, min(8, self.config.max_length))
                bound.run()
                bound.close()
            self.fused = True
        except Exception as error:  # dynamo, inductor, Triton and the C compiler have no common error
            self.network.pointwise = torch_pointwise.EAGER
            warn(f"torch.compile does not work here, so more kernels run, which is slower: {first_line(error)}")

    def bind(self, graph: Graph, rows: int, length: int, stream: int) -> "TorchGraph":
        return TorchGraph(self, graph, rows, length, stream)

    def capture(self, plain: Capture, stream: int, body: Callable[[], None]) -> Launchable:
        """torch leads a capture itself. All CUDA graphs share one pool: nothing in it outlives a launch.

        cuBLAS keeps one workspace for each stream, which torch frees with the first graph of the stream that goes. So
        each capture makes its own, in the pool, and leaves none behind.
        """
        torch = self._torch
        graph, external = torch.cuda.CUDAGraph(), torch.cuda.ExternalStream(stream)
        clear_workspaces(torch)
        try:
            with (
                torch.cuda.stream(external),  # the capture leaves it current when it fails
                torch.cuda.graph(graph, pool=self._pool, stream=external, capture_error_mode="thread_local"),
            ):
                body()
        except RuntimeError as error:  # torch's own CUDA errors are RuntimeErrors
            if isinstance(error.__context__, BackendError):  # the body's own error: that is why the capture did not end
                raise error.__context__ from None
            raise failure("a graph", error) from error
        finally:
            clear_workspaces(torch)
        return TorchCapture(torch, graph, external)

    def describe(self) -> Mapping[str, str]:
        torch, properties = self._torch, dict[str, str]()
        if self.device == "cuda":
            properties = {"gpu": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
        properties["fused"] = "torch.compile" if self.fused else "no"
        chosen = self.tuner.describe() if self.tuner is not None else {}
        return {**super().describe(), **properties, **chosen}

    def close(self) -> None:
        with setup_lock:
            del self.network
            self.tuner = None
            if self.device == "cuda":
                clear_workspaces(self._torch)
                self._torch.cuda.empty_cache()


class TorchGraph:
    """Static tensors for R rows of length L: see ``elf_rt.network.DeviceGraph``. stream: None for torch's own."""

    def __init__(self, backend: TorchBackend, graph: Graph, rows: int, length: int, stream: int | None = None) -> None:
        self._torch, self._network, self._stream = backend._torch, backend.network, stream
        self._graph, self._what = graph, f"a network call of {rows} rows of {length} tokens"
        if graph == "denoiser" and backend.tuner is not None:
            backend.tuner.prepare(rows, length)
        torch = backend._torch
        try:
            self.tensors = {
                name: torch.zeros(shape, dtype=torch.int64 if name == "ids" else torch.float32, device=backend.device)
                for name, shape in tensor_shapes(graph, backend.config, rows, length).items()
            }
        except torch.OutOfMemoryError as error:
            raise out_of_memory(torch, f"{rows} rows of {length} tokens", error) from error
        if backend.device == "cuda":
            torch.cuda.current_stream().synchronize()  # zeroed on torch's stream, used on the engine's
        self.buffers = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}

    def enqueue(self) -> None:
        torch = self._torch
        try:
            with torch.cuda.stream(torch.cuda.ExternalStream(self._stream)):
                self.run()
        except RuntimeError as error:
            raise failure(self._what, error) from error

    def run(self) -> None:
        """On torch's current stream."""
        at = self.tensors.get
        with self._torch.inference_mode(), own_settings(self._torch):
            if self._graph == "discretizer":
                self.tensors["ids"].copy_(self._network.discretize(self.tensors["hidden"]))
            else:
                inputs = self.tensors["z"], at("x_prev"), self.tensors["t"], at("s"), at("mode")
                self._network.denoise(*inputs, self.tensors["x"], self.tensors["hidden"])

    def close(self) -> None:
        on_gpu = any(tensor.is_cuda for tensor in self.tensors.values())
        self.tensors.clear()
        self.buffers.clear()
        if on_gpu:
            self._torch.cuda.empty_cache()  # gives torch's spare memory back to CUDA, for the engine


class TorchCapture:
    """A CUDA graph that torch captured, on the stream that it was captured from."""

    def __init__(self, torch: Any, graph: "torch.cuda.CUDAGraph", stream: "torch.cuda.ExternalStream") -> None:
        self._torch, self._graph, self._stream = torch, graph, stream

    def launch(self) -> None:
        try:
            with self._torch.cuda.stream(self._stream):  # torch replays on its current stream
                self._graph.replay()
        except RuntimeError as error:
            raise failure("a graph", error) from error

    def close(self) -> None:
        self._graph.reset()


@contextmanager
def own_settings(torch: Any) -> Iterator[None]:
    """Inside the context no autocast of the caller's has an effect, and no sum of 16-bit products is kept in 16 bits,
    which may overflow where the sum itself does not."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("fp16", "bf16")]
    with settings_lock:  # two threads at once would restore each other's settings
        saved = {name: getattr(matmul, name) for name in names}
        try:
            for name in names:
                setattr(matmul, name, False)
            with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
                yield
        finally:
            for name, value in saved.items():
                setattr(matmul, name, value)


def failure(what: str, error: RuntimeError) -> BackendError:
    """One of torch's errors in a line; it holds on to no memory."""
    traceback.clear_frames(error.__traceback__)
    if "out of memory" in str(error):
        return GpuMemoryError(f"{NAME}: no GPU memory for {what}: use a smaller batch ({first_line(error)})")
    return BackendError(f"{NAME}: {first_line(error)}")


def out_of_memory(torch: Any, what: str, error: RuntimeError) -> BackendError:
    """The same for what is kept; what torch has left of it goes back to CUDA, for others."""
    refused = failure(what, error)
    torch.cuda.empty_cache()
    return refused


def clear_workspaces(torch: Any) -> None:
    """Let cuBLAS forget its workspaces."""
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()  # absent from builds without CUDA
