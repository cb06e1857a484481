"""From seed to token ids on a GPU: elf-rt against torch, for the released model sizes with random weights.

    python benchmarks/gpu.py --output docs

writes gpu.json and gpu.png and prints the table, in under 10 minutes: what does not fit in --minutes is left out and
named (TensorRT builds its plans first, which takes most of the time), and so is what this machine cannot run.
--smoke runs the script itself on the CPU, with a tiny model.

Baselines follow the official code: float32 residual, bfloat16 blocks, one call of the network at a time, noise drawn on
the GPU. All samplers make N denoising calls and the decoding one. A time is the whole sample's, ids on the host.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu_bandwidth import integrator_bandwidth

import elf_rt
from elf_rt import backends
from elf_rt.bundle import Bundle, write_manifest
from elf_rt.device.cudart import Gpu, find_gpu
from elf_rt.params import RELEASED, ModelConfig, SamplingParams

Sample = Callable[[int, int], object]  # (batch, seed) -> token ids on the host

TINY = replace(RELEASED["ELF-B"], depth=2, hidden_size=64, num_heads=2, head_dim=32, mlp_dim=96, latent_dim=16)
TINY = replace(TINY, bottleneck_dim=16, vocab_size=96, max_length=32)
SECONDS_EACH = 3.0  # of timed repeats
COLUMNS = {
    "model": "6", "batch": "5", "system": "22", "p50_ms": "9.1f", "p95_ms": "9.1f", "ms_per_call": "11.3f",
    "tokens_per_s": "12.0f", "memory_gb": "9.2f", "integrator_share": "16.3f",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What to run on. device: "cuda" or "cpu"."""

    models: dict[str, ModelConfig]
    batches: tuple[int, ...]
    params: SamplingParams
    device: str
    deadline: float  # of time.monotonic


@contextmanager
def torch_baseline(config: ModelConfig, setting: Setting, *, compiled: bool) -> Iterator[Sample]:
    """The official sampler in torch."""
    import torch

    from elf_rt.export import reference, replay
    from elf_rt.export.random_init import random_state

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
        yield sample
    finally:
        reference.rotary_tables = made_each_call


@contextmanager
def ours(config: ModelConfig, setting: Setting, *, backend: str) -> Iterator[Sample]:
    """The device sampler over a backend, FP16."""
    from elf_rt.backends.torch_cuda import TorchBackend
    from elf_rt.model import Model

    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder) / "model.elfrt", config)
        if backend.startswith("tensorrt"):
            build_plan(bundle, backend, setting.batches)
        if setting.device == "cpu":
            model = Model(bundle, TorchBackend(bundle, "fp16", "cpu"), "to see that the script runs")
        else:
            model = elf_rt.load(bundle.folder, backend, precision="fp16")

        def sample(batch: int, seed: int) -> object:
            return model.sample(seeds=np.arange(batch) + seed, params=setting.params, latents=False).ids

        with model:
            yield sample


def make_bundle(folder: Path, config: ModelConfig) -> Bundle:
    """FP16 graphs with random weights."""
    from elf_rt.export.graph import write_graphs
    from elf_rt.export.precision import Precision, PrecisionPlan
    from elf_rt.export.random_init import random_state

    (folder / "fp16").mkdir(parents=True)
    state = {name: tensor.numpy() for name, tensor in random_state(config, seed=0).items()}
    names = write_graphs(folder / "fp16", config, state, PrecisionPlan(Precision.FP16))
    variants = {"fp16": {Path(name).stem: f"fp16/{name}" for name in names}}
    presets = {"default": SamplingParams().to_json()}
    manifest = {"model": config.to_json(), "presets": presets, "variants": variants, "tokenizer": {}, "encoder": None}
    write_manifest(folder, manifest)
    return Bundle.open(folder)


def build_plan(bundle: Bundle, target: str, batches: tuple[int, ...]) -> None:
    from elf_rt.engines.build import Request, build, plan_spec
    from elf_rt.engines.recipe import Recipe
    from elf_rt.engines.shapes import parse_profiles
    from elf_rt.plans import this_machine

    machine = this_machine()
    assert machine.gpu is not None
    profiles = parse_profiles(",".join(map(str, batches)), None, bundle.config)
    build(plan_spec(bundle, Recipe.load(target), machine, Request("fp16", (machine.gpu.sm,), profiles)))


def systems(device: str) -> dict[str, tuple[Any, dict[str, Any], str | None]]:
    """By name: how to open it, its options, and why it cannot run here."""
    cannot = {a.name: a.reason for a in backends.discover()}

    def why(backend: str) -> str | None:
        return "needs a GPU" if device == "cpu" else cannot[backend]

    on_cpu_too = why("torch") if device == "cuda" else None

    return {
        "elf-rt torch, graph": (ours, {"backend": "torch"}, on_cpu_too),
        "torch eager bf16": (torch_baseline, {"compiled": False}, on_cpu_too),
        "torch.compile bf16": (torch_baseline, {"compiled": True}, why("torch")),
        "elf-rt TensorRT": (ours, {"backend": "tensorrt"}, why("tensorrt")),
        "elf-rt TensorRT-RTX": (ours, {"backend": "tensorrt-rtx"}, why("tensorrt-rtx")),
        "elf-rt ONNX Runtime": (ours, {"backend": "onnxruntime-cuda"}, why("onnxruntime-cuda")),
    }


def measure(sample: Sample, batch: int, setting: Setting) -> dict[str, float]:
    """Wall times of whole samples after a first one, which sets everything up."""
    sample(batch, 0)
    free, total = _memory(setting.device)
    times: list[float] = []
    while len(times) < 2 or (sum(times) < SECONDS_EACH and len(times) < 100 and time.monotonic() < setting.deadline):
        begun = time.perf_counter()
        sample(batch, 1 + len(times))
        times.append(time.perf_counter() - begun)
    return {
        "p50_ms": 1e3 * statistics.median(times),
        "p95_ms": 1e3 * sorted(times)[int(0.95 * (len(times) - 1) + 0.5)],
        "repeats": len(times),
        "memory_gb": (total - free) / 1e9,
    }


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """One row for each system, model and batch; those that could not be measured have a `reason`."""
    integrator = {batch: _integrator(batch, setting) for batch in setting.batches}
    for name, (opened, options, reason) in systems(setting.device).items():
        if reason:
            print(f"{name}: {reason}", flush=True)
            yield {"system": name, "reason": reason}
            continue
        for model, config in setting.models.items():
            try:
                yield from _run_model(name, model, config, opened(config, setting, **options), integrator, setting)
            except Exception as error:  # one system that fails must not hide the others
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                print(f"{model} {name}: {reason}", flush=True)
                yield {"model": model, "system": name, "reason": reason}
            _free_memory(setting.device)


def _run_model(
    name: str, model: str, config: ModelConfig, opened: Any, integrator: dict[int, dict[str, float]], setting: Setting
) -> Iterator[dict[str, Any]]:
    if time.monotonic() > setting.deadline:
        print(f"{model} {name}: out of time", flush=True)
        yield {"model": model, "system": name, "reason": "out of time"}
        return
    with opened as sample:
        for batch in setting.batches:
            row: dict[str, Any] = {"model": model, "batch": batch, "system": name}
            if time.monotonic() > setting.deadline:
                yield row | {"reason": "out of time"}
                continue
            row |= measure(sample, batch, setting)
            seconds, steps = row["p50_ms"] / 1e3, setting.params.steps
            row["ms_per_call"] = row["p50_ms"] / (steps + 1)
            row["tokens_per_s"] = batch * config.max_length / seconds
            if name.startswith("elf-rt") and "step_ms" in integrator[batch]:
                row["integrator_share"] = integrator[batch]["step_ms"] * (steps + 2) / row["p50_ms"]
                row["integrator"] = integrator[batch]
            print("  ".join(f"{row.get(key, float('nan')):{form}}" for key, form in COLUMNS.items()), flush=True)
            yield row


def _integrator(batch: int, setting: Setting) -> dict[str, float]:
    """The step kernel alone: all models have the same latents."""
    if setting.device == "cpu":
        return {}
    config = next(iter(setting.models.values()))
    try:
        measured = integrator_bandwidth(batch, config.max_length, config.latent_dim)
    except elf_rt.ElfError as error:
        print(f"integrator: {error}", flush=True)
        return {}
    print(
        f"integrator, batch {batch}: " + ", ".join(f"{key} {value:.4g}" for key, value in measured.items()), flush=True
    )
    return measured


def _memory(device: str) -> tuple[int, int]:
    """Free and all bytes of the GPU."""
    if device == "cpu":
        return 0, 0
    import torch

    return torch.cuda.mem_get_info()


def _free_memory(device: str) -> None:
    if device == "cuda":
        import gc

        import torch

        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """One panel a batch: milliseconds by model, one bar a system."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    measured = [row for row in rows if "p50_ms" in row]
    batches, models, names = (list(dict.fromkeys(row[key] for row in measured)) for key in ("batch", "model", "system"))
    figure, axes = plt.subplots(1, max(1, len(batches)), figsize=(5 * max(1, len(batches)), 4), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=False):
        for i, name in enumerate(names):
            bars = {row["model"]: row["p50_ms"] for row in measured if (row["batch"], row["system"]) == (batch, name)}
            places = [models.index(model) + (i - (len(names) - 1) / 2) * 0.8 / len(names) for model in bars]
            drawn = axis.bar(places, list(bars.values()), 0.8 / len(names), label=name)
            axis.bar_label(drawn, fmt="%.3g", fontsize=7, rotation=90, padding=2)
        axis.set_xticks(range(len(models)), models)
        axis.set_yscale("log")
        axis.margins(y=0.2)
        axis.set_title(f"batch {batch}")
    axes[0][0].set_ylabel("ms for a sample, median")
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ELF-B,ELF-M,ELF-L", help="comma-separated: " + ", ".join(RELEASED))
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after this time")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for gpu.json and gpu.png")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    arguments = parser.parse_args()
    gpu = find_gpu()
    if not arguments.smoke and not isinstance(gpu, Gpu):
        print(f"nothing to measure: {gpu}")
        return
    models = {"tiny": TINY} if arguments.smoke else {name: RELEASED[name] for name in arguments.models.split(",")}
    batches = (1, 2) if arguments.smoke else tuple(int(batch) for batch in arguments.batches.split(","))
    params = SamplingParams(steps=3 if arguments.smoke else arguments.steps)
    begun = time.monotonic()
    setting = Setting(
        models, batches, params, "cpu" if arguments.smoke else "cuda", deadline=begun + 60 * arguments.minutes
    )
    machine = f"{platform.system()} {platform.machine()}" if isinstance(gpu, str) else gpu.name
    print("  ".join(f"{name:>{form.partition('.')[0]}}" for name, form in COLUMNS.items()))
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for row in run(setting):
        rows.append(row)  # and written at once: a run that is cut short keeps what it measured
        study = {"machine": machine, "params": params.to_json(), "seconds": time.monotonic() - begun, "rows": rows}
        (arguments.output / "gpu.json").write_text(json.dumps(study, indent=1) + "\n")
    if not any("p50_ms" in row for row in rows):
        return
    draw(rows, f"{machine}: SDE, {params.steps} steps, {models[next(iter(models))].max_length} tokens",
         arguments.output / "gpu.png")  # fmt: skip


if __name__ == "__main__":
    main()
