"""Engine libraries. A backend's library is imported only when that backend is asked for."""

import importlib
from typing import Any

from elf_rt.backends.table import BACKENDS, PRECISIONS, held_precisions, variant_of
from elf_rt.bundle import MIN_AGREEMENT, Bundle
from elf_rt.errors import BackendError, InputError, warn
from elf_rt.machine import check_threads
from elf_rt.network import Backend

__all__ = ["BACKENDS", "PRECISIONS", "discover", "held_precisions", "open_backend", "variant_of"]


def discover() -> dict[str, str | None]:
    """Every backend with the reason why it cannot be used here, or None; best first."""
    return {name: _module(name).unavailable() for name in BACKENDS}


def open_backend(
    bundle: Bundle, name: str = "auto", precision: str = "auto", threads: int | None = None
) -> tuple[Backend, str]:
    """Open a bundle in an engine library.

    Args:
        name: one of BACKENDS, or "auto" for the best that works here.
        precision: "auto" for the library's best safe one, or fp32, fp16, bf16, int8.

    Returns:
        The backend, and one sentence that says why it was chosen.

    Raises:
        BackendError: the library is absent or cannot run the model; for "auto", none can.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    check_threads(threads)
    best = _open_best(bundle, precision, threads) if name == "auto" else _open_named(bundle, name, precision, threads)
    backend, why = best
    if threads is not None and backend.device == "cuda":
        warn(f"threads={threads} has no meaning for {backend.name}, which computes on the GPU")
    if doubt := bundle.unproven.get(variant_of(backend.name, backend.precision)):
        warn(f"{backend.precision} of this bundle was not proven at export ({doubt})")
    return backend, why


def _open_named(bundle: Bundle, name: str, precision: str, threads: int | None) -> tuple[Backend, str]:
    """The backend of this name."""
    if name not in BACKENDS:
        raise InputError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    if reason := _module(name).unavailable():
        raise BackendError(f"{name}: {reason}")
    accepted = dict.fromkeys(("auto", *BACKENDS[name].precisions, *BACKENDS[name].by_name))
    if precision not in accepted:
        raise InputError(f"precision of {name} must be one of {', '.join(accepted)}, got {precision!r}")
    backend = _open(name, bundle, precision, threads)
    asked = "as asked" if precision in ("auto", backend.precision) else f"instead of {precision}"
    return backend, f"{name} {backend.precision}, {asked}"


def _open_best(bundle: Bundle, precision: str, threads: int | None) -> tuple[Backend, str]:
    """The first backend that works here and runs this precision; a 16-bit one that none runs gives way to the best."""
    absent: list[str] = []
    refused: list[str] = []
    lacking: list[str] = []  # the refusals that another export would mend
    for name, ability in BACKENDS.items():
        if reason := _module(name).unavailable():
            absent.append(f"{name}: {reason}")
            continue
        if precision != "auto" and precision not in held_precisions(bundle, name):
            if precision in ability.precisions:
                variant = variant_of(name, precision)
                lacking.append(f"{name}: the bundle has no {variant} graphs{bundle.why_left_out(variant)}")
                refused.append(lacking[-1])
            else:
                refused.append(f"{name}: runs no {precision}")
            continue
        try:
            backend = _open(name, bundle, precision, threads)
        except BackendError as error:
            refused.append(f"{name}: {str(error).removeprefix(f'{name}: ')}")
            continue
        if precision != "auto":
            return backend, f"{name} {backend.precision}, as asked"
        refused += _passed_over(name, bundle, backend.precision)
        why = f"{name} {backend.precision} is the fastest safe one here"
        return backend, why + (f" ({'; '.join(refused)})" if refused else "")
    if precision in ("fp16", "bf16"):
        backend, why = _open_best(bundle, "auto", threads)
        warn(f"nothing here runs {precision} ({'; '.join(refused)}): {why}")
        return backend, why
    if lacking:
        raise BackendError(f"{'; '.join(lacking)}: export the checkpoint again with them (elf-rt export --precision)")
    raise BackendError(f"no backend can run {bundle.folder} in {precision} here: {'; '.join(absent + refused)}")


def _open(name: str, bundle: Bundle, precision: str, threads: int | None) -> Backend:
    """In the precision asked for; for "auto", in the backend's best safe one that the bundle has graphs for."""
    if precision == "auto":
        held = held_precisions(bundle, name)
        precision = next((p for p in held if _unsafe(name, bundle, p) is None), "fp32")
    backend: Backend = _module(name).open_backend(bundle, precision, threads)
    return backend


def _passed_over(name: str, bundle: Bundle, chosen: str) -> list[str]:
    """Why better precisions than the chosen one were not taken."""
    precisions = BACKENDS[name].precisions
    return [reason for p in precisions[: precisions.index(chosen)] if (reason := _unsafe(name, bundle, p))]


def _unsafe(name: str, bundle: Bundle, precision: str) -> str | None:
    """Why the text in a precision does not count as float32's, or None.

    Graphs of that precision were proven at export; of an engine that rounds the float32 graphs, export measured what
    it changes.
    """
    variant = variant_of(name, precision)
    if variant in bundle.unproven:
        return f"{precision} was not proven at export ({bundle.unproven[variant]})"
    if precision == "fp32" or variant != "fp32":
        return None
    agreement = bundle.agreement.get(precision)
    if agreement is None:
        return f"{precision} was not measured at export"
    return None if agreement >= MIN_AGREEMENT else f"{precision} would change {1 - agreement:.1%} of the tokens"


def _module(name: str) -> Any:
    return importlib.import_module(BACKENDS[name].module)
