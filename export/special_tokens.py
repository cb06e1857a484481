"""Which token ids end a text and pad it: what the configuration names, checked against the tokenizer.

A vocabulary may have them anywhere: T5 first (0 and 1), GPT-2 last.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from elf_rt.errors import CheckpointError
from elf_rt.export.settings import Settings
from elf_rt.manifest import MOST_IDS
from elf_rt.text.tokenizer import TextTokenizer

T5_IDS = {"pad_token": 0, "eos_token": 1}  # ids of the official models, for a model without a tokenizer
NAMES = {  # role -> names that tokenizers give the token
    "pad_token": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<PAD>"),
    "eos_token": ("</s>", "<eos>", "[EOS]", "<|eos|>", "<EOS>", "<|endoftext|>", "<|end_of_text|>", "[SEP]"),
}
BESIDE = ("tokenizer_config.json", "special_tokens_map.json")


def special_ids(settings: Settings, tokenizer: TextTokenizer | None) -> dict[str, int]:
    """{"pad_id": ..., "eos_id": ...} of a run's YAML and its tokenizer. Where nothing pads, EOS does.

    The YAML's ``pad_token_id`` and ``eos_token_id`` come first, then the files that name them beside the tokenizer,
    then the names that are usual.

    Raises:
        CheckpointError: no token ends a text, several could, or the YAML and the tokenizer disagree.
    """
    eos = _find("eos_token", settings, tokenizer)
    if eos is None:
        where = tokenizer.path if tokenizer else "the tokenizer"
        raise CheckpointError(
            f"{where} has no token that ends a text ({', '.join(NAMES['eos_token'])}): "
            "give its number in the YAML, as eos_token_id"
        )
    pad = _find("pad_token", settings, tokenizer)
    return {"pad_id": eos if pad is None else pad, "eos_id": eos}


def _find(role: str, settings: Settings, tokenizer: TextTokenizer | None) -> int | None:
    key = f"{role}_id"
    given = settings.integer(key, 0, MOST_IDS) if key in settings else None
    if tokenizer is None:
        return T5_IDS[role] if given is None else given
    named = {name: tokenizer.vocab[name] for name in _names(role, tokenizer.path) if name in tokenizer.vocab}
    if given is None:
        if len(set(named.values())) > 1:
            raise CheckpointError(
                f"{tokenizer.path} has several tokens that may be the {role} ({', '.join(named)}): "
                f"give its number in the YAML, as {role}_id"
            )
        return next(iter(named.values()), None)
    token = next((token for token, number in tokenizer.vocab.items() if number == given), None)
    if token is None or (named and given not in named.values()):
        is_ = "no token" if token is None else repr(token)
        other = "".join(f"; {name} is {number}" for name, number in named.items())
        raise CheckpointError(f"the YAML says {role}_id {given}, which is {is_} in {tokenizer.path}{other}")
    return given


def _names(role: str, tokenizer: Path) -> Sequence[str]:
    """What a file beside the tokenizer calls the token, else all the usual names."""
    for name in BESIDE:
        try:
            entry = json.loads((tokenizer.parent / name).read_text("utf-8")).get(role)
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # the file is absent, or is no such file
        content = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(content, str):
            return (content,)
    return NAMES[role]
