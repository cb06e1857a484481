"""Small bundles with FP32 and FP16 graphs, and plans in them, for the tests of engines and of the TensorRT backends."""

from pathlib import Path

import torch
from golden_cases import golden

from elf_rt.bundle import Bundle, write_manifest
from elf_rt.engines.build import PlanRequest, Spec, plan_spec
from elf_rt.engines.recipe import RECIPES
from elf_rt.engines.shapes import parse_profiles
from elf_rt.export.graph import variant_files, write_graphs
from elf_rt.export.precision import Precision, PrecisionPlan
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.plans import Machine, this_machine

NO_GPU = Machine(this_machine().os, None, "no NVIDIA driver")


def golden_bundle(folder: Path, case: str = "uncond", precisions: tuple[str, ...] = ("fp32", "fp16")) -> Bundle:
    data = golden(case)
    return model_bundle(folder, data.config, data.state, precisions)


def model_bundle(
    folder: Path,
    config: ModelConfig,
    state: dict[str, torch.Tensor],
    precisions: tuple[str, ...] = ("fp32", "fp16"),
    opset: int = 23,
) -> Bundle:
    """A bundle without a tokenizer: the graphs of each precision and a manifest."""
    variants = {}
    for precision in precisions:
        place = "" if precision == "fp32" else f"{precision}/"
        (folder / place).mkdir(parents=True, exist_ok=True)
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        write_graphs(folder / place, config, arrays, PrecisionPlan(Precision(precision)), opset)
        variants[precision] = variant_files(place)
    manifest = {
        "model": config,
        "presets": {"default": SamplingParams()},
        "variants": variants,
        "source": {"checkpoint": "test", "weights": "ema", "sha256": ""},
    }
    write_manifest(folder, manifest)
    return Bundle.open(folder)


def rtx_spec(
    bundle: Bundle, precision: str = "fp16", sms: tuple[int, ...] = (89,), batch: str = "1", length: str | None = None
) -> Spec:
    request = PlanRequest(precision, sms, parse_profiles(batch, length, bundle.config))
    return plan_spec(bundle, RECIPES["tensorrt-rtx"], NO_GPU, request)
