"""The wheel: one import name, all its data, and a target machine that needs next to nothing."""

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABSENT = ("torch", "onnx", "transformers", "safetensors", "yaml", "rich", "openvino")
SCRIPT = """
import importlib.util, json, sys
present = [name for name in json.loads(sys.argv[2]) if importlib.util.find_spec(name)]
import elf_rt
with elf_rt.load(sys.argv[1]) as model:
    texts = [r.text for r in model.generate(["the cat sat on the mat"], n=2, steps=4, seed=0)]
print(json.dumps([present, texts]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `make test` built, or one built now."""
    built = sorted((ROOT / "build" / "wheel").glob("elf_rt-*.whl"))
    if built:
        return built[-1]
    folder = tmp_path_factory.mktemp("wheel")
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options], check=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_one_package_and_its_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"elf_rt"}
    for needed in (
        "elf_rt/py.typed",
        "elf_rt/_csrc/integrator.cu",
        "elf_rt/_csrc/integrator.h",
        "elf_rt/export/reference.py",
        "elf_rt/engines/build.py",
        "elf_rt/serve/page/index.html",
        "elf_rt/serve/page/page.css",
        "elf_rt/serve/page/page.js",
    ):
        assert needed in names
    assert any(name.startswith("elf_rt/engines/recipes/") and name.endswith(".toml") for name in names)
    sources = {p.stem for folder in ("elf_rt", "export", "engines") for p in (ROOT / folder).rglob("*.py")}
    assert sources <= {Path(name).stem for name in names}


def test_a_bundle_runs_where_only_the_runtime_is_installed(wheel, bundle, tmp_path):
    """A fresh environment with numpy, onnxruntime, tokenizers and click; text in, through a T5 encoder, ids out."""
    python = tmp_path / "venv" / "bin" / "python"
    venv.create(tmp_path / "venv", with_pip=True)
    for packages in (["--no-deps", str(wheel)], ["--no-deps", "tokenizers"], ["numpy", "onnxruntime", "click"]):
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    command = [python, "-c", SCRIPT, str(bundle("t5")), json.dumps(ABSENT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    present, texts = json.loads(done.stdout)
    assert present == []
    here = subprocess.run([sys.executable, "-c", SCRIPT, str(bundle("t5")), "[]"], capture_output=True, text=True)
    assert texts == json.loads(here.stdout)[1]
