"""How long plans of the released model sizes take to build, how large they are, and what memory a call needs.

    python benchmarks/engines.py --models ELF-B,ELF-M,ELF-L --json engines.json

Builds FP16 plans with TensorRT-RTX, which needs no GPU, from random weights (sizes and times do not depend on the
values), and one FP32 plan of each model to compare with. "L x L" is what attention would add to the scratch memory if it
were not fused: one layer's scores, and as much again for their softmax.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from elf_rt.bundle import Bundle, write_manifest
from elf_rt.engines.build import Request, build, plan_spec
from elf_rt.engines.recipe import Recipe
from elf_rt.engines.shapes import parse_profiles
from elf_rt.errors import BackendError
from elf_rt.export.graph import write_graphs
from elf_rt.export.precision import Precision, PrecisionPlan
from elf_rt.export.random_init import random_state
from elf_rt.params import RELEASED, presets_for
from elf_rt.plans import Record, this_machine

FP32_SM = 89  # the FP32 plan to compare with; FP32 plans are alike on every GPU that has FP32 products


def make_bundle(folder: Path, model: str, length: int) -> Bundle:
    """FP32 and FP16 graphs of a released size with random weights."""
    config = replace(RELEASED[model], max_length=length)
    state = {name: tensor.numpy() for name, tensor in random_state(config, seed=0).items()}
    variants = {}
    for precision, place in (("fp32", ""), ("fp16", "fp16/")):
        (folder / place).mkdir(parents=True, exist_ok=True)
        names = write_graphs(folder / place, config, state, PrecisionPlan(Precision(precision)))
        variants[precision] = {Path(name).stem: place + name for name in names}
    presets = {name: params.to_json() for name, params in presets_for(config).items()}
    manifest = {"model": config.to_json(), "presets": presets, "variants": variants, "tokenizer": {}, "encoder": None}
    write_manifest(folder, manifest)
    return Bundle.open(folder)


def measure(bundle: Bundle, precision: str, sm: int, batch: str) -> Record:
    request = Request(precision, (sm,), parse_profiles(batch, None, bundle.config))
    spec = plan_spec(bundle, Recipe.load("tensorrt-rtx"), this_machine(), request)
    record = build(spec)
    for engine in record.engines.values():
        (spec.target / engine.file).unlink()  # gigabytes; only the record is wanted
    return record


def row(model: str, sm: int, record: Record, base: Record, bundle: Bundle) -> dict[str, Any]:
    config = bundle.config
    tokens = config.max_length + config.num_prefix_tokens
    size, base_size = (sum(engine.num_bytes for engine in r.engines.values()) for r in (record, base))
    denoiser, discretizer = record.engines["denoiser"], record.engines["discretizer"]
    return {
        "model": model,
        "sm": sm,
        "precision": record.precision,
        "build_seconds": denoiser.seconds + discretizer.seconds,
        "plan_mb": size / 1e6,
        "of_fp32": size / base_size,
        "scratch_mb": (denoiser.scratch_bytes or 0) / 1e6,
        "discretizer_scratch_mb": (discretizer.scratch_bytes or 0) / 1e6,
        "lxl_mb": 2 * config.num_heads * tokens**2 / 1e6,
        "attention": denoiser.attention,
        "matmuls": denoiser.matmuls,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ELF-B", help="comma-separated: " + ", ".join(RELEASED))
    parser.add_argument("--sm", default="75,80,86,89,120")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    rows = []
    print(
        f"{'model':6} {'sm':>4} {'':5} {'build s':>8} {'plan MB':>8} {'of FP32':>8} {'scratch MB':>11} {'L x L MB':>9}  attention"
    )
    for model in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            bundle = make_bundle(Path(folder) / "model.elfrt", model, arguments.length)
            base = measure(bundle, "fp32", FP32_SM, arguments.batch)
            cases = [("fp32", FP32_SM)] + [("fp16", int(sm)) for sm in arguments.sm.split(",")]
            for precision, sm in cases:
                try:
                    record = base if precision == "fp32" else measure(bundle, precision, sm, arguments.batch)
                except BackendError as error:
                    print(f"{model:6} {sm:4} {precision:5} {error}")
                    continue
                r = row(model, sm, record, base, bundle)
                rows.append(r)
                print(
                    f"{model:6} {sm:4} {precision:5} {r['build_seconds']:8.1f} {r['plan_mb']:8.1f} {r['of_fp32']:8.3f} "
                    f"{r['scratch_mb']:11.1f} {r['lxl_mb']:9.1f}  "
                    + ", ".join(f"{count} {kind}" for kind, count in r["attention"].items()),
                    flush=True,
                )
    if arguments.json:
        machine = f"{platform.system()} {platform.machine()}, {Recipe.load('tensorrt-rtx').names.load().__version__}"
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
