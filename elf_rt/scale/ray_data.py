"""A JSONL over a Ray cluster, by Ray Data: one model per GPU, or per share of cores.

The records are cut into shards. A worker that dies costs the repeat of its shard. The process that asks writes each
shard when it comes, in a folder beside the output, and joins them when all are there; a run that goes on after a stop
writes only those that are missing. So only that process needs the files; every machine needs elf-rt and the bundle.
"""

import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, ElfError, InputError, first_line
from elf_rt.files import atomic_file, sha256, writable_target
from elf_rt.manifest import MANIFEST
from elf_rt.model import Model, load
from elf_rt.request import check_seed, preset_of

CPU_BACKENDS = ("openvino", "onnxruntime")
SHARD = 64  # records
JOB = "job.json"

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What is written for each record.

    Args:
        bundle: a path that every machine has.
        seed: text k of all has seed ``seed + k``; drawn at random when None.
        n: texts for each record.
        sampling: the other arguments of ``Model.generate``, by name.
        backend, precision: as ``elf_rt.load`` takes them. threads: of each model, where there are no GPUs; all cores of
            a machine by default.
        shard: records that are written, lost and repeated together.
    """

    bundle: Path
    seed: int | None = None
    n: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    shard: int = SHARD


@dataclass(frozen=True)
class Written:
    """A shard that has come. worker: the machine and the process that wrote it. done: texts that are there now."""

    lines: str
    worker: str
    done: int


def write_jsonl(
    records: Sequence[Record],
    output: Path,
    job: Job,
    *,
    address: str = "local",
    resume: bool = False,
    on_shard: Callable[[Written], None] = lambda written: None,
) -> int:
    """Write the texts of records to a JSONL: their order and fields are kept.

    Args:
        records: with a field input; without, for an unconditional model.
        address: of the cluster; "local" starts one on this machine. Not read in a process that has initialised Ray.
        resume: go on with the shards of a run that was stopped.
        on_shard: called with each shard when it has come.

    Returns:
        the seed of the first text.

    Raises:
        InputError, BundleError: the job is not possible. BackendError: workers failed otherwise than by dying. The
        shards that have come are kept.
    """
    writable_target(output)  # before hours of work, not after
    preset_of(Bundle.open(job.bundle).presets, job.sampling.get("preset", "default"))
    folder = output.with_name(f"{output.name}.shards")
    seed = _open_folder(folder, records, job, resume)
    paths = [folder / f"{first:012d}.jsonl" for first in range(0, len(records), job.shard)]
    with _kept(folder, paths):
        _write_missing(records, paths, replace(job, seed=seed), address, on_shard)
    with atomic_file(output) as work, work.open("wb") as file:
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)
    shutil.rmtree(folder)
    return seed


def _write_missing(
    records: Sequence[Record], paths: Sequence[Path], job: Job, address: str, on_shard: Callable[[Written], None]
) -> None:
    """The shards that have no file yet."""
    shards = {n: records[n * job.shard : (n + 1) * job.shard] for n, path in enumerate(paths) if not path.exists()}
    done = job.n * (len(records) - sum(map(len, shards.values())))
    if not shards:
        return
    with _connected(address), closing(_rows(job, shards)) as rows:
        for row in rows:
            with atomic_file(paths[row["number"]]) as work:
                work.write_text(row["lines"], encoding="utf-8", newline="\n")
            done += row["lines"].count("\n")
            on_shard(Written(row["lines"], row["worker"], done))


@contextmanager
def _kept(folder: Path, paths: Sequence[Path]) -> Iterator[None]:
    """What fails in the block says how much is there; where nothing is, the folder goes."""
    try:
        yield
    except BaseException as error:
        if done := sum(path.exists() for path in paths):
            told = f"{done} of {len(paths)} shards are in {folder}: the same command with --resume writes the rest"
            error.add_note(told)
        else:
            shutil.rmtree(folder)
        raise


def _open_folder(folder: Path, records: Sequence[Record], job: Job, resume: bool) -> int:
    """The folder of the shards, new or of the same job. Returns the job's seed."""
    texts = [json.dumps(each, sort_keys=True) for each in records]
    identity = {
        "records": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "bundle": sha256(job.bundle / MANIFEST),
        "shard": job.shard,
        "n": job.n,
        "sampling": dict(job.sampling),
    }
    path, total = folder / JOB, job.n * len(records)
    seed = check_seed(secrets.randbits(32) if job.seed is None else job.seed, total)
    if not folder.exists():
        folder.mkdir()
    elif not resume:
        raise InputError(f"{folder} holds texts of a run that was stopped: give --resume to go on, or remove it")
    if not path.exists():
        with atomic_file(path) as work:
            work.write_text(json.dumps({**identity, "seed": seed}, indent=1), encoding="utf-8")
        return seed
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        same = {**kept, "seed": None} == {**json.loads(json.dumps(identity)), "seed": None}
    except (ValueError, TypeError):
        kept, same = {}, False
    if not same or job.seed not in (None, kept["seed"]):
        raise InputError(f"{folder} is of another run: give what it was given, or remove it")
    return check_seed(kept["seed"], total)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Ray, initialised here unless it is already."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell a web service of each cluster
    try:
        import ray
    except ImportError as error:
        raise BackendError(f"Ray cannot be imported ({first_line(error)}): pip install 'elf-rt[ray]'") from error

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise BackendError(f"no Ray cluster at {address}: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _rows(job: Job, shards: Mapping[int, Sequence[Record]]) -> Generator[dict[str, Any], None, None]:
    """What a worker returns for each shard, as it comes."""
    import ray.data
    from ray.exceptions import RayError

    assert job.seed is not None
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [  # as text: a column has one type, and no whole number beyond 64 bits
        {"number": n, "seed": str(job.seed + n * job.shard * job.n), "records": json.dumps(records)}
        for n, records in shards.items()
    ]
    resources, models, threads = _share(job)
    worker: Any = _Worker  # Ray's types know only functions
    try:
        with ray.data.DataContext.current(context):
            pool = ray.data.ActorPoolStrategy(size=min(models, len(rows)))
            written = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                worker, fn_constructor_args=(job, threads), compute=pool, **resources
            )
            for row in written.iter_rows():
                if row["error"]:
                    raise BackendError(f"on {row['worker']}: {row['error']}")
                yield row
    except RayError as error:
        raise BackendError(f"Ray: {first_line(error)}") from error


def _share(job: Job) -> tuple[dict[str, Any], int, int | None]:
    """What a model takes of the cluster, how many models that makes, and the threads of each."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus and job.backend not in CPU_BACKENDS:
        return {"num_gpus": 1}, gpus, job.threads
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU")]
    if not cores:
        raise BackendError("the Ray cluster has neither a GPU nor a core")
    each = min(job.threads or min(cores), max(cores))
    return {"num_cpus": each}, sum(count // each for count in cores), each


class _Worker:
    """Writes shards, in a process of Ray's. It dies with its process alone: what elf-rt refuses is told in the row, for
    it would be refused again."""

    def __init__(self, job: Job, threads: int | None) -> None:
        self._job, self._threads = job, threads

    @cached_property
    def _model(self) -> Model:
        job = self._job
        return load(job.bundle, job.backend, precision=job.precision, threads=self._threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job, records, lines, error = self._job, json.loads(row["records"]), "", ""
        prompts = [record["input"] for record in records] if "input" in records[0] else None
        n = job.n if prompts else job.n * len(records)
        try:
            results = self._model.generate(prompts, n, seed=int(row["seed"]), **job.sampling)
        except ElfError as refused:
            error = str(refused)
        else:
            texts = [{**records[k // job.n], **result.to_json()} for k, result in enumerate(results)]
            lines = "".join(json.dumps(text, ensure_ascii=False, allow_nan=False) + "\n" for text in texts)
        return {
            "number": row["number"],
            "lines": lines,
            "error": error,
            "worker": f"{platform.node()}:{os.getpid()}",
        }
