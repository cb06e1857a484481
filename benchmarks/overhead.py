"""How much of a sample's time is spent outside network calls, on the CPU.

    python benchmarks/overhead.py [--model ELF-B] [--steps 32] [--backend openvino] [--repeats 3] [--json FILE]

Writes one text of random weights at full length, as `generate` does, and prints the share of its wall time that the
integrator (noise, guidance, the update of z), the driver around it and the text side took. One text warms all up.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from elf_rt.export.random_bundle import write_random_bundle
from elf_rt.measure.bench_report import describe_machine
from elf_rt.model import Model, load
from elf_rt.params import RELEASED

LIMIT = 0.05


def shares(model: Model, steps: int, seed: int) -> dict[str, float]:
    """Seconds of one text, and the shares of them."""
    begun = time.perf_counter()
    (result,) = model.generate(steps=steps, seed=seed)
    total = time.perf_counter() - begun
    timings = result.timings
    return {
        "seconds": total,
        "network": timings.network_ms / 1e3 / total,
        "integrator": timings.integrator_ms / 1e3 / total,
        "host": (timings.total_ms - timings.network_ms - timings.integrator_ms) / 1e3 / total,
        "text": 1 - timings.total_ms / 1e3 / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(RELEASED), default="ELF-B")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        write_random_bundle(Path(folder), RELEASED[arguments.model])
        with load(folder, arguments.backend) as model:
            shares(model, 1, seed=0)
            runs = [shares(model, arguments.steps, seed) for seed in range(arguments.repeats)]
            backend = f"{model.backend.name} {model.backend.precision}"
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    outside = 1 - medians["network"]
    here: dict[str, Any] = describe_machine()
    print(f"{here['cpu']}, {here['cores']} cores, {' '.join(here['isa'])}; integrator in {here['integrator']}")
    print(f"{arguments.model}, {arguments.steps} steps, batch 1, {backend}: {medians['seconds']:.2f} s a text")
    for name in ("network", "integrator", "host", "text"):
        print(f"  {name:11}{medians[name]:8.3%}")
    print(f"outside network calls: {outside:.3%} (limit {LIMIT:.0%})")
    if arguments.json:
        record = {**vars(arguments), "machine": here, "backend": backend, "outside": outside, "runs": runs}
        arguments.json.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    sys.exit(outside >= LIMIT)


if __name__ == "__main__":
    main()
