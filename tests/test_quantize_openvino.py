"""The int8 variant that NNCF makes for OpenVINO: what runs in int8, how near float32 it is, and that rows are apart."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from golden_cases import golden, relative_error
from test_openvino import call
from test_ort import assert_rows_are_apart

from elf_rt.backends import ov
from elf_rt.bundle import Bundle, write_manifest
from elf_rt.errors import BackendError, BundleError
from elf_rt.export.quantize_openvino import write_openvino_int8
from elf_rt.export.reference import ELF
from elf_rt.export.replay import plan_runs
from elf_rt.params import SamplingParams

pytest.importorskip("nncf")

KEPT = "blocks.1.mlp.w3"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def quantized(bundle, tmp_path_factory) -> Bundle:
    """The bundle of a golden case with an int8 variant in which one layer is left out."""
    target = tmp_path_factory.mktemp("int8") / "b.elfrt"
    shutil.copytree(bundle("uncond"), target)
    data = golden("uncond")
    model = ELF(data.config)
    model.load_state_dict(data.state)
    runs = plan_runs(data.config, {"default": SamplingParams(steps=3)}, None, None, max_steps=3, seed=0)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    manifest["variants"]["int8-openvino"] = write_openvino_int8(target, model.eval(), runs, [KEPT])
    write_manifest(target, {name: value for name, value in manifest.items() if name != "files"})
    return Bundle.open(target)


def test_the_blocks_products_are_int8_and_nothing_else_is(quantized):
    backend = ov.open_backend(quantized, "int8", 1)
    operators = backend.denoiser(backend.config.max_length).get_runtime_model().get_ops()
    products, attention = Counter(), Counter()
    for operator in operators:
        info = operator.get_rt_info()
        kind, precision = info["layerType"].value, info["runtimePrecision"].value
        # A product's weights are its second input: their type tells in what it is computed.
        if kind.startswith("FullyConnected"):
            products[str(operator.input(1).get_element_type())] += 1
        if "Attention" in operator.get_friendly_name():
            attention[precision] += 1
    assert products["<Type: 'int8_t'>"] == 4 * backend.config.depth - 1  # all but the one left out
    assert not {"i8", "u8"} & attention.keys()


def test_it_is_near_float32_and_a_row_does_not_touch_another(quantized):
    exact, _ = call(ov.open_backend(quantized, "fp32", 1), 4, 16)
    backend = ov.open_backend(quantized, "int8", 1)
    x, ids = call(backend, 4, 16)
    assert 1e-4 < relative_error(x, exact) < 0.15
    assert_rows_are_apart(backend, x, ids)


def test_the_denoiser_of_another_model_is_told(quantized, tmp_path):
    """What goes in and out of a file in OpenVINO's own format, only OpenVINO tells."""
    folder = Path(shutil.copytree(quantized.folder, tmp_path / "b.elfrt"))
    graph = folder / "int8-openvino" / "denoiser.xml"
    graph.write_text(graph.read_text(encoding="utf-8").replace('names="z"', 'names="y"'), encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    write_manifest(folder, {name: value for name, value in manifest.items() if name != "files"})
    with pytest.raises(BundleError, match=r"denoiser\.xml is no denoiser of this model \(see its z\)"):
        ov.open_backend(Bundle.open(folder), "int8", 1)


def test_without_nncf_it_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(BackendError, match=r"int8 for OpenVINO needs nncf: pip install 'elf-rt\[int8\]'"):
        write_openvino_int8(tmp_path, None, [], [])


def test_a_bundle_without_it_says_how_to_get_it(bundle):
    with pytest.raises(BundleError, match="export the checkpoint again with --precision int8-openvino"):
        ov.open_backend(Bundle.open(bundle("uncond")), "int8", 1)
