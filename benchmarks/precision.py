"""What each precision does to the text of the two example models: the same noise, official samplers, 8 and 32 steps.

    elf-rt export examples/spoken-to-written --prompts examples/spoken-to-written/test.jsonl \\
        --precision fp16,bf16,int8,int8-openvino -o spoken.elfrt
    elf-rt export examples/shakespeare --no-append-eos --precision fp16,int8,int8-openvino -o shakespeare.elfrt
    python benchmarks/precision.py spoken.elfrt shakespeare.elfrt [--output docs]

Token agreement and equal texts are against float32. Exact match is on the 300 pairs of test.jsonl. Speeds are those of
`elf-rt bench`; here is what they cost.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from study import fluency, test_pairs

import elf_rt
from elf_rt.backends import discover, held_precisions
from elf_rt.bundle import Bundle
from elf_rt.console import progress
from elf_rt.measure import evaluation
from elf_rt.measure.bench_report import describe_machine

SEED = 200_000
STEPS = (8, 32)
BACKENDS = ("openvino", "onnxruntime")
Metrics = dict[str, float]


def spoken(model: elf_rt.Model, steps: int, samples: int) -> tuple[np.ndarray, Metrics]:
    prompts, written = zip(*test_pairs()[:samples], strict=True)
    results = model.generate(prompts, seed=SEED, steps=steps)
    match = evaluation.exact_match([str(result.text) for result in results], written)
    return np.stack([result.ids for result in results]), {"exact_match": match}


def shakespeare(model: elf_rt.Model, steps: int, samples: int) -> tuple[np.ndarray, Metrics]:
    ids = np.stack([result.ids for result in model.generate(n=samples, seed=SEED, steps=steps)])
    return ids, fluency(ids)


def compare(path: Path, write: Any, samples: int, steps: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for each precision and number of steps; float32 first."""
    bundle = Bundle.open(path)
    here = [name for name, reason in discover().items() if reason is None]
    choices = [(name, p) for name in here for p in held_precisions(bundle, name)]
    choices.sort(key=lambda choice: choice[1] != "fp32")
    rows: list[dict[str, Any]] = []
    exact: dict[int, np.ndarray] = {}
    with progress(path.name, total=len(choices) * len(steps)) as ticker:
        for name, precision in choices:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # this machine may run another precision instead
                try:
                    model = elf_rt.load(path, name, precision=precision)
                except UserWarning:
                    continue
            with model:
                for n in steps:
                    ids, metrics = write(model, n, samples)
                    same = ids == exact.setdefault(n, ids)
                    row = {"backend": name, "precision": precision, "steps": n, "agreement": float(same.mean())}
                    rows.append({**row, "equal_texts": float(same.all(axis=1).mean()), **metrics})
                    ticker.update(len(rows))
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spoken", type=Path, help="bundle of examples/spoken-to-written")
    parser.add_argument("shakespeare", type=Path, help="bundle of examples/shakespeare")
    parser.add_argument("--samples", type=int, nargs=2, default=(300, 64), help="texts of each")
    parser.add_argument("--output", type=Path, help="folder for precision.json")
    arguments = parser.parse_args()
    study: dict[str, Any] = {"machine": describe_machine()}
    for path, name, write, samples in (
        (arguments.spoken, "spoken-to-written", spoken, arguments.samples[0]),
        (arguments.shakespeare, "shakespeare", shakespeare, arguments.samples[1]),
    ):
        study[name] = compare(path, write, samples, STEPS)
        print(f"\n{name}, {samples} texts\n\n{markdown(study[name])}", flush=True)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(study, indent=1) + "\n"
        (arguments.output / "precision.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
