"""The integrator on a GPU: milliseconds a step, and its bandwidth against a device copy of as many bytes.

    python benchmarks/gpu_bandwidth.py [--texts 1 8 64]

What is timed is the engine's own kernel on the entries of its own texts, amid a sample, around a network that does
nothing.
"""

import argparse
import itertools
import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from elf_rt.device.cudart import DeviceMemory, Event, Gpu, Stream, find_gpu
from elf_rt.device.engine import DeviceEngine
from elf_rt.network import Capture, Graph, Launchable, tensor_shapes
from elf_rt.params import RELEASED, ModelConfig, SamplingParams
from elf_rt.sampling.given import make_programs

STEPS, REPEATS = 50, 20
TENSORS = 6  # (length, width) float32 of a text: z and the network's x read; z, x_last, next z and next x_prev written


class NoNetwork:
    """A backend whose graphs have buffers, and do nothing between them."""

    name, precision = "none", "fp32"
    device: Literal["cuda"] = "cuda"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def bind(self, graph: Graph, rows: int, length: int, stream: int) -> "NoGraph":
        return NoGraph(tensor_shapes(graph, self.config, rows, length))

    def max_rows(self, length: int, needed: int = 1) -> None:
        return None

    def capture(self, plain: Capture, stream: int, body: Any) -> Launchable:
        return plain(stream, body)

    def describe(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        """Nothing is kept."""


class NoGraph:
    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._memory = {name: DeviceMemory(8 * math.prod(shape)) for name, shape in shapes.items()}
        self.buffers = {name: memory.pointer for name, memory in self._memory.items()}

    def enqueue(self) -> None:
        """Leave x as it is."""

    def close(self) -> None:
        for memory in self._memory.values():
            memory.close()


def integrator_bandwidth(texts: int, length: int, width: int, *, noise: bool = True) -> dict[str, float]:
    """The steps of texts that share a call, and one copy of as many bytes, timed in turn; medians.

    Raises:
        BackendError: no GPU, or no memory for this size.
    """
    config = replace(RELEASED["ELF-B"], latent_dim=width, max_length=length)
    params = SamplingParams(sampler="sde" if noise else "ode", steps=STEPS)
    num_bytes = 4 * texts * length * width * TENSORS  # of one step
    with ExitStack() as stack:
        engine = DeviceEngine(NoNetwork(config), config, max_rows=texts)
        stack.callback(engine.close)
        slots = [engine.open(program) for program in make_programs(config, params, list(range(texts)), length)]
        for _ in range(2):  # the second step has a network output behind it
            engine.enqueue(slots)
            engine.collect()
        cuda, stream, bucket = engine._cuda, engine._stream, engine._calls.bucket(texts, length)
        copied = [DeviceMemory(num_bytes // 2) for _ in range(2)]  # a copy reads as much as it writes
        for memory in copied:
            stack.callback(memory.close)

        def integrate() -> None:
            for _ in range(STEPS):
                engine._integrate(engine._entries.pointer, bucket.rows, length, bucket.network.buffers)

        def copy() -> None:
            for _ in range(STEPS):
                stream.copy(copied[1].pointer, copied[0].pointer, num_bytes // 2)

        graphs = [cuda.capture(stream.handle, body) for body in (integrate, copy)]
        for graph in graphs:
            stack.callback(graph.close)
        step_ms, copy_ms = (ms / STEPS for ms in time_in_turn(stream, *graphs))
    return {
        "step_ms": step_ms,
        "gb_per_s": num_bytes / step_ms / 1e6,
        "copy_gb_per_s": num_bytes / copy_ms / 1e6,
        "share_of_copy": copy_ms / step_ms,
    }


def time_in_turn(stream: Stream, *graphs: Launchable) -> list[float]:
    """Median milliseconds of each on the GPU's own clock."""
    times = []
    events = [Event() for _ in range(len(graphs) + 1)]
    for _ in range(REPEATS):
        graphs[-1].launch()  # keeps the GPU busy while the host launches the first that is timed
        for event, graph in zip(events, graphs, strict=False):
            event.record(stream)
            graph.launch()
        events[-1].record(stream)
        stream.synchronize()
        times.append([1e3 * after.seconds_since(before) for before, after in itertools.pairwise(events)])
    for event in events:
        event.close()
    return [float(ms) for ms in np.median(times, axis=0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 8, 64])
    arguments = parser.parse_args()
    gpu = find_gpu()
    if not isinstance(gpu, Gpu):
        print(f"nothing to measure: {gpu}")
        return
    print(f"{gpu.name}, latents of 1024 x 512")
    for texts in arguments.texts:
        for noise in (False, True):
            measured = integrator_bandwidth(texts, 1024, 512, noise=noise)
            figures = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
            print(f"{texts:3} texts  {'with' if noise else 'no'} noise:  {figures}")


if __name__ == "__main__":
    main()
