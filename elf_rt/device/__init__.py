"""The GPU side: the engine of rows with its kernel, its memory, and the graphs of its calls."""

import threading

from elf_rt.device.cudart import find_gpu
from elf_rt.errors import BackendError
from elf_rt.libraries import why_absent

# Held by whatever allocates, compiles or captures, for all models of the process: a capture must not meet a wait for
# the whole GPU in any thread, which torch's set-up makes, and torch captures one graph at a time.
setup_lock = threading.RLock()


def unavailable() -> str | None:
    """Why the device engine cannot run here, or None. Compiles the kernels, so that nothing is left to fail later."""
    gpu = find_gpu()  # first: without a driver cuda.core may not return
    if isinstance(gpu, str):
        return gpu
    from elf_rt.device.kernels import get_cubin

    try:
        get_cubin(gpu.sm)
    except BackendError as error:
        return str(error)
    reason = why_absent("cuda.core", "Device", "pip install 'cuda-core>=1.0,<2'")
    return reason and f"cuda-core is {reason}"
