"""Many differences at once: Holm's method, p-values against exact ones, and the family-wise error by simulation."""

import copy
import itertools
import math

import numpy as np
import pytest
from evaluation_samples import make_metrics, make_predictions
from test_verdict import make_score, metrics_of

from recipe.evaluation.comparison import paired_scores, swap_p_value
from recipe.evaluation.measures import METRICS
from recipe.evaluation.significance import adjust, differences, direction, holm, judged
from recipe.evaluation.tables import direction_word
from recipe.evaluation.verdict import cautions, findings, looked_at

MATCH = {"exact_match": METRICS["exact_match"]}


def exact_p_value(gains: np.ndarray) -> float:
    """The share of all 2^n choices of signs whose sum is at least as far from 0."""
    sums = [
        abs(sum(s * g for s, g in zip(signs, gains, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(gains))
    ]
    return float(np.mean(np.array(sums) >= abs(gains.sum()) - 1e-9))


@pytest.mark.parametrize("seed", range(6))
def test_p_values_are_those_of_all_choices_of_signs(seed):
    draw = np.random.default_rng(seed)
    tuned = draw.choice([0.0, 0.3, 1.0], size=12)[:, None]
    base = draw.choice([0.0, 0.5, 0.5], size=12)[:, None]
    [score] = paired_scores(MATCH, {"exact_match": tuned}, {"exact_match": base}).values()
    assert score["p"] == pytest.approx(exact_p_value((tuned - base)[:, 0]), abs=0.015)


def test_p_values_of_corpus_scores_swap_the_answers_of_a_record():
    """BLEU of eight records, with every one of the 256 ways to swap them."""
    draw, measure = np.random.default_rng(4), METRICS["bleu"]
    words = np.array(["red", "blue", "green", "and", "or"])
    references = [" ".join(draw.choice(words, size=7)) for _ in range(8)]
    sides = [[" ".join(draw.choice(words, size=7)) for _ in range(8)] for _ in range(2)]
    sides[0][0], sides[0][1] = references[0], references[1]
    tuned, base = (measure.statistics(texts, references) for texts in sides)
    [score] = paired_scores({"bleu": measure}, {"bleu": tuned}, {"bleu": base}).values()
    deltas = []
    for swaps in itertools.product((False, True), repeat=8):
        chosen = np.array(swaps)[:, None]
        pair = np.where(chosen, base, tuned), np.where(chosen, tuned, base)
        deltas.append(abs(np.subtract(*(measure.from_sums(side.sum(axis=0), 8) for side in pair))))
    assert score["p"] == pytest.approx(np.mean(np.array(deltas) >= abs(score["delta"]) - 1e-9), abs=0.015)


def test_p_values_reach_below_what_resamples_can_count():
    """10,000 resamples count to 1/10,001: of 1,000 families, none could ever be shown to be better."""
    tuned, base = np.ones((60, 1)), np.zeros((60, 1))
    [score] = paired_scores(MATCH, {"exact_match": tuned}, {"exact_match": base}).values()
    exact = 2.0**-59
    assert exact < score["p"] < 1e-10  # a bound from above
    for n, better in ((20, 20), (30, 26), (40, 30)):
        gains = np.array([1.0] * better + [-1.0] * (n - better))
        swapped = np.random.default_rng(0).choice([-1.0, 1.0], size=(10_000, n)).mean(axis=1)
        exact = sum(math.comb(n, k) for k in range(better, n + 1)) / 2 ** (n - 1)
        assert exact <= swap_p_value(gains.mean(), swapped) * 1.1


def test_the_more_records_agree_the_smaller_the_p_value():
    found = []
    for n in (5, 10, 20):
        sides = {"exact_match": np.ones((n, 1))}, {"exact_match": np.zeros((n, 1))}
        found.append(paired_scores(MATCH, *sides)["exact_match"]["p"])
    assert found[0] > found[1] > found[2] and found[0] == pytest.approx(2 / 2**5, abs=0.01)


def by_hand(p_values: list[float], level: float = 0.05) -> list[bool]:
    """Holm 1979, as a stair: from the smallest p-value, each against level / (those not yet passed)."""
    passed, left = [False] * len(p_values), len(p_values)
    for index in np.argsort(p_values, kind="stable"):
        if p_values[index] > level / left:
            break
        passed[index], left = True, left - 1
    return passed


def test_holm_is_the_stair_of_his_article():
    draw = np.random.default_rng(1)
    for size in (1, 2, 5, 14, 40):
        for _ in range(50):
            p_values = (draw.uniform(size=size) ** draw.integers(1, 6)).tolist()
            assert [p <= 0.05 for p in holm(p_values)] == by_hand(p_values)


def test_of_fourteen_equal_families_none_is_named_in_95_of_100_evaluations():
    """Two equal models, 14 families of 25 to 60 records: without Holm, a family is named in every third evaluation."""
    draw, evaluations, named, named_alone = np.random.default_rng(2), 200, 0, 0
    for seed in range(evaluations):
        families = {}
        for family in range(14):
            n = int(draw.integers(25, 61))
            sides = (draw.uniform(size=(2, n, 1)) < draw.uniform(0.2, 0.8, size=(n, 1))).astype(float)
            pair = ({"exact_match": side} for side in sides)
            families[str(family)] = {"n": n, "metrics": paired_scores(MATCH, *pair, resamples=500, seed=seed)}
        metrics = metrics_of(exact_match=make_score(0.5, 0.5, [-0.1, 0.1]) | {"p": 1.0}, families=families)
        adjust(metrics)
        assert metrics["comparisons"] == 15
        named += bool(findings(metrics, "better") or findings(metrics, "worse"))
        scores = [entry["metrics"]["exact_match"] for entry in families.values()]
        named_alone += any(direction(score) in ("better", "worse") for score in scores)
    assert named / evaluations <= 0.05
    assert named_alone / evaluations > 0.25


def test_the_family_wise_error_of_skewed_scores_is_five_percent():
    """4,000 evaluations of 14 families; differences of two exponential scores. Two standard errors are allowed."""
    draw, evaluations, named = np.random.default_rng(3), 4000, 0
    for _ in range(evaluations):
        gains = draw.exponential(size=(14, 30)) - draw.exponential(size=(14, 30))
        swapped = draw.choice([-1.0, 1.0], size=(999, 30)) @ gains.T  # (choices of signs, families)
        p_values = [swap_p_value(gain.sum(), sums) for gain, sums in zip(gains, swapped.T, strict=True)]
        named += min(holm(p_values)) <= 0.05
    assert 0.035 < named / evaluations < 0.05 + 2 * (0.05 * 0.95 / evaluations) ** 0.5


def test_what_is_really_better_is_still_named():
    metrics = make_metrics(make_predictions(500))
    assert metrics["comparisons"] >= 25 and f"{metrics['comparisons']} differences were looked at" in looked_at(metrics)
    found = findings(metrics, "better")
    assert {finding.label for finding in found} >= {"Exact match", "Token F1", "plural", "antonym"}
    assert not findings(metrics, "worse")


def test_a_judges_mean_and_small_families_count_only_where_they_are_tested():
    judge_score = {
        "scale": [0, 100],
        "scored": {"baseline": 400, "tuned": 400},
        **make_score(60.0, 50.0, [-12.5, -7.5]),
        "p": 1e-6,
    }
    few = {"n": 9, "metrics": {"exact_match": make_score(0.0, 1.0, [1.0, 1.0], n=9)}}
    exact_match = {**make_score(0.5, 0.6, [0.01, 0.19]), "p": 0.02}
    scores = {"exact_match": exact_match, "length_ratio": make_score(1.0, 1.2, [0.1, 0.3], None)}
    metrics = metrics_of(**scores, families={"few": few}, judge={"scores": {"score_0_100": judge_score}})
    adjust(metrics)
    assert metrics["comparisons"] == 2
    held = {name: score.get("p_holm") for _, name, _, score in differences(metrics)}
    assert held["few"] is held["length_ratio"] is None
    assert held["score_0_100"] < 0.001 < held["exact_match"] < 0.05
    assert [finding.label for finding in findings(metrics, "worse")] == ["Judge, score_0_100"]


@pytest.mark.parametrize("older", [{}, {"p": None}])
def test_a_judges_mean_of_an_earlier_version_is_not_tested_and_the_reader_is_told(older):
    """Whether it has p = 1, or is taken as it stands alone, is not known: the judge stage writes its p-value."""
    means = {"scale": [0, 100], "scored": {"baseline": 400, "tuned": 400}, "missing": {}, "bounds": {}}
    scores = {
        "score_0_100": means | make_score(60.0, 50.0, [-12.5, -7.5]) | older,
        "rubric": means | make_score(60.0, 50.0, [-12.5, -7.5]) | {"p": 1e-6},
        "equal": means | make_score(60.0, 60.5, [-1.5, 2.0]) | {"p": 0.6},
    }
    judge = {"scores": scores, "pairwise": None, "error": None}
    metrics = metrics_of(exact_match=make_score(0.5, 0.6, [0.01, 0.19]) | {"p": 0.02}, judge=judge)
    for _ in range(2):
        adjust(metrics)
    assert metrics["comparisons"] == 3  # as many as have a p-value
    assert scores["score_0_100"]["p_holm"] is None
    assert (scores["rubric"]["p_holm"], scores["equal"]["p_holm"]) == pytest.approx((3e-6, 0.6))
    assert [finding.label for finding in findings(metrics, "worse")] == ["Judge, rubric"]
    assert [direction_word(judged(score)) for score in scores.values()] == ["not tested", "worse", "not significant"]
    [caution] = cautions(metrics, [], [])
    assert caution.startswith("Judge, score_0_100: ") and "not tested" in caution and "judge stage" in caution


def test_scores_of_a_version_that_wrote_no_p_values_are_not_tested():
    few = {"n": 9, "metrics": {"exact_match": make_score(0.0, 1.0, [1.0, 1.0], n=9)}}
    many = {"n": 90, "metrics": {"exact_match": make_score(0.0, 1.0, [1.0, 1.0], n=90)}}
    scores = {"exact_match": make_score(0.5, 0.6, [0.01, 0.19]), "length_ratio": make_score(1.0, 1.2, [0.1, 0.3], None)}
    metrics = metrics_of(**scores, families={"few": few, "many": many})
    adjust(metrics)
    assert metrics["comparisons"] == 0 and not findings(metrics, "better")
    [caution] = cautions(metrics, [], [])
    assert caution.startswith("Exact match, many: ") and "score stage" in caution


def test_adjusting_twice_is_adjusting_once():
    metrics = make_metrics(make_predictions(120))
    before = copy.deepcopy(metrics)
    adjust(metrics)
    assert metrics == before
