"""A deserialised engine, and how its execution contexts are made.

TensorRT's kernels are in the plan. TensorRT-RTX's are finished on the GPU that runs them, when a context first runs a
shape: here all at once and before that run goes on, since a CUDA graph keeps the kernels that it captured, and kept in
the user's cache, so that the next start does not compile them again.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from elf_rt.files import read_sealed, write_sealed


class LoadedEngine:
    """engine: the library's own. kernels: the file of its finished kernels, or None for a library that needs none."""

    def __init__(self, trt: ModuleType, engine: Any, kernels: Path | None) -> None:
        self.engine = engine
        self._trt: Any = trt
        self._file = kernels
        self._config: Any = None
        self._cache: Any = None
        self._known = b""
        if kernels is not None:
            self._configure(kernels)

    def new_context(self) -> Any:
        """A context without memory of its own, or None when the library refuses."""
        if self._config is not None:
            return self.engine.create_execution_context(self._config)
        return self.engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def close(self) -> None:
        """Keep the kernels that were finished since."""
        if self._cache is None or self._file is None:
            return
        kernels = bytes(self._cache.serialize() or b"")
        if kernels != self._known:
            write_sealed(self._file, kernels, "finished kernels")
        self._config = self._cache = None

    def _configure(self, kernels: Path) -> None:
        trt = self._trt
        self._config = self.engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = self._config.create_runtime_cache()
        known = read_sealed(kernels)
        if known and self._cache.deserialize(known):  # the library refuses a cache of another GPU, driver or version
            self._known = known
        self._config.set_runtime_cache(self._cache)
