"""Arrays that exist twice, on the GPU and in page-locked host memory, so that they travel at full speed."""

import math

import numpy as np

from elf_rt.device.cuda import Cuda
from elf_rt.device.cudart import Stream

ALIGNMENT = 256  # bytes, of each array on the GPU

Fields = dict[str, tuple[tuple[int, ...], type | np.dtype]]  # shape and type by name


class StagedArrays:
    """Arrays that lie side by side in GPU memory and in page-locked host memory, and travel one by one."""

    def __init__(self, driver: Cuda, fields: Fields) -> None:
        self._offsets: dict[str, int] = {}
        self._num_bytes = 0
        for name, (shape, dtype) in fields.items():
            self._offsets[name] = self._num_bytes
            size = math.prod(shape) * np.dtype(dtype).itemsize
            self._num_bytes += -(-size // ALIGNMENT) * ALIGNMENT
        self._device = driver.allocate(self._num_bytes)
        try:
            self._host = driver.pinned((self._num_bytes,), np.uint8)
        except BaseException:
            self._device.close()
            raise
        self._arrays = {name: self._view(name, *fields[name]) for name in fields}

    def __getitem__(self, name: str) -> np.ndarray:
        """The host's side."""
        return self._arrays[name]

    def address(self, name: str) -> int:
        """The GPU's side."""
        return self._device.pointer + self._offsets[name]

    def upload(self, stream: Stream, name: str) -> None:
        """Send an array to the GPU."""
        host = self._host.pointer + self._offsets[name]
        stream.copy_to_device(self.address(name), host, self._arrays[name].nbytes)

    def download(self, stream: Stream, name: str) -> None:
        """Fetch an array from the GPU."""
        host = self._host.pointer + self._offsets[name]
        stream.copy_to_host(host, self.address(name), self._arrays[name].nbytes)

    def host_address(self, name: str) -> int:
        """Where the host's side lies."""
        return self._host.pointer + self._offsets[name]

    @property
    def num_bytes(self) -> int:
        """On the GPU."""
        return self._num_bytes

    def close(self) -> None:
        self._arrays.clear()
        self._host.close()
        self._device.close()

    def _view(self, name: str, shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        view: np.ndarray = self._host.array[self._offsets[name] :][:size].view(dtype).reshape(shape)
        view[...] = 0
        return view
