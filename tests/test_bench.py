"""elf-rt bench: what it measures, compares and refuses."""

import itertools
import json
import runpy
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import GOLDEN, ROOT

from elf_rt import machine
from elf_rt.bundle import Bundle
from elf_rt.commands.bench import TINY
from elf_rt.errors import BackendError, InputError
from elf_rt.measure import bench
from elf_rt.model import Draft, Model, Timings, load


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def contender(folder, name):
    return partial(load, folder, name, precision="fp32", threads=1)


def test_contenders_write_the_same_texts_and_shares_add_up(bundle, cache):
    work = bench.Work(steps=(2, 3), batches=(1, 2), repeats=2, seed=5, prompts=["nine hundred dollars"])
    folder = bundle("spoken-to-written")
    opened = [bench.open_contender(contender(folder, name), work) for name in ("onnxruntime", "openvino")]
    ticks = []
    report = bench.measure(opened, work, "onnxruntime fp32", lambda done, total: ticks.append((done, total)))

    assert ticks[-1] == (24, 24)  # 4 settings, 2 contenders, 1 + 2 runs
    assert [entry["name"] for entry in report.contenders] == ["onnxruntime fp32", "openvino fp32"]
    assert {(row.steps, row.batch) for row in report.rows} == {(2, 1), (2, 2), (3, 1), (3, 2)}
    for row in report.rows:
        assert row.agreement == row.exact == 1.0
        assert row.network + row.integrator + row.host + row.text == pytest.approx(1.0)
        assert min(row.network, row.integrator, row.host, row.text) >= 0
        assert 0 < row.step_p50 <= row.step_p90
        assert row.tokens_per_s == pytest.approx(32 / row.sample_p50 * 1e3)  # 64 tokens less 32 of source
        assert row.speed == 1.0 or row.name != "onnxruntime fp32"


def test_agreement_is_counted_against_the_reference():
    def run(ids):
        return bench.RequestTimes([0.01, 0.03], 0.05, 0.06, 0.04, 0.005, 0.05, np.array(ids))

    runs = {"a": [run([[1, 2, 3, 4], [5, 6, 7, 8]])], "b": [run([[1, 2, 3, 0], [5, 6, 7, 8]])]}
    a, b = bench._rows(runs, 2, 2, "a", "b")
    assert (a.agreement, a.exact) == (1.0, 1.0)
    assert (b.agreement, b.exact) == (7 / 8, 1 / 2)
    assert a.step_p50 == pytest.approx(20)
    assert a.sample_p50 == pytest.approx(25)
    assert (a.network, a.integrator) == (pytest.approx(0.8), pytest.approx(0.1))


@pytest.mark.parametrize(("device", "step"), [("cpu", [2.0, 2.0, 2.0]), ("cuda", [10.0])])
def test_a_step_of_a_batch_that_one_call_does_not_hold(monkeypatch, device, step):
    """Is a step of all its pieces: 2 of 8 texts each, a step of which takes a second by this clock."""
    seconds = itertools.count()
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(seconds), process_time=lambda: 0.0))
    timings = Timings(total_ms=20_000.0, waited_ms=0.0, network_ms=0.0, integrator_ms=0.0, calls=4)
    result = SimpleNamespace(timings=timings, ids=np.zeros(3, int))

    def stream(*_, **__):
        for _ in range(2):
            yield from (Draft(k, 4, 0.0, None, 4) for k in (1, 2, 3))
            yield [result] * 4

    model = SimpleNamespace(backend=SimpleNamespace(device=device), stream=stream)
    run = bench.run_once(model, bench.Work(steps=(4,), batches=(8,), repeats=1, seed=0), 4, 8, 0)
    assert run.steps == step and run.ids.shape == (8, 3)


def test_overhead_records_the_backend_that_ran(tmp_path, monkeypatch):
    """Not the one that was asked for, which is auto."""
    names = runpy.run_path(str(ROOT / "benchmarks" / "overhead.py"))
    monkeypatch.setitem(names["main"].__globals__, "RELEASED", {"ELF-B": TINY})
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--steps", "1", "--repeats", "1", "--json", str(tmp_path / "a")])
    with pytest.raises(SystemExit):
        names["main"]()
    record = json.loads((tmp_path / "a").read_text(encoding="utf-8"))
    assert record["backend"].split()[0] in ("openvino", "onnxruntime")


def test_one_text_is_the_one_that_generate_writes(bundle):
    with contender(bundle("spoken-to-written"), "onnxruntime")() as model:
        work = bench.Work(steps=(2,), batches=(3,), repeats=1, seed=0)
        run = bench.run_once(model, work, 2, 3, seed=7)
        assert len(run.steps) == 2
        assert sum(run.steps) < run.total
        assert np.array_equal(run.ids, [result.ids for result in model.generate(n=3, seed=7, steps=2)])


def test_a_step_of_one_graph_launch_is_its_share_of_the_sample(bundle, monkeypatch):
    """On a GPU all steps are told at the end: their distances are no times."""
    from fake_gpu import FakeBackend, install_gpu

    opened = Bundle.open(bundle("uncond"))
    work = bench.Work(steps=(8,), batches=(2,), repeats=1, seed=0)
    gpu = install_gpu(monkeypatch)
    with Model(opened, lambda _: (FakeBackend(opened, gpu), "test")) as model:
        run = bench.run_once(model, work, 8, 2, seed=7)
    assert run.steps == [pytest.approx(run.sampler / 9)]  # 8 steps and the decoding call


def test_a_contender_that_fails_gives_its_memory_back(bundle):
    model = contender(bundle("uncond"), "onnxruntime")()
    work = bench.Work(steps=(0,), batches=(1,), repeats=1, seed=0)
    with pytest.raises(InputError, match="steps"):
        bench.open_contender(lambda: model, work)
    with pytest.raises(BackendError, match="closed"):
        model.generate()


def test_random_tiny_beside_torch(run_cli, tmp_path):
    done = run_cli(
        *("bench", "--random", "tiny", "--vs", "torch-eager", "--repeats", "1", "--steps", "1,2", "--batch", "1,3"),
        *("--plot", tmp_path / "bench.png", "--json", "--threads", "1"),
    )
    assert done.code == 0, done.err
    result = json.loads(done.out)
    names = [entry["name"] for entry in result["contenders"]]
    assert {"onnxruntime fp32", "openvino fp32", "torch-eager fp32"} <= set(names)
    assert result["baseline"] == "torch-eager fp32"
    assert len(result["rows"]) == 4 * len(names)
    assert all(row["agreement"] > 0.99 for row in result["rows"] if row["name"].endswith("fp32"))
    assert all(entry["load_s"] > 0 and entry["threads"] == "1" for entry in result["contenders"])
    assert {"cpu", "isa", "cores", "versions"} <= set(result["machine"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_table_of_a_bundle(run_cli, bundle):
    done = run_cli("bench", bundle("uncond"), "--backends", "onnxruntime", "--steps", "2", "--repeats", "1")
    assert done.code == 0, done.err
    table = [line for line in done.out.splitlines() if line.startswith("onnxruntime fp32")]
    assert len(table) == 3  # speed and agreement, where the time goes, loading
    assert "1.0000" in table[0] and table[1].count("%") == 4
    assert max(map(len, done.out.splitlines())) <= 110
    assert "\x1b" not in done.out + done.err  # no colours, no progress off a terminal


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backends", "cuda"), ("cuda", "onnxruntime")),
        (("--vs", "jax"), ("jax", "torch-eager")),
        (("--vs", "torch-eager"), ("--checkpoint",)),
        (("--checkpoint", "x"), ("--checkpoint has no use without --vs",)),
        (("--steps", "²"), ("--steps", "²")),
        (("--steps", "0"), ("--steps", "0")),
        (("--batch", "two"), ("--batch", "two")),
        (("--batch", "99999999999999999999"), ("--batch", "1<=x<=9999")),
        (("--plot", "picture.txt"), (".png",)),
        (("--plot", "no/such/folder.png"), ("no/such",)),
        (("--preset", "none"), ("default",)),
        (("--random", "tiny"), ("BUNDLE", "--random")),
    ],
)
def test_clear_errors(run_cli, bundle, arguments, words):
    run_cli("bench", bundle("uncond"), *arguments).assert_clear_error(*words)


def test_torch_beside_a_bundle_with_a_text_encoder(run_cli, bundle):
    done = run_cli(
        *("bench", bundle("t5"), "--vs", "torch-eager", "--checkpoint", GOLDEN / "t5", "--backends", "onnxruntime"),
        *("--steps", "2", "--repeats", "1", "--json"),
    )
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in json.loads(done.out)["rows"]}
    assert rows["torch-eager fp32"]["agreement"] == 1.0
    assert rows["torch-eager fp32"]["text"] > 0


def test_another_checkpoint_is_refused(run_cli, bundle):
    done = run_cli("bench", bundle("uncond"), "--vs", "torch-eager", "--checkpoint", GOLDEN / "cond")
    done.assert_clear_error("was not exported from")


def test_what_cannot_be_opened_is_left_out_unless_asked_for(bundle, monkeypatch, capsys):
    from elf_rt.commands import bench as command

    def broken():
        raise BackendError("openvino: broken")

    work = bench.Work(steps=(1,), batches=(1,), repeats=1, seed=0)
    contenders = {"onnxruntime fp32": contender(bundle("uncond"), "onnxruntime"), "openvino auto": broken}
    report = command._run(contenders, work, (), strict=False)
    assert [entry["name"] for entry in report.contenders] == ["onnxruntime fp32"]
    assert "left out: openvino: broken" in capsys.readouterr().err
    with pytest.raises(BackendError, match="broken"):
        command._run(contenders, work, (), strict=True)


def test_a_torch_that_does_not_compile_is_one_line(monkeypatch):
    import torch

    from elf_rt.commands.bench import TINY
    from elf_rt.export.random_init import random_state
    from elf_rt.export.torch_cpu import TorchCpuBackend

    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(BackendError, match=r"torch-compile does not work here: no C\+\+ compiler$"):
        TorchCpuBackend(TINY, random_state(TINY, 0), compiled=True, bf16=False, threads=1)


def test_the_machine_is_told():
    assert machine.cores() >= 1
    assert machine.cpu_name()
    assert set(machine.isa()) <= set(machine.ISA_FLAGS)
    memory = machine.memory()
    if memory:
        assert 0 < memory["private"] < memory["now"]


def test_the_cache_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert machine.user_cache() == tmp_path / "elf-rt"
