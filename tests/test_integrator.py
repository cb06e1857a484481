"""The integrator step: numpy against its formula in float64, C++ against the bits of numpy."""

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest

from elf_rt.errors import InputError
from elf_rt.sampling.integrator import IMPLEMENTATION, SlotStep, step, step_numpy
from elf_rt.sampling.noise import NoiseKey, normal
from elf_rt.sampling.schedule import DECODE, DRAFT, Row

ROWS = (Row(True, True), Row(False, True), Row(True, False), Row(False, False))
SHAPES = [(1, 1), (3, 5), (7, 16), (4, 33)]
WRITTEN = ("z", "x_last", "next_z", "next_x_prev")


def make_slot(shape, num_rows=1, conditional=False, noise="key", draft=False, outputs=True, seed=0) -> SlotStep:
    rng = np.random.default_rng(seed)

    def values(*size):
        return rng.standard_normal(size, dtype=np.float32)

    rows = (*ROWS[:num_rows], *((DRAFT,) if draft else ()))
    return SlotStep(
        values(*shape),
        values(*shape),
        values(5),
        NoiseKey(int(rng.integers(0, 2**64, dtype=np.uint64)), 5) if noise == "key" else values(*shape),
        *((values(num_rows, *shape), values(num_rows)) if outputs else (None, None)),
        *((values(*shape), rng.random(shape[0]) < 0.5) if conditional else (None, None)),
        np.full((len(rows), *shape), 77, np.float32),
        np.full((len(rows), *shape), 77, np.float32),
        rows,
    )


def run(function: Callable[[list[SlotStep]], None], *slots: SlotStep) -> list[dict[str, np.ndarray]]:
    """What one call writes, by slot; the slots stay as they are."""
    copies = []
    for slot in slots:
        given = {field.name: getattr(slot, field.name) for field in fields(slot)}
        copies.append(SlotStep(**{k: v.copy() if isinstance(v, np.ndarray) else v for k, v in given.items()}))
    function(copies)
    return [{k: v for k in WRITTEN if (v := getattr(copy, k)) is not None} for copy in copies]


def formula(slot: SlotStep) -> dict[str, np.ndarray]:
    """The step of one text in float64, without its special cases."""
    z, x_last = (array.astype(np.float64) for array in (slot.z, slot.x_last))
    a, b, c, d, x = slot.coef.astype(np.float64)
    x_hat = x_last
    if slot.x_rows is not None:
        x_hat = np.einsum("k,klc->lc", slot.weights.astype(np.float64), slot.x_rows.astype(np.float64))
    keep = np.zeros((len(z), 1), bool) if slot.mask is None else slot.mask[:, None]
    source = np.zeros_like(z) if slot.source is None else slot.source
    x_hat = np.where(keep, source, x_hat)
    eps = slot.noise
    if isinstance(eps, NoiseKey):
        eps = normal(np.array([eps.seed], np.uint64), eps.index, z.shape)[0]
    z = np.where(keep, source, a * z + b * x_hat + c * x_last + d * eps)
    seen = [np.ones_like(keep) if row.sees_source else ~keep for row in slot.rows]
    return {
        "z": z,
        "x_last": x_hat,
        "next_z": np.stack([(x_hat if row.of_estimate else z) * s for s, row in zip(seen, slot.rows, strict=True)]),
        "next_x_prev": np.stack([x * x_hat * s * row.sees_prev for s, row in zip(seen, slot.rows, strict=True)]),
    }


def assert_formula(slot: SlotStep, result: dict[str, np.ndarray]) -> None:
    expected = formula(slot)
    assert result.keys() == expected.keys()
    for name, value in result.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("noise", ["key", "given"])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_step_matches_the_formula(shape, num_rows, draft, conditional, noise):
    slot = make_slot(shape, num_rows, conditional, noise, draft)
    (result,) = run(step_numpy, slot)
    assert_formula(slot, result)


def mixed(shape, seed=0) -> list[SlotStep]:
    """Texts in different states: guided, drafting, without outputs, decoding, given noise, advanced without a call."""
    waits = make_slot(shape, 2, True, seed=seed + 4)
    return [
        make_slot(shape, 4, True, draft=True, seed=seed),
        make_slot(shape, 1, False, "given", draft=True, seed=seed + 1),
        make_slot(shape, 2, True, outputs=False, seed=seed + 2),
        replace(make_slot(shape, 1, True, seed=seed + 3), rows=(DECODE,)),
        replace(waits, rows=(), next_z=None, next_x_prev=None),
        replace(make_slot(shape, 3, seed=seed + 5), next_x_prev=None),  # of a network without that input
    ]


@pytest.mark.parametrize("function", [step, step_numpy])
@pytest.mark.parametrize("shape", SHAPES)
def test_slots_of_different_states_are_independent(shape, function):
    """Each gives what it gives alone, bit by bit, and what the formula says."""
    slots = mixed(shape)
    together = run(function, *slots)
    for slot, result in zip(slots, together, strict=True):
        assert_same_bits(result, run(function, slot)[0])
    for slot, result in zip(slots[:4], together, strict=False):
        assert_formula(slot, result)
    left = formula(replace(slots[4], rows=ROWS[:1]))
    np.testing.assert_allclose(together[4]["z"], left["z"], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(together[4]["x_last"], left["x_last"], rtol=1e-6, atol=2e-6)
    assert together[4].keys() == {"z", "x_last"} and together[5].keys() == {"z", "x_last", "next_z"}


@pytest.mark.parametrize("function", [step, step_numpy])
def test_a_slot_without_outputs_keeps_its_estimate(function):
    """As one that was advanced while others were called: z and the estimate stay, and the inputs are written."""
    slot = replace(make_slot((3, 8), 2, True, draft=True, outputs=False), coef=np.float32([1, 0, 0, 0, 1]))
    slot.z[slot.mask] = slot.x_last[slot.mask] = slot.source[slot.mask]
    (result,) = run(function, slot)
    np.testing.assert_array_equal(result["z"], slot.z)
    np.testing.assert_array_equal(result["x_last"], slot.x_last)
    np.testing.assert_array_equal(result["next_z"][0], slot.z)
    np.testing.assert_array_equal(result["next_z"][2], slot.x_last)  # the draft
    np.testing.assert_array_equal(result["next_x_prev"][0], slot.x_last)
    assert not result["next_x_prev"][2].any()


def test_no_slot_is_no_work():
    step([])
    step_numpy([])


@pytest.mark.parametrize("function", [step, step_numpy])
def test_a_zero_factor_reads_nothing(function):
    """The start needs no earlier state: what stands in z, x_last and the outputs may be garbage."""
    slot = make_slot((3, 8), 2)
    for array in (slot.z, slot.x_last, slot.x_rows):
        array[:] = np.nan
    slot.weights[:], slot.coef[:] = 0, np.float32([0, 0.5, 0, 2, 0])
    (result,) = run(function, slot)
    np.testing.assert_array_equal(result["z"], 2 * normal(np.uint64([slot.noise.seed]), 5, (3, 8))[0])
    assert not result["x_last"].any() and not result["next_x_prev"].any()


needs_extension = pytest.mark.skipif(IMPLEMENTATION != "c++", reason="elf-rt was installed without a C++ compiler")


def assert_same_bits(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert result.keys() == expected.keys()
    for name, value in result.items():
        np.testing.assert_array_equal(value.view(np.uint32), expected[name].view(np.uint32), err_msg=name)


@needs_extension
@pytest.mark.parametrize("noise", ["key", "given"])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [*SHAPES, (67, 257)])  # the last: several blocks, chunks and threads
def test_cpp_gives_numpys_bits(shape, num_rows, outputs, draft, conditional, noise):
    slot = make_slot(shape, num_rows, conditional, noise, draft, outputs, seed=num_rows)
    assert_same_bits(run(step, slot)[0], run(step_numpy, slot)[0])


@needs_extension
@pytest.mark.parametrize("shape", [(1, 1), (7, 16), (67, 257)])
def test_cpp_gives_numpys_bits_of_slots_of_different_states(shape):
    slots = mixed(shape) + mixed(shape, seed=10)
    for result, expected in zip(run(step, *slots), run(step_numpy, *slots), strict=True):
        assert_same_bits(result, expected)


@needs_extension
@pytest.mark.parametrize("column", range(5))
def test_cpp_leaves_out_the_same_terms(column):
    slot = make_slot((7, 16), 2, conditional=True, draft=True)
    slot.coef[column], slot.weights[column % 2] = 0, 0
    slot.x_rows[column % 2], slot.z[:] = np.nan, (np.nan if column == 0 else -0.0)
    other = make_slot((7, 16), 2, conditional=True, seed=1)
    other.weights[:], other.x_rows[:] = 0, np.nan
    for result, expected in zip(run(step, slot, other), run(step_numpy, slot, other), strict=True):
        assert_same_bits(result, expected)
        assert np.isfinite(result["z"]).all()


@needs_extension
@pytest.mark.parametrize("seed", [2**64 - 1, 2**63 + 2**31])
def test_cpp_noise_at_large_counters(seed):
    """Numbers of elements, steps and seeds beyond the small ones elsewhere."""
    slot = replace(make_slot((1088, 512)), noise=NoiseKey(seed, 2**31 + 5))
    assert_same_bits(run(step, slot)[0], run(step_numpy, slot)[0])


@needs_extension
def test_cpp_from_several_python_threads():
    cases = [mixed((67, 257), seed=10 * k) for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda slots: [run(step, *slots) for _ in range(5)], cases))
    for slots, repeats in zip(cases, results, strict=True):
        expected = run(step_numpy, *slots)
        for repeat in repeats:
            for result, want in zip(repeat, expected, strict=True):
                assert_same_bits(result, want)


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_cpp_in_a_forked_child():
    """The child has none of its parent's worker threads and must not wait for them, nor for what they hold."""
    slots = mixed((67, 257))
    expected = run(step, *slots)
    stop = threading.Event()

    def keep_busy():
        while not stop.is_set():
            run(step, *slots)

    def same(results):
        return all(np.array_equal(a[k], b[k]) for a, b in zip(results, expected, strict=True) for k in b)

    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(keep_busy) for _ in range(2)]
        try:
            for _ in range(100):
                child = os.fork()
                if child == 0:
                    signal.alarm(30)  # ends a child that waits for ever
                    os._exit(0 if same(run(step, *slots)) else 1)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
    for future in busy:
        future.result()


BAD = {
    "x_last": (lambda s: s.x_last[:2], r"x_last must have shape \(3, 8\), got \(2, 8\)"),
    "x_rows": (lambda s: s.x_rows[:1], r"must have shape"),
    "weights": (lambda s: s.weights.astype(np.float64), "weights must be float32, got float64"),
    "coef": (lambda s: s.coef[:4], r"coef must have shape \(5,\), got \(4,\)"),
    "noise": (lambda s: s.z[:1].copy(), r"noise must have shape \(3, 8\), got \(1, 8\)"),
    "mask": (lambda s: s.mask.astype(np.int8), "mask must be bool, got int8"),
    "source": (lambda s: None, "source and mask go together"),
    "z": (lambda s: s.z[:, ::2], "shape|contiguous"),
    "rows": (lambda s: ROWS + ROWS[:2], "rows must have at most 5 rows, got 6"),
    "next_z": (lambda s: s.next_z.astype(np.float16), "next_z must be float32, got float16"),
    "next_x_prev": (lambda s: s.next_x_prev[:1], r"next_x_prev must have shape \(2, 3, 8\), got \(1, 3, 8\)"),
}


@needs_extension
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    """In the second slot, so that nothing of the first is advanced either."""
    good, slot = make_slot((3, 8), seed=1), make_slot((3, 8), 2, conditional=True)
    before = good.z.copy()
    spoil, message = BAD[name]
    with pytest.raises(InputError, match=message):
        step([good, replace(slot, **{name: spoil(slot)})])
    np.testing.assert_array_equal(good.z, before)


@needs_extension
def test_more_outputs_than_guidance_rows_are_refused():
    slot = make_slot((3, 8), 1)
    five = replace(slot, x_rows=np.zeros((5, 3, 8), np.float32), weights=np.zeros(5, np.float32))
    with pytest.raises(InputError, match="x_rows must have at most 4 rows, got 5"):
        step([five])
    with pytest.raises(InputError, match=r"z must have shape \(L, C\), got \(24,\)"):
        step([replace(slot, z=slot.z.reshape(-1))])


@needs_extension
def test_strided_arrays_are_refused():
    slot = make_slot((3, 8))
    with pytest.raises(InputError, match="next_z must be C-contiguous"):
        step([replace(slot, next_z=np.zeros((1, 3, 16), np.float32)[..., ::2])])
    slot.z.flags.writeable = False
    with pytest.raises(InputError, match="z must be writable"):
        step([slot])


def test_numpy_runs_where_the_extension_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "elf_rt._csrc._integrator", None)
    monkeypatch.delattr("elf_rt._csrc._integrator", raising=False)
    spec = importlib.util.find_spec("elf_rt.sampling.integrator")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.IMPLEMENTATION == "numpy" and module.step is module.step_numpy
