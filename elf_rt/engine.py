"""The engine of rows for a backend: the host's, or the GPU's."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from elf_rt.network import Backend
from elf_rt.params import ModelConfig
from elf_rt.sampling.engine import Engine, HostEngine


def open_engine(backend: Backend, config: ModelConfig, max_rows: int | None = None) -> Engine[Any]:
    """To be used and closed by the thread that opens it."""
    if backend.device == "cuda":
        from elf_rt.device.engine import DeviceEngine

        return DeviceEngine(backend, config, max_rows)
    return HostEngine(backend, config.latent_dim, max_rows)


@contextmanager
def running_engine(backend: Backend, config: ModelConfig, max_rows: int | None) -> Iterator[Engine[Any]]:
    """An engine that is closed at the end, and its backend after it: all in the thread that enters."""
    with closing(backend), closing(open_engine(backend, config, max_rows)) as engine:
        yield engine
