"""Templates against tokenizers of three kinds, and where the pins land."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from elf_rt.errors import InputError
from elf_rt.text.pins import Pinned
from elf_rt.text.tokenizer import TextTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
EOS = 1


def demo(name: str = "spoken-to-written") -> TextTokenizer:
    return TextTokenizer(EXAMPLES / name / "tokenizer.json")


def metaspace() -> TextTokenizer:
    """SentencePiece-like, as T5's: words carry a leading ▁, and what is unknown becomes <unk>."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁The", "▁train", "▁to", "▁leaves", "▁at", ".", "a", "b"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        tokenizer.save(str(path))
        return TextTokenizer(path)


def runs(mask: np.ndarray) -> list[tuple[bool, int]]:
    """Lengths of the stretches of equal values."""
    edges = np.flatnonzero(np.diff(mask)) + 1
    return [(bool(part[0]), len(part)) for part in np.split(mask, edges)]


@pytest.mark.parametrize("tokenizer", [demo(), demo("shakespeare"), metaspace()], ids=["digits", "bytes", "metaspace"])
def test_template(tokenizer: TextTokenizer) -> None:
    pinned = Pinned.from_template("The train to [2] leaves at [5].", tokenizer, EOS, 64)
    first, blank, middle, longer, last = runs(pinned.mask)
    assert blank == (False, 2) and longer == (False, 5) and last == (True, 2)
    pieces = np.split(pinned.ids, np.cumsum([first[1], 2, middle[1], 5]))
    assert tokenizer.decode(pieces[0].tolist()) == "The train to"
    assert tokenizer.decode(pieces[2].tolist()).strip() == "leaves at"
    assert tokenizer.decode(pieces[4][:1].tolist()) == "." and pieces[4][1] == EOS
    # The same tokens as in a whole sentence, so the model knows them: no lone spaces.
    sentence, _ = tokenizer.encode("The train to ab leaves at ab.")
    assert pieces[0].tolist() == sentence[: first[1]]
    assert sentence[-1] == pieces[4][0]


def test_template_without_an_end_and_with_blanks_at_both_ends() -> None:
    pinned = Pinned.from_template("[3] paid [1][2]", demo(), None, 64)
    assert [length for held, length in runs(pinned.mask) if not held] == [3, 3]
    assert demo().decode(pinned.ids[pinned.mask].tolist()) == " paid"


def test_brackets_that_are_no_blank_are_text() -> None:
    pinned = Pinned.from_template("a [b] [2]", demo(), None, 64)
    assert demo().decode(pinned.ids[pinned.mask].tolist()) == "a [b]"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a [0] b", "at least one token"),
        ("[4]", "nothing is pinned"),
        ("a \ue000 [2]", "U\\+E000"),
        ("", "nothing"),
        ("a [60] b c d e f", "needs 66 tokens, but a text has room for 64"),
        ("a [65]", "blanks need 65 tokens, but a text has room for 64"),
        ("a [9999999999999999999]", "blanks need 999999999 tokens"),
    ],
)
def test_bad_templates(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pinned.from_template(template, demo(), None, 64)


def test_a_blank_inside_a_token_is_refused() -> None:
    """Unknown neighbours of the blank become one <unk> together with it."""
    with pytest.raises(InputError, match="inside a token"):
        Pinned.from_template("The train tö[2]ß", metaspace(), None, 64)


def test_tokens_by_position() -> None:
    tokenizer = demo()
    ((dot,), _) = tokenizer.encode(".")
    pinned = Pinned.from_tokens({4: ".", 0: 7}, tokenizer, 512, 64)
    assert pinned.ids.tolist() == [7, 0, 0, 0, dot] and pinned.mask.tolist() == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({-1: 3}, "position must be between 0 and 63, got -1"),
        ({64: 3}, "position must be between 0 and 63, got 64"),
        ({10**12: 3}, "position must be between 0 and 63"),
        ({1.5: 3}, "position must be between 0 and 63, got 1.5"),
        ({0: 3.7}, "between 0 and 511, got 3.7"),
        ({0: 512}, "between 0 and 511"),
        ({0: -1}, "between 0 and 511"),
        ({0: "a whole sentence"}, "tokens, not one"),
        ({}, "nothing is pinned"),
    ],
)
def test_bad_tokens(tokens: dict[int, int | str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pinned.from_tokens(tokens, demo(), 512, 64)


def test_pins_stand_after_the_source_and_come_back_verbatim() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(20, 3)).astype(np.float32)
    pinned = Pinned.from_tokens({1: 5, 3: 6}, None, 20, 8)
    seen: list[np.ndarray] = []

    def encode(ids: np.ndarray, visible: np.ndarray) -> np.ndarray:
        seen.append(visible)
        return table[ids]

    latents = pinned.latents(encode)
    assert seen[0].tolist() == [[0, 1, 0, 1]]  # a network encoder must not attend to the blanks
    alone, nowhere = np.zeros((8, 3), np.float32), np.zeros(8, bool)
    pinned.hold(latents, alone, nowhere, 0)
    assert np.flatnonzero(nowhere).tolist() == [1, 3] and np.array_equal(alone[[1, 3]], table[[5, 6]])
    assert not alone[~nowhere].any()  # nothing of the blanks
    source, mask = np.zeros((8, 3), np.float32), np.arange(8) < 4
    source[mask] = 9.0
    pinned.hold(latents, source, mask, 4)
    assert np.flatnonzero(mask).tolist() == [0, 1, 2, 3, 5, 7]
    assert np.array_equal(source[[5, 7]], table[[5, 6]]) and np.all(source[:4] == 9.0)
    raw = np.zeros(8, np.int64)
    assert pinned.restore(raw, 0).tolist() == [0, 5, 0, 6, 0, 0, 0, 0]
    assert pinned.restore(raw, 4).tolist() == [0, 0, 0, 0, 0, 5, 0, 6]
    assert not raw.any()  # the argument stays as it was
