"""Quality against network calls: which sampler to use when calls are few, on the two example models.

    elf-rt export examples/spoken-to-written && elf-rt export examples/shakespeare --no-append-eos
    python benchmarks/study.py spoken-to-written.elfrt shakespeare.elfrt --output docs

writes study.json, study.md (tables) and study.png, in about an hour and a half on two CPU cores. The settings were
chosen on seeds below 1000 and, for spoken-to-written, on the sentences of test.jsonl; here both are others. N counts
denoising calls; each text needs one decoding call more, and with guidance w other than 1 a denoising call has two rows.
"""

import argparse
import json
import math
import random
import runpy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from trigram import Trigram

import elf_rt
from elf_rt.console import progress
from elf_rt.measure import evaluation
from elf_rt.measure.bench_report import describe_machine

EXAMPLES = Path(__file__).parents[1] / "examples"
FIRST_SEED = 100_000
SENTENCES_SEED = 11  # of the data maker; test.jsonl has 7


@dataclass(frozen=True)
class Curve:
    """One sampler at several step counts. only: settings that differ at some of them."""

    name: str
    steps: tuple[int, ...]
    params: dict[str, Any]
    only: dict[int, dict[str, Any]] = field(default_factory=dict)


SPOKEN = (
    Curve("official: ODE, w = 2", (1, 2, 4, 8, 64), {"sampler": "ode", "guidance_scale": 2.0, "sc_cfg": 1.0}),
    Curve("ODE, w = 1", (1, 2, 4, 8, 16), {"sampler": "ode", "guidance_scale": 1.0, "sc_cfg": 1.0}),
    Curve(
        "SDE, w = 1, quantile grid",
        (2, 4, 8),
        {"sampler": "sde", "gamma": 1.5, "guidance_scale": 1.0, "sc_cfg": 1.0, "schedule": "quantile"},
    ),
    Curve(
        "fast: SDE, w = 1, quantile grid, temperature 0.6",
        (1, 2, 3, 4, 8),
        {
            "sampler": "sde",
            "gamma": 2.5,
            "temperature": 0.6,
            "guidance_scale": 1.0,
            "sc_cfg": 1.0,
            "schedule": "quantile",
        },
    ),
)
SHAKESPEARE = (
    Curve("official: SDE, s = 3", (4, 8, 16, 32), {"sampler": "sde", "gamma": 1.5, "sc_cfg": 3.0}),
    Curve("ODE, s = 3", (4, 8, 16), {"sampler": "ode", "sc_cfg": 3.0}),
    Curve("ODE, s = 3, quantile grid", (4, 8, 16), {"sampler": "ode", "sc_cfg": 3.0, "schedule": "quantile"}),
    Curve("the same, second order", (4, 8, 16), {"sampler": "ab2", "sc_cfg": 3.0, "schedule": "quantile"}),
    Curve(
        "fast: s = 5, earlier quantile grid",
        (4, 8, 16),
        {"sampler": "ab2", "schedule": "quantile", "sc_cfg": 5.0, "x_prev_scale": 1.5, "grid_mean": -2.0},
        only={4: {"grid_mean": -1.65}, 16: {"sampler": "sde", "gamma": 1.0, "grid_mean": -1.9}},
    ),
)


def run_spoken(model: elf_rt.Model, seed: int, samples: int, params: dict[str, Any]) -> dict[str, float]:
    """Exact match on sentences that neither the model nor the choice of settings has seen."""
    spoken, written = zip(*fresh_sentences(samples), strict=True)
    texts = [str(result.text) for result in model.generate(spoken, seed=seed, **params)]
    return {"exact_match": evaluation.exact_match(texts, written)}


def test_pairs() -> list[tuple[str, str]]:
    """(spoken, written) of test.jsonl."""
    records = map(json.loads, (EXAMPLES / "spoken-to-written" / "test.jsonl").read_text(encoding="utf-8").splitlines())
    return [(record["input"], record["output"]) for record in records]


def fresh_sentences(count: int) -> list[tuple[str, str]]:
    """Held-out pairs (spoken, written) that are not in test.jsonl, from the example's own maker."""
    maker = runpy.run_path(str(EXAMPLES / "spoken-to-written" / "make_data.py"))
    seen = {spoken for spoken, _ in test_pairs()}
    rng, pairs = random.Random(SENTENCES_SEED), []
    while len(pairs) < count:
        spoken, written = maker["pair"](rng)
        if maker["held_out"](spoken) and spoken not in seen:
            seen.add(spoken)
            pairs.append((spoken, written))
    return pairs


def run_shakespeare(model: elf_rt.Model, seed: int, samples: int, params: dict[str, Any]) -> dict[str, float]:
    """The three numbers that mean something only together."""
    return fluency(np.stack([result.ids for result in model.generate(n=samples, seed=seed, **params)]))


def fluency(ids: np.ndarray) -> dict[str, float]:
    """The three of texts (B, L) of Shakespeare."""
    return {
        "perplexity": Trigram(EXAMPLES / "shakespeare" / "trigram.npz").perplexity(ids),
        "entropy": evaluation.unigram_entropy(ids.tolist()),
        "repeated_4grams": evaluation.repetition(ids.tolist(), 4),
    }


def sweep(
    model: elf_rt.Model,
    curves: tuple[Curve, ...],
    run: Callable[[elf_rt.Model, int, int, dict[str, Any]], dict[str, float]],
    seeds: int,
    samples: int,
) -> list[dict[str, Any]]:
    """A point for each curve and step count: mean over seeds, its standard error, and the runs."""
    base = {"schedule": "logit_normal", "guidance_scale": 1.0}
    jobs = [(curve, steps) for curve in curves for steps in curve.steps]
    points = []
    with progress("sweeping", total=len(jobs) * seeds) as ticker:
        for curve, steps in jobs:
            params = base | curve.params | curve.only.get(steps, {}) | {"steps": steps}
            runs = []
            for k in range(seeds):
                runs.append(run(model, FIRST_SEED + 1000 * k, samples, params))
                ticker.update(len(points) * seeds + k + 1)
            values = {name: np.array([r[name] for r in runs]) for name in runs[0]}
            points.append(
                {
                    "curve": curve.name,
                    "params": asdict(model.params(**params)),
                    "steps": steps,
                    "rows": steps * (1 if params["guidance_scale"] == 1 else 2) + 1,
                    "mean": {name: float(v.mean()) for name, v in values.items()},
                    "error": {name: float(v.std(ddof=1) / math.sqrt(seeds)) for name, v in values.items()},
                    "runs": runs,
                }
            )
    return points


def markdown(study: dict[str, Any]) -> str:
    """Two tables; ± is the standard error over seeds."""
    lines = [f"Measured with `benchmarks/study.py` on {study['machine']}: {study['seconds']:.0f} s."]
    for name, part in study["models"].items():
        metrics = list(part["points"][0]["mean"])
        titles = " | ".join(metric.replace("_", " ") for metric in metrics)
        lines += ["", f"**{name}**: {part['seeds']} seeds of {part['samples']} texts.", ""]
        lines += [f"| sampler | N | network rows | {titles} |", "|---|---|---|" + "---|" * len(metrics)]
        for point in part["points"]:
            cells = " | ".join(f"{point['mean'][m]:.4g} ± {point['error'][m]:.2g}" for m in metrics)
            lines.append(f"| {point['curve']} | {point['steps']} | {point['rows']} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(study: dict[str, Any], path: Path) -> None:
    """Quality against denoising calls, one panel a number; bars of two standard errors over seeds."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    panels = (
        ("spoken-to-written", "exact_match", "exact match (higher is better)"),
        ("shakespeare", "perplexity", "perplexity (lower is better)"),
        ("shakespeare", "entropy", "unigram entropy, nats"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, (name, metric, label) in zip(axes, panels, strict=True):
        points = study["models"][name]["points"]
        for curve in dict.fromkeys(point["curve"] for point in points):
            mine = [point for point in points if point["curve"] == curve]
            style = {"linewidth": 2.5} if curve.startswith("fast") else {"linewidth": 1.2, "alpha": 0.85}
            axis.errorbar(
                [point["steps"] for point in mine],
                [point["mean"][metric] for point in mine],
                [2 * point["error"][metric] for point in mine],
                marker="o", capsize=3, label=curve, **style,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axis.set_xlabel("denoising calls N (one decoding call more)")
        axis.set_ylabel(label)
        axis.set_title(name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[1].set_yscale("log")
    axes[1].yaxis.set_minor_formatter(StrMethodFormatter("{x:.0f}"))
    axes[2].get_legend().remove()  # that of the panel before
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spoken", type=Path, help="bundle of examples/spoken-to-written")
    parser.add_argument("shakespeare", type=Path, help="bundle of examples/shakespeare")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--samples", type=int, nargs=2, default=(300, 32), help="texts a seed, for each model")
    parser.add_argument("--backend", default="auto")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    models = {}
    for path, name, curves, run, samples in (
        (arguments.spoken, "spoken-to-written", SPOKEN, run_spoken, arguments.samples[0]),
        (arguments.shakespeare, "shakespeare", SHAKESPEARE, run_shakespeare, arguments.samples[1]),
    ):
        with elf_rt.load(path, arguments.backend, precision="fp32") as model:
            points = sweep(model, curves, run, arguments.seeds, samples)
        models[name] = {"seeds": arguments.seeds, "samples": samples, "points": points}
    here = describe_machine()
    machine = f"{here['cpu']}, {here['cores']} cores, elf-rt {elf_rt.__version__}"
    study = {"machine": machine, "seconds": time.perf_counter() - begun, "models": models}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "study.json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "study.md").write_text(markdown(study), encoding="utf-8")
    draw(study, arguments.output / "study.png")
    print(markdown(study))


if __name__ == "__main__":
    main()
