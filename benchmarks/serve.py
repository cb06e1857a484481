"""Many real HTTP clients on loopback: texts a second and how long they wait, against ``Model.write`` in the same run.

    python benchmarks/serve.py BUNDLE [BUNDLE …] [--clients 1,8,64] [--texts 256] [--json FILE] [--plot FILE]

Texts have 4, 8, 16, 32 or 64 steps in turns. Each client asks for its next text when it has the last one. ``fair``: the
longest that a text took, against the time of its calls if all clients had an equal share; ``predicted``: the median
error of what each was told it would take; ``steady``: the same without as many texts at the beginning and at the
end as there are clients, when the load grows and shrinks.
"""

import argparse
import asyncio
import json
import math
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from elf_rt.measure.bench_report import describe_machine
from elf_rt.model import Model, Text, load

STEPS = (4, 8, 16, 32, 64)
SECONDS = 600.0  # that one text may take
PROMPTS = (
    "she paid nine hundred and fifty dollars for the chair",
    "please call noah at five twenty in the afternoon on saturday",
    "tina was born on the second of may nineteen ninety",
)


def make_bodies(model: Model, count: int) -> list[dict[str, Any]]:
    """What is asked: prompts where the model has presets for them, seeds and steps all different."""
    conditional = model.bundle.presets["default"].guidance_scale != 1
    prompts = [PROMPTS[k % len(PROMPTS)] if conditional else None for k in range(count)]
    return [{"prompt": prompts[k], "seed": k, "steps": STEPS[k % len(STEPS)]} for k in range(count)]


def direct(model: Model, bodies: Sequence[dict[str, Any]]) -> float:
    """Texts a second of one call of ``write``."""
    texts = [Text(body["prompt"], body["seed"], params=model.params(steps=body["steps"])) for body in bodies]
    begun = time.perf_counter()
    model.write(texts)
    return len(texts) / (time.perf_counter() - begun)


async def asked(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> dict[str, float]:
    """The same texts by so many clients."""
    waiting = iter(bodies)
    seconds: list[tuple[int, float]] = []
    errors: list[tuple[float, float]] = []  # by the time at which the text was asked for

    async def ask(client: httpx.AsyncClient) -> None:
        for body in waiting:
            begun = time.perf_counter()
            answer = await client.post(url, json=body)
            answer.raise_for_status()
            seconds.append((body["steps"], time.perf_counter() - begun))
            timings = answer.json()["choices"][0]["timings"]
            errors.append((begun, abs(timings["predicted_ms"] / timings["total_ms"] - 1)))

    connections = [httpx.AsyncClient(timeout=SECONDS) for _ in range(clients)]  # each has a connection of its own
    begun = time.perf_counter()
    await asyncio.gather(*map(ask, connections))
    wall = time.perf_counter() - begun
    await asyncio.gather(*(client.aclose() for client in connections))
    of_call = clients * wall / sum(steps + 1 for steps, _ in seconds)  # if all clients had an equal share
    by_time = [error for _, error in sorted(errors)]
    times = sorted(took for _, took in seconds)
    return {
        "clients": clients,
        "texts_per_second": len(bodies) / wall,
        "p50_ms": 1e3 * times[len(times) // 2],
        "p99_ms": 1e3 * times[min(len(times) - 1, int(0.99 * len(times)))],
        "short_p50_ms": 1e3 * statistics.median(took for steps, took in seconds if steps == STEPS[0]),
        "fair": max(took / (steps + 1) for steps, took in seconds) / of_call,
        "prediction_error": statistics.median(by_time),
        "steady_prediction_error": statistics.median(by_time[clients : len(by_time) - clients] or [math.nan]),
    }


def measure(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The texts by ``write``, from ``elf-rt serve``, and by ``write`` again, one after the other."""
    command = [sys.executable, "-m", "elf_rt", "serve", str(bundle), "--port", "0", "--backend", options.backend]
    if options.max_rows:
        command += ["--max-rows", str(options.max_rows)]
    model = load(bundle, options.backend, max_rows=options.max_rows)
    engine, bodies = f"{model.backend.name} {model.backend.precision}", make_bodies(model, options.texts)
    model.warm_up()
    alone = [direct(model, bodies)]
    with model, subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            url = next(word for line in server.stderr for word in line.split() if word.startswith("http://"))
            threading.Thread(target=server.stderr.read, daemon=True).start()  # so that its log does not hold it up
            deadline = time.monotonic() + SECONDS
            while httpx.get(f"{url}ready").status_code != 200 and time.monotonic() < deadline:
                time.sleep(0.1)
            loads = [asyncio.run(asked(f"{url}v1/completions", bodies, clients)) for clients in options.clients]
        finally:
            server.terminate()
            server.wait(SECONDS)
        alone.append(direct(model, bodies))
    write = statistics.mean(alone)
    return {"bundle": bundle.name, "engine": engine, "write_texts_per_second": write, "loads": loads}


def report(record: dict[str, Any]) -> None:
    write = record["write_texts_per_second"]
    print(f"{record['bundle']}, {record['engine']}: write {write:.2f} texts a second")
    print("clients  texts/s  of write   p50 ms   p99 ms  4 steps ms  fair  predicted  steady")
    for row in record["loads"]:
        print(
            f"{row['clients']:7}  {row['texts_per_second']:7.2f}  {row['texts_per_second'] / write:8.2f}"
            f"  {row['p50_ms']:7.0f}  {row['p99_ms']:7.0f}  {row['short_p50_ms']:10.0f}  {row['fair']:4.2f}"
            f"  {row['prediction_error']:8.1%}  {row['steady_prediction_error']:6.1%}"
        )


def plot(records: Sequence[dict[str, Any]], path: Path, machine: str) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for record in records:
        clients = [row["clients"] for row in record["loads"]]
        line = panels[0].plot(
            clients, [row["texts_per_second"] for row in record["loads"]], "o-", label=record["bundle"]
        )
        panels[0].axhline(record["write_texts_per_second"], color=line[0].get_color(), ls="--", lw=1)
        for name, style in (("p50_ms", "o-"), ("p99_ms", "^:")):
            label = f"{record['bundle']}, {name.removesuffix('_ms')}"
            panels[1].plot(
                clients, [1e-3 * row[name] for row in record["loads"]], style, color=line[0].get_color(), label=label
            )
    panels[0].set(xlabel="clients", ylabel="texts a second (dashed: Model.write)", xscale="log")
    panels[0].set_ylim(bottom=0)
    panels[1].set(xlabel="clients", ylabel="seconds of a text", xscale="log", yscale="log")
    for panel in panels:
        panel.set_xticks(clients, [str(number) for number in clients])
        panel.minorticks_off()
        panel.legend(fontsize=7)
    panels[1].yaxis.set_major_formatter("{x:g}")
    figure.suptitle(machine, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--clients", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--texts", type=int, default=256, help="for each number of clients")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--max-rows", type=int, help="of one network call; by default as many as pay")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    here = describe_machine()
    records = [measure(bundle, options) for bundle in options.bundles]
    for record in records:
        report(record)
    if options.json:
        text = json.dumps({"machine": here, "steps": STEPS, "records": records}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        plot(records, options.plot, f"{here['cpu']}, {here['cores']} cores")


if __name__ == "__main__":
    main()
