"""What the scores say: the sentence, what got better or worse, what calls for caution."""

import pytest
from evaluation_samples import PROMPT, make_judge, make_judge_rows, make_metrics, make_predictions

from recipe.evaluation.significance import ENOUGH_TO_JUDGE, direction, judged
from recipe.evaluation.tables import score_row
from recipe.evaluation.verdict import PERCENT, cautions, findings, model_name, scale, verdict


def make_score(baseline, tuned, ci95, better="higher", n=400):
    delta = None if baseline is None or tuned is None else tuned - baseline
    return {"baseline": baseline, "tuned": tuned, "delta": delta, "ci95": ci95, "better": better, "n": n}


def metrics_of(split="test", families=None, behaviour=None, judge=None, headline="exact_match", **scores):
    n = max(score["n"] for score in scores.values())
    part = {"n": n, "metrics": scores, "behaviour": behaviour or {}, "families": families or {}, "outcomes": {}}
    provenance = {"headline": headline, "models": {}}
    return {**part, "splits": {split: part}, "judge": judge, "other_models": {}, "provenance": provenance}


MISSING = {"baseline": None, "tuned": None, "delta": None, "ci95": None, "better": "higher", "n": 0}


@pytest.mark.parametrize(
    ("scores", "sentence", "way"),
    [
        (
            {"exact_match": make_score(0.0, 0.9225, [0.895, 0.9475])},
            "The tuned model is better: exact match 0.0 % → 92.2 % on 400 test records "
            "(+92.2 points, 95 % interval +89.5 to +94.8).",
            "better",
        ),
        (
            {"exact_match": make_score(0.5, 0.25, [-0.3125, -0.1875])},
            "The tuned model is worse: exact match 50.0 % → 25.0 % on 400 test records "
            "(−25.0 points, 95 % interval −31.2 to −18.8).",
            "worse",
        ),
        (
            {"exact_match": make_score(0.5, 0.5625, [-0.0625, 0.1875], n=20)},
            "No significant difference: exact match 50.0 % → 56.2 % on 20 test records "
            "(+6.2 points, 95 % interval −6.2 to +18.8).",
            "unclear",
        ),
        (  # of so few, intervals that exclude zero are common without any difference
            {"exact_match": make_score(0.0, 1.0, [1.0, 1.0], n=2)},
            "No significant difference: exact match 0.0 % → 100.0 % on 2 test records "
            "(+100.0 points, 95 % interval +100.0 to +100.0); fewer than 20 records are too few to show one.",
            "unclear",
        ),
        (  # an interval that touches zero does not exclude it
            {"exact_match": make_score(0.5, 0.5, [0.0, 0.0])},
            "No significant difference: exact match 50.0 % → 50.0 % on 400 test records "
            "(0.0 points, 95 % interval 0.0 to 0.0).",
            "unclear",
        ),
        (
            {"exact_match": make_score(0.0, 1.0, None, n=1)},
            "No significant difference: exact match 0.0 % → 100.0 % on 1 test record "
            "(+100.0 points, no interval); fewer than 20 records are too few to show one.",
            "unclear",
        ),
        (
            {"exact_match": make_score(None, 0.75, [0.7, 0.8])},
            "The tuned model reaches exact match 75.0 % on 400 test records (95 % interval 70.0 % to 80.0 %); "
            "there is no baseline.",
            "neutral",
        ),
        (  # zero for both says nothing, and the headline stays all the same
            {"exact_match": make_score(0.0, 0.0, [0.0, 0.0]), "chrf": make_score(0.25, 0.5, [0.125, 0.375])},
            "No significant difference: exact match 0.0 % → 0.0 % on 400 test records "
            "(0.0 points, 95 % interval 0.0 to 0.0).",
            "unclear",
        ),
        (
            {
                "headline": "chrf",
                "exact_match": make_score(0.0, 0.5, [0.4, 0.6]),
                "chrf": make_score(0.25, 0.25, [-0.1, 0.1]),
            },
            "No significant difference: chrF 25.0 % → 25.0 % on 400 test records "
            "(0.0 points, 95 % interval −10.0 to +10.0).",
            "unclear",
        ),
        (
            {"headline": "bleu", "bleu": {**MISSING, "reason": "no reference has four words"}},
            "No verdict: BLEU, the headline score, is missing on 400 test records: no reference has four words.",
            "missing",
        ),
        (
            {
                "headline": "reference_loss",
                "reference_loss": {
                    **make_score(2.5, 0.5, None, "lower"),
                    "delta": None,
                    "reason": "the tokenizers differ",
                },
            },
            "No verdict: reference loss, the headline score, (2.500 → 0.500) is not compared on 400 test records: "
            "the tokenizers differ.",
            "missing",
        ),
        (  # less is better, and the unit is another
            {
                "headline": "reference_loss",
                "exact_match": MISSING,
                "reference_loss": make_score(2.5, 0.5, [-2.25, -1.75], "lower"),
            },
            "The tuned model is better: reference loss 2.500 → 0.500 nats/token on 400 test records "
            "(−2.000 nats/token, 95 % interval −2.250 to −1.750).",
            "better",
        ),
    ],
)
def test_the_verdict_is_one_sentence(scores, sentence, way):
    metrics = metrics_of(**scores)
    metrics["splits"]["test"]["n"] = 400
    assert verdict(metrics).sentence == sentence
    assert verdict(metrics).direction == way


def test_the_verdict_says_when_nothing_was_measured():
    metrics = metrics_of(exact_match=MISSING)
    assert verdict(metrics).direction == "missing"
    assert verdict(metrics).sentence == "No verdict: exact match, the headline score, is missing on 0 test records."


def test_a_split_named_all_needs_no_name():
    assert " on 400 records (" in verdict(metrics_of("all", exact_match=make_score(0.0, 1.0, [1.0, 1.0]))).sentence


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [("chrf", 0.98765, "98.8 %"), ("perplexity", 12.345, "12.35"), ("perplexity", 12_345_678.0, "1.23e+07"),
     ("reference_loss", 0.0384, "0.038"), ("length_ratio", 12.75, "12.75"), ("exact_match", None, "–")],
)  # fmt: skip
def test_scores_are_written_in_their_units(name, value, written):
    assert scale(name).value(value) == written


@pytest.mark.parametrize(
    ("delta", "written"), [(0.5, "+50.0"), (-0.5, "−50.0"), (0.0, "0.0"), (-0.0001, "0.0"), (None, "–")]
)
def test_differences_have_a_sign_unless_they_are_nothing(delta, written):
    assert PERCENT.change(delta) == written


@pytest.mark.parametrize(
    ("ci95", "better", "way"),
    [([0.1, 0.2], "higher", "better"), ([0.1, 0.2], "lower", "worse"), ([-0.2, -0.1], "lower", "better"),
     ([-0.2, -0.1], "higher", "worse"), ([-0.1, 0.1], "higher", "unclear"), ([0.0, 0.1], "higher", "unclear"),
     (None, "higher", "unclear"), ([0.1, 0.2], None, "neutral")],
)  # fmt: skip
def test_direction_respects_which_way_is_better(ci95, better, way):
    assert direction(make_score(0.1, 0.2, ci95, better)) == way


@pytest.mark.parametrize(("n", "way"), [(2, "unclear"), (ENOUGH_TO_JUDGE - 1, "unclear"), (ENOUGH_TO_JUDGE, "better")])
def test_few_records_have_no_direction(n, way):
    score = make_score(0.0, 1.0, [1.0, 1.0], n=n)
    assert direction(score) == way
    family = {"plural": {"n": n, "metrics": {"exact_match": score}}}
    found = findings(metrics_of(exact_match=make_score(0.5, 0.75, [0.125, 0.375]), families=family), "better")
    assert ("plural" in [finding.label for finding in found]) == (way == "better")


def test_a_judge_s_direction_is_over_the_records_that_both_models_surely_have_scores_of():
    score = {"scale": [0, 100], **make_score(10.0, 90.0, [70.0, 90.0], n=40)}
    assert judged({**score, "scored": {"baseline": 30, "tuned": 30, "other": 0}})["n"] == 20
    assert direction(judged({**score, "scored": {"baseline": 30, "tuned": 30}})) == "better"
    assert direction(judged({**score, "scored": {"baseline": 30, "tuned": 29}})) == "unclear"
    assert judged({**score, "scored": {"baseline": 1, "tuned": 1}})["n"] == 0


def test_only_the_two_roles_are_called_base_and_tuned():
    names = [model_name(label) for label in ("baseline", "tuned", "base", "Base", "Tuned", "checkpoint-300")]
    assert names == ["Base", "Tuned", "“base”", "“Base”", "“Tuned”", "“checkpoint-300”"]


def test_findings_list_scores_families_and_judge_by_direction():
    judge_score = {
        "scale": [0, 100], "scored": {"baseline": 400, "tuned": 400}, **make_score(60.0, 50.0, [-12.5, -7.5]),
    }  # fmt: skip
    metrics = metrics_of(
        exact_match=make_score(0.25, 0.5, [0.125, 0.375]),
        bleu=make_score(0.5, 0.25, [-0.375, -0.125]),
        chrf=make_score(0.5, 0.5, [-0.125, 0.125]),
        behaviour={"repeated_4grams": make_score(0.5, 0.0, [-0.625, -0.375], "lower")},
        families={
            "plural": {"n": 9, "metrics": {"exact_match": make_score(0.0, 1.0, [1.0, 1.0])}},
            "tense": {"n": 9, "metrics": {"exact_match": make_score(1.0, 0.0, [-1.0, -1.0])}},
        },
        judge={"scores": {PROMPT: judge_score}},
    )
    better, worse = findings(metrics, "better"), findings(metrics, "worse")
    assert [(f.kind, f.label, f.changes) for f in better] == [
        ("score", "Exact match", {"test": "+25.0"}),
        ("score", "Repeated 4-grams", {"test": "−50.0"}),
        ("family", "plural", {"test": "+100.0"}),
    ]
    assert [(f.kind, f.label, f.changes) for f in worse] == [
        ("score", "BLEU", {"test": "−25.0"}),
        ("family", "tense", {"test": "−100.0"}),
        ("score", f"Judge, {PROMPT}", {"test": "−10.0"}),
    ]


def test_findings_join_the_splits_of_a_score():
    metrics = make_metrics(make_predictions(200))
    [exact_match] = [f for f in findings(metrics, "better") if f.label == "Exact match"]
    assert list(exact_match.changes) == ["test", "test_unseen"]


def test_nothing_to_be_cautious_about():
    predictions = make_predictions(500)
    for prediction in predictions:
        prediction["baseline"]["stop_reason"] = "eos"
    assert cautions(make_metrics(predictions), predictions, ["baseline", "tuned"]) == []


def test_cautions_name_thin_splits_cut_and_unknown_ends():
    predictions = [p for p in make_predictions(60) if p["split"] == "test"]
    for number, prediction in enumerate(predictions):
        prediction["baseline"]["stop_reason"] = "length" if number < 12 else "eos"
        prediction["tuned"]["stop_reason"] = "context" if number == 0 else None if number < 4 else "eos"
    said = cautions(make_metrics(predictions), predictions, ["baseline", "tuned"])
    assert [s for s in said if "Only 48 test records: intervals" in s]
    assert "12 of 48 responses (25.0 %) of the base model reached the limit of --max_new_tokens." in said
    assert "1 of 48 responses (2.1 %) of the tuned model reached the end of the context." in said
    assert any(s.startswith("3 of 48 responses (6.2 %) of the tuned model ended in an unknown way") for s in said)


def test_cautions_name_scores_over_a_part_of_the_records():
    predictions = make_predictions(500)
    for number, prediction in enumerate(predictions):
        if prediction["split"] == "test" and number >= 50:
            prediction["tuned"]["reference_loss"] = prediction["tuned"]["reference_tokens"] = None
    metrics = make_metrics(predictions)
    [said] = cautions(metrics, predictions, ["tuned"])
    assert said.startswith("Reference loss, Perplexity, Bits per byte: measured on 40 of the 400 test records")
    rows = metrics["splits"]["test"]["metrics"]
    assert score_row("perplexity", rows["perplexity"], 400)["over"] == "40 of 400"
    assert score_row("chrf", rows["chrf"], 400)["over"] == score_row("exact_match", MISSING, 400)["over"] == ""


def test_a_model_in_a_folder_called_base_is_not_the_base():
    predictions = make_predictions(500, models=("baseline", "tuned", "base"))
    for prediction in predictions:
        for label in ("baseline", "base"):
            prediction[label]["stop_reason"] = "context"
    said = cautions(make_metrics(predictions), predictions, ["baseline", "base"])
    assert said == [
        "500 of 500 responses (100.0 %) of the base model reached the end of the context.",
        "500 of 500 responses (100.0 %) of the “base” model reached the end of the context.",
    ]


def test_cautions_name_what_was_not_measured():
    predictions = make_predictions(500)
    for prediction in predictions:
        del prediction["baseline"]["reference_loss"]
        if prediction["split"] == "test_unseen":
            del prediction["tuned"]["reference_loss"]
    said = " ".join(cautions(make_metrics(predictions), predictions, ["baseline", "tuned"]))
    assert (
        "Reference loss, Perplexity, Bits per byte: no value or no comparison on 100 test_unseen records: the "
        "likelihood of the references is not known, as of served and of recorded answers."
    ) in said
    assert "400 test records" not in said  # measured for the tuned model only: the table has no change


def test_cautions_name_a_split_too_thin_for_any_verdict():
    predictions = make_predictions(23)  # 19 of test, 4 of test_unseen
    said = cautions(make_metrics(predictions), predictions, [])
    assert "Only 19 test records: fewer than 20 cannot show a difference; aim for 100 or more." in said


def test_cautions_tell_an_incomplete_judge_with_its_worst_case():
    predictions = make_predictions(500)
    rows = make_judge_rows(predictions, missing=3)
    judge = make_judge(rows)
    [said] = [s for s in cautions(make_metrics(predictions, judge), predictions, ["tuned"]) if "Judge" in s]
    low, high = judge["scores"][PROMPT]["bounds"]["tuned"]
    assert high - low == pytest.approx(100 * 3 / 400)
    assert said.startswith(f"Judge, {PROMPT}: 397 of 400 tuned responses scored")
    assert f" {low:.1f} to {high:.1f} (3 timeout)." in said
    assert not any(
        "Judge" in s
        for s in cautions(make_metrics(predictions, make_judge(make_judge_rows(predictions))), predictions, [])
    )


def test_cautions_tell_a_judge_that_failed():
    predictions = make_predictions(500)
    judge = {"endpoint": "http://127.0.0.1:9/v1", "error": "no answer from 127.0.0.1:9", "scores": {}, "pairwise": None}
    said = cautions(make_metrics(predictions, judge), predictions, [])
    assert said == ["The judge failed: no answer from 127.0.0.1:9"]


def test_a_verdict_needs_more_than_a_narrow_interval():
    """11 records turned right and 3 wrong, of 110: McNemar's exact p is 0.057, though the interval excludes 0."""
    rows = [(0, 1)] * 11 + [(1, 0)] * 3 + [(1, 1)] * 40 + [(0, 0)] * 56
    predictions = [
        {"id": str(i), "split": "test", "instruction": "i", "input": "", "output": "yes",
         "baseline": {"text": "yes" if before else "no"}, "tuned": {"text": "yes" if after else "no"}}
        for i, (before, after) in enumerate(rows)
    ]  # fmt: skip
    metrics = make_metrics(predictions)
    score = metrics["metrics"]["exact_match"]
    assert score["ci95"][0] > 0 and score["p"] > 0.05
    result = verdict(metrics)
    assert result.direction == "unclear" and "p = 0.05" in result.sentence
    rows = [(0, 1)] * 20 + [(1, 0)] * 3 + [(1, 1)] * 40 + [(0, 0)] * 47
    for prediction, (before, after) in zip(predictions, rows, strict=True):
        prediction["baseline"]["text"], prediction["tuned"]["text"] = (
            "yes" if before else "no", "yes" if after else "no",
        )  # fmt: skip
    assert verdict(make_metrics(predictions)).direction == "better"


def test_verdicts_on_several_splits_are_held_to_5_percent_together():
    metrics = {"splits": {}, "provenance": {"headline": "exact_match"}}
    for name, p in (("a", 0.03), ("b", 0.5), ("c", 0.001)):
        score = {"baseline": 0.1, "tuned": 0.2, "delta": 0.1, "ci95": [0.01, 0.2], "better": "higher", "n": 99, "p": p}
        metrics["splits"][name] = {"n": 99, "metrics": {"exact_match": score}}
    assert [verdict(metrics, name).direction for name in "abc"] == ["unclear", "unclear", "better"]
