"""docs/ is a site whose links all lead somewhere; its API page has every public name, its examples are real."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elf_rt

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", elf_rt.__all__)
def test_the_api_page_tells_of_every_public_name(site, name):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert f'id="elf_rt.{name}"' in page


def test_pages_ask_no_other_host(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in page and 'src="http' not in page


def test_the_manifest_on_the_page_is_that_of_an_export(bundle):
    page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    told = json.loads(example)
    made = json.loads((bundle("spoken-to-written") / "manifest.json").read_text(encoding="utf-8"))
    assert told.keys() == made.keys() and told["files"].keys() == made["files"].keys()
    for part in ("format", "schema_version", "source", "model", "presets", "variants", "tokenizer", "encoder"):
        assert told[part] == made[part], part


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("elf-rt gen", "generate"),
        ("elf-rt generate --prec", "--precision"),
        ("elf-rt serve --backend open", "openvino"),
    ],
)
def test_the_shell_completes(words, completed):
    variables = {"_ELF_RT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    program = Path(sys.executable).with_name("elf-rt")
    done = subprocess.run([program], env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)
    assert f"plain,{completed}" in done.stdout.splitlines(), done.stderr
