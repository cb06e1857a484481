"""Where engine libraries and the engine of rows meet: the two graphs of a bundle, bound to static buffers.

A bundle holds two graphs. ``denoiser``: z, x_prev (R, L, C), t, s, mode (R,) -> x (R, L, C), hidden (R, L, H), all
float32; inputs that a model does not have are absent. ``discretizer``: hidden (R, L, H) -> ids (R, L) int64.
Everything here is used by one thread at a time: the driver's.
"""

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np

from elf_rt.params import ModelConfig

Graph = Literal["denoiser", "discretizer"]
GRAPHS: tuple[Graph, ...] = ("denoiser", "discretizer")


class Library(Protocol):
    """What every backend is: an engine library with one model loaded in one precision."""

    name: str
    library: str  # its name and version, to be read
    precision: str

    def max_rows(self, length: int, needed: int = 1) -> int | None:
        """The most rows of one call at this length, or None where it does not care.

        Raises:
            BackendError: it takes fewer than are needed; says what would mend that.
        """
        return None

    def describe(self) -> Mapping[str, str]:
        """What ``elf-rt bench`` prints."""
        return {"library": self.library, "precision": self.precision}

    def close(self) -> None:
        """After all graphs that were bound."""
        ...


class BoundGraph(Protocol):
    """A graph bound to R rows of length L. ``arrays`` are the library's own buffers by tensor name: write the inputs in
    place, call ``run``, read the outputs."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]: ...

    def run(self) -> None: ...

    def close(self) -> None: ...


class HostBackend(Library, Protocol):
    """A library that computes on the CPU."""

    device: Literal["cpu"] = "cpu"
    threads: int

    def describe(self) -> Mapping[str, str]:
        return {**super().describe(), "threads": str(self.threads)}

    def bind(self, graph: Graph, rows: int, length: int) -> BoundGraph:
        """Buffers and engine state for calls of this shape."""
        ...


class DeviceGraph(Protocol):
    """A graph bound to R rows of length L on the GPU. ``buffers`` are device addresses by tensor name, fixed for the
    life of this object.

    ``enqueue`` only puts work on the stream that it was bound for: no host synchronisation, no allocation, no read of a
    result, so that it can be captured in a CUDA graph after it ran once. It raises BackendError when the library
    refuses.
    """

    @property
    def buffers(self) -> Mapping[str, int]: ...

    def enqueue(self) -> None: ...

    def close(self) -> None: ...


class Launchable(Protocol):
    """Work that can be put on its stream again and again."""

    def launch(self) -> None: ...

    def close(self) -> None: ...


Capture = Callable[[int, Callable[[], None]], Launchable]  # (stream, body) -> what body enqueues there, as one launch


class DeviceBackend(Library, Protocol):
    """A library that computes on the GPU."""

    device: Literal["cuda"] = "cuda"

    def bind(self, graph: Graph, rows: int, length: int, stream: int) -> DeviceGraph:
        """Buffers and engine state for calls of this shape on this stream, a CUstream as an integer.

        Raises:
            BackendError: the engine was not built for this shape; GpuMemoryError where memory ran out. Nothing stays
                allocated.
        """
        ...

    def capture(self, plain: Capture, stream: int, body: Callable[[], None]) -> Launchable:
        """Record what ``body`` enqueues on the stream. ``plain`` does so by the CUDA runtime; a library whose memory
        has to know of a capture leads it itself, and one that cannot be captured gives ``Enqueued`` back.

        Raises:
            BackendError: it could not be captured this time.
        """
        return plain(stream, body)


Backend = HostBackend | DeviceBackend


class Enqueued:
    """A Launchable without a CUDA graph: the host enqueues the work anew at each launch."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.launch = body

    def close(self) -> None:
        """Nothing was kept."""


def tensor_shapes(graph: str, config: ModelConfig, rows: int, length: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a graph's inputs and outputs, or the text encoder's, for R rows of length L."""
    latents, hidden = (rows, length, config.latent_dim), (rows, length, config.hidden_size)
    if graph == "encoder":
        return {"ids": (rows, length), "mask": (rows, length), "latents": latents}
    if graph == "discretizer":
        return {"hidden": hidden, "ids": (rows, length)}
    shapes: dict[str, tuple[int, ...]] = {"z": latents, "t": (rows,), "x": latents, "hidden": hidden}
    if config.self_cond:
        shapes["x_prev"] = latents
    if config.num_self_cond_cfg_tokens:
        shapes["s"] = (rows,)
    if config.num_model_mode_tokens:
        shapes["mode"] = (rows,)
    return shapes
