"""A small conditional model with a text side: the golden "cond" checkpoint, an embedding table, words as tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import GOLDEN, export
from safetensors.torch import save_file

ROWS, WIDTH = 97, 32  # of the golden model: tokens of its head, width of its latents
WORDS = [f"w{i}" for i in range(ROWS - 3)]


def word_tokenizer(pad: int = 0, eos: int = 1, names: tuple[str, str] = ("<pad>", "</s>")) -> dict[str, Any]:
    """A tokenizer.json of words between white space, with pad and EOS at any place of the vocabulary."""
    special = {pad: names[0], eos: names[1]}
    words = iter(["<unk>", *WORDS])
    vocab = {special.get(i) or next(words): i for i in range(ROWS)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "special": True, **flags} for i, name in sorted(special.items())],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }


def checkpoint_with_text(folder: Path, tokenizer: dict[str, Any], yaml: str = "") -> Path:
    """A checkpoint folder as `elf-rt export` takes it, with encoder and tokenizer beside the weights."""
    shutil.copytree(GOLDEN / "cond", folder)
    with (folder / "config.yml").open("a") as file:
        file.write(yaml)
    table = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    save_file({"embedding.weight": table}, folder / "encoder.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def text_bundle(folder: Path) -> Path:
    """The bundle of such a checkpoint."""
    source = checkpoint_with_text(folder / "checkpoint", word_tokenizer())
    return export(source, folder / "words.elfrt")
