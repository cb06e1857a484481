"""What becomes of a precision that is not proven: it is left out, kept by name, or mended, and always told."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import elf_rt
from elf_rt.bundle import Bundle
from elf_rt.errors import BundleError, InputError
from elf_rt.export.pipeline import ExportOptions, export_bundle
from elf_rt.export.precision import Precision
from elf_rt.export.sensitivity import ROUND
from elf_rt.manifest import MANIFEST
from elf_rt.measure.verify import verify_folder

GOLDEN = Path(__file__).parent / "data" / "golden"


@dataclass
class Verdict:
    passed: bool
    summary: str


def judge(until=99):
    """The real replay, but FP16 fails until so many operations stay float32; and the counts that were tried."""
    tried: list[int] = []

    def prove(folder, name):
        if name != "fp16":
            return verify_folder(folder, backend="onnxruntime", precision=name)
        items = json.loads((folder / MANIFEST).read_text())["precision"]["fp16"]["items"]
        tried.append(sum("alone would change" in item.get("reason", "") for item in items))
        if tried[-1] >= until:
            return verify_folder(folder, backend="onnxruntime", precision=name)
        return Verdict(False, "token agreement 0.9750")

    return prove, tried


def export(output, prove, **options):
    return export_bundle(str(GOLDEN / "uncond"), output, ExportOptions(**options), prove=prove)


@pytest.fixture(scope="module")
def without_fp16(tmp_path_factory):
    output = tmp_path_factory.mktemp("left-out") / "x.elfrt"
    prove, tried = judge()
    return output, export(output, prove), tried


def test_what_nobody_asked_for_is_left_out_and_told(without_fp16):
    output, notes, tried = without_fp16
    bundle = Bundle.open(output)
    bundle.check()
    assert list(bundle.variants) == ["fp32"] and not (output / "fp16").exists()
    assert bundle.left_out == {"fp16": "token agreement 0.9750"}
    assert [note.split(":")[0] for note in notes] == ["read", "proven", "warning"] and "0.9750" in notes[2]
    assert tried[0] == 0 and tried == sorted(set(tried)) and len(tried) > 2  # each attempt keeps more in float32


def test_info_and_generate_say_why(without_fp16, run_cli):
    output, _, _ = without_fp16
    assert "left out     fp16: token agreement 0.9750" in run_cli("info", output).out
    done = run_cli("generate", output, "--precision", "fp16", "--backend", "onnxruntime", "--steps", "1")
    done.assert_clear_error("export left it out: token agreement 0.9750", "--keep-unproven")
    with pytest.raises(BundleError, match=r"holds fp32, not bf16: export"):
        Bundle.open(output).variant("bf16")


@pytest.fixture
def no_time(monkeypatch):
    monkeypatch.setattr("elf_rt.export.precisions.REMEDY_SECONDS", -1.0)


def test_by_name_it_is_an_error(tmp_path, no_time):
    prove, tried = judge()
    with pytest.raises(InputError, match=r"fp16 graphs do not repeat .*0\.9750.*--keep-unproven"):
        export(tmp_path / "x.elfrt", prove, required=("fp32", "fp16"))
    assert not list(tmp_path.iterdir())
    assert tried == [0]  # the search for more ends with its time


def test_by_name_it_may_be_kept_and_is_marked(tmp_path, no_time):
    prove, _ = judge()
    notes = export(tmp_path / "x.elfrt", prove, required=("fp32", "fp16"), keep_unproven=True, verbose=True)
    assert notes[0].startswith("read: official PyTorch, EMA weights, step 10, sha256 ")
    assert notes[1] == "ignored in the config: time_schedule"
    assert "fp16 is kept unproven" in notes[-1]
    bundle = Bundle.open(tmp_path / "x.elfrt")
    assert list(bundle.variants) == ["fp32", "fp16"] and list(bundle.unproven) == ["fp16"]
    with pytest.warns(UserWarning, match=r"fp16 of this bundle was not proven at export \(token agreement 0\.9750\)"):
        elf_rt.load(tmp_path / "x.elfrt", "onnxruntime", precision="fp16").close()


def test_more_operations_stay_float32_until_it_holds(tmp_path):
    prove, tried = judge(until=4)
    notes = export(tmp_path / "x.elfrt", prove)
    assert [note.split(":")[0] for note in notes] == ["read", "proven", "proven"]
    assert tried[-1] >= 4 > tried[-2]
    report = verify_folder(tmp_path / "x.elfrt", backend="onnxruntime", precision="fp16")
    assert report.passed


def test_float32_must_hold(tmp_path):
    with pytest.raises(InputError, match="fp32 graphs do not repeat the reference model"):
        export(tmp_path / "x.elfrt", lambda folder, name: Verdict(False, "latent error 1.0"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["uncond", "cond"])
def test_untrained_models_export_by_default(tmp_path, case):
    """Their tokens are near ties: whatever FP16 does to them, there is a bundle, and it says what it holds."""
    notes = export_bundle(
        str(GOLDEN / case),
        tmp_path / "x.elfrt",
        ExportOptions(),
        prove=lambda folder, name: verify_folder(folder, backend="onnxruntime", precision=name),
    )
    bundle = Bundle.open(tmp_path / "x.elfrt")
    assert "fp32" in bundle.variants and ("fp16" in bundle.variants) != ("fp16" in bundle.left_out)
    assert len(notes) == 3


def test_dry_run_writes_nothing(tmp_path, run_cli):
    shutil.copytree(GOLDEN / "uncond", tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    done = run_cli("export", tmp_path / "model", "--dry-run")
    assert done.code == 0, done.err
    for words in (
        "official PyTorch, EMA weights, step 10",
        "2 blocks of width 48",
        "config.yml",
        "fp32, fp16",
        " MB",
        " s ",
    ):
        assert words in done.out, done.out
    assert sorted(tmp_path.rglob("*")) == before


def test_rounding_to_fp16_keeps_eleven_digits():
    x = torch.tensor([1.0 + 2.0**-11, 3.0e5, -7.1, 0.0])
    assert torch.equal(ROUND[Precision.FP16](x)[2:], x[2:].half().float())
    assert ROUND[Precision.FP16](x)[0] == 1.0 and abs(ROUND[Precision.FP16](x)[1] - 3.0e5) <= 128
