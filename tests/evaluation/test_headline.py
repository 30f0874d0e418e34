"""The score that decides the verdict follows from the references, and from no answer."""

import json

import numpy as np
import pytest
from conftest import DEMO
from evaluation_samples import make_metrics, make_predictions
from test_verdict import make_score, metrics_of

from recipe.config import UserError
from recipe.evaluation.generate import EvalArguments, resume_evaluation
from recipe.evaluation.headline import choose_headline, headline_of
from recipe.evaluation.measures import MEASURES, METRICS, score_responses
from recipe.evaluation.verdict import verdict

LONG = "First take the lid off the pot, then stir slowly until the sauce has thickened, and serve."


@pytest.mark.parametrize(
    ("references", "name"),
    [
        (["42", "-5", "3.14"], "exact_match"),
        (["yes"] * 9 + [LONG], "exact_match"),  # nine of ten are enough
        (["yes"] * 17 + [LONG] * 3, "chrf"),
        ([LONG] * 5, "chrf"),
        (["one\ntwo"] * 5, "chrf"),  # two lines
        (["北京", "长江是中国最长的河流，全长很长。"], "exact_match"),  # 15 characters
        (["长江是中国最长的河流，全长六千三百公里，流经十一个省份。"], "chrf"),
        (["He goes to school by bus on every other day."], "exact_match"),  # ten words
        (["He goes to school by bus on every other day now."], "chrf"),
    ],
)
def test_short_closed_answers_are_matched_and_others_compared_by_chrf(references, name):
    assert choose_headline(references) == name


def test_the_demo_is_decided_by_exact_match_and_the_books_open_answers_by_chrf(real_responses):
    for split in ("test", "test_unseen"):
        lines = (DEMO / "records" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert choose_headline([json.loads(line)["output"] for line in lines]) == "exact_match"
    assert choose_headline([row["output"] for row in real_responses]) == "chrf"


@pytest.mark.parametrize("references", [["blue", "green", "red"], [LONG, LONG.upper(), "yes"]])
def test_the_headline_of_a_thousand_evaluations_depends_on_no_answer(references):
    """The same references, random answers: the verdict is always on the same score, whatever it says."""
    draw, expected = np.random.default_rng(0), MEASURES[choose_headline(references)].title
    vocabulary = np.array(["blue", "green", "red", "", LONG, "x"])
    names, seen = set(), set()
    for _ in range(1000):
        tuned, base = (score_responses(draw.choice(vocabulary, size=3).tolist(), references) for _ in range(2))
        scores = {}
        for name in METRICS:
            pair = (base.get(name), tuned.get(name))
            width = draw.uniform(0, 1)
            interval = None if None in pair else [pair[1] - pair[0] - width, pair[1] - pair[0] + width]
            scores[name] = make_score(*pair, interval, MEASURES[name].better or "higher")
        found = verdict(metrics_of(headline=choose_headline(references), **scores))
        names.add(expected.lower() in found.sentence.lower())
        seen.add(found.direction)
    assert names == {True} and seen == {"better", "worse", "unclear"}


def test_one_lucky_answer_does_not_change_what_is_compared():
    """The report that led to this: long references, and one exact match among 520."""
    predictions = make_predictions(520)
    for line in predictions:
        line["split"], line["output"] = "test", f"{LONG} {line['output']}"
        line["tuned"]["text"], line["baseline"]["text"] = f"{LONG} {line['tuned']['text']}?", "I do not know that."
    chosen = choose_headline([line["output"] for line in predictions])
    assert chosen == "chrf"
    predictions[7]["tuned"]["text"] = predictions[7]["output"]
    metrics = make_metrics(predictions)
    metrics["provenance"]["headline"] = chosen
    assert metrics["metrics"]["exact_match"]["tuned"] == 1 / 520
    assert verdict(metrics).direction == "better" and "chrF" in verdict(metrics).sentence


def test_a_headline_is_a_score_against_references():
    for name in ("exact_mach", "stop_rate", "judge"):
        with pytest.raises(UserError, match=rf"--headline {name}: there are exact_match, token_f1"):
            EvalArguments(model=["echo"], output_dir="x", headline=name)
    assert EvalArguments(model=["echo"], output_dir="x", headline="bits_per_byte").headline == "bits_per_byte"


def test_an_evaluation_keeps_the_headline_it_began_with(tmp_path):
    begun = {
        "models": {"tuned": {"name": "echo", "weights": None, "tokenizer": None, "template": "t"}},
        "data": "d", "data_hash": "1", "splits": {"test": 1}, "versions": {}, "hardware": "h",
        "generation": {"max_new_tokens": 8, "temperature": 0.0}, "command": "a", "headline": "token_f1",
    }  # fmt: skip
    (tmp_path / "predictions.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "evaluation.json").write_text(json.dumps(begun), encoding="utf-8")
    now = {**begun, "headline": "exact_match"}
    assert resume_evaluation(tmp_path, now, [{"tuned": {}}])["headline"] == "token_f1"
    assert resume_evaluation(tmp_path, now, [{"tuned": {}}], "token_f1")["headline"] == "token_f1"
    with pytest.raises(UserError, match="another headline score; add --overwrite_output_dir"):
        resume_evaluation(tmp_path, now, [{"tuned": {}}], "chrf")


def test_an_evaluation_from_before_headlines_is_decided_by_exact_match():
    assert headline_of({"provenance": {}}) == "exact_match"
