"""Bundle to plans: one TensorRT engine for each graph of a variant, with a record of what they are.

    spec = plan_spec(bundle, recipe, machine, PlanRequest("fp16", (86, 89), profiles))
    record = find_built(spec.target, spec.key) or build(spec)

Nothing is written until both engines exist in memory, so a build that fails or is killed leaves nothing behind.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from elf_rt.bundle import Bundle
from elf_rt.engines.network import count_types, parse, set_attention
from elf_rt.engines.recipe import Recipe
from elf_rt.engines.shapes import input_shape
from elf_rt.engines.store import find_built, new_plan
from elf_rt.errors import BackendError
from elf_rt.files import atomic_file
from elf_rt.network import GRAPHS
from elf_rt.plans import Engine, Machine, Profile, Record, graph_hashes, make_log

KEY_LETTERS = 16
BUILDER_REVISION = 1  # part of the key: raise it when the same request would give another plan
NO_FUSED_ATTENTION = "not supported by a dedicated kernel"
DEFAULT_OPT_LEVEL = 3


@dataclass(frozen=True)
class PlanRequest:
    """What to build. sms: the compute capabilities of one plan. opt_level: 0 (quick build) to 5 (long search)."""

    precision: str
    sms: tuple[int, ...]
    profiles: tuple[Profile, ...]
    opt_level: int = DEFAULT_OPT_LEVEL


@dataclass(frozen=True)
class Spec:
    """One plan folder to be: everything that goes into its key."""

    request: PlanRequest
    recipe: Recipe
    version: str
    os: str
    gpu: str | None
    graphs: dict[str, Path]
    hashes: dict[str, str]
    settings: dict[str, Any]
    key: str
    target: Path


def plan_spec(bundle: Bundle, recipe: Recipe, machine: Machine, request: PlanRequest) -> Spec:
    """Check the graphs and name the plan.

    Raises:
        BackendError: the library is absent or too old. BundleError: a graph is missing or altered.
    """
    version = str(recipe.library.load().__version__)
    recipe.check_version(version)
    graphs = bundle.variant(request.precision)
    # TensorFloat-32 rounds factors to 11 bits: as good as FP16 beside FP16, and not what fp32 asks for.
    settings = {
        "opt_level": request.opt_level,
        "tf32": request.precision != "fp32",
        "flags": list(recipe.flags),
        "revision": BUILDER_REVISION,
    }
    made_from: dict[str, Any] = {
        "library": recipe.library.name,
        "version": version,
        "sms": request.sms,
        "gpu": None if recipe.sms or machine.gpu is None else machine.gpu.name,
    }
    hashes = graph_hashes(bundle, request.precision)
    key = _plan_key(
        **made_from,
        os=machine.os,
        precision=request.precision,
        profiles=request.profiles,
        graphs=hashes,
        settings=settings,
    )
    target = bundle.plans_dir / _folder_name(**made_from, key=key)
    return Spec(request, recipe, version, machine.os, made_from["gpu"], graphs, hashes, settings, key, target)


def _plan_key(**made_from: Any) -> str:
    """Of everything that made a plan, so that the same request finds the same plan."""
    text = json.dumps(
        made_from, sort_keys=True, separators=(",", ":"), default=vars
    )  # vars of elf_rt.plans' dataclasses
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LETTERS]


def _folder_name(*, sms: tuple[int, ...], gpu: str | None, library: str, version: str, key: str) -> str:
    """For people: nothing reads meaning from it."""
    place = "-".join(f"sm{sm}" for sm in sms)
    if gpu:
        place += "-" + "".join(letter if letter.isalnum() else "-" for letter in gpu.lower()).strip("-")
    return f"{place}-{library}-{version}-{key}"


def build(
    spec: Spec,
    timing_cache: Path | None = None,
    on_graph: Callable[[str], None] = lambda name: None,
    prove: Callable[[Path, Record], Record] = lambda folder, record: record,
) -> Record:
    """Build both engines and store them under ``spec.target``.

    Args:
        timing_cache: a file of kernel timings, read if it exists and written afterwards (TensorRT only).
        on_graph: called with the name of each graph when its build starts.
        prove: given the finished folder before it is published; returns the record with what it found, or raises.

    Raises:
        BackendError: the library refused; its own reasons are in the message.
    """
    engines: dict[str, Engine] = {}
    plans: dict[str, Any] = {}
    for name in GRAPHS:
        on_graph(name)
        plans[name], engines[name] = _in_thread(partial(_build_graph, spec, name, timing_cache))
    request = spec.request
    record = Record(
        key=spec.key,
        library=spec.recipe.library.name,
        version=spec.version,
        sms=request.sms,
        gpu=spec.gpu,
        os=spec.os,
        precision=request.precision,
        profiles=request.profiles,
        graphs=spec.hashes,
        settings=spec.settings,
        engines=engines,
        not_replayed="nobody asked for it",
    )
    with new_plan(spec.target, spec.key) as folder:
        for graph, plan in plans.items():
            (folder / engines[graph].file).write_bytes(plan)
        record.write(folder)
        record = prove(folder, record)
        record.write(folder)
    return find_built(spec.target, spec.key) or record


def _build_graph(spec: Spec, name: str, timing_cache: Path | None, stop: threading.Event) -> tuple[Any, Engine]:
    """(serialised plan, what building it told). Attention is asked to be fused, and opened only if it cannot be."""
    trt = spec.recipe.library.load()
    begun = time.monotonic()
    for insist in (True, False):
        log = make_log(trt)
        builder = trt.Builder(log)
        network, _parser = parse(trt, builder, log, spec.graphs[name], spec.recipe)
        attention = set_attention(trt, network, insist=insist)
        products, computing = count_types(network)
        config = _config(trt, builder, network, spec, timing_cache, stop)
        plan = builder.build_serialized_network(network, config)
        if plan is not None or not attention.get("fused") or NO_FUSED_ATTENTION not in log.errors():
            break
    if plan is None:
        raise BackendError(
            f"{spec.recipe.library.title} {spec.version} cannot build {spec.graphs[name]}: {log.errors()}"
        )
    if timing_cache is not None and spec.recipe.timing_cache:
        with atomic_file(timing_cache) as path:
            path.write_bytes(config.get_timing_cache().serialize())
    data = memoryview(plan)
    engine = Engine(
        file=f"{name}.plan",
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=data.nbytes,
        seconds=round(time.monotonic() - begun, 2),
        weights_bytes=_said(log, "Total Weights Memory"),
        scratch_bytes=_said(log, "Total Activation Memory"),
        attention=attention,
        matmuls=products,
        layers=computing,
    )
    return data, engine


def _config(
    trt: ModuleType, builder: Any, network: Any, spec: Spec, timing_cache: Path | None, stop: threading.Event
) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = spec.request.opt_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for NVIDIA's profilers and inspector
    config.progress_monitor = _monitor_class(trt)(stop)
    if not spec.settings["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    for flag in spec.recipe.flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if spec.recipe.sms:
        config.num_compute_capabilities = len(spec.request.sms)
        for index, sm in enumerate(spec.request.sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    if spec.recipe.timing_cache:
        known = timing_cache.read_bytes() if timing_cache is not None and timing_cache.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), False):
            raise BackendError(f"{timing_cache} was timed on another GPU or version: delete it, or name another file")
    for profile in spec.request.profiles:
        shapes = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            sizes = [
                input_shape(tuple(tensor.shape), getattr(profile.rows, which), getattr(profile.length, which))
                for which in ("least", "best", "most")
            ]
            shapes.set_shape(tensor.name, *sizes)
        config.add_optimization_profile(shapes)
    return config


def _monitor_class(trt: ModuleType) -> type:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]  # a base class known only at run time
        """Lets the library stop early when the user gives up."""

        def __init__(self, stop: threading.Event) -> None:
            trt.IProgressMonitor.__init__(self)
            self._stop = stop

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not self._stop.is_set()

        def phase_finish(self, phase_name: str) -> None: ...

    return Monitor


def _in_thread(work: Callable[[threading.Event], Any]) -> Any:
    """Run ``work`` beside the main thread, which then answers Ctrl-C at once, not after minutes in the library."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        try:
            outcome = thread.submit(work, stop)
            while not outcome.done():
                wait([outcome], timeout=0.1)
        except BaseException:
            stop.set()
            raise
    return outcome.result()


def _said(log: Any, what: str) -> int | None:
    """The largest number of bytes that the builder's log gives under a heading: one line for each profile."""
    found = [re.fullmatch(rf"{what}: (\d+) bytes", text.strip()) for _, text in log.lines]
    return max((int(match[1]) for match in found if match), default=None)
