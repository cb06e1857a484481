"""docs/ is a site whose links all lead somewhere; its API page has every public name, its examples are real."""

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import elf_rt
from elf_rt.errors import CheckpointError
from elf_rt.export import layouts, stored
from elf_rt.params import RELEASED
from elf_rt.sampling import schedule

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


@pytest.fixture(scope="module")
def spelt_out() -> dict[str, Any]:
    """Functions that docs/extending.md spells out, by name."""
    known = vars(schedule) | vars(layouts) | vars(stored)
    known |= {"astuple": astuple, "np": np, "torch": torch, "zipfile": zipfile}
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, known)
    return known


def test_the_sampler_that_is_spelt_out(spelt_out):
    config, grid = RELEASED["ELF-B"], np.array([0, 0.1, 0.3, 0.55, 0.7, 0.9, 1.0])
    moves = spelt_out["early"](grid, elf_rt.SamplingParams(steps=6, gamma=1.5), config)
    for i, (t, t_next) in enumerate(pairwise(grid)):
        alpha = max(0.0, 1 - 1.5 * (t_next - t)) if t < 0.5 else 1.0
        start = alpha * t
        assert (moves.keep[i], moves.t[i], moves.last[i]) == (alpha, start, 0)
        assert moves.noise[i] == pytest.approx((1 - alpha) * config.noise_scale)
        assert moves.kappa[i] == pytest.approx((t_next - start) / max(1 - start, config.t_eps))


def test_the_layout_that_is_spelt_out(tmp_path, spelt_out):
    is_npz, read_npz = spelt_out["is_npz"], spelt_out["read_npz"]
    np.savez(tmp_path / "weights", **{"blocks.0.weight": np.ones((2, 3), np.float32)})
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pt")
    assert is_npz(tmp_path / "weights.npz") and not is_npz(tmp_path / "model.pt")
    assert read_npz(tmp_path / "weights.npz").leaves["blocks.0.weight"].shape == (2, 3)
    np.savez(tmp_path / "hostile", x=np.array([print], dtype=object))
    with pytest.raises(CheckpointError, match="damaged"):
        read_npz(tmp_path / "hostile.npz")
