"""The device engine end to end on a fake GPU that runs the real kernel, against the host engine and the golden runs."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings.runtime import cudaError_t
from engine_runs import Runs, assert_same, events_of, golden_bundles, programs_of, written
from fake_gpu import FakeBackend, FakeGpu, install_gpu
from golden_cases import CASES

from elf_rt.backends import open_backend, ort_cuda
from elf_rt.backends.ort import OrtBackend
from elf_rt.backends.ort_cuda import OrtCudaBackend
from elf_rt.bundle import Bundle
from elf_rt.device.engine import DEPTH, DeviceEngine
from elf_rt.errors import BackendError, GpuMemoryError
from elf_rt.measure.verify import verify
from elf_rt.model import Model
from elf_rt.params import ModelConfig
from elf_rt.sampling.engine import HostEngine
from elf_rt.sampling.program import Program

pytestmark = pytest.mark.filterwarnings("error")  # a refused capture warns
gpu = pytest.fixture(install_gpu)
bundles = pytest.fixture(golden_bundles, scope="module")
NO_MEMORY = cudaError_t.cudaErrorMemoryAllocation


def on_device(bundle: Bundle, gpu: FakeGpu, max_rows: int | None = None, **options: Any) -> Runs:
    backend = FakeBackend(bundle, gpu, **options)
    return Runs(lambda: DeviceEngine(backend, bundle.config, max_rows), bundle.config.max_length)


def on_host(bundle: Bundle) -> Runs:
    backend = OrtBackend(bundle, "fp32", 2)
    return Runs(lambda: HostEngine(backend, bundle.config.latent_dim), bundle.config.max_length)


def assert_nothing_left(gpu: FakeGpu) -> None:
    assert gpu.allocated() == gpu.allocated("host") == gpu.num_streams == len(gpu.graphs) == len(gpu._event_ms) == 0


# ---- results


@pytest.mark.parametrize("case", CASES)
def test_golden_runs_give_the_recorded_ids(case: str, bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles(case)
    with Model(bundle, lambda: (FakeBackend(bundle, gpu), "test")) as model:
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
    config = ModelConfig(**bundle.config.to_json() | {"max_input_length": 5})
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


# ---- failures


def test_a_capture_that_failed_is_tried_again(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, instantiate, failures = bundles("uncond"), gpu.cudaGraphInstantiate, [cudaError_t.cudaErrorUnknown]

    def flaky(graph: Any, flags: int) -> tuple[Any, Any]:
        return (failures.pop(), None) if failures else instantiate(graph, flags)

    monkeypatch.setattr(gpu, "cudaGraphInstantiate", flaky)
    with on_device(bundle, gpu) as device:
        written(device.run(programs_of(bundle.config, [1]))[0])
        assert device.driver.stats().captures == 1 and not failures
        assert gpu.launches["graph"] == 7


def test_a_refused_capture_warns_once_and_changes_nothing(bundles: Any, gpu: FakeGpu) -> None:
    gpu.refuses_capture = True
    bundle = bundles("uncond")
    programs = programs_of(bundle.config, [1, 2], drafts_every=2)
    with on_host(bundle) as host, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with on_device(bundle, gpu) as device:
            for ours, theirs in zip(device.run(programs), host.run(programs), strict=True):
                assert_same(ours, theirs)
            assert device.driver.stats().captures == gpu.launches["graph"] == 0
    assert ["cannot be captured in a CUDA graph" in str(each.message) for each in caught] == [True]


def test_out_of_memory_shrinks_the_largest_bucket_once(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU has room for small buckets alone: nobody fails, and one warning says so."""
    bundle = bundles("uncond")
    probe = install_gpu(monkeypatch)
    with on_device(bundle, probe, max_rows=2) as device:
        expected = device.run(programs_of(bundle.config, list(range(16))))
        room = probe.allocated()
    gpu = install_gpu(monkeypatch, memory=room + 4096)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with on_device(bundle, gpu) as device:
            events = device.run(programs_of(bundle.config, list(range(16))))
            for ours, theirs in zip(events, expected, strict=True):
                assert_same(ours, theirs)
            assert device.driver.stats().max_rows <= 2
    assert len(caught) == 1 and "rows from now on" in str(caught[0].message)
    assert_nothing_left(gpu)


def test_texts_end_where_memory_is_short(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever little is free: if one text can be written, all are, and a token head that has no room goes in parts."""
    bundle = bundles("uncond")
    programs = programs_of(bundle.config, list(range(8)))
    probe = install_gpu(monkeypatch)
    with on_device(bundle, probe, max_rows=1) as device:
        expected = device.run(programs)
        least = probe.allocated()
    for extra in range(0, 120_000, 8_000):
        gpu = install_gpu(monkeypatch, memory=least + extra)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with on_device(bundle, gpu) as device:
                for ours, theirs in zip(device.run(programs), expected, strict=True):
                    assert_same(ours, theirs)
        assert_nothing_left(gpu)


def test_no_memory_at_all_is_a_gpu_memory_error(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles("uncond")
    gpu = install_gpu(monkeypatch, memory=80_000)
    with on_device(bundle, gpu) as device, pytest.raises(GpuMemoryError, match="out of memory"):
        written(device.run(programs_of(bundle.config, [1]))[0])
    assert_nothing_left(gpu)


def test_what_no_plan_takes_is_refused_alone(bundles: Any, gpu: FakeGpu) -> None:
    """A length or a number of rows beyond the plans: the others go on, and nothing that was captured goes."""
    bundle = bundles("cond")
    length = bundle.config.max_length
    with on_device(bundle, gpu, most={length: 1}) as device:
        device.run(programs_of(bundle.config, [1]))
        captures, graphs = device.driver.stats().captures, len(gpu.graphs)
        (running,) = device.submit(programs_of(bundle.config, [2], steps=30))
        for refused in (
            programs_of(bundle.config, [3], length=length - 1),
            programs_of(bundle.config, [3], guidance_scale=2.0),
        ):
            with pytest.raises(BackendError, match="no plan takes"):
                written(device.run(refused)[0])
        written(events_of(running))
        assert (device.driver.stats().captures, len(gpu.graphs)) == (captures, graphs)


def test_a_failed_launch_ends_its_texts_alone(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles("uncond")
    with on_device(bundle, gpu) as device:
        expected = device.run(programs_of(bundle.config, [1]))[0]
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "cudaGraphLaunch", lambda graph, stream: (cudaError_t.cudaErrorUnknown,))
            with pytest.raises(BackendError, match="cudaGraphLaunch failed"):
                written(device.run(programs_of(bundle.config, [1]))[0])
        assert_same(device.run(programs_of(bundle.config, [1]))[0], expected)
        assert device.driver.stats().slots == 0


def test_latents_that_are_not_finite_end_their_text_alone(bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles("uncond")
    good, bad = programs_of(bundle.config, [1, 2])
    shape = (bad.length, bundle.config.latent_dim)
    bad = Program(**vars(bad) | {"z0": np.full(shape, np.inf, np.float32)})
    with on_device(bundle, gpu) as device, np.errstate(all="ignore"):
        alone = device.run([good])[0]
        together = device.run([good, bad])
        assert_same(together[0], alone)
        with pytest.raises(BackendError, match="not finite"):
            written(together[1])


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaMallocHost", "cudaEventCreate"])
def test_an_engine_that_cannot_be_made_leaves_nothing(
    function: str, bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(gpu, function), [0]

    def scarce(*arguments: Any) -> Any:
        calls[0] += 1
        return (NO_MEMORY, None) if calls[0] > 1 - (function == "cudaMalloc") else real(*arguments)

    monkeypatch.setattr(gpu, function, scarce)
    with pytest.raises(GpuMemoryError, match=function):
        on_device(bundles("uncond"), gpu)
    assert_nothing_left(gpu)


# ---- ONNX Runtime's CUDA backend, with its CPU provider over the fake GPU's memory


@pytest.fixture
def ort_cuda_backend(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> OrtCudaBackend:
    monkeypatch.setattr(ort_cuda, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(ort_cuda, "MEMORY", "cpu")
    monkeypatch.setattr(ort_cuda, "DISCRETIZED_TOKENS", 7)
    return ort_cuda.open_backend(bundles("cond"), "fp32")


def test_onnxruntime_cuda_golden_runs(bundles: Any, ort_cuda_backend: OrtCudaBackend, gpu: FakeGpu) -> None:
    with Model(bundles("cond"), lambda: (ort_cuda_backend, "test")) as model:
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
