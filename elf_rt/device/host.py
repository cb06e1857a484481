"""A network on the GPU behind arrays on the host: for ``elf-rt verify``, which compares single calls. Not for speed."""

from contextlib import ExitStack

import numpy as np

from elf_rt.device.cuda import PinnedArray
from elf_rt.device.cudart import Stream
from elf_rt.device.network import DeviceBackend


class HostNetwork:
    """See ``elf_rt.backends.base.BoundNetwork``. It has a stream of its own and waits for each call.

    Raises:
        BackendError: the engine was not built for this shape, or GPU memory ran out. Nothing stays allocated.
    """

    def __init__(self, backend: DeviceBackend, latent_dim: int, rows: int, length: int) -> None:
        with ExitStack() as stack:
            self._stream = Stream()
            stack.callback(self._stream.close)
            self._network = backend.device_network(rows, length, self._stream.handle)
            stack.callback(self._network.close)
            self._inputs = [name for name in ("z", "x_prev", "t", "s", "mode") if name in self._network.buffers]
            latents = (rows, length, latent_dim)
            self._arrays: dict[str, np.ndarray] = {}
            for name in (*self._inputs, "x", "ids"):
                shape = latents if name in ("z", "x_prev", "x") else latents[:2] if name == "ids" else (rows,)
                pinned = PinnedArray(shape, np.int64 if name == "ids" else np.float32)
                stack.callback(pinned.close)
                self._arrays[name] = pinned.array
                pinned.array[...] = 0
            self._resources = stack.pop_all()
        self.z, self.x, self.t = (self._arrays[name] for name in ("z", "x", "t"))
        self.x_prev, self.s, self.mode = (self._arrays.get(name) for name in ("x_prev", "s", "mode"))

    def denoise(self) -> None:
        for name in self._inputs:
            array = self._arrays[name]
            self._stream.copy_to_device(self._network.buffers[name], array.ctypes.data, array.nbytes)
        self._network.enqueue_denoise(self._stream.handle)
        self._fetch("x")

    def discretize(self) -> np.ndarray:
        self._network.enqueue_discretize(self._stream.handle)
        self._fetch("ids")
        return self._arrays["ids"].copy()

    def close(self) -> None:
        if self._arrays:
            del self.z, self.x, self.t, self.x_prev, self.s, self.mode  # arrays over memory that is about to go
            self._arrays.clear()
        self._resources.close()

    def _fetch(self, name: str) -> None:
        array = self._arrays[name]
        self._stream.copy_to_host(array.ctypes.data, self._network.buffers[name], array.nbytes)
        self._stream.synchronize()
