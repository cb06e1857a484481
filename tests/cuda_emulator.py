"""A stand-in for the CUDA driver's launch: the very kernels of cpp_ext/integrator.cu, compiled for the host.

"Device memory" is numpy memory and an address is ``array.ctypes.data``. Arguments convert as cuda.core converts them
(a Python int is 64 bits, np.int32 is 32), and a count or size that differs from the kernel's is an error.

    emulator = cuda_emulator.load()                     # skips the test where there is no g++
    emulator.launch("elf_step", grid, block, *arguments)
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from elf_rt.device.kernels import NAME

MAX_PARAMETERS = 64


class Emulator:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def launch(self, name: str, grid: tuple[int, ...], block: tuple[int, ...] | int, *arguments: object) -> None:
        """Run the kernel over the whole grid, one thread after the other."""
        self.run(name, grid, block, argument_bytes(arguments))

    def run(self, name: str, grid: tuple[int, ...], block: tuple[int, ...] | int, arguments: Sequence[bytes]) -> None:
        """The same with the bytes of each argument, as a driver is given them."""
        sizes, got = self.parameter_sizes(name), [len(argument) for argument in arguments]
        if got != sizes:
            raise TypeError(f"{name} takes parameters of {sizes} bytes, got {got}")
        values = [ctypes.create_string_buffer(argument, len(argument)) for argument in arguments]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))
        getattr(self._library, f"launch_{name}")(_dim3(grid), _dim3(block), pointers)

    def parameter_sizes(self, name: str) -> list[int]:
        """Bytes of each of a kernel's parameters."""
        sizes = (ctypes.c_size_t * MAX_PARAMETERS)()
        return list(sizes[: getattr(self._library, f"parameters_{name}")(sizes)])


@functools.cache
def load() -> Emulator:
    """Compile the kernels once per process; skips the calling test without a C++ compiler."""
    with tempfile.TemporaryDirectory() as folder:
        unit, library = Path(folder, "unit.cpp"), Path(folder, "emulator.so")
        unit.write_text(f'#include "cuda_host_shim.h"\n#include "integrator.cu"\nEMULATE({NAME})\n', encoding="utf-8")
        includes = ["-I", str(Path(__file__).parent), "-I", str(resources.files("elf_rt._csrc"))]
        flags = ["-O2", "-ffp-contract=off", "-fno-math-errno", "-Wno-unknown-pragmas"]
        compile_library(unit, library, *flags, *includes)
        return Emulator(ctypes.CDLL(str(library)))


def compile_library(source: Path, library: Path, *options: str) -> None:
    """C++17 into a shared library; skips the calling test without a compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", *options, "-o", str(library), str(source)]
    subprocess.run(command, check=True)


def argument_bytes(arguments: Sequence[object]) -> list[bytes]:
    """What cuda.core makes of the arguments of a launch."""
    return [bytes(_convert(argument)) for argument in arguments]


def _convert(argument: object) -> ctypes._SimpleCData:
    if isinstance(argument, np.int32):
        return ctypes.c_int32(int(argument))
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    raise TypeError(f"no CUDA argument: {argument!r}")


def _dim3(size: tuple[int, ...] | int) -> ctypes.Array:
    sizes = (size,) if isinstance(size, int) else size
    return (ctypes.c_uint32 * 3)(*sizes, *[1] * (3 - len(sizes)))
