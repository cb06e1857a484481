"""elf-rt: low-latency text from trained ELF models. ``elf_rt.load("model.elfrt").generate(n=4, seed=0)``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elf_rt.errors import BackendError, BundleError, CheckpointError, ElfError, GpuMemoryError, InputError
    from elf_rt.model import Draft, Model, Outcome, Pending, Result, Stats, Text, Timings, load
    from elf_rt.params import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "BundleError",
    "CheckpointError",
    "Draft",
    "ElfError",
    "GpuMemoryError",
    "InputError",
    "Model",
    "Outcome",
    "Pending",
    "Result",
    "SamplingParams",
    "Stats",
    "Text",
    "Timings",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import elf_rt`` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'elf_rt' has no attribute {name!r}")
    for module in ("errors", "params", "model"):
        namespace = importlib.import_module(f"elf_rt.{module}")
        if hasattr(namespace, name):
            return getattr(namespace, name)
    raise AttributeError(f"module 'elf_rt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
