"""The device engine where the GPU refuses, fails, or has too little memory."""

import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
from cuda.bindings.runtime import cudaError_t
from engine_runs import assert_same, events_of, golden_bundles, programs_of, written
from fake_gpu import FakeGpu, FakeGraph, assert_nothing_left, install_gpu, on_device, on_host

from elf_rt.errors import BackendError, GpuMemoryError
from elf_rt.sampling.program import Program, Written

pytestmark = pytest.mark.filterwarnings("error")  # a refused capture warns
gpu = pytest.fixture(install_gpu)
bundles = pytest.fixture(golden_bundles, scope="module")
NO_MEMORY = cudaError_t.cudaErrorMemoryAllocation


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


def test_a_lack_of_memory_in_a_call_ends_its_texts(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library finds no memory when the pass before the network is done already: it must not be done once more."""
    bundle = bundles("uncond")
    programs = programs_of(bundle.config, [1, 2, 3, 4], steps=3)
    with on_device(bundle, gpu) as device:
        expected = device.run(programs)
        real, failures = FakeGraph.enqueue, [GpuMemoryError("out of memory")]

        def scarce(graph: FakeGraph) -> None:
            if graph.graph == "discretizer" and failures:
                raise failures.pop()
            real(graph)

        monkeypatch.setattr(FakeGraph, "enqueue", scarce)
        ended = [events[-1] for events in device.run(programs)]
        assert not failures and any(isinstance(event, BackendError) for event in ended)
        for event, theirs in zip(ended, expected, strict=True):
            if isinstance(event, Written):
                np.testing.assert_array_equal(event.ids, written(theirs).ids)
            else:
                assert "out of memory" in str(event)
        for ours, theirs in zip(device.run(programs), expected, strict=True):
            assert_same(ours, theirs)


def test_a_broken_gpu_leaves_nobody_waiting(bundles: Any, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """From some call on everything fails, as after an illegal address; also to give a slot back, and to free."""
    bundle, broken = bundles("uncond"), threading.Event()
    failing = [
        name for name in dir(gpu) if name.startswith("cuda") and name not in ("cudaError_t", "cudaGetErrorString")
    ]
    for name in failing:
        real = getattr(gpu, name)

        def call(*arguments: Any, real: Any = real) -> Any:
            return (cudaError_t.cudaErrorIllegalAddress,) if broken.is_set() else real(*arguments)

        monkeypatch.setattr(gpu, name, call)
    device = on_device(bundle, gpu, max_rows=2)
    running = [queue for seed in range(6) for queue in device.submit(programs_of(bundle.config, [seed], steps=5000))]
    while not device.driver.stats().calls:
        time.sleep(0.01)
    broken.set()
    for queue in running:
        with pytest.raises(BackendError):
            written(events_of(queue))
    with pytest.raises(BackendError, match="the engine stopped"):
        for _ in range(1000):
            device.submit(programs_of(bundle.config, [1]))
            time.sleep(0.01)
    device.driver.close()


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
