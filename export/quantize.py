"""The int8 variant for ONNX Runtime's CPU provider: weights in 7 bits, activations in 8, quantised as they come.

The blocks' linear layers become DynamicQuantizeMatMul: each call finds the range of its input itself, and each output
channel of a weight has its own scale. Embedders, input and output projections and the whole token head stay float32:
together they are a few per cent of the work, and what they write is the text itself.

The SwiGLU product that w3 reads has channels far wider than the rest, which leave few of the 256 steps to the others.
They are narrowed by powers of two, undone in w3's weights (SmoothQuant, arXiv 2211.10438): that changes no bit in
float32. A layer that int8 would still change too much stays float32.

Weights take 7 bits of 8 because processors without VNNI add two products in 16 bits, which 8-bit weights overflow:
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html (reduce_range).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from elf_rt.export.graph_builder import WeightFile
from elf_rt.export.reference import ELF
from elf_rt.export.replay import Run, sample

CONTRIB = "com.microsoft"
SMALL = 1024  # bytes; smaller tensors stay inside the graph
QUANTIZED = re.compile(r"blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.w12|mlp\.w3)")
WEIGHT_LIMIT = 63
COMPARED_ROWS = 2  # rows of each call that are compared; more would only take longer
MAX_ERROR = 0.1  # relative, of a layer's output, in the worst call measured
SMOOTHING = 0.6  # how much of a channel's width moves into the weights


@dataclass
class Calibration:
    """Measured on real trajectories. errors: of each layer's output in int8, relative, in the worst call.

    exponents: layer -> (inputs,) powers of two that its input channels are divided by; only w3 has them.
    """

    errors: dict[str, float] = field(default_factory=dict)
    exponents: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, float]:
        """Layers that stay float32, and their errors."""
        return {name: error for name, error in self.errors.items() if not error <= MAX_ERROR}

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        items = [
            {"name": name, "precision": "fp32", "reason": f"an int8 product would change it by {error:.1%}"}
            for name, error in sorted(self.kept.items())
        ]
        worst = max((error for name, error in self.errors.items() if name not in self.kept), default=0.0)
        return {"precision": "int8", "largest_layer_error": float(f"{worst:.3g}"), "items": items}


def calibrate(model: ELF, runs: Iterable[Run]) -> Calibration:
    """Sample every run with the float32 reference, first for the widths of w3's input, then for the errors."""
    runs = list(runs)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if QUANTIZED.fullmatch(name)}
    calibration = Calibration()
    widths: dict[str, Tensor] = {}

    def widen(name: str, x: Tensor) -> None:
        widest = x.abs().flatten(0, -2).amax(0)  # (inputs,)
        widths[name] = torch.maximum(widths[name], widest) if name in widths else widest

    _observe(model, {name: layer for name, layer in layers.items() if name.endswith("w3")}, runs, widen)
    for name, width in widths.items():
        calibration.exponents[name] = smoothing_exponents(width, layers[name].weight.detach())
    weights = {}
    for name, layer in layers.items():
        weight = layer.weight.detach().numpy().T
        if name in calibration.exponents:
            weight = np.ldexp(weight, calibration.exponents[name][:, None])
        quantized, scale = quantize_weight(weight)
        weights[name] = torch.from_numpy(weight), torch.from_numpy(quantized * scale)

    def compare(name: str, x: Tensor) -> None:
        weight, quantized = weights[name]
        x = x[:COMPARED_ROWS]
        if name in calibration.exponents:
            x = torch.ldexp(x, -torch.from_numpy(calibration.exponents[name]))
        exact = x @ weight
        difference = quantize_activation(x) @ quantized - exact
        error = difference.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)  # (R,)
        calibration.errors[name] = float(np.maximum(calibration.errors.get(name, 0.0), float(error.max())))

    _observe(model, layers, runs, compare)
    return calibration


def write_int8(source: Path, folder: Path, calibration: Calibration) -> None:
    """Quantise the float32 graphs in `source`; write the files of ``graph.variant_files`` into `folder`."""
    denoiser = onnx.load(source / "denoiser.onnx")  # external weights are loaded, too
    discretizer = onnx.load(source / "discretizer.onnx")
    _quantize(denoiser.graph, calibration)
    denoiser.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    with WeightFile(folder / "weights.bin") as weights:
        for name, model in (("denoiser.onnx", denoiser), ("discretizer.onnx", discretizer)):
            helper.set_model_props(model, {"precision": "int8"})
            for tensor in model.graph.initializer:
                array = numpy_helper.to_array(tensor)
                if array.nbytes >= SMALL:
                    tensor.CopyFrom(weights.add(tensor.name, array))
            (folder / name).write_bytes(model.SerializeToString(deterministic=True))


def _quantize(graph: Any, calibration: Calibration) -> None:
    """Narrow w3's input by the exponents, then replace the products of all layers but the kept ones."""
    weights = {tensor.name: tensor for tensor in graph.initializer}

    def shift(name: str, exponents: np.ndarray) -> None:
        weights[name] = numpy_helper.from_array(np.ldexp(numpy_helper.to_array(weights[name]), exponents), name)

    for name, exponents in calibration.exponents.items():
        # The second half of w12's output is a factor of the product that w3 reads.
        divisor = np.concatenate([np.zeros_like(exponents), exponents])
        w12 = name.removesuffix("w3") + "w12"
        shift(f"{w12}.weight", -divisor)
        shift(f"{w12}.bias", -divisor)
        shift(f"{name}.weight", exponents[:, None])
    for node in graph.node:
        name = node.input[1].removesuffix(".weight") if node.op_type == "MatMul" else ""
        if not QUANTIZED.fullmatch(name) or name in calibration.kept:
            continue
        quantized, scale = quantize_weight(numpy_helper.to_array(weights.pop(f"{name}.weight")))
        for part, array in (("int8", quantized), ("int8_scale", scale)):
            weights[f"{name}.{part}"] = numpy_helper.from_array(array, f"{name}.{part}")
        node.op_type, node.domain = "DynamicQuantizeMatMul", CONTRIB
        node.input[1:] = [f"{name}.int8", f"{name}.int8_scale"]
    del graph.initializer[:]
    graph.initializer.extend(weights.values())


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, outputs) float32 -> int8 of the same shape and (outputs,) scales; weight is about int8 * scale."""
    scale = np.maximum(np.abs(weight).max(axis=0) / WEIGHT_LIMIT, np.finfo(np.float32).tiny).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def quantize_activation(x: Tensor) -> Tensor:
    """What DynamicQuantizeLinear makes of each row of x (R, S, inputs): 8 bits from its least to its largest value."""
    low = x.flatten(1).amin(1).clamp(max=0)[:, None, None]
    scale = (x.flatten(1).amax(1).clamp(min=0)[:, None, None] - low) / 255
    zero = torch.round(-low / scale)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale


def smoothing_exponents(width: Tensor, weight: Tensor) -> np.ndarray:
    """(inputs,) int32 for input channels of this width (inputs,) that meet this weight (outputs, inputs)."""
    tiny = torch.finfo(torch.float32).tiny
    share = width.clamp(min=tiny) ** SMOOTHING / weight.abs().amax(0).clamp(min=tiny) ** (1 - SMOOTHING)
    return torch.round(torch.log2(share / share.median())).clamp(-24, 24).numpy().astype(np.int32)


def _observe(model: ELF, layers: Mapping[str, Any], runs: Iterable[Run], see: Callable[[str, Tensor], None]) -> None:
    """Sample the runs; `see` gets the name and the input (R, S, inputs) of every layer in every call."""
    with ExitStack() as stack:
        for name, layer in layers.items():

            def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                see(name, inputs[0].detach())

            stack.callback(layer.register_forward_hook(hook).remove)
        for run in runs:
            sample(model, run)
