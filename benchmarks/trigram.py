"""The trigram language model that the Shakespeare example is measured with (examples/shakespeare/README.md)."""

from pathlib import Path

import numpy as np

SHARES = 0.5, 0.3, 0.19, 0.01  # of the trigram, bigram, unigram and uniform estimates


class Trigram:
    """p(z | x, y) = 0.5 c(xyz)/c(xy) + 0.3 c(yz)/c(y) + 0.19 c(z)/N + 0.01/V; a term with no count below is 0.

    Args:
        path: trigram.npz with trigrams (x, y, z, count), bigrams (x, y, count) and unigrams (V).
    """

    def __init__(self, path: Path) -> None:
        with np.load(path) as counts:
            self.unigrams = counts["unigrams"].astype(np.float64)
            bigrams, trigrams = counts["bigrams"].astype(np.int64), counts["trigrams"].astype(np.int64)
        self.vocab_size = len(self.unigrams)
        self._bigrams = _sorted(self._key(bigrams[:, :2]), bigrams[:, 2])
        self._trigrams = _sorted(self._key(trigrams[:, :3]), trigrams[:, 3])

    def nll(self, ids: np.ndarray) -> np.ndarray:
        """(B, L) ids -> (B, L - 2) of -ln p for positions 3 .. L."""
        grams = np.lib.stride_tricks.sliding_window_view(ids, 3, axis=1)  # (B, L - 2, 3)
        y, z = grams[..., 1], grams[..., 2]
        of_pair = _count(self._bigrams, self._key(grams[..., :2]))
        trigram = _ratio(_count(self._trigrams, self._key(grams)), of_pair)
        bigram = _ratio(_count(self._bigrams, self._key(grams[..., 1:])), self.unigrams[y])
        terms = trigram, bigram, self.unigrams[z] / self.unigrams.sum(), 1 / self.vocab_size
        return -np.log(sum(share * term for share, term in zip(SHARES, terms, strict=True)))

    def perplexity(self, ids: np.ndarray) -> float:
        """exp of the mean of `nll` over (B, L) ids."""
        return float(np.exp(self.nll(ids).mean()))

    def _key(self, grams: np.ndarray) -> np.ndarray:
        """One integer for each n-gram (..., n)."""
        key = np.zeros(grams.shape[:-1], np.int64)
        for i in range(grams.shape[-1]):
            key = key * self.vocab_size + grams[..., i]
        return key


def _sorted(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys)
    return keys[order], counts[order].astype(np.float64)


def _count(table: tuple[np.ndarray, np.ndarray], keys: np.ndarray) -> np.ndarray:
    known, counts = table
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, counts[at], 0.0)


def _ratio(count: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.divide(count, of, out=np.zeros_like(count), where=of > 0)
