"""The device sampler end to end on a fake GPU that runs the real kernels, against the host's and the golden runs."""

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeBackend, FakeGpu, install_gpu
from golden_cases import CASES
from plan_bundles import golden_bundle

from elf_rt.backends import ort_cuda
from elf_rt.backends.ort import OrtBackend
from elf_rt.backends.ort_cuda import OrtCudaBackend
from elf_rt.bundle import Bundle
from elf_rt.device import sampler as device_sampler
from elf_rt.device import workspace
from elf_rt.device.sampler import DeviceSampler
from elf_rt.errors import BackendError
from elf_rt.model import Model
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.sampler import HostSampler, Job, Outcome, StepDone
from elf_rt.schedule import make_grid, make_table
from elf_rt.verify import verify

SOURCE_LENGTHS = (3, 1, 5, 2)


@pytest.fixture(autouse=True)
def no_slow_path():
    """A refused capture warns; where a test does not expect it, it is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def bundle(case: str) -> Bundle:
        if case not in made:
            made[case] = golden_bundle(folder / f"{case}.elfrt", case, ("fp32",))
        return made[case]

    return bundle


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return install_gpu(monkeypatch)


def make_job(
    config: ModelConfig, seeds: list[int], *, drafts_every: int = 0, source_seed: int | None = None, **params: Any
) -> Job:
    """A job of the public API, without text: sources are random latents of different lengths."""
    sampling, all_seeds = SamplingParams(**{"steps": 6} | params), np.array(seeds, np.uint64)
    source = mask = None
    if config.max_input_length:
        shape = (len(seeds), config.max_length, config.latent_dim)
        source = np.random.default_rng(source_seed or 0).standard_normal(shape).astype(np.float32)
        mask = np.arange(config.max_length) < np.resize(SOURCE_LENGTHS, len(seeds))[:, None]
    table = make_table(sampling, config, make_grid(sampling, config, all_seeds), conditional=source is not None)
    return Job(table, config.max_length, all_seeds, sampling.sc_cfg, source, mask, drafts_every=drafts_every)


def outcome_of(events: Any) -> Outcome:
    *_, last = events
    assert isinstance(last, Outcome)
    return last


def assert_same(device: Outcome, host: Outcome) -> None:
    np.testing.assert_array_equal(device.latents, host.latents)
    np.testing.assert_array_equal(device.ids, host.ids)
    assert device.calls == host.calls


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
    list(sampler.run(make_job(bundle.config, [2])))
    assert gpu.launches == {"graph": 1, "kernel": 0, "network": 0}
    assert gpu.events == ["upload", "download", "download", "sync"]  # tables; latents and ids; nothing in between


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


# ---- life of a job


def test_cancel_between_chunks(bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    host = HostSampler(OrtBackend(bundle, "fp32", 2), bundle.config.latent_dim)
    job = make_job(bundle.config, [1], steps=8, drafts_every=2)
    list(sampler.run(job))
    before = gpu.launches["graph"]
    events = sampler.run(job)
    while next(events).draft is None:
        pass
    events.close()
    assert gpu.launches["graph"] == before + 2  # one chunk, one draft
    assert_same(outcome_of(sampler.run(job)), outcome_of(host.run(job)))


def test_streams_may_interleave(bundles: Any, gpu: FakeGpu) -> None:
    """Also in one thread: a reader that holds a stream of drafts open does not lock out other jobs."""
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    host = HostSampler(OrtBackend(bundle, "fp32", 2), bundle.config.latent_dim)
    jobs = [make_job(bundle.config, [seed], drafts_every=2) for seed in (1, 2)]
    streams = [sampler.run(job) for job in jobs]
    last: dict[int, Any] = {}
    for _ in range(jobs[0].table.num_steps + 1):
        for i, stream in enumerate(streams):
            last[i] = next(stream)
    for i, job in enumerate(jobs):
        assert_same(last[i], outcome_of(host.run(job)))


def test_threads_share_a_sampler(bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    host = HostSampler(OrtBackend(bundle, "fp32", 2), bundle.config.latent_dim)
    jobs = [make_job(bundle.config, [seed], steps=3, drafts_every=seed % 2) for seed in range(4)]
    results: dict[int, Outcome] = {}

    def work(i: int) -> None:
        results[i] = outcome_of(sampler.run(jobs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, job in enumerate(jobs):
        assert_same(results[i], outcome_of(host.run(job)))


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


def test_a_failed_job_frees_its_workspace(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles("uncond")
    backend = FakeBackend(bundle, gpu)
    sampler = DeviceSampler(backend, bundle.config)
    job = make_job(bundle.config, [1])
    expected = outcome_of(sampler.run(job))
    monkeypatch.setattr(gpu, "cudaGraphLaunch", lambda graph, stream: (2,))
    with pytest.raises(BackendError, match="cudaGraphLaunch failed"):
        list(sampler.run(job))
    assert all(network.closed for network in backend.networks)
    assert gpu.allocated() == 0
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", gpu)
    assert_same(outcome_of(sampler.run(job)), expected)


def test_a_closed_sampler_says_so(bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    sampler.close()
    sampler.close()
    with pytest.raises(BackendError, match="closed"):
        list(sampler.run(make_job(bundle.config, [1])))


# ---- bad input


def test_out_of_memory_names_sizes_and_leaves_the_model_usable(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = install_gpu(monkeypatch, memory=2**20)
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    small = make_job(bundle.config, [1])
    expected = outcome_of(sampler.run(small))
    length = bundle.config.max_length
    with pytest.raises(
        BackendError, match=rf"100 samples x 1 guidance rows x {length} tokens.*MiB free.*smaller batch"
    ):
        list(sampler.run(make_job(bundle.config, list(range(100)))))
    assert gpu.allocated() == 0  # the idle workspaces gave way, and nothing of the attempt stayed
    assert_same(outcome_of(sampler.run(small)), expected)


def test_idle_workspaces_give_way(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles("uncond")
    job = make_job(bundle.config, [1, 2, 3, 4, 5, 6])
    probe = install_gpu(monkeypatch)
    sampler = DeviceSampler(FakeBackend(bundle, probe), bundle.config)
    list(sampler.run(job))
    gpu = install_gpu(monkeypatch, memory=probe.allocated() + 1024)
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    list(sampler.run(make_job(bundle.config, [1, 2])))
    list(sampler.run(job))
    assert gpu.allocated() == probe.allocated()


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
