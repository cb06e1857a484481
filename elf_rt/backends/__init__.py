"""Engine libraries, best first. A backend's library is imported only when that backend is asked for."""

import importlib
from dataclasses import dataclass
from types import ModuleType

from elf_rt.backends.base import Backend
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, InputError

# In the order in which "auto" tries them.
# Each module has NAME, PRECISIONS (best first), unavailable() and open_backend(); VARIANTS names the graphs that it
# reads for a precision, where they are not those of the same name.
MODULES: dict[str, str] = {
    "tensorrt": "elf_rt.backends.trt",
    "tensorrt-rtx": "elf_rt.backends.trt_rtx",
    "torch": "elf_rt.backends.torch_cuda",
    "onnxruntime-cuda": "elf_rt.backends.ort_cuda",
    "openvino": "elf_rt.backends.ov",
    "onnxruntime": "elf_rt.backends.ort",
}


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used on this machine; ``reason`` says why not."""

    name: str
    reason: str | None


def discover() -> list[Availability]:
    """Every backend with the reason why it cannot be used here, best first."""
    return [Availability(name, _module(name).unavailable()) for name in MODULES]


def open_backend(
    bundle: Bundle, name: str = "auto", precision: str = "auto", threads: int | None = None
) -> tuple[Backend, str]:
    """Open a bundle in an engine library.

    Args:
        name: one of MODULES, or "auto" for the best that works here.
        precision: "auto" for the library's best safe one, or fp32, fp16, bf16, int8.

    Returns:
        The backend, and one sentence that says why it was chosen.

    Raises:
        BackendError: the library is absent or cannot run the model; for "auto", none can.
    """
    if name != "auto":
        if name not in MODULES:
            raise InputError(f"backend must be one of auto, {', '.join(MODULES)}, got {name!r}")
        module = _module(name)
        if reason := module.unavailable():
            raise BackendError(f"{name}: {reason}")
        return module.open_backend(bundle, _precision(module, bundle, precision), threads), f"{name}, as asked"
    skipped: list[str] = []
    for candidate in MODULES:
        module = _module(candidate)
        reason = module.unavailable()
        if reason is None and precision not in ("auto", *module.PRECISIONS):
            reason = f"does not run {precision}"
        if reason is None:
            try:
                backend = module.open_backend(bundle, _precision(module, bundle, precision), threads)
            except BackendError as error:
                reason = str(error).removeprefix(f"{candidate}: ")
            else:
                why = f"{candidate} {backend.precision} is the fastest that works here"
                return backend, why + (f" ({'; '.join(skipped)})" if skipped else "")
        skipped.append(f"{candidate}: {reason}")
    raise BackendError(f"no backend can run {bundle.folder} here: {'; '.join(skipped)}")


def _precision(module: ModuleType, bundle: Bundle, precision: str) -> str:
    """The precision asked for; for "auto", the module's best one that the bundle has graphs for."""
    if precision == "auto":
        variants = getattr(module, "VARIANTS", {})
        held = (p for p in module.PRECISIONS if variants.get(p, p) in bundle.variants)
        return str(next(held, module.PRECISIONS[0]))
    if precision not in module.PRECISIONS:
        raise InputError(f"precision of {module.NAME} must be one of auto, {', '.join(module.PRECISIONS)}")
    return precision


def _module(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name])
