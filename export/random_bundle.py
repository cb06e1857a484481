"""Bundles of random weights: for timings, which depend on a model's sizes and not on its values."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from elf_rt.bundle import write_manifest
from elf_rt.export.graph import variant_files, write_graphs
from elf_rt.export.precision import Precision, PrecisionPlan
from elf_rt.export.presets import presets_for
from elf_rt.export.quantize import Calibration, write_int8
from elf_rt.export.quantize_openvino import write_openvino_int8
from elf_rt.export.random_init import random_state
from elf_rt.export.reference import ELF
from elf_rt.export.replay import plan_runs
from elf_rt.params import ModelConfig

RANDOM_STEPS = 4  # steps of the run that int8 is measured on


def write_random_bundle(
    folder: Path, config: ModelConfig, precisions: Sequence[str] = ("fp32",), seed: int = 0
) -> dict[str, torch.Tensor]:
    """Write the bundle, without tokenizer, encoder and replay, into an existing folder; returns its weights."""
    state = random_state(config, seed)
    arrays: dict[str, np.ndarray] = {name: tensor.numpy() for name, tensor in state.items()}
    variants = {}
    for precision in ("fp32", *(name for name in precisions if name != "fp32")):
        if precision == "int8-openvino":
            model = ELF(config)
            model.load_state_dict(state)
            runs = plan_runs(config, presets_for(config), None, None, max_steps=RANDOM_STEPS, batch=1, seed=seed)
            variants[precision] = write_openvino_int8(folder, model.eval(), runs, [])
            continue
        place = "" if precision == "fp32" else f"{precision}/"
        (folder / place).mkdir(exist_ok=True)
        if precision == "int8":
            write_int8(folder, folder / place, Calibration())  # nothing measured: all layers in int8
        else:
            write_graphs(folder / place, config, arrays, PrecisionPlan(Precision(precision)))
        variants[precision] = variant_files(place)
    write_manifest(
        folder,
        {
            "model": config,
            "presets": presets_for(config),
            "variants": variants,
            "source": {"checkpoint": f"random weights, seed {seed}", "sha256": "", "weights": "random"},
        },
    )
    return state
