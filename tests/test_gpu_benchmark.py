"""benchmarks/gpu.py where there is no GPU: it says what is missing, and runs on the CPU when asked to."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from fake_gpu import install_gpu

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
    assert measured == {(name, batch) for name in ("elf-rt torch, graph", "torch eager bf16") for batch in (1, 2)}
    assert all(row["p95_ms"] >= row["p50_ms"] > row["ms_per_call"] > 0 for row in rows if "p50_ms" in row)
    assert {row["system"] for row in rows if row.get("reason") == "needs a GPU"} > {"elf-rt TensorRT"}
    assert "elf-rt TensorRT: needs a GPU" in capsys.readouterr().out
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_system_that_fails_does_not_hide_the_others(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("it broke\nand how")

    monkeypatch.setattr(benchmark, "ours", broken)
    monkeypatch.setattr(benchmark, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--output", str(tmp_path)])
    benchmark.main()
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert [row["reason"] for row in rows if row["system"] == "elf-rt torch, graph"] == ["RuntimeError: it broke"]
    assert any(row["system"] == "torch eager bf16" and "p50_ms" in row for row in rows)


def test_what_was_measured_is_kept_when_the_run_is_cut_short(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cut_short(setting: object) -> Iterator[dict[str, object]]:
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


def test_bandwidth_times_the_samplers_own_graph(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = install_gpu(monkeypatch)
    measured = benchmark.integrator_bandwidth(batch=2, length=3, width=8)
    assert gpu.launches["graph"] == 60  # 20 samples, 20 rounds of copies, and as many before them
    assert measured["share_of_copy"] == pytest.approx(measured["gb_per_s"] / measured["copy_gb_per_s"])
    assert gpu.allocated() == gpu.allocated("host") == gpu.num_streams == 0
