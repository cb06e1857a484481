"""The integrator step on this CPU: C++ against numpy, and against what copying memory costs.

    python benchmarks/integrator.py [--shape 1 1024 512] [--seconds 10] [--json FILE]

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

from elf_rt.sampling.integrator import IMPLEMENTATION, step, step_numpy
from elf_rt.sampling.noise import NoiseKey
from elf_rt.sampling.schedule import MAIN

TYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}


def make_step(shape: tuple[int, int, int], dtype: str, *, noise: bool) -> dict:
    """Arguments of one step in the middle of a sample: one guidance row, every output written."""
    rng = np.random.default_rng(0)
    batch = shape[0]
    return {
        "z": rng.standard_normal(shape, dtype=np.float32),
        "x_last": np.zeros(shape, np.float32),
        "x_rows": np.ones((1, *shape), dtype),
        "weights": np.ones((1, batch), np.float32),
        "coef": np.tile(np.array([0.9, 0.1, 0, 0.05 if noise else 0, 1], np.float32), (batch, 1)),
        "noise": NoiseKey(np.arange(batch, dtype=np.uint64), 3) if noise else None,
        "next_z": np.zeros((1, *shape), dtype),
        "next_x_prev": np.zeros((1, *shape), dtype),
        "rows": (MAIN,),
    }


def traffic(arguments: dict) -> int:
    """Bytes that one step reads and writes."""
    once = ("x_last", "x_rows", "next_z", "next_x_prev")
    return 2 * arguments["z"].nbytes + sum(arguments[name].nbytes for name in once)


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


def benchmark(shape: tuple[int, int, int], dtype: str, seconds: float, pool: ThreadPoolExecutor) -> dict:
    """One row of the table, without and with noise."""
    quiet, noisy = (make_step(shape, TYPES[dtype], noise=noise) for noise in (False, True))
    num_bytes = traffic(quiet)
    medians = measure(
        {
            "step": lambda: step(**quiet),
            "step with noise": lambda: step(**noisy),
            "numpy": lambda: step_numpy(**quiet),
            "numpy with noise": lambda: step_numpy(**noisy),
            "copy": make_copy(num_bytes, 1, pool),
            "threaded copy": make_copy(num_bytes, os.cpu_count() or 1, pool),
        },
        seconds,
    )
    copy = min(medians.pop("copy"), medians.pop("threaded copy"))
    return {
        "network type": dtype,
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "copy milliseconds": 1e3 * copy,
        "GB/s": num_bytes / medians["step"] / 1e9,
        "times numpy": medians["numpy"] / medians["step"],
        "times numpy with noise": medians["numpy with noise"] / medians["step with noise"],
        "share of copy bandwidth": copy / medians["step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(1, 1024, 512), metavar=("B", "L", "C"))
    parser.add_argument("--seconds", type=float, default=10, help="for each network type (default 10)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    shape = tuple(options.shape)
    print(f"integrator step ({IMPLEMENTATION}), shape {shape}, {platform.machine()}, {os.cpu_count()} CPUs")
    print("network type   step ms   numpy ms   ratio | noise: step ms   numpy ms   ratio |  GB/s   of copy bandwidth")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = []
        for dtype in TYPES:
            row = benchmark(shape, dtype, options.seconds, pool)
            ms = row["milliseconds"]
            print(
                f"{dtype:12} {ms['step']:9.2f} {ms['numpy']:10.2f} {row['times numpy']:6.1f}x |"
                f" {ms['step with noise']:14.2f} {ms['numpy with noise']:10.2f} {row['times numpy with noise']:6.1f}x |"
                f" {row['GB/s']:5.1f} {row['share of copy bandwidth']:10.0%}"
            )
            rows.append(row)
    if options.json:
        machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "implementation": IMPLEMENTATION}
        options.json.write_text(json.dumps({**machine, "shape": shape, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
