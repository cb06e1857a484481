"""Texts over a Ray cluster, by Ray Data: one model per GPU, or per share of cores.

The texts are cut into shards, which come back in their order. A worker that dies costs the repeat of its shards. Every
machine needs elf-rt and the bundle.
"""

import logging
import os
import pickle
import platform
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from elf_rt.errors import BackendError, ElfError, first_line
from elf_rt.model import Model, Result, Text, load

CPU_BACKENDS = ("openvino", "onnxruntime")
SHARD = 64  # texts


def write_shards(
    texts: Sequence[Text],
    bundle: Path,
    backend: str = "auto",
    *,
    precision: str = "auto",
    threads: int | None = None,
    address: str = "local",
    shard: int = SHARD,
) -> Generator[list[Result], None, None]:
    """Write texts on a cluster. It is asked for when the first results are; close the generator to leave it.

    Args:
        texts: each with its seed, or the repeat of a shard would be other texts.
        bundle: a path that every machine has.
        backend, precision: as ``elf_rt.load`` takes them. threads: of each model, where there are no GPUs; all cores of
            a machine by default.
        address: of the cluster; "local" starts one on this machine. Not read in a process that has initialised Ray.
        shard: texts that are written, lost and repeated together.

    Yields:
        the results of each shard, the first one first.

    Raises:
        BackendError: there is no such cluster, or workers failed otherwise than by dying.
    """
    with _connected(address):
        import ray.data
        from ray.exceptions import RayError

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = [{"texts": pickle.dumps(texts[first : first + shard])} for first in range(0, len(texts), shard)]
        resources, models, threads = _share(backend, threads)
        load_model = partial(load, bundle, backend, precision=precision, threads=threads)
        worker: Any = _Worker  # Ray's types know only functions
        try:
            pool = ray.data.ActorPoolStrategy(size=min(models, len(rows)))
            written = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                worker, fn_constructor_args=(load_model,), compute=pool, **resources
            )
            written.context.execution_options.preserve_order = True
            for row in written.iter_rows():
                if row["error"]:
                    raise BackendError(row["error"])
                yield pickle.loads(row["results"])
        except RayError as error:
            raise BackendError(f"Ray: {first_line(error)}") from error


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Ray, initialised here unless it is already."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell a web service of each cluster
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    try:
        import ray
    except ImportError as error:
        raise BackendError(f"Ray cannot be imported ({first_line(error)}): pip install 'elf-rt[ray]'") from error

    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise BackendError(f"no Ray cluster at {address}: {first_line(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray takes it for itself, and ends the process with another code
    try:
        yield
    finally:
        ray.shutdown()


def _share(backend: str, threads: int | None) -> tuple[dict[str, Any], int, int | None]:
    """What a model takes of the cluster, how many models that makes, and the threads of each."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus and backend not in CPU_BACKENDS:
        return {"num_gpus": 1}, gpus, threads
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU")]
    if not cores:
        raise BackendError("the Ray cluster has neither a GPU nor a core")
    each = min(threads or min(cores), max(cores))
    return {"num_cpus": each}, sum(count // each for count in cores), each


class _Worker:
    """Writes shards, in a process of Ray's. It dies with its process alone: what elf-rt refuses is told in the row, for
    it would be refused again."""

    def __init__(self, load_model: Callable[[], Model]) -> None:
        self._load = load_model

    @cached_property
    def _model(self) -> Model:
        return self._load()

    def __call__(self, row: dict[str, bytes]) -> dict[str, Any]:
        results, error = list[Result](), ""
        try:
            results = self._model.write(pickle.loads(row["texts"]))
        except ElfError as refused:
            error = f"on {platform.node()}:{os.getpid()}: {refused}"
        return {"results": pickle.dumps(results), "error": error}
