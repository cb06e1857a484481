"""Building plans: real TensorRT-RTX engines without a GPU, keys, and folders that survive kills and races."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import install_cuda
from fake_tensorrt import install_tensorrt
from golden_cases import golden
from plan_bundles import NO_GPU, golden_bundle, model_bundle, rtx_spec

from elf_rt.bundle import Bundle
from elf_rt.device.cudart import Gpu
from elf_rt.engines.build import PlanRequest, build, find_built, plan_spec
from elf_rt.engines.recipe import RECIPES, version_tuple
from elf_rt.engines.shapes import buffer_bytes, parse_profiles, parse_range
from elf_rt.errors import BackendError, ElfError, InputError
from elf_rt.export.random_init import random_state
from elf_rt.params import ModelConfig
from elf_rt.plans import RECORD, Machine, Profile, Range, Record, find_plans, this_machine
from elf_rt.plans import TENSORRT_RTX as RTX

SMS = (75, 80, 86, 89, 120)
MB = 1e6

# Many narrow heads, so that a layer's scores (heads x S x S) dwarf everything that grows with S alone.
LONG = ModelConfig(
    depth=2,
    hidden_size=128,
    num_heads=8,
    head_dim=16,
    mlp_dim=64,
    latent_dim=32,
    bottleneck_dim=16,
    vocab_size=64,
    max_length=512,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return golden_bundle(tmp_path_factory.mktemp("engines") / "uncond.elfrt")


@pytest.fixture
def fresh(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The module's bundle with a plans folder of its own."""
    monkeypatch.setattr(Bundle, "plans_dir", tmp_path / "plans")
    return bundle


def sizes(record: Record) -> int:
    return sum(engine.num_bytes for engine in record.engines.values())


class TestRealBuilds:
    """TensorRT-RTX, as installed."""

    @pytest.mark.parametrize("sm", SMS)
    def test_fp16_builds_with_fused_attention_for_each_gpu(self, fresh: Bundle, sm: int) -> None:
        record = build(rtx_spec(fresh, sms=(sm,)))
        denoiser = record.engines["denoiser"]
        assert denoiser.attention == {"fused": fresh.config.depth}
        assert denoiser.matmuls["fp16"] >= 4 * fresh.config.depth
        for name, engine in record.engines.items():
            path = fresh.plans_dir / rtx_spec(fresh, sms=(sm,)).target.name / f"{name}.plan"
            assert path.stat().st_size == engine.num_bytes
            assert engine.scratch_bytes and engine.weights_bytes

    @pytest.mark.parametrize("sms", [(80,), (86, 89, 120)])
    def test_fp32_builds_with_attention_taken_apart(self, fresh: Bundle, sms: tuple[int, ...]) -> None:
        record = build(rtx_spec(fresh, "fp32", sms))
        assert record.sms == sms
        assert record.engines["denoiser"].attention == {"open": fresh.config.depth}
        assert set(record.engines["denoiser"].layers) == {"fp32"}

    @pytest.mark.parametrize("case", ["no_sc_tokens", "no_self_cond", "head_dim_66"])
    def test_other_models_build(self, case: str, tmp_path: Path) -> None:
        record = build(rtx_spec(golden_bundle(tmp_path / "m.elfrt", case, ("fp16",)), sms=(89,)))
        assert record.engines["denoiser"].attention["fused"] == golden(case).config.depth

    @pytest.mark.parametrize("opset", [20, 23])
    def test_scratch_memory_shows_that_attention_is_fused(self, opset: int, tmp_path: Path) -> None:
        """16-bit scratch grows with L, FP32 scratch (no fused kernel) with L x L; also with attention spelled out."""
        precisions = ("fp16", "bf16", "fp32")
        bundle = model_bundle(tmp_path / "long.elfrt", LONG, random_state(LONG, seed=0), precisions, opset)
        growth: dict[str, int] = {}
        for precision in precisions:
            short, long = (
                build(rtx_spec(bundle, precision, batch="4", length=length)).engines["denoiser"].scratch_bytes
                for length in ("256", "512")
            )
            assert short is not None and long is not None
            growth[precision] = long - short
        scores = 4 * LONG.num_heads * 2 * (524**2 - 268**2)  # bytes: 4 rows, one layer, 16 bits
        assert growth["fp32"] > scores
        assert growth["fp16"] < scores / 2 and growth["bf16"] < scores / 2

    def test_profiles_and_dynamic_batches(self, fresh: Bundle) -> None:
        record = build(rtx_spec(fresh, batch="1,2:4:8"))
        assert record.profiles == (
            Profile(Range(1, 1, 1), Range(16, 16, 16)),
            Profile(Range(2, 4, 8), Range(16, 16, 16)),
        )

    def test_a_refusal_carries_the_reason_and_leaves_nothing(
        self, fresh: Bundle, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(BackendError, match=r"cannot build .*denoiser\.onnx: .*FP32 GEMM is not supported"):
            build(rtx_spec(fresh, "fp32", (75,)))
        assert not fresh.plans_dir.exists()
        assert capfd.readouterr() == ("", "")

    def test_a_damaged_graph_is_refused_by_its_hash(self, tmp_path: Path) -> None:
        bundle = golden_bundle(tmp_path / "m.elfrt")
        path = bundle.folder / "fp16" / "denoiser.onnx"
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(ElfError, match=r"denoiser\.onnx was altered after export"):
            rtx_spec(Bundle.open(bundle.folder))


class TestKey:
    """The same request finds the same plan; anything else that went into it gives another."""

    def test_same_request_same_key(self, fresh: Bundle) -> None:
        assert rtx_spec(fresh).key == rtx_spec(fresh).key

    @pytest.mark.parametrize(
        "change",
        [
            {"precision": "fp32"},
            {"sms": (86,)},
            {"sms": (86, 89)},
            {"batch": "2"},
            {"batch": "1:1:2"},
            {"batch": "1,2"},
            {"length": "15"},
        ],
    )
    def test_each_part_of_a_request_changes_it(self, fresh: Bundle, change: dict[str, Any]) -> None:
        assert rtx_spec(fresh, **change).key != rtx_spec(fresh).key

    def test_weights_version_system_and_effort_change_it(
        self, fresh: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state = dict(golden("uncond").state)
        state["proj_bias"] = state["proj_bias"] + 1
        other = model_bundle(tmp_path / "other.elfrt", fresh.config, state)
        recipe = RECIPES["tensorrt-rtx"]
        request = PlanRequest("fp16", (89,), parse_profiles("1", None, fresh.config))
        keys = {
            plan_spec(fresh, recipe, NO_GPU, request).key,
            plan_spec(other, recipe, NO_GPU, request).key,
            plan_spec(fresh, recipe, dataclasses.replace(NO_GPU, os="windows-amd64"), request).key,
            plan_spec(fresh, recipe, NO_GPU, dataclasses.replace(request, opt_level=5)).key,
        }
        monkeypatch.setattr(sys.modules["tensorrt_rtx"], "__version__", "1.8.0.1")
        assert len(keys | {plan_spec(fresh, recipe, NO_GPU, request).key}) == 5

    def test_a_plan_is_reused_until_it_is_damaged(self, fresh: Bundle) -> None:
        spec = rtx_spec(fresh)
        assert find_built(spec.target, spec.key) is None
        record = build(spec)
        assert find_built(spec.target, spec.key) == record == Record.read(spec.target)
        plan = spec.target / "discretizer.plan"
        good = plan.read_bytes()
        plan.write_bytes(good[:-1])
        assert find_built(spec.target, spec.key) is None
        assert build(spec) == find_built(spec.target, spec.key)
        assert len(plan.read_bytes()) == Record.read(spec.target).engines["discretizer"].num_bytes
        assert [path.name for path in fresh.plans_dir.iterdir()] == [spec.target.name]


def test_record_names_this_machine_and_what_it_was_made_from(fresh: Bundle) -> None:
    record = build(rtx_spec(fresh, sms=(86, 89)))
    values = json.loads((rtx_spec(fresh, sms=(86, 89)).target / RECORD).read_text(encoding="utf-8"))
    assert (values["format"], values["schema_version"]) == ("elf-rt-plan", 1)
    assert (values["library"], values["sms"], values["gpu"]) == ("tensorrt-rtx", [86, 89], None)
    assert values["graphs"]["denoiser"] == fresh.manifest.files["fp16/denoiser.onnx"]
    assert values["settings"]["tf32"] is True
    here = Machine(this_machine().os, Gpu("NVIDIA GeForce RTX 4090", 89))
    assert [plan for _, plan in find_plans(fresh, "fp16", RTX, record.version, here)] == [record]
    with pytest.raises(BackendError, match=r"built for sm_86/sm_89 with TensorRT-RTX .*; this machine is sm_120 with"):
        find_plans(fresh, "fp16", RTX, record.version, Machine(here.os, Gpu("NVIDIA GeForce RTX 5090", 120)))


class TestShapes:
    CONFIG = golden("uncond").config

    @pytest.mark.parametrize(("text", "expected"), [("8", (8, 8, 8)), ("1:8:32", (1, 8, 32)), (" 2 ", (2, 2, 2))])
    def test_ranges(self, text: str, expected: tuple[int, int, int]) -> None:
        assert parse_range(text, "--batch") == Range(*expected)

    @pytest.mark.parametrize("text", ["", "0", "1:2", "4:2:8", "a", "-1", "1:2:3:4", "1.5", "²"])
    def test_bad_ranges_name_the_form(self, text: str) -> None:
        with pytest.raises(InputError, match=r"--batch must"):
            parse_range(text, "--batch")

    def test_too_long(self) -> None:
        with pytest.raises(InputError, match="--length must be at most 16"):
            parse_profiles("1", "17", self.CONFIG)

    @pytest.mark.parametrize("case", ["uncond", "no_self_cond"])
    def test_buffer_bytes_are_those_of_the_graphs(self, case: str, tmp_path: Path) -> None:
        bundle = golden_bundle(tmp_path / "m.elfrt", case, ("fp32",))
        rows, length = 3, 7
        tensors: dict[str, int] = {}
        for graph in ("denoiser", "discretizer"):
            model = onnx.load(bundle.variant("fp32")[graph], load_external_data=False).graph
            for value in [*model.input, *model.output]:
                kind = value.type.tensor_type
                shape = [dim.dim_value or {"rows": rows, "length": length}[dim.dim_param] for dim in kind.shape.dim]
                item = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
                tensors[value.name] = int(np.prod(shape)) * item
        scalars = sum(4 * rows for name in ("t", "s", "mode") if name not in tensors)  # counted all the same
        assert buffer_bytes(bundle.config, rows, length) == sum(tensors.values()) + scalars


class TestRecipes:
    RTX = RECIPES["tensorrt-rtx"]
    TRT = RECIPES["tensorrt"]
    ADA = Machine("linux-x86_64", Gpu("NVIDIA GeForce RTX 4090", 89))

    def test_turing_is_built_apart(self) -> None:
        assert self.RTX.groups((120, 75, 86), "fp16", NO_GPU) == [(86, 120), (75,)]

    def test_without_sm_the_gpu_here_or_all_that_go_together(self) -> None:
        assert self.RTX.groups((), "fp16", self.ADA) == [(89,)]
        assert self.RTX.groups((), "fp16", NO_GPU) == [(80, 86, 89, 120, 121)]
        assert self.TRT.groups((), "fp16", self.ADA) == [(89,)]

    @pytest.mark.parametrize(
        ("sms", "precision", "match"),
        [
            ((90,), "fp16", "cannot build for sm_90, only for 75, 80, .*--target tensorrt on that machine"),
            ((12,), "fp16", "cannot build for sm_12, .*check --sm"),
            ((75,), "bf16", "sm_75 has no bfloat16: build with --precision fp16"),
            ((75,), "fp32", "no float32 matrix product on sm_75: build with --precision fp16"),
        ],
    )
    def test_what_rtx_cannot_do(self, sms: tuple[int, ...], precision: str, match: str) -> None:
        with pytest.raises(BackendError, match=match):
            self.RTX.groups(sms, precision, NO_GPU)

    def test_tensorrt_needs_the_gpu_here(self) -> None:
        with pytest.raises(BackendError, match=r"builds on the GPU .* here is none \(no NVIDIA driver\)"):
            self.TRT.groups((), "fp16", NO_GPU)
        with pytest.raises(BackendError, match=r"only for the GPU of this machine \(sm_89\)"):
            self.TRT.groups((86,), "fp16", self.ADA)

    def test_versions_compare_by_number(self) -> None:
        assert version_tuple("10.13.0.35") == (10, 13, 0, 35) > version_tuple("10.3")
        with pytest.raises(BackendError, match=r"TensorRT 8\.6\.1 is too old: elf-rt needs 10\.3 or later"):
            self.TRT.check_version("8.6.1")


class TestPlainTensorrt:
    """The same code on stand-ins that have exactly the names of one real version."""

    @pytest.fixture(params=["10.3.0", "10.16.1.11", "11.4.0.106"])
    def version(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        install_tensorrt(monkeypatch, request.param, install_cuda(monkeypatch))
        return str(request.param)

    @pytest.fixture
    def request_for(self) -> Callable[[Bundle, str], Any]:
        def make(bundle: Bundle, precision: str = "fp16") -> Any:
            request = PlanRequest(precision, (89,), parse_profiles("1:2:4", None, bundle.config), opt_level=2)
            return plan_spec(bundle, RECIPES["tensorrt"], this_machine(), request)

        return make

    def test_builds(self, version: str, tmp_path: Path, request_for: Callable[..., Any]) -> None:
        data = golden("uncond")
        opset = 20 if version == "10.3.0" else 23
        bundle = model_bundle(tmp_path / "m.elfrt", data.config, data.state, ("fp32", "fp16"), opset)
        spec = request_for(bundle)
        record = build(spec)
        assert spec.target.name.startswith(f"sm89-nvidia-geforce-rtx-4090-tensorrt-{version}-")
        assert (record.gpu, record.engines["denoiser"].scratch_bytes) == ("NVIDIA GeForce RTX 4090", 12345)
        assert record.engines["denoiser"].attention == ({} if opset == 20 else {"fused": 2})
        plan = json.loads((spec.target / "denoiser.plan").read_text(encoding="utf-8"))
        assert plan["profiles"][0]["z"] == [[1, 16, 32], [2, 16, 32], [4, 16, 32]]
        assert (plan["opt_level"], plan["tf32"]) == (2, True)
        exact = request_for(bundle, "fp32")
        assert build(exact).engines["denoiser"].attention == ({} if opset == 20 else {"open": 2})
        assert json.loads((exact.target / "denoiser.plan").read_text(encoding="utf-8"))["tf32"] is False

    def test_timing_cache_is_read_and_written(
        self, version: str, tmp_path: Path, request_for: Callable[..., Any]
    ) -> None:
        data = golden("uncond")
        bundle = model_bundle(tmp_path / "m.elfrt", data.config, data.state, ("fp32",), opset=20)
        cache = tmp_path / "timings"
        cache.write_bytes(b"before;")
        build(request_for(bundle, "fp32"), timing_cache=cache)
        assert cache.read_bytes() == b"before;timed;timed;"  # once for each graph
        cache.write_bytes(b"another GPU;")
        with pytest.raises(BackendError, match=r"timings was timed on another GPU or version: delete it"):
            build(request_for(bundle, "fp32"), timing_cache=cache)

    def test_too_old_for_the_operators(self, version: str, fresh: Bundle, request_for: Callable[..., Any]) -> None:
        if version != "10.3.0":
            assert build(request_for(fresh)).version == version
            return
        with pytest.raises(BackendError, match=r"needs TensorRT 10\.1[45], this is 10\.3\.0: .*export .* --opset 20"):
            build(request_for(fresh))
        assert not fresh.plans_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ELF-B", "ELF-M", "ELF-L"])
def test_released_sizes(model: str, tmp_path: Path) -> None:
    """On every GPU: little more than half the size of FP32, attention fused, and no L x L tensor in scratch memory."""
    script, table = Path(__file__).parents[1] / "benchmarks" / "engines.py", tmp_path / "table.json"
    subprocess.run([sys.executable, script, "--models", model, "--json", table], check=True)
    rows = {
        row["sm"]: row for row in json.loads(table.read_text(encoding="utf-8"))["rows"] if row["precision"] == "fp16"
    }
    assert set(rows) == set(SMS)
    for row in rows.values():
        assert row["of_fp32"] <= 0.55
        assert "open" not in row["attention"]
        assert row["growth_mb"] < row["scores_growth_mb"]
