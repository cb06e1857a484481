"""Only what pyproject.toml cannot say: the optional C++ extension."""

import sys

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# Never -march=native: a wheel runs on every machine of its platform, and host_step.cpp picks its vector width at run
# time. Contraction into fused multiply-adds is off because the noise must have the same bits everywhere.
FLAGS = (
    ["/O2", "/fp:precise"]
    if sys.platform == "win32"
    else [
        "-O3",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
    ]
)

setup(
    ext_modules=[
        Pybind11Extension(
            "elf_rt._csrc._integrator",
            ["cpp_ext/bindings.cpp", "cpp_ext/host_step.cpp"],
            depends=["cpp_ext/host_step.h", "cpp_ext/integrator.h", "cpp_ext/thread_pool.h"],
            cxx_std=17,
            extra_compile_args=FLAGS,
            optional=True,  # without a compiler elf-rt runs on the numpy step, and `elf-rt doctor` says so
        )
    ]
)
