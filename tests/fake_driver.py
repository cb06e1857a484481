"""The real cuda.core on tests/fake_driver.cpp: a library that must be the process's libcuda.so.1 before it starts."""

import ctypes
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

SUCCESS, LAUNCH_FAILED = 0, 719
_Sizes = ctypes.POINTER(ctypes.c_uint32)
_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, _Sizes, _Sizes, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)
_callbacks: list[Any] = []  # the library holds their addresses


def real_core(gpu: "FakeGpu") -> Any:
    """cuda.core, whose launches come to this GPU from now on."""

    def on_launch(name: bytes, grid: Any, block: Any, stream: int | None, parameters: Any) -> int:
        kernel = name.decode()
        try:
            sizes = gpu.emulator.parameter_sizes(kernel)
            arguments = [ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes)]
            gpu.enqueue_kernel(stream or 0, kernel, tuple(grid[:3]), tuple(block[:3]), arguments)
        except Exception as error:  # it could not leave a callback
            print(f"{kernel}: {error!r}")
            return LAUNCH_FAILED
        return SUCCESS

    _callbacks.append(_ON_LAUNCH(on_launch))
    ctypes.CDLL("libcuda.so.1").fake_driver_on_launch(_callbacks[-1])
    return importlib.import_module("cuda.core")
