"""The encoder graph against transformers and the golden run; the table, the tokenizer, and every bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from elf_rt.errors import CheckpointError
from elf_rt.export.encoder import find_tokenizer, write_encoder
from elf_rt.export.t5 import relative_buckets
from elf_rt.export.tokenizer import check_tokenizer, write_tokenizer

GOLDEN = Path(__file__).parent / "data" / "golden" / "t5"
ENCODER = GOLDEN / "encoder"


@pytest.fixture(scope="module")
def golden():
    """Source ids and mask (B, S) of the golden run, and its normalised source latents and mask (B, L)."""
    with np.load(GOLDEN / "golden.npz") as run:
        sources = [json.loads(str(ids)) for ids in run["source_ids"]]
        texts, cond, cond_mask = run["source_texts"].tolist(), run["run0_cond"], run["run0_cond_mask"]
    mask = cond_mask[:, : max(map(len, sources))].astype(np.int64)
    ids = np.zeros_like(mask)
    ids[mask == 1] = np.concatenate(sources)
    return texts, ids, mask, cond, cond_mask


def run_ort(folder: Path, ids, mask):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "encoder.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": ids, "mask": mask})[0]


def run_openvino(folder: Path, ids, mask):
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(str(folder / "encoder.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return model({"ids": ids, "mask": mask})["latents"]


def relative_error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("run", [run_ort, run_openvino])
def test_golden_source_ids(tmp_path, golden, run):
    _, ids, mask, cond, _ = golden
    entry = write_encoder(tmp_path, ENCODER, latent_dim=32)
    assert entry == {
        "kind": "onnx",
        "files": {"encoder": "encoder.onnx", "weights": "encoder.bin"},
        "source": "encoder",
        "vocab_size": 128,
    }
    latents = (run(tmp_path, ids, mask) - 0.1) / 0.2  # latent_mean and latent_std of its config.yml
    assert relative_error(latents[mask == 1], cond[:, : ids.shape[1]][mask == 1]) < 3e-6


def make_t5(folder: Path, **changes):
    """A random T5 encoder in Hugging Face's layout, whose heads are not as wide as the model."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "d_model": 24, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    model = T5EncoderModel(T5Config(**sizes | changes)).eval()
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            parameter.data.uniform_(0.5, 2.0)
        elif "relative_attention_bias" in name:
            parameter.data.normal_(0, 2.0)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_same_as_transformers(tmp_path, feed_forward):
    model = make_t5(tmp_path / "t5", feed_forward_proj=feed_forward, layer_norm_epsilon=1e-5)
    write_encoder(tmp_path, tmp_path / "t5", latent_dim=24)
    random = np.random.default_rng(1)
    for length in (1, 2, 17, 150):  # 150: beyond relative_attention_max_distance
        ids = random.integers(0, 60, (3, length))
        mask = (np.arange(length) < np.array([[length], [max(1, length // 2)], [1]])).astype(np.int64)
        with torch.no_grad():
            want = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
        assert relative_error(run_ort(tmp_path, ids, mask), want.numpy()) < 1e-5


@pytest.mark.parametrize("run", [run_ort, run_openvino])
@pytest.mark.parametrize("language_model", [False, True])
def test_gpt2_same_as_transformers(tmp_path, run, language_model):
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=3, n_positions=40, initializer_range=0.3)
    saved = (GPT2LMHeadModel if language_model else GPT2Model)(config).eval()
    for name, parameter in saved.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            parameter.data.uniform_(-1.0, 2.0)
    saved.save_pretrained(tmp_path / "gpt2")
    entry = write_encoder(tmp_path, tmp_path / "gpt2", latent_dim=24, max_length=40)
    assert entry == {
        "kind": "onnx",
        "files": {"encoder": "encoder.onnx", "weights": "encoder.bin"},
        "source": "gpt2",
        "vocab_size": 60,
    }
    random = np.random.default_rng(1)
    for length in (1, 2, 17, 40):
        ids = random.integers(0, 60, (3, length))
        mask = (np.arange(length) < np.array([[length], [max(1, length // 2)], [1]])).astype(np.int64)
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        with torch.no_grad():
            want = (saved.transformer if language_model else saved)(**inputs).last_hidden_state.numpy()
        assert relative_error(run(tmp_path, ids, mask)[mask == 1], want[mask == 1]) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new', got 'relu'"),
        ({"n_layer": None}, "incomplete"),
        ({"n_head": 0}, "n_head must be a whole number from 1 to 1024, got 0"),
        ({"n_layer": 10**9}, "n_layer must be a whole number from 1 to 500"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon must be a number from 0 to 1, got 'x'"),
        ({"n_head": 5}, "n_head 5 must divide n_embd 24"),
        ({"n_positions": 30}, "has 30 positions, fewer than the model's 32"),
    ],
)
def test_other_gpt2s_are_refused(tmp_path, changes, message):
    config = {"model_type": "gpt2", "n_embd": 24, "n_layer": 1, "n_head": 3, "vocab_size": 60} | changes
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        write_encoder(tmp_path, tmp_path, latent_dim=24, max_length=32)


@pytest.mark.parametrize("positions", [1, 2])
def test_statistics_become_a_part_of_the_encoder(tmp_path, positions):
    """(latents - mean) / deviation of each channel; with two rows of statistics the first is of position 0 alone."""
    make_t5(tmp_path / "t5")
    random = np.random.default_rng(2)
    mean, std = random.normal(size=(positions, 24)), random.uniform(0.5, 2.0, (positions, 24))
    ids, mask = random.integers(0, 60, (2, 9)), np.ones((2, 9), np.int64)
    write_encoder(tmp_path, tmp_path / "t5", latent_dim=24)
    plain = run_ort(tmp_path, ids, mask)
    write_encoder(tmp_path, tmp_path / "t5", latent_dim=24, statistics=np.float32([mean, std]))
    want = (plain - mean[-1]) / std[-1]
    want[:, 0] = (plain[:, 0] - mean[0]) / std[0]
    assert relative_error(run_ort(tmp_path, ids, mask), want) < 1e-6


def test_padding_changes_nothing(tmp_path):
    make_t5(tmp_path / "t5")
    write_encoder(tmp_path, tmp_path / "t5", latent_dim=24)
    alone, mask = np.arange(2, 8)[None], np.ones((1, 6), np.int64)
    padded, padded_mask = np.full((2, 20), 59), np.zeros((2, 20), np.int64)
    padded[0, :6], padded_mask[0, :6] = alone, 1  # and a second row of nothing but padding
    got = run_ort(tmp_path, padded, padded_mask)
    assert relative_error(got[0, :6], run_ort(tmp_path, alone, mask)[0]) < 1e-6
    assert np.isfinite(got).all()


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 16), (64, 200)])
def test_relative_buckets(buckets, most):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-1000, 1001)
    want = T5Attention._relative_position_bucket(distance, True, buckets, most)
    assert torch.equal(relative_buckets(distance, buckets, most), want)
    # what the graph's table of clipped distances rests on
    assert torch.equal(relative_buckets(distance.clamp(-most, most), buckets, most), want)


def test_encoder_files(tmp_path):
    write_encoder(tmp_path, ENCODER, latent_dim=32)
    onnx.checker.check_model(tmp_path / "encoder.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["encoder.bin", "encoder.onnx"]
    graph = onnx.load(tmp_path / "encoder.onnx", load_external_data=False).graph
    assert [(v.name, v.type.tensor_type.elem_type) for v in graph.input] == [("ids", 7), ("mask", 7)]
    stored = sum(int(e.value) for t in graph.initializer for e in t.external_data if e.key == "length")
    weights = load_file(ENCODER / "model.safetensors")
    bias = weights.pop("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    table = bias.shape[1] * (2 * 16 + 1)
    assert stored == 4 * (table + sum(w.numel() for w in weights.values()))


def test_half_precision_weights_are_upcast(tmp_path):
    shutil.copytree(ENCODER, tmp_path / "t5")
    stored = {name: tensor.bfloat16() for name, tensor in load_file(ENCODER / "model.safetensors").items()}
    stored["encoder.embed_tokens.weight"] = stored.pop("shared.weight")
    stored["decoder.final_layer_norm.weight"] = torch.ones(32)  # a whole T5 is fine too
    save_file(stored, tmp_path / "t5" / "model.safetensors")
    write_encoder(tmp_path, tmp_path / "t5", latent_dim=32)
    ids = np.arange(5)[None]
    assert run_ort(tmp_path, ids, np.ones_like(ids)).shape == (1, 5, 32)


def test_hub_id(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, allow_patterns=None):
        asked.append((repo, allow_patterns))
        return str(ENCODER)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name in ("t5-small", "google-t5/t5-small"):
        assert write_encoder(tmp_path, name, latent_dim=32)["source"] == name
    assert [repo for repo, _ in asked] == ["t5-small", "google-t5/t5-small"]
    assert "model.safetensors" in asked[0][1] and "pytorch_model.bin" not in asked[0][1]


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.float32, np.float32), (torch.float16, np.float16), (torch.bfloat16, np.float32)]
)
def test_embedding_table(tmp_path, dtype, kept):
    table = torch.randn(9, 4).to(dtype)
    save_file({"embedding.weight": table}, tmp_path / "encoder.safetensors")
    entry = write_encoder(tmp_path, tmp_path / "encoder.safetensors", latent_dim=4, vocab_size=9)
    wanted = {
        "kind": "embedding",
        "files": {"table": "embedding.npy"},
        "source": "encoder.safetensors",
        "vocab_size": 9,
    }
    assert entry == wanted
    got = np.load(tmp_path / "embedding.npy")
    assert got.dtype == kept and np.array_equal(got.astype(np.float32), table.float().numpy())


def broken_t5(folder: Path, config=None, weights=None) -> Path:
    """The golden encoder with keys of its config.json and its weights replaced; None removes one."""
    shutil.copytree(ENCODER, folder)
    merged = json.loads((ENCODER / "config.json").read_text(encoding="utf-8")) | (config or {})
    (folder / "config.json").write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
    state = load_file(ENCODER / "model.safetensors") | (weights or {})
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")
    return folder


Q = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"model_type": "bert"}}, "is a 'bert' model: the encoder must be one of t5, mt5"),
        ({"config": {"model_type": None}}, "is a None model"),
        ({"config": {"feed_forward_proj": "gated-silu"}}, "must be one of relu, gated-gelu, got 'gated-silu'"),
        ({"config": {"d_kv": None}}, "is incomplete .*'d_kv'"),
        ({"config": {"num_layers": -1}}, "num_layers must be a whole number from 1 to 500, got -1"),
        ({"config": {"num_layers": 10**9}}, "num_layers must be a whole number from 1 to 500"),
        ({"config": {"relative_attention_max_distance": 0}}, "relative_attention_max_distance must be"),
        ({"config": {"relative_attention_max_distance": 2}}, "above a quarter of the buckets"),
        ({"config": {"feed_forward_proj": ["relu"]}}, r"must be one of relu, gated-gelu, got \['relu'\]"),
        ({"config": {"layer_norm_epsilon": "x"}}, "layer_norm_epsilon must be a number from 0 to 1"),
        ({"config": {"num_layers": 1}}, "more layers than config.json says: encoder.block.1"),
        ({"weights": {"shared.weight": torch.zeros(128, 32, dtype=torch.int8)}}, "is stored as I8"),
        ({"weights": {"shared.weight": torch.zeros(128, 32).to(torch.float8_e5m2)}}, "is stored as F8_E5M2"),
        ({"config": {"d_model": 64}}, "is 64 wide, the checkpoint's latents are 32"),
        ({"config": {"vocab_size": 50}}, "knows 50 tokens, fewer than the 97 of the tokenizer"),
        (
            {"weights": {Q: None, "encoder.final_layer_norm.weight": torch.full((32,), torch.nan)}},
            f"missing: {Q}; not finite: encoder.final_layer_norm.weight",
        ),
        ({"weights": {Q: torch.zeros(3, 3)}}, r"mis-shaped: .* \(3, 3\) for \(32, 32\)"),
    ],
)
def test_bad_t5(tmp_path, changes, message):
    folder = broken_t5(tmp_path / "t5", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        write_encoder(tmp_path, folder, latent_dim=32, vocab_size=97)
    assert "\n" not in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["t5"]


def test_bad_encoder_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such encoder"):
        write_encoder(tmp_path, tmp_path / "absent", latent_dim=32)
    with pytest.raises(CheckpointError, match=r"no config\.json, so it is not an encoder"):
        write_encoder(tmp_path, tmp_path, latent_dim=32)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        write_encoder(tmp_path, tmp_path, latent_dim=32)
    shutil.copy(ENCODER / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        write_encoder(tmp_path, tmp_path, latent_dim=32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(9, 4)}, r"has no table embedding\.weight"),
        ({"embedding.weight": torch.zeros(9)}, r"has no table embedding\.weight"),
        ({"embedding.weight": torch.zeros(9, 5)}, "is 5 wide, the checkpoint's latents are 4"),
        ({"embedding.weight": torch.zeros(8, 4)}, "knows 8 tokens, fewer than the 9"),
        ({"embedding.weight": torch.full((9, 4), torch.inf)}, "is not finite"),
    ],
)
def test_bad_table(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=message):
        write_encoder(tmp_path, tmp_path / "encoder.safetensors", latent_dim=4, vocab_size=9)


@pytest.mark.parametrize("shards", [False, True])
def test_weights_in_torchs_own_format(tmp_path, shards):
    """T5 1.1 on the Hub has no safetensors; a whole model and a sharded one are read as well."""
    shutil.copytree(ENCODER, tmp_path / "t5")
    state = load_file(ENCODER / "model.safetensors")
    (tmp_path / "t5" / "model.safetensors").unlink()
    whole = state | {"decoder.block.0.x": torch.ones(3), "lm_head.weight": state["shared.weight"]}
    names = sorted(whole)
    if shards:
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({n: whole[n] for n in names if files[n] == file}, tmp_path / "t5" / file)
        (tmp_path / "t5" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(whole, tmp_path / "t5" / "pytorch_model.bin")
    for folder, source in (("a", ENCODER), ("b", tmp_path / "t5")):
        (tmp_path / folder).mkdir()
        write_encoder(tmp_path / folder, source, latent_dim=32)
    ids = np.arange(7)[None]
    a, b = (run_ort(tmp_path / folder, ids, np.ones_like(ids)) for folder in "ab")
    assert np.array_equal(a, b)


def test_a_tokenizer_does_not_cut_or_pad_by_itself(tmp_path):
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    text = "a b c d e f g h i j k l m n o p"
    want = plain.encode(text).ids
    plain.enable_truncation(3)
    plain.enable_padding(length=64)
    plain.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids) == 64
    write_tokenizer(tmp_path / "tokenizer.json", tmp_path / "out.json")
    assert Tokenizer.from_file(str(tmp_path / "out.json")).encode(text).ids == want


def test_byte_level_t5(tmp_path):
    from tokenizers import Tokenizer
    from transformers import ByT5Tokenizer

    theirs = ByT5Tokenizer()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    found = find_tokenizer(tmp_path, None)
    assert check_tokenizer(found, 384).size == 384
    write_tokenizer(found, tmp_path / "out.json")
    ours = Tokenizer.from_file(str(tmp_path / "out.json"))
    for text in ("It costs €5.", " two  spaces\n", "日本語 😀", "<extra_id_0> x"):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_check_tokenizer(tmp_path):
    tokens = check_tokenizer(GOLDEN / "tokenizer.json", 128).size
    assert tokens == len(json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    with pytest.raises(CheckpointError, match=f"has {tokens} tokens, the model's head {tokens - 1}"):
        check_tokenizer(GOLDEN / "tokenizer.json", tokens - 1)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"is not a tokenizer\.json"):
        check_tokenizer(tmp_path / "tokenizer.json", 128)
    with pytest.raises(CheckpointError, match="is missing"):
        check_tokenizer(tmp_path / "absent.json", 128)


def test_find_tokenizer(tmp_path, monkeypatch):
    checkpoint, encoder = tmp_path / "checkpoint", tmp_path / "encoder"
    checkpoint.mkdir()
    encoder.mkdir()
    table = encoder / "encoder.safetensors"
    table.touch()
    assert find_tokenizer(checkpoint, None) is None
    assert find_tokenizer(checkpoint, encoder) is None
    (encoder / "spiece.model").touch()
    with pytest.raises(CheckpointError, match=r"spiece\.model but no tokenizer\.json: .*save_pretrained"):
        find_tokenizer(checkpoint, encoder)
    (encoder / "tokenizer.json").touch()
    assert find_tokenizer(checkpoint, encoder) == find_tokenizer(checkpoint, table) == encoder / "tokenizer.json"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, allow_patterns=None: str(encoder))
    assert find_tokenizer(checkpoint, "t5-small") == encoder / "tokenizer.json"
    (checkpoint / "tokenizer.json").touch()
    assert find_tokenizer(checkpoint, "t5-small") == checkpoint / "tokenizer.json"
