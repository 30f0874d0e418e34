"""Scores against values by hand and against the libraries they come from."""

import json

import evaluate
import numpy as np
import pytest
from conftest import SHARED
from rouge_score.rouge_scorer import RougeScorer

from recipe.metrics import (
    ExactMatch,
    RougeL,
    TokenF1,
    bootstrap_interval,
    exact_match,
    per_example,
    rouge_l,
    summarize,
    token_f1,
)


@pytest.fixture(scope="module")
def real_responses() -> list[dict]:
    path = SHARED / "data" / "gpt2-medium-responses.json"
    if not path.is_file():
        pytest.skip(f"the real predictions are not at {path}")
    return json.loads(path.read_text(encoding="utf-8"))


def as_predictions(rows: list[dict]) -> list[dict]:
    return [{**row, "tuned": {"text": row["model_response"], "stop_reason": None}} for row in rows]


def test_17_of_110_real_predictions_match_exactly(real_responses):
    scores = summarize(as_predictions(real_responses))
    assert scores["n"] == 110
    assert scores["metrics"]["exact_match"]["tuned"] == 17 / 110
    assert scores["metrics"]["exact_match"]["baseline"] is None
    assert scores["behaviour"]["stop_rate"] == {"tuned": None}


def test_rouge_l_of_real_predictions_is_the_librarys(real_responses):
    predictions = [row["model_response"] for row in real_responses]
    references = [row["output"] for row in real_responses]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
    assert per_example(rouge_l, predictions, references).tolist() == expected


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
        ("the", "a", 1.0),  # nothing is left of either
    ],
)
def test_token_f1_by_hand(prediction, reference, expected):
    assert token_f1(prediction, reference) == pytest.approx(expected)


def test_modules_combine_without_the_network():
    combined = evaluate.combine([ExactMatch(), TokenF1(), RougeL()])
    result = combined.compute(predictions=["A cat.", "He goes."], references=["The cat.", "He goes."])
    assert result == {"exact_match": 0.5, "token_f1": 1.0, "rouge_l": 0.75}
    assert ExactMatch().compute(predictions=["a"], references=["a"]) == {"exact_match": 1.0}


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no predictions"):
        summarize([])


def prediction(reference: str, baseline: str, tuned: str, family: str, stop: str = "eos") -> dict:
    return {
        "output": reference, "family": family, "baseline": {"text": baseline, "stop_reason": "length"},
        "tuned": {"text": tuned, "stop_reason": stop},
    }  # fmt: skip


def test_summary_by_hand():
    scores = summarize(
        [
            prediction("cats", "dog", "cats", "plural"),
            prediction("dogs", "dogs", "dogs", "plural"),
            prediction("Blue.", "Red", "Red.", "colour", stop="length"),
            prediction("Green.", "Red", "Green.", "colour"),
        ]
    )
    match = scores["metrics"]["exact_match"]
    assert (match["baseline"], match["tuned"], match["delta"]) == (0.25, 0.75, 0.5)
    assert match["ci95"][0] <= 0.5 <= match["ci95"][1]
    assert scores["behaviour"]["stop_rate"] == {"baseline": 0.0, "tuned": 0.75}
    assert scores["families"] == {
        "plural": {"n": 2, "exact_match": {"baseline": 0.5, "tuned": 1.0}},
        "colour": {"n": 2, "exact_match": {"baseline": 0.0, "tuned": 0.5}},
    }


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    scores = np.random.default_rng(1).normal(0.3, 1.0, size=4000)
    low, high = bootstrap_interval(scores)
    half_width = 1.96 * scores.std() / np.sqrt(len(scores))
    assert low == pytest.approx(scores.mean() - half_width, abs=0.05 * half_width)
    assert high == pytest.approx(scores.mean() + half_width, abs=0.05 * half_width)
    assert bootstrap_interval(scores) == (low, high)
