"""The engine of rows against the engine of batches that it replaced, on one machine in one run.

    python benchmarks/rows.py [--old 148a1be] [--rounds 5] [--backend openvino] [--models spoken,shakespeare,ELF-B]
        [--jobs alone,eight]

Run it from a clone with its history: the old commit is built into ``build/``. Both commits are loaded, each in a
process of its own, and do the same jobs in turns; what is printed is the median over rounds of old seconds / new
seconds, so above 1 is faster than before. Jobs:

    alone      one text
    eight      eight texts of one ``generate``
    threads    32 threads that ask for a text each, and `many`: the same 32 texts by one ``generate``
    mixed      a text of 4 steps, asked for at a random moment while eight of 64 steps are being written
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {"spoken": "spoken-to-written", "shakespeare": "shakespeare"}
PROMPT = "she paid nine hundred and fifty dollars for the chair"
STEPS = {"spoken": 8, "shakespeare": 8, "ELF-B": 4}
JOBS = {"spoken": ("alone", "eight", "threads", "many", "mixed"), "shakespeare": ("alone", "eight")}
RANDOM = """
import sys
from pathlib import Path
from elf_rt.export.random_bundle import write_random_bundle
from elf_rt.params import RELEASED
write_random_bundle(Path(sys.argv[1]), RELEASED[sys.argv[2]])
"""


def work(folder: str, name: str, backend: str) -> None:
    """A process of one commit: reads a job a line, answers with its seconds."""
    import elf_rt

    model = elf_rt.load(folder, backend, precision="fp32")
    prompt, steps = (PROMPT if name == "spoken" else None), STEPS[name]

    def write(n: int, seed: int, steps: int = steps) -> None:
        model.generate(prompt, n=n, seed=seed, steps=steps)

    def threads(seed: int) -> None:
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(lambda k: write(1, seed + k), range(32)))

    def mixed(seed: int) -> float:
        """Seconds of the short text alone."""
        long = threading.Thread(target=write, args=(8, seed, 64))
        long.start()
        time.sleep(random.Random(seed).uniform(0.02, 0.2))
        begun = time.perf_counter()
        write(1, seed + 8, 4)
        seconds = time.perf_counter() - begun
        long.join()
        return seconds

    jobs: dict[str, Callable[[int], float | None]] = {
        "alone": lambda seed: write(1, seed),
        "eight": lambda seed: write(8, seed),
        "threads": threads,
        "many": lambda seed: write(32, seed),
        "mixed": mixed,
    }
    print(f"{model.backend.name} {model.backend.precision}", flush=True)
    for line in sys.stdin:
        job, seed = line.split()
        begun = time.perf_counter()
        seconds = jobs[job](int(seed))
        print(time.perf_counter() - begun if seconds is None else seconds, flush=True)


def build_old(commit: str) -> Path:
    """The old commit, installed into a folder of its own."""
    target, source = ROOT / "build" / f"old-{commit}", ROOT / "build" / f"old-{commit}-source"
    if not target.exists():
        source.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
        options = ["-q", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)
    return target


def environment(folder: Path | None) -> dict[str, str]:
    return os.environ | ({"PYTHONPATH": str(folder)} if folder else {})


def write_bundle(name: str, folder: Path, env: dict[str, str]) -> None:
    if name in EXAMPLES:
        example = ROOT / "examples" / EXAMPLES[name]
        options = [str(example), "-o", str(folder), "--precision", "fp32", "--presets", str(example / "presets.json")]
        command = ["-m", "elf_rt", "export", *options, *(["--no-append-eos"] if name == "shakespeare" else [])]
    else:
        folder.mkdir()
        command = ["-c", RANDOM, str(folder), name]
    subprocess.run([sys.executable, "-P", *command], env=env, check=True, capture_output=True)


def compare(name: str, folder: Path, old: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each job by each commit, round by round: of half of the rounds the old one's process is started first,
    of the others the new one's, as the first may get the better memory (by 1 % of the same commit against itself)."""
    envs = {"old": environment(old), "new": environment(None)}
    for side, env in envs.items():
        write_bundle(name, folder / f"{side}-{name}.elfrt", env)
    jobs = [job for job in JOBS.get(name, ("alone", "eight")) if job in options.jobs]
    seconds: dict[str, dict[str, list[float]]] = {job: {"old": [], "new": []} for job in jobs}
    engines: dict[str, str] = {}
    for order in (("old", "new"), ("new", "old")):
        workers = {side: start(name, folder / f"{side}-{name}.elfrt", envs[side], options.backend) for side in order}
        engines = {side: worker.stdout.readline().strip() for side, worker in workers.items()}  # type: ignore[union-attr]
        for number in range(-options.warm, (options.rounds + 1) // 2):
            for job in jobs:
                for side in order if number % 2 else reversed(order):
                    took = ask(workers[side], job, 10_000 + 100 * number)
                    if number >= 0:
                        seconds[job][side].append(took)
        for worker in workers.values():
            worker.communicate(timeout=60)
    return {"model": name, "engines": engines, "seconds": seconds}


def start(name: str, bundle: Path, env: dict[str, str], backend: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", __file__, "--work", str(bundle), name, "--backend", backend]
    return subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def ask(worker: subprocess.Popen[str], job: str, seed: int) -> float:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{job} {seed}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def report(record: dict[str, Any]) -> None:
    print(f"{record['model']}, {record['engines']['old']} and {record['engines']['new']}")
    for job, by_side in record["seconds"].items():
        old, new = (statistics.median(by_side[side]) for side in ("old", "new"))
        ratios = [was / now for was, now in zip(by_side["old"], by_side["new"], strict=True)]
        print(
            f"  {job:8} {1e3 * old:9.1f} ms before  {1e3 * new:9.1f} ms now  {statistics.median(ratios):6.3f}",
            flush=True,
        )
    if {"threads", "many"} <= record["seconds"].keys():
        new = {job: statistics.median(record["seconds"][job]["new"]) for job in ("threads", "many")}
        print(f"  32 threads have {new['many'] / new['threads']:.3f} of the throughput of one generate(n=32)")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default="148a1be", help="a commit before the engine of rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=8, help="rounds before them, in which it is found out what pays")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(STEPS))
    parser.add_argument("--jobs", type=lambda text: text.split(","), default=list(JOBS["spoken"]))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(*options.work, options.backend)
        return
    from elf_rt.measure.bench_report import describe_machine

    here, records = describe_machine(), []
    print(f"{here['cpu']}, {here['cores']} cores")
    old = build_old(options.old)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            records.append(compare(name, Path(folder), old, options))
            report(records[-1])
    if options.json:
        options.json.write_text(json.dumps({"machine": here, "models": records}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
