"""The CUDA kernel of ``cpp_ext/integrator.cu``: compiled by NVRTC at first use, kept as a cubin in the user's cache.

Compiling needs neither a GPU nor a driver. A cached cubin is named by what it was made from (sources, options, compute
capability, NVRTC version) and carries its own checksum, so a stale or damaged file is never loaded.
"""

import functools
import hashlib
import importlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from elf_rt.errors import BackendError
from elf_rt.files import read_sealed, write_sealed
from elf_rt.machine import user_cache
from elf_rt.sampling.schedule import MAX_ROWS, Row

NAME = "elf_step"
BLOCK = 256  # threads; also the kernel's launch bound
ELEMENTS = 4  # elements that one thread computes
ROW_BITS = 4

_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
_SOURCE, _HEADER = "integrator.cu", "integrator.h"

# SlotStep of cpp_ext/integrator.h: device addresses (0: absent), then numbers.
SLOT_STEP = np.dtype(
    [
        *((name, np.uint64) for name in ("z", "x_last", "x_rows", "next_z", "next_x_prev", "source", "mask", "noise")),
        ("not_finite", np.uint64),
        ("seed", np.uint64),
        ("coef", np.float32, 5),
        ("weights", np.float32, MAX_ROWS),
        ("noise_index", np.uint32),
        ("rows", np.uint32),
        ("num_outputs", np.int32),
        ("num_rows", np.int32),
        ("first_row", np.int32),
        ("t", np.float32),
        ("s", np.float32),
    ],
    align=True,
)


def row_flags(rows: Sequence[Row]) -> int:
    """The flags of all rows of a text in one number: see ``rows`` of SlotStep."""
    return sum(row.flags << (ROW_BITS * k) for k, row in enumerate(rows))


def grid(entries: int, length: int, width: int) -> tuple[int, int, int]:
    """The launch grid of a step with BLOCK threads a block."""
    return -(-length * width // (BLOCK * ELEMENTS)), entries, 1


def get_cubin(sm: int, cache: Path | None = None) -> bytes:
    """The kernels for compute capability `sm` (89 for 8.9), from the cache or compiled now.

    Raises:
        BackendError: NVRTC is missing, does not know `sm`, or refuses the source.
    """
    nvrtc = _nvrtc()
    path = (cache or default_cache()) / f"integrator-sm{sm}-{_key(nvrtc, sm)[:16]}.cubin"
    cubin = read_sealed(path)
    if cubin is None:
        cubin, _ = compile_cubin(sm)
        write_sealed(path, cubin, "compiled kernels")
    return cubin


def compile_cubin(sm: int) -> tuple[bytes, str]:
    """Compile for compute capability `sm`; returns the cubin and the compiler's log (registers, spills)."""
    nvrtc = _nvrtc()
    source, header = (text.encode() for text in _sources())
    options = [option.encode() for option in (f"--gpu-architecture=sm_{sm}", *_OPTIONS)]
    program = _call(nvrtc, "nvrtcCreateProgram", source, _SOURCE.encode(), 1, [header], [_HEADER.encode()])
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _read(nvrtc, "nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
        if error == nvrtc.nvrtcResult.NVRTC_ERROR_INVALID_OPTION:
            raise BackendError(f"this NVRTC {_version(nvrtc)} knows no sm_{sm}: pip install -U nvidia-cuda-nvrtc")
        if error:
            raise BackendError(f"NVRTC {_version(nvrtc)} refused {_SOURCE} for sm_{sm}: {_first_error(log)}")
        return _read(nvrtc, "nvrtcGetCUBIN", program), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def load_kernel(sm: int) -> Any:
    """The step as a cuda.core kernel of the current context.

    Only with a driver (``elf_rt.device.cudart.find_gpu``) and a device made current: cuda.core hangs without one.
    """
    from cuda.core import ObjectCode

    cubin = get_cubin(sm)
    try:
        module = ObjectCode.from_cubin(cubin, name="elf_rt_integrator")
        return module.get_kernel(NAME)
    except Exception as error:  # cuda.core raises CUDAError, which is not public in every version
        raise BackendError(
            f"the GPU's driver refused kernels made by NVRTC {_version(_nvrtc())} ({error}): update the driver, or "
            "install the nvidia-cuda-nvrtc of the driver's CUDA version"
        ) from error


def default_cache() -> Path:
    """The user's cache folder for compiled kernels."""
    return user_cache() / "kernels"


@functools.cache
def _sources() -> tuple[str, str]:
    folder = resources.files("elf_rt._csrc")
    return (folder / _SOURCE).read_text("utf-8"), (folder / _HEADER).read_text("utf-8")


@functools.cache
def _nvrtc() -> ModuleType:
    try:
        module = importlib.import_module("cuda.bindings.nvrtc")
        module.nvrtcVersion()  # loads the library
    except (ImportError, RuntimeError, OSError) as error:  # cuda.pathfinder's not-found error is a RuntimeError
        raise BackendError(
            "NVRTC is not installed, and the GPU kernels are compiled with it: "
            "pip install 'nvidia-cuda-nvrtc>=13' 'cuda-bindings>=13'"
        ) from error
    return module


def _key(nvrtc: ModuleType, sm: int) -> str:
    parts = (*_sources(), *_OPTIONS, str(sm), _version(nvrtc))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _version(nvrtc: ModuleType) -> str:
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def _call(nvrtc: ModuleType, function: str, *arguments: Any) -> Any:
    error, *result = getattr(nvrtc, function)(*arguments)
    if error:
        raise BackendError(f"NVRTC {_version(nvrtc)}: {function} failed: {error.name}")
    return result[0] if result else None


def _read(nvrtc: ModuleType, function: str, program: Any) -> bytes:
    buffer = bytearray(_call(nvrtc, f"{function}Size", program))
    _call(nvrtc, function, program, buffer)
    return bytes(buffer)


def _first_error(log: str) -> str:
    lines = log.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "no reason given")
