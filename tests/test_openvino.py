"""The OpenVINO backend against the golden runs and ONNX Runtime; its fusions, buffers and cache."""

import locale
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_cases import CASES
from onnx_run import random_call

from elf_rt import files, machine
from elf_rt.backends import BACKENDS, open_backend, ort, ov
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError
from elf_rt.measure.verify import verify_folder
from elf_rt.model import load

openvino = pytest.importorskip("openvino")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def call(backend, rows, length, seed=0):
    """x and ids of one decoding call on random inputs."""
    network, head = backend.bind("denoiser", rows, length), backend.bind("discretizer", rows, length)
    inputs = random_call(backend.config, rows, length, seed, mode=1.0)
    for name, values in zip(("z", "x_prev", "t", "s", "mode"), inputs, strict=True):
        if name in network.arrays:
            network.arrays[name][:] = values.numpy()
    network.run()
    head.arrays["hidden"][:] = network.arrays["hidden"]
    head.run()
    x, ids = network.arrays["x"].copy(), head.arrays["ids"].copy()
    network.close()
    head.close()
    return x, ids


@pytest.mark.parametrize("name", [*CASES, "t5", "spoken-to-written"])
def test_replays_the_reference(bundle, name):
    report = verify_folder(bundle(name), backend="openvino", precision="fp32")
    assert report.passed, report


@pytest.mark.parametrize(("rows", "length"), [(1, 64), (3, 64), (9, 64), (1, 1), (2, 7), (3, 63)])
def test_any_rows_and_length_as_onnx_runtime(bundle, rows, length):
    opened = Bundle.open(bundle("spoken-to-written"))
    x, ids = call(ov.open_backend(opened, "fp32", 1), rows, length)
    want_x, want_ids = call(ort.open_backend(opened, "fp32", 1), rows, length)
    np.testing.assert_allclose(x, want_x, rtol=1e-3, atol=1e-4)
    assert np.array_equal(ids, want_ids)


def test_rotary_norms_and_attention_are_fused(bundle):
    backend = ov.open_backend(Bundle.open(bundle("spoken-to-written")), "fp32", 1)
    operators = backend.denoiser(backend.config.max_length).get_runtime_model().get_ops()
    kinds = Counter(operator.get_rt_info()["layerType"].value for operator in operators)
    depth = backend.config.depth
    assert kinds["RoPE"] == 2 * depth
    assert kinds["RMS"] == 4 * depth + 1
    assert kinds["Softmax"] == kinds["MatMul"] == 0  # both are inside the attention subgraphs
    assert kinds["Subgraph"] >= depth


def test_arrays_are_the_engines_own(bundle):
    backend = ov.open_backend(Bundle.open(bundle("cond")), "fp32", 1)
    network = backend.bind("denoiser", 2, 16)
    assert set(network.arrays) == {"z", "x_prev", "t", "s", "mode", "x", "hidden"}
    network.run()
    for name, array in network.arrays.items():
        assert network._request.get_tensor(name).data.ctypes.data == array.ctypes.data
    assert np.any(network.arrays["x"])
    head = backend.bind("discretizer", 2, 16)
    head.run()
    assert head._request.get_tensor("hidden").data.ctypes.data == head.arrays["hidden"].ctypes.data


def test_ties_take_the_lowest_id(tmp_path):
    from test_graph import TINY

    from elf_rt.export.graph import write_graphs
    from elf_rt.export.random_init import random_state

    state = {name: value.numpy() for name, value in random_state(TINY, 1).items()}
    state["unembed_kernel"][:, 30] = state["unembed_kernel"][:, 7]
    state["unembed_bias"][[30, 7]] = 100.0
    write_graphs(tmp_path, TINY, state)
    compiled = openvino.Core().compile_model(tmp_path / "discretizer.onnx", "CPU")
    hidden = torch.randn(2, 9, TINY.hidden_size, generator=torch.Generator().manual_seed(0)).numpy()
    assert (compiled({"hidden": hidden})["ids"] == 7).all()


def test_the_second_load_comes_from_the_cache_and_a_broken_one_is_made_again(bundle, own_cache):
    opened = Bundle.open(bundle("cond"))

    def loaded_from_cache():
        backend = ov.open_backend(opened, "fp32", 1)
        x, ids = call(backend, 2, 16)
        return backend.denoiser(backend.config.max_length).get_property("LOADED_FROM_CACHE"), x, ids

    first, x, ids = loaded_from_cache()
    again, x_again, ids_again = loaded_from_cache()
    assert (first, again) == (False, True)
    assert np.array_equal(x, x_again)
    assert np.array_equal(ids, ids_again)
    for blob in own_cache.rglob("*.blob"):
        blob.chmod(0o644)
        blob.write_bytes(blob.read_bytes()[:1000])
    broken, x_new, _ = loaded_from_cache()
    assert not broken
    assert np.array_equal(x, x_new)


def test_another_bundle_has_another_cache(bundle, own_cache):
    for name in ("cond", "uncond"):
        ov.open_backend(Bundle.open(bundle(name)), "fp32", 1)
    assert len(list((own_cache / "elf-rt" / "openvino").iterdir())) == 2


def test_old_networks_leave_the_cache(bundle, own_cache, monkeypatch):
    monkeypatch.setattr(ov, "KEPT_NETWORKS", 2)
    folder = own_cache / "elf-rt" / "openvino"
    names = []
    for case in ("cond", "uncond", "cond", "t5"):  # cond was used again before t5 came
        ov.open_backend(Bundle.open(bundle(case)), "fp32", 1)
        names.append(max(folder.iterdir(), key=lambda each: each.stat().st_mtime_ns).name)
    assert sorted(each.name for each in folder.iterdir()) == sorted([names[0], names[3]])


def test_a_cache_that_cannot_be_written_costs_a_warning(bundle, own_cache, monkeypatch):
    file = own_cache / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.warns(UserWarning, match="not cached"):
        backend = ov.open_backend(Bundle.open(bundle("cond")), "fp32", 1)
    assert call(backend, 1, 16)[1].shape == (1, 16)


def test_a_cache_that_another_process_holds_is_waited_for_no_longer_than_said(bundle, own_cache, monkeypatch):
    ov.open_backend(Bundle.open(bundle("cond")), "fp32", 1)
    (folder,) = (own_cache / "elf-rt" / "openvino").iterdir()
    hold = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with pytest.warns(UserWarning, match="not cached: another process holds it"):
        ov.open_backend(Bundle.open(bundle("cond")), "fp32", 1)
    holder.communicate(b"\n")


@pytest.mark.parametrize(
    ("asked", "bf16", "given"), [("bf16", False, "fp32"), ("fp16", False, "fp32"), ("fp16", True, "bf16")]
)
def test_what_the_processor_has_not_is_the_nearest_with_one_warning(asked, bf16, given):
    with pytest.warns(UserWarning, match=f"no {asked} on this processor: {given} instead") as caught:
        assert ov._supported(asked, bf16) == given
    assert len(caught) == 1


def test_what_the_processor_has_is_given_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ov._supported("bf16", True) == "bf16"
        assert ov._supported("fp32", True) == "fp32"
        assert ov._supported("int8", False) == "int8"


def test_every_precision_of_the_float32_text_can_be_asked_for(bundle):
    for precision in set(BACKENDS["openvino"].precisions) - {"int8"}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = verify_folder(bundle("spoken-to-written"), backend="openvino", precision=precision)
        assert report.passed, report


def test_a_graph_that_cannot_be_read_is_one_line(bundle, tmp_path, monkeypatch):
    opened = Bundle.open(bundle("cond"))
    bad = tmp_path / "denoiser.onnx"
    bad.write_bytes(b"no graph")
    files = opened.variant("fp32") | {"denoiser": bad}
    monkeypatch.setattr(opened, "variant", lambda precision: files)
    with pytest.raises(BackendError, match="openvino cannot load") as caught:
        ov.open_backend(opened, "fp32", 1)
    assert "\n" not in str(caught.value)


def test_writes_the_text_that_onnx_runtime_writes(bundle):
    prompts = ["she paid nine hundred dollars", "it costs three dollars and fifty cents"]
    texts = []
    for backend in ("openvino", "onnxruntime"):
        with load(bundle("spoken-to-written"), backend, precision="fp32") as model:
            texts.append([result.text for result in model.generate(prompts, n=2, seed=3, steps=4)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_text_does_not_depend_on_its_batch(bundle, precision):
    """Alone, in 8, and in 64. On a processor without bfloat16 the second is the first again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(bundle("shakespeare"), "openvino", precision=precision)
    with model:
        texts = [result.text for result in model.generate(n=64, seed=10, steps=2)]
        assert [result.text for result in model.generate(n=8, seed=20, steps=2)] == texts[10:18]
        assert model.generate(seed=25, steps=2)[0].text == texts[15]


@pytest.mark.parametrize(
    ("agreement", "chosen", "why"),
    [
        ({"bf16": 0.995}, "bf16", "openvino bf16 is the fastest safe one here"),
        ({"bf16": 0.969}, "fp32", "bf16 would change 3.1% of the tokens"),
        ({}, "fp32", "bf16 was not measured at export"),
    ],
)
def test_auto_takes_bf16_only_where_the_text_stays(bundle, monkeypatch, agreement, chosen, why):
    monkeypatch.setitem(BACKENDS, "openvino", replace(BACKENDS["openvino"], precisions=("bf16", "fp32", "int8")))
    monkeypatch.setattr(ov, "_supported", lambda precision, bf16: precision)
    for name in ("tensorrt", "tensorrt-rtx", "torch", "onnxruntime-cuda"):
        monkeypatch.delitem(BACKENDS, name)
    opened = Bundle.open(bundle("cond"))
    opened.agreement = agreement
    backend, reason = open_backend(opened)
    assert backend.precision == chosen
    assert why in reason
    assert open_backend(opened, "openvino", "bf16")[0].precision == "bf16"


def test_export_measures_what_bf16_changes(bundle):
    """Against OpenVINO itself, where the processor has bfloat16: both say safe, or both say not."""
    measured = Bundle.open(bundle("shakespeare")).agreement["bf16"]
    assert 0.93 < measured < 0.99
    if not machine.has_bf16():
        pytest.skip("this processor has no bfloat16")
    ids = {}
    for precision in ("fp32", "bf16"):
        with load(bundle("shakespeare"), "openvino", precision=precision) as model:
            ids[precision] = np.stack([result.ids for result in model.generate(n=16, seed=0, steps=16)])
    assert abs(np.mean(ids["fp32"] == ids["bf16"]) - measured) < 0.02


def test_loading_in_several_threads_leaves_the_locale_alone(bundle):
    """Without one lock for all loading, about one pair of loads in seventy left Python reading files as ASCII."""
    opened = Bundle.open(bundle("uncond"))
    before = locale.setlocale(locale.LC_ALL)
    ov.open_backend(opened, "fp32", 1).close()
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(25):
                for loaded in [pool.submit(ov.open_backend, opened, "fp32", 1) for _ in range(4)]:
                    loaded.result().close()
                assert locale.setlocale(locale.LC_ALL) == before
    finally:
        locale.setlocale(locale.LC_ALL, before)


def test_loading_tells_no_web_service(bundle, tmp_path):
    """Importing OpenVINO looks its telemetry's host up from a process of its own, unless that is hidden from it."""
    code = f"""
import multiprocessing.process, socket, sys
def refuse(*args, **options): raise SystemExit("telemetry")
socket.getaddrinfo = multiprocessing.process.BaseProcess.start = refuse
import elf_rt
elf_rt.load({str(bundle("uncond"))!r}, "openvino", precision="fp32").close()
assert "openvino_telemetry" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_precision_is_given_by_a_backend_that_has_it(bundle, monkeypatch):
    """Not by the nearest of a faster one; where none has it, by the best one with one warning."""
    monkeypatch.setitem(BACKENDS, "openvino", replace(BACKENDS["openvino"], precisions=("fp32", "int8")))
    for name in ("tensorrt", "tensorrt-rtx", "torch", "onnxruntime-cuda"):
        monkeypatch.delitem(BACKENDS, name)
    opened = Bundle.open(bundle("cond"))
    opened.variants["int8"] = opened.variants["fp16"] = opened.variants["fp32"]
    backend, reason = open_backend(opened, precision="int8")
    assert (backend.name, backend.precision, reason) == ("onnxruntime", "int8", "onnxruntime int8, as asked")
    for precision in ("fp16", "bf16"):  # ONNX Runtime only checks those, where it is named
        told = rf"nothing here runs {precision} \(openvino: runs no {precision}; .*\): openvino fp32"
        with pytest.warns(UserWarning, match=told):
            assert open_backend(opened, precision=precision)[0].precision == "fp32"
    assert open_backend(opened, "onnxruntime", "fp16")[1] == "onnxruntime fp16, as asked"
    del opened.variants["int8"]
    with pytest.raises(BackendError, match=r"no int8-openvino graphs.* no int8 graphs: export .* again with"):
        open_backend(opened, precision="int8")
