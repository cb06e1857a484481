"""The clock of ``torch_tuning`` and what its cache is named by, with torch's CUDA replaced."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plan_bundles import golden_bundle

from elf_rt.backends import torch_tuning
from elf_rt.backends.torch_cuda import TorchBackend
from elf_rt.backends.torch_tuning import ROUNDS, gpu_clock, tuner_here

GRAPH_SIGNATURE = inspect.signature(torch.cuda.graph)


class FakeCuda:
    """A GPU whose time goes on when a graph is replayed, by what was recorded in it; it is slower at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.recording: list[float] | None = None
        self.replays = 0
        self.cleared = 0
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "Stream", lambda: SimpleNamespace(synchronize=lambda: None))
        monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(recorded=[], replay=None))
        monkeypatch.setattr(cuda, "graph", self.graph)
        monkeypatch.setattr(cuda, "Event", self.event)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear, raising=False)

    @contextlib.contextmanager
    def graph(self, *args: Any, **options: Any) -> Iterator[None]:
        graph = GRAPH_SIGNATURE.bind(*args, **options).arguments["cuda_graph"]
        self.recording = []
        try:
            yield
        finally:
            recorded, self.recording = self.recording, None
        graph.replay = lambda: self.replay(recorded)

    def replay(self, recorded: list[float]) -> None:
        self.replays += 1
        self.now += sum(recorded) * (3 if self.replays < 4 else 1)

    def event(self, *, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def clear(self) -> None:
        self.cleared += 1

    def way(self, milliseconds: float) -> Any:
        def run() -> None:
            if self.recording is not None:
                self.recording.append(milliseconds)

        return run


def refuse() -> None:
    raise RuntimeError("out of resource: shared memory\nmore lines")


def test_the_clock_takes_the_least_of_replays_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    assert gpu_clock([cuda.way(3.0), refuse, cuda.way(1.0)], calls=4) == [
        pytest.approx(3.0), "out of resource: shared memory", pytest.approx(1.0)
    ]  # fmt: skip
    assert cuda.replays == 2 * ROUNDS and cuda.now > 4.0 * 4 * ROUNDS
    assert cuda.cleared >= 3  # no workspace of cuBLAS stays in a graph's memory


def test_out_of_memory_is_no_slowness(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of this moment, and not to be kept as what this machine can do."""
    cuda = FakeCuda(monkeypatch)

    def scarce() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        gpu_clock([cuda.way(1.0), scarce], calls=1)
    assert cuda.cleared >= 2


@pytest.mark.parametrize("changed", ["gpu", "torch", "cudnn", "triton"])
def test_the_cache_is_named_by_what_measurements_hold_for(
    changed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle = golden_bundle(tmp_path / "a.elfrt", "uncond", ("fp32",))
    network = TorchBackend(bundle, "fp32", "cpu").network
    before = tuner_here(network, torch.float32, tune=True)
    assert before.sm == 90 and before._file(1, 8) != before._file(2, 8)
    assert before._file(1, 8).parent.parent.parent == tmp_path
    assert tuner_here(network, torch.float32, tune=True)._file(1, 8) == before._file(1, 8)
    match changed:
        case "gpu":
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
        case "torch":
            monkeypatch.setattr(torch, "__version__", "99.0")
        case "cudnn":
            monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 99900)
        case "triton":
            monkeypatch.setattr(torch_tuning, "triton_version", lambda: "99.0")
    assert tuner_here(network, torch.float32, tune=True)._file(1, 8) != before._file(1, 8)
