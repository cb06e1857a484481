"""Pad and EOS are where the vocabulary has them; a tokenizer that is not what was trained is refused or mended."""

import json
from pathlib import Path

import numpy as np
import pytest
from text_side import WORDS, checkpoint_with_text, word_tokenizer

import elf_rt
from elf_rt.bundle import Bundle
from elf_rt.errors import CheckpointError
from elf_rt.export import special_tokens
from elf_rt.export.settings import Settings
from elf_rt.text.codec import TextCodec
from elf_rt.text.tokenizer import TextTokenizer


def special_ids(values, tokenizer):
    return special_tokens.special_ids(Settings(values, Path("config.yml")), tokenizer)


def tokenizer_file(folder, values):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return TextTokenizer(path)


@pytest.mark.parametrize(
    ("pad", "eos", "names"),
    [(0, 1, ("<pad>", "</s>")), (95, 96, ("[PAD]", "[SEP]")), (7, 3, ("<|pad|>", "<|endoftext|>"))],
)
def test_ids_are_found_by_name(tmp_path, pad, eos, names):
    tokenizer = tokenizer_file(tmp_path, word_tokenizer(pad, eos, names))
    assert special_ids({}, tokenizer) == {"pad_id": pad, "eos_id": eos}
    for given in (
        {"pad_token_id": pad, "eos_token_id": eos},
        {"model": {"pad_token_id": str(pad)}, "data": {"eos_token_id": "${tokens.end}"}, "tokens": {"end": eos}},
    ):
        assert special_ids(given, tokenizer) == {"pad_id": pad, "eos_id": eos}


def test_eos_pads_where_nothing_else_does(tmp_path):
    """As with GPT-2's vocabulary."""
    tokenizer = tokenizer_file(tmp_path, word_tokenizer(95, 96, ("other", "<|endoftext|>")))
    assert special_ids({}, tokenizer) == {"pad_id": 96, "eos_id": 96}


@pytest.mark.parametrize("content", ["END", {"content": "END", "lstrip": False}])
def test_the_tokenizers_own_configuration_names_them(tmp_path, content):
    tokenizer = tokenizer_file(tmp_path, word_tokenizer(5, 6, ("FILL", "END")))
    with pytest.raises(CheckpointError, match=r"no token that ends a text .*eos_token_id"):
        special_ids({}, tokenizer)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": content, "pad_token": "FILL"}))
    assert special_ids({}, tokenizer) == {"pad_id": 5, "eos_id": 6}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token_id": 1}, r"says eos_token_id 1, which is 'w0' in .*; </s> is 96"),
        ({"pad_token_id": 0}, r"says pad_token_id 0, which is '<unk>' in .*; <pad> is 95"),
        ({"eos_token_id": 500}, "which is no token"),
        ({"eos_token_id": "one"}, "must be a whole number"),
        ({"eos_token_id": -1}, "must be a whole number"),
        ({"eos_token_id": True}, "must be a whole number"),
    ],
)
def test_what_contradicts_the_tokenizer_is_refused(tmp_path, settings, message):
    with pytest.raises(CheckpointError, match=message):
        special_ids(settings, tokenizer_file(tmp_path, word_tokenizer(95, 96)))


def test_several_that_could_be_meant(tmp_path):
    tokenizer = tokenizer_file(tmp_path, word_tokenizer(95, 96, ("<|endoftext|>", "</s>")))
    with pytest.raises(CheckpointError, match=r"several tokens that may be the eos_token \(</s>, <\|endoftext\|>\)"):
        special_ids({}, tokenizer)
    assert special_ids({"eos_token_id": 96}, tokenizer)["eos_id"] == 96


def test_without_a_tokenizer_they_are_those_of_the_official_models():
    assert special_ids({}, None) == {"pad_id": 0, "eos_id": 1}
    assert special_ids({"eos_token_id": 7}, None) == {"pad_id": 0, "eos_id": 7}


def test_export_and_runtime_use_them(tmp_path):
    """Ids of another numbering from the checkpoint's folder to the final text; the proof covers the text."""
    from conftest import export

    source = checkpoint_with_text(tmp_path / "checkpoint", word_tokenizer(95, 96))
    folder = export(source, tmp_path / "last.elfrt")
    assert Bundle.open(folder).tokenizer.eos_id == 96
    with elf_rt.load(folder, "onnxruntime") as model:
        codec = model.codec
        assert codec.tokenize(["w1 w2"])[0][-1] == 96
        ids = np.array([[5, 6, 96, 7, 8]])
        assert codec.finish(ids, None).tolist() == [[5, 6, 95, 95, 95]]
        assert codec.decode(codec.finish(ids, None)[0]) == f"{WORDS[4]} {WORDS[5]}"
    with np.load(folder / "replay.npz") as arrays:
        texts, final = arrays["run0_text"], arrays["run0_final_ids"]
    words = {i: token for token, i in word_tokenizer(95, 96)["model"]["vocab"].items()}
    want = [" ".join(words[i] for i in row if i not in (95, 96)) for row in final.tolist()]
    assert texts.tolist() == want


def test_dropout_belongs_to_training(tmp_path):
    """BPE that drops merges would give one prompt many ids."""
    letters = {letter: i for i, letter in enumerate("abcdefgh")}
    merges = ["a b", "c d", "e f", "g h", "ab cd", "ef gh", "abcd efgh"]
    vocab = letters | {merge.replace(" ", ""): 8 + i for i, merge in enumerate(merges)}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "dropout": 0.5}
    tokenizer = tokenizer_file(tmp_path, {"version": "1.0", "added_tokens": [], "model": model})
    assert {tuple(tokenizer.encode("abcdefgh")[0]) for _ in range(50)} == {(14,)}


def test_padding_and_cutting_belong_to_training(tmp_path):
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    cutting = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    values = word_tokenizer() | {"padding": padding | {"pad_to_multiple_of": None}, "truncation": cutting}
    assert tokenizer_file(tmp_path, values).encode("w1 w2 w3")[0] == [4, 5, 6]


def test_a_token_that_the_encoder_does_not_know(tmp_path):
    from conftest import export

    source = checkpoint_with_text(tmp_path / "checkpoint", word_tokenizer())
    opened = Bundle.open(export(source, tmp_path / "words.elfrt"))
    codec = TextCodec(opened, None)
    with pytest.raises(elf_rt.errors.InputError, match="knows ids up to 96, got 97"):
        codec.latents(np.array([[1, 97]]), np.ones((1, 2), np.int64))
