"""Golden runs of the official code through the whole runtime; and verify fails when it should."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import elf_rt
from elf_rt.bundle import MANIFEST, sha256
from elf_rt.errors import InputError
from elf_rt.measure.verify import edit_distance, verify, verify_folder

GOLDEN = Path(__file__).parent / "data" / "golden"
CASES = ("uncond", "cond", "no_sc_tokens", "no_self_cond", "head_dim_66", "t5")


@pytest.mark.parametrize("case", CASES)
def test_golden_runs(bundle, case):
    report = verify_folder(bundle(case), GOLDEN / case / "golden.npz", backend="onnxruntime")
    with np.load(GOLDEN / case / "golden.npz") as arrays:
        runs = sum(name.endswith("_spec") for name in arrays.files)
        calls = int("fwd_z" in arrays.files)
    assert len(report.checks) == 2 * runs + calls  # raw and final ids of each run
    for check in report.checks:
        assert check.latent_error < 5e-5 and check.token_agreement == 1.0, check


def test_t5_from_text_to_final_ids(bundle):
    """The source is text: tokenizer, EOS, cut, T5 encoder, sampler, shift and EOS again."""
    with np.load(GOLDEN / "t5" / "golden.npz") as arrays, elf_rt.load(bundle("t5")) as model:
        texts = [str(text) for text in arrays["source_texts"]]
        with pytest.warns(UserWarning, match="is cut to 12"):
            sources = model.codec.tokenize(texts)
        assert [list(ids) for ids in sources] == [json.loads(str(ids)) for ids in arrays["source_ids"]]
        latents, mask = model.codec.encode(sources, model.config.max_length)
        params = model.params(sampler="ode", steps=6, guidance_scale=2.0, sc_cfg=1.0)
        outcome = model.sample(z0=arrays["run0_z0"], grid=arrays["run0_t"], source=latents, mask=mask, params=params)
        final = model.codec.finish(outcome.ids, np.array([len(ids) for ids in sources]))
        np.testing.assert_array_equal(final, arrays["run0_final_ids"])


def test_weights_off_by_one_percent_fail(bundle, tmp_path):
    folder = tmp_path / "off.elfrt"
    shutil.copytree(bundle("uncond"), folder)
    model = onnx.load(folder / "denoiser.onnx")
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2 and "blocks" in tensor.name:
            values = onnx.numpy_helper.to_array(tensor)
            changed = (values * (1 + 0.01 * rng.standard_normal(values.shape))).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    onnx.save(model, folder / "denoiser.onnx")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"]["denoiser.onnx"] = sha256(folder / "denoiser.onnx")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    report = verify_folder(folder, backend="onnxruntime")
    assert not report.passed
    assert all(check.latent_error > 5e-5 for check in report.checks)


def test_presets_have_no_part_in_the_proof(bundle, tmp_path):
    folder = tmp_path / "other.elfrt"
    shutil.copytree(bundle("uncond"), folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["presets"]["default"] |= {"x_prev_scale": 1.5, "temperature": 0.6, "gamma_power": 1.0}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert verify_folder(folder, backend="onnxruntime").passed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes((GOLDEN / "uncond" / "golden.npz").read_bytes()[:999]), "no replay file"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), "no replay file"),
        (lambda path: np.savez(path, fwd_z=np.zeros(3)), "does not fit the model, or is damaged"),
        (lambda path: np.savez(path, run0_spec=np.array("steps 3")), "does not fit the model, or is damaged"),
        (lambda path: np.savez(path, fwd_x=np.zeros(3)), "holds no run"),
    ],
)
def test_damaged_replays(bundle, tmp_path, spoil, message):
    path = tmp_path / "replay.npz"
    spoil(path)
    with pytest.raises(InputError, match=message):
        verify_folder(bundle("uncond"), path, backend="onnxruntime")


def test_a_replay_of_another_model_is_refused(bundle):
    with elf_rt.load(bundle("uncond")) as model:
        with pytest.raises(InputError, match="shape"):
            verify(model, GOLDEN / "cond" / "golden.npz")
        with pytest.raises(InputError, match="no replay file"):
            verify(model, GOLDEN / "cond" / "config.yml")


@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=9))
def test_edit_distance(a, b):
    def slow(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(slow(i - 1, j) + 1, slow(i, j - 1) + 1, slow(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    a, b = a[:5], b[:5]
    want = slow(len(a), len(b)) / max(1, len(a), len(b))
    assert edit_distance(np.array(a, int), np.array(b, int)) == pytest.approx(want)
