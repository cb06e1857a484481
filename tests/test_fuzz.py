"""Bad inputs of every kind: a command ends with exit code 0 and the right text, or with 1 or 2 and one line.

Beside that no traceback, no hang, no gigabyte of memory, and nothing left behind. What fails is named by its kind and
seed: ``try_one(kind, seed, ...)`` makes it again.
"""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, export
from filelock import FileLock
from fuzz_inputs import GENERATE, KINDS, Case, Sources
from fuzz_runner import Ended, Runner
from safetensors.numpy import save_file

EXPORTED = ("checkpoint_bytes", "checkpoint_tensors", "config", "tokenizer", "safetensors", "t5")  # seconds, each
INPUTS = {kind: 15 if kind in EXPORTED else 35 for kind in KINDS}  # in `make test`; in `make slow`, ten times as many


@pytest.fixture(scope="module")
def sources(tmp_path_factory, bundle) -> Sources:
    return make_sources(tmp_path_factory.getbasetemp().parent / "elf-rt-fuzz", bundle("t5"))


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()


def make_sources(folder: Path, t5: Path) -> Sources:
    """The T5 golden case, and the same with a table for an encoder: made once, whatever the number of processes."""
    checkpoint, table = folder / "checkpoint", folder / "table.elfrt"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not table.exists():
            shutil.rmtree(checkpoint, ignore_errors=True)
            checkpoint.mkdir()
            for name in ("checkpoint_10", "config.yml", "tokenizer.json"):
                shutil.copy(GOLDEN / "t5" / name, checkpoint)
            rows = np.random.default_rng(0).normal(size=(128, 32)).astype(np.float32)
            save_file({"embedding.weight": rows}, checkpoint / "encoder.safetensors")
            export(checkpoint, table)
    return Sources(checkpoint, {"table": table, "t5": t5})


def texts(ended: Ended) -> list[str]:
    """Of a command with --json. Raises ValueError when a line is not JSON, or has no text."""
    records = [json.loads(line, parse_constant=float.fromhex) for line in ended.out.splitlines()]
    if not all(isinstance(record.get("text"), str) for record in records):
        raise ValueError(f"no text: {ended.out[:200]}")
    return [record["text"] for record in records]


class Judge:
    """Tries inputs one after the other."""

    def __init__(self, folder: Path, sources: Sources, runner: Runner) -> None:
        self.folder, self.sources, self.runner = folder, sources, runner
        good = [runner.run([GENERATE[0], str(bundle), *GENERATE[2:]], folder) for bundle in sources.bundles.values()]
        self.right = {text for ended in good for text in texts(ended)}

    def try_one(self, kind: str, seed: int) -> str | None:
        """What is wrong with how an input ended; None when a sensible user would be content."""
        work = self.folder / f"{kind}-{seed}"
        work.mkdir()
        case = KINDS[kind](self.sources, work, random.Random(f"{kind} {seed}"))
        ended = self.runner.run(case.args, work, case.env)
        wrong = ended.fault(case.leaves) or (self._wrong_result(case, ended, work) if ended.code == 0 else None)
        shutil.rmtree(work)
        return wrong and f"{kind} {seed}: {wrong} [{case.what[:200]}; elf-rt {' '.join(case.args)[:300]}]"

    def _wrong_result(self, case: Case, ended: Ended, work: Path) -> str | None:
        if case.args[0] == "generate" and "--json" in case.args:
            try:
                found = texts(ended)
            except ValueError as error:
                return str(error)
            if case.same and not self.right.issuperset(found):
                return f"another text: {found}"
        if case.args[0] == "export" and case.same:
            made, want = ((b / "weights.bin").read_bytes() for b in (work / "b.elfrt", self.sources.bundles["table"]))
            return None if made == want else "other weights"
        return None


@pytest.mark.parametrize("kind", KINDS)
def test_bad_inputs(tmp_path, sources, runner, kind):
    judge = Judge(tmp_path, sources, runner)
    assert not [wrong for seed in range(INPUTS[kind]) if (wrong := judge.try_one(kind, seed))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_bad_inputs(tmp_path, sources, runner, kind):
    judge = Judge(tmp_path, sources, runner)
    assert not [wrong for seed in range(1000, 1000 + 10 * INPUTS[kind]) if (wrong := judge.try_one(kind, seed))]
