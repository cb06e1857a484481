"""Thousands of texts in one process: does memory grow, does throughput fall?

    python benchmarks/soak.py BUNDLE [--samples 10000] [--batch 16] [--steps 4] [--threads 1] [--json FILE]

Prompts, seeds and steps change all the time, as they do in a server; --threads shares one model among that many
threads. The run is cut into ten windows. It fails (exit code 1) when the last three windows, by their median, hold more
than 2 % or 4 MB more memory, or took 10 % more processor time for each text, than the three after the first, in which
buffers and compiled networks come to be. Processor time, because the rest of the machine may be busy.
"""

import argparse
import itertools
import json
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from elf_rt import machine
from elf_rt.measure.bench_report import describe_machine
from elf_rt.model import Model, load

WINDOWS = 10
PROMPTS = [
    "she paid nine hundred and fifty dollars for the chair",
    "the train leaves at a quarter past nine",
    "it costs three dollars and twenty cents",
    "tina was born on the second of may nineteen ninety",
]


def write(model: Model, batch: int, steps: int, number: int) -> int:
    """Request ``number``: sizes and steps vary with it."""
    prompts = [PROMPTS[(number + i) % len(PROMPTS)] for i in range(1 + number % batch)]
    results = model.generate(prompts, seed=number, steps=1 + number % steps)
    assert all(result.text is not None for result in results)
    return len(results)


def window(model: Model, pool: ThreadPoolExecutor, numbers: Any, samples: int, options: Any) -> dict[str, float]:
    """About ``samples`` texts."""
    written, lock = 0, threading.Lock()

    def work() -> None:
        nonlocal written
        while True:
            with lock:
                if written >= samples:
                    return
                number = next(numbers)
            done = write(model, options.batch, options.steps, number)
            with lock:
                written += done

    wall, cpu = time.perf_counter(), time.process_time()
    for future in [pool.submit(work) for _ in range(options.threads)]:
        future.result()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "samples": written,
        "per_second": written / wall,
        "cpu_ms": cpu / written * 1e3,
        "private_mb": machine.memory()["private"] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="of spoken-to-written, or of another model that takes a prompt")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    here = describe_machine()
    numbers = itertools.count()
    with load(options.bundle, options.backend) as model, ThreadPoolExecutor(options.threads) as pool:
        backend = f"{model.backend.name} {model.backend.precision}"
        print(f"{here['cpu']}, {here['cores']} cores; {backend}, {options.threads} threads share the model")
        windows = []
        for _ in range(WINDOWS):
            windows.append(window(model, pool, numbers, options.samples // WINDOWS, options))
            done = sum(int(w["samples"]) for w in windows)
            last = windows[-1]
            print(
                f"{done:7} texts  {last['per_second']:7.1f} a second  {last['cpu_ms']:6.2f} ms of processor each"
                f"  {last['private_mb']:7.1f} MB",
                flush=True,
            )
    early, late = (
        {name: statistics.median(w[name] for w in part) for name in last} for part in (windows[1:4], windows[-3:])
    )
    growth = late["private_mb"] - early["private_mb"]
    slower = late["cpu_ms"] / early["cpu_ms"] - 1
    print(f"memory {growth:+.1f} MB, processor time of a text {slower:+.1%}")
    if options.json:
        record = {**vars(options), "machine": here, "backend": backend, "windows": windows}
        options.json.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    sys.exit(growth > max(4.0, 0.02 * early["private_mb"]) or slower > 0.1)


if __name__ == "__main__":
    main()
