"""The integrator on a GPU: milliseconds a step, and its bandwidth against a device copy of as many bytes.

    python benchmarks/gpu_bandwidth.py [--batch 1 8 64]

What is timed is the sampler's own graph, around a network that does nothing.
"""

import argparse
import importlib
import itertools
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from elf_rt.device import cudart
from elf_rt.device.cuda import Cuda
from elf_rt.device.cudart import DeviceMemory, Gpu, find_gpu
from elf_rt.device.workspace import Piece, Shape, Workspace
from elf_rt.params import RELEASED, SamplingParams
from elf_rt.sampling.engine import Job
from elf_rt.sampling.schedule import make_table

STEPS, REPEATS = 50, 20
# Tensors of (batch, length, width) float32 that one row of the table moves: z and the network's x read; z, x_last and
# the next call's z and x_prev written. Row 0 has no next call, and rows 0 and 1 no x.
TENSORS = 6 * STEPS + 5 + 3


class NoNetwork:
    """The backend and its network in one: buffers, and nothing done between them."""

    name = "none"

    def __init__(self, width: int) -> None:
        self._width = width
        self._memory: list[DeviceMemory] = []
        self.buffers: dict[str, int] = {}

    def device_network(self, rows: int, length: int, stream: int) -> "NoNetwork":
        self.rows, self.length = rows, length
        for name in ("z", "x_prev", "x", "t", "s", "mode", "ids"):
            self._memory.append(DeviceMemory(4 * rows * length * (self._width if name in ("z", "x_prev", "x") else 2)))
            self.buffers[name] = self._memory[-1].pointer
        return self

    def enqueue_denoise(self, stream: int) -> None:
        """Leave x as it is."""

    def enqueue_discretize(self, stream: int) -> None:
        """Leave the ids as they are."""

    def close(self) -> None:
        for memory in self._memory:
            memory.close()


def integrator_bandwidth(batch: int, length: int, width: int, *, noise: bool = True) -> dict[str, float]:
    """The steps of a whole sample, and one copy of as many bytes, timed in turn; medians.

    Raises:
        BackendError: no GPU, or no memory for this size.
    """
    config = replace(RELEASED["ELF-B"], latent_dim=width, max_length=length)
    params = SamplingParams(sampler="sde" if noise else "ode", steps=STEPS)
    table = make_table(params, config, np.tile(np.linspace(0, 1, STEPS + 1), (batch, 1)), conditional=False)
    job = Job(table, length, np.arange(batch, dtype=np.uint64), sc_cfg=1.0)
    num_bytes = 4 * batch * length * width * TENSORS // STEPS  # of one step
    driver = Cuda()
    with ExitStack() as stack:
        stream = driver.stream()
        stack.callback(stream.close)
        copied = [driver.allocate(num_bytes // 2) for _ in range(2)]  # a copy reads as much as it writes
        for memory in copied:
            stack.callback(memory.close)
        network: Any = NoNetwork(width)
        workspace = Workspace(
            network, width, driver, stream, Shape.of(job), lambda body: driver.capture(stream.handle, body)
        )
        stack.callback(workspace.close)
        sample = workspace.launchable(Piece(start=True, steps=STEPS - 1, finish=True), job)
        workspace.load(job)
        kind = importlib.import_module(cudart.MODULE).cudaMemcpyKind.cudaMemcpyDeviceToDevice

        def copy() -> None:
            source, target = (memory.pointer for memory in copied)
            for _ in range(STEPS):
                cudart.call("cudaMemcpyAsync", target, source, num_bytes // 2, kind, stream.handle)

        copies = driver.capture(stream.handle, copy)
        stack.callback(copies.close)
        step_ms, copy_ms = (ms / STEPS for ms in time_in_turn(stream, sample, copies))
    return {
        "step_ms": step_ms,
        "gb_per_s": num_bytes / step_ms / 1e6,
        "copy_gb_per_s": num_bytes / copy_ms / 1e6,
        "share_of_copy": copy_ms / step_ms,
    }


def time_in_turn(stream: cudart.Stream, *launchables: Any) -> list[float]:
    """Median milliseconds of each on the GPU's own clock."""
    times = []
    events = [cudart.call("cudaEventCreate") for _ in range(len(launchables) + 1)]
    for _ in range(REPEATS):
        launchables[-1].launch()  # keeps the GPU busy while the host launches the first that is timed
        for event, launchable in zip(events, launchables, strict=False):
            cudart.call("cudaEventRecord", event, stream.handle)
            launchable.launch()
        cudart.call("cudaEventRecord", events[-1], stream.handle)
        stream.synchronize()
        times.append([cudart.call("cudaEventElapsedTime", a, b) for a, b in itertools.pairwise(events)])
    for event in events:
        cudart.call("cudaEventDestroy", event)
    return [float(ms) for ms in np.median(times, axis=0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    arguments = parser.parse_args()
    gpu = find_gpu()
    if not isinstance(gpu, Gpu):
        print(f"nothing to measure: {gpu}")
        return
    print(f"{gpu.name}, latents of 1024 x 512")
    for batch in arguments.batch:
        for noise in (False, True):
            measured = integrator_bandwidth(batch, 1024, 512, noise=noise)
            figures = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
            print(f"batch {batch:3}  {'with' if noise else 'no'} noise:  {figures}")


if __name__ == "__main__":
    main()
