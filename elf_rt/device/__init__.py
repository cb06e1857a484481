"""The GPU side: static buffers, NVRTC kernels, and a sampler that is one CUDA graph (DESIGN.md, ideas 3 and 4)."""

import importlib
import importlib.util

from elf_rt.cudart import find_gpu
from elf_rt.errors import BackendError


def unavailable() -> str | None:
    """Why the device sampler cannot run here, or None."""
    gpu = find_gpu()  # first: without a driver cuda.core may not return
    if isinstance(gpu, str):
        return gpu
    if importlib.util.find_spec("cuda.core") is None:
        return "cuda-core is not installed: pip install 'cuda-core>=1.0,<2'"
    from elf_rt.device.kernels import get_cubin

    try:
        get_cubin(gpu.sm)
    except BackendError as error:
        return str(error)
    return None
