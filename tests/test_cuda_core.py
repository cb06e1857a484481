"""The device engine's tests once more, with the real cuda.core and cuda.bindings on a driver that is not there.

So what cuda.core makes of our streams, configurations and arguments is what the kernels are run with.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulator import compile_library
from fake_cuda import HAS_DRIVER

HERE = Path(__file__).parent


@pytest.mark.skipif(HAS_DRIVER, reason="there is a real driver: pytest -m gpu")
def test_the_device_engine_through_cuda_core(tmp_path: Path) -> None:
    compile_library(HERE / "fake_driver.cpp", tmp_path / "libcuda.so.1")
    libraries = os.pathsep.join([str(tmp_path), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = os.environ | {"LD_LIBRARY_PATH": libraries, "ELF_RT_FAKE_DRIVER": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_device.py")]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed in", done.stdout.splitlines()[-1])  # "passed," would tell of skipped ones
    assert passed and int(passed[1]) > 50, done.stdout[-1000:]
