"""What benchmarks/gpu.py compares: elf-rt on its backends, torch used well, torch as the official code uses it."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_baseline import strong

import elf_rt
from elf_rt import backends
from elf_rt.bundle import Bundle, write_manifest
from elf_rt.export import reference, replay
from elf_rt.export.graph import variant_files, write_graphs
from elf_rt.export.precision import Precision, PrecisionPlan
from elf_rt.export.random_init import random_state
from elf_rt.params import ModelConfig, SamplingParams

Sample = Callable[[int, int], object]  # (batch, seed) -> token ids on the host


@dataclass(frozen=True)
class Opened:
    """A system with a model loaded. describe: what runs, once it ran."""

    sample: Sample
    describe: Callable[[], Mapping[str, str]] = dict


@dataclass(frozen=True)
class System:
    """open: (config, setting) -> a context. reason: why it cannot run here."""

    name: str
    open: Callable[["ModelConfig", "Setting"], AbstractContextManager[Opened]]
    reason: str | None

    @property
    def ours(self) -> bool:
        return self.name.startswith("elf-rt")


@dataclass(frozen=True)
class Setting:
    """What to run on. device: "cuda" or "cpu"."""

    models: dict[str, ModelConfig]
    batches: tuple[int, ...]
    params: SamplingParams
    device: str
    deadline: float  # of time.monotonic


@contextmanager
def official(config: ModelConfig, setting: Setting, *, compiled: bool) -> Iterator[Opened]:
    """The official sampler in torch: attention spelt out, float32 without TF32 around bfloat16 blocks, no graph."""

    class InBfloat16(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *inputs: torch.Tensor) -> Any:
            with torch.autocast(setting.device, torch.bfloat16):
                return self.block(*inputs)

    model = reference.ELF(config)
    model.load_state_dict(random_state(config, seed=0))
    model.blocks = torch.nn.ModuleList(map(InBfloat16, model.blocks))
    model.to(setting.device).requires_grad_(False)
    tables = reference.rotary_tables(config.num_prefix_tokens, config.max_length, config.head_dim)
    on_device = tuple(table.to(setting.device) for table in tables)
    made_each_call, reference.rotary_tables = reference.rotary_tables, lambda *sizes: on_device
    network: Any = torch.compile(model, dynamic=False) if compiled else model
    steps = setting.params.steps

    def sample(batch: int, seed: int) -> object:
        torch.manual_seed(seed)
        shape = (batch, config.max_length, config.latent_dim)
        inner = torch.sigmoid(config.p_mean + config.p_std * torch.randn(steps - 1)).sort().values
        grid = torch.cat([torch.zeros(1), inner, torch.ones(1)])
        with torch.device(setting.device):
            noise = torch.randn(steps, *shape)
            run = replay.Run(setting.params, grid, config.noise_scale * noise[0], noise[1:])
            return replay.sample(network, run)[1].cpu()

    try:
        yield Opened(sample)
    finally:
        reference.rotary_tables = made_each_call


@contextmanager
def ours(config: ModelConfig, setting: Setting, *, backend: str) -> Iterator[Opened]:
    """FP16 graphs of random weights, over a backend."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder) / "model.elfrt", config)
        if backend.startswith("tensorrt"):
            build_plan(bundle, backend, setting.batches)
        with elf_rt.load(bundle.folder, backend, precision="fp16") as model:

            def sample(batch: int, seed: int) -> object:
                return model.sample(seeds=np.arange(batch) + seed, params=setting.params, latents=False).ids

            yield Opened(sample, model.backend.describe)


def make_bundle(folder: Path, config: ModelConfig) -> Bundle:
    """FP16 graphs with random weights."""
    (folder / "fp16").mkdir(parents=True)
    state = {name: tensor.numpy() for name, tensor in random_state(config, seed=0).items()}
    write_graphs(folder / "fp16", config, state, PrecisionPlan(Precision.FP16))
    variants = {"fp16": variant_files("fp16/")}
    presets = {"default": SamplingParams()}
    source = {"checkpoint": "random weights", "sha256": "", "weights": "random"}
    manifest = {"model": config, "presets": presets, "variants": variants, "source": source}
    write_manifest(folder, manifest)
    return Bundle.open(folder)


def build_plan(bundle: Bundle, target: str, batches: tuple[int, ...]) -> None:
    from elf_rt.engines.build import PlanRequest, build, plan_spec
    from elf_rt.engines.recipe import RECIPES
    from elf_rt.engines.shapes import parse_profiles
    from elf_rt.plans import this_machine

    machine = this_machine()
    assert machine.gpu is not None
    profiles = parse_profiles(",".join(map(str, batches)), None, bundle.config)
    build(plan_spec(bundle, RECIPES[target], machine, PlanRequest("fp16", (machine.gpu.sm,), profiles)))


def systems(device: str) -> list[System]:
    """In the order in which they run: what is left of the time goes to the last."""
    cannot = backends.discover()

    def why(backend: str) -> str | None:
        return "needs a GPU" if device == "cpu" else cannot[backend]

    here = why("torch") if device == "cuda" else None

    def well(mode: str | None) -> Callable[[ModelConfig, Setting], AbstractContextManager[Opened]]:
        @contextmanager
        def opened(config: ModelConfig, setting: Setting) -> Iterator[Opened]:
            with strong(config, setting.params, setting.device, mode) as sample:
                yield Opened(sample)

        return opened

    return [
        System("torch, default", well(""), why("torch")),
        System("elf-rt torch", partial(ours, backend="torch"), why("torch")),
        System("elf-rt TensorRT", partial(ours, backend="tensorrt"), why("tensorrt")),
        System("elf-rt TensorRT-RTX", partial(ours, backend="tensorrt-rtx"), why("tensorrt-rtx")),
        System("elf-rt ONNX Runtime", partial(ours, backend="onnxruntime-cuda"), why("onnxruntime-cuda")),
        System("torch, max-autotune", well("max-autotune-no-cudagraphs"), why("torch")),  # the graph is our own
        System("torch, not compiled", well(None), here),
        System("official, compiled", partial(official, compiled=True), why("torch")),
        System("official, eager", partial(official, compiled=False), here),
        *([System("elf-rt on the CPU", partial(ours, backend="onnxruntime"), None)] if device == "cpu" else []),
    ]
