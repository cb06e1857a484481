"""What a call is on the GPU: graphs of buckets of rows, and token heads, made when they are first needed."""

from collections.abc import Callable, Mapping

from elf_rt.device import setup_lock
from elf_rt.device.cuda import Cuda
from elf_rt.device.cudart import Stream
from elf_rt.errors import BackendError, GpuMemoryError, warn
from elf_rt.network import DeviceBackend, DeviceGraph, Enqueued, Launchable
from elf_rt.sampling.cost import round_up

MAX_TOKENS = 65536  # rows x length of one call, whatever pays
MAX_ENTRIES = 256  # texts of one call

Integrate = Callable[[int, int, Mapping[str, int]], None]  # rows, length and buffers of a call


class Bucket:
    """The network bound to R rows, and the graph of a call: the integrator over all its texts, then the network."""

    def __init__(self, network: DeviceGraph, rows: int) -> None:
        self.network, self.rows = network, rows
        self.graph: Launchable = Enqueued(network.enqueue)

    def close(self) -> None:
        self.graph.close()
        self.network.close()


class Calls:
    """Buckets and token heads by rows and length.

    Args:
        integrate: enqueues the integrator for a call.
        make_room: frees what was made for other lengths than the given one; False where there is nothing.
        max_rows: the most rows of one call, where somebody set it.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        cuda: Cuda,
        stream: Stream,
        integrate: Integrate,
        make_room: Callable[[int], bool],
        max_rows: int | None,
    ) -> None:
        self.captures = 0
        self._backend, self._cuda, self._stream = backend, cuda, stream
        self._integrate, self._make_room, self._max_rows = integrate, make_room, max_rows
        self._limits: dict[int, int] = {}  # length -> the most rows, where memory ran out
        self._head_limits: dict[int, int] = {}
        self._buckets: dict[tuple[int, int], Bucket] = {}
        self._heads: dict[tuple[int, int], DeviceGraph] = {}
        self._capturable = True

    def most(self, length: int) -> int:
        """The most rows of a call of this length."""
        limits = (max(1, MAX_TOKENS // length), MAX_ENTRIES, self._max_rows, self._limits.get(length))
        return min(limit for limit in (*limits, self._backend.max_rows(length)) if limit)

    def bucket(self, rows: int, length: int) -> Bucket:
        """The smallest bucket that takes so many rows.

        Raises:
            GpuMemoryError: there is no memory for it; larger ones than half of it are not tried again.
        """
        key = self._size(rows, length), length
        while key not in self._buckets:
            self._stream.synchronize()  # what failed half-way is freed, and for that the GPU must be idle
            try:
                with setup_lock:
                    self._buckets[key] = self._make_bucket(*key)
            except GpuMemoryError as error:
                if self._make_room(length):
                    continue
                self._limits[length] = max(1, key[0] // 2)
                if key[0] > 1:
                    warn(f"{error}; calls of {length} tokens hold {self._limits[length]} rows from now on")
                raise
        return self._buckets[key]

    def head(self, rows: int, length: int) -> tuple[DeviceGraph, int]:
        """A token head, and how many rows it takes at a time: fewer than these where memory is short.

        Raises:
            GpuMemoryError: there is not even memory for one row.
        """
        key = self._size(min(rows, self._head_limits.get(length, rows)), length), length
        if key in self._heads:
            return self._heads[key], key[0]
        self._stream.synchronize()
        try:
            with setup_lock:
                self._heads[key] = self._backend.bind("discretizer", *key, self._stream.handle)
        except GpuMemoryError:
            if key[0] == 1:
                raise
            self._head_limits[length] = key[0] // 2
            return self.head(rows, length)
        return self._heads[key], key[0]

    def others(self, length: int) -> bool:
        """Whether anything was made for other lengths."""
        return any(at != length for _, at in (*self._buckets, *self._heads))

    def free(self, but: int | None = None) -> None:
        """Free everything, or what was made for other lengths than this one. The stream must be idle."""
        for key in [key for key in self._buckets if key[1] != but]:
            self._buckets.pop(key).close()
        for key in [key for key in self._heads if key[1] != but]:
            self._heads.pop(key).close()

    def _size(self, rows: int, length: int) -> int:
        return max(rows, min(round_up(rows), self.most(length)))

    def _make_bucket(self, rows: int, length: int) -> Bucket:
        network = self._backend.bind("denoiser", rows, length, self._stream.handle)
        bucket = Bucket(network, rows)

        def call() -> None:
            self._integrate(rows, length, network.buffers)
            network.enqueue()

        try:
            network.enqueue()  # engines set themselves up in a first run, which cannot be captured
            self._stream.synchronize()
            bucket.graph = self._capture(call)
            self.head(1, length)  # no text of these calls could end without the head
        except BaseException:
            bucket.close()
            raise
        return bucket

    def _capture(self, call: Callable[[], None]) -> Launchable:
        """A graph of what ``call`` enqueues; where capture is refused twice, the plain enqueueing of it."""
        refusal: BackendError | None = None
        for _ in range(2 if self._capturable else 0):
            try:
                graph = self._backend.capture(self._cuda.capture, self._stream.handle, call)
            except GpuMemoryError:
                raise
            except BackendError as error:
                refusal = error
            else:
                self.captures += not isinstance(graph, Enqueued)
                return graph
        if refusal is not None:
            self._capturable = False
            warn(
                f"{self._backend.name} cannot be captured in a CUDA graph, so the host enqueues every kernel, "
                f"which is slower: {refusal}"
            )
        return Enqueued(call)
