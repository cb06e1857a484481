"""The sampler that never leaves the GPU: a whole sample, from noise to token ids, is one CUDA graph launch."""

import contextlib
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from elf_rt.device.cuda import Cuda
from elf_rt.device.network import Capturing, DeviceBackend, Enqueued, Launchable
from elf_rt.device.workspace import DRAFT, Piece, Shape, Workspace
from elf_rt.errors import BackendError, GpuMemoryError
from elf_rt.params import ModelConfig
from elf_rt.sampling.engine import Job, Outcome, StepDone

T = TypeVar("T")

MAX_IDLE_WORKSPACES = 16  # each number of samples is a shape of its own; where memory runs out they go


class DeviceSampler:
    """Runs jobs on a CUDA backend; the same face as ``elf_rt.sampling.engine.HostSampler``.

    A job without drafts is one graph launch, so its StepDone events come together, at the end. A job with drafts is cut
    into graphs of `drafts_every` steps, and can be cancelled between them.

    Every guidance row is computed in every step, also where the table gives it no weight: a graph's shape is fixed.

    Safe to share between threads: one lock guards the stream, and each job has a workspace of its own, so a reader who
    is slow to ask for the next draft holds up nobody. A job's generator may be finalised anywhere, also by the garbage
    collector in the thread that holds the lock, so a job that ends never waits for it.
    """

    def __init__(self, backend: DeviceBackend, config: ModelConfig, driver: Cuda | None = None) -> None:
        self._backend = backend
        self._latent_dim = config.latent_dim
        self._driver = driver or Cuda()
        self._driver.activate()
        self._stream = self._driver.stream()
        self._lock = threading.Lock()
        self._idle: OrderedDict[Workspace, Shape] = OrderedDict()
        self._returned: deque[tuple[Workspace, bool]] = deque()  # of jobs that ended, and whether they are sound
        self._captures = True
        self._closed = False

    def run(self, job: Job) -> Iterator[StepDone | Outcome]:
        """Sample a batch: one StepDone for each step, the Outcome last. Stop iterating to cancel.

        The Outcome's network_seconds hold the integrator too: inside one graph they have no border to be timed at.

        Raises:
            BackendError: GPU memory ran out or the engine refused the shape (the sampler stays usable), or the GPU
                failed.
        """
        steps, started = job.table.num_steps, time.perf_counter()
        chunk = job.drafts_every or steps
        done, busy = 0, 0.0
        with self._workspace(job) as workspace:
            while steps - done > chunk:
                draft, seconds = self._draft(workspace, job, Piece(done == 0, chunk, finish=False))
                done, busy = done + chunk, busy + seconds
                yield from _steps_done(job, done - chunk, done, draft)
            latents, ids, seconds = self._finish(workspace, job, Piece(done == 0, steps - done - 1, finish=True))
        total = time.perf_counter() - started
        yield from _steps_done(job, done, steps)
        yield Outcome(latents, ids, total, busy + seconds, calls=steps + 1)

    def close(self) -> None:
        """Free the GPU's memory and the stream. Jobs that still run fail."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._driver.activate()
            while self._idle:
                self._idle.popitem()[0].close()
            self._stream.close()
        self._collect()

    def _draft(self, workspace: Workspace, job: Job, piece: Piece) -> tuple[np.ndarray, float]:
        """Run a piece and decode the estimate that it ends with: ids (B, L), seconds."""
        with self._gpu():
            begun = self._launch(workspace, job, piece, DRAFT)
            return workspace.fetch_ids(), time.perf_counter() - begun

    def _finish(self, workspace: Workspace, job: Job, piece: Piece) -> tuple[np.ndarray, np.ndarray, float]:
        """Run the last piece: latents (B, L, C) or (), ids (B, L), seconds."""
        with self._gpu():
            begun = self._launch(workspace, job, piece)
            ids = workspace.fetch_ids()
            latents = workspace.fetch_latents() if job.latents else np.empty(0, np.float32)
            return latents, ids, time.perf_counter() - begun

    def _launch(self, workspace: Workspace, job: Job, *pieces: Piece) -> float:
        """Put pieces on the stream, after the job's own data if the first one starts it; returns when."""
        launchables = self._with_room(lambda: [workspace.launchable(piece, job) for piece in pieces])
        if pieces[0].start:
            workspace.load(job)
        begun = time.perf_counter()
        for launchable in launchables:
            launchable.launch()
        return begun

    @contextlib.contextmanager
    def _gpu(self) -> Iterator[None]:
        """Exclusive use of the stream by this thread."""
        try:
            with self._lock:
                if self._closed:
                    raise BackendError("the model is closed")
                self._driver.activate()
                yield
        finally:
            self._collect()

    @contextlib.contextmanager
    def _workspace(self, job: Job) -> Iterator[Workspace]:
        """A workspace for this job alone. It is kept for the next one, unless this one failed."""
        with self._gpu():
            workspace = self._take(Shape.of(job))
        sound = False
        try:
            yield workspace
            sound = True
        except GeneratorExit:  # cancelled between two pieces, when the stream is idle
            sound = True
            raise
        finally:
            self._returned.append((workspace, sound))
            self._collect()

    def _collect(self) -> None:
        """Take returned workspaces back, unless the lock is held: then its holder does, after it."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._driver.activate()
                while self._returned:
                    workspace, sound = self._returned.popleft()
                    self._give_back(workspace, keep=sound and not self._closed)
            finally:
                self._lock.release()

    def _take(self, shape: Shape) -> Workspace:
        for workspace, has in reversed(self._idle.items()):
            if has == shape:
                del self._idle[workspace]
                return workspace
        return self._with_room(lambda: self._make(shape))

    def _with_room(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, if need be without the idle workspaces: their memory may be what it lacked."""
        try:
            return make()
        except BackendError:
            if not self._idle:
                raise
        self._evict(0)
        return make()

    def _make(self, shape: Shape) -> Workspace:
        try:
            return Workspace(self._backend, self._latent_dim, self._driver, self._stream, shape, self._capture)
        except BackendError as error:
            free = self._driver.free_bytes() / 2**20
            raise BackendError(f"cannot prepare {shape} on the GPU ({free:.0f} MiB free): {error}") from error

    def _give_back(self, workspace: Workspace, keep: bool) -> None:
        if keep:
            self._idle[workspace] = workspace.shape
            self._evict(MAX_IDLE_WORKSPACES)
            return
        with contextlib.suppress(BackendError, RuntimeError):  # torch's are RuntimeErrors
            workspace.close()  # what made the job fail is raised; after it CUDA may refuse to free too

    def _evict(self, keep: int) -> None:
        while len(self._idle) > keep:
            self._idle.popitem(last=False)[0].close()

    def _capture(self, body: Callable[[], None]) -> Launchable:
        """A graph of what ``body`` enqueues; where capture is refused, the plain enqueueing of it."""
        capture = self._backend.capture if isinstance(self._backend, Capturing) else self._driver.capture
        if self._captures:
            try:
                return capture(self._stream.handle, body)
            except GpuMemoryError:
                raise
            except BackendError as error:
                self._captures = False
                warnings.warn(
                    f"{self._backend.name} cannot be captured in a CUDA graph, so the host enqueues every step, "
                    f"which is slower: {error}",
                    stacklevel=2,
                )
        return Enqueued(body)


def _steps_done(job: Job, after: int, last: int, draft: np.ndarray | None = None) -> Iterator[StepDone]:
    """Steps after + 1 .. last; the draft belongs to the last of them."""
    for step in range(after + 1, last + 1):
        yield StepDone(step, float(job.table.t[step + 1, 0]), draft if step == last else None)
