"""The ONNX Runtime backend: buffers, threads, and the int8 variant against what the arithmetic says."""

import dataclasses
import json
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import EXAMPLES
from golden_cases import golden, relative_error
from onnx_run import random_call

from elf_rt.backends import ort, ov
from elf_rt.bundle import Bundle, write_manifest
from elf_rt.export.checkpoint import load_checkpoint
from elf_rt.export.graph import variant_files
from elf_rt.export.quantize import Calibration, calibrate, quantize_activation, quantize_weight, write_int8
from elf_rt.export.reference import ELF
from elf_rt.export.replay import plan_runs
from elf_rt.model import load
from elf_rt.params import SamplingParams
from elf_rt.sampling import engine

PROMPTS = ["she paid nine hundred dollars", "it costs three dollars and fifty cents", "at a quarter past nine"]


def fill(arrays, backend, rows, length, seed=0, row=slice(None)):
    inputs = random_call(backend.config, rows, length, seed, mode=1.0)
    for name, values in zip(("z", "x_prev", "t", "s", "mode"), inputs, strict=True):
        arrays[name][:] = values[row].numpy()


def run(network, head):
    network.run()
    head.arrays["hidden"][:] = network.arrays["hidden"]
    head.run()
    return network.arrays["x"].copy(), head.arrays["ids"].copy()


def calls(backend, rows, length, seed=0):
    """x and ids of one decoding call on random inputs."""
    network = backend.bind("denoiser", rows, length)
    fill(network.arrays, backend, rows, length, seed)
    return run(network, backend.bind("discretizer", rows, length))


def assert_rows_are_apart(backend, x, ids):
    """x and ids of `calls(backend, 4, 16)`, bit by bit, from a call for each row."""
    network, head = backend.bind("denoiser", 1, 16), backend.bind("discretizer", 1, 16)
    for row in range(4):
        fill(network.arrays, backend, 4, 16, row=slice(row, row + 1))
        alone, written = run(network, head)
        assert np.array_equal(alone[0], x[row])
        assert np.array_equal(written[0], ids[row])


def with_int8(source: Path, target: Path, calibration: Calibration) -> Bundle:
    """A copy of a bundle with an int8 variant."""
    shutil.copytree(source, target)
    (target / "int8").mkdir()
    write_int8(target, target / "int8", calibration)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    manifest["variants"]["int8"] = variant_files("int8/")
    write_manifest(target, {name: value for name, value in manifest.items() if name != "files"})
    return Bundle.open(target)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    data = golden("uncond")
    model = ELF(data.config)
    model.load_state_dict(data.state)
    runs = plan_runs(data.config, {"default": SamplingParams(steps=3)}, None, None, max_steps=3, seed=0)
    return calibrate(model.eval(), runs)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_eight_threads_write_what_one_writes(bundle, backend, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with load(bundle("spoken-to-written"), backend, precision="fp32", threads=1) as model:
        want = [model.generate(PROMPTS, seed=seed, steps=2) for seed in range(8)]
        found = [None] * 8

        def write(seed):
            found[seed] = model.generate(PROMPTS, seed=seed, steps=2)

        threads = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for a, b in zip(want, found, strict=True):
        assert [(result.text, result.seed) for result in a] == [(result.text, result.seed) for result in b]


@pytest.mark.parametrize("library", [ort, ov])
def test_the_head_takes_tokens_in_pieces(library, bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(engine, "HEAD_TOKENS", 7)
    backend = library.open_backend(Bundle.open(bundle("spoken-to-written")), "fp32", 1)
    network, head = backend.bind("denoiser", 3, 16), backend.bind("discretizer", 3, 16)
    fill(network.arrays, backend, 3, 16)
    _, want = run(network, head)
    host = engine.HostEngine(backend, backend.config.latent_dim)
    found = host._discretize(network.arrays["hidden"], [0, 2], 16)
    assert list(found) == [0, 2] and all(np.array_equal(found[row], want[row]) for row in found)
    assert list(host._bound) == [("discretizer", 1, 7), ("discretizer", 1, 32 % 7)]
    assert host._discretize(network.arrays["hidden"], [], 16) == {}


def test_an_int8_layer_is_its_arithmetic(tmp_path):
    """Every product against float64 arithmetic on the quantised numbers, through ONNX Runtime's own operator."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 37, 64)).astype(np.float32) * 3 + 1
    weight = rng.normal(size=(64, 24)).astype(np.float32) * rng.uniform(0.1, 10, 24).astype(np.float32)
    quantized, scale = quantize_weight(weight)
    assert np.abs(quantized).max(axis=0).tolist() == [63] * 24
    assert np.abs(quantized * scale - weight).max() <= scale.max() / 2 * 1.001
    node = onnx.helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [onnx.helper.make_tensor_value_info("x", 1, x.shape)],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(quantized, "w"), onnx.numpy_helper.from_array(scale, "s")],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    rounded = quantize_activation(torch.from_numpy(x)).double().numpy()
    assert relative_error(y, rounded @ (quantized.astype(np.float64) * scale)) < 1e-5


def test_int8_is_near_float32_and_a_row_does_not_touch_another(bundle, tmp_path, calibration):
    opened = with_int8(bundle("uncond"), tmp_path / "b.elfrt", calibration)
    exact, _ = calls(ort.open_backend(opened, "fp32", 1), 4, 16)
    backend = ort.open_backend(opened, "int8", 1)
    x, ids = calls(backend, 4, 16)
    assert 1e-4 < relative_error(x, exact) < 0.15
    assert_rows_are_apart(backend, x, ids)


def test_narrowing_alone_changes_no_bit(bundle, tmp_path, calibration):
    """All layers kept float32: what is left of the int8 graph is the powers of two."""
    everything = dict.fromkeys(calibration.errors, 1.0)
    assert any(np.any(exponents) for exponents in calibration.exponents.values())
    opened = with_int8(bundle("uncond"), tmp_path / "b.elfrt", Calibration(everything, calibration.exponents))
    x, ids = calls(ort.open_backend(opened, "int8", 1), 1, 16)
    want_x, want_ids = calls(ort.open_backend(opened, "fp32", 1), 1, 16)
    assert np.array_equal(x, want_x)
    assert np.array_equal(ids, want_ids)


def test_layers_that_int8_hurts_stay_float32(bundle, tmp_path, calibration):
    errors = calibration.errors | {"blocks.0.mlp.w3": 0.5, "blocks.0.attn.qkv": float("nan")}
    hurt = Calibration(errors, calibration.exponents)
    opened = with_int8(bundle("uncond"), tmp_path / "b.elfrt", hurt)
    graph = onnx.load(opened.path("int8/denoiser.onnx"), load_external_data=False).graph
    products = {node.input[1].rsplit(".", 1)[0]: node.op_type for node in graph.node if "MatMul" in node.op_type}
    kept = {name for name, kind in products.items() if kind == "MatMul" and name.startswith("blocks.")}
    assert kept == {"blocks.0.mlp.w3", "blocks.0.attn.qkv"}
    assert products["final_layer.linear"] == products["text_proj.proj1"] == "MatMul"
    assert [item["name"] for item in hurt.to_json()["items"]] == ["blocks.0.attn.qkv", "blocks.0.mlp.w3"]
    json.dumps(hurt.to_json(), allow_nan=False)


def test_int8_of_the_example_writes_nearly_what_float32_writes(bundle, tmp_path):
    """32 held-out sentences at 4 steps; the README has all 300 at 8 and 32."""
    checkpoint = load_checkpoint(EXAMPLES / "spoken-to-written")
    model = ELF(checkpoint.config)
    model.load_state_dict(checkpoint.state)
    (run,) = plan_runs(checkpoint.config, {"default": SamplingParams(sc_cfg=1.0)}, None, None, max_steps=3, seed=0)[:1]
    run = dataclasses.replace(run, z0=run.z0[:1], eps=run.eps[:, :1])
    opened = with_int8(bundle("spoken-to-written"), tmp_path / "b.elfrt", calibrate(model.eval(), [run]))
    lines = (EXAMPLES / "spoken-to-written" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:32]
    prompts = [json.loads(line)["input"] for line in lines]
    ids = {}
    for precision in ("fp32", "int8"):
        with load(opened.folder, "onnxruntime", precision=precision) as loaded:
            ids[precision] = np.stack([result.ids for result in loaded.generate(prompts, seed=0, steps=4)])
    assert np.mean(ids["fp32"] == ids["int8"]) > 0.98


def test_auto_never_chooses_int8(bundle, tmp_path, calibration, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    opened = with_int8(bundle("uncond"), tmp_path / "b.elfrt", calibration)
    for backend in ("auto", "onnxruntime", "openvino"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with load(opened.folder, backend) as model:
                assert model.backend.precision in ("fp32", "bf16")
