"""What ``elf-rt bench`` shows: the machine, two tables, a picture."""

import importlib.metadata
import itertools
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from elf_rt import machine
from elf_rt.measure.bench import BenchReport, Measured
from elf_rt.sampling import integrator

STYLES = ("o-", "s--", "^:", "v-.")  # lines that lie on each other can be told apart
LIBRARIES = ("elf-rt", "numpy", "openvino", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt", "tensorrt-rtx")


def describe_machine() -> dict[str, Any]:
    """Processor, instructions, cores, system, and the versions of what computes."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": machine.cpu_name(),
        "isa": list(machine.isa()),
        "cores": machine.cores(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "integrator": integrator.IMPLEMENTATION,
        "versions": versions,
    }


def lines(result: dict[str, Any], report: BenchReport) -> Iterator[str]:
    """The tables. Steps, samples and cpu (of all cores together) in milliseconds."""
    here = result["machine"]
    yield f"{here['cpu']}, {here['cores']} cores, {' '.join(here['isa']) or 'instructions unknown'}"
    yield here["system"]
    yield ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    yield f"model {result['model']}; the reference is {report.reference}, speed is relative to {report.baseline}"
    yield "milliseconds; a sample is a request divided by its texts"
    yield "memory is what opening and a first text added: the first engine of a library carries the library"
    yield ""
    run = {
        "engine": lambda row: row.name,
        "steps": lambda row: str(row.steps),
        "batch": lambda row: str(row.batch),
    }
    yield from _table(
        report.rows,
        {
            **run,
            "step p50": lambda row: f"{row.step_p50:.2f}",
            "p90": lambda row: f"{row.step_p90:.2f}",
            "sample p50": lambda row: f"{row.sample_p50:.1f}",
            "p90 ": lambda row: f"{row.sample_p90:.1f}",
            "tokens/s": lambda row: f"{row.tokens_per_s:.0f}",
            "speed": lambda row: f"{row.speed:.2f}x",
            "agree": lambda row: f"{row.agreement:.4f}",
            "exact": lambda row: f"{row.exact:.3f} of {row.texts}",
        },
    )
    yield ""
    yield "processor time of a sample in ms, and where its time goes"
    yield from _table(
        report.rows,
        {
            **run,
            "cpu": lambda row: f"{row.cpu_p50:.1f}",
            "network": lambda row: f"{row.network:.1%}",
            "integrator": lambda row: f"{row.integrator:.1%}",
            "host": lambda row: f"{row.host:.1%}",
            "text": lambda row: f"{row.text:.1%}",
        },
    )
    yield ""
    yield from _table(
        report.contenders,
        {
            "engine": lambda entry: entry["name"],
            "library": lambda entry: entry["library"],
            "threads": lambda entry: entry.get("threads", ""),
            "load s": lambda entry: f"{entry['load_s']:.2f}",
            "first text s": lambda entry: f"{entry['first_s']:.2f}",
            "memory MB": lambda entry: "" if entry["memory_mb"] is None else f"{entry['memory_mb']:.0f}",
        },
    )
    for entry in report.contenders:
        if "attention" in entry:  # only a backend that chooses at load tells this
            chosen = f"attention by {entry['attention']}, blocks by {entry['blocks']}"
            yield f"{entry['name']}: {chosen}" + (f"; {entry['passed over']}" if entry["passed over"] else "")


def draw(report: BenchReport, title: str, path: Path, file_format: str) -> None:
    """Latency of a sample against steps, at the smallest batch, and against the batch, at the most steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    batch, steps = min(row.batch for row in report.rows), max(row.steps for row in report.rows)
    panels: tuple[tuple[str, str, Callable[[Measured], int], Callable[[Measured], bool]], ...] = (
        ("steps", f"Time of one text, batch {batch}", lambda row: row.steps, lambda row: row.batch == batch),
        ("batch", f"Time per text, steps = {steps}", lambda row: row.batch, lambda row: row.steps == steps),
    )
    for axis, (label, heading, x, shown) in zip(figure.subplots(1, 2), panels, strict=True):
        for entry, style in zip(report.contenders, itertools.cycle(STYLES)):
            rows = sorted((row for row in report.rows if row.name == entry["name"] and shown(row)), key=x)
            axis.plot([x(row) for row in rows], [row.sample_p50 for row in rows], style, label=entry["name"])
        axis.set(xlabel=label, ylabel="milliseconds", title=heading, xscale="log", yscale="log")
        axis.set_xticks(sorted({x(row) for row in report.rows if shown(row)}), minor=False)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(report.contenders))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, format=file_format, dpi=150)


def _table(rows: Sequence[Measured | dict[str, Any]], columns: dict[str, Callable[[Any], str]]) -> Iterator[str]:
    cells = [[name.strip() for name in columns], *([text(row) for text in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join([first, *others]).rstrip()
