"""Jobs of the device sampler that share it, are dropped, or fail: on the fake GPU of test_device.py."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cuda.bindings.runtime import cudaError_t
from device_jobs import assert_same, golden_bundles, make_job, outcome_of
from fake_gpu import FakeBackend, FakeGpu, FakeNetwork, install_gpu

from elf_rt.backends.ort import OrtBackend
from elf_rt.device.sampler import DeviceSampler
from elf_rt.errors import BackendError, GpuMemoryError
from elf_rt.sampling.engine import HostSampler, Outcome

pytestmark = pytest.mark.filterwarnings("error")  # a refused capture warns
NO_MEMORY = cudaError_t.cudaErrorMemoryAllocation
gpu = pytest.fixture(install_gpu)
bundles = pytest.fixture(golden_bundles, scope="module")


# ---- threads


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


def test_another_thread_runs_the_networks_before_it_captures(bundles: Any, gpu: FakeGpu) -> None:
    """In the middle of a job too, which it does not disturb."""
    bundle = bundles("cond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    job = make_job(bundle.config, [1, 2], drafts_every=4, guidance_scale=2.0)
    events = sampler.run(job)
    while next(events).draft is None:  # the last piece is still to be captured
        pass
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(outcome_of, events).result(60)
    assert_same(last, outcome_of(HostSampler(OrtBackend(bundle, "fp32", 2), bundle.config.latent_dim).run(job)))
    assert gpu.launches["graph"] == 3


def test_models_capture_one_after_the_other(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread captures, another waits with its allocations and its own capture."""
    bundle = bundles("uncond")
    samplers = [DeviceSampler(FakeBackend(bundle, gpu), bundle.config) for _ in range(2)]
    capturing, begin = threading.Event(), gpu.cudaStreamBeginCapture

    def slow_begin(stream: int, mode: int) -> tuple[int]:
        result = begin(stream, mode)
        capturing.set()
        time.sleep(0.2)
        return result

    monkeypatch.setattr(gpu, "cudaStreamBeginCapture", slow_begin)
    jobs = [make_job(bundle.config, [seed], steps=2) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: outcome_of(samplers[0].run(jobs[0])))
        assert capturing.wait(60)
        second = pool.submit(lambda: outcome_of(samplers[1].run(jobs[1])))
        outcomes = [first.result(60), second.result(60)]
    host = HostSampler(OrtBackend(bundle, "fp32", 2), bundle.config.latent_dim)
    for outcome, job in zip(outcomes, jobs, strict=True):
        assert_same(outcome, outcome_of(host.run(job)))


# ---- streams


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


def test_a_stream_may_be_dropped_while_the_gpu_is_in_use(bundles: Any, gpu: FakeGpu) -> None:
    """As the garbage collector does, in any thread: it does not wait, and the workspace is used again."""
    bundle = bundles("uncond")
    backend = FakeBackend(bundle, gpu)
    sampler = DeviceSampler(backend, bundle.config)
    job = make_job(bundle.config, [1], drafts_every=2)
    events = sampler.run(job)
    next(events)
    with sampler._gpu():
        dropping = threading.Thread(target=events.close, daemon=True)
        dropping.start()
        dropping.join(10)
        assert not dropping.is_alive()
    made = len(backend.networks)
    list(sampler.run(job))
    assert len(backend.networks) == made


def test_a_stream_that_outlives_its_sampler_frees_its_memory(bundles: Any, gpu: FakeGpu) -> None:
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    events = sampler.run(make_job(bundle.config, [1], drafts_every=2))
    next(events)
    sampler.close()
    events.close()
    assert gpu.allocated() == gpu.allocated("host") == gpu.num_streams == len(gpu.graphs) == 0


# ---- failures


def test_a_failed_job_frees_its_workspace(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles("uncond")
    backend = FakeBackend(bundle, gpu)
    sampler = DeviceSampler(backend, bundle.config)
    job = make_job(bundle.config, [1])
    expected = outcome_of(sampler.run(job))
    monkeypatch.setattr(gpu, "cudaGraphLaunch", lambda graph, stream: (NO_MEMORY,))
    with pytest.raises(BackendError, match="cudaGraphLaunch failed"):
        list(sampler.run(job))
    assert all(network.closed for network in backend.networks)
    assert gpu.allocated() == 0
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", gpu)
    assert_same(outcome_of(sampler.run(job)), expected)


@pytest.mark.parametrize("function", ["cudaMemset", "cudaGraphUpload"])
def test_what_fails_half_way_leaves_nothing(
    function: str, bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    monkeypatch.setattr(gpu, function, lambda *arguments: (cudaError_t.cudaErrorUnknown,))
    with pytest.warns(UserWarning, match="cannot be captured") if "Graph" in function else pytest.raises(BackendError):
        list(sampler.run(make_job(bundle.config, [1])))
    sampler.close()
    assert gpu.allocated() == len(gpu.graphs) == 0


def test_a_refused_launch_is_a_backend_error(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDAError(Exception):
        """cuda.core's has no other base either."""

    def refuse(*arguments: Any) -> None:
        raise CUDAError("CUDA_ERROR_INVALID_VALUE: a value is out of range\nmore lines")

    bundle = bundles("uncond")
    backend = FakeBackend(bundle, gpu)
    sampler = DeviceSampler(backend, bundle.config)
    monkeypatch.setattr(sampler._driver._core, "launch", refuse)
    with pytest.raises(BackendError, match=r"^CUDA: could not launch elf_\w+: CUDA_ERROR_INVALID_VALUE: .* of range$"):
        list(sampler.run(make_job(bundle.config, [1])))
    assert all(network.closed for network in backend.networks)


def test_what_failed_is_told_though_freeing_fails_too(
    bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(network: FakeNetwork) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")  # as torch's empty_cache

    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    monkeypatch.setattr(gpu, "cudaGraphLaunch", lambda graph, stream: (NO_MEMORY,))
    monkeypatch.setattr(FakeNetwork, "close", refuse)
    with pytest.raises(BackendError, match="cudaGraphLaunch failed"):
        list(sampler.run(make_job(bundle.config, [1])))


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


def test_out_of_memory_in_a_capture_is_no_refusal(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised where nothing else can give way, and the next job is captured again."""
    bundle = bundles("uncond")
    sampler = DeviceSampler(FakeBackend(bundle, gpu), bundle.config)
    instantiate, shortages = gpu.cudaGraphInstantiate, [1]

    def scarce(graph: int, flags: int) -> tuple[int, int | None]:
        return (NO_MEMORY, None) if shortages and shortages.pop() else instantiate(graph, flags)

    monkeypatch.setattr(gpu, "cudaGraphInstantiate", scarce)
    job = make_job(bundle.config, [1])
    with pytest.raises(GpuMemoryError, match="cudaGraphInstantiate failed: out of memory: use a smaller batch"):
        list(sampler.run(job))
    list(sampler.run(job))
    assert gpu.launches["graph"] == 1
    shortages.append(1)
    list(sampler.run(make_job(bundle.config, [1, 2])))  # takes the place of the idle workspace
    assert gpu.launches["graph"] == 2
    assert len(sampler._idle) == 1
