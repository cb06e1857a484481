"""The device engine end to end on a fake GPU that runs the real kernel, against the host engine and the golden runs."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings.runtime import cudaError_t
from engine_runs import assert_same, events_of, golden_bundles, programs_of, written
from fake_gpu import FakeBackend, FakeGpu, assert_nothing_left, install_gpu, on_device, on_host
from golden_cases import CASES

from elf_rt.backends import open_backend, ort_cuda
from elf_rt.backends.ort_cuda import OrtCudaBackend
from elf_rt.device.engine import DEPTH
from elf_rt.errors import BackendError
from elf_rt.measure.verify import verify
from elf_rt.model import Model
from elf_rt.sampling.program import Program

pytestmark = pytest.mark.filterwarnings("error")  # a refused capture warns
gpu = pytest.fixture(install_gpu)
bundles = pytest.fixture(golden_bundles, scope="module")
NO_MEMORY = cudaError_t.cudaErrorMemoryAllocation


# ---- results


@pytest.mark.parametrize("case", CASES)
def test_golden_runs_give_the_recorded_ids(case: str, bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles(case)
    with Model(bundle, lambda _: (FakeBackend(bundle, gpu), "test")) as model:
        report = verify(model, Path(__file__).parent / "data" / "golden" / case / "golden.npz")
        assert len(report.checks) > 2
        assert report.passed, report
        assert model.stats().captures
    assert_nothing_left(gpu)


GUIDANCE: dict[str, tuple[str, dict[str, Any], int]] = {  # case, sampling parameters, guidance rows
    "one row": ("uncond", {"sampler": "sde", "gamma": 1.5}, 1),
    "ode": ("uncond", {"sampler": "ode", "steps": 3}, 1),
    "one step": ("uncond", {"steps": 1}, 1),
    "no inputs but z and t": ("no_self_cond", {}, 1),
    "source": ("cond", {"guidance_scale": 2.0}, 2),
    "guidance interval": ("cond", {"guidance_scale": 2.0, "guidance_from": 0.2, "guidance_until": 0.6}, 2),
    "self-conditioning": ("no_sc_tokens", {"sc_cfg": 2.0}, 2),
    "second order": ("cond", {"sampler": "ab2", "schedule": "quantile", "x_prev_scale": 1.3}, 1),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafts_every", [0, 1, 4])
@pytest.mark.parametrize("name", GUIDANCE)
def test_same_as_the_host_engine(name: str, drafts_every: int, batch: int, bundles: Any, gpu: FakeGpu) -> None:
    case, params, rows = GUIDANCE[name]
    bundle = bundles(case)
    programs = programs_of(bundle.config, [7, 2**63 + 5, 0][:batch], drafts_every=drafts_every, **params)
    assert len(programs[0].table.rows) == rows
    with on_host(bundle) as host, on_device(bundle, gpu) as device:
        for ours, theirs in zip(device.run(programs), host.run(programs), strict=True):
            assert_same(ours, theirs)


def test_four_guidance_rows_and_a_draft(bundles: Any, gpu: FakeGpu) -> None:
    """Both kinds of guidance at once: a model with sources whose self-conditioning has no tokens."""
    bundle = bundles("no_sc_tokens")
    config = replace(bundle.config, max_input_length=5)
    programs = programs_of(config, [1, 2], sc_cfg=2.0, guidance_scale=1.5, drafts_every=2)
    assert programs[0].max_rows == 5
    with on_host(bundle) as host, on_device(bundle, gpu) as device:
        for ours, theirs in zip(device.run(programs), host.run(programs), strict=True):
            assert_same(ours, theirs)


def test_given_noise_start_and_estimate(bundles: Any, gpu: FakeGpu) -> None:
    """Each alone, and together: golden runs give only the start, or start and noise."""
    bundle, rng = bundles("uncond"), np.random.default_rng(0)
    plain = programs_of(bundle.config, [1], gamma=0.8)[0]
    shape = (plain.length, bundle.config.latent_dim)
    arrays = {"eps": rng.standard_normal((6, *shape)), "z0": rng.standard_normal(shape), "x_prev": np.ones(shape)}
    given = {name: array.astype(np.float32) for name, array in arrays.items()}
    changed = [Program(**vars(plain) | change) for change in (*({n: a} for n, a in given.items()), given)]
    with on_host(bundle) as host, on_device(bundle, gpu) as device:
        first = written(device.run([plain])[0])
        for ours, theirs in zip(device.run(changed), host.run(changed), strict=True):
            assert_same(ours, theirs)
            assert not np.array_equal(written(ours).latents, first.latents)
        np.testing.assert_array_equal(written(device.run([plain])[0]).latents, first.latents)
    assert_nothing_left(gpu)


def test_a_slot_keeps_nothing_of_the_text_before(bundles: Any, gpu: FakeGpu) -> None:
    """Texts with sources, then such without in the same slots."""
    bundle = bundles("cond")
    sourced = programs_of(bundle.config, [1, 2], guidance_scale=2.0)
    alone = [
        Program(**vars(program) | {"source": None, "mask": None}) for program in programs_of(bundle.config, [3, 4])
    ]
    with on_host(bundle) as host, on_device(bundle, gpu) as device:
        expected = host.run(alone)
        device.run(sourced)
        for ours, theirs in zip(device.run(alone), expected, strict=True):
            assert_same(ours, theirs)


# ---- rows


def test_texts_beyond_a_call_take_turns(bundles: Any, gpu: FakeGpu) -> None:
    """Five texts of two rows on calls of four: each waits in some calls, after which its inputs are written alone."""
    bundle = bundles("cond")
    programs = programs_of(bundle.config, [1, 2, 3, 4, 5], guidance_scale=2.0, drafts_every=3)
    with on_host(bundle) as host:
        expected = host.run(programs)
    with on_device(bundle, gpu, max_rows=4) as device:
        queues = [queue for program in programs for queue in device.submit([program])]  # five callers
        for queue, theirs in zip(queues, expected, strict=True):
            assert_same(events_of(queue), theirs)
        assert device.driver.stats().max_rows <= 4


def test_requests_never_capture_anew(bundles: Any, gpu: FakeGpu) -> None:
    """300 texts of all kinds: no more graphs than buckets of each length, and the ids of each are its own."""
    bundle, rng = bundles("cond"), np.random.default_rng(1)
    programs: list[Program] = []
    for seed in range(300):
        steps, every = int(rng.integers(1, 6)), int(rng.integers(0, 3))
        params = {"guidance_scale": float(rng.choice([1.0, 2.0])), "sampler": str(rng.choice(["ode", "sde", "ab2"]))}
        length = int(rng.choice([bundle.config.max_length, bundle.config.max_length - 2]))
        programs += programs_of(bundle.config, [seed], steps=steps, drafts_every=every, length=length, **params)
    with on_device(bundle, gpu, max_rows=8) as device:
        events = device.run(programs)
        assert device.driver.stats().captures <= 2 * 4  # buckets of 1, 2, 4, 8 rows, two lengths
        assert device.driver.stats().finished == 300
        for index in rng.choice(300, 10, replace=False):
            alone = written(device.run([programs[index]])[0])
            np.testing.assert_array_equal(written(events[index]).ids, alone.ids)


def test_a_lone_caller_is_never_waited_for(bundles: Any, gpu: FakeGpu) -> None:
    """One graph launch a step, one kernel for the start; each wait is for the oldest of DEPTH calls under way."""
    bundle = bundles("uncond")
    with on_device(bundle, gpu) as device:
        device.run(programs_of(bundle.config, [1]))  # captures
        gpu.launches = dict.fromkeys(gpu.launches, 0)
        gpu.events.clear()
        (program,) = programs_of(bundle.config, [2], steps=20)
        device.run([Program(**vars(program) | {"latents": False})])
        assert gpu.launches == {"graph": 21, "kernel": 1, "network": 1}  # the network: the token head
        assert "sync" not in gpu.events
        waits = [index for index, event in enumerate(gpu.events) if event == "wait"]
        before = gpu.events[: waits[1]]  # the first is for the slot that is used again
        assert before.count("upload") == 1 + DEPTH  # the start, and the calls


def test_padded_rows_change_nothing(bundles: Any, gpu: FakeGpu) -> None:
    """Three rows in a bucket of four, whose last row a larger call left full of other things."""
    bundle = bundles("uncond")
    with on_device(bundle, gpu, max_rows=4) as device:
        device.run(programs_of(bundle.config, [4, 5, 6, 7] * 8))  # settles on what pays, through the bucket of four
        three = device.run(programs_of(bundle.config, [1, 2, 3]))
    with on_host(bundle) as host:
        for ours, theirs in zip(three, host.run(programs_of(bundle.config, [1, 2, 3])), strict=True):
            np.testing.assert_array_equal(written(ours).ids, written(theirs).ids)


# ---- ONNX Runtime's CUDA backend, with its CPU provider over the fake GPU's memory


@pytest.fixture
def ort_cuda_backend(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> OrtCudaBackend:
    monkeypatch.setattr(ort_cuda, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(ort_cuda, "MEMORY", "cpu")
    monkeypatch.setattr(ort_cuda, "DISCRETIZED_TOKENS", 7)
    return ort_cuda.open_backend(bundles("cond"), "fp32")


def test_onnxruntime_cuda_golden_runs(bundles: Any, ort_cuda_backend: OrtCudaBackend, gpu: FakeGpu) -> None:
    with Model(bundles("cond"), lambda _: (ort_cuda_backend, "test")) as model:
        report = verify(model, Path(__file__).parent / "data" / "golden" / "cond" / "golden.npz")
        assert model.stats().captures == 0
    assert report.passed, report
    assert gpu.launches["graph"] == 0
    assert_nothing_left(gpu)


def test_onnxruntime_cuda_on_the_cpu_build_says_so(bundles: Any) -> None:
    with pytest.raises(BackendError, match="onnxruntime-cuda: this onnxruntime is the CPU build"):
        open_backend(bundles("cond"), "onnxruntime-cuda", "fp32")


def test_onnxruntime_cuda_does_not_fall_back_to_the_cpu(bundles: Any) -> None:
    with warnings.catch_warnings(), pytest.raises(BackendError, match="CUDA or cuDNN could not be loaded"):
        warnings.simplefilter("ignore")  # onnxruntime's own, of a provider that it does not have
        OrtCudaBackend(bundles("cond"), "fp32")
