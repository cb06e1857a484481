"""Golden runs of the official code through the whole runtime; and verify fails when it should."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import elf_rt
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, InputError
from elf_rt.files import sha256
from elf_rt.manifest import MANIFEST
from elf_rt.measure.replay import read_replay
from elf_rt.measure.verify import edit_distance, verify, verify_folder, verify_rows

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
        (lambda path: path.write_bytes((GOLDEN / "uncond" / "golden.npz").read_bytes()[:999]), r"is no \.npz file"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), r"is no \.npz file"),
        (lambda path: np.savez(path, run0_spec=np.array([{}], object)), r"is no \.npz file"),
        (lambda path: np.savez(path, fwd_x=np.zeros(3, np.float32)), "lacks fwd_z"),
        (lambda path: np.savez(path, run0_spec=np.array("steps 3")), "lacks run0_t"),
        (lambda path: np.savez(path, run1_spec=np.array("steps 3")), "lacks a run"),
        (lambda path: np.savez(path, x=np.zeros(3)), "holds no run"),
        (lambda path: path.mkdir(), r"is no \.npz file"),
    ],
)
def test_damaged_replays(bundle, tmp_path, spoil, message):
    path = tmp_path / "replay.npz"
    spoil(path)
    with pytest.raises(InputError, match=message):
        read_replay(path, Bundle.open(bundle("uncond")).config)


def changed(name: str, array: np.ndarray) -> list[np.ndarray]:
    """Arrays that may not stand under a name: of other shape, type or values."""
    other = [array[None], array.astype("S9"), array.astype(np.complex64) if array.dtype.kind in "fi" else np.zeros(())]
    if array.ndim:
        other += [array[..., :0], array[:, :-1] if array.ndim > 1 else np.concatenate([array, array])]
        other += [array.astype(np.int64 if array.dtype.kind == "f" else np.float32)] if array.dtype.kind in "fi" else []
    if array.dtype.kind == "f" and array.size:
        other += [np.full_like(array, np.nan)]
    return other


@pytest.mark.parametrize("case", ["cond", "t5"])
def test_every_array_of_a_replay_is_needed_and_checked(bundle, tmp_path, case):
    """Gone or changed, an array is named in one line; nothing is skipped, and nothing reaches the model."""
    opened = Bundle.open(bundle(case))
    with np.load(opened.folder / "replay.npz") as archive:
        good = {name: archive[name] for name in archive.files}
    path = tmp_path / "replay.npz"
    needed = ["call", "final_ids", *(["text"] if opened.tokenizer.file else [])]

    def refused(arrays: dict[str, np.ndarray]) -> str:
        np.savez(path, **arrays)
        with pytest.raises(InputError) as caught:
            read_replay(path, opened.config, needed)
        return str(caught.value)

    np.savez(path, **good)
    call, runs = read_replay(path, opened.config, needed)
    assert call is not None and len(runs) == sum(name.endswith("_spec") for name in good)
    for name, array in good.items():
        assert name.split("_")[0] in refused({k: v for k, v in good.items() if k != name})
        for other in changed(name, array):
            if not (name.endswith("_eps") and other.size == 0 and array.size == 0):
                assert "\n" not in refused(good | {name: other})


@pytest.mark.parametrize("rows", [10**7, 10**12, 10**30])
def test_an_array_that_claims_more_than_there_is(bundle, tmp_path, rows):
    """No memory is taken for what a header says."""
    resource = pytest.importorskip("resource")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (rows, 16, 32)})
    path = tmp_path / "replay.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fwd_z.npy", header.getvalue() + bytes(2048))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    with pytest.raises(InputError, match=r"is no \.npz file of arrays, or damaged") as caught:
        read_replay(path, Bundle.open(bundle("uncond")).config)
    assert "memory ran out" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("fwd_z.npy", "w") as file:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**16, 16, 32)})
        file.write(header.getvalue())
        for _ in range(2**7):
            file.write(bytes(2**20))
    with pytest.raises(InputError, match=r"would grow to 0\.1 GB"):
        read_replay(path, Bundle.open(bundle("uncond")).config)


@pytest.mark.parametrize("error", [KeyError("z"), ValueError("shapes"), TypeError("x")])
def test_a_fault_inside_a_backend_is_not_blamed_on_the_replay(bundle, monkeypatch, error):
    with elf_rt.load(bundle("uncond"), "onnxruntime") as model:
        monkeypatch.setattr(model.backend, "bind", lambda graph, rows, length: (_ for _ in ()).throw(error))
        with pytest.raises(BackendError, match="the network call failed") as caught:
            verify(model)
        assert caught.value.__cause__ is error


def test_the_failing_path_of_the_command(bundle, tmp_path, run_cli):
    """Other ids, latents or texts than the reference's: the line says FAIL, the exit code is 1."""
    with np.load(bundle("t5") / "replay.npz") as archive:
        good = {name: archive[name] for name in archive.files}
    path = tmp_path / "other.npz"
    ids, text = good["run0_ids"].copy(), good["run0_text"].copy()
    ids[0, 0] += 1
    text[0] = "another text"
    for changes, line in (
        ({"run0_ids": ids}, "s = "),
        ({"run0_text": text}, "texts"),
        ({"fwd_x": good["fwd_x"] * np.float32(1.001)}, "network call"),
    ):
        np.savez(path, **good | changes)
        done = run_cli("verify", bundle("t5"), "--replay", path, "--backend", "onnxruntime")
        failed = [row for row in done.out.splitlines() if row.startswith("FAIL")]
        assert done.code == 1 and len(failed) == 1 and line in failed[0], done.out + done.err
        assert "this is not the reference model's text" in done.err and "Traceback" not in done.err
    np.savez(path, **good)
    assert run_cli("verify", bundle("t5"), "--replay", path, "--backend", "onnxruntime").code == 0


def test_the_call_in_any_number_of_rows(bundle):
    with elf_rt.load(bundle("uncond"), "onnxruntime", precision="fp32") as model:
        report = verify_rows(model.backend, model.bundle, [1, 3, 8])
        assert report.passed and [check.name.split()[-2] for check in report.checks] == ["1", "3", "8"]
        model.backend.bind = lambda graph, rows, length, bind=model.backend.bind: Spoiled(bind(graph, rows, length))
        assert [check.passed for check in verify_rows(model.backend, model.bundle, [1, 3, 8]).checks] == [
            True,
            True,
            False,
        ]


class Spoiled:
    """A graph that is wrong in calls of more than four rows."""

    def __init__(self, bound):
        self.bound, self.arrays, self.close = bound, bound.arrays, bound.close

    def run(self):
        self.bound.run()
        if len(self.arrays.get("x", ())) > 4:
            self.arrays["x"][4:] += 1e-2


def test_a_replay_of_another_model_is_refused(bundle):
    with elf_rt.load(bundle("uncond")) as model:
        with pytest.raises(InputError, match="shape"):
            verify(model, GOLDEN / "cond" / "golden.npz")
        with pytest.raises(InputError, match=r"is no \.npz file"):
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
