"""``elf-rt build-engine`` as a user meets it: what it prints, what it refuses, what it leaves."""

import ctypes
import dataclasses
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import install_cuda
from fake_gpu import install_gpu
from fake_tensorrt import install_tensorrt
from golden_cases import golden
from plan_bundles import golden_bundle

from elf_rt import plans
from elf_rt.backends.trt_graph import TrtGraph
from elf_rt.bundle import Bundle
from elf_rt.cli import main
from elf_rt.commands.build_engine import _default_batch
from elf_rt.commands.info import describe_plans
from elf_rt.device.cudart import Gpu
from elf_rt.plans import Record


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_bundle(tmp_path_factory.mktemp("cli") / "uncond.elfrt").folder


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "find_gpu", lambda: "no NVIDIA driver")
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "m.elfrt"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a run prints."""
    with pytest.raises(SystemExit) as stopped:
        main(["build-engine", *map(str, arguments)])
    captured = capsys.readouterr()
    assert stopped.value.code == 0 and captured.err == ""
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 1) -> str:
    """What a run that fails says: one line for elf-rt's own errors."""
    with pytest.raises(SystemExit) as stopped:
        main(["build-engine", *map(str, arguments)])
    assert stopped.value.code == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert code != 1 or captured.err.count("\n") == 1
    return captured.err


def test_dry_run_then_build_then_reuse(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = run(capsys, folder, "--sm", "89", "--dry-run")
    assert plan.startswith("would build ") and "1 rows of 16 tokens" in plan and "TensorRT-RTX" in plan
    assert not (folder / "plans").exists()
    built = run(capsys, folder, "--sm", "89")
    assert built.startswith("built ") and "attention fused" in built and "scratch memory" in built
    (place,) = (folder / "plans").iterdir()
    stamp = (place / "denoiser.plan").stat().st_mtime_ns
    assert run(capsys, folder, "--fp16", "--sm", "8.9", "--length", "16").startswith(f"already built {place}")
    assert run(capsys, folder, "--sm", "89", "--dry-run").startswith(f"has {place}")
    assert (place / "denoiser.plan").stat().st_mtime_ns == stamp


def test_turing_gets_a_plan_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, folder, "--target", "tensorrt-rtx", "--sm", "75,86,89", "--batch", "1:2:4")
    built = [Record.read(place) for place in (folder / "plans").iterdir()]
    assert sorted(record.sms for record in built) == [(75,), (86, 89)]
    assert {str(record.profiles[0].rows) for record in built} == {"1:2:4"}
    text = describe_plans(Bundle.open(folder))
    assert [name for name, _ in text] == ["plan", "", "", ""] * 2
    assert "fp16, 1:2:4 rows of 16 tokens" in text[0][1] and "in FP16" in text[2][1]
    assert text[1][1] == "not replayed: no GPU here (no NVIDIA driver)"


def test_the_default_is_every_gpu_that_shares_a_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "sm_80/sm_86/sm_89/sm_120/sm_121" in run(capsys, folder, "--dry-run")


def test_the_default_batch_is_one_text_and_the_calls_that_texts_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance by two calls doubles the rows: here for self-conditioning, s = 3, without guidance tokens."""
    assert golden("no_sc_tokens").config.num_self_cond_cfg_tokens == 0
    bundle = golden_bundle(tmp_path / "two.elfrt", "no_sc_tokens", ("fp16",))
    assert bundle.config.max_length == 16
    out = run(capsys, bundle.folder, "--dry-run")
    assert " 2 rows of" in out and "1:256:256 rows of" in out  # as many texts as a call may have
    monkeypatch.chdir(tmp_path)
    assert " 2 rows of" in run(capsys, "--dry-run")  # the only bundle here
    for length, most in ((48, 128), (500, 16), (1024, 8), (4096, 8)):
        monkeypatch.setattr(bundle, "config", dataclasses.replace(bundle.config, max_length=length))
        assert _default_batch(bundle) == f"2,1:{most}:{most}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--precision", "bf16"], "holds fp32, fp16, not bf16: export the checkpoint again with --precision bf16"),
        (["--sm", "90"], "TensorRT-RTX cannot build for sm_90"),
        (
            ["--sm", "75", "--precision", "fp32", "--target", "tensorrt-rtx"],
            "no float32 matrix product on sm_75: build with --precision fp16",
        ),
        (["--target", "tensorrt"], "tensorrt: not installed: pip install 'elf-rt[tensorrt]'"),
        (["--batch", "8:1"], "--batch must be a number such as 8, or least:best:most"),
        (["--length", "99"], "--length must be at most 16"),
        (["--timing-cache", "t"], "--timing-cache has no use: TensorRT-RTX times nothing"),
    ],
)
def test_refusals_say_how_to_mend(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in refused(capsys, folder, *arguments)
    assert not (folder / "plans").exists()


def test_bad_options_are_usage_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sms, wrong in (("86,ada", "ada"), ("", ""), ("86,", "")):
        assert f"Invalid value for '--sm': '{wrong}' is not" in refused(capsys, folder, "--sm", sms, code=2)
    assert "0<=x<=5" in refused(capsys, folder, "--opt-level", "6", code=2)


def test_no_library(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    message = refused(capsys, folder)
    assert "tensorrt: not installed" in message and "tensorrt-rtx: not installed" in message


def test_auto_prefers_tensorrt_where_a_gpu_is(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_tensorrt(monkeypatch, "11.4.0.106", install_cuda(monkeypatch, sm=90, name=b"NVIDIA H200"))
    monkeypatch.setattr(plans, "find_gpu", lambda: Gpu("NVIDIA H200", 90))
    built = run(capsys, folder, "--batch", "1,2", "--timing-cache", folder.parent / "timings")
    assert "sm90-nvidia-h200-tensorrt-11.4.0.106-" in built
    assert (folder.parent / "timings").is_file()
    assert "TensorRT-RTX" in run(capsys, folder, "--sm", "89", "--dry-run")  # another GPU: only RTX can


def test_other_weights_make_another_plan_and_the_old_one_is_called_stale(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(capsys, folder, "--sm", "89")
    other = golden_bundle(tmp_path / "other.elfrt", "head_dim_66").folder
    shutil.copytree(folder / "plans", other / "plans")
    assert run(capsys, other, "--sm", "89").startswith("built ")
    texts = [text for name, text in describe_plans(Bundle.open(other)) if name]
    assert sorted("of other weights" in text for text in texts) == [False, True]


@pytest.fixture
def gpu(bundle, tmp_path, monkeypatch):
    """A bundle with a replay, on a machine with a (pretended) GPU and TensorRT."""
    made = Path(shutil.copytree(bundle("uncond"), tmp_path / "replayed.elfrt"))
    cuda = install_gpu(monkeypatch)
    monkeypatch.setattr(plans, "find_gpu", lambda: Gpu("NVIDIA L4", 89))
    install_tensorrt(monkeypatch, "11.4.0.106", cuda)
    return made, cuda


def test_a_plan_is_replayed_at_every_size_of_a_call(gpu, capsys):
    folder, _ = gpu
    told = run(capsys, folder, "--precision", "fp32", "--batch", "1,3:5:9")
    assert "replayed in calls of 1, 3, 4, 5, 8, 9 rows: the reference model's tokens" in told
    (place,) = (folder / "plans").iterdir()
    assert Record.read(place).replayed == (1, 3, 4, 5, 8, 9)


def test_a_plan_that_is_wrong_at_one_size_is_not_kept(gpu, capsys, monkeypatch):
    """As a library that was right for one text and wrong for a batch."""
    folder, cuda = gpu
    enqueue = TrtGraph.enqueue

    def spoiled(self) -> None:
        enqueue(self)
        if self.shapes.get("x", ())[:1] == (4,):
            size = math.prod(self.shapes["x"])
            x = np.ctypeslib.as_array((ctypes.c_float * size).from_address(self.buffers["x"])).reshape(self.shapes["x"])
            cuda.enqueue(self._stream, lambda: np.add(x[3], 1.0, out=x[3]))

    monkeypatch.setattr(TrtGraph, "enqueue", spoiled)
    assert "writes other text (network call of 4 rows" in refused(
        capsys, folder, "--precision", "fp32", "--batch", "1:1:4"
    )
    assert not list((folder / "plans").iterdir())


def test_a_plan_built_without_a_gpu_is_replayed_when_there_is_one(gpu, capsys, monkeypatch):
    folder, _ = gpu
    run(capsys, folder, "--precision", "fp32", "--batch", "2")
    (place,) = (folder / "plans").iterdir()
    dataclasses.replace(Record.read(place), replayed=(), not_replayed="no GPU here").write(place)
    assert "already built" in (told := run(capsys, folder, "--precision", "fp32", "--batch", "2"))
    assert "replayed in calls of 2 rows" in told and Record.read(place).replayed == (2,)
