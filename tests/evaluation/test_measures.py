"""Scores against values by hand and against the libraries they come from."""

import re
import time
import unicodedata

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from recipe.evaluation.measures import (
    BEHAVIOUR,
    METRICS,
    chrf,
    exact_match,
    rouge_l,
    score,
    score_responses,
    token_f1,
)

EDGES = [  # prediction, reference
    ("", "cats"),
    ("cats", ""),
    ("", ""),
    (" \n", "The cat sat on the mat."),
    ("cats", "cats"),
    ("a", "b"),
    ("cat", "The cat sat on the mat."),
    ("The cat sat on the mat.", "cat"),
    ("The cat sat on the mat.", "The cat sat on the mat."),
    ("The the the the the the.", "The cat sat on the mat."),
    ("mat the on sat cat the", "the cat sat on the mat"),
    ("Größe: 3,5 km – naïve café", "Größe: 3,5 km, naïve cafe\u0301"),
    ("猫が座った。", "猫がマットに座った。"),
    ("🐈‍⬛ sat\u200b", "🐈 sat"),
    ("x &amp; y -\nz <skipped>", "x & y z"),
    ("one two three four five six seven eight nine ten .", "nine ten eight seven six five"),
    ("two words " * 60, "two words"),
]


def texts(pairs):
    return {"predictions": [p for p, _ in pairs], "references": [r for _, r in pairs]}


def corpora() -> list[list[tuple[str, str]]]:
    """The edges, each edge alone, and small corpora of few words: every branch of smoothing."""
    generator = np.random.default_rng(5)

    def sentence() -> str:
        return " ".join(generator.choice(["a", "b", "c", "d."], size=generator.integers(0, 9)))

    small = [[(sentence(), sentence()) for _ in range(size)] for size in (1, 1, 1, 2, 2, 3, 5, 8) * 10]
    return [EDGES, *([edge] for edge in EDGES), *small]


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def spaced(text: str) -> str:
    """For sacrebleu: kana and Chinese characters apart; the only ones without spaces in `EDGES`."""
    return re.sub("[\u3041-\u30ff\u4e00-\u9fff]", r" \g<0> ", nfc(text))


def assert_pairs_score_as_the_libraries_say(corpus):
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for prediction, reference in corpus:
        if f"{prediction}{reference}".isascii():  # rouge_score takes é and 猫 for white space
            assert rouge_l(prediction, reference) == scorer.score(reference, prediction)["rougeL"].fmeasure
        prediction, reference = nfc(prediction), nfc(reference)
        expected = sacrebleu.sentence_chrf(prediction, [reference]).score / 100
        assert chrf(prediction, reference) == pytest.approx(expected, abs=1e-12)


def assert_corpus_scores_as_sacrebleu_says(corpus) -> tuple[float, float]:
    columns = texts(corpus)
    found = score(METRICS["bleu"], columns), score(METRICS["chrf"], columns)
    hypotheses, references = ([spaced(text) for text in columns[name]] for name in ("predictions", "references"))
    if longest_in_tokens(references) < 4:
        assert found[0] is None
    else:
        assert found[0] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score / 100, abs=1e-9)
    assert found[1] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score / 100, abs=1e-9)
    return found


def longest_in_tokens(references: list[str]) -> int:
    return max(len(Tokenizer13a()(reference).split()) for reference in references)


# --- one pair -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("He goes.", "He goes.", 1),
        ("He goes.\n", " He  goes.", 1),
        ("he goes.", "He goes.", 0),
        ("cafe\u0301", "café", 1),
        ("", "", 1),
    ],
)
def test_exact_match(prediction, reference, expected):
    assert exact_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("cats", "cats", 1.0),
        ("The cat.", "a cat!", 1.0),  # articles and punctuation do not count
        ("red blue", "red green blue yellow", 2 * 1.0 * 0.5 / 1.5),
        ("red red", "red", 2 * 0.5 * 1.0 / 1.5),  # a repeated word counts once
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 0.0),  # SQuAD leaves nothing of either, and says 1
        ("", "A", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1_by_hand(prediction, reference, expected):
    assert token_f1(prediction, reference) == pytest.approx(expected)


def test_rouge_l_and_chrf_of_pairs_are_the_libraries():
    for corpus in corpora():
        assert_pairs_score_as_the_libraries_say(corpus)


# --- a corpus -------------------------------------------------------------------------------------------------------


def test_bleu_and_chrf_of_corpora_are_sacrebleus():
    scores = np.array([assert_corpus_scores_as_sacrebleu_says(corpus) for corpus in corpora()], dtype=float)
    for of_one in scores.T:  # not all the same
        of_one = of_one[~np.isnan(of_one)]
        assert len(np.unique(of_one.round(6))) > 20 and of_one.min() == 0 and of_one.max() == pytest.approx(1)


def test_real_predictions_score_as_the_libraries_say(real_responses):
    corpus = [(row["model_response"], row["output"]) for row in real_responses]
    assert_pairs_score_as_the_libraries_say(corpus)
    bleu, chrf_ = assert_corpus_scores_as_sacrebleu_says(corpus)
    assert 0.2 < bleu < chrf_ < 0.8
    assert score(METRICS["exact_match"], texts(corpus)) == 17 / 110


@pytest.mark.parametrize(("name", "theirs"), [("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)])
def test_many_resamples_at_once_are_what_sacrebleu_says_of_each(name, theirs):
    measure = METRICS[name]
    drawn = np.random.default_rng(3).integers(0, len(EDGES), size=(50, 6))
    sums = measure.statistics(**texts(EDGES))[drawn].sum(axis=1)  # (resamples, k)
    columns = {name: [spaced(text) for text in column] for name, column in texts(EDGES).items()}
    expected = [
        theirs([columns["predictions"][i] for i in rows], [[columns["references"][i] for i in rows]]).score / 100
        for rows in drawn
    ]
    short = [name == "bleu" and longest_in_tokens([columns["references"][i] for i in rows]) < 4 for rows in drawn]
    assert sum(short) < 5
    expected = np.where(short, np.nan, expected)
    assert measure.from_sums(sums, 6) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_means_by_hand():
    columns = texts([("cats", "cats"), ("The red dog.", "a blue dog"), ("", "x")])
    assert score(METRICS["exact_match"], columns) == pytest.approx(1 / 3)
    assert score(METRICS["token_f1"], columns) == pytest.approx((1 + 0.5 + 0) / 3)
    assert score(METRICS["rouge_l"], columns) == pytest.approx((1 + 1 / 3 + 0) / 3)


def test_bits_per_byte_by_hand():
    """Two references of 3 and 5 bytes; of the third, no loss is known."""
    columns = {"loss_sums": [2.0, 4.0, None], "references": ["abc", "é水", "x"]}
    bits = (2.0 + 4.0) * np.log2(np.e)
    assert score(METRICS["bits_per_byte"], columns) == pytest.approx(bits / (3 + 5))
    assert score(METRICS["bits_per_byte"], {"loss_sums": [None], "references": ["x"]}) is None


def test_loss_is_weighted_by_tokens_and_leaves_out_what_is_missing():
    columns = {"loss_sums": [2.0, None, 4.0], "token_counts": [1, None, 3]}
    assert score(METRICS["reference_loss"], columns) == 1.5
    assert score(METRICS["perplexity"], columns) == pytest.approx(np.exp(1.5))
    nothing = {"loss_sums": [None, float("nan")], "token_counts": [None, 3]}
    assert score(METRICS["reference_loss"], nothing) is None
    assert score(METRICS["perplexity"], {"loss_sums": [5000.0], "token_counts": [1]}) is None  # infinite


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("stop_rate", {"stop_reasons": ["eos", "length", "context", "eos"]}, 0.5),
        ("stop_rate", {"stop_reasons": ["eos", None]}, None),
        ("length_ratio", texts([("a b c", "a b"), ("", "a b"), ("a\u00a0b", "x")]), 5 / 5),
        ("length_ratio", texts([("水是火", "水"), ("ไป", "ดี ใช")]), 5 / 4),
        ("length_ratio", texts([("a", " ")]), None),
        ("distinct_2", {"predictions": ["a b c", "b c d", "a"]}, 3 / 4),  # ab bc | bc cd
        ("distinct_2", {"predictions": ["a", ""]}, None),
        ("distinct_2", {"predictions": ["水水水"]}, 1 / 2),
        ("repeated_4grams", {"predictions": ["a b c d", "a b c"]}, 0.0),
        ("repeated_4grams", {"predictions": ["x x x x x x", "a b c d a b c d"]}, (2 / 3 + 1 / 5) / 2),
        (
            "repeated_4grams",
            {"predictions": ["水火水火水火", "水,水,水,水,水", "नमस्ते " * 5]},
            (1 / 3 + 1 / 2 + 1 / 2) / 3,
        ),
        ("empty_rate", {"predictions": ["", " \n\t", "a", "."]}, 0.5),
    ],
)
def test_behaviour_by_hand(name, columns, expected):
    value = score(BEHAVIOUR[name], columns)
    assert value is None if expected is None else value == pytest.approx(expected)


def test_scores_of_one_models_responses():
    scores = score_responses(["cats", "", "a b c d e"], ["cats", "dogs", "a b c d e"], ["eos", "eos", "length"])
    assert list(scores) == [
        "exact_match", "token_f1", "rouge_l", "chrf", "bleu",
        "stop_rate", "length_ratio", "distinct_2", "repeated_4grams", "empty_rate",
    ]  # fmt: skip
    assert scores["exact_match"] == scores["stop_rate"] == pytest.approx(2 / 3)
    assert scores["empty_rate"] == pytest.approx(1 / 3)
    assert all(type(value) is float for value in scores.values())
    assert "stop_rate" not in score_responses(["a"], ["a"])
    with pytest.raises(ValueError, match="no predictions"):
        score_responses([], [])


def test_statistics_are_one_row_an_example_and_their_sums_are_the_score():
    columns = {
        **texts(EDGES),
        "stop_reasons": ["eos"] * len(EDGES),
        "loss_sums": [1.0] * len(EDGES),
        "token_counts": [2] * len(EDGES),
    }
    for measure in (*METRICS.values(), *BEHAVIOUR.values()):
        statistics = measure.statistics(*(columns[feature] for feature in measure.features))
        assert statistics.dtype == np.float64 and statistics.ndim == 2 and len(statistics) == len(EDGES)
        assert float(measure.from_sums(statistics.sum(axis=0), len(EDGES))) == score(measure, columns)


# --- long texts -----------------------------------------------------------------------------------------------------


def test_rouge_l_of_two_long_texts():
    """20,000 different words against two thirds of them with other words between: what is in common is known."""
    words = [f"w{index}" for index in range(20_000)]
    kept = [word for index, word in enumerate(words) if index % 3]
    mixed = [word for index, word in enumerate(kept) for word in (word, f"x{index}")]
    expected = 2 * len(kept) / (len(words) + len(mixed))
    start = time.perf_counter()
    assert rouge_l(" ".join(mixed), " ".join(words)) == pytest.approx(expected)
    assert time.perf_counter() - start < 5


def test_texts_of_100_kb_take_seconds():
    generator = np.random.default_rng(0)
    predictions = ["a" * 100_000, "word " * 20_000, "".join(generator.choice(list("abc ."), size=100_000))]
    start = time.perf_counter()
    scores = score_responses(predictions, [predictions[2]] * 3)
    assert 1 / 3 == scores["exact_match"] < scores["chrf"] < 1
    assert time.perf_counter() - start < 20
