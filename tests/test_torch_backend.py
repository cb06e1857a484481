"""The torch backend: its network, on the CPU, against ONNX Runtime on the same graphs; and what it refuses."""

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import CASES, GOLDEN, golden, relative_error
from plan_bundles import golden_bundle, model_bundle
from torch_on_cpu import CpuTorch, call

from elf_rt import device
from elf_rt.backends import open_backend, torch_cuda, torch_network
from elf_rt.backends.ort import OrtBackend
from elf_rt.backends.torch_cuda import TorchBackend
from elf_rt.backends.torch_weights import Linear
from elf_rt.bundle import Bundle
from elf_rt.device import kernels
from elf_rt.device.cudart import Gpu
from elf_rt.errors import BackendError, GpuMemoryError
from elf_rt.export.graph import variant_files, write_graphs
from elf_rt.export.precision import Item, Precision, PrecisionPlan
from elf_rt.measure.verify import verify
from elf_rt.model import Model


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def bundle(case: str) -> Bundle:
        if case not in made:
            made[case] = golden_bundle(folder / f"{case}.elfrt", case, ("fp32", "fp16", "bf16"))
        return made[case]

    return bundle


@pytest.mark.parametrize("case", CASES)
def test_golden_runs(case: str, bundles: Any) -> None:
    bundle = bundles(case)
    with Model(bundle, lambda _: (CpuTorch(bundle, "fp32"), "test")) as model:
        report = verify(model, GOLDEN / case / "golden.npz")
    assert report.passed, report


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, None)])
@pytest.mark.parametrize("case", CASES)
def test_same_as_onnx_runtime(case: str, shape: tuple[int, int | None], bundles: Any) -> None:
    bundle = bundles(case)
    rows, length = shape[0], shape[1] or bundle.config.max_length
    want_x, want_ids = call(OrtBackend(bundle, "fp32", 2), rows, length, 1.0)
    x, ids = call(CpuTorch(bundle, "fp32"), rows, length, 1.0)
    assert relative_error(x, want_x) < 2e-6
    np.testing.assert_array_equal(ids, want_ids)


@pytest.mark.parametrize(("precision", "most"), [("fp16", 2e-3), ("bf16", 1.2e-2)])
@pytest.mark.parametrize("case", CASES)
def test_16_bits(case: str, precision: str, most: float, bundles: Any) -> None:
    """Within two of the type's roundings of the reference, and not by computing in float32."""
    bundle = bundles(case)
    backend = CpuTorch(bundle, precision)
    x, _ = call(backend, 2, bundle.config.max_length, 0.0)
    want, _ = call(OrtBackend(bundle, "fp32", 2), 2, bundle.config.max_length, 0.0)
    assert 1e-5 < relative_error(x, want) < most
    block = backend.network.blocks[0]
    assert {block.qkv.weight.dtype, block.w3.weight.dtype, block.attention_type} == {
        torch_network.PRECISIONS[precision]
    }


def test_follows_the_precision_plan(tmp_path: Path) -> None:
    """Folds, exceptions and unequal head norms come from the graphs: scaled by powers of two, FP32 where it says so."""
    data = golden("uncond")
    bundle = model_bundle(tmp_path / "a.elfrt", data.config, data.state, ("fp32",))
    items = (
        Item("blocks.0.attn.q", Precision.FP32, (3,)),
        Item("blocks.0.attn.v", Precision.FP32, (-2,)),
        Item("blocks.0.attn.proj", Precision.FP32, (2,)),
        Item("blocks.1.mlp.w3", Precision.FP32, tuple(i % 4 for i in range(data.config.hidden_size))),
        Item("text_proj.proj2", Precision.FP32, (1,)),
    )
    state = {name: tensor.numpy() for name, tensor in data.state.items()}
    folded = tmp_path / "b"
    folded.mkdir()
    write_graphs(folded, data.config, state, PrecisionPlan(Precision.FP32, items))
    plain = CpuTorch(bundle, "fp32")
    bundle.variant = lambda precision: {part: folded / name for part, name in variant_files().items()}  # type: ignore[method-assign]
    scaled = CpuTorch(bundle, "fp32")
    q_eps, k_eps = scaled.network.blocks[0].eps
    assert q_eps != k_eps
    assert scaled.network.blocks[1].w3.scale is not None
    want_x, want_ids = call(plain, 2, data.config.max_length, 0.0)
    x, ids = call(scaled, 2, data.config.max_length, 0.0)
    assert relative_error(x, want_x) < 2e-6
    np.testing.assert_array_equal(ids, want_ids)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_compiled_is_the_same(precision: str, bundles: Any) -> None:
    """torch.compile of what stands between the products, here for the CPU."""
    bundle = bundles("no_sc_tokens")
    backend = CpuTorch(bundle, precision)
    plain = [call(backend, rows, bundle.config.max_length, 1.0) for rows in (1, 3)]
    backend.fuse()
    assert backend.fused
    for (x, ids), rows in zip(plain, (1, 3), strict=True):
        fused_x, fused_ids = call(backend, rows, bundle.config.max_length, 1.0)
        assert relative_error(fused_x, x) < (2e-6 if precision == "fp32" else 1e-3)
        assert np.mean(fused_ids == ids) >= (1.0 if precision == "fp32" else 0.99)


def test_only_rows_and_length_become_variables(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels know all widths: compiled for a second shape they take R, L and S as they come; a third compiles none."""
    sizes: list[int | torch.SymInt] = []
    torch.compiler.reset()  # what other tests compiled

    def note(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        values = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
        sizes.extend(size for value in values if isinstance(value, torch.Tensor) for size in value.shape)
        return module

    bundle, compile_it = bundles("cond"), torch.compile
    monkeypatch.setattr(torch, "compile", functools.wraps(compile_it)(functools.partial(compile_it, backend=note)))
    backend = CpuTorch(bundle, "fp32")
    backend.fuse()
    assert backend.fused and sizes and not any(isinstance(size, torch.SymInt) for size in sizes)
    sizes.clear()
    rows, length = 5, bundle.config.max_length
    call(backend, rows, length, 0.0)
    variable = {int(size) for size in sizes if isinstance(size, torch.SymInt)}
    assert variable == {rows, length, bundle.config.num_prefix_tokens + length, rows * length}
    sizes.clear()
    call(backend, rows - 1, length - 1, 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # part of torch's global state, which anybody may change
    try:
        call(backend, rows, length, 0.0)
    finally:
        torch.set_num_threads(threads)
    assert not sizes


def test_settings_of_the_caller_change_nothing(bundles: Any) -> None:
    bundle = bundles("cond")
    backend = CpuTorch(bundle, "fp32")
    plain, matmul = call(backend, 2, 5, 1.0), torch.backends.cuda.matmul
    seen: list[bool] = []
    product = Linear.product

    def note(layer: Linear, x: torch.Tensor) -> torch.Tensor:
        seen.append(matmul.allow_fp16_reduced_precision_reduction or matmul.allow_bf16_reduced_precision_reduction)
        return product(layer, x)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(Linear, "product", note)
        x, ids = call(backend, 2, 5, 1.0)
    assert np.array_equal(x, plain[0]) and np.array_equal(ids, plain[1])
    assert seen and not any(seen)  # sums of 16-bit products stay in float32
    assert matmul.allow_fp16_reduced_precision_reduction  # and torch's default is back


def test_settings_of_the_caller_survive_two_threads() -> None:
    """The second thread saves what the first set, unless it waits."""
    matmul, inside, order = torch.backends.cuda.matmul, threading.Event(), []

    def second() -> None:
        inside.wait(10)
        with torch_cuda.own_settings(torch):
            order.append("second")
            assert not matmul.allow_fp16_reduced_precision_reduction

    thread = threading.Thread(target=second)
    thread.start()
    with torch_cuda.own_settings(torch):
        inside.set()
        thread.join(0.05)  # long enough to see it go on, were there no lock
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and matmul.allow_fp16_reduced_precision_reduction


def test_a_failed_call_holds_on_to_no_memory(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its error is kept: it names the call, and not what was computed before."""
    computed: list[weakref.ref[torch.Tensor]] = []

    def refuse(*arguments: Any) -> None:
        activation = torch.zeros(3)
        computed.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle: None)
    backend = TorchBackend(bundles("uncond"), "fp32", "cpu")
    graph = backend.bind("denoiser", 1, 8, 1)
    monkeypatch.setattr(backend.network, "denoise", refuse)
    with pytest.raises(GpuMemoryError, match="no GPU memory for a network call of 1 rows of 8 tokens") as kept:
        graph.enqueue()
    assert kept.value.__cause__ is not None and computed[0]() is None


def test_without_a_compiler_it_says_so_and_runs(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def call(*args: Any) -> None:
            raise RuntimeError("Failed to find C compiler.\nmore lines")

        return call

    bundle = bundles("uncond")
    backend = CpuTorch(bundle, "fp32")
    expected, _ = call(backend, 1, 5, 0.0)
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(UserWarning, match="torch.compile does not work here.*slower: Failed to find C compiler"):
        backend.fuse()
    np.testing.assert_array_equal(call(backend, 1, 5, 0.0)[0], expected)
    assert backend.describe()["fused"] == "no"


def test_logits_are_decoded_in_parts(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles("uncond")
    backend = CpuTorch(bundle, "fp32")
    _, whole = call(backend, 3, 7, 1.0)
    monkeypatch.setattr(torch_network, "LOGITS_AT_ONCE", 4 * bundle.config.vocab_size)
    _, parts = call(backend, 3, 7, 1.0)
    np.testing.assert_array_equal(parts, whole)


def test_graphs_without_named_norms_are_refused(tmp_path: Path) -> None:
    data = golden("uncond")
    bundle = model_bundle(tmp_path / "a.elfrt", data.config, data.state, ("fp32",), opset=20)
    with pytest.raises(BackendError, match="older engines: export again without --opset"):
        CpuTorch(bundle, "fp32")


# ---- bad input


def test_no_gpu_is_one_clear_line(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_gpu", lambda: "no NVIDIA GPU is visible")
    assert torch_cuda.unavailable() == "no NVIDIA GPU is visible"
    with pytest.raises(BackendError, match=r"^torch: no NVIDIA GPU is visible$"):
        open_backend(bundles("uncond"), "torch", "fp16")


def test_a_torch_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "unavailable", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(torch_cuda.unavailable())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch for CUDA 13.0 cannot use this driver" in str(torch_cuda.unavailable())


@pytest.mark.parametrize("package", ["torch", "onnx"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"{package} is not installed" in str(torch_cuda.unavailable())


def test_missing_nvrtc_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "find_gpu", lambda: Gpu("a GPU", 89))
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.setattr(kernels, "_nvrtc", kernels._nvrtc.__wrapped__)  # another test may have loaded it already
    assert "NVRTC is not installed" in str(device.unavailable())


def test_out_of_memory_names_what_did_not_fit(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles("uncond")
    backend = TorchBackend(bundle, "fp32", "cpu")

    def refuse(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(BackendError, match="no GPU memory for 64 rows of 24 tokens: use a smaller batch") as caught:
        backend.bind("denoiser", 64, 24, 1)
    assert "\n" not in str(caught.value)
