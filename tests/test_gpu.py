"""The torch backend and the device engine on a real GPU (``pytest -m gpu``); test_device.py does without one."""

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EXAMPLES, GOLDEN, export
from golden_cases import CASES

import elf_rt
from elf_rt.backends import torch_cuda
from elf_rt.device.cudart import Gpu, find_gpu
from elf_rt.errors import BackendError
from elf_rt.measure.verify import verify
from elf_rt.model import Draft, Model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not isinstance(find_gpu(), Gpu), reason="no NVIDIA GPU"),
    pytest.mark.filterwarnings("error:.*cannot be captured"),
]
PROMPTS = ["hello there how are you", "i said no to him on monday"]


@pytest.fixture(scope="module", autouse=True)
def usable() -> None:
    if reason := torch_cuda.unavailable():
        pytest.skip(f"torch: {reason}")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    return export(EXAMPLES / "spoken-to-written", folder / "spoken.elfrt", precisions=("fp32", "fp16", "bf16"))


@pytest.fixture
def opened() -> Iterator[Callable[..., Model]]:
    """elf_rt.load, closed after the test."""
    models: list[Model] = []

    def open_model(path: Path, backend: str = "torch", precision: str = "fp32") -> Model:
        models.append(elf_rt.load(path, backend, precision=precision))
        return models[-1]

    yield open_model
    for model in models:
        model.close()


@pytest.mark.parametrize("case", CASES)
def test_golden_runs(case: str, bundle: Any, opened: Any) -> None:
    report = verify(opened(bundle(case)), GOLDEN / case / "golden.npz")
    assert report.passed, report


@pytest.mark.parametrize("name", ["spoken-to-written", "shakespeare"])
def test_demo_models_give_the_same_ids_as_on_the_cpu(name: str, bundle: Any, opened: Any) -> None:
    path = bundle(name)
    prompts = PROMPTS if name == "spoken-to-written" else None
    options: dict[str, Any] = {"n": 3, "seed": 5, "steps": 8}
    on_cpu = opened(path, "onnxruntime").generate(prompts, **options)
    on_gpu = opened(path).generate(prompts, **options)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bits_pass_the_replay(precision: str, spoken: Path, opened: Any) -> None:
    report = verify(opened(spoken, precision=precision))
    assert report.passed, report


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_both_ways_of_the_blocks_agree_and_the_choice_is_named(precision: str, spoken: Path, opened: Any) -> None:
    import torch

    from elf_rt.backends import torch_tuning

    model = opened(spoken, precision=precision)
    model.generate(PROMPTS[0], steps=2)
    said = model.backend.describe()
    assert said["blocks"] and said["attention"]
    network, length = model.backend.network, model.bundle.config.max_length
    if network.fused is None:
        pytest.skip(said["passed over"])
    possible = torch_tuning.tiles_of(network.fused, find_gpu().sm)
    plain = torch_tuning.Choice()
    fused = torch_tuning.Choice(tiles={product: tiles[0] for product, tiles in possible.items()})
    with torch.inference_mode():
        for rows in (1, 3):
            call = torch_tuning.Call(network, rows, length)
            expected, most = call.run(plain).clone(), 0.01 if precision == "fp16" else 0.05
            assert torch_tuning.refusal(partial(call.run, fused), expected, most) is None


def test_a_step_is_one_graph_launch(spoken: Path, opened: Any) -> None:
    """Beside them only the start of the text and its token head put kernels on the stream."""
    from torch.profiler import ProfilerActivity, profile

    model = opened(spoken, precision="fp16")
    model.generate(PROMPTS[0], seed=1, steps=32)
    counts = []
    for steps in (8, 32):
        before = model.stats()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            model.generate(PROMPTS[0], seed=2, steps=steps)
        after = model.stats()
        calls = {event.key: event.count for event in trace.key_averages()}
        graphs = calls.get("cudaGraphLaunch", 0) + calls.get("cuGraphLaunch", 0)
        assert graphs == after.calls - before.calls == steps + 1
        assert after.captures == before.captures
        counts.append(sum(calls.get(name, 0) for name in ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx")))
    assert counts[0] == counts[1]


def test_requests_never_capture_anew(spoken: Path, opened: Any) -> None:
    """Texts of all kinds side by side: no more graphs than buckets, and each text is what it is alone."""
    model, rng = opened(spoken), np.random.default_rng(0)
    model.generate(PROMPTS, n=64, seed=0, steps=8)  # tries what pays
    captures = model.stats().captures
    texts = []
    for seed in range(100):
        params = model.params(
            steps=int(rng.integers(1, 9)),
            sampler=str(rng.choice(["ode", "sde", "ab2"])),
            guidance_scale=float(rng.choice([1.0, 2.0])),
        )
        texts.append(elf_rt.Text(PROMPTS[seed % 2], seed=seed, params=params))
    results = model.write(texts)
    buckets = 1 + model.stats().max_rows.bit_length()
    assert model.stats().captures <= max(captures, buckets)
    for index in rng.choice(100, 10, replace=False):
        (alone,) = model.write([texts[index]])
        np.testing.assert_array_equal(results[index].ids, alone.ids)
    pending = [model.submit(text, drafts_every=int(rng.integers(0, 3))) for text in texts[:20]]
    for each, expected in zip(pending, results, strict=False):
        np.testing.assert_array_equal(each.result(60).ids, expected.ids)


def test_streams_and_cancels(spoken: Path, opened: Any) -> None:
    model = opened(spoken)
    whole = model.generate(PROMPTS[0], seed=3, steps=8)[0]
    events = list(model.stream(PROMPTS[0], seed=3, steps=8, drafts_every=2))
    np.testing.assert_array_equal(events[-1][0].ids, whole.ids)
    assert [event.step for event in events[:-1] if event.texts is not None] == [2, 4, 6]
    cancelled = model.stream(PROMPTS[0], seed=3, steps=8, drafts_every=2)
    assert isinstance(next(cancelled), Draft)
    cancelled.close()
    np.testing.assert_array_equal(model.generate(PROMPTS[0], seed=3, steps=8)[0].ids, whole.ids)


def test_a_text_does_not_depend_on_what_is_beside_it(spoken: Path, opened: Any) -> None:
    model = opened(spoken)
    together = model.generate(PROMPTS[0], n=5, seed=10, steps=4)
    alone = model.generate(PROMPTS[0], seed=13, steps=4)[0]
    np.testing.assert_array_equal(together[3].ids, alone.ids)


def test_out_of_memory_shrinks_the_calls_and_leaves_the_model_usable(spoken: Path, opened: Any) -> None:
    """With memory for little more than one text, all are written; with none, each is refused with one line."""
    import torch

    model = opened(spoken)
    expected = model.generate(PROMPTS[0], n=64, seed=1, steps=2)

    def squeezed(left: int) -> Any:
        torch.cuda.empty_cache()
        return torch.empty(max(1, torch.cuda.mem_get_info()[0] - left), dtype=torch.uint8, device="cuda")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = opened(spoken)
        other.generate(PROMPTS[0], seed=1, steps=2)
        ballast = squeezed(2**26)
        written = other.generate(PROMPTS[0], n=64, seed=1, steps=2)
    for ours, theirs in zip(written, expected, strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
    assert len([w for w in caught if "rows from now on" in str(w.message)]) <= 8  # once for each size
    del ballast
    third = opened(spoken)
    ballast = squeezed(2**16)
    with pytest.raises(BackendError, match="memory"):
        third.generate(PROMPTS[0], seed=1, steps=2)
    del ballast
    torch.cuda.empty_cache()
    np.testing.assert_array_equal(third.generate(PROMPTS[0], seed=1, steps=2)[0].ids, expected[0].ids)


def test_the_integrator_moves_bytes_as_fast_as_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 80 % of the bandwidth of a device copy that moves as many bytes."""
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    from gpu_bandwidth import integrator_bandwidth

    measured = integrator_bandwidth(texts=8, length=1024, width=512)
    assert measured["share_of_copy"] >= 0.8, measured


def test_memory_goes_back(spoken: Path) -> None:
    import torch

    def used() -> int:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    def run() -> None:
        with elf_rt.load(spoken, "torch", precision="fp16") as model:
            model.generate(PROMPTS[0], n=8, seed=1, steps=4)

    run()  # libraries and kernels stay loaded
    before = used()
    for _ in range(3):
        run()
    time.sleep(0.1)
    assert used() - before < 2**24
