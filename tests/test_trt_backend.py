"""The TensorRT backends on strict stand-ins for the library and CUDA, and on the real TensorRT-RTX where it can."""

import ctypes
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda, install_cuda
from fake_gpu import install_gpu
from fake_tensorrt import install_tensorrt
from golden_cases import GOLDEN, golden
from plan_bundles import golden_bundle, model_bundle, rtx_spec

from elf_rt.backends import open_backend, trt, trt_rtx
from elf_rt.backends.ort import OrtBackend
from elf_rt.backends.trt_graph import TrtGraph
from elf_rt.bundle import Bundle
from elf_rt.commands.info import describe_plans
from elf_rt.device.cudart import Gpu
from elf_rt.engines.build import PlanRequest, build, plan_spec
from elf_rt.engines.recipe import RECIPES
from elf_rt.engines.shapes import parse_profiles
from elf_rt.errors import BackendError, GpuMemoryError
from elf_rt.measure.verify import verify
from elf_rt.model import Model
from elf_rt.network import GRAPHS
from elf_rt.plans import RECORD, Profile, Range, Record, this_machine

NEWEST = "11.4.0.106"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return golden_bundle(tmp_path_factory.mktemp("bundles") / "uncond.elfrt")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install_cuda(monkeypatch)


def build_fake(bundle: Bundle, batch: str, precision: str = "fp32") -> Record:
    """A plan of the fake TensorRT that is installed, for the fake GPU."""
    recipe, machine = RECIPES["tensorrt"], this_machine()
    (sms,) = recipe.groups((), precision, machine)
    request = PlanRequest(precision, sms, parse_profiles(batch, None, bundle.config))
    return build(plan_spec(bundle, recipe, machine, request))


@pytest.fixture
def ready(bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that builds plans for some batches and opens the backend on them."""
    install_tensorrt(monkeypatch, NEWEST, cuda)
    monkeypatch.setattr(Bundle, "plans_dir", tmp_path / "plans")

    def make(*batches: str) -> trt.TrtBackend:
        for batch in batches:
            build_fake(bundle, batch)
        return trt.open_backend(bundle, "fp32")

    return make


class OnStream:
    """Both graphs of a backend for one shape, on a stream of their own."""

    def __init__(self, backend: trt.TrtBackend, cuda: FakeCuda, rows: int, length: int) -> None:
        self._cuda, self.stream = cuda, cuda.add_stream()
        self.denoiser, self.head = (backend.bind(graph, rows, length, self.stream) for graph in GRAPHS)

    def array(self, name: str, rows: int | None = None) -> np.ndarray:
        """A tensor where it lies, with the rows of the plan, or the first of them."""
        graph = self.head if name == "ids" else self.denoiser
        return _array(graph, name)[:rows]

    def denoise(self) -> None:
        self.denoiser.enqueue()
        self._cuda.cudaStreamSynchronize(self.stream)

    def discretize(self) -> np.ndarray:
        _array(self.head, "hidden")[...] = self.array("hidden")
        self.head.enqueue()
        self._cuda.cudaStreamSynchronize(self.stream)
        return self.array("ids").copy()

    def close(self) -> None:
        self.denoiser.close()
        self.head.close()


def _array(graph: TrtGraph, name: str) -> np.ndarray:
    kind = ctypes.c_int64 if name == "ids" else ctypes.c_float
    shape = graph.shapes[name]
    return np.ctypeslib.as_array((kind * int(np.prod(shape))).from_address(graph.buffers[name])).reshape(shape)


def fill(call: OnStream, seed: int, rows: int) -> dict[str, np.ndarray]:
    """Random inputs of the first rows."""
    rng = np.random.default_rng(seed)
    inputs = {name: rng.standard_normal(call.array(name, rows).shape) for name in ("z", "x_prev", "t", "s", "mode")}
    for name, values in inputs.items():
        call.array(name, rows)[...] = values
    return inputs


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", NEWEST])
def test_what_onnx_runtime_gives(version: str, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Built and run by every TensorRT from JetPack 6 on, with no name that one of them lacks."""
    install_tensorrt(monkeypatch, version, cuda)
    data = golden("uncond")
    opset = 20 if version == "10.3.0" else 23
    bundle = model_bundle(tmp_path / "m.elfrt", data.config, data.state, ("fp32",), opset)
    build_fake(bundle, "2")
    backend, theirs = trt.open_backend(bundle, "fp32"), OrtBackend(bundle, "fp32", 1)
    ours = OnStream(backend, cuda, 2, 16)
    assert set(ours.denoiser.buffers) == {"z", "x_prev", "t", "s", "mode", "x", "hidden"}
    assert set(ours.head.buffers) == {"hidden", "ids"}
    denoiser, head = (theirs.bind(graph, 2, 16) for graph in GRAPHS)
    for name, values in fill(ours, 1, 2).items():
        denoiser.arrays[name][...] = values
    ours.denoise()
    denoiser.run()
    np.testing.assert_array_equal(ours.array("x"), denoiser.arrays["x"])
    head.arrays["hidden"][...] = denoiser.arrays["hidden"]
    head.run()
    np.testing.assert_array_equal(ours.discretize(), head.arrays["ids"])
    backend.close()


def test_fewer_rows_are_padded_and_equal_the_same_rows_alone(ready: Any, cuda: FakeCuda) -> None:
    backend = ready("4:4:4")
    few, full = OnStream(backend, cuda, 3, 16), OnStream(backend, cuda, 4, 16)
    fill(full, 2, 4)
    for name in ("z", "x_prev", "t", "s", "mode"):
        few.array(name, 3)[...] = full.array(name, 3)
    few.denoise()
    full.denoise()
    assert few.array("x").shape == (4, 16, 32) and not few.array("z")[3].any()
    np.testing.assert_array_equal(few.array("x", 3), full.array("x", 3))
    np.testing.assert_array_equal(few.discretize()[:3], full.discretize()[:3])


def test_a_call_is_one_enqueue_without_a_wait(ready: Any, cuda: FakeCuda) -> None:
    backend = ready("1")
    stream = cuda.add_stream()
    denoiser, head = (backend.bind(graph, 1, 16, stream) for graph in GRAPHS)
    cuda.events.clear()
    for _ in range(3):
        denoiser.enqueue()
    head.enqueue()
    assert cuda.events == ["enqueue denoiser"] * 3 + ["enqueue discretizer"]
    cuda.cudaStreamSynchronize(stream)


def test_profiles_serve_several_batch_sizes(ready: Any, cuda: FakeCuda) -> None:
    backend = ready("1,2:4:8")
    assert backend.max_rows(16) == 8
    with pytest.raises(BackendError, match="this call needs 1 rows of 15: run elf-rt build-engine"):
        backend.max_rows(15)
    with pytest.raises(BackendError, match="this call needs 9 rows of 16: run elf-rt build-engine"):
        backend.max_rows(16, 9)
    for rows in (1, 2, 5, 8):
        call = OnStream(backend, cuda, rows, 16)
        assert len(call.array("x")) == rows
        fill(call, rows, rows)
        call.denoise()
        assert np.isfinite(call.array("x")).all() and np.abs(call.array("x")).max() > 0
        call.close()


def test_the_plan_with_the_least_padding_is_taken(ready: Any) -> None:
    backend = ready("8", "2", "4")
    assert [backend._choose(rows, 16)[3] for rows in (1, 2, 3, 4, 5, 8)] == [2, 2, 4, 4, 8, 8]


def test_a_shape_that_no_plan_takes_names_the_command(ready: Any) -> None:
    backend = ready("1")
    with pytest.raises(
        BackendError, match=r"takes 1 rows of 16 tokens, .* 3 rows of 16: run elf-rt build-engine .*--batch 3"
    ):
        backend.bind("denoiser", 3, 16, 1)


def test_close_frees_everything(ready: Any, cuda: FakeCuda) -> None:
    backend = ready("1,2:2:4")
    calls = [OnStream(backend, cuda, rows, 16) for rows in (1, 2, 3)]
    assert cuda.allocated() > 0
    calls[0].close()
    calls[0].close()
    for call in calls[1:]:
        call.close()
    assert cuda.allocated() == 0
    backend.close()
    assert not backend._loaded


def test_running_out_of_memory_frees_what_was_taken(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda = install_cuda(monkeypatch, memory=20_000)
    install_tensorrt(monkeypatch, NEWEST, cuda)
    monkeypatch.setattr(Bundle, "plans_dir", tmp_path / "plans")
    build_fake(bundle, "8")
    backend = trt.open_backend(bundle, "fp32")
    with pytest.raises(GpuMemoryError, match=r"cudaMalloc failed: out of memory: use a smaller batch"):
        backend.bind("denoiser", 8, 16, cuda.add_stream())
    assert cuda.allocated() == 0


def test_what_the_library_says_is_in_the_error_not_on_the_terminal(
    ready: Any, cuda: FakeCuda, capfd: pytest.CaptureFixture[str]
) -> None:
    graph = ready("1").bind("denoiser", 1, 16, cuda.add_stream())
    graph._context._addresses.pop("t")
    with pytest.raises(
        BackendError, match="could not run the denoiser: Error Code 3: API Usage Error: an address is not"
    ):
        graph.enqueue()
    assert capfd.readouterr() == ("", "")


def test_a_failed_bind_leaves_no_memory(ready: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ready("1")
    folder, record = backend._plans[0]
    promise = Profile(Range(1, 1, 4), Range(16, 16, 16))  # more than the engine takes
    backend._plans[0] = (folder, dataclasses.replace(record, profiles=(promise,)))
    with pytest.raises(BackendError, match=r"refused shape \(4, 16, 32\) for z of the denoiser: Error Code 3"):
        backend.bind("denoiser", 4, 16, cuda.add_stream())
    assert cuda.allocated() == 0


@pytest.mark.parametrize("case", ["uncond", "cond", "no_self_cond"])
def test_golden_runs_as_cuda_graphs(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan, backend, device engine and kernel together: latents and every token of the official code."""
    gpu = install_gpu(monkeypatch)
    install_tensorrt(monkeypatch, NEWEST, gpu)
    bundle = golden_bundle(tmp_path / "m.elfrt", case, ("fp32",))
    build_fake(bundle, "1:4:16")
    with Model(bundle, lambda _: open_backend(bundle, "tensorrt", "fp32")) as model:
        report = verify(model, GOLDEN / case / "golden.npz")
        stats = model.stats()
    assert report.passed and report.backend == "tensorrt", report
    assert gpu.launches["graph"] == stats.calls > stats.captures > 0
    assert (gpu.allocated(), gpu.allocated("host"), gpu.num_streams) == (0, 0, 0)


def test_rtx_keeps_the_kernels_that_it_finished(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Finished once for each shape, before a capture, kept for the next start, and not taken from another GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Bundle, "plans_dir", tmp_path / "plans")

    def finished(gpu: bytes) -> int:
        """How often kernels were finished in one start that runs two shapes twice."""
        cuda = install_cuda(monkeypatch, name=gpu)
        install_tensorrt(monkeypatch, "rtx 1.7.1.116", cuda)
        build(rtx_spec(bundle, batch="1:2:4"))
        backend = trt_rtx.open_backend(bundle, "fp16")
        for rows in (1, 2, 1, 2):
            call = OnStream(backend, cuda, rows, 16)
            call.denoise()
            call.discretize()
            call.close()
        backend.close()
        return cuda.events.count("finish kernels")

    assert finished(b"RTX 4090") == 4  # two graphs, two shapes
    assert finished(b"RTX 4090") == 0
    assert finished(b"RTX 4080") == 4
    assert len(list((tmp_path / "cache").rglob("*.rtx"))) == 2


class TestTheRecordIsCheckedFirst:
    """No plan that this machine cannot run reaches the library: the message names both sides and the command."""

    def refused(self, bundle: Bundle, match: str) -> None:
        with pytest.raises(BackendError, match=match) as caught:
            trt.open_backend(bundle, "fp32")
        assert "\n" not in str(caught.value)

    @pytest.fixture
    def plan(self, ready: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        ready("1").close()
        runtime = sys.modules["tensorrt"].Runtime

        def refuse(*_: Any) -> None:
            raise AssertionError("the library was given a plan that the record rules out")

        monkeypatch.setattr(runtime, "deserialize_cuda_engine", refuse)
        (folder,) = (tmp_path / "plans").iterdir()
        return folder

    def test_another_gpu_and_version(self, plan: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = install_cuda(monkeypatch, sm=90, name=b"NVIDIA H100")
        install_tensorrt(monkeypatch, "10.16.1.11", cuda)
        self.refused(
            bundle,
            r"built for sm_89 with TensorRT 11\.4\.0\.106; this machine is sm_90 with 10\.16\.1\.11: run elf-rt "
            r"build-engine .*uncond\.elfrt --precision fp32 --target tensorrt$",
        )

    def test_another_system(self, plan: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("platform.system", lambda: "Windows")
        monkeypatch.setattr("platform.machine", lambda: "AMD64")
        self.refused(bundle, r"on linux-\w+; this machine is sm_89 with .* on windows-amd64: run elf-rt build-engine")

    def test_altered(self, plan: Path, bundle: Bundle) -> None:
        data = bytearray((plan / "denoiser.plan").read_bytes())
        data[100] ^= 1
        (plan / "denoiser.plan").write_bytes(data)
        self.refused(
            bundle, r"denoiser\.plan was altered after it was built .*: run elf-rt build-engine --precision fp32 again$"
        )
        ((name, text),) = describe_plans(bundle)  # elf-rt info tells it too
        assert name == "plan" and "denoiser.plan was altered" in text

    def test_truncated(self, plan: Path, bundle: Bundle) -> None:
        with (plan / "discretizer.plan").open("r+b") as file:
            file.truncate(1000)
        self.refused(bundle, r"discretizer\.plan is truncated \(1000 bytes of 4096\): run elf-rt build-engine")

    def test_missing(self, plan: Path, bundle: Bundle) -> None:
        (plan / "denoiser.plan").unlink()
        self.refused(bundle, r"denoiser\.plan is missing: run elf-rt build-engine")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda record: record.pop("key"), "key is missing"),
            (lambda record: record.update(key="../../x"), "key must be hexadecimal digits"),
            (lambda record: record.update(precision=None), "precision must be text, got null"),
            (lambda record: record.update(sms=["89"]), r"sms\[0\] must be a whole number"),
            (lambda record: record["profiles"][0]["rows"].update(least=9), r"rows: must rise .* got 9:"),
            (lambda record: record["engines"].pop("denoiser"), "engines.denoiser is missing"),
            (
                lambda record: record["engines"]["denoiser"].update(file="../x"),
                "file must be the name of a file beside",
            ),
            (
                lambda record: record["engines"]["denoiser"].update(layers={"fp16": "all"}),
                "layers.fp16 must be a whole",
            ),
        ],
    )
    def test_damaged_record(self, plan: Path, bundle: Bundle, change: Any, reason: str) -> None:
        record = json.loads((plan / RECORD).read_text())
        change(record)
        (plan / RECORD).write_text(json.dumps(record))
        self.refused(bundle, rf"plan\.json is damaged \(.*{reason}.*\): delete that folder and run elf-rt build-engine")
        ((name, text),) = describe_plans(bundle)
        assert name == "plan" and "is damaged" in text

    def test_other_weights(self, plan: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in bundle.manifest.files:
            monkeypatch.setitem(bundle.manifest.files, name, "0" * 64)
        self.refused(bundle, r"built from other weights than the bundle now holds: run elf-rt build-engine")

    def test_no_plan_of_this_precision(self, plan: Path, bundle: Bundle) -> None:
        with pytest.raises(
            BackendError, match=r"no fp16 plan for sm_89 in .*: run elf-rt build-engine .* --precision fp16"
        ):
            trt.open_backend(bundle, "fp16")


def test_reasons_for_absence(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert trt.unavailable().startswith("not installed")  # type: ignore[union-attr]
    with pytest.raises(BackendError, match="tensorrt: not installed"):
        trt.open_backend(bundle, "fp16")
    cuda = install_cuda(monkeypatch)
    install_tensorrt(monkeypatch, NEWEST, cuda)
    assert trt.unavailable() is None
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (cuda.cudaError_t.cudaErrorInsufficientDriver, None))
    assert trt.unavailable() == "no NVIDIA driver, or one too old for CUDA 13"
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (cuda.cudaError_t.cudaSuccess, 0))
    assert trt.unavailable() == "no NVIDIA GPU is visible"


def test_real_rtx_refuses_without_a_driver_and_says_why(bundle: Bundle, cuda: FakeCuda) -> None:
    """The real library, a real plan and a pretended GPU: what the library logs is what the error says."""
    pytest.importorskip("tensorrt_rtx")
    assert isinstance(this_machine().gpu, Gpu)
    spec = rtx_spec(bundle)
    build(spec)
    with pytest.raises(BackendError, match=r"TensorRT-RTX refused .*denoiser\.plan: .*(35|driver)"):
        trt_rtx.open_backend(bundle, "fp16")
