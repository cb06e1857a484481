"""How long plans of the released model sizes take to build, how large they are, and what memory a call needs.

    python benchmarks/engines.py --models ELF-B,ELF-M,ELF-L --json engines.json

Builds FP16 plans with TensorRT-RTX, which needs no GPU, from random weights (sizes and times do not depend on the
values), and one FP32 plan of each model to compare with. Attention is fused where the plan says so, and the memory
shows it: from half the length to the whole, scratch memory grows by less than one layer's L x L scores do.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from elf_rt.bundle import Bundle, write_manifest
from elf_rt.engines.build import PlanRequest, build, plan_spec
from elf_rt.engines.recipe import RECIPES
from elf_rt.engines.shapes import parse_profiles
from elf_rt.errors import BackendError
from elf_rt.export.graph import variant_files, write_graphs
from elf_rt.export.precision import Precision, PrecisionPlan
from elf_rt.export.presets import presets_for
from elf_rt.export.random_init import random_state
from elf_rt.params import RELEASED, ModelConfig
from elf_rt.plans import Record, this_machine

FP32_SM = 89  # the FP32 plan to compare with; its size is the same for every GPU that has FP32 products
COLUMNS = {
    "model": "6",
    "sm": "4",
    "precision": "9",
    "build_s": "8.1f",
    "plan_mb": "8.1f",
    "of_fp32": "8.3f",
    "scratch_mb": "10.1f",
    "growth_mb": "10.1f",
    "scores_growth_mb": "17.1f",
    "attention": "",
}


def make_bundle(folder: Path, config: ModelConfig) -> Bundle:
    """FP32 and FP16 graphs with random weights."""
    state = {name: tensor.numpy() for name, tensor in random_state(config, seed=0).items()}
    variants = {}
    for precision, place in (("fp32", ""), ("fp16", "fp16/")):
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_graphs(folder / place, config, state, PrecisionPlan(Precision(precision)))
        variants[precision] = variant_files(place)
    write_manifest(folder, {"model": config, "presets": presets_for(config), "variants": variants})
    return Bundle.open(folder)


def build_once(bundle: Bundle, precision: str, sm: int, length: int) -> Record:
    """Build a plan for one row, and keep only its record: the plans of ELF-L are gigabytes."""
    request = PlanRequest(precision, (sm,), parse_profiles("1", str(length), bundle.config))
    spec = plan_spec(bundle, RECIPES["tensorrt-rtx"], this_machine(), request)
    record = build(spec)
    for engine in record.engines.values():
        (spec.target / engine.file).unlink()
    return record


def measure(bundle: Bundle, model: str, precision: str, sm: int) -> dict[str, Any]:
    config = bundle.config
    record, shorter = (build_once(bundle, precision, sm, config.max_length // part) for part in (1, 2))
    tokens, fewer = (config.max_length // part + config.num_prefix_tokens for part in (1, 2))
    denoiser = record.engines["denoiser"]
    scratch, less = (r.engines["denoiser"].scratch_bytes or 0 for r in (record, shorter))
    item = 4 if precision == "fp32" else 2
    return {
        "model": model,
        "sm": sm,
        "precision": precision,
        "build_s": sum(engine.seconds for engine in record.engines.values()),
        "plan_mb": sum(engine.num_bytes for engine in record.engines.values()) / 1e6,
        "scratch_mb": scratch / 1e6,
        "growth_mb": (scratch - less) / 1e6,
        "scores_growth_mb": item * config.num_heads * (tokens**2 - fewer**2) / 1e6,
        "attention": ", ".join(f"{count} {kind}" for kind, count in denoiser.attention.items()),
        "products": denoiser.matmuls,
        "discretizer_scratch_mb": (record.engines["discretizer"].scratch_bytes or 0) / 1e6,
    }


def measure_model(model: str, sms: list[int], length: int, folder: Path) -> list[dict[str, Any]]:
    bundle = make_bundle(folder / "model.elfrt", replace(RELEASED[model], max_length=length))
    rows: list[dict[str, Any]] = []
    for precision, sm in [("fp32", FP32_SM), *(("fp16", sm) for sm in sms)]:
        try:
            row = measure(bundle, model, precision, sm)
        except BackendError as error:
            print(f"{model} {precision} sm_{sm}: {error}", flush=True)
            continue
        rows.append(row | {"of_fp32": row["plan_mb"] / rows[0]["plan_mb"] if rows else 1.0})
        print("  ".join(f"{rows[-1][name]:{form}}" for name, form in COLUMNS.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ELF-B", help="comma-separated: " + ", ".join(RELEASED))
    parser.add_argument("--sm", default="75,80,86,89,120")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    print("  ".join(f"{name:>{form.partition('.')[0]}}" for name, form in COLUMNS.items()))
    rows = []
    for model in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure_model(model, [int(sm) for sm in arguments.sm.split(",")], arguments.length, Path(folder))
    if arguments.json:
        library = f"TensorRT-RTX {RECIPES['tensorrt-rtx'].library.load().__version__}"
        machine = f"{platform.system()} {platform.machine()}, no GPU used"
        arguments.json.write_text(json.dumps({"library": library, "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
