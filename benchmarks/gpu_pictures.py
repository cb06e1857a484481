"""The pictures of benchmarks/gpu.py."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

Rows = list[dict[str, Any]]


def draw_systems(rows: Rows, title: str, path: Path) -> None:
    """One panel a batch: milliseconds of a sample by model, one bar a system."""
    batches, models, names = (values(rows, key) for key in ("batch", "model", "system"))
    figure, axes = plt.subplots(1, len(batches), figsize=(5 * len(batches), 4.5), squeeze=False, layout="constrained")
    for axis, batch in zip(axes[0], batches, strict=True):
        for i, name in enumerate(names):
            bars = {row["model"]: row["p50_ms"] for row in rows if (row["batch"], row["system"]) == (batch, name)}
            places = [models.index(model) + (i - (len(names) - 1) / 2) * 0.8 / len(names) for model in bars]
            drawn = axis.bar(places, list(bars.values()), 0.8 / len(names), label=name, color=f"C{i}")
            axis.bar_label(
                drawn, fmt=lambda ms: f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}", fontsize=7, rotation=90, padding=2
            )
        axis.set_xticks(range(len(models)), models)
        logarithmic(axis.yaxis, axis.set_yscale)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.25)  # room for the labels under the title
        axis.set_title(f"batch {batch}", pad=8)
    axes[0][0].set_ylabel("ms for a batch, median")
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(names))]
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=4)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_batches(rows: Rows, model: str, ceiling_ms: float | None, title: str, path: Path) -> None:
    """Milliseconds a text against batch, one line a system. ceiling_ms: of a text, were all of it products."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = [row for row in rows if row["model"] == model]
    for name in values(rows, "system"):
        line = sorted((row["batch"], row["p50_ms"] / row["batch"]) for row in rows if row["system"] == name)
        axis.plot(*zip(*line, strict=True), marker="o", label=name)
    if ceiling_ms is not None:
        axis.axhline(ceiling_ms, color="black", linestyle="--", label="the measured ceiling of its products")
    batches = values(rows, "batch")
    logarithmic(axis.xaxis, axis.set_xscale)
    logarithmic(axis.yaxis, axis.set_yscale)
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.set_xlabel("batch")
    axis.set_ylabel("ms for a text, median")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(f"{model}, {title}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def logarithmic(axis: Any, set_scale: Any) -> None:
    """A scale with plain numbers at 1, 2, 5, 10 ... and no other ticks."""
    set_scale("log", subs=[])
    axis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def values(rows: Rows, key: str) -> list[Any]:
    """All that a column holds, in its order."""
    return list(dict.fromkeys(row[key] for row in rows))
