"""Random ELF weights of any size, for builds and timings that need the sizes of a model and not its text."""

import math

import torch
from torch import Tensor

from elf_rt.export.reference import ELF
from elf_rt.params import ModelConfig

TOKEN_STD = 0.02  # prefix tokens and biases, about what trained models have


def random_state(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """A full float32 state dict; the same (config, seed) gives the same bits.

    Matrices are normal with deviation 1/sqrt(inputs), so activations keep the scale of a trained model; what writes
    to the residual is divided by sqrt(2 * depth) as well. Norm weights are 1 + 0.1 * normal.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):  # shapes without memory
        shapes = {name: parameter.shape for name, parameter in ELF(config).named_parameters()}
    residual = 1 / math.sqrt(2 * config.depth)

    def draw(name: str, shape: torch.Size) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            return 1 + 0.1 * noise
        if len(shape) != 2:
            return TOKEN_STD * noise
        inputs = shape[0] if name.endswith("_kernel") else shape[1]
        return noise.mul_((residual if name.endswith(("attn.proj.weight", "mlp.w3.weight")) else 1) / math.sqrt(inputs))

    return {name: draw(name, shape) for name, shape in shapes.items()}
