"""Runs exported graphs on ONNX Runtime's CPU provider, without elf-rt's own backends."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from elf_rt.export.graph import write_graphs
from elf_rt.export.precision import FP32, PrecisionPlan
from elf_rt.params import ModelConfig

INPUTS = ("z", "x_prev", "t", "s", "mode")
Call = tuple[torch.Tensor, ...]  # in the order of INPUTS


class Graphs:
    """The two graphs of a folder."""

    def __init__(self, folder: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.denoiser = ort.InferenceSession(folder / "denoiser.onnx", options, providers=["CPUExecutionProvider"])
        self.discretizer = ort.InferenceSession(
            folder / "discretizer.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [i.name for i in self.denoiser.get_inputs()]

    def denoise(self, call: Call) -> tuple[np.ndarray, np.ndarray]:
        """(x, hidden) of a call; inputs that the graph does not have are dropped."""
        feeds = {name: value.numpy() for name, value in zip(INPUTS, call, strict=True) if name in self.inputs}
        x, hidden = self.denoiser.run(["x", "hidden"], feeds)
        return x, hidden

    def decode(self, call: Call) -> np.ndarray:
        """Token ids of a call with mode 1."""
        return self.discretizer.run(None, {"hidden": self.denoise(call)[1]})[0]


def written(
    folder: Path,
    config: ModelConfig,
    state: dict[str, torch.Tensor],
    plan: PrecisionPlan = FP32,
    opset: int = 23,
) -> Graphs:
    folder.mkdir(parents=True, exist_ok=True)
    write_graphs(folder, config, {name: value.numpy() for name, value in state.items()}, plan, opset)
    return Graphs(folder)


def random_call(config: ModelConfig, rows: int, length: int, seed: int, mode: float = 0.0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    z = config.noise_scale * torch.randn(rows, length, config.latent_dim, generator=generator)
    x_prev = torch.randn(rows, length, config.latent_dim, generator=generator)
    t = torch.rand(rows, generator=generator)
    return z, x_prev, t, torch.full((rows,), 3.0), torch.full((rows,), mode)
