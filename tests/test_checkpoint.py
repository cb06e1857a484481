"""Checkpoints: every layout gives the same tensors bit for bit, and every bad file one clear line and nothing else."""

import argparse
import hashlib
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from elf_rt.errors import CheckpointError
from elf_rt.export.checkpoint import load_checkpoint

GOLDEN = Path(__file__).parent / "data" / "golden"
OFFICIAL = GOLDEN / "uncond" / "checkpoint_10"
CONFIG = GOLDEN / "uncond" / "config.yml"


@pytest.fixture(scope="module")
def official():
    """The golden checkpoint as torch alone reads it: raw weights under params, the average under ema_params1."""
    return torch.load(OFFICIAL, weights_only=True)


def prefixed(state, prefix="model."):
    return {prefix + name: tensor for name, tensor in state.items()}


LAYOUTS = {
    "official": lambda c: c,
    "training state around it": lambda c: (
        c
        | {
            "step": np.int64(10),
            "dropout_rng": np.arange(4, dtype=np.uint32),
            "lr_scheduler": {"base_lrs": [np.float64(1e-3)], "args": argparse.Namespace(lr=1.0)},
            "opt_state": {"state": {0: {"exp_avg": torch.zeros(3)}}, "folder": Path("runs")},
        }
    ),
    "lightning": lambda c: {
        "state_dict": prefixed(c["params"]) | {"encoder.shared.weight": torch.zeros(2, 2)},
        "ema": {"decay": 0.999, "shadow": c["ema_params1"]},
        "pytorch-lightning_version": "2.5.0",
    },
    "plain": lambda c: c["ema_params1"],
    "compiled": lambda c: prefixed(prefixed(c["ema_params1"], "_orig_mod."), "module."),
    "state_dict and metadata": lambda c: {"state_dict": c["ema_params1"], "metadata": {"task": "text"}},
    "config and ema": lambda c: {"config": {"max_length": 16}, "ema": c["ema_params1"]},
}
WITH_RAW = ("official", "training state around it", "lightning")
UNNAMED = ("plain", "compiled", "state_dict and metadata")  # nothing in them says what the weights are


def write(folder: Path, content, name="model.pt", config=CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(content, folder / name)
    else:
        torch.save(content, folder / name)
    if config is not None:
        shutil.copy(config, folder / "config.yml")
    return folder / name


def assert_same(state, wanted):
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        assert torch.equal(tensor, wanted[name].float()), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_tensors(tmp_path, official, layout):
    path = write(tmp_path, LAYOUTS[layout](official))
    checkpoint = load_checkpoint(path)
    assert checkpoint.weights == ("unknown" if layout in UNNAMED else "ema")
    assert_same(checkpoint.state, official["ema_params1"])
    if layout in WITH_RAW:
        raw = load_checkpoint(path, raw=True)
        assert raw.weights == "raw"
        assert_same(raw.state, official["params"])
        assert not torch.equal(raw.state["proj_kernel"], checkpoint.state["proj_kernel"])
    elif layout in UNNAMED:  # the only set there is, whatever it is called
        raw = load_checkpoint(path, raw=True)
        assert raw.weights == "unknown"
        assert_same(raw.state, official["ema_params1"])
    else:
        with pytest.raises(CheckpointError, match="leave out --raw"):
            load_checkpoint(path, raw=True)


def test_safetensors(tmp_path, official):
    path = write(tmp_path, official["ema_params1"], "elf.safetensors")
    assert_same(load_checkpoint(path).state, official["ema_params1"])


def test_legacy_torch_file(tmp_path, official):
    path = write(tmp_path, {})
    torch.save(official, path, _use_new_zipfile_serialization=False)
    assert_same(load_checkpoint(path).state, official["ema_params1"])


def test_no_ema(tmp_path, official):
    path = write(tmp_path, {"params": official["params"]})
    with pytest.raises(CheckpointError, match="no EMA weights: pass --raw"):
        load_checkpoint(path)
    assert_same(load_checkpoint(path, raw=True).state, official["params"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(tmp_path, official, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in official["ema_params1"].items()}
    assert_same(load_checkpoint(write(tmp_path, stored)).state, stored)


def test_folder_takes_the_highest_step(tmp_path, official):
    for step in (9, 10, 100):
        shifted = {name: tensor + step for name, tensor in official["ema_params1"].items()}
        write(tmp_path, {"ema_params1": shifted, "params": official["params"]}, f"checkpoint_{step}")
    write(tmp_path, {"unrelated": 1}, "checkpoint_latest")
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.path == tmp_path / "checkpoint_100"
    assert torch.equal(checkpoint.state["proj_bias"], official["ema_params1"]["proj_bias"] + 100)


def test_folder_with_one_weight_file(tmp_path, official):
    write(tmp_path, official["ema_params1"], "model.safetensors")
    save_file({"embedding.weight": torch.zeros(2, 2)}, tmp_path / "encoder.safetensors")
    assert load_checkpoint(tmp_path).path.name == "model.safetensors"
    write(tmp_path, official["ema_params1"], "last.ckpt")
    with pytest.raises(CheckpointError, match=r"several weight files, name one: last.ckpt, model.safetensors"):
        load_checkpoint(tmp_path)


def test_sha256_is_that_of_the_file(tmp_path):
    assert load_checkpoint(OFFICIAL).sha256 == hashlib.sha256(OFFICIAL.read_bytes()).hexdigest()


class Payload:
    """A pickle that would create a file when an ordinary unpickler reads it."""

    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2))])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    "call", [(os.system, "touch {}"), (eval, "open({!r}, 'w')"), (Path.touch, Path), (np.save, "{}", 1)]
)
def test_hostile_pickle_runs_nothing(tmp_path, official, save, hidden, call):
    path, trace = tmp_path / "checkpoint_1", tmp_path / "trace"
    args = [a.format(str(trace)) if isinstance(a, str) else trace if a is Path else a for a in call[1:]]
    payload = Payload(call[0], *args)
    save({**official, "opt_state": [payload]} if hidden else payload, path)
    with pytest.raises(CheckpointError, match="nothing in it was run") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint_1"]


def _zip(path, name, compression):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, bytes(1_000_000))


def _truncated(path, share):
    content = OFFICIAL.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


BAD_FILES = {
    "text": (lambda p: p.write_text("max_length: 3\n"), "is a text file"),
    "git lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "half": (lambda p: _truncated(p, 0.5), "truncated or damaged"),
    "almost whole": (lambda p: _truncated(p, 0.99), "truncated or damaged"),
    "names not UTF-8": (
        lambda p: p.write_bytes(OFFICIAL.read_bytes().replace(b"checkpoint_10/data.pkl", b"\xff" * 22)),
        "truncated or damaged",
    ),
    "noise": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000)), "is not a checkpoint, or is damaged"),
    "other zip": (lambda p: _zip(p, "notes.txt", zipfile.ZIP_STORED), "not one that torch.save wrote"),
    "zip bomb": (lambda p: _zip(p, "archive/data.pkl", zipfile.ZIP_DEFLATED), "compressed zip"),
    "tensor": (lambda p: torch.save(torch.zeros(3), p), "holds a Tensor, not a mapping"),
    "no weights": (lambda p: torch.save({"step": 3, "lr": 0.1}, p), "no weights of an ELF, only: step, lr"),
    "odd names": (lambda p: torch.save({"a\nb\x1b": 3}, p), r"only: 'a\\nb\\x1b'"),
    "empty mapping": (lambda p: torch.save({}, p), "not a mapping of weights"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(tmp_path, kind):
    make, message = BAD_FILES[kind]
    path = tmp_path / "checkpoint_1"
    make(path)
    shutil.copy(CONFIG, tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"some words, not tensors", (8).to_bytes(8, "little") + b"{}"])
def test_bad_safetensors(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_every_bad_tensor_is_listed_in_one_error(tmp_path, official):
    state = dict(official["ema_params1"])
    del state["proj_bias"], state["blocks.1.attn.qkv.weight"]
    state["extra.weight"] = torch.zeros(3)
    state["blocks.0.mlp.w12.bias"] = torch.zeros(255)
    state["unembed_kernel"] = state["unembed_kernel"].T
    state["blocks.1.norm1.weight"] = torch.full((48,), float("inf"))
    state["t_embedder.mlp_0.bias"] = torch.full((48,), float("nan"))
    state["final_layer.linear.bias"] = torch.zeros(1).expand(32)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(write(tmp_path, state))
    message = str(caught.value)
    assert "\n" not in message
    assert message.split(": ", 1)[1].split("; ") == [
        "missing: blocks.1.attn.qkv.weight, proj_bias",
        "unexpected: extra.weight",
        "not a plain tensor: final_layer.linear.bias",
        "mis-shaped: blocks.0.mlp.w12.bias (255,) for (256), unembed_kernel (97, 32) for (32, 97)",
        "not finite: t_embedder.mlp_0.bias, blocks.1.norm1.weight",
    ]


def test_tensors_that_tell_the_sizes_may_be_missing_too(tmp_path, official):
    sized = ["unembed_bias", "blocks.0.attn.q_norm.weight", "final_layer.norm_final.weight", "t_emb_tokens"]
    state = {name: tensor for name, tensor in official["ema_params1"].items() if name not in sized}
    with pytest.raises(CheckpointError, match="missing") as caught:
        load_checkpoint(write(tmp_path, state))
    assert all(name in str(caught.value) for name in sized) and "mis-shaped" not in str(caught.value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(32, 97),  # larger than its storage
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        torch.eye(32, 97).to_sparse(),
        torch.zeros(32, 97, device="meta"),
        torch.quantize_per_tensor(torch.zeros(32, 97), 0.1, 0, torch.qint8),
        None,
    ],
)
def test_a_tensor_that_is_no_plain_one_is_refused(tmp_path, official, tensor):
    state = official["ema_params1"] | {"unembed_kernel": tensor}
    with pytest.raises(CheckpointError, match="not a plain tensor: unembed_kernel"):
        load_checkpoint(write(tmp_path, state))


def test_a_sign_that_is_kept_apart_is_applied(tmp_path, official):
    state = official["ema_params1"]
    flipped = state | {"unembed_bias": torch._neg_view(state["unembed_bias"])}
    assert np.array_equal(load_checkpoint(write(tmp_path, flipped)).state["unembed_bias"], -state["unembed_bias"])


def test_head_width_must_fit(tmp_path, official):
    state = dict(official["ema_params1"])
    for i in range(2):
        state |= {f"blocks.{i}.attn.{n}.weight": torch.ones(13) for n in ("q_norm", "k_norm")}
    with pytest.raises(CheckpointError, match=r"13, which must be even and divide 48"):
        load_checkpoint(write(tmp_path, state))


def test_another_model_is_refused(tmp_path):
    state = {"blocks.987654321.w": torch.zeros(2), "lm_head.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"no weights of an ELF, only: blocks.987654321.w, lm_head.weight"):
        load_checkpoint(write(tmp_path, state))
