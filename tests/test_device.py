"""The device sampler end to end on a fake GPU that runs the real kernels, against the host's and the golden runs."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_jobs import assert_same, golden_bundles, make_job, outcome_of
from fake_gpu import FakeBackend, FakeGpu, install_gpu
from golden_cases import CASES

from elf_rt.backends import ort_cuda
from elf_rt.backends.ort import OrtBackend
from elf_rt.backends.ort_cuda import OrtCudaBackend
from elf_rt.device import sampler as device_sampler
from elf_rt.device import workspace
from elf_rt.device.sampler import DeviceSampler
from elf_rt.errors import BackendError
from elf_rt.measure.verify import verify
from elf_rt.model import Model
from elf_rt.params import ModelConfig
from elf_rt.sampling.engine import HostSampler, StepDone

pytestmark = pytest.mark.filterwarnings("error")  # a refused capture warns
gpu = pytest.fixture(install_gpu)
bundles = pytest.fixture(golden_bundles, scope="module")


# ---- results


@pytest.mark.parametrize("case", CASES)
def test_golden_runs_give_the_recorded_ids(case: str, bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles(case)
    with Model(bundle, FakeBackend(bundle, gpu), "test") as model:
        assert isinstance(model._sampler, DeviceSampler)
        replay = Path(__file__).parent / "data" / "golden" / case / "golden.npz"
        report = verify(model, replay)
        assert len(report.checks) > 2
        assert report.passed, report


GUIDANCE = {  # case, sampling parameters, guidance rows
    "one row": ("uncond", {"sampler": "sde", "gamma": 1.5}, 1),
    "ode": ("uncond", {"sampler": "ode", "steps": 3}, 1),
    "one step": ("uncond", {"steps": 1}, 1),
    "no inputs but z and t": ("no_self_cond", {}, 1),
    "source": ("cond", {"guidance_scale": 2.0}, 2),
    "self-conditioning": ("no_sc_tokens", {"sc_cfg": 2.0}, 2),
    "second order": ("cond", {"sampler": "ab2", "schedule": "quantile", "x_prev_scale": 1.3}, 1),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafts_every", [0, 2, 4])
@pytest.mark.parametrize("name", GUIDANCE)
def test_same_as_the_host_sampler(name: str, drafts_every: int, batch: int, bundles: Any, gpu: FakeGpu) -> None:
    case, params, rows = GUIDANCE[name]
    bundle = bundles(case)
    job = make_job(bundle.config, [7, 2**63 + 5, 0][:batch], drafts_every=drafts_every, **params)
    assert len(job.table.rows) == rows
    host = list(HostSampler(OrtBackend(bundle, "fp32", 2), bundle.config.latent_dim).run(job))
    device = list(DeviceSampler(FakeBackend(bundle, gpu), bundle.config).run(job))
    assert [type(event) for event in device] == [type(event) for event in host]
    for ours, theirs in zip(device, host, strict=True):
        if isinstance(ours, StepDone):
            assert (ours.step, ours.t) == (theirs.step, theirs.t)
            np.testing.assert_array_equal(ours.draft, theirs.draft)
        else:
            assert_same(ours, theirs)


def test_four_guidance_rows(bundles: Any, gpu: FakeGpu) -> None:
    """Both kinds of guidance at once: a model with sources whose self-conditioning has no tokens."""
    bundle = bundles("no_sc_tokens")
    config = ModelConfig(**bundle.config.to_json() | {"max_input_length": 5})
    job = make_job(config, [1, 2], sc_cfg=2.0, guidance_scale=1.5)
    assert len(job.table.rows) == 4
    host = outcome_of(HostSampler(OrtBackend(bundle, "fp32", 2), config.latent_dim).run(job))
    assert_same(outcome_of(DeviceSampler(FakeBackend(bundle, gpu), config).run(job)), host)


def test_guidance_interval(bundles: Any, gpu: FakeGpu) -> None:
    """Steps without guidance: the host leaves the second row out of the call, the GPU gives it no weight."""
    bundle = bundles("cond")
    job = make_job(bundle.config, [1, 2], guidance_scale=2.0, guidance_from=0.2, guidance_until=0.6, schedule="uniform")
    assert {job.table.calls(j) for j in range(1, job.table.num_steps + 1)} == {1, 2}
    host = outcome_of(HostSampler(OrtBackend(bundle, "fp32", 2), bundle.config.latent_dim).run(job))
    device = outcome_of(DeviceSampler(FakeBackend(bundle, gpu), bundle.config).run(job))
    np.testing.assert_array_equal(device.ids, host.ids)
    np.testing.assert_allclose(device.latents, host.latents, atol=1e-5)  # other batches, other products in the engine


def test_a_text_does_not_depend_on_its_batch(bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    together = outcome_of(sampler.run(make_job(bundle.config, [4, 5, 6])))
    alone = outcome_of(sampler.run(make_job(bundle.config, [5])))
    np.testing.assert_array_equal(together.ids[1], alone.ids[0])


# ---- graphs


def test_one_launch_from_noise_to_ids(bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    list(sampler.run(make_job(bundle.config, [1])))
    gpu.launches = dict.fromkeys(gpu.launches, 0)
    gpu.events.clear()
    outcome = outcome_of(sampler.run(replace(make_job(bundle.config, [2]), latents=False)))
    assert gpu.launches == {"graph": 1, "kernel": 0, "network": 0}
    assert gpu.events == ["upload", "download", "sync"]  # tables; ids; nothing in between
    assert not outcome.latents.size


def test_only_the_shape_captures_anew(bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles("cond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    host = HostSampler(OrtBackend(bundle, "fp32", 2), bundle.config.latent_dim)
    list(sampler.run(make_job(bundle.config, [1], guidance_scale=2.0)))
    captured = len(gpu.graphs)
    for change in (
        {"guidance_scale": 3.0},
        {"guidance_scale": 2.0, "sampler": "ode"},
        {"guidance_scale": 2.0, "gamma": 0.5, "sc_cfg": 1.0},
        {"guidance_scale": 2.0, "schedule": "uniform", "source_seed": 3},
    ):
        job = make_job(bundle.config, [9], **change)
        assert_same(outcome_of(sampler.run(job)), outcome_of(host.run(job)))
    assert len(gpu.graphs) == captured
    list(sampler.run(make_job(bundle.config, [1], guidance_scale=2.0, steps=7)))
    assert len(gpu.graphs) == captured + 1


def test_chunks_serve_every_number_of_steps(bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    list(sampler.run(make_job(bundle.config, [1], steps=10, drafts_every=4)))
    captured = len(gpu.graphs)
    for steps in (6, 14, 18, 62):
        list(sampler.run(make_job(bundle.config, [1], steps=steps, drafts_every=4)))
    assert len(gpu.graphs) == captured


def test_graphs_and_workspaces_are_bounded(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sampler, "MAX_IDLE_WORKSPACES", 2)
    monkeypatch.setattr(workspace, "MAX_GRAPHS", 2)
    bundle = bundles("uncond")
    backend = FakeBackend(bundle, gpu)
    sampler = DeviceSampler(backend, bundle.config)
    host = HostSampler(OrtBackend(bundle, "fp32", 2), bundle.config.latent_dim)
    for seeds, steps in (([1], 2), ([1], 3), ([1], 4), ([1, 2], 2), ([1, 2, 3], 2), ([1, 2, 3, 4], 2), ([1], 2)):
        job = make_job(bundle.config, seeds, steps=steps)
        assert_same(outcome_of(sampler.run(job)), outcome_of(host.run(job)))
    assert sum(not network.closed for network in backend.networks) == 2
    assert len(gpu.graphs) <= 4
    sampler.close()
    assert gpu.allocated() == gpu.allocated("host") == gpu.num_streams == len(gpu.graphs) == 0


def test_a_refused_capture_warns_once_and_changes_nothing(bundles: Any, gpu: FakeGpu) -> None:
    gpu.refuses_capture = True
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    host = HostSampler(OrtBackend(bundle, "fp32", 2), bundle.config.latent_dim)
    job = make_job(bundle.config, [1, 2], drafts_every=2)
    with pytest.warns(UserWarning, match="cannot be captured in a CUDA graph.*slower") as caught:
        outcome = outcome_of(sampler.run(job))
    assert len(caught) == 1
    assert_same(outcome, outcome_of(host.run(job)))
    assert gpu.launches["graph"] == 0
    assert_same(
        outcome_of(sampler.run(make_job(bundle.config, [3]))), outcome_of(host.run(make_job(bundle.config, [3])))
    )


def test_given_noise_and_start(bundles: Any, gpu: FakeGpu) -> None:
    """Noise without a start, a start without noise: golden runs give both or only the start."""
    bundle = bundles("uncond")
    config, rng = bundle.config, np.random.default_rng(0)
    shape = (2, config.max_length, config.latent_dim)
    job = make_job(config, [1, 2], gamma=0.8)
    z0, eps = rng.standard_normal(shape), rng.standard_normal((job.table.num_steps, *shape))
    host = HostSampler(OrtBackend(bundle, "fp32", 2), config.latent_dim)
    sampler = DeviceSampler(FakeBackend(bundle, gpu), config)
    plain = outcome_of(sampler.run(job))
    for given in ({"eps": eps}, {"z0": z0}, {"eps": eps, "z0": z0}):
        changed = replace(job, **{name: array.astype(np.float32) for name, array in given.items()})
        outcome = outcome_of(sampler.run(changed))
        assert_same(outcome, outcome_of(host.run(changed)))
        assert not np.array_equal(outcome.latents, plain.latents)
    assert_same(outcome_of(sampler.run(job)), plain)


# ---- ONNX Runtime's CUDA backend, with its CPU provider over the fake GPU's memory


@pytest.fixture
def ort_cuda_backend(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> OrtCudaBackend:
    monkeypatch.setattr(ort_cuda, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(ort_cuda, "MEMORY", "cpu")
    monkeypatch.setattr(ort_cuda, "DISCRETIZED_TOKENS", 7)
    return ort_cuda.open_backend(bundles("cond"), "fp32")


def test_onnxruntime_cuda_golden_runs(bundles: Any, ort_cuda_backend: OrtCudaBackend, gpu: FakeGpu) -> None:
    with Model(bundles("cond"), ort_cuda_backend, "test") as model:
        report = verify(model, Path(__file__).parent / "data" / "golden" / "cond" / "golden.npz")
    assert report.passed, report
    assert gpu.launches["graph"] == 0
    assert gpu.allocated() == gpu.allocated("host") == 0


def test_onnxruntime_cuda_on_the_cpu_build_says_so(bundles: Any) -> None:
    with pytest.raises(BackendError, match="onnxruntime-cuda: this onnxruntime is the CPU build"):
        ort_cuda.open_backend(bundles("cond"), "fp32")


def test_onnxruntime_cuda_does_not_fall_back_to_the_cpu(bundles: Any) -> None:
    with warnings.catch_warnings(), pytest.raises(BackendError, match="CUDA or cuDNN could not be loaded"):
        warnings.simplefilter("ignore")  # onnxruntime's own, of a provider that it does not have
        OrtCudaBackend(bundles("cond"), "fp32")
