"""The official golden checkpoint's weights, folders of runs, and what must be refused in one line."""

import shutil
from pathlib import Path

import pytest
import torch

from elf_rt.errors import CheckpointError
from elf_rt.export.checkpoint import load_checkpoint

GOLDEN = Path(__file__).parent / "data" / "golden" / "uncond"
CONFIG = GOLDEN / "config.yml"


def official_state():
    return torch.load(GOLDEN / "checkpoint_10", weights_only=True)


def ema_state():
    return {name: tensor.float() for name, tensor in official_state()["ema_params1"].items()}


def raw_state():
    return {name: tensor.float() for name, tensor in official_state()["params"].items()}


def run_folder(tmp_path):
    """A folder of a run, with its config."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(CONFIG, folder)
    return folder


def assert_same(state, wanted):
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, wanted[name].float()), name


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def refused(place, *words, raw=False):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(place, raw=raw)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    for word in words:
        assert word in str(caught.value), str(caught.value)
