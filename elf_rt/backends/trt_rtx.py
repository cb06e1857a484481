"""TensorRT-RTX: ``elf_rt.backends.trt`` with the other library."""

from elf_rt.backends.trt import TrtBackend, why_unavailable
from elf_rt.bundle import Bundle
from elf_rt.plans import TENSORRT_RTX


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    return why_unavailable(TENSORRT_RTX)


def open_backend(bundle: Bundle, precision: str, threads: int | None = None) -> TrtBackend:
    """Load the bundle's plan for this machine: see ``elf_rt.backends.trt.open_backend``."""
    return TrtBackend(bundle, precision, TENSORRT_RTX)
