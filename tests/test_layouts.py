"""One small checkpoint of every layout, by the library that writes it: the same tensors, named for what they are.

DeepSpeed's alone is made by hand, as its public code writes it: it does not install without a GPU's compiler.
"""

import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, GOLDEN, assert_same, ema_state, official_state, prefixed, raw_state, refused, run_folder
from conftest import export
from safetensors.torch import save_file
from text_side import checkpoint_with_text, word_tokenizer

from elf_rt.errors import CheckpointError
from elf_rt.export.checkpoint import load_checkpoint
from elf_rt.export.reference import ELF
from elf_rt.files import sha256

official = pytest.fixture(official_state, scope="module")
ema = pytest.fixture(ema_state, scope="module")
raw = pytest.fixture(raw_state, scope="module")
run = pytest.fixture(run_folder)


def test_heads_that_inference_does_not_need(run, ema):
    extra = {"rope.freqs": torch.ones(4), "repa_head.0.weight": torch.ones(3, 3), "aux_head.bias": torch.ones(2)}
    torch.save(ema | extra | {"step": torch.tensor(3)}, run / "model.pt")
    with pytest.warns(UserWarning, match="does not need, left out: rope.freqs, repa_head.0.weight, aux_head.bias"):
        assert_same(load_checkpoint(run / "model.pt").state, ema)
    for name in ("blocks.0.attn.gate.weight", "final_layer.gate.weight", "adapter.weight"):
        torch.save(ema | {name: torch.ones(3)}, run / "model.pt")
        refused(run / "model.pt", f"unexpected: {name}")


def test_shared_and_tied_tensors(run, ema):
    whole = torch.cat([ema["proj_bias"], ema["proj_bias"]])
    torch.save(ema | {"proj_bias": whole[: len(whole) // 2], "ema_copy": whole}, run / "model.pt")
    state = dict(ema)
    state["blocks.1.norm1.weight"] = state["blocks.0.norm1.weight"]
    torch.save(state, run / "model.pt")
    assert_same(load_checkpoint(run / "model.pt").state, state)


@pytest.fixture(scope="module")
def lightning_file(tmp_path_factory, raw):
    """Lightning's own checkpoint after three steps, with its averaging callback or without: (path, raw, averaged)."""
    lightning = pytest.importorskip("lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    config = load_checkpoint(GOLDEN).config

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"max_length": 16, "lr": 1e-3, "latent_mean": 0.0})
            self.model = ELF(config)
            self.model.load_state_dict(raw)

        def training_step(self, batch, index):
            return sum(parameter.square().sum() for parameter in self.model.parameters())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.zeros(3, 1))

    def make(averaging):
        folder = tmp_path_factory.mktemp("lightning")
        module, average = Module(), callbacks.EMAWeightAveraging(decay=0.5)
        kept = {}

        class Save(callbacks.Callback):
            def on_train_end(self, trainer, pl_module):
                trainer.save_checkpoint(folder / "epoch=0-step=3.ckpt", weights_only=False)
                kept.update({name: value.clone() for name, value in module.model.state_dict().items()})

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            max_steps=3,
            accelerator="cpu",
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[Save(), average] if averaging else [Save()],
            **quiet,
        )
        trainer.fit(module)
        averaged = dict(average._average_model.module.model.state_dict()) if averaging else {}
        return folder, kept, averaged

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield make


def test_lightning(lightning_file, raw):
    folder, trained, _ = lightning_file(averaging=False)
    with pytest.warns(UserWarning, match="ELF-B's values are taken"):
        checkpoint = load_checkpoint(folder)
    assert checkpoint.summary.startswith("Lightning 2.") and ", step 3," in checkpoint.summary
    assert checkpoint.weights == "unknown" and checkpoint.config.max_length == 16
    assert_same(checkpoint.state, trained)
    assert not torch.equal(trained["proj_bias"], raw["proj_bias"])


def test_lightning_with_its_averaging_callback(lightning_file):
    folder, _, _ = lightning_file(averaging=True)
    content = torch.load(folder / "epoch=0-step=3.ckpt", weights_only=False)
    shutil.copy(CONFIG, folder)
    average, trained = load_checkpoint(folder), load_checkpoint(folder, raw=True)
    assert (average.weights, trained.weights) == ("ema", "raw")
    names = {name.removeprefix("model."): value for name, value in content["state_dict"].items()}
    assert_same(average.state, names)
    assert_same(trained.state, {n.removeprefix("model."): v for n, v in content["current_model_state"].items()})
    assert not torch.equal(average.state["proj_bias"], trained.state["proj_bias"])


def test_lightning_1(run, raw, ema):
    """Its structure as version 1.9 writes it: metrics and states of loops, and hyperparameters as AttributeDict."""
    torch.save(
        {
            "epoch": 4,
            "global_step": 95000,
            "pytorch-lightning_version": "1.9.5",
            "state_dict": prefixed(raw, "model.") | prefixed(ema, "ema.model.") | {"ema.decay": torch.tensor(0.9)},
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 1e-4},
        },
        run / "last.ckpt",
    )
    checkpoint = load_checkpoint(run)
    assert checkpoint.summary.startswith("Lightning 1.9.5, EMA weights, step 95000, sha256 ")
    assert_same(checkpoint.state, ema)
    assert_same(load_checkpoint(run, raw=True).state, raw)


def shards(folder, state, suffix=".safetensors", count=3):
    names = sorted(state)
    index = {}
    for part in range(count):
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        file = f"{stem}-{part + 1:05d}-of-{count:05d}{suffix}"
        held = {name: state[name].contiguous() for name in names[part::count]}
        save_file(held, folder / file) if suffix == ".safetensors" else torch.save(held, folder / file)
        index |= dict.fromkeys(held, file)
    path = folder / f"{stem}{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(run, ema, suffix):
    index = shards(run, ema, suffix)
    for place in (run, index, run / f"{index.name.split('.')[0]}-00002-of-00003{suffix}"):
        checkpoint = load_checkpoint(place)
        assert_same(checkpoint.state, ema)
        assert "3 shards" in checkpoint.layout
    assert load_checkpoint(run).sha256 == load_checkpoint(index).sha256
    index.unlink()  # people forget it
    assert_same(load_checkpoint(run).state, ema)
    (run / f"{index.name.split('.')[0]}-00003-of-00003{suffix}").unlink()
    refused(run, "lacks", "00003-of-00003")


def test_bad_indexes(run, ema, tmp_path):
    index = shards(run, ema)
    good = json.loads(index.read_text())
    for change, words in (
        ({"weight_map": {"proj_bias": "../outside.safetensors"}}, ("names ../outside.safetensors", "refused")),
        ({"weight_map": {"proj_bias": "model-00009-of-00003.safetensors"}}, ("lacks model-00009",)),
        ({"weight_map": {"proj_bias": 3}}, ("names 3",)),
        ({"weight_map": good["weight_map"] | {"x.weight": "model-00001-of-00003.safetensors"}}, ("lacks x.weight",)),
        ({"weight_map": []}, ("has no weight_map",)),
    ):
        index.write_text(json.dumps(change))
        refused(run, *words)
    index.write_text("[" * 100_000)
    refused(run, "is not JSON: nested too deep")


def test_distributed_checkpoint(run, raw, ema):
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = {"model": raw, "ema": {"module": ema}, "optim": {"state": prefixed(ema, "exp.")}, "step": 7}
        dcp.save(content, checkpoint_id=str(run))
    checkpoint = load_checkpoint(run)
    assert_same(checkpoint.state, ema)
    assert checkpoint.weights == "ema" and checkpoint.step == 7
    assert_same(load_checkpoint(run, raw=True).state, raw)
    data = run / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    refused(run, "is truncated")
    metadata = pickle.loads((run / ".metadata").read_bytes())
    place = next(i.offset for name, i in metadata.storage_data.items() if name.fqn.endswith("ema.module.proj_kernel"))
    data.write_bytes(whole[: place + 900] + bytes([whole[place + 900] ^ 1]) + whole[place + 901 :])
    refused(run, "damaged", "proj_kernel")
    data.unlink()
    refused(run, "lacks __0_0.distcp")
    (run / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": 3}))
    refused(run, "damaged")
    (run / ".metadata").unlink()
    data.write_bytes(whole)
    refused(run, "lacks .metadata", "unfinished")


def test_distributed_checkpoint_in_chunks(run, ema):
    """Each tensor in two chunks along its first axis, as two processes write it: the metadata is edited by torch."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    halves = {}
    for name, tensor in ema.items():
        half = len(tensor) // 2
        halves |= {f"{name}@0": tensor[:half].contiguous(), f"{name}@1": tensor[half:].contiguous()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(halves, checkpoint_id=str(run))
    metadata = pickle.loads((run / ".metadata").read_bytes())
    kinds, storage = {}, {}
    for name, tensor in ema.items():
        half, ndim = len(tensor) // 2, tensor.ndim
        parts = [metadata.state_dict_metadata[f"{name}@{i}"] for i in range(2)]
        offsets = [torch.Size((0,) * ndim), torch.Size((half, *(0,) * (ndim - 1)))]
        kinds[name] = parts[0]
        kinds[name].size = tensor.shape
        kinds[name].chunks = [ChunkStorageMetadata(o, p.size) for o, p in zip(offsets, parts, strict=True)]
        for i, offset in enumerate(offsets):
            old = MetadataIndex(f"{name}@{i}", torch.Size((0,) * ndim))
            storage[MetadataIndex(name, offset, i)] = metadata.storage_data[old]
    metadata.state_dict_metadata, metadata.storage_data = kinds, storage
    (run / ".metadata").write_bytes(pickle.dumps(metadata))
    assert_same(load_checkpoint(run).state, ema)
    storage.pop(MetadataIndex("proj_bias", torch.Size([16]), 1))
    (run / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(run, "proj_bias")


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("layout", ["distcp", "bin shards", "deepspeed", "accelerate"])
def test_hostile_twins_run_nothing(run, ema, tmp_path, layout):
    import torch.distributed.checkpoint as dcp

    trace, evil = tmp_path / "trace", Payload(tmp_path / "trace")
    if layout == "distcp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": ema}, checkpoint_id=str(run))
        metadata = pickle.loads((run / ".metadata").read_bytes())
        metadata.planner_data = evil
        (run / ".metadata").write_bytes(pickle.dumps(metadata))
    elif layout == "bin shards":
        shards(run, ema, ".bin")
        torch.save({"proj_bias": evil}, run / "pytorch_model-00001-of-00003.bin")
    elif layout == "deepspeed":
        (run / "global_step5").mkdir()
        torch.save({"module": ema, "x": evil}, run / "global_step5" / "mp_rank_00_model_states.pt")
        (run / "latest").write_text("global_step5")
    else:
        torch.save({**ema, "x": evil}, run / "pytorch_model.bin")
        torch.save(evil, run / "optimizer.bin")
    refused(run, "nothing in it was run")
    assert not trace.exists()


def test_deepspeed(run, raw):
    folder = run / "global_step120"
    folder.mkdir()
    content = {"module": prefixed(raw, "model."), "ds_version": "0.16.4", "global_steps": 120, "ds_config": {}}
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (run / "latest").write_text("global_step120")
    for place in (run, folder):
        checkpoint = load_checkpoint(place)
        assert checkpoint.summary.startswith("DeepSpeed 0.16.4, weights of unknown kind (EMA or raw), step 120")
        assert_same(checkpoint.state, raw)
    torch.save(content, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    refused(run, "spread over processes", "zero_to_fp32.py")


def test_accelerate(run, raw):
    accelerate = pytest.importorskip("accelerate")
    model = ELF(load_checkpoint(GOLDEN).config)
    model.load_state_dict(raw)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    assert optimizer is not None
    accelerator.save_state(str(run / "state"))
    accelerator.save_model(model, str(run / "shards"), max_shard_size="100KB")
    assert {"model.safetensors", "optimizer.bin"} <= {file.name for file in (run / "state").iterdir()}
    for folder in ("state", "shards"):
        shutil.copy(CONFIG, run / folder)
        assert_same(load_checkpoint(run / folder).state, raw)


def test_hugging_face_folder(tmp_path, ema):
    """A custom architecture saved by transformers; remote code is not run. config.json may carry the settings."""
    transformers = pytest.importorskip("transformers")
    golden = load_checkpoint(GOLDEN)

    class Config(transformers.PretrainedConfig):
        model_type = "elf"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.elf = ELF(golden.config)

    model = Model(Config(auto_map={"AutoModel": "modeling_elf.ElfModel"}))
    model.elf.load_state_dict(ema)
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | golden.settings.values))
    (tmp_path / "hf" / "modeling_elf.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    checkpoint = load_checkpoint(tmp_path / "hf")
    assert_same(checkpoint.state, ema)
    assert checkpoint.config == golden.config and not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["latest.pt", "last.ckpt", "last.pth"])
def test_the_newest_file_of_a_run(run, ema, name):
    torch.save(prefixed(ema, "x."), run / name)
    torch.save({"params": ema}, run / f"older{Path(name).suffix}")
    torch.save({}, run / "optimizer.pt")
    checkpoint = load_checkpoint(run)
    assert checkpoint.path.name == name
    assert_same(checkpoint.state, ema)


def test_misnamed_files(run, ema):
    save_file(ema, run / "model.bin")
    assert_same(load_checkpoint(run / "model.bin").state, ema)
    (run / "model.bin").unlink()
    torch.save(ema, run / "model.safetensors")
    refused(run, "rename it to .pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "int8", "uint8"])
def test_quantized_weights_are_refused(run, ema, kind, suffix):
    state = {name: tensor.to(getattr(torch, kind)) for name, tensor in ema.items()}
    save_file(state, run / "model.safetensors") if suffix == ".safetensors" else torch.save(state, run / "model.pt")
    refused(run, "is stored as", "quantized weights cannot be exported")


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_in_the_weights(run, ema):
    path = run / "model.pt"
    torch.save(ema, path)
    good = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    with zipfile.ZipFile(path) as archive:
        spans = [(e.header_offset + 64, e.file_size) for e in archive.infolist() if "/data/" in e.filename]
    for start, size in spans[::6]:
        path.write_bytes(good)
        flip(path, start + 64 + int(torch.randint(max(1, size - 64), (), generator=generator)))
        try:
            assert_same(load_checkpoint(path).state, ema)  # the bit was in padding between members
        except CheckpointError as error:
            assert "damaged" in str(error)


def rewritten(path, change):
    """The archive again, its members changed by change(name, content) -> content or None."""
    with zipfile.ZipFile(path) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            if (new := change(name, content)) is not None:
                archive.writestr(name, new)


def test_archives_that_torch_would_read_otherwise(run, ema):
    path = run / "model.pt"
    torch.save(ema, path)
    rewritten(path, lambda name, content: content[:8] if name.endswith("data/3") else content)
    refused(path, "truncated or damaged", "storage 3 is short")
    torch.save(ema, path)
    rewritten(path, lambda name, content: None if name.endswith("data/3") else content)
    refused(path, "storage 3 is short")
    for extra in ("model/data/0", "model/data.pkl", "other/data.pkl", "model/code/x.py", "model/evil.pkl"):
        torch.save(ema, path)
        with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archive.writestr(extra, b"\x80\x02}.")
        with pytest.raises(CheckpointError, match=r"refused|TorchScript"):
            load_checkpoint(path)
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    scripted.save(str(path))
    refused(path, "TorchScript")


def test_files_without_checksums_are_told(run, ema):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(ema, run / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.warns(UserWarning, match="saved without checksums"):
        assert_same(load_checkpoint(run).state, ema)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", ("Git LFS", "git lfs pull")),
        (b"<!DOCTYPE html><html>Sign in to the network</html>", ("web page", "login page")),
        (b"GGUF\x03", ("GGUF",)),
        (b"\x89HDF\r\n", ("HDF5",)),
        (b"\x1f\x8b\x08", ("gzip", "unpack")),
        (b"", ("is empty", "download it again")),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.safetensors.index.json"])
def test_files_of_other_kinds(run, content, words, name):
    (run / name).write_bytes(content)
    refused(run / name, *words)


def test_files_of_the_hub_are_compared_with_their_names(tmp_path):
    """One bit, in whatever is read of a model."""
    snapshot = checkpoint_with_text(tmp_path / "snapshots", word_tokenizer())
    (tmp_path / "blobs").mkdir()
    linked = [snapshot / name for name in ("checkpoint_10", "encoder.safetensors", "tokenizer.json")]
    for file in linked:
        file.symlink_to(file.rename(tmp_path / "blobs" / sha256(file)))
    export(snapshot, tmp_path / "b.elfrt")
    for file in linked:
        blob = file.resolve()
        flip(blob, blob.stat().st_size - 3)
        with pytest.raises(CheckpointError, match=rf"{file.name} is not what the Hub has .*download it again"):
            export(snapshot, tmp_path / "b.elfrt")
        flip(blob, blob.stat().st_size - 3)


def test_links_to_runs(tmp_path, official):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    torch.save(official, run / "checkpoint_10")
    shutil.copy(CONFIG, run)
    (tmp_path / "latest").symlink_to(run)
    (tmp_path / "latest.pt").symlink_to(run / "checkpoint_10")
    for link in ("latest", "latest.pt"):
        assert load_checkpoint(tmp_path / link).settings_from is not None
    nested = tmp_path / "version_0" / "checkpoints"
    nested.mkdir(parents=True)
    torch.save(official, nested / "last.ckpt")
    shutil.copy(CONFIG, nested.parent / "hparams.yaml")
    (tmp_path / "link.ckpt").symlink_to(nested / "last.ckpt")
    for place in (nested, nested.parent, nested / "last.ckpt", tmp_path / "link.ckpt"):
        assert load_checkpoint(place).settings_from == (nested.parent / "hparams.yaml").resolve(), place
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "gone", "is a link to", "not there")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "is a link to")
