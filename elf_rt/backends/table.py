"""What each engine library can do: one declared line a library, best first, as "auto" tries them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from elf_rt.bundle import Bundle
from elf_rt.machine import has_bf16


@dataclass(frozen=True)
class Ability:
    """module: has unavailable() and, called where that gives None, open_backend(bundle, precision, threads).

    precisions: best first. by_name: others that may be asked for, of a library that only emulates them, to check their
    graphs, or gives the nearest that the processor has, with a warning. variants: the graphs that it reads for a
    precision, where they are not those of the same name.
    """

    module: str
    precisions: tuple[str, ...]
    by_name: tuple[str, ...] = ()
    variants: Mapping[str, str] = field(default_factory=dict)


GPU = ("fp16", "bf16", "fp32")

BACKENDS: dict[str, Ability] = {
    "tensorrt": Ability("elf_rt.backends.trt", GPU),
    "tensorrt-rtx": Ability("elf_rt.backends.trt_rtx", GPU),
    "torch": Ability("elf_rt.backends.torch_cuda", GPU),
    "onnxruntime-cuda": Ability("elf_rt.backends.ort_cuda", GPU),
    # OpenVINO rounds the float32 graphs itself.
    "openvino": Ability(
        "elf_rt.backends.ov",
        ("bf16", "fp32", "int8") if has_bf16() else ("fp32", "int8"),
        by_name=("bf16", "fp16"),
        variants={"bf16": "fp32", "int8": "int8-openvino"},
    ),
    "onnxruntime": Ability("elf_rt.backends.ort", ("fp32", "int8"), by_name=("fp16", "bf16")),
}

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")  # what may be asked for
NO_TUNE = "ELF_RT_NO_TUNE"  # environment variable: where it is set nothing is measured at load


def variant_of(name: str, precision: str) -> str:
    """The graphs of a bundle that a backend reads for a precision."""
    return BACKENDS[name].variants.get(precision, precision)


def held_precisions(bundle: Bundle, name: str) -> list[str]:
    """The precisions of a backend, best first, that the bundle has graphs for."""
    return [p for p in BACKENDS[name].precisions if variant_of(name, p) in bundle.variants]
