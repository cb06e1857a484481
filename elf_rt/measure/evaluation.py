"""What the text is worth: fluency without references, and agreement with references or with another run.

A low perplexity alone proves nothing, for a text that repeats itself scores low. So `fluency` gives the three numbers
that are read together: perplexity under a language model, unigram entropy, and the share of repeated 5-grams.
Libraries of the extra ``elf-rt[eval]`` are imported by the functions that need them.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elf_rt.errors import InputError, first_line
from elf_rt.libraries import import_library, why_absent

Tokens = Sequence[Hashable]  # the tokens of one text: ids, or words

LIBRARIES = {"accuracy": ("rouge_score", "sacrebleu"), "self-bleu": ("sacrebleu",)}
# Thai and Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
MAX_LM_TOKENS = 1024  # as the official evaluation cuts a text


def fluency(sequences: Sequence[Tokens], perplexity: float | None = None) -> dict[str, float | None]:
    """The numbers of a corpus of token sequences that mean something only together.

    Returns:
        perplexity: measured elsewhere, under a language model; None where there is none. entropy: of the unigrams of a
        text, nats, mean. repetition: share of a text's 5-grams that repeat an earlier one, mean. distinct_1,
        distinct_2: distinct n-grams over all n-grams of the corpus.
    """
    return {
        "perplexity": perplexity,
        "entropy": unigram_entropy(sequences),
        "repetition": repetition(sequences, 5),
        "distinct_1": distinct(sequences, 1),
        "distinct_2": distinct(sequences, 2),
    }


def unigram_entropy(sequences: Sequence[Tokens]) -> float:
    """Mean over texts of -Σ p ln p, where p are the relative counts of the text's own tokens. An empty text has 0."""
    _require(sequences)
    return float(np.mean([_entropy(tokens) for tokens in sequences]))


def repetition(sequences: Sequence[Tokens], n: int = 5) -> float:
    """Mean over texts of 1 - distinct n-grams / n-grams. A text shorter than n has 0."""
    _require(sequences)
    shares = []
    for tokens in sequences:
        grams = _ngrams(tokens, n)
        shares.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return float(np.mean(shares))


def distinct(sequences: Sequence[Tokens], n: int) -> float:
    """Distinct n-grams over all n-grams of the corpus (Li et al. 2016, distinct-n); 0 when there is none."""
    _require(sequences)
    grams = [gram for tokens in sequences for gram in _ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def accuracy(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Of texts against one reference each: exact_match in 0..1, and in 0..100 bleu (sacrebleu) and the F-measures
    rouge_1, rouge_2 and rouge_l (rouge-score). Needs ``elf-rt[eval]``."""
    _require(texts, references)
    kinds, tokenizer = ["rouge1", "rouge2", "rougeL"], _RougeWords()
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(kinds, tokenizer=tokenizer)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    rouge = {f"rouge_{kind[-1].lower()}": 100.0 * float(np.mean([s[kind].fmeasure for s in scores])) for kind in kinds}
    bleu = _library("sacrebleu").corpus_bleu(list(texts), [list(references)]).score
    return {"exact_match": exact_match(texts, references), "bleu": float(bleu), **rouge}


class _RougeWords:
    """Words as rouge-score has them (lower case, stemmed if English), and of other alphabets, of which it has none.

    A letter of a script that puts no spaces between words is a word; so is each sign of a text without any letter.
    """

    def __init__(self) -> None:
        self._stem = _library("nltk.stem.porter").PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text).lower()
        letters = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)  # letters, marks, numbers
        words = UNSPACED.sub(r" \g<0> ", letters).split() or list("".join(text.split()))
        return [str(self._stem(word)) if len(word) > 3 and word.isascii() else word for word in words]


def exact_match(texts: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts equal to their reference, white space at both ends aside."""
    _require(texts, references)
    return float(np.mean([t.strip() == r.strip() for t, r in zip(texts, references, strict=True)]))


def self_bleu(texts: Sequence[str], on_text: Callable[[int], None] = lambda _: None) -> float:
    """Mean BLEU of each text against all the others (Zhu et al. 2018, Texygen): 100 when all are equal.

    Needs ``elf-rt[eval]``. Its time grows with the square of the number of texts. on_text is told how many are done.
    """
    if len(texts) < 2:
        raise InputError("self-BLEU needs at least two texts")
    bleu = _library("sacrebleu").BLEU(effective_order=True)
    scores = []
    for i, text in enumerate(texts):
        scores.append(bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score)
        on_text(i + 1)
    return float(np.mean(scores))


def agreement(run: Sequence[Tokens], other: Sequence[Tokens]) -> dict[str, float]:
    """With another run over the same inputs: token_agreement, the share of equal tokens, and edit_distance, over the
    longer length; both means over texts."""
    _require(run, other)
    pairs = list(zip(run, other, strict=True))
    return {
        "token_agreement": float(np.mean([token_agreement(a, b) for a, b in pairs])),
        "edit_distance": float(np.mean([edit_distance(a, b) for a, b in pairs])),
    }


def token_agreement(a: Tokens, b: Tokens) -> float:
    """Share of positions with equal tokens; where one text is longer, its surplus disagrees."""
    longest = max(len(a), len(b))
    return sum(x == y for x, y in zip(a, b, strict=False)) / longest if longest else 1.0


def edit_distance(a: Tokens, b: Tokens) -> float:
    """Levenshtein distance (insert, delete, substitute) over the length of the longer text; 0 for two empty ones."""
    codes: dict[Hashable, int] = {}
    left, right = (np.array([codes.setdefault(token, len(codes)) for token in s], np.int64) for s in (a, b))
    across = np.arange(len(right) + 1)
    row = across
    for i, token in enumerate(left, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (right != token))  # deletion, substitution
        # Insertions run along the row: row[j] = min over k <= j of (best[k] + j - k).
        row = np.minimum.accumulate(np.concatenate([[i], best]) - across) + across
    return float(row[-1]) / max(len(left), len(right), 1)


class LanguageModel:
    """A local Hugging Face causal language model, for perplexity. Needs ``elf-rt[eval]``.

    Args:
        path: a folder with the model and its tokenizer; nothing is downloaded.

    Raises:
        InputError: the folder is not there, or holds no causal language model with a tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise InputError(
                f"no language model at {path}: give a local folder with config.json, weights and tokenizer"
            )
        self._torch = _library("torch")
        transformers = _library("transformers")
        # transformers reports what is wrong with a folder by several exception types.
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.path, local_files_only=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(self.path, local_files_only=True)
        except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
            reason = first_line(error)
            raise InputError(f"cannot open the language model at {path}: {reason}") from error
        self._device = "cuda" if self._torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device).eval()
        limit = getattr(model.config, "max_position_embeddings", None) or MAX_LM_TOKENS
        self.max_tokens = min(MAX_LM_TOKENS, limit)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, cut to ``max_tokens``."""
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        return ids

    def perplexity(self, texts: Sequence[str], on_text: Callable[[int], None] = lambda _: None) -> float:
        """Corpus perplexity by the official recipe: retokenise, cut to 1024, exp(total NLL / total tokens).

        NLL: -Σ ln p(id_i | id_0 .. id_{i-1}) over i ≥ 1, in float32. Texts of fewer than two tokens predict nothing and
        are left out. on_text is told how many texts are done.

        Raises:
            InputError: no text has two tokens.
        """
        torch, nll, tokens = self._torch, 0.0, 0
        for done, text in enumerate(texts, 1):
            ids = torch.tensor(self.tokenize(text), device=self._device)
            if len(ids) > 1:
                with torch.inference_mode():
                    logits = self._model(ids[None]).logits[0, :-1].float()
                nll += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
                tokens += len(ids) - 1
            on_text(done)
        if tokens == 0:
            raise InputError("no text has two tokens, so there is no perplexity to measure")
        return math.exp(min(nll / tokens, 700.0))  # exp of more is no float64


def _entropy(tokens: Tokens) -> float:
    counts = np.array(list(Counter(tokens).values()), np.float64)
    shares = counts / max(len(tokens), 1)
    return float(-np.sum(shares * np.log(shares)))


def _ngrams(tokens: Tokens, n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _require(first: Sequence[Any], second: Sequence[Any] | None = None) -> None:
    if not len(first):
        raise InputError("there is no text to evaluate")
    if second is not None and len(first) != len(second):
        raise InputError(f"there are {len(first)} texts but {len(second)} to compare them with: give one for each")


def require_libraries(metrics: Collection[str]) -> None:
    """Raises InputError when a library that one of these metrics ("accuracy", "self-bleu") needs is not installed."""
    for metric, names in LIBRARIES.items():
        for name in names if metric in metrics else ():
            _library(name)


def _library(name: str) -> Any:
    if reason := why_absent(name, "__name__", "pip install 'elf-rt[eval]'"):
        raise InputError(f"{name.split('.')[0]} is {reason}")
    return import_library(name)
