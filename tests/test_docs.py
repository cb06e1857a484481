"""docs/ is a site whose links all lead somewhere, and whose API page has every public name."""

import os
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
