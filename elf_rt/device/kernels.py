"""The CUDA kernels of ``cpp_ext/integrator.cu``: compiled by NVRTC at first use, kept as cubins in the user's cache.

Compiling needs neither a GPU nor a driver. A cached cubin is named by what it was made from (sources, options, compute
capability, NVRTC version) and carries its own checksum, so a stale or damaged file is never loaded.
"""

import functools
import hashlib
import importlib
import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from elf_rt.errors import BackendError, ElfError
from elf_rt.files import read_sealed, write_sealed
from elf_rt.machine import user_cache
from elf_rt.sampling.schedule import Row

TYPES = ("float32", "float16", "bfloat16")  # of the network's tensors
NAMES = ("elf_advance", *(f"elf_{kernel}_{dtype}" for dtype in TYPES for kernel in ("step", "draft")))
BLOCK = 256  # threads; also the kernels' launch bound

_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
_SOURCE, _HEADER = "integrator.cu", "integrator.h"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepArguments:
    """What one launch of ``elf_step_<type>`` gets, in order: device addresses (0: absent), then sizes.

    Shapes are in ``cpp_ext/integrator.cu``. Change `offset` and `final` with ``dataclasses.replace``.
    """

    z: int
    x_last: int
    x_rows: int
    next_z: int
    next_x_prev: int
    next_t: int
    next_s: int
    next_mode: int
    source: int
    mask: int
    seeds: int
    noise: int
    t: int
    coef: int
    weights: int
    s: int
    progress: int
    length: int
    width: int
    table_rows: int
    rows: int
    next_rows: int
    offset: int = 0
    final: int = 0

    def packed(self) -> tuple[int | np.int32, ...]:
        """For a launch: Python integers pass as 64 bits, np.int32 as 32."""
        values = astuple(self)
        return (*values[:17], *map(np.int32, values[17:]))


def make_progress(base: int, last: int, rows: Sequence[Row]) -> np.ndarray:
    """The 16 bytes of `Progress`: int32 (4,). `rows` are the Row flags of the call's guidance rows."""
    sees = sum((row.sees_source | row.sees_prev << 1) << (2 * k) for k, row in enumerate(rows))
    return np.array([base, last, sees, 0], np.int32)


def grid(batch: int, length: int, width: int, dtype: str) -> tuple[int, int, int]:
    """The launch grid of a step or draft kernel with BLOCK threads a block."""
    elements = BLOCK * (4 if dtype == "float32" else 8)
    return -(-length * width // elements), batch, 1


def threads(name: str) -> int:
    """The block size a kernel is launched with."""
    return 1 if name == "elf_advance" else BLOCK


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
        try:
            write_sealed(path, cubin)
        except (OSError, ElfError) as error:  # it costs a second at the next start, not this one
            _log.warning("compiled kernels are not cached: %s", error)
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


def load_kernels(sm: int, cache: Path | None = None) -> dict[str, Any]:
    """The kernels by name (NAMES), as cuda.core kernels of the current context.

    Only with a driver (``elf_rt.device.cudart.find_gpu``) and a device made current: cuda.core hangs without one.
    """
    from cuda.core import ObjectCode

    cubin = get_cubin(sm, cache)
    try:
        module = ObjectCode.from_cubin(cubin, name="elf_rt_integrator")
        return {name: module.get_kernel(name) for name in NAMES}
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
