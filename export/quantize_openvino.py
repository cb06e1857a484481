"""The int8 variant for OpenVINO, quantised by NNCF (https://github.com/openvinotoolkit/nncf).

The products of the blocks' linear layers run in int8, with ranges of activations fixed beforehand: measured on real
trajectories, narrowed by SmoothQuant. Attention stays in bfloat16, and so does all that `quantize` leaves in float32
for ONNX Runtime: embedders, input and output projections, and layers that int8 hurts, by name.
"""

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elf_rt.export.quantize import QUANTIZED
from elf_rt.export.reference import ELF
from elf_rt.export.replay import Call, Run, sample
from elf_rt.libraries import import_library, needs

VARIANT = "int8-openvino"
CALLS = 64  # measured at most, spread over all runs
INPUTS = ("z", "x_prev", "t", "s", "mode")


def write_openvino_int8(bundle: Path, model: ELF, runs: Sequence[Run], kept: Sequence[str]) -> dict[str, str]:
    """Quantise the float32 denoiser of a bundle into its folder `int8-openvino`; returns the variant's files.

    The token head is the float32 one. kept: layers that stay out of it.

    Raises BackendError: OpenVINO or NNCF is not installed.
    """
    with needs("int8 for OpenVINO", "pip install 'elf-rt[int8]'"):
        openvino = import_library("openvino")
        nncf = import_library("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)  # NNCF would tell of every product left out
    network = openvino.Core().read_model(bundle / "denoiser.onnx")
    calls = _calls(model, runs, {port.get_any_name() for port in network.inputs})
    with contextlib.redirect_stdout(io.StringIO()):  # NNCF draws bars of its own
        quantized = nncf.quantize(
            network,
            nncf.Dataset(calls),
            subset_size=len(calls),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=_left_out(network, kept), types=["ScaledDotProductAttention"]),
        )
    (bundle / VARIANT).mkdir()
    openvino.save_model(quantized, bundle / VARIANT / "denoiser.xml", compress_to_fp16=False)
    return {
        "denoiser": f"{VARIANT}/denoiser.xml",
        "weights": f"{VARIANT}/denoiser.bin",
        "discretizer": "discretizer.onnx",
        "discretizer_weights": "weights.bin",
    }


def _left_out(network: Any, kept: Sequence[str]) -> list[str]:
    """Names of the products that stay as they are."""
    products = {op.get_friendly_name(): _weight(op) for op in network.get_ops() if op.get_type_name() == "MatMul"}
    return [name for name, layer in products.items() if not QUANTIZED.fullmatch(layer) or layer in kept]


def _weight(product: Any) -> str:
    """The layer whose weight a product multiplies by."""
    return str(product.input_value(1).get_node().get_friendly_name()).removesuffix(".weight")


def _calls(model: ELF, runs: Sequence[Run], names: set[str]) -> list[dict[str, np.ndarray]]:
    """Inputs of network calls on the runs' trajectories, of one text each."""
    seen: list[dict[str, np.ndarray]] = []

    def keep(call: Call) -> None:
        row = len(seen) % len(call[0])
        arrays = zip(INPUTS, call, strict=True)
        seen.append({name: value[row : row + 1].numpy().copy() for name, value in arrays if name in names})

    for run in runs:
        sample(model, run, keep)
    return [seen[i] for i in np.linspace(0, len(seen) - 1, min(CALLS, len(seen))).astype(int)]
