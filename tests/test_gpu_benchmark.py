"""benchmarks/gpu.py where there is no GPU: it says what is missing, and runs on the CPU when asked to."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fake_gpu import install_gpu
from golden_cases import relative_error

from elf_rt.export import reference
from elf_rt.export.random_init import random_state
from elf_rt.params import RELEASED, SamplingParams

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("gpu_benchmark", BENCHMARKS / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "find_gpu", lambda: "no NVIDIA GPU is visible")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    benchmark.main()
    assert capsys.readouterr().out == "nothing to measure: no NVIDIA GPU is visible\n"


def test_smoke_measures_what_runs_and_names_what_does_not(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--output", str(tmp_path)])
    benchmark.main()
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    measured = {(row["system"], row["batch"]) for row in rows if "p50_ms" in row}
    names = ("elf-rt on the CPU", "torch, not compiled", "official, eager")
    assert measured == {(name, batch) for name in names for batch in (1, 2)}
    assert all(row["p95_ms"] >= row["p50_ms"] > row["ms_per_call"] > 0 for row in rows if "p50_ms" in row)
    assert {row["system"] for row in rows if row.get("reason") == "needs a GPU"} > {"elf-rt TensorRT"}
    lines = capsys.readouterr().out.splitlines()
    assert "torch 2" in lines[0] and "Triton" in lines[0]
    assert lines.index("skips elf-rt TensorRT: needs a GPU") < next(
        i for i, line in enumerate(lines) if "p50_ms" in line
    )
    assert lines[-3].startswith("model") and lines[-1].split()[:2] == ["tiny", "2"]
    for picture in ("gpu.png", "gpu-batch.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_system_that_fails_does_not_hide_the_others(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("it broke\nand how")

    import gpu_systems

    monkeypatch.setattr(gpu_systems, "ours", broken)
    monkeypatch.setattr(benchmark, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--output", str(tmp_path)])
    benchmark.main()
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert [row["reason"] for row in rows if row["system"] == "elf-rt on the CPU"] == ["RuntimeError: it broke"]
    assert any(row["system"] == "official, eager" and "p50_ms" in row for row in rows)


def test_what_was_measured_is_kept_when_the_run_is_cut_short(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cut_short(setting: object, ceiling: float) -> Iterator[dict[str, object]]:
        yield {"system": "first", "p50_ms": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "run", cut_short)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--output", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        benchmark.main()
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert [row["system"] for row in rows] == ["first"]


def test_nothing_begins_after_the_deadline(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--minutes", "0", "--output", str(tmp_path)])
    benchmark.main()
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert {row["reason"] for row in rows} == {"out of time", "needs a GPU"}


def test_without_a_library_it_says_so(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "gpu_pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke"])
    monkeypatch.setattr(benchmark, "find_gpu", lambda: "no NVIDIA GPU is visible")
    benchmark.main()
    out = capsys.readouterr().out
    assert out.startswith("nothing to measure: ") and "matplotlib" in out and out.count("\n") == 1


def test_the_strong_baseline_is_the_official_sampler(benchmark: ModuleType) -> None:
    """Its latents, with the same noise, within what bfloat16 does to the official ones."""
    import gpu_baseline

    from elf_rt.export import replay

    config, params = benchmark.TINY, SamplingParams(steps=4)
    network = gpu_baseline.Network(config).requires_grad_(False)
    sampler = gpu_baseline.Sampler(network, network.model.discretize_logits, config, params, 3, "cpu")
    with torch.inference_mode():
        ids = sampler.sample(seed=7)
    torch.manual_seed(7)  # and the same draws in the same order
    inner = torch.sigmoid(config.p_mean + config.p_std * torch.randn(3)).sort().values
    grid = torch.cat([torch.zeros(1), inner, torch.ones(1)])
    z0, eps = (torch.empty(n, 3, config.max_length, config.latent_dim) for n in (1, 4))
    for noise in (*z0, *eps):
        noise.normal_()
    official = reference.ELF(config)
    official.load_state_dict(random_state(config, seed=0))
    z, official_ids = replay.sample(official, replay.Run(params, grid, config.noise_scale * z0[0], eps))
    assert 1e-5 < relative_error(sampler.z, z) < 0.02
    assert (ids == official_ids).float().mean() > 0.9


def test_operations_are_those_of_the_measured_profile(benchmark: ModuleType) -> None:
    """216.8 GFLOP a call of ELF-B, counted from its kernels; the token head adds 34."""
    config = RELEASED["ELF-B"]
    call = benchmark.flops(config, 1) - benchmark.flops(config, 0)
    assert call == pytest.approx(216.8e9, rel=0.01)
    assert benchmark.flops(config, 0) - call == pytest.approx(34e9, rel=0.05)


def test_bandwidth_times_the_samplers_own_graph(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = install_gpu(monkeypatch)
    from gpu_bandwidth import integrator_bandwidth

    measured = integrator_bandwidth(texts=2, length=3, width=8)
    assert (
        gpu.launches["graph"] == 62
    )  # 20 samples, 20 rounds of copies, and as many before them; two calls of the engine
    assert measured["share_of_copy"] == pytest.approx(measured["gb_per_s"] / measured["copy_gb_per_s"])
    assert gpu.allocated() == gpu.allocated("host") == gpu.num_streams == 0
