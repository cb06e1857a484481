"""The wheel: one import name, all its data, and a target machine that needs next to nothing."""

import json
import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
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
    sources = {p.stem for folder in ("elf_rt", "export", "engines") for p in (ROOT / folder).rglob("*.py")}
    assert sources <= {Path(name).stem for name in names}


def bare_environment(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with the wheel, numpy, onnxruntime and click with what they need, and tokenizers
    alone. They are links to what is installed here, so that nothing is downloaded."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    wanted, seen = ["numpy", "onnxruntime", "click"], {"tokenizers"}
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen.add(name)
            lines = metadata.requires(name) or []
            wanted += [re.match(r"[\w.-]+", line)[0] for line in lines if ";" not in line]
    for name in seen:
        installed = metadata.distribution(name)
        for top in {file.parts[0] for file in installed.files or [] if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(installed.locate_file(top))
    return folder / "bin" / "python"


def test_a_bundle_runs_where_only_the_runtime_is_installed(wheel, bundle, tmp_path):
    """Text in, through a T5 encoder, text out."""
    python = bare_environment(tmp_path / "venv", wheel)
    command = [python, "-c", SCRIPT, str(bundle("t5")), json.dumps(ABSENT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    present, texts = json.loads(done.stdout)
    assert present == []
    here = subprocess.run([sys.executable, "-c", SCRIPT, str(bundle("t5")), "[]"], capture_output=True, text=True)
    assert texts == json.loads(here.stdout)[1]
