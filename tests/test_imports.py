"""The runtime stays lean, and imports go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    *("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "transformers", "matplotlib"),
    *("ray", "fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"),
)
ALLOWED = {  # package -> modules of elf_rt that it may import, beside its own
    "export": ("bundle", "errors", "files", "libraries", "machine", "manifest", "network", "params", "text"),
    "engines": ("bundle", "errors", "files", "network", "params", "plans"),
}


def imported(path: Path, *, top_level_only: bool) -> set[str]:
    """Dotted names that a file imports, apart from those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level_only else [node for node in ast.walk(tree) if node not in typing_only]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_stages_meet_only_in_the_bundle(package):
    for path in (ROOT / package).glob("*.py"):
        for name in imported(path, top_level_only=False):
            if name.startswith("elf_rt.") and not name.startswith(f"elf_rt.{package}"):
                module = name.split(".")[1]
                assert module in (*ALLOWED[package], "__version__"), f"{path.name} imports {name}"


def test_the_runtime_does_not_import_the_stages():
    for path in (ROOT / "elf_rt").rglob("*.py"):
        inside_functions_too = "commands" not in path.parts
        for name in imported(path, top_level_only=not inside_functions_too):
            assert not name.startswith(("elf_rt.export", "elf_rt.engines")), f"{path} imports {name}"


def test_no_module_hides_a_library():
    hidden = [p for p in ROOT.glob("*/**/*.py") if p.stem in ("onnx", "torch", "profile", "tensorrt", "openvino")]
    assert not [p for p in hidden if ".venv" not in p.parts and "build" not in p.parts]


@pytest.mark.parametrize(
    "code",
    [
        "import elf_rt",
        "import elf_rt.model, elf_rt.commands.generate, elf_rt.scale.ray_data",
        "from elf_rt.cli import main; main(['generate', '--help'])",
    ],
)
def test_importing_loads_no_engine(code, tmp_path):
    check = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint(sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("folder", ["export", "engines"])
def test_folder_names_are_not_import_names(folder):
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert f"import elf_rt.{folder}, not the folder name" in done.stderr
