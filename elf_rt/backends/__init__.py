"""Engine libraries, best first. A backend's library is imported only when that backend is asked for."""

import importlib
from dataclasses import dataclass
from types import ModuleType

from elf_rt.backends.base import Backend
from elf_rt.bundle import MIN_AGREEMENT, Bundle
from elf_rt.errors import BackendError, InputError, warn
from elf_rt.machine import check_threads

# In the order in which "auto" tries them.
# Each module has NAME, PRECISIONS (best first), unavailable() and open_backend(). VARIANTS names the graphs that it
# reads for a precision, where they are not those of the same name; ACCEPTED, what may be asked for where that is more
# than PRECISIONS, and gives the nearest one with a warning.
MODULES: dict[str, str] = {
    "tensorrt": "elf_rt.backends.trt",
    "tensorrt-rtx": "elf_rt.backends.trt_rtx",
    "torch": "elf_rt.backends.torch_cuda",
    "onnxruntime-cuda": "elf_rt.backends.ort_cuda",
    "openvino": "elf_rt.backends.ov",
    "onnxruntime": "elf_rt.backends.ort",
}


PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")  # what may be asked for


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
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    check_threads(threads)
    backend, why = _open_best(bundle, precision, threads) if name == "auto" else _open(bundle, name, precision, threads)
    if threads is not None and backend.device == "cuda":
        warn(f"threads={threads} has no meaning for {backend.name}, which computes on the GPU")
    if doubt := bundle.unproven.get(variant_of(backend.name, backend.precision)):
        warn(f"{backend.precision} of this bundle was not proven at export ({doubt})")
    return backend, why


def _open(bundle: Bundle, name: str, precision: str, threads: int | None) -> tuple[Backend, str]:
    """The backend of this name."""
    if name not in MODULES:
        raise InputError(f"backend must be one of auto, {', '.join(MODULES)}, got {name!r}")
    module = _module(name)
    if reason := module.unavailable():
        raise BackendError(f"{name}: {reason}")
    accepted = getattr(module, "ACCEPTED", module.PRECISIONS)
    if precision not in ("auto", *accepted):
        raise InputError(f"precision of {name} must be one of auto, {', '.join(accepted)}, got {precision!r}")
    backend = module.open_backend(bundle, _precision(module, bundle, precision), threads)
    asked = "as asked" if precision in ("auto", backend.precision) else f"instead of {precision}"
    return backend, f"{name} {backend.precision}, {asked}"


def _open_best(bundle: Bundle, precision: str, threads: int | None) -> tuple[Backend, str]:
    """The first backend that works here and runs this precision; a 16-bit one that none runs gives way to the best."""
    absent: list[str] = []
    refused: list[str] = []
    lacking: list[str] = []  # of those refused: what another export would mend
    for candidate in MODULES:
        module = _module(candidate)
        if reason := module.unavailable():
            absent.append(f"{candidate}: {reason}")
            continue
        if precision != "auto" and precision not in held_precisions(bundle, candidate):
            if precision in module.PRECISIONS:
                variant = variant_of(candidate, precision)
                lacking.append(f"{candidate}: the bundle has no {variant} graphs{bundle.why_left_out(variant)}")
                refused.append(lacking[-1])
            else:
                refused.append(f"{candidate}: runs no {precision}")
            continue
        try:
            backend = module.open_backend(bundle, _precision(module, bundle, precision), threads)
        except BackendError as error:
            refused.append(f"{candidate}: {str(error).removeprefix(f'{candidate}: ')}")
            continue
        if precision != "auto":
            return backend, f"{candidate} {backend.precision}, as asked"
        refused += _passed_over(module, bundle, backend.precision)
        why = f"{candidate} {backend.precision} is the fastest safe one here"
        return backend, why + (f" ({'; '.join(refused)})" if refused else "")
    if precision in ("fp16", "bf16"):
        backend, why = _open_best(bundle, "auto", threads)
        warn(f"nothing here runs {precision} ({'; '.join(refused)}): {why}")
        return backend, why
    if lacking:
        raise BackendError(f"{'; '.join(lacking)}: export the checkpoint again with them (elf-rt export --precision)")
    raise BackendError(f"no backend can run {bundle.folder} in {precision} here: {'; '.join(absent + refused)}")


def held_precisions(bundle: Bundle, name: str) -> list[str]:
    """The precisions of a backend, best first, that the bundle has graphs for: float32, and others."""
    return [p for p in _module(name).PRECISIONS if variant_of(name, p) in bundle.variants]


def variant_of(name: str, precision: str) -> str:
    """The graphs of a bundle that a backend reads for a precision."""
    return str(getattr(_module(name), "VARIANTS", {}).get(precision, precision))


def _precision(module: ModuleType, bundle: Bundle, precision: str) -> str:
    """The precision asked for; for "auto", the module's best safe one that the bundle has graphs for."""
    if precision == "auto":
        held = held_precisions(bundle, module.NAME)
        return next((p for p in held if _unsafe(module, bundle, p) is None), "fp32")
    return precision


def _passed_over(module: ModuleType, bundle: Bundle, chosen: str) -> list[str]:
    """Why better precisions than the chosen one were not taken."""
    better = module.PRECISIONS[: module.PRECISIONS.index(chosen)]
    return [reason for p in better if (reason := _unsafe(module, bundle, p))]


def _unsafe(module: ModuleType, bundle: Bundle, precision: str) -> str | None:
    """Why the text in a precision does not count as float32's, or None.

    Graphs of that precision were proven at export; of an engine that rounds the float32 graphs, export measured what
    it changes.
    """
    variant = variant_of(module.NAME, precision)
    if variant in bundle.unproven:
        return f"{precision} was not proven at export ({bundle.unproven[variant]})"
    if precision == "fp32" or variant != "fp32":
        return None
    agreement = bundle.agreement.get(precision)
    if agreement is None:
        return f"{precision} was not measured at export"
    return None if agreement >= MIN_AGREEMENT else f"{precision} would change {1 - agreement:.1%} of the tokens"


def _module(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name])
