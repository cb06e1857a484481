"""The Shakespeare example's language model against its definition, word for word, on plain dictionaries."""

import importlib.util
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TRIGRAM = ROOT / "examples" / "shakespeare" / "trigram.npz"
SPEC = importlib.util.spec_from_file_location("trigram", ROOT / "benchmarks" / "trigram.py")
assert SPEC is not None and SPEC.loader is not None
trigram = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(trigram)


def test_against_dictionaries(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    corpus, vocab = rng.integers(0, 5, 200).tolist(), 7  # tokens 5 and 6 are never seen
    one = Counter(corpus)
    two = Counter(itertools.pairwise(corpus))
    three = Counter(zip(corpus, corpus[1:], corpus[2:], strict=False))
    np.savez(
        tmp_path / "counts.npz",
        unigrams=[one[i] for i in range(vocab)],
        bigrams=[[*pair, n] for pair, n in two.items()],
        trigrams=[[*triple, n] for triple, n in three.items()],
    )
    ids = rng.integers(0, vocab, (6, 20))
    total = []
    for row in ids.tolist():
        for x, y, z in zip(row, row[1:], row[2:], strict=False):
            p = 0.01 / vocab + 0.19 * one[z] / len(corpus)
            p += 0.5 * three[x, y, z] / two[x, y] if two[x, y] else 0
            p += 0.3 * two[y, z] / one[y] if one[y] else 0
            total.append(math.log(p))
    model = trigram.Trigram(tmp_path / "counts.npz")
    assert model.nll(ids).shape == (6, 18)
    assert model.perplexity(ids) == pytest.approx(math.exp(-np.mean(total)))


def test_the_example_prefers_its_own_text() -> None:
    from tokenizers import Tokenizer

    model = trigram.Trigram(TRIGRAM)
    tokenizer = Tokenizer.from_file(str(TRIGRAM.with_name("tokenizer.json")))
    text = "ROMEO:\nI will not go with thee, my lord, and I shall be the king of England.\n\nFirst Citizen:\nWe are"
    ids = np.array([tokenizer.encode(text).ids])
    shuffled = np.random.default_rng(0).permuted(ids, axis=1)
    assert 3 * model.perplexity(ids) < model.perplexity(shuffled)
