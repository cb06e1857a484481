"""Metrics against values worked out by hand, and against independent computations."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import EXAMPLES
from hypothesis import given
from hypothesis import strategies as st

from elf_rt.cli import main
from elf_rt.errors import InputError
from elf_rt.measure import evaluation

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran"]


def test_entropy_by_hand() -> None:
    # p = 1/2, 1/4, 1/4 has entropy 1.5 ln 2; four equal shares have 2 ln 2.
    assert evaluation.unigram_entropy([list("aabc")]) == pytest.approx(1.5 * math.log(2))
    assert evaluation.unigram_entropy([list("aabc"), list("abcd")]) == pytest.approx(1.75 * math.log(2))
    assert evaluation.unigram_entropy([["a"] * 9]) == 0


def test_repetition_by_hand() -> None:
    # "abababab" has 7 bigrams, 2 of them distinct.
    assert evaluation.repetition([list("abababab")], 2) == pytest.approx(5 / 7)
    assert evaluation.repetition([list("abababab"), list("abcdefgh")], 2) == pytest.approx(5 / 14)
    assert evaluation.repetition([list("abcd")], 5) == 0  # no 5-gram at all


def test_distinct_counts_over_the_corpus() -> None:
    # ab, bc | ab, bd: three distinct of four.
    assert evaluation.distinct([list("abc"), list("abd")], 2) == pytest.approx(3 / 4)
    assert evaluation.distinct([list("a")], 2) == 0


def test_accuracy_by_hand() -> None:
    # Clipped precisions 5/6, 3/5, 2/4, 1/3 and no brevity penalty; ROUGE-1 5/6, ROUGE-2 3/5, ROUGE-L 5/6.
    result = evaluation.accuracy(["the cat sat on the mat"], ["the cat sat on a mat"])
    assert result["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert result["rouge_1"] == pytest.approx(100 * 5 / 6)
    assert result["rouge_2"] == pytest.approx(100 * 3 / 5)
    assert result["rouge_l"] == pytest.approx(100 * 5 / 6)
    assert result["exact_match"] == 0


def test_exact_match_forgives_white_space_at_the_ends_only() -> None:
    assert evaluation.exact_match([" a b", "a  b", "a b", "A b"], ["a b"] * 4) == 0.5


def test_self_bleu() -> None:
    assert evaluation.self_bleu(["the cat sat on the mat"] * 3) == pytest.approx(100)
    assert evaluation.self_bleu(["a b c d e", "f g h i j"]) < 5
    # Each against two references: counts clip at the most any one reference has.
    mixed = evaluation.self_bleu(["a b c d", "a b c d", "w x y z"])
    assert 60 < mixed < 70


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edit_distance_against_the_textbook_table(a: str, b: str) -> None:
    table = np.zeros((len(a) + 1, len(b) + 1))
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            change = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, change)
    assert evaluation.edit_distance(a, b) == pytest.approx(table[-1, -1] / max(len(a), len(b), 1))


def test_agreement_by_hand() -> None:
    assert evaluation.edit_distance("kitten", "sitting") == pytest.approx(3 / 7)
    # One insertion at the front: every position disagrees, one edit.
    result = evaluation.agreement([list("abcd"), list("abcd")], [list("xabcd"), list("abcd")])
    assert result["token_agreement"] == pytest.approx(0.5)
    assert result["edit_distance"] == pytest.approx(0.1)


def test_empty_and_unequal_corpora_are_refused() -> None:
    with pytest.raises(InputError, match="no text"):
        evaluation.unigram_entropy([])
    with pytest.raises(InputError, match="2 texts but 1"):
        evaluation.exact_match(["a", "b"], ["a"])
    with pytest.raises(InputError, match="at least two"):
        evaluation.self_bleu(["a"])


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with random weights and a tokenizer of whole words, in Hugging Face layout."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lm")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)} | {"<unk>": len(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    size = len(WORDS) + 1
    config = GPT2Config(vocab_size=size, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=1.0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_perplexity_against_probabilities_read_one_by_one(lm_folder: Path) -> None:
    import torch
    from transformers import GPT2LMHeadModel

    texts = ["the cat sat on a mat", "dog ran", "sat"]  # the last predicts nothing
    network = GPT2LMHeadModel.from_pretrained(lm_folder).double().eval()
    nll, tokens = 0.0, 0
    for text in texts:
        ids = [WORDS.index(word) for word in text.split()]
        for i in range(1, len(ids)):
            with torch.no_grad():
                row = network(torch.tensor([ids[:i]])).logits[0, -1].numpy()
            nll -= math.log(np.exp(row[ids[i]]) / np.exp(row).sum())
            tokens += 1
    done: list[int] = []
    result = evaluation.LanguageModel(lm_folder).perplexity(texts, done.append)
    assert result == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert result > 2  # random weights of deviation 1 are far from uniform and from certain
    assert done == [1, 2, 3]


def test_perplexity_cuts_long_text_and_wants_two_tokens(lm_folder: Path) -> None:
    model = evaluation.LanguageModel(lm_folder)
    long = "cat dog " * 20
    assert model.perplexity([long]) == model.perplexity([long[: 16 * 4]])  # the model has 16 positions
    with pytest.raises(InputError, match="two tokens"):
        model.perplexity(["cat", ""])


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def run_eval(*args: object) -> Result:
    from elf_rt.commands.evaluate import command

    return CliRunner().invoke(command, [str(a) for a in args])


def test_eval_of_a_file(tmp_path: Path, lm_folder: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", {"text": "the cat sat"}, {"text": "a dog ran"})
    references = write(tmp_path / "references.jsonl", {"output": "the cat sat"}, {"output": "the dog ran"})
    result = run_eval(
        "--input", texts, "--references", references, "--against", texts, "--lm", lm_folder, "--metric", "fluency",
        "--metric", "accuracy", "--metric", "agreement", "--metric", "self-bleu", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    expected = evaluation.LanguageModel(lm_folder).perplexity(["the cat sat", "a dog ran"])
    assert summary["mean"]["perplexity"] == pytest.approx(expected)
    assert summary["mean"]["entropy"] == pytest.approx(math.log(3))
    assert summary["mean"]["exact_match"] == 0.5
    assert summary["mean"]["token_agreement"] == 1
    assert summary["runs"][0]["texts"] == 2
    assert summary["deviation"]["entropy"] is None


def test_eval_shows_the_three_numbers_together(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", {"text": "a b a b a b a b a b", "output": "a"})
    result = run_eval("--input", texts)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if "perplexity" in line]
    assert "entropy 0.693 nats" in line and "repeated 5-grams 0.6667" in line  # 6 5-grams, 2 distinct
    assert "exact match 0.0000" in result.stdout


def test_eval_by_generating(tmp_path: Path, bundle: Callable[[str], Path]) -> None:
    from elf_rt import load

    folder = bundle("spoken-to-written")
    lines = (Path(__file__).parents[1] / "examples/spoken-to-written/test.jsonl").read_text("utf-8").splitlines()[:12]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(lines), "utf-8")
    result = run_eval(
        folder, "--input", prompts, "--steps", 1, "--guidance-scale", 1, "--seeds", 2, "--seed", 5, "--json"
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    records = [json.loads(line) for line in lines]
    for run in summary["runs"]:
        with load(folder) as model:
            texts = model.generate([r["input"] for r in records], seed=run["seed"], steps=1, guidance_scale=1.0)
        assert run["exact_match"] == np.mean([t.text == r["output"] for t, r in zip(texts, records, strict=True)])
        assert run["texts"] == 12
    matches = [run["exact_match"] for run in summary["runs"]]
    assert [run["seed"] for run in summary["runs"]] == [5, 5 + 12]  # text k of a run has seed + k: runs share none
    assert summary["mean"]["exact_match"] == pytest.approx(sum(matches) / 2)
    assert summary["deviation"]["exact_match"] == pytest.approx(abs(matches[0] - matches[1]) / math.sqrt(2))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"text": "a"}\n', ["--metric", "accuracy"], "no references"),
        ('{"text": "a"}\n', ["--metric", "agreement"], "--against"),
        ('{"text": "a"}\n', ["--lm", "nowhere"], "no language model at nowhere"),
        ('{"text": "a"}\n', ["--tokenizer", "nowhere.json"], "no tokenizer at nowhere.json"),
        ('{"text": "a", "output": "a"}\n{"text": "a"}\n', [], "record 2 has no text"),
        ("", [], "no line in it"),
        ("not JSON\n", [], "line 1 is not a JSON object"),
        ('{"input": "a"}\n', [], 'a text "text"'),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, options: list[str], message: str
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--input", str(path), *options])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error


@pytest.mark.parametrize("option", ["-n 2", "--steps 4", "--guidance-scale 2", "--backend auto", "--seeds 3"])
def test_options_of_writing_need_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    path = write(tmp_path / "texts.jsonl", {"text": "a"})
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--input", str(path), *option.split()])
    assert stop.value.code == 2
    assert f"-{option.split()[0].strip('-')} has no use without a BUNDLE" in capsys.readouterr().err


def test_more_texts_than_one_call_takes_are_refused_in_one_line(bundle, run_cli) -> None:
    run_cli("eval", bundle("uncond"), "--steps", "1", "-n", "999999999999").assert_clear_error("at most 1000000 texts")


def test_a_missing_library_is_told_before_texts_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    prompts = write(tmp_path / "in.jsonl", {"input": "a", "output": "b"})
    with pytest.raises(SystemExit):
        main(["eval", "no-such-bundle.elfrt", "--input", str(prompts)])
    assert "sacrebleu is not installed" in capsys.readouterr().err


def test_padding_of_a_tokenizer_is_not_counted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EXAMPLES / "spoken-to-written" / "tokenizer.json"))
    tokenizer.save(str(tmp_path / "plain.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "padded.json"))
    texts = write(tmp_path / "texts.jsonl", {"text": "one two three four"})
    plain, padded = (
        json.loads(run_eval("--input", texts, "--tokenizer", tmp_path / f"{name}.json", "--json").stdout)["mean"]
        for name in ("plain", "padded")
    )
    assert plain == padded and plain["entropy"] > 1


def test_references_must_be_one_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write(tmp_path / "texts.jsonl", {"text": "a"}, {"text": "b"})
    references = write(tmp_path / "references.jsonl", {"output": "a"})
    with pytest.raises(SystemExit):
        main(["eval", "--input", str(texts), "--references", str(references)])
    assert "1 references for 2 records" in capsys.readouterr().err


def test_a_folder_that_is_no_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot open the language model") as caught:
        evaluation.LanguageModel(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Привет, мир", "Пока, мир"),
        ("हिन्दी में लिखा", "हिन्दी में नहीं"),
        ("今日は良い天気です", "今日は悪い天気です"),
        ("สวัสดีครับ", "สวัสดีค่ะ"),
        ("안녕 세상", "안녕 모두"),
        ("مرحبا بالعالم", "مرحبا بكم"),
        ("naïve Übung", "naive Übung"),
        ("😀 🎉", "😀 🙁"),
        ("!?", "!!"),
    ],
)
def test_rouge_of_every_alphabet(text, other):
    same, near = evaluation.accuracy([text], [text]), evaluation.accuracy([other], [text])
    assert (same["rouge_1"], same["rouge_2"], same["rouge_l"]) == (100.0, 100.0, 100.0) and same["exact_match"] == 1.0
    assert 0 < near["rouge_1"] < 100 and near["exact_match"] == 0.0


def test_an_option_without_use_is_named_as_it_is_given(capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    for option in ("-n", "--guidance-scale", "--threads"):
        with pytest.raises(SystemExit) as stop:
            main(["eval", "--input", str(tmp_path / "a.jsonl"), option, "1"])
        assert stop.value.code == 2 and f"Error: {option} has no use without a BUNDLE" in capsys.readouterr().err


def test_rouge_of_english_is_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    texts = [
        "She paid $9,350 for the chairs; it's hers!",
        "a_b c-d running 3.5 ends",
        "He's been re-reading U.S. papers.",
    ]
    others = ["She pays 9350 for a chair, isn't it?", "a b c d runs 35 end", "He was reading the US paper"]
    kinds = ["rouge1", "rouge2", "rougeL"]
    official = RougeScorer(kinds, use_stemmer=True)
    scores = [official.score(other, text) for text, other in zip(texts, others, strict=True)]
    got = evaluation.accuracy(texts, others)
    want = [100 * np.mean([score[kind].fmeasure for score in scores]) for kind in kinds]
    np.testing.assert_allclose([got["rouge_1"], got["rouge_2"], got["rouge_l"]], want)
