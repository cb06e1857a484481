"""Arrays that exist twice, on the GPU and in page-locked host memory, so that they travel at full speed."""

import math

import numpy as np

from elf_rt.device.cudart import DeviceMemory, PinnedArray

ALIGNMENT = 256  # bytes, of each array on the GPU

Fields = dict[str, tuple[tuple[int, ...], type | np.dtype]]  # shape and type by name


class StagedArrays:
    """Zeroed arrays that lie side by side, in GPU memory as on the host."""

    def __init__(self, fields: Fields) -> None:
        self._offsets: dict[str, int] = {}
        self.num_bytes = 0  # bytes on the GPU
        sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in fields.items()}
        for name, size in sizes.items():
            self._offsets[name] = self.num_bytes
            self.num_bytes += -(-size // ALIGNMENT) * ALIGNMENT
        self._device = DeviceMemory(self.num_bytes)
        try:
            self._host = PinnedArray((self.num_bytes,), np.uint8)
        except BaseException:
            self._device.close()
            raise
        self._arrays = {
            name: self._host.array[self._offsets[name] :][: sizes[name]].view(dtype).reshape(shape)
            for name, (shape, dtype) in fields.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        """The host's side."""
        return self._arrays[name]

    def address(self, name: str) -> int:
        """The GPU's side."""
        return self._device.pointer + self._offsets[name]

    def close(self) -> None:
        self._arrays.clear()
        self._host.close()
        self._device.close()
