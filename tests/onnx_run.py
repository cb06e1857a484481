"""Runs exported graphs on ONNX Runtime's CPU provider, without elf-rt's own backends."""

import copy
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from elf_rt.backends.rounding import rounded_graph
from elf_rt.export.graph import write_graphs
from elf_rt.export.precision import FP32, Precision, PrecisionPlan
from elf_rt.export.reference import ELF
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
    return Graphs(folder) if plan.precision is Precision.FP32 else RoundedGraphs(folder)


def random_call(config: ModelConfig, rows: int, length: int, seed: int, mode: float = 0.0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    z = config.noise_scale * torch.randn(rows, length, config.latent_dim, generator=generator)
    x_prev = torch.randn(rows, length, config.latent_dim, generator=generator)
    t = torch.rand(rows, generator=generator)
    return z, x_prev, t, torch.full((rows,), 3.0), torch.full((rows,), mode)


class RoundedGraphs(Graphs):
    """16-bit graphs with the rounding written out, as `elf_rt.backends.ort` runs them."""

    def __init__(self, folder: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self.denoiser = ort.InferenceSession(rounded_graph(folder / "denoiser.onnx"), options)
        self.discretizer = ort.InferenceSession(rounded_graph(folder / "discretizer.onnx"), options)
        self.inputs = [i.name for i in self.denoiser.get_inputs()]


class Reference(Graphs):
    """The reference network with the interface of the graphs, in any type that torch computes in."""

    def __init__(self, model: ELF, kind: torch.dtype = torch.float32) -> None:
        self.model, self.kind = model if kind is torch.float32 else copy.deepcopy(model).to(kind), kind

    @torch.no_grad()
    def denoise(self, call: Call) -> tuple[np.ndarray, np.ndarray]:
        x, hidden = self.model(*(value.to(self.kind) for value in call))
        return x.float().numpy(), hidden.float().numpy()

    @torch.no_grad()
    def decode(self, call: Call) -> np.ndarray:
        _, hidden = self.model(*(value.to(self.kind) for value in call))
        return self.model.discretize_logits(hidden).argmax(-1).numpy()


def generate(
    network: Graphs,
    config: ModelConfig,
    samples: int,
    steps: int,
    s: float = 1.0,
    source: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> np.ndarray:
    """Ids (B, L) of the ODE sampler on a uniform grid from seed 0; `source` is clean latents and where they stand."""
    z = config.noise_scale * torch.randn(
        (samples, config.max_length, config.latent_dim), generator=torch.Generator().manual_seed(0)
    )
    latents, mask = source or (z, torch.zeros(z.shape[:2], dtype=torch.bool))
    mask = mask[..., None]

    def rows(value: float) -> torch.Tensor:
        return torch.full((samples,), value)

    z = torch.where(mask, latents, z)
    x_prev = torch.where(mask, latents, 0.0)
    for i in range(steps):
        x = torch.from_numpy(network.denoise((z, x_prev, rows(i / steps), rows(s), rows(0.0)))[0])
        x_prev = torch.where(mask, latents, x)
        kappa = (1 / steps) / max(1 - i / steps, config.t_eps)
        z = torch.where(mask, latents, (1 - kappa) * z + kappa * x)
    return network.decode((z, torch.zeros_like(z), rows(1.0), rows(s), rows(1.0)))
