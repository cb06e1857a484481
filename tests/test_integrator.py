"""The integrator step: numpy against its formula in float64, C++ against the bits of numpy."""

import importlib.util
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from elf_rt.errors import InputError
from elf_rt.sampling.integrator import IMPLEMENTATION, from_float32, step, step_numpy, to_float32
from elf_rt.sampling.noise import NoiseKey, normal
from elf_rt.sampling.schedule import Row

ROWS = (Row(True, True), Row(False, True), Row(True, False), Row(False, False))
SHAPES = [(1, 1, 1), (1, 3, 5), (2, 7, 16), (3, 4, 33)]
TYPES = ["float32", "float16", "uint16"]  # uint16 holds bfloat16


def make_case(shape, num_rows=1, dtype="float32", conditional=False, noise="key", seed=0) -> dict:
    rng = np.random.default_rng(seed)

    def values(*size):
        return rng.standard_normal(size, dtype=np.float32)

    batch = shape[0]
    case = {
        "z": values(*shape),
        "x_last": values(*shape),
        "x_rows": from_float32(values(num_rows, *shape), np.dtype(dtype)),
        "weights": values(num_rows, batch),
        "coef": values(batch, 5),
        "next_z": np.full((num_rows, *shape), 77, dtype),
        "next_x_prev": np.full((num_rows, *shape), 77, dtype),
        "rows": ROWS[:num_rows],
    }
    if conditional:
        case["source"], case["mask"] = values(*shape), rng.random(shape[:2]) < 0.5
    if noise == "key":
        case["noise"] = NoiseKey(rng.integers(0, 2**64, batch, dtype=np.uint64), 5)
    elif noise == "given":
        case["noise"] = values(*shape)
    return case


def run(function, case: dict) -> dict[str, np.ndarray]:
    copy = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in case.items()}
    function(**copy)
    return {key: copy[key] for key in ("z", "x_last", "next_z", "next_x_prev") if copy.get(key) is not None}


def formula(case: dict) -> dict[str, np.ndarray]:
    """The step in float64, written for all samples at once and without its special cases."""
    z, x_last, coef = (case[key].astype(np.float64) for key in ("z", "x_last", "coef"))
    a, b, c, d, x = coef.T[:, :, None, None]
    x_hat = np.einsum("kb,kblc->blc", case["weights"].astype(np.float64), to_float32(case["x_rows"]).astype(np.float64))
    keep = case["mask"][..., None] if "mask" in case else np.zeros((*z.shape[:2], 1), bool)
    source = case.get("source", np.zeros_like(z))
    x_hat = np.where(keep, source, x_hat)
    noise = case.get("noise", np.zeros_like(z))
    eps = normal(noise.seeds, noise.index, z.shape[1:]) if isinstance(noise, NoiseKey) else noise
    z = np.where(keep, source, a * z + b * x_hat + c * x_last + d * eps)
    seen = [np.ones_like(keep) if row.sees_source else ~keep for row in case["rows"]]
    return {
        "z": z,
        "x_last": x_hat,
        "next_z": np.stack([z * s for s in seen]),
        "next_x_prev": np.stack([x * x_hat * s * row.sees_prev for s, row in zip(seen, case["rows"], strict=True)]),
    }


@pytest.mark.parametrize("noise", ["key", "given", None])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_step_matches_the_formula(shape, num_rows, conditional, noise):
    case = make_case(shape, num_rows, conditional=conditional, noise=noise)
    result, expected = run(step_numpy, case), formula(case)
    for name, value in result.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(("dtype", "ulp"), [("float16", 2**-11), ("uint16", 2**-8)])
def test_network_types_are_rounded_once(dtype, ulp):
    case = make_case((2, 7, 16), 3, dtype, conditional=True)
    result, expected = run(step_numpy, case), formula(case)
    np.testing.assert_allclose(result["z"], expected["z"], rtol=1e-6, atol=2e-6)
    for name in ("next_z", "next_x_prev"):
        np.testing.assert_allclose(to_float32(result[name]), expected[name], rtol=ulp, atol=2e-6)


def test_bfloat16_rounds_as_torch_does():
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:6] = [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 1]
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(from_float32(values, np.dtype("uint16")), expected)
    assert np.isnan(to_float32(from_float32(np.float32([np.nan]), np.dtype("uint16")))).all()


def test_a_zero_factor_reads_nothing():
    """The start needs no earlier state: what stands in z, x_last and the outputs may be garbage."""
    case = make_case((2, 3, 8), 2)
    for name in ("z", "x_last", "x_rows"):
        case[name][:] = np.nan
    case["weights"][:], case["coef"][:] = 0, np.float32([0, 0.5, 0, 2, 0])
    result = run(step, case)
    np.testing.assert_array_equal(result["z"], 2 * normal(case["noise"].seeds, 5, (3, 8)))
    assert not result["x_last"].any() and not result["next_x_prev"].any()


def test_samples_are_independent():
    case = make_case((3, 5, 7), 2, conditional=True)
    together = run(step, case)
    alone = {
        key: value[1:2] if key in ("z", "x_last", "coef", "source", "mask") else value for key, value in case.items()
    }
    alone |= {key: case[key][:, 1:2] for key in ("x_rows", "weights", "next_z", "next_x_prev")}
    alone["noise"] = NoiseKey(case["noise"].seeds[1:2], 5)
    for name, value in run(step, alone).items():
        np.testing.assert_array_equal(value, together[name][..., 1:2, :, :], err_msg=name)


needs_extension = pytest.mark.skipif(IMPLEMENTATION != "c++", reason="elf-rt was installed without a C++ compiler")


def assert_same_bits(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, value in result.items():
        integer = f"uint{8 * value.itemsize}"
        np.testing.assert_array_equal(value.view(integer), expected[name].view(integer), err_msg=name)


@needs_extension
@pytest.mark.parametrize("noise", ["key", "given", None])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 67, 257)])  # the last: several blocks, chunks and threads
def test_cpp_gives_numpys_bits(shape, dtype, num_rows, conditional, noise):
    case = make_case(shape, num_rows, dtype, conditional, noise, seed=num_rows)
    assert_same_bits(run(step, case), run(step_numpy, case))


@needs_extension
@pytest.mark.parametrize("column", range(5))
def test_cpp_leaves_out_the_same_terms(column):
    case = make_case((2, 7, 16), 2, conditional=True)
    case["coef"][0, column] = 0
    case["weights"][column % 2, 1] = 0
    case["weights"][:, 0] = 0
    case["z"][0], case["x_rows"][:, 0] = (np.nan if column == 0 else -0.0), np.nan
    assert_same_bits(run(step, case), run(step_numpy, case))


@needs_extension
def test_cpp_noise_at_large_counters():
    """Numbers of elements, steps and seeds beyond the small ones elsewhere."""
    case = make_case((2, 1088, 512))
    case["noise"] = NoiseKey(np.uint64([2**64 - 1, 2**63 + 2**31]), 2**31 + 5)
    assert_same_bits(run(step, case), run(step_numpy, case))


@needs_extension
@pytest.mark.parametrize("dtype", ["float16", "uint16"])
def test_cpp_converts_every_value(dtype):
    """All 65536 network values in, and float32 values around every rounding boundary out."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(1, 1, 256, 256)
    half_ulp = 2**12 if dtype == "float16" else 2**15
    boundaries = to_float32(every)[0].view(np.uint32) + np.uint32(half_ulp)
    boundaries[:, ::3] -= np.uint32(1)
    boundaries[:, 1::3] += np.uint32(1)
    case = make_case((1, 256, 256), 1, dtype, noise=None) | {"x_rows": every, "z": boundaries.view(np.float32)}
    case["weights"][:], case["coef"][:] = 1, np.float32([1, 0, 0, 0, 1])
    with np.errstate(invalid="ignore"):  # signalling NaNs
        result, expected = run(step, case), run(step_numpy, case)
    for name in ("x_last", "z", "next_z", "next_x_prev"):
        np.testing.assert_array_equal(to_float32(result[name]), to_float32(expected[name]), err_msg=name)


@needs_extension
def test_cpp_from_several_python_threads():
    cases = [make_case((2, 67, 257), 2, conditional=True, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda case: [run(step, case) for _ in range(5)], cases))
    for case, repeats in zip(cases, results, strict=True):
        expected = run(step_numpy, case)
        for result in repeats:
            assert_same_bits(result, expected)


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_cpp_in_a_forked_child():
    """The child has none of its parent's worker threads and must not wait for them, nor for what they hold."""
    case = make_case((2, 67, 257))
    expected = run(step, case)
    stop = threading.Event()

    def keep_busy():
        while not stop.is_set():
            run(step, case)

    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(keep_busy) for _ in range(2)]
        try:
            for _ in range(100):
                child = os.fork()
                if child == 0:
                    signal.alarm(30)  # ends a child that waits for ever
                    same = all(np.array_equal(value, expected[name]) for name, value in run(step, case).items())
                    os._exit(0 if same else 1)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
    for future in busy:
        future.result()


BAD = {
    "x_last": (lambda c: c["x_last"][:, :2], r"x_last must have shape \(2, 3, 8\), got \(2, 2, 8\)"),
    "x_rows": (lambda c: c["x_rows"][:1], r"must have shape"),
    "weights": (lambda c: c["weights"].astype(np.float64), "weights must be float32, got float64"),
    "coef": (lambda c: c["coef"][:, :4], r"coef must have shape \(2, 5\), got \(2, 4\)"),
    "noise": (lambda c: NoiseKey(c["noise"].seeds[:1], 5), r"noise.seeds must have shape \(2,\), got \(1,\)"),
    "mask": (lambda c: c["mask"].astype(np.int8), "mask must be bool, got int8"),
    "source": (lambda c: None, "source and mask go together"),
    "z": (lambda c: c["z"][:, :, ::2], "shape|contiguous"),
    "rows": (lambda c: ROWS + ROWS[:1], "rows must have at most 4 guidance rows, got 5"),
    "next_z": (lambda c: c["next_z"].astype(np.int32), "next_z must be float32, float16 or uint16, got int32"),
    "next_x_prev": (lambda c: c["next_x_prev"][:1], r"next_x_prev must have shape \(2, 2, 3, 8\), got \(1, 2, 3, 8\)"),
}


@pytest.mark.parametrize("function", [step, step_numpy])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, function):
    case = make_case((2, 3, 8), 2, conditional=True)
    spoil, message = BAD[name]
    with pytest.raises(InputError, match=message):
        function(**(case | {name: spoil(case)}))


@pytest.mark.parametrize("function", [step, step_numpy])
def test_strided_arrays_are_refused(function):
    case = make_case((2, 3, 8))
    with pytest.raises(InputError, match="next_z must be C-contiguous"):
        function(**(case | {"next_z": np.zeros((1, 2, 3, 16), np.float32)[..., ::2]}))
    case["z"].flags.writeable = False
    with pytest.raises(ValueError, match=r"z must be writable|read-only"):
        function(**case)


def test_numpy_runs_where_the_extension_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "elf_rt._csrc._integrator", None)
    monkeypatch.delattr("elf_rt._csrc._integrator", raising=False)
    spec = importlib.util.find_spec("elf_rt.sampling.integrator")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.IMPLEMENTATION == "numpy" and module.step is module.step_numpy
