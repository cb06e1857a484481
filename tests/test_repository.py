"""The habits that a reader counts on: short files, links that lead somewhere, licence as declared."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 400
# A table of layouts; the whole behaviour of one engine, and of one backend.
LONGER = {"tests/test_layouts.py": 500, "tests/test_trt_backend.py": 420}


def tracked(*patterns: str) -> list[str]:
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\n") if name and (ROOT / name).is_file()]


def test_files_are_short():
    sizes = {
        name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
        for name in tracked("*.py", "*.h", "*.cu", "*.cpp")
    }
    folders: dict[str, int] = {}
    for name, size in sizes.items():
        folders[name.split("/")[0]] = folders.get(name.split("/")[0], 0) + size
    print("lines:", ", ".join(f"{folder} {size}" for folder, size in sorted(folders.items()) if size > MOST_LINES))
    assert {name: size for name, size in sizes.items() if size > LONGER.get(name, MOST_LINES)} == {}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    path = ROOT / page if (ROOT / page).is_file() else ROOT / "docs" / page
    for link in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_the_licence_is_the_declared_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:400]
