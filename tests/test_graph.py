"""The float32 graphs against the official code, the reference, and what engines need of their form."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from golden_cases import CASES, golden, relative_error
from onnx_run import Graphs, random_call, written

from elf_rt.export.random_init import random_state
from elf_rt.export.reference import ELF
from elf_rt.params import RELEASED, ModelConfig

TINY = ModelConfig(
    depth=2,
    hidden_size=32,
    num_heads=2,
    head_dim=16,
    mlp_dim=21,
    latent_dim=8,
    bottleneck_dim=4,
    vocab_size=50,
    max_length=20,
)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Graphs]:
    data = golden(request.param)
    return request.param, written(tmp_path_factory.mktemp(request.param), data.config, data.state)


def tiny_reference(seed: int = 0, config: ModelConfig = TINY) -> ELF:
    model = ELF(config)
    model.load_state_dict(random_state(config, seed))
    return model.eval()


def test_calls_equal_the_official_code(case: tuple[str, Graphs]) -> None:
    name, graphs = case
    data = golden(name)
    for kind in ("fwd", "dec"):
        x, _ = graphs.denoise(data.call(kind))
        assert relative_error(x, data.arrays[f"{kind}_x"]) < 2e-5
    assert np.array_equal(graphs.decode(data.call("dec")), data.arrays["dec_logits"].argmax(-1))


def test_graph_inputs_are_those_the_model_has_parameters_for(case: tuple[str, Graphs]) -> None:
    absent = {"no_sc_tokens": {"s"}, "no_self_cond": {"x_prev", "s", "mode"}}.get(case[0], set())
    assert case[1].inputs == [name for name in ("z", "x_prev", "t", "s", "mode") if name not in absent]


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (5, 20), (2, 7), (3, 13)])
@torch.no_grad()
def test_any_number_of_rows_and_any_length(tmp_path: Path, rows: int, length: int, opset: int) -> None:
    model = tiny_reference()
    graphs = written(tmp_path, TINY, model.state_dict(), opset=opset)
    call = random_call(TINY, rows, length, seed=rows * 100 + length, mode=1.0)
    x, hidden = graphs.denoise(call)
    expected_x, expected_hidden = model(*call)
    assert relative_error(x, expected_x) < 2e-6
    assert relative_error(hidden, expected_hidden) < 2e-6
    assert np.array_equal(graphs.decode(call), model.discretize_logits(expected_hidden).argmax(-1))


def test_argmax_takes_the_lowest_id_on_ties(tmp_path: Path) -> None:
    state = random_state(TINY, 1)
    state["unembed_kernel"][:, 30] = state["unembed_kernel"][:, 7]
    state["unembed_bias"][[30, 7]] = 100.0
    assert (written(tmp_path, TINY, state).decode(random_call(TINY, 2, 9, 0, mode=1.0)) == 7).all()


def test_the_same_weights_give_the_same_files(tmp_path: Path) -> None:
    def hashes(folder: Path) -> dict[str, str]:
        written(folder, TINY, random_state(TINY, 2))
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}

    first = hashes(tmp_path / "a")
    assert sorted(first) == ["denoiser.onnx", "discretizer.onnx", "weights.bin"]
    assert first == hashes(tmp_path / "b")


@pytest.mark.parametrize("opset", [20, 23])
def test_files_are_valid_and_no_weight_is_stored_twice(tmp_path: Path, opset: int) -> None:
    written(tmp_path, TINY, random_state(TINY, 0), opset=opset)
    ranges = []
    for file in ("denoiser.onnx", "discretizer.onnx"):
        onnx.checker.check_model(tmp_path / file, full_check=True)
        for tensor in onnx.load(tmp_path / file, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                assert where["location"] == "weights.bin"
                ranges.append((int(where["offset"]), int(where["length"])))
    ranges.sort()
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(ranges))
    assert sum(size for _, size in ranges) > 0.95 * 4 * sum(value.numel() for value in random_state(TINY, 0).values())


def test_openvino_fuses_norms_and_rotary(tmp_path: Path) -> None:
    """At a fixed length; a rotary in any other form, or a norm that is spelt out wrongly, would not be fused."""
    model = tiny_reference()
    written(tmp_path, TINY, model.state_dict())
    core = openvino.Core()
    network = core.read_model(tmp_path / "denoiser.onnx")
    call = dict(zip(("z", "x_prev", "t", "s", "mode"), random_call(TINY, 2, 20, 3), strict=True))
    network.reshape({name: list(value.shape) for name, value in call.items()})
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    kinds = Counter(op.get_rt_info()["layerType"] for op in compiled.get_runtime_model().get_ops())
    assert kinds["RoPE"] == 2 * TINY.depth
    assert kinds["RMS"] == 4 * TINY.depth + 1
    with torch.no_grad():
        expected, _ = model(*call.values())
    assert relative_error(compiled({name: value.numpy() for name, value in call.items()})["x"], expected) < 1e-5


@pytest.mark.slow
def test_elf_b_is_written_and_read_at_full_length(tmp_path: Path) -> None:
    config = RELEASED["ELF-B"]
    graphs = written(tmp_path, config, random_state(config, 0))
    x, hidden = graphs.denoise(random_call(config, 1, config.max_length, 0))
    assert x.shape == (1, 1024, 512)
    assert hidden.shape == (1, 1024, 768)
    assert np.isfinite(x).all()
