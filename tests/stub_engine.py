"""A backend made of arithmetic, x̂ = z / 2 + x_prev / 4 + t, so that a text's latents say which calls it took part in;
a driver on it, and a gate that lets its calls through."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np

from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.pending import Pending
from elf_rt.sampling import schedule
from elf_rt.sampling.driver import Driver
from elf_rt.sampling.engine import Engine, HostEngine
from elf_rt.sampling.program import Program, Written

LONG = 30  # seconds after which a test that hangs fails


class Graph:
    def __init__(self, backend, graph, rows, length):
        c = StubBackend.config.latent_dim
        self._backend, self._kind = backend, graph
        hidden = np.zeros((rows, length, c), np.float32)
        if graph == "discretizer":
            self.arrays = {"hidden": hidden, "ids": np.zeros((rows, length), np.int64)}
        else:
            self.arrays = {name: np.zeros((rows, length, c), np.float32) for name in ("z", "x_prev", "x")}
            self.arrays |= {"t": np.zeros(rows, np.float32), "hidden": hidden}

    def run(self):
        arrays = self.arrays
        if self._kind == "discretizer":
            arrays["ids"][:] = np.round(100 * arrays["hidden"].sum(-1))
            return
        self._backend.before_call(len(arrays["t"]))
        arrays["x"][:] = arrays["z"] / 2 + arrays["x_prev"] / 4 + arrays["t"][:, None, None]
        arrays["hidden"][:] = arrays["z"]

    def close(self):
        self.arrays = {}


class StubBackend:
    name, precision, device = "stub", "fp32", "cpu"
    config = ModelConfig(1, 8, 1, 8, 8, 3, 4, 8, max_length=4)

    def __init__(self, before_call=lambda rows: None):
        self.before_call = before_call
        self.calls: list[int] = []

    def bind(self, graph, rows, length):
        return Graph(self, graph, rows, length)

    def max_rows(self, length, needed=1):
        return None

    def describe(self):
        return {}

    def close(self):
        pass


class Gate:
    """Lets calls through one by one, and says how many rows each has."""

    def __init__(self):
        self.rows: list[int] = []
        self._free, self._reached = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, rows):
        self.rows.append(rows)
        self._reached.release()
        assert self._free.acquire(timeout=LONG)

    def reached(self):
        assert self._reached.acquire(timeout=LONG)

    def let(self, calls=1):
        self._free.release(calls)


@contextmanager
def running(make: Callable[[], Engine[Any]]) -> Iterator[Engine[Any]]:
    """An engine that is made, used and closed in the driver's thread."""
    with closing(make()) as engine:
        yield engine


def stub_driver(before_call=lambda rows: None, max_rows=None) -> Driver:
    backend = StubBackend(before_call)
    engine = running(lambda: HostEngine(backend, backend.config.latent_dim, max_rows))
    return Driver(engine, backend.config.max_length)


def program(count=3, seed=0, length=4, **fields) -> Program:
    params = SamplingParams(steps=count, sampler="sde")
    (grid,) = schedule.make_grid(params, StubBackend.config, np.array([seed], np.uint64))
    table = schedule.make_table(params, StubBackend.config, grid, conditional=False)
    return Program(table, length, seed, 1.0, **fields)


def pend(driver, made) -> Pending:
    return Pending(driver, made, lambda written: written, lambda ids: str(ids))


def close_while_calls_run(driver: Driver, gate: Gate) -> None:
    closing = threading.Thread(target=driver.close)
    closing.start()
    gate.let(1000)
    closing.join(LONG)
    assert not closing.is_alive()


def alone(made) -> Written:
    driver = stub_driver()
    try:
        return pend(driver, made).result(LONG)
    finally:
        driver.close()


def idle(model) -> bool:
    stats = model.stats()
    return (stats.slots, stats.waiting, stats.rows) == (0, 0, 0)


def steps(model, count, **overrides) -> SamplingParams:
    return model.params(steps=count, **overrides)
