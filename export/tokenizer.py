"""The tokenizer of a bundle: a tokenizer.json that neither cuts nor pads, or one made for byte-level T5."""

import json
from pathlib import Path
from typing import Any

from elf_rt.errors import CheckpointError, InputError
from elf_rt.export.foreign import MOST_INDEX, printable, read_json
from elf_rt.text.tokenizer import TextTokenizer

BYTE_LEVEL = "tokenizer_config.json"  # all that a folder of ByT5 says of its tokenizer
_SPECIAL = ("<pad>", "</s>", "<unk>")


def check_tokenizer(path: Path, vocab_size: int) -> TextTokenizer:
    """A tokenizer, whose tokens must not exceed the `vocab_size` of the model's head.

    Raises:
        CheckpointError: the file is no tokenizer, or has a token that the head cannot write.
    """
    try:
        tokenizer = TextTokenizer(path, json.dumps(_content(path), ensure_ascii=False))
    except InputError as error:
        raise CheckpointError(printable(error)) from error
    if not 0 < tokenizer.size <= vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.size} tokens, the model's head {vocab_size}: name the tokenizer it was trained with"
        )
    return tokenizer


def write_tokenizer(path: Path, target: Path) -> None:
    """A copy without the truncation and padding that training may have left in it: elf-rt cuts and pads by itself."""
    target.write_text(json.dumps(_content(path), ensure_ascii=False), encoding="utf-8")


def is_byte_level(path: Path) -> bool:
    """Whether a tokenizer_config.json is of ByT5, which has no other file."""
    return path.is_file() and read_json(path).get("tokenizer_class") in ("ByT5Tokenizer", "ByT5TokenizerFast")


def _content(path: Path) -> dict[str, Any]:
    if path.name == BYTE_LEVEL:
        return _byte_level(read_json(path))
    return read_json(path, MOST_INDEX) | {"truncation": None, "padding": None}


def _byte_level(config: dict[str, Any]) -> dict[str, Any]:
    """ByT5 (arXiv 2105.13626) as a tokenizer.json: byte b is token b + 3, behind them the sentinels.

    The byte-level steps of `tokenizers` write each byte as one character: itself where it is printable in Latin-1,
    else one from 256 up.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printed]
    characters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    count = len(listed) if isinstance(listed, list) else 125  # the released tokenizer has 125 of them
    sentinels = [f"<extra_id_{i}>" for i in range(count)]
    vocab = {token: i for i, token in enumerate((*_SPECIAL, *(characters[byte] for byte in range(256)), *sentinels))}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*_SPECIAL, *sentinels)])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content
