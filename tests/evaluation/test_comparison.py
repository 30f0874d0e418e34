"""A model beside its baseline: scores by hand, intervals by simulation, and what does not pair."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu

from recipe.config import UserError
from recipe.evaluation import comparison
from recipe.evaluation.comparison import (
    bootstrap_interval,
    compare,
    example_scores,
    labels_of,
    paired_scores,
    resample_sums,
)
from recipe.evaluation.measures import BEHAVIOUR, METRICS, token_f1


def prediction(id_: str, reference: str, baseline: str, tuned: str, family: str = "", stop: str = "eos") -> dict:
    return {
        "id": id_, "output": reference, "family": family,
        "baseline": {"text": baseline, "stop_reason": "length"}, "tuned": {"text": tuned, "stop_reason": stop},
    }  # fmt: skip


FOUR = [
    prediction("a", "cats", "dog", "cats", "plural"),
    prediction("b", "dogs", "dogs", "dogs", "plural"),
    prediction("c", "Blue.", "Red", "Red.", "colour", stop="length"),
    prediction("d", "Green.", "Red", "Green.", "colour"),
]


def with_losses(predictions: list[dict], **losses: list) -> list[dict]:
    """Reference losses of each label, (nats, tokens) or None."""
    changed = [copy.deepcopy(line) for line in predictions]
    for label, values in losses.items():
        for line, value in zip(changed, values, strict=True):
            nats, tokens = value or (None, None)
            line[label] |= {"reference_loss": nats, "reference_tokens": tokens}
    return changed


def test_scores_by_hand():
    scores = compare(FOUR)
    json.dumps(scores, allow_nan=False)
    assert list(scores) == ["n", "metrics", "behaviour", "families", "outcomes"]
    assert scores["n"] == 4
    assert list(scores["metrics"]) == [
        "exact_match", "token_f1", "rouge_l", "chrf", "bleu", "reference_loss", "perplexity", "bits_per_byte",
    ]  # fmt: skip
    assert list(scores["behaviour"]) == ["stop_rate", "length_ratio", "distinct_2", "repeated_4grams", "empty_rate"]
    match = scores["metrics"]["exact_match"]
    # 4 drawn of differences 1, 0, 0, 1: none or all of them 1 with a chance of 1/16 each; signs agree in half the cases
    assert match.pop("p") == pytest.approx(0.5, abs=0.02)
    assert match == {
        "baseline": 0.25, "tuned": 0.75, "delta": 0.5, "ci95": [0.0, 1.0], "better": "higher", "n": 4,
    }  # fmt: skip
    stop = scores["behaviour"]["stop_rate"]
    assert (stop["baseline"], stop["tuned"], stop["delta"]) == (0.0, 0.75, 0.75)
    assert scores["outcomes"]["exact_match"] == {"win": 2, "tie": 2, "loss": 0}
    assert list(scores["outcomes"]) == ["exact_match", "token_f1", "rouge_l", "chrf"]
    assert {family: entry["n"] for family, entry in scores["families"].items()} == {"plural": 2, "colour": 2}
    of_plural = scores["families"]["plural"]["metrics"]
    assert list(of_plural) == list(METRICS)
    assert (of_plural["exact_match"]["baseline"], of_plural["exact_match"]["tuned"]) == (0.5, 1.0)
    assert compare(FOUR)["metrics"]["chrf"] == scores["metrics"]["chrf"]


def test_the_same_scores_with_the_sides_changed_lose_where_they_won():
    there, back = compare(FOUR), compare(FOUR, model="baseline", baseline="tuned")
    for name, score in there["metrics"].items():
        if score["delta"] is not None:
            assert back["metrics"][name]["delta"] == -score["delta"]
            assert back["metrics"][name]["ci95"] == pytest.approx([-bound for bound in score["ci95"][::-1]])
    for name, outcome in there["outcomes"].items():
        assert back["outcomes"][name] == {"win": outcome["loss"], "tie": outcome["tie"], "loss": outcome["win"]}


def test_without_a_baseline_the_interval_is_the_scores_own():
    scores = compare([{name: p[name] for name in ("id", "output", "family", "tuned")} for p in FOUR])
    match = scores["metrics"]["exact_match"]
    assert match["baseline"] is None and match["delta"] is None and match["tuned"] == 0.75
    assert match["ci95"] == list(bootstrap_interval(np.array([1, 1, 0, 1])))
    assert scores["outcomes"] == {}
    assert compare(FOUR, model="tuned", baseline="another")["metrics"] == scores["metrics"]


def test_labels():
    other = {"text": "x"}
    assert labels_of([{"id": "a", "checkpoint-9": other, "tuned": other}, {"id": "b", "baseline": other}]) == [
        "baseline", "tuned", "checkpoint-9",
    ]  # fmt: skip
    assert labels_of([]) == []


def test_any_model_may_be_compared():
    lines = [{**p, "checkpoint-9": p["tuned"]} for p in FOUR]
    assert compare(lines, model="checkpoint-9") == compare(FOUR)


def test_example_scores():
    scores = example_scores(FOUR, "baseline")
    assert list(scores) == ["exact_match", "token_f1", "rouge_l", "chrf"]
    assert scores["exact_match"].tolist() == [0, 1, 0, 0]
    assert scores["token_f1"].tolist() == [token_f1(p["baseline"]["text"], p["output"]) for p in FOUR]
    expected = [sacrebleu.sentence_chrf(p["baseline"]["text"], [p["output"]]).score / 100 for p in FOUR]
    assert scores["chrf"] == pytest.approx(expected, abs=1e-12)


def test_real_predictions_against_an_echo_of_the_input(real_responses):
    lines = [
        {
            "id": f"test/{index}", "output": row["output"],
            "baseline": {"text": row["input"] or row["instruction"]}, "tuned": {"text": row["model_response"]},
        }
        for index, row in enumerate(real_responses)
    ]  # fmt: skip
    scores = compare(lines)
    match = scores["metrics"]["exact_match"]
    assert (scores["n"], match["tuned"], match["baseline"]) == (110, 17 / 110, 0.0)
    assert match["ci95"][0] > 0.08
    for name, theirs in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        for label in ("baseline", "tuned"):
            expected = theirs([p[label]["text"] for p in lines], [[p["output"] for p in lines]]).score / 100
            assert scores["metrics"][name][label] == pytest.approx(expected, abs=1e-9)
    assert scores["behaviour"]["stop_rate"]["tuned"] is None
    assert scores["metrics"]["perplexity"] == {
        "baseline": None, "tuned": None, "delta": None, "ci95": None, "p": None, "better": "lower", "n": 0,
        "reason": "the likelihood of the references is not known, as of served and of recorded answers",
    }  # fmt: skip


# --- what is missing ------------------------------------------------------------------------------------------------


def test_a_missing_loss_leaves_the_pair():
    lines = with_losses(FOUR, baseline=[(9, 3), None, (8, 2), (7, 1)], tuned=[(3, 3), (50, 1), None, (1, 1)])
    loss, perplexity = (compare(lines)["metrics"][name] for name in ("reference_loss", "perplexity"))
    assert loss["n"] == perplexity["n"] == 2  # a and d
    assert (loss["baseline"], loss["tuned"], loss["delta"]) == (16 / 4, 4 / 4, -3)
    assert perplexity["delta"] == pytest.approx(math.e - math.e**4)
    assert loss["ci95"] == pytest.approx([1 - 7, 3 / 3 - 3])  # d alone, a alone
    assert compare(lines)["metrics"]["exact_match"]["n"] == 4


def test_a_side_without_any_loss_is_missing_alone():
    lines = with_losses(FOUR, baseline=[None] * 4, tuned=[(3, 3), None, (2, 1), (1, 1)])
    lines[1]["tuned"] |= {"reference_loss": math.inf, "reference_tokens": 3}
    loss = compare(lines)["metrics"]["reference_loss"]
    assert (loss["baseline"], loss["tuned"], loss["delta"], loss["n"]) == (None, 6 / 5, None, 3)
    assert loss["ci95"][0] < 6 / 5 < loss["ci95"][1]


# --- tokenizers that differ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["counts", "hashes"])
def test_losses_per_token_of_different_tokenizers_are_not_compared(how):
    """The same nats over twice as many tokens look like half the loss; the bits per byte are the same."""
    tokens = {"counts": 6, "hashes": 3}[how]
    lines = with_losses([dict(line) for line in FOUR * 10], baseline=[(9, 3)] * 40, tuned=[(9, tokens)] * 40)
    for number, line in enumerate(lines):
        line["id"] = str(number)
    scores = compare(lines, tokenizers={"baseline": "a", "tuned": "b"} if how == "hashes" else None)
    for part in (scores, *scores["families"].values()):
        loss, perplexity, bits = (part["metrics"][name] for name in ("reference_loss", "perplexity", "bits_per_byte"))
        assert (loss["baseline"], loss["tuned"]) == (3, 9 / tokens)
        assert loss["delta"] is loss["ci95"] is loss["p"] is perplexity["tuned"] is perplexity["baseline"] is None
        assert "tokenizers differ" in loss["reason"] and "bits per byte" in perplexity["reason"]
        assert bits["delta"] == 0 and "reason" not in bits
    text = "".join(line["output"] for line in lines)
    assert scores["metrics"]["bits_per_byte"]["tuned"] == pytest.approx(9 * 40 / math.log(2) / len(text.encode()))


@pytest.mark.parametrize("tokenizers", [None, {"baseline": "a", "tuned": "a"}, {"baseline": None, "tuned": "a"}])
def test_losses_per_token_of_one_tokenizer_are_compared(tokenizers):
    lines = with_losses(FOUR, baseline=[(9, 3)] * 4, tuned=[(3, 3)] * 4)
    metrics = compare(lines, tokenizers=tokenizers)["metrics"]
    assert metrics["reference_loss"]["delta"] == -2 and metrics["perplexity"]["delta"] < 0


def test_losses_per_token_of_a_further_model_with_another_tokenizer_are_not_shown_beside():
    """Without a baseline a reader compares each model with the tuned one, column beside column."""
    lines = with_losses(FOUR, baseline=[(9, 3)] * 4, tuned=[(9, 3)] * 4)
    further = [{**line, "second": line["tuned"] | {"reference_tokens": 6}, "third": line["tuned"]} for line in lines]
    alone = [{name: value for name, value in line.items() if name != "baseline"} for line in further]
    second, third = (compare(alone, model=label)["metrics"] for label in ("second", "third"))
    assert second["perplexity"]["tuned"] is None and "tokenizers differ" in second["perplexity"]["reason"]
    assert second["reference_loss"]["tuned"] == 1.5 and second["bits_per_byte"] == third["bits_per_byte"]
    assert third["perplexity"]["tuned"] == pytest.approx(math.exp(3)) and "reason" not in third["perplexity"]
    assert compare(alone)["metrics"]["perplexity"]["tuned"] == pytest.approx(math.exp(3))


def test_losses_that_are_no_numbers_say_so():
    lines = with_losses(FOUR, baseline=[(9, 3)] * 4, tuned=[(None, 3)] * 4)
    metrics = compare(lines)["metrics"]
    assert "NaN or infinite" in metrics["reference_loss"]["reason"] and "NaN" in metrics["bits_per_byte"]["reason"]


def test_one_unknown_stop_reason_leaves_no_stop_rate():
    lines = copy.deepcopy(FOUR)
    del lines[2]["baseline"]["stop_reason"]
    stop = compare(lines)["behaviour"]["stop_rate"]
    assert (stop["baseline"], stop["tuned"], stop["delta"], stop["n"]) == (None, 0.75, None, 4)


def test_distinct_2_has_no_interval_because_resamples_repeat_bigrams():
    """All bigrams differ, which no resample with replacement can say."""
    lines = [prediction(str(i), "x", f"a{i} b{i}", f"c{i} d{i}") for i in range(50)]
    distinct = compare(lines)["behaviour"]["distinct_2"]
    assert (distinct["baseline"], distinct["tuned"], distinct["delta"], distinct["ci95"]) == (1, 1, 0, None)
    resampled = {"distinct_2": replace(BEHAVIOUR["distinct_2"], resampled=True)}
    drawn = np.random.default_rng(0).integers(0, 50, size=50)
    texts = [lines[index]["tuned"]["text"] for index in drawn]
    again = resampled["distinct_2"].statistics(texts).sum(axis=0)
    assert again[0] / again[1] < 0.8


@pytest.mark.parametrize("text", ["", "a", "\u202eabc", "\x00", "</script>", "a " * 50_000])
def test_nothing_that_json_cannot_hold(text):
    lines = with_losses([prediction("a", " ", text, text), prediction("b", "x", text, "")], tuned=[(9e5, 1), (1, 1)])
    scores = compare([{**line, "family": line["id"]} for line in lines])
    json.dumps(scores, allow_nan=False)
    assert scores["metrics"]["perplexity"]["tuned"] is None  # more than a float can hold
    assert scores["metrics"]["perplexity"]["reason"] == "it is larger than a number can be"
    assert scores["families"]["b"]["metrics"]["exact_match"]["ci95"] is None  # one example has no spread


# --- what does not pair ---------------------------------------------------------------------------------------------


def test_no_predictions():
    with pytest.raises(UserError, match="no predictions"):
        compare([])


def test_answers_that_others_have():
    lines = copy.deepcopy(FOUR)
    del lines[1]["baseline"]
    lines[3]["baseline"] = None
    with pytest.raises(UserError, match=r"2 \(b, d\) of 4 ids have no answer of 'baseline'"):
        compare(lines)
    lines = [prediction(str(i), "x", "x", "x") for i in range(50)]
    for line in lines[:20]:
        line["tuned"] = {"text": None}
    with pytest.raises(UserError, match=r"20 \(0, 1, 2, 3, 4, ...\) of 50 ids have no answer of 'tuned'"):
        compare(lines)


def test_a_model_that_nobody_asked():
    with pytest.raises(UserError, match=r"no answer of 'tunned', .*answers of baseline, tuned\)"):
        compare(FOUR, model="tunned")


def test_an_id_that_stands_twice():
    with pytest.raises(UserError, match=r"1 \(a\) of 5 ids occur more than once"):
        compare([*FOUR, FOUR[0]])


def test_no_reference():
    with pytest.raises(UserError, match=r"1 \(a\) of 4 ids have no reference in 'output'"):
        compare([{**FOUR[0], "output": None}, *FOUR[1:]])


# --- intervals ------------------------------------------------------------------------------------------------------


def test_resampled_sums_are_of_n_examples_drawn_alike():
    statistics = np.eye(5)  # so that sums are counts
    counts = resample_sums(statistics, resamples=20_000)
    assert (counts.sum(axis=1) == 5).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(5), abs=0.03)
    assert counts.var(axis=0) == pytest.approx(np.full(5, 5 * 0.2 * 0.8), abs=0.03)  # of a multinomial


def test_slices_of_resamples_are_drawn_anew(monkeypatch):
    monkeypatch.setattr(comparison, "DRAWN_AT_ONCE", 70)
    sums = resample_sums(np.arange(7.0)[:, None], resamples=1003)
    assert sums.shape == (1003, 1) and len(np.unique(sums[:10])) > 3
    assert not np.array_equal(sums[:10], sums[10:20])


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    scores = np.random.default_rng(1).normal(0.3, 1.0, size=4000)
    low, high = bootstrap_interval(scores, resamples=4000)
    half_width = 1.96 * scores.std() / np.sqrt(len(scores))
    assert low == pytest.approx(scores.mean() - half_width, abs=0.07 * half_width)
    assert high == pytest.approx(scores.mean() + half_width, abs=0.07 * half_width)
    assert bootstrap_interval(scores, resamples=4000) == (low, high)


def test_intervals_cover_the_true_difference():
    """2,000 data sets of 150 prompts; each prompt is as hard for both models. Nominal: 95 % of the intervals cover.

    A mean (exact match), a ratio of sums (reference loss) and BLEU, whose true value is the one of the expected counts.
    """
    names = ("exact_match", "reference_loss", "bleu")
    measures = {name: METRICS[name] for name in names}
    generator, n, datasets = np.random.default_rng(7), 150, 2000
    skill = {"tuned": 0.9, "baseline": 0.6}
    per_order = np.array([0.9, 0.7, 0.5, 0.4])  # chance that an n-gram of an easy prompt matches
    mean_length = 12.0
    truth = {"exact_match": 0.3 * 0.75, "reference_loss": 1 / 0.9 - 1 / 0.6}
    expected = {
        label: np.concatenate([(mean_length - np.arange(4)) * per_order * 0.75 * s, mean_length - np.arange(4),
                               [mean_length, mean_length + 1, mean_length - 2]])
        for label, s in skill.items()
    }  # fmt: skip
    bleu = {label: float(METRICS["bleu"].from_sums(sums, 1)) for label, sums in expected.items()}
    truth["bleu"] = bleu["tuned"] - bleu["baseline"]
    covered = dict.fromkeys(names, 0)
    for seed in range(datasets):
        ease = generator.uniform(0.5, 1.0, size=n)  # mean 0.75, shared by both models
        length = generator.integers(8, 17, size=n)  # mean 12
        totals = length[:, None] - np.arange(4)
        sides = {}
        for label, s in skill.items():
            nats = length / s * generator.gamma(4, ease / 0.75 / 4)  # on average 1 / s a token, skewed
            sides[label] = {
                "exact_match": (generator.uniform(size=n) < ease * s).astype(float)[:, None],
                "reference_loss": np.column_stack([nats, length]),
                "bleu": np.column_stack(
                    [generator.binomial(totals, per_order * ease[:, None] * s), totals, length, length + 1, length - 2]
                ),
            }
        scores = paired_scores(measures, sides["tuned"], sides["baseline"], resamples=1000, seed=seed)
        for name in names:
            low, high = scores[name]["ci95"]
            covered[name] += low <= truth[name] <= high
    for name in names:
        assert 0.94 <= covered[name] / datasets <= 0.96, covered


def test_pairing_narrows_the_interval():
    """Two models that err on the same prompts: the difference is surer than each score."""
    hard = np.random.default_rng(2).uniform(size=400) < 0.5
    tuned, baseline = hard.astype(float)[:, None], hard.astype(float)[:, None].copy()
    baseline[:20] = 0
    measures = {"exact_match": METRICS["exact_match"]}
    paired = paired_scores(measures, {"exact_match": tuned}, {"exact_match": baseline})["exact_match"]["ci95"]
    alone = paired_scores(measures, {"exact_match": tuned})["exact_match"]["ci95"]
    assert paired[1] - paired[0] < (alone[1] - alone[0]) / 2
