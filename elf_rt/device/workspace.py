"""Everything one batch shape needs on the GPU: static buffers, the networks bound to it, and its captured graphs.

A graph freezes addresses and sizes, nothing else. Seeds, time grid, coefficients, guidance weights, which rows see the
source and the number of the step are data, which ``load`` sends before a launch: a graph serves every job of its shape.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from elf_rt.device import kernels, setup_lock
from elf_rt.device.cuda import Cuda
from elf_rt.device.cudart import Stream
from elf_rt.device.kernels import StepArguments
from elf_rt.device.memory import Fields, StagedArrays
from elf_rt.device.network import DeviceBackend, DeviceNetwork, Launchable
from elf_rt.sampling.engine import Job
from elf_rt.sampling.noise import normal
from elf_rt.sampling.schedule import A

MAX_GRAPHS = 8  # of one shape
STEPS_GRANULE = 64  # tables are sized in multiples of this many steps
TYPE = "float32"  # a bundle's graphs take and give float32 in every precision


@dataclass(frozen=True)
class Shape:
    """What a job's buffers depend on: B samples, K guidance rows, L tokens, room for the table of max_steps steps, and
    whether positions are held by a source, noise is given, drafts are made."""

    batch: int
    rows: int
    length: int
    max_steps: int
    held: bool
    noise: bool
    drafts: bool

    @classmethod
    def of(cls, job: Job) -> "Shape":
        steps, noise = job.table.num_steps, job.eps is not None
        max_steps = steps if noise else -(-steps // STEPS_GRANULE) * STEPS_GRANULE
        rows, batch = len(job.table.rows), len(job.seeds)
        return cls(batch, rows, job.length, max_steps, job.source is not None, noise, 0 < job.drafts_every < steps)

    def __str__(self) -> str:
        return f"{self.batch} samples x {self.rows} guidance rows x {self.length} tokens"


@dataclass(frozen=True)
class Piece:
    """A part of a sample that is launched at once: `start` draws the noise and prepares the first call; then come
    `steps` calls, each followed by the integrator; `finish` makes the last call and the decoding one."""

    start: bool
    steps: int
    finish: bool


DRAFT = Piece(False, 0, False)  # only decodes the current estimate


class Workspace:
    """Static buffers of one shape. Used by one job at a time.

    Args:
        capture: turns a function that enqueues work into something that can be launched again and again.

    Raises:
        BackendError: GPU memory ran out, or the engine does not take this shape. Nothing stays allocated.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        latent_dim: int,
        driver: Cuda,
        stream: Stream,
        shape: Shape,
        capture: Callable[[Callable[[], None]], Launchable],
    ) -> None:
        self.shape = shape
        self._driver = driver
        self._stream = stream
        self._capture = capture
        self._graphs: OrderedDict[Piece, Launchable] = OrderedDict()
        self._warm = False
        self._here = threading.local()  # its `warm` is set in threads that have run the networks
        full = (shape.batch, shape.length, latent_dim)
        with setup_lock, ExitStack() as stack:
            own = _Owner(stack)
            self._inputs = own(StagedArrays(driver, _input_fields(shape, full)))
            self._state = own(StagedArrays(driver, {"z": (full, np.float32)}))
            self._noise = own(StagedArrays(driver, _noise_fields(shape, full))) if shape.noise else None
            self._x_last = own(driver.allocate(4 * math.prod(full)))
            self._ids = own(driver.pinned(full[:2], np.int64))
            self._network = own(backend.device_network(shape.rows * shape.batch, shape.length, stream.handle))
            # The decoding call has one guidance row. A draft must not disturb the inputs of the next step.
            apart = shape.rows > 1 or shape.drafts
            self._decoder = self._network
            if apart:
                self._decoder = own(backend.device_network(shape.batch, shape.length, stream.handle))
            self._resources = stack.pop_all()
        self._grid = kernels.grid(shape.batch, shape.length, latent_dim, TYPE)
        self._arguments = self._step_arguments(full)

    def load(self, job: Job) -> None:
        """Send everything that this job has of its own. The previous job of this workspace must have been fetched."""
        table, inputs = job.table, self._inputs
        num_rows = len(table.t)
        inputs["seeds"][:] = job.seeds
        inputs["s"][:] = job.sc_cfg
        inputs["t"][:num_rows] = table.t
        inputs["coef"][:num_rows] = table.coef
        inputs["weights"][:num_rows] = table.weights
        inputs["progress"][:] = kernels.make_progress(0, table.num_steps, table.rows)
        if job.source is not None:
            inputs["source"][:] = job.source
            inputs["mask"][:] = job.mask
        if job.z0 is not None:
            inputs["coef"][0] = np.arange(5) == A  # the start keeps the given z
            self._state["z"][:] = job.z0
            self._state.upload(self._stream)
        if self._noise is not None and job.eps is not None:
            noise = self._noise["noise"]
            noise[0] = normal(job.seeds, 0, noise.shape[2:])
            noise[1 : 1 + len(job.eps)] = job.eps[: len(noise) - 1]
            self._noise.upload(self._stream)
        inputs.upload(self._stream)

    def launchable(self, piece: Piece, job: Job) -> Launchable:
        """The piece as a graph, captured on first use. Call it before ``load`` and between launches."""
        if piece in self._graphs:
            self._graphs.move_to_end(piece)
            return self._graphs[piece]
        with setup_lock:
            self._warm_up(job)
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)[1].close()
            self._graphs[piece] = self._capture(lambda: self._enqueue(piece))
        return self._graphs[piece]

    def fetch_ids(self) -> np.ndarray:
        """(B, L) int64 of the last decoding call; waits for it."""
        self._stream.copy_to_host(self._ids.pointer, self._decoder.buffers["ids"], self._ids.array.nbytes)
        self._stream.synchronize()
        return self._ids.array.copy()

    def fetch_latents(self) -> np.ndarray:
        """(B, L, C) float32 z; waits for it."""
        self._state.download(self._stream)
        self._stream.synchronize()
        return self._state["z"].copy()

    def close(self) -> None:
        """Wait for the stream, then free everything."""
        with setup_lock:
            try:
                self._stream.synchronize()
            finally:
                while self._graphs:
                    self._graphs.popitem()[1].close()
                self._resources.close()

    def _warm_up(self, job: Job) -> None:
        """Engines set themselves up in a first run, which cannot be captured: everything runs once on the job's own
        data. Some set up something for each thread: in another one the networks run again, on the inputs that they
        have, with which they are called next anyway."""
        if getattr(self._here, "warm", False):
            return
        if self._warm:
            for network in {self._network, self._decoder}:
                network.enqueue_denoise(self._stream.handle)
            self._decoder.enqueue_discretize(self._stream.handle)
        else:
            self.load(job)
            self._enqueue(Piece(True, 1, True))
            self._enqueue(DRAFT)
            self._advance(0)
        self._stream.synchronize()
        self._warm = self._here.warm = True

    def _enqueue(self, piece: Piece) -> None:
        """Put a piece on the stream."""
        stream, network, decoder = self._stream.handle, self._network, self._decoder
        if piece == DRAFT:
            self._draft()
            decoder.enqueue_denoise(stream)
            decoder.enqueue_discretize(stream)
            return
        start = replace(self._arguments, x_rows=0, rows=0)  # no call has been made yet
        if piece.start:
            self._step(replace(start, offset=0, next_rows=0, next_z=0, next_x_prev=0, next_t=0, next_s=0, next_mode=0))
            self._step(replace(start, offset=1))
        for i in range(piece.steps):
            network.enqueue_denoise(stream)
            self._step(replace(self._arguments, offset=1 + piece.start + i))
        if piece.finish:
            network.enqueue_denoise(stream)
            self._step(replace(self._arguments, final=1, next_rows=1, **_next_inputs(decoder)))
            decoder.enqueue_denoise(stream)
            decoder.enqueue_discretize(stream)
        else:
            self._advance(piece.start + piece.steps)

    def _step(self, arguments: StepArguments) -> None:
        self._driver.launch(self._stream.handle, f"elf_step_{TYPE}", self._grid, *arguments.packed())

    def _draft(self) -> None:
        inputs, sizes = _next_inputs(self._decoder), (self._arguments.length, self._arguments.width)
        arguments = (self._x_last.pointer, *inputs.values(), self._arguments.s, *map(np.int32, sizes))
        self._driver.launch(self._stream.handle, f"elf_draft_{TYPE}", self._grid, *arguments)

    def _advance(self, count: int) -> None:
        progress = self._inputs.address("progress")
        self._driver.launch(self._stream.handle, "elf_advance", (1, 1, 1), progress, np.int32(count))

    def _step_arguments(self, full: tuple[int, int, int]) -> StepArguments:
        """A step between two calls of the network."""
        at, shape = self._inputs.address, self.shape
        return StepArguments(
            z=self._state.address("z"),
            x_last=self._x_last.pointer,
            x_rows=self._network.buffers["x"],
            **_next_inputs(self._network),
            source=at("source") if shape.held else 0,
            mask=at("mask") if shape.held else 0,
            seeds=at("seeds"),
            noise=self._noise.address("noise") if self._noise is not None else 0,
            t=at("t"),
            coef=at("coef"),
            weights=at("weights"),
            s=at("s"),
            progress=at("progress"),
            length=full[1],
            width=full[2],
            table_rows=shape.rows,
            rows=shape.rows,
            next_rows=shape.rows,
        )


class _Owner:
    """Closes what it was given, last first, when its stack unwinds."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def __call__(self, resource: Any) -> Any:
        self._stack.callback(resource.close)
        return resource


def _input_fields(shape: Shape, full: tuple[int, int, int]) -> Fields:
    batch, num_rows = shape.batch, shape.max_steps + 2
    fields: Fields = {
        "progress": ((4,), np.int32),
        "seeds": ((batch,), np.uint64),
        "s": ((batch,), np.float32),
        "t": ((num_rows, batch), np.float32),
        "coef": ((num_rows, batch, 5), np.float32),
        "weights": ((num_rows, shape.rows, batch), np.float32),
    }
    if shape.held:
        fields |= {"mask": (full[:2], np.uint8), "source": (full, np.float32)}
    return fields


def _noise_fields(shape: Shape, full: tuple[int, int, int]) -> Fields:
    return {"noise": ((shape.max_steps + 2, *full), np.float32)}


def _next_inputs(network: DeviceNetwork) -> dict[str, int]:
    """Where the kernels write the next call's inputs, 0 for those that the model does not have; in their order."""
    return {f"next_{name}": network.buffers.get(name, 0) for name in ("z", "x_prev", "t", "s", "mode")}
