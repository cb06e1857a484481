"""The programs of examples/ run as a user would run them, and stay short."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
SPOKEN = "the train leaves at five past nine"
RUNS = {  # program: (example model, arguments, what it must print)
    "generate.py": ("spoken-to-written", [SPOKEN], "0: The train"),
    "stream.py": ("spoken-to-written", [SPOKEN], "step 8 of 8"),
    "pinned.py": ("spoken-to-written", ["The train to [2] leaves at [5]."], "The train to"),
    "many_callers.py": ("spoken-to-written", [SPOKEN], "rows of a call that pay here"),
    "own_sampler.py": ("shakespeare", [], " "),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name, bundle, tmp_path):
    model, arguments, expected = RUNS[name]
    command = [sys.executable, str(FOLDER / name), str(bundle(model)), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_examples_are_short():
    for path in FOLDER.glob("*.py"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        assert len(lines) <= 30, f"{path.name} has {len(lines)} lines"
