"""From seed to token ids on a GPU: elf-rt against torch, for the released model sizes with random weights.

    python benchmarks/gpu.py --output docs

writes gpu.json and two pictures and prints one table, in under 9 minutes: what does not fit in --minutes is left out
and named, and so is at once what this machine cannot run. --smoke runs the script itself on the CPU, with a tiny model.

"torch" rows are what a strong user of torch writes (``gpu_baseline``); speeds of elf-rt are quoted against the best of
them. "official" rows follow the official code: attention spelt out, float32 without TF32 around bfloat16 blocks, one
call at a time. All samplers make N denoising calls and the decoding one. A time is the whole sample's, ids on the host;
TFLOP/s count the products of all calls, and the share is of an FP16 product of 8192^3 in the same run.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import elf_rt
from elf_rt.device.cudart import Gpu, find_gpu
from elf_rt.params import RELEASED, ModelConfig, SamplingParams

if TYPE_CHECKING:
    from gpu_systems import Opened, Sample, Setting, System

TINY = replace(RELEASED["ELF-B"], depth=2, hidden_size=64, num_heads=2, head_dim=32, mlp_dim=96, latent_dim=16)
TINY = replace(TINY, bottleneck_dim=16, vocab_size=96, max_length=32)
SECONDS_EACH = 3.0  # of timed repeats
COLUMNS = {
    "model": "6", "batch": "5", "system": "20", "p50_ms": "9.1f", "p95_ms": "9.1f", "ms_per_call": "11.3f",
    "tokens_per_s": "12.0f", "tflops": "7.0f", "share": "6.2f", "memory_gb": "9.2f", "against_torch": "13.2f",
}  # fmt: skip


def versions(device: str) -> dict[str, str]:
    """Of what decides how fast this is."""
    import torch

    from elf_rt.backends.torch_attention import cudnn_version, usable
    from elf_rt.backends.torch_tuning import triton_version

    found = {"elf-rt": elf_rt.__version__, "torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    found |= {"cuDNN": cudnn_version() or "none", "Triton": triton_version() or "none"}
    if device == "cuda":
        attentions, absent = usable(torch.bfloat16)
        found |= {"attention": ", ".join(a.library for a in attentions[:-1]) or attentions[-1].library}
        found |= {f"no {name}": reason for name, reason in absent.items()}
    return found


def matmul_ceiling(device: str) -> float:
    """TFLOP/s of an FP16 product of random numbers, 8192^3 on a GPU; the best of several, after a second of work."""
    import torch

    n, dtype = (8192, torch.float16) if device == "cuda" else (256, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times, end = [], time.monotonic() + (2 if device == "cuda" else 0.05)
    while time.monotonic() < end or len(times) < 2:
        begun = time.perf_counter()
        for _ in range(10):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / 10)
    return 2 * n**3 / min(times) / 1e12


def flops(config: ModelConfig, steps: int) -> float:
    """Of the products of a text: N + 1 calls of the network, and the token head once."""
    tokens, hidden = config.num_prefix_tokens + config.max_length, config.hidden_size
    heads = config.num_heads * config.head_dim
    block = 2 * tokens * (4 * hidden * heads + 3 * hidden * config.mlp_dim) + 4 * tokens**2 * heads
    latents = 3 * config.latent_dim * config.bottleneck_dim + config.bottleneck_dim * hidden
    ends = 2 * config.max_length * (latents + hidden * config.latent_dim)
    head = 2 * config.max_length * config.latent_dim * (hidden + config.vocab_size)
    return (steps + 1) * (config.depth * block + ends) + head


def measure(sample: "Sample", batch: int, setting: "Setting") -> dict[str, float]:
    """Wall times of whole samples after a first one, which sets everything up."""
    begun = time.perf_counter()
    sample(batch, 0)
    first = time.perf_counter() - begun
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
        "first_s": first,
        "memory_gb": (total - free) / 1e9,
    }


def run(setting: "Setting", ceiling: float) -> Iterator[dict[str, Any]]:
    """One row for each system, model and batch; those that could not be measured have a `reason`. All systems on the
    first model come before the other models."""
    from gpu_systems import systems

    usable = []
    for system in systems(setting.device):
        if system.reason:
            print(f"skips {system.name}: {system.reason}", flush=True)
            yield {"system": system.name, "reason": system.reason}
        else:
            usable.append(system)
    print("  ".join(f"{name:>{form.partition('.')[0]}}" for name, form in COLUMNS.items()), flush=True)
    for model, config in setting.models.items():
        torchs: dict[int, float] = {}  # the best milliseconds of torch by batch
        for system in usable:
            for row in _run_system(system, model, config, setting):
                if "p50_ms" in row:
                    _add_rates(row, config, setting.params.steps, ceiling, torchs)
                print(_line(row), flush=True)
                yield row
            _free_memory(setting.device)


def _run_system(system: "System", model: str, config: ModelConfig, setting: "Setting") -> Iterator[dict[str, Any]]:
    place = {"model": model, "system": system.name}
    if time.monotonic() > setting.deadline:
        yield place | {"reason": "out of time"}
        return
    try:
        with system.open(config, setting) as opened:
            for batch in setting.batches:
                if time.monotonic() > setting.deadline:
                    yield place | {"batch": batch, "reason": "out of time"}
                    continue
                row = place | {"batch": batch, **measure(opened.sample, batch, setting)}
                yield row | _details(opened, system, batch, setting)
    except Exception as error:  # one system that fails must not hide the others
        yield place | {"reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def _details(opened: "Opened", system: "System", batch: int, setting: "Setting") -> dict[str, Any]:
    """What runs, and where a sample's time goes by kernel."""
    found: dict[str, Any] = {"runs": dict(opened.describe())}
    if system.name == "elf-rt torch" and setting.device == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            opened.sample(batch, 1)
        events = [event for event in trace.key_averages() if event.self_device_time_total]
        events.sort(key=lambda event: -event.self_device_time_total)
        calls = setting.params.steps + 1
        found["kernels_per_call"] = sum(event.count for event in events) / calls
        found["memsets_per_call"] = sum(event.count for event in events if "emset" in event.key) / calls
        found["us_per_call"] = {event.key[:80]: event.self_device_time_total / calls for event in events[:16]}
    return found


def _add_rates(row: dict[str, Any], config: ModelConfig, steps: int, ceiling: float, torchs: dict[int, float]) -> None:
    batch, seconds = row["batch"], row["p50_ms"] / 1e3
    row["ms_per_call"] = row["p50_ms"] / (steps + 1)
    row["tokens_per_s"] = batch * config.max_length / seconds
    row["tflops"] = batch * flops(config, steps) / seconds / 1e12
    row["share"] = row["tflops"] / ceiling
    if row["system"].startswith("torch"):
        torchs[batch] = min(row["p50_ms"], torchs.get(batch, float("inf")))
    if batch in torchs:
        row["against_torch"] = torchs[batch] / row["p50_ms"]


def _line(row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"{row['model']} {row['system']} {row.get('batch', '')}: {row['reason']}"
    return "  ".join(f"{row.get(key, float('nan')):{form}}" for key, form in COLUMNS.items())


def finished_table(rows: list[dict[str, Any]]) -> str:
    """The best of elf-rt against the best of torch, by model and batch; measured rows alone."""
    lines = ["model   batch   elf-rt ms   torch ms   faster   TFLOP/s   of the ceiling"]
    places = dict.fromkeys((row["model"], row["batch"]) for row in rows)
    for model, batch in places:
        here = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        ours, torchs = (
            min((row for row in here if row["system"].startswith(kind)), key=lambda row: row["p50_ms"], default=None)
            for kind in ("elf-rt", "torch")
        )
        if ours and torchs:
            faster = torchs["p50_ms"] / ours["p50_ms"]
            figures = f"{ours['p50_ms']:9.1f}   {torchs['p50_ms']:8.1f}   {faster:4.2f} x"
            lines.append(f"{model:7} {batch:5}   {figures}   {ours['tflops']:7.0f}   {ours['share']:14.2f}")
    return "\n".join(lines)


def _memory(device: str) -> tuple[int, int]:
    """Free and all bytes of the GPU."""
    if device == "cpu":
        return 0, 0
    import torch

    return torch.cuda.mem_get_info()


def _free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.compiler.reset()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ELF-B,ELF-M,ELF-L", help="comma-separated: " + ", ".join(RELEASED))
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=6.0, help="begin nothing new after this time")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for gpu.json and the pictures")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    return parser.parse_args()


def main() -> None:
    arguments, gpu, begun = parse_arguments(), find_gpu(), time.monotonic()
    if not arguments.smoke and not isinstance(gpu, Gpu):
        print(f"nothing to measure: {gpu}")
        return
    try:
        from gpu_pictures import draw_batches, draw_systems
        from gpu_systems import Setting
    except ImportError as error:
        print(f"nothing to measure: {error}: pip install '.[torch,export,plot]' here")
        return
    device = "cpu" if arguments.smoke else "cuda"
    models = {"tiny": TINY} if arguments.smoke else {name: RELEASED[name] for name in arguments.models.split(",")}
    batches = (1, 2) if arguments.smoke else tuple(int(batch) for batch in arguments.batches.split(","))
    params = SamplingParams(steps=3 if arguments.smoke else arguments.steps)
    setting = Setting(models, batches, params, device, begun + 60 * arguments.minutes)
    machine = f"{platform.system()} {platform.machine()}" if isinstance(gpu, str) else gpu.name
    libraries, ceiling = versions(device), matmul_ceiling(device)
    print(", ".join([machine, *(f"{name} {version}" for name, version in libraries.items())]))
    print(f"the ceiling, one large product: {ceiling:.3g} TFLOP/s", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    study = {"machine": machine, "versions": libraries, "ceiling_tflops": ceiling, "params": asdict(params)}
    for row in run(setting, ceiling):
        rows.append(row)  # and written at once: a run that is cut short keeps what it measured
        study |= {"seconds": time.monotonic() - begun, "rows": rows}
        (arguments.output / "gpu.json").write_text(json.dumps(study, indent=1) + "\n")
    measured = [row for row in rows if "p50_ms" in row]
    if not measured:
        return
    title, first = f"{machine}: SDE, {params.steps} steps", next(iter(models))
    draw_systems(measured, f"{title}, {models[first].max_length} tokens", arguments.output / "gpu.png")
    least = flops(models[first], params.steps) / ceiling / 1e9  # ms
    draw_batches(measured, measured[0]["model"], least, title, arguments.output / "gpu-batch.png")
    print(finished_table(measured))


if __name__ == "__main__":
    main()
