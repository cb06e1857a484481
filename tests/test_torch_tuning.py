"""The torch network by its Triton kernels, in Triton's interpreter, and the choice between ways; without a GPU."""

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import HAS_GPU
from golden_cases import CASES, GOLDEN, relative_error
from plan_bundles import golden_bundle
from torch_on_cpu import CpuTorch, call

from elf_rt.backends import torch_attention, torch_cuda, torch_tuning
from elf_rt.backends.ort import OrtBackend
from elf_rt.backends.table import NO_TUNE
from elf_rt.backends.torch_attention import TORCH, Attention, sdpa
from elf_rt.backends.torch_cuda import TorchBackend
from elf_rt.backends.torch_network import Choice
from elf_rt.backends.torch_tuning import KERNELS, Tuner, make_fused, tiles_of
from elf_rt.bundle import Bundle
from elf_rt.commands import doctor
from elf_rt.commands.options import backend_options
from elf_rt.measure.bench import BenchReport
from elf_rt.measure.bench_report import describe_machine, lines
from elf_rt.measure.verify import Check, verify
from elf_rt.model import Model

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled here, so no interpreter runs them on the CPU")
SLOW, FAST = (Attention(name, f"library {name}", sdpa(None)) for name in ("slow", "fast"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def bundle(case: str) -> Bundle:
        if case not in made:
            made[case] = golden_bundle(folder / f"{case}.elfrt", case, ("fp32", "fp16", "bf16"))
        return made[case]

    return bundle


@pytest.fixture
def backend(bundles: Any) -> TorchBackend:
    return CpuTorch(bundles("cond"), "fp16")


def by_kernels(backend: TorchBackend) -> TorchBackend:
    """Every call by the Triton kernels, with the first tiles."""
    network = backend.network
    network.fused = make_fused(network, 90)  # type: ignore[assignment]
    assert not isinstance(network.fused, str), network.fused
    network.first = Choice(TORCH, {product: tiles[0] for product, tiles in tiles_of(network.fused, 90).items()})
    return backend


@pytest.mark.parametrize("case", CASES)
def test_a_golden_run_is_as_exact_as_with_torchs_products(case: str, bundles: Any, tmp_path: Path) -> None:
    """The recorded call and the first recorded run: FP16 inputs, float32 sums.

    A run with guidance enlarges the rounding of each call: 1.1 to 1.6 times torch's error was seen, by the number of
    rows that a call had, where a single call has 0.97 times.
    """
    with np.load(GOLDEN / case / "golden.npz") as recorded:
        np.savez(tmp_path / "one.npz", **{k: recorded[k] for k in recorded if k.startswith(("fwd_", "dec_", "run0_"))})

    def checks(backend: TorchBackend) -> tuple[Check, ...]:
        with Model(bundles(case), lambda _: (backend, "test")) as model:
            return verify(model, tmp_path / "one.npz").checks

    backends = CpuTorch(bundles(case), "fp16"), by_kernels(CpuTorch(bundles(case), "fp16"))
    for plain, fused in zip(*map(checks, backends), strict=True):
        most = 1.2 if plain.name == "network call" else 2
        assert fused.latent_error < most * plain.latent_error < 0.02
        assert fused.token_agreement > 0.9  # of 16 ids, some of which all but tie


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("case", ["no_self_cond", "head_dim_66"])
def test_as_near_to_float32_as_torchs_products(case: str, precision: str, bundles: Any) -> None:
    bundle = bundles(case)
    rows, length = 3, bundle.config.max_length - 1
    want, _ = call(OrtBackend(bundle, "fp32", 2), rows, length, 0.0)
    plain, _ = call(CpuTorch(bundle, precision), rows, length, 0.0)
    fused, _ = call(by_kernels(CpuTorch(bundle, precision)), rows, length, 0.0)
    most = 2 if precision == "fp16" else 3  # the interpreter cuts bfloat16 off where a GPU rounds
    assert 1e-5 < relative_error(fused, want) < most * relative_error(plain, want)


# ---- the choice


class Clock:
    """Says that ways take 1, 2, 3 ... ms, each way after it ran; `last_first` turns that round."""

    def __init__(self, last_first: bool = True) -> None:
        self.last_first, self.timed = last_first, 0

    def __call__(self, ways: Sequence[Callable[[], object]], calls: int) -> list[float | str]:
        self.timed += len(ways)
        times: list[float | str] = []
        for i, way in enumerate(ways):
            try:
                way()
                times.append(float(len(ways) - i if self.last_first else i + 1))
            except Exception as error:
                times.append(str(error))
        return times


def tuner(backend: TorchBackend, folder: Path, clock: Clock | None = None, sm: int = 90, **options: Any) -> Tuner:
    made_with = options.pop("made_with", ["a GPU", "a torch"])
    clock = clock or Clock()
    attentions = options.pop("attentions", [SLOW, FAST, TORCH])

    def usable(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[list[Attention], dict[str, str]]:
        return attentions, {"cudnn": "its version is too old"}

    return Tuner(backend.network, torch.float16, sm, folder, made_with, clock=clock, usable=usable, **options)


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_tuning, "SIZES", ((64, 128, 64, 4, 3), (32, 64, 32, 4, 3)))


def test_the_fastest_is_taken_named_and_kept(backend: TorchBackend, tmp_path: Path) -> None:
    first = tuner(backend, tmp_path, attentions=[SLOW, FAST])
    first.prepare(1, 8)
    choice = backend.network.choices[1, 8]
    assert choice.attention is FAST and choice.tiles is not None
    assert {(tile.rows, tile.columns) for tile in choice.tiles.values()} == {(32, 64)}
    said = first.describe()
    assert (said["attention"], said["blocks"]) == ("library fast", KERNELS)
    assert "cudnn: its version is too old" in said["passed over"]
    entry = {"name": "torch", "library": "torch", "load_s": 1.0, "first_s": 1.0, "memory_mb": None, **said}
    *_, last = lines({"machine": describe_machine(), "model": "m"}, BenchReport("a", "b", [entry], []))
    assert last == "torch: attention by library fast, blocks by Triton kernels; cudnn: its version is too old"
    backend.network.choices.clear()
    clock = Clock()
    tuner(backend, tmp_path, clock, attentions=[SLOW, FAST]).prepare(1, 8)
    assert backend.network.choices[1, 8] == choice and clock.timed == 0  # from the cache


def test_torchs_products_where_they_are_faster(backend: TorchBackend, tmp_path: Path) -> None:
    here = tuner(backend, tmp_path, Clock(last_first=False))
    here.prepare(2, 8)
    assert backend.network.choices[2, 8] == Choice(SLOW)
    assert "Triton kernels: 2 ms a call of 2 x 8, torch 1" in here.describe()["passed over"]
    backend.network.choices.clear()
    clock = Clock()
    again = tuner(backend, tmp_path, clock)
    again.prepare(2, 8)
    assert clock.timed == 0 and again.passed_over[KERNELS] == "2 ms a call of 2 x 8, torch 1"


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "no seal", "foreign"])
def test_a_cache_that_was_damaged_is_measured_anew(damage: str, backend: TorchBackend, tmp_path: Path) -> None:
    tuner(backend, tmp_path).prepare(1, 8)
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    at = kept.index(b"attention") + 14  # in the name of the one that was chosen
    damaged = {
        "empty": b"",
        "cut": kept[:-20],
        "bit": kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :],
        "no seal": kept[32:],
        "foreign": b"[" * 10**5,
    }[damage]
    file.write_bytes(damaged)
    backend.network.choices.clear()
    clock = Clock()
    tuner(backend, tmp_path, clock).prepare(1, 8)
    assert clock.timed > 0 and file.read_bytes() == kept


def test_other_versions_have_another_file(backend: TorchBackend, tmp_path: Path) -> None:
    tuner(backend, tmp_path).prepare(1, 8)
    backend.network.choices.clear()
    clock = Clock()
    tuner(backend, tmp_path, clock, made_with=["a GPU", "a newer torch"]).prepare(1, 8)
    assert clock.timed > 0 and len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_taken_any_more_is_measured_anew(backend: TorchBackend, tmp_path: Path) -> None:
    tuner(backend, tmp_path, attentions=[SLOW, FAST]).prepare(1, 8)
    assert backend.network.choices.pop((1, 8)).attention is FAST
    clock = Clock()
    tuner(backend, tmp_path, clock, attentions=[TORCH, SLOW]).prepare(1, 8)
    choice = backend.network.choices.pop((1, 8))
    assert choice.attention is SLOW and choice.tiles and clock.timed > 0
    backend.network.fused = None
    tuner(backend, tmp_path, sm=75).prepare(1, 8)  # without the kernels, whose tiles are kept
    assert backend.network.choices[1, 8].tiles is None


def test_a_cache_that_cannot_be_written_is_said(
    backend: TorchBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    tuner(backend, tmp_path / "file").prepare(1, 8)
    assert "measurements are not kept" in caplog.text and (1, 8) in backend.network.choices


def test_a_kernel_that_gives_other_results_is_not_taken(
    backend: TorchBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elf_rt.backends import torch_kernels

    right = torch_kernels.gate
    monkeypatch.setattr(torch_kernels, "gate", lambda *given: -right(*given))
    here = tuner(backend, tmp_path)
    here.prepare(1, 8)
    assert backend.network.choices[1, 8].tiles is None
    assert "Triton kernels: results differ by" in here.describe()["passed over"]


def test_kernels_that_do_not_compile_leave_torchs_products(
    backend: TorchBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from elf_rt.backends import torch_kernels

    def refuse(*given: Any) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(torch_kernels, "gate", refuse)
    here = tuner(backend, tmp_path)
    here.prepare(1, 8)
    assert backend.network.choices[1, 8] == Choice(TORCH)
    assert here.passed_over[KERNELS] == "PassManager::run failed"
    assert [record.getMessage().count("PassManager::run failed") for record in caplog.records] == [1]
    assert np.isfinite(call(backend, 1, 8, 0.0)[0]).all()


def test_out_of_memory_while_measuring_is_not_one_while_running(
    backend: TorchBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch_tuning, "normal", refuse)
    here = tuner(backend, tmp_path)
    here.prepare(64, 8)
    assert backend.network.choices[64, 8] == Choice(SLOW) and not list(tmp_path.iterdir())
    assert "no GPU memory to measure 64 rows of 8 tokens" in here.describe()["passed over"]


def test_an_attention_that_gives_something_else_is_passed_over(backend: TorchBackend, tmp_path: Path) -> None:
    wrong = Attention("wrong", "library wrong", lambda q, k, v, scale: FAST.run(q, v, k, scale))
    here = tuner(backend, tmp_path, attentions=[SLOW, wrong])
    here.prepare(1, 8)
    assert backend.network.choices[1, 8].attention is SLOW
    assert "library wrong: results differ by" in here.describe()["passed over"]


def test_no_tune_takes_the_first(backend: TorchBackend, tmp_path: Path) -> None:
    clock = Clock()
    here = tuner(backend, tmp_path, clock, tune=False)
    here.prepare(1, 8)
    assert backend.network.choices[1, 8] == Choice(SLOW) and clock.timed == 0
    assert "not measured (--no-tune)" in here.describe()["passed over"]


def test_what_cannot_run_the_kernels_says_so(
    backend: TorchBackend,
    bundles: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert "compute capability 8.0 or newer" in tuner(backend, tmp_path, sm=75).passed_over[KERNELS]
    assert len(caplog.records) == 1 and "compute capability" in caplog.text
    float32 = CpuTorch(bundles("cond"), "fp32")
    assert "in float32" in tuner(float32, tmp_path).passed_over[KERNELS]
    assert len(caplog.records) == 1  # nobody waits for kernels there
    for module in ("elf_rt.backends.torch_fused", "elf_rt.backends.torch_kernels"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton does not work here" in tuner(backend, tmp_path).passed_over[KERNELS]


def test_the_option_reaches_the_backend(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr(torch_cuda, "unavailable", lambda: None)
    monkeypatch.setattr(torch_cuda, "TorchBackend", lambda *args, **options: opened.append(options))
    monkeypatch.setenv(NO_TUNE, "")  # and is gone after the test

    @click.command()
    @backend_options
    def command(**options: Any) -> None:
        torch_cuda.open_backend(bundles("uncond"), "fp16")

    for arguments, tunes in ([], True), (["--no-tune"], False):
        assert CliRunner().invoke(command, arguments).exit_code == 0
        assert opened[-1] == {"tune": tunes}


def test_doctor_names_versions_and_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"cudnn": "cuDNN 9.10 is older than 9.15"}
    monkeypatch.setattr(torch_attention, "usable", lambda dtype: ([FAST, TORCH], absent))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch_cuda, "unavailable", lambda: None)
    out = CliRunner().invoke(doctor.command).output
    assert "ok  torch" in out and "cuDNN 9.10.2, Triton 3." in out
    assert "attention by library fast; cudnn: cuDNN 9.10 is older than 9.15" in out


def test_why_torch_refuses_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def can_use(params: object, debug: bool) -> bool:
        warnings.warn("cuDNN attention requires a newer GPU.\nmore", stacklevel=1)
        return False

    assert torch_attention.refusal(can_use, None) == "cuDNN attention requires a newer GPU."
    assert torch_attention.refusal(lambda params, debug: True, None) is None
