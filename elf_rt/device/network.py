"""What the device sampler drives: a network whose every tensor already lies in GPU memory."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from elf_rt.backends.base import Backend


class DeviceNetwork(Protocol):
    """The network bound to R rows of length L on the GPU.

    buffers: device addresses by tensor name, fixed for the life of this object; inputs that the model does not have
    are absent. float32: z, x_prev, x (R, L, C), t, s, mode (R,), hidden (R, L, H); int64: ids (R, L).

    ``enqueue_*`` only put work on the stream (a CUstream as an integer): no host synchronisation, no allocation, no
    read of a result, so that they can be captured in a graph after they ran once. They raise BackendError when the
    engine refuses.
    """

    rows: int
    length: int

    @property
    def buffers(self) -> Mapping[str, int]: ...

    def enqueue_denoise(self, stream: int) -> None:
        """z, x_prev, t, s, mode -> x, hidden."""
        ...

    def enqueue_discretize(self, stream: int) -> None:
        """hidden -> ids."""
        ...

    def close(self) -> None: ...


class DeviceBackend(Backend, Protocol):
    """A backend with ``device == "cuda"``."""

    def device_network(self, rows: int, length: int, stream: int) -> DeviceNetwork:
        """Buffers and engine state for calls of this shape, which will be enqueued on this stream.

        Raises:
            BackendError: the engine was not built for this shape, or GPU memory ran out.
        """
        ...


class Launchable(Protocol):
    """Work that can be put on its stream again and again."""

    def launch(self) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Capturing(Protocol):
    """A backend whose library must lead the capture itself, because its memory has to know of it; or never can."""

    def capture(self, stream: int, body: Callable[[], None]) -> Launchable:
        """Record what ``body`` enqueues on the stream. Raises BackendError when it cannot be captured.

        A library that never can gives ``Enqueued`` back.
        """
        ...


class Enqueued:
    """A Launchable without a graph: the host enqueues the work anew at each launch."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.launch = body

    def close(self) -> None:
        """Nothing was kept."""
