"""The torch backend's network on the CPU, as a host backend: its arithmetic without a GPU."""

from collections.abc import Callable
from typing import Any

import numpy as np

from elf_rt.backends.torch_cuda import TorchBackend, TorchGraph
from elf_rt.bundle import Bundle
from elf_rt.network import GRAPHS, BoundGraph, Graph


class CpuGraph(TorchGraph):
    """Its tensors' memory as numpy arrays."""

    def __init__(self, backend: TorchBackend, graph: Graph, rows: int, length: int) -> None:
        super().__init__(backend, graph, rows, length)
        self.arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}


class CpuTorch(TorchBackend):
    device = "cpu"

    def __init__(self, bundle: Bundle, precision: str) -> None:
        super().__init__(bundle, precision, "cpu")

    def bind(self, graph: Graph, rows: int, length: int) -> CpuGraph:  # type: ignore[override]
        return CpuGraph(self, graph, rows, length)


def call(backend: Any, rows: int, length: int, mode: float) -> tuple[np.ndarray, np.ndarray]:
    """x and ids of one call of a host backend on random inputs."""
    return call_on(backend, rows, length, lambda denoiser: fill(denoiser, mode))


def call_on(backend: Any, rows: int, length: int, fill: Callable[[BoundGraph], None]) -> tuple[np.ndarray, np.ndarray]:
    """x and ids of one call of a host backend whose inputs ``fill`` writes."""
    denoiser, head = (backend.bind(graph, rows, length) for graph in GRAPHS)
    fill(denoiser)
    denoiser.run()
    head.arrays["hidden"][:] = denoiser.arrays["hidden"]
    head.run()
    x, ids = denoiser.arrays["x"].copy(), head.arrays["ids"].copy()
    denoiser.close()
    head.close()
    return x, ids


def fill(denoiser: BoundGraph, mode: float) -> None:
    """Random numbers, the same ones for the same number of rows."""
    arrays = denoiser.arrays
    rng = np.random.default_rng(len(arrays["z"]))
    for name in ("z", "x_prev"):
        if name in arrays:
            arrays[name][:] = rng.standard_normal(arrays[name].shape)
    arrays["t"][:] = rng.random(len(arrays["t"]))
    for name, value in (("s", 2.5), ("mode", mode)):
        if name in arrays:
            arrays[name][:] = value
