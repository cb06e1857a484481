"""Orbax checkpoints: two real ones of the official JAX code (tests/data/orbax), and other layouts by tensorstore."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from elf_rt.errors import CheckpointError
from elf_rt.export.checkpoint import load_checkpoint

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden" / "uncond"
tensorstore = pytest.importorskip("tensorstore")


@pytest.fixture(scope="module")
def official():
    return torch.load(GOLDEN / "checkpoint_10", weights_only=True)


def assert_same(state, wanted):
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, wanted[name].float()), name


def refused(place, *words):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(place)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("version", ["old", "new"])
def test_real_checkpoints(official, version):
    folder = DATA / "orbax" / version
    for place in (folder, folder / "checkpoint_10"):
        average, raw = load_checkpoint(place), load_checkpoint(place, raw=True)
        assert (average.weights, raw.weights, average.step) == ("ema", "raw", 10)
        assert average.summary.startswith("Orbax (JAX), OCDBT, EMA weights, step 10, sha256 ")
        assert_same(average.state, official["ema_params1"])
        assert_same(raw.state, official["params"])
        assert average.config == load_checkpoint(GOLDEN).config


@pytest.mark.parametrize("version", ["old", "new"])
def test_real_checkpoints_replay_the_golden_run(tmp_path, run_cli, version):
    done = run_cli("export", DATA / "orbax" / version, "-o", tmp_path / "x.elfrt", "--precision", "fp32")
    assert done.code == 0, done.err
    done = run_cli("verify", tmp_path / "x.elfrt", "--replay", GOLDEN / "golden.npz", "--backend", "onnxruntime")
    assert done.code == 0, done.out + done.err


def write(folder, leaves, driver="zarr", database=False):
    """A checkpoint as other versions lay it out: one array a leaf, in folders of their own or in a database."""
    for leaf, values in leaves.items():
        store = {"driver": "file", "path": f"{folder}/"}
        store = (
            {"driver": "ocdbt", "base": store, "path": f"{leaf}/"}
            if database
            else store | {"path": f"{folder}/{leaf}/"}
        )
        array = tensorstore.open(
            {"driver": driver, "kvstore": store}, create=True, dtype=values.dtype, shape=values.shape
        ).result()
        array.write(values).result()


def as_jax(state):
    """The tree of the JAX code: `blocks_0` for `blocks.0`, `kernel` for a Linear's transposed weight."""
    leaves = {}
    for name, tensor in state.items():
        leaf = name.replace("blocks.", "blocks_")
        kernel = leaf.endswith(".weight") and tensor.ndim == 2
        values = tensor.float().numpy()
        leaves[f"{leaf.removesuffix('.weight')}.kernel" if kernel else leaf] = np.ascontiguousarray(
            values.T if kernel else values
        )
    return leaves


@pytest.fixture
def tree(official):
    leaves = {f"ema_params1.{name}": values for name, values in as_jax(official["ema_params1"]).items()}
    return leaves | {"step": np.array(7), "opt_state.mu.proj_bias": np.ones(32, np.float32)}


@pytest.fixture
def run(tmp_path):
    shutil.copy(GOLDEN / "config.yml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
@pytest.mark.parametrize("database", [False, True])
@pytest.mark.parametrize("item", ["", "default"])
def test_other_layouts(run, official, tree, driver, database, item):
    folder = run / "checkpoint_7" / item
    write(folder, tree, driver, database)
    if item:  # what a CheckpointManager adds around the item
        (folder / "_METADATA").write_text(json.dumps({"tree_metadata": {}, "use_zarr3": driver == "zarr3"}))
        (folder.parent / "_CHECKPOINT_METADATA").write_text("{}")
    if not database:  # nobody reads the optimizer
        (folder / "opt_state.mu.proj_bias" / (".zarray" if driver == "zarr" else "zarr.json")).write_text("damaged")
    checkpoint = load_checkpoint(run)
    assert_same(checkpoint.state, official["ema_params1"])
    assert checkpoint.step == 7 and checkpoint.weights == "ema"


def test_bfloat16_and_the_newest_of_a_run(run, official, tree):
    import ml_dtypes

    halved = {leaf: v.astype(ml_dtypes.bfloat16) if leaf.startswith("ema") else v for leaf, v in tree.items()}
    write(run / "checkpoint_9", halved)
    write(run / "checkpoint_10", tree)
    (run / "checkpoint_11.orbax-checkpoint-tmp-1700000000").mkdir()  # was never finished
    assert_same(load_checkpoint(run).state, official["ema_params1"])
    wanted = {name: tensor.bfloat16() for name, tensor in official["ema_params1"].items()}
    assert_same(load_checkpoint(run / "checkpoint_9").state, wanted)
    refused(run / "checkpoint_11.orbax-checkpoint-tmp-1700000000", "never finished")


def test_damage_names_the_leaf(run, tree):
    folder = run / "checkpoint_7"
    leaf = "ema_params1.blocks_0.attn.qkv.kernel"
    write(folder, tree)
    shutil.copytree(folder, run / "good")
    (folder / leaf / "0.0").write_bytes(b"damaged")
    refused(run, leaf, "damaged")
    (folder / leaf / ".zarray").write_text("{}")
    refused(run, leaf, "damaged")
    header = json.loads((run / "good" / leaf / ".zarray").read_text())
    (folder / leaf / ".zarray").write_text(json.dumps(header | {"shape": [1 << 40, 1 << 10]}))
    refused(run, leaf)
    shutil.rmtree(folder / leaf)
    refused(run, "missing: blocks.0.attn.qkv.weight")
    keys = [{"key": key, "key_type": 2} for key in leaf.split(".")]
    entry = {"key_metadata": keys, "value_metadata": {"value_type": "jax.Array"}}
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": {"x": entry}}))
    refused(run, f"lacks the leaf {leaf}", "unfinished")


def test_a_chunk_that_is_gone_is_not_zeros(run, tree):
    """zarr reads a chunk that is not there as zeros; newer versions of Orbax store zeros too, and say so."""
    folder = run / "checkpoint_7"
    write(folder, tree)
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": {}, "store_array_data_equal_to_fill_value": True}))
    (folder / "ema_params1.proj_kernel" / "0.0").unlink()
    refused(run, "ema_params1.proj_kernel has 0 of its 1 chunks")


@pytest.mark.parametrize("version", ["old", "new"])
def test_a_damaged_database(tmp_path, version):
    shutil.copytree(DATA / "orbax" / version, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint_10"
    data = max((folder / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 20])
    refused(tmp_path / "run", "the leaf ema_params1.", "damaged")
    data.unlink()
    refused(tmp_path / "run", "the leaf ema_params1.", "damaged")
    (folder / "manifest.ocdbt").write_bytes(b"nothing")
    refused(tmp_path / "run", "is damaged")
    (folder / "_METADATA").write_text('{"tree_metadata": 3}')
    (folder / "manifest.ocdbt").unlink()
    refused(tmp_path / "run", "damaged")


def test_float8_is_refused(run, tree):
    import ml_dtypes

    write(
        run / "checkpoint_7",
        tree | {"ema_params1.proj_bias": tree["ema_params1.proj_bias"].astype(ml_dtypes.float8_e4m3fn)},
    )
    refused(run, "proj_bias is stored as float8_e4m3fn")


def test_tensorstore_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    refused(DATA / "orbax" / "new", "needs tensorstore: pip install 'elf-rt[orbax]'")
