"""Precision plans: what is scaled changes no bit, what is rounded fits, and the text stays the same."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from golden_cases import golden, official_checkpoint, relative_error
from onnx import TensorProto, helper, numpy_helper
from onnx_run import Graphs, Reference, generate, random_call, written
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from elf_rt.backends.rounding import rounded_graph
from elf_rt.export.planner import plan_precision, search
from elf_rt.export.precision import FP32, LIMIT, MARGIN, Item, Precision, PrecisionPlan
from elf_rt.export.random_init import random_state
from elf_rt.export.ranges import TORCH_TYPE, Ranges, watch
from elf_rt.export.reference import ELF
from elf_rt.params import ModelConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
FP16_MAX = 65504.0
TINY = ModelConfig(
    depth=2,
    hidden_size=20,
    num_heads=2,
    head_dim=10,
    mlp_dim=21,
    latent_dim=8,
    bottleneck_dim=4,
    vocab_size=50,
    max_length=20,
)
State = dict[str, torch.Tensor]


def elf(config: ModelConfig, state: State) -> ELF:
    model = ELF(config)
    model.load_state_dict(state)
    return model.eval()


def measured(model: ELF, samples: int = 4, steps: int = 4) -> Ranges:
    with watch(model) as ranges:
        generate(Reference(model), model.config, samples, steps)
    return ranges


def planned(precision: Precision, model: ELF) -> PrecisionPlan:
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    return plan_precision(precision, model.config, state, measured(model))


def item(plan: PrecisionPlan, name: str) -> Item:
    return next(i for i in plan.items if i.name == name)


def operations(config: ModelConfig) -> list[str]:
    parts = ("attn.qkv", "attn", "attn.proj", "mlp.w12", "mlp.w3")
    blocks = [f"blocks.{i}.{part}" for i in range(config.depth) for part in parts]
    return ["text_proj.proj1", "text_proj.proj2", "final_layer.linear", "proj", "unembed", *blocks]


def widened(config: ModelConfig, exponents: dict[str, tuple[int, ...]]) -> PrecisionPlan:
    """The layout of FP16 graphs, padding and powers of two included, with every operation in float32."""
    names = dict.fromkeys([*operations(config), *exponents])
    return PrecisionPlan(Precision.FP16, tuple(Item(name, Precision.FP32, exponents.get(name, ())) for name in names))


def test_powers_of_two_change_no_bit_in_float32(tmp_path: Path) -> None:
    state, rng = random_state(TINY, 0), np.random.default_rng(0)

    def some(channels: int) -> tuple[int, ...]:
        return tuple(rng.integers(-9, 12, channels).tolist())

    exponents = {"text_proj.proj2": some(20)}
    for i in range(TINY.depth):
        exponents |= {f"blocks.{i}.attn.{part}": some(n) for part, n in (("q", 1), ("k", 1), ("v", 20), ("proj", 20))}
        exponents |= {f"blocks.{i}.mlp.b": some(21), f"blocks.{i}.mlp.w3": some(20)}
    plain = written(tmp_path / "plain", TINY, state, widened(TINY, {}))
    scaled = written(tmp_path / "scaled", TINY, state, widened(TINY, exponents))
    call = random_call(TINY, 3, 17, 0)
    for actual, expected in zip(scaled.denoise(call), plain.denoise(call), strict=True):
        assert np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("opset", [20, 23])
def test_padding_is_exact(tmp_path: Path, opset: int) -> None:
    """Head width 66 to 72 and vocabulary 97 to 128; the softmax scale and the norm's divisor stay those of 66."""
    data = golden("head_dim_66")
    graphs = written(tmp_path, data.config, data.state, widened(data.config, {}), opset)
    for kind in ("fwd", "dec"):
        assert relative_error(graphs.denoise(data.call(kind))[0], data.arrays[f"{kind}_x"]) < 2e-6
    assert np.array_equal(graphs.decode(data.call("dec")), data.arrays["dec_logits"].argmax(-1))
    shapes = weight_shapes(tmp_path)
    assert shapes["blocks.0.attn.qkv.weight"][0] == 3 * data.config.num_heads * 72
    assert shapes["unembed.weight"][0] == 128


@torch.no_grad()
def test_odd_inner_width_is_padded(tmp_path: Path) -> None:
    model = elf(TINY, random_state(TINY, 1))
    call = random_call(TINY, 2, 20, 0)
    x, _ = written(tmp_path, TINY, model.state_dict(), widened(TINY, {})).denoise(call)
    assert relative_error(x, model(*call)[0]) < 2e-6
    assert weight_shapes(tmp_path)["blocks.0.mlp.w3.weight"] == (20, 32, 1)


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    files = (onnx.load(folder / f"{name}.onnx", load_external_data=False) for name in ("denoiser", "discretizer"))
    return {tensor.name: tuple(tensor.dims) for file in files for tensor in file.graph.initializer}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_rounding_on_the_cpu_is_that_of_the_type(tmp_path: Path, kind: torch.dtype) -> None:
    """ONNX Runtime alone computes a float16 graph in float32, where nothing overflows."""
    onnx_kind = TensorProto.FLOAT16 if kind is torch.float16 else TensorProto.BFLOAT16
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 64, generator=generator), torch.randn(64, 8, generator=generator)
    weight[:, 0] = 4000.0 * x[0].sign()  # sums to more than 65504
    stored = numpy_helper.from_array(weight.numpy(), "w")
    nodes = [
        helper.make_node("Cast", ["x"], ["x16"], to=onnx_kind),
        helper.make_node("Cast", ["w"], ["w16"], to=onnx_kind),
        helper.make_node("MatMul", ["x16", "w16"], ["y16"]),
        helper.make_node("Cast", ["y16"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", (5, 64)), ("y", (5, 8)))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [stored])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / "m.onnx")
    session = ort.InferenceSession(rounded_graph(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    expected = (x.to(kind).float() @ weight.to(kind).float()).to(kind).float()
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected, rtol=0.004, atol=0)
    assert torch.isinf(expected).any() == (kind is torch.float16)


def scale(state: State, names: list[str], factor: float) -> None:
    for name in names:
        state[name] = state[name] * factor


def large_residual(config: ModelConfig, state: State) -> None:
    """Everything that writes to the residual is scaled up; norms do not see it, the head is scaled down."""
    writers = ["text_proj.proj2.weight", "text_proj.proj2.bias", "t_emb_tokens", "self_cond_cfg_tokens", "mode_tokens"]
    writers += [f"{e}.mlp_2.{part}" for e in ("t_embedder", "self_cond_cfg_embedder") for part in ("weight", "bias")]
    layers = [f"blocks.{i}.{layer}" for i in range(config.depth) for layer in ("attn.proj", "mlp.w3")]
    scale(state, writers + [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")], 2.0**18)
    scale(state, ["proj_kernel"], 2.0**-18)


def large_w3(config: ModelConfig, state: State) -> None:
    scale(state, [f"blocks.1.mlp.w3.{part}" for part in ("weight", "bias")], 2.0**17)
    scale(state, ["proj_kernel"], 2.0**-17)


def large_product(config: ModelConfig, state: State) -> None:
    """The second half of w12 up, w3 down: the same function, but for the product between them."""
    for part in ("weight", "bias"):
        state[f"blocks.1.mlp.w12.{part}"][config.mlp_dim :] *= 2.0**15
    scale(state, ["blocks.1.mlp.w3.weight"], 2.0**-15)


def large_proj(config: ModelConfig, state: State) -> None:
    scale(state, [f"blocks.1.attn.proj.{part}" for part in ("weight", "bias")], 2.0**18)
    scale(state, ["proj_kernel"], 2.0**-18)


@pytest.mark.parametrize(
    ("enlarge", "tensor", "scaled"),
    [
        (large_residual, None, "text_proj.proj2"),
        (large_w3, "blocks.1.mlp.w3", "blocks.1.mlp.w3"),
        (large_product, "blocks.1.mlp.product", "blocks.1.mlp.b"),
        (large_proj, "blocks.1.attn.proj", "blocks.1.attn.proj"),
    ],
)
def test_activations_beyond_fp16_survive(tmp_path: Path, enlarge, tensor: str | None, scaled: str) -> None:
    """Naive FP16 gives NaN or other text; the planned one gives that of float32, on 100 samples.

    The model is a trained one, writing short texts: tokens of random weights sit on edges that any rounding moves.
    """
    model, _ = demo("spoken-to-written", 2500, 0)
    config, state = dataclasses.replace(model.config, max_length=16, max_input_length=8), model.state_dict()
    enlarge(config, state)
    model = elf(config, state)
    exact = generate(Reference(model), config, 100, 4)
    plan = planned(Precision.FP16, model)
    if tensor is None:
        hidden = Reference(model).denoise(random_call(config, 4, config.max_length, 0))[1]
        assert np.abs(hidden).max() > FP16_MAX
    else:
        assert measured(model).tensors[tensor].maximum.max() > FP16_MAX

    naive = Reference(model, torch.float16)
    x, _ = naive.denoise(random_call(config, 4, config.max_length, 0))
    assert not np.isfinite(x).all() or (generate(naive, config, 100, 4) == exact).mean() < 0.9

    graphs = written(tmp_path, config, state, plan)
    assert np.isfinite(graphs.denoise(random_call(config, 4, config.max_length, 0))[0]).all()
    assert (generate(graphs, config, 100, 4) == exact).mean() >= 0.99
    assert max(item(plan, scaled).exponents) > 0
    assert "divided by 2^" in item(plan, scaled).reason


@torch.no_grad()
def test_what_cannot_be_scaled_stays_float32_by_name(tmp_path: Path) -> None:
    """The gate of SwiGLU is not linear, so no power of two can be taken off it."""
    state = random_state(TINY, 3)
    for part in ("weight", "bias"):
        state[f"blocks.1.mlp.w12.{part}"][: TINY.mlp_dim] *= 2.0**16
    scale(state, ["blocks.1.mlp.w3.weight"], 2.0**-16)
    model = elf(TINY, state)
    plan = planned(Precision.FP16, model)
    assert plan.precision_of("blocks.1.mlp.w12") is Precision.FP32
    assert plan.precision_of("blocks.0.mlp.w12") is Precision.FP16
    assert item(plan, "blocks.1.mlp.w12").reason.startswith("float32: the gate reaches")
    call = random_call(TINY, 2, 20, 0)
    x, _ = written(tmp_path, TINY, state, plan).denoise(call)
    assert relative_error(x, model(*call)[0]) < 5e-3


@torch.no_grad()
def test_tiny_weights_are_lifted_out_of_the_subnormals(tmp_path: Path) -> None:
    state = random_state(TINY, 4)
    scale(state, ["blocks.0.mlp.w3.weight"], 2.0**-18)
    state["blocks.0.mlp.w12.weight"][TINY.mlp_dim :] *= 2.0**6
    state["blocks.0.mlp.w12.bias"][TINY.mlp_dim :] *= 2.0**6
    model = elf(TINY, state)
    plan = planned(Precision.FP16, model)
    assert min(item(plan, "blocks.0.mlp.w3").exponents) < 0
    call = random_call(TINY, 2, 20, 0)
    x, _ = written(tmp_path, TINY, state, plan).denoise(call)
    assert relative_error(x, model(*call)[0]) < 5e-3


def test_bounds_hold_for_inputs_far_from_the_measured_ones() -> None:
    model = elf(TINY, random_state(TINY, 5))
    plan = planned(Precision.FP16, model)
    with watch(model) as ranges, torch.no_grad():
        for seed in range(20):
            z, x_prev, t, s, mode = random_call(TINY, 4, 20, seed)
            model(z * 10.0 ** (seed % 7), x_prev, t, s, mode)
    bounded = [i for i in plan.items if i.bound is not None]
    assert len(bounded) > 6 * TINY.depth
    for i in bounded:
        name = {"b": "product", "w12": "a"}.get(i.name.rsplit(".", 1)[1])
        tensor = i.name if name is None else f"{i.name.rsplit('.', 1)[0]}.{name}"
        assert ranges.tensors[tensor].maximum.max() <= i.bound


def test_no_rounded_tensor_exceeds_the_limit() -> None:
    state = random_state(TINY, 6)
    scale(state, ["blocks.0.attn.proj.weight"], 3000.0)
    scale(state, ["blocks.1.mlp.w3.weight"], 5000.0)
    model = elf(TINY, state)
    ranges = measured(model)
    checked = [i for i in planned(Precision.FP16, model).items if i.name in ranges.tensors]
    assert len(checked) > 7 * TINY.depth
    for i in checked:
        reach = MARGIN * ranges.tensors[i.name].maximum * np.exp2(-np.array(i.exponents or 0))
        assert reach.max() <= LIMIT or (i.bound is not None and i.bound <= LIMIT)


def test_search_prefers_the_smallest_change() -> None:
    needed = np.array([-5, 3, 0])
    assert search([needed], lambda e: "")[0].tolist() == [0, 3, 0]
    assert search([needed], lambda e: "small" if e[0] > -2 else "")[0].tolist() == [-2, 3, 0]
    assert search([needed + 9, needed], lambda e: "large" if e[1] > 3 else "")[0].tolist() == [0, 3, 0]
    exponents, problem = search([needed], lambda e: "never")
    assert exponents.tolist() == [0, 0, 0]
    assert problem == "never"


def test_float32_needs_no_plan_and_unmeasured_heads_stay_float32() -> None:
    model = elf(TINY, random_state(TINY, 0))
    with watch(model) as ranges, torch.no_grad():
        model(*random_call(TINY, 2, 20, 0))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert plan_precision(Precision.FP32, TINY, state, ranges) is FP32
    assert plan_precision(Precision.FP16, TINY, state, ranges).precision_of("unembed") is Precision.FP32


def test_the_plan_is_json() -> None:
    plan = planned(Precision.FP16, elf(TINY, random_state(TINY, 0)))
    written_plan = json.loads(json.dumps(plan.to_json()))
    assert written_plan["precision"] == "fp16"
    names = [entry["name"] for entry in written_plan["items"]]
    assert len(names) == len(set(names))
    assert set(operations(TINY)) <= set(names)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_types_of_the_graph(tmp_path: Path, precision: Precision) -> None:
    """16-bit products and attention, float32 inputs and outputs, and no float32 GEMM in FP16 (Turing has none)."""
    written(tmp_path, TINY, random_state(TINY, 0), PrecisionPlan(precision))
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "denoiser.onnx"), strict_mode=True)
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    small = TensorProto.FLOAT16 if precision is Precision.FP16 else TensorProto.BFLOAT16
    types = {op: {kinds[n.output[0]] for n in model.graph.node if n.op_type == op} for op in ("MatMul", "Attention")}
    assert types["Attention"] == {small}
    assert types["MatMul"] == ({small} if precision is Precision.FP16 else {small, TensorProto.FLOAT})
    assert {kinds[n.output[0]] for n in model.graph.node if n.op_type == "RMSNormalization"} == {TensorProto.FLOAT}
    ends = [*model.graph.input, *model.graph.output]
    assert {v.type.tensor_type.elem_type for v in ends} == {TensorProto.FLOAT}


def demo(name: str, step: int, samples: int) -> tuple[ELF, tuple[torch.Tensor, torch.Tensor] | None]:
    """A trained model, and sources for it where it takes any."""
    folder = EXAMPLES / name
    config, state = official_checkpoint(folder / f"checkpoint_{step}", folder / "config.yml")
    if not samples or name == "shakespeare":
        return elf(config, state), None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    table = load_file(folder / "encoder.safetensors")["embedding.weight"]
    lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()[:samples]
    latents = torch.zeros(samples, config.max_length, config.latent_dim)
    mask = torch.zeros(samples, config.max_length, dtype=torch.bool)
    for row, line in enumerate(lines):
        ids = [*tokenizer.encode(json.loads(line)["input"]).ids, 1][: config.max_input_length]
        latents[row, : len(ids)] = torch.from_numpy(table[ids] / config.latent_std)
        mask[row, : len(ids)] = True
    return elf(config, state), (latents, mask)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
@pytest.mark.parametrize(("name", "step"), [("spoken-to-written", 2500), ("shakespeare", 2300)])
@torch.no_grad()
def test_error_of_a_call_is_no_larger_than_that_of_autocast(
    tmp_path: Path, name: str, step: int, precision: Precision
) -> None:
    """torch.autocast of the reference is how the official code runs in 16 bits."""
    model, _ = demo(name, step, 0)
    graphs = written(tmp_path, model.config, model.state_dict(), planned(precision, model))
    call = random_call(model.config, 2, model.config.max_length, 0)
    exact, _ = model(*call)
    with torch.autocast("cpu", dtype=TORCH_TYPE[precision]):
        autocast, _ = model(*call)
    assert relative_error(graphs.denoise(call)[0], exact) <= relative_error(autocast.float(), exact)


@pytest.mark.parametrize("steps", [8, 32])
@pytest.mark.parametrize(
    ("name", "step", "precision"),
    [
        ("spoken-to-written", 2500, Precision.FP16),
        ("spoken-to-written", 2500, Precision.BF16),
        ("shakespeare", 2300, Precision.FP16),
    ],
)
def test_trained_models_write_the_same_text(
    tmp_path: Path, name: str, step: int, precision: Precision, steps: int
) -> None:
    samples = 8 if steps == 8 else 4
    model, source = demo(name, step, samples)
    plan = planned(precision, model)
    written(tmp_path / "fp32", model.config, model.state_dict())
    exact = generate(Graphs(tmp_path / "fp32"), model.config, samples, steps, source=source)
    ids = generate(
        written(tmp_path, model.config, model.state_dict(), plan), model.config, samples, steps, source=source
    )
    free = np.ones_like(ids, bool) if source is None else ~source[1].numpy()
    assert (ids == exact)[free].mean() >= 0.99
