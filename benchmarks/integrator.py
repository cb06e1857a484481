"""The integrator step on this CPU: C++ against numpy, and against what copying memory costs.

    python benchmarks/integrator.py [--texts 1] [--shape 1024 512] [--seconds 10] [--json FILE]

The three are timed in turn, so that whatever else the machine does falls on all of them alike; medians are reported.
A step's traffic counts each tensor once: z and the network's output read; z, x̂ and the next call's z and x_prev
written. The copy moves as many bytes, between buffers of its own, on as many threads as serve it best.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from elf_rt.sampling.integrator import IMPLEMENTATION, SlotStep, step, step_numpy
from elf_rt.sampling.noise import NoiseKey
from elf_rt.sampling.schedule import MAIN

TENSORS = 6  # of one text and step, read or written


def make_slots(texts: int, shape: tuple[int, int], *, noise: bool) -> list[SlotStep]:
    """Texts in the middle of their samples: one guidance row each, every output written."""
    rng, coef = np.random.default_rng(0), np.array([0.9, 0.1, 0, 0.05 if noise else 0, 1], np.float32)
    return [
        SlotStep(
            rng.standard_normal(shape, dtype=np.float32),
            np.zeros(shape, np.float32),
            coef,
            NoiseKey(seed, 3),
            x_rows=np.ones((1, *shape), np.float32),
            weights=np.ones(1, np.float32),
            next_z=np.zeros((1, *shape), np.float32),
            next_x_prev=np.zeros((1, *shape), np.float32),
            rows=(MAIN,),
        )
        for seed in range(texts)
    ]


def make_copy(num_bytes: int, threads: int, pool: ThreadPoolExecutor) -> Callable[[], object]:
    """A copy that reads and writes `num_bytes` together."""
    source, target = np.ones(num_bytes // 2, np.uint8), np.zeros(num_bytes // 2, np.uint8)
    if threads == 1:
        return lambda: np.copyto(target, source)
    pieces = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    return lambda: list(pool.map(lambda piece: np.copyto(*piece), pieces))


def measure(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each, called in turn until the time is up (five rounds at least)."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in times.items()}


def benchmark(texts: int, shape: tuple[int, int], seconds: float, pool: ThreadPoolExecutor) -> dict:
    """Without and with noise."""
    quiet, noisy = (make_slots(texts, shape, noise=noise) for noise in (False, True))
    num_bytes = TENSORS * texts * quiet[0].z.nbytes
    medians = measure(
        {
            "step": lambda: step(quiet),
            "step with noise": lambda: step(noisy),
            "numpy": lambda: step_numpy(quiet),
            "numpy with noise": lambda: step_numpy(noisy),
            "copy": make_copy(num_bytes, 1, pool),
            "threaded copy": make_copy(num_bytes, os.cpu_count() or 1, pool),
        },
        seconds,
    )
    copy = min(medians.pop("copy"), medians.pop("threaded copy"))
    return {
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "copy milliseconds": 1e3 * copy,
        "GB/s": num_bytes / medians["step"] / 1e9,
        "times numpy": medians["numpy"] / medians["step"],
        "times numpy with noise": medians["numpy with noise"] / medians["step with noise"],
        "share of copy bandwidth": copy / medians["step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1, help="that share a step (default 1)")
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 512), metavar=("L", "C"))
    parser.add_argument("--seconds", type=float, default=10, help="how long to measure (default 10)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    shape = tuple(options.shape)
    print(f"integrator step ({IMPLEMENTATION}), {options.texts} x {shape}, {platform.machine()}, {os.cpu_count()} CPUs")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        row = benchmark(options.texts, shape, options.seconds, pool)
    ms = row["milliseconds"]
    for noise in ("", " with noise"):
        ours, numpys, ratio = ms[f"step{noise}"], ms[f"numpy{noise}"], row[f"times numpy{noise}"]
        print(f"step{noise or ' alone':11} {ours:8.3f} ms   numpy {numpys:8.3f} ms   {ratio:5.1f}x")
    print(f"{row['GB/s']:.1f} GB/s without noise, {row['share of copy bandwidth']:.0%} of what a copy moves")
    if options.json:
        machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "implementation": IMPLEMENTATION}
        record = {**machine, "texts": options.texts, "shape": shape, **row}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
