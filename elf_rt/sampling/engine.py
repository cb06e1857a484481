"""The one loop that runs every sampler's table on a backend of the host."""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np

from elf_rt.backends.base import Backend, BoundNetwork
from elf_rt.sampling import integrator
from elf_rt.sampling.schedule import D, Table

MAX_IDLE_NETWORKS = 8


@dataclass(frozen=True)
class Job:
    """One batch to sample.

    seeds: (B,) uint64. source: (B, L, C) float32 clean latents and mask: (B, L) bool where they stand, or None.
    z0: (B, L, C) a given start instead of noise. eps: (N, B, L, C) given noise, eps[i] for step i, instead of Philox.
    latents: whether the Outcome must hold them, which from a GPU takes a copy.
    """

    table: Table
    length: int
    seeds: np.ndarray
    sc_cfg: float
    source: np.ndarray | None = None
    mask: np.ndarray | None = None
    z0: np.ndarray | None = None
    eps: np.ndarray | None = None
    drafts_every: int = 0  # 0: no drafts
    latents: bool = False


@dataclass
class Outcome:
    """latents: (B, L, C) z at t = 1, or () where the job did not ask for them. ids: (B, L) int64, as the network gave
    them. Seconds are wall time."""

    latents: np.ndarray
    ids: np.ndarray
    seconds: float = 0.0
    network_seconds: float = 0.0
    integrator_seconds: float = 0.0
    calls: int = 0


@dataclass(frozen=True)
class StepDone:
    """step 1 .. N of N is done, at time t of the first sample; draft ids (B, L) where one was asked for."""

    step: int
    t: float
    draft: np.ndarray | None = None


@dataclass
class _Clock:
    network: float = 0.0
    integrator: float = 0.0
    calls: int = 0
    started: float = field(default_factory=time.perf_counter)


class HostSampler:
    """Runs jobs on a CPU backend. Safe to share between threads: each job takes its own networks from a pool."""

    def __init__(self, backend: Backend, latent_dim: int) -> None:
        self.latent_dim = latent_dim
        self._pool = _NetworkPool(backend)

    def run(self, job: Job) -> Iterator[StepDone | Outcome]:
        """Sample a batch: one StepDone after each step, the Outcome last. Stop iterating to cancel."""
        table, clock = job.table, _Clock()
        batch, last = table.t.shape[1], len(table.t) - 1
        shape = (batch, job.length, self.latent_dim)
        z, x_last = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        coef, weights = table.coef.astype(np.float32), table.weights.astype(np.float32)
        with ExitStack() as stack:
            networks: dict[int, BoundNetwork] = {}
            called: BoundNetwork | None = None
            for j in range(last + 1):
                if j == 0 and job.z0 is not None:
                    z[:] = job.z0
                    continue
                k = table.calls(j) if j else 0
                if k and k not in networks:
                    networks[k] = stack.enter_context(self._pool.take(k * batch, job.length))
                network = networks.get(k)
                begun = time.perf_counter()
                _integrate(job, j, z, x_last, coef[j], weights[j], called, network)
                clock.integrator += time.perf_counter() - begun
                if network is None:
                    continue
                if j > 1:
                    yield StepDone(j - 1, float(table.t[j, 0]), self._draft(job, j, x_last))
                _call(network, table.t[j], job.sc_cfg, float(j == last), clock)
                called = network
            assert called is not None
            begun = time.perf_counter()
            ids = called.discretize()
            clock.network += time.perf_counter() - begun
        total = time.perf_counter() - clock.started
        yield Outcome(z, ids, total, clock.network, clock.integrator, clock.calls)

    def _draft(self, job: Job, j: int, x_last: np.ndarray) -> np.ndarray | None:
        """Token ids of the current estimate x̂, by a decoding call of its own."""
        if not job.drafts_every or (j - 1) % job.drafts_every or j == len(job.table.t) - 1:
            return None
        with self._pool.take(len(x_last), job.length) as network:
            network.z[:] = x_last
            if network.x_prev is not None:
                network.x_prev[:] = 0
            _call(network, np.ones(len(x_last)), job.sc_cfg, 1.0, _Clock())
            return network.discretize()

    def close(self) -> None:
        self._pool.close()


def _integrate(
    job: Job,
    j: int,
    z: np.ndarray,
    x_last: np.ndarray,
    coef: np.ndarray,
    weights: np.ndarray,
    called: BoundNetwork | None,
    network: BoundNetwork | None,
) -> None:
    """Row j of the table: the outputs of the network called last become the inputs of the next call."""
    batch = len(z)
    noise: np.ndarray | integrator.NoiseKey | None = None
    if np.any(coef[:, D]):
        noise = integrator.NoiseKey(job.seeds, j) if job.eps is None or j == 0 else job.eps[j - 1]
    k_out = 0 if called is None else len(called.z) // batch
    k_in = 0 if network is None else len(network.z) // batch
    integrator.step(
        z,
        x_last,
        x_rows=None if called is None else called.x.reshape(k_out, *z.shape),
        weights=None if called is None else weights[:k_out],
        coef=coef,
        noise=noise,
        source=job.source,
        mask=job.mask,
        next_z=None if network is None else network.z.reshape(k_in, *z.shape),
        next_x_prev=None if network is None or network.x_prev is None else network.x_prev.reshape(k_in, *z.shape),
        rows=job.table.rows[:k_in],
    )


def _call(network: BoundNetwork, t: np.ndarray, sc_cfg: float, mode: float, clock: _Clock) -> None:
    network.t.reshape(-1, len(t))[:] = t
    if network.s is not None:
        network.s[:] = sc_cfg
    if network.mode is not None:
        network.mode[:] = mode
    begun = time.perf_counter()
    network.denoise()
    clock.network += time.perf_counter() - begun
    clock.calls += 1


class _NetworkPool:
    """Bound networks by shape, reused between jobs; at most MAX_IDLE_NETWORKS wait."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._idle: OrderedDict[BoundNetwork, tuple[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def take(self, rows: int, length: int) -> Iterator[BoundNetwork]:
        shape = (rows, length)
        with self._lock:
            network = next((n for n, s in reversed(self._idle.items()) if s == shape), None)
            if network is not None:
                del self._idle[network]
        network = network or self._backend.bind(rows, length)
        try:
            yield network
        finally:
            self._give_back(network, shape)

    def _give_back(self, network: BoundNetwork, shape: tuple[int, int]) -> None:
        with self._lock:
            self._idle[network] = shape
            surplus = self._idle.popitem(last=False)[0] if len(self._idle) > MAX_IDLE_NETWORKS else None
        if surplus is not None:
            surplus.close()

    def close(self) -> None:
        with self._lock:
            networks, self._idle = list(self._idle), OrderedDict()
        for network in networks:
            network.close()
