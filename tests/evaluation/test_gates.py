"""Conditions on scores."""

import pytest

from recipe.config import UserError
from recipe.evaluation.gates import failures, parse_gate

MATCH = {"baseline": 0.1, "tuned": 0.8, "delta": 0.7, "ci95": [0.6, 0.75], "better": "higher", "n": 100}
METRICS = {
    "metrics": {"exact_match": MATCH, "perplexity": {**MATCH, "tuned": None, "ci95": None}},
    "behaviour": {"stop_rate": {**MATCH, "tuned": 1.0}, "empty_rate": None},
    "judge": {
        "scores": {
            "score_0_100": {"tuned": 61.5, "baseline": 12.0, "delta": 49.5, "ci95": [40.0, 55.0]},
            "my-rubric": {"tuned": 3.5, "baseline": None, "delta": None, "ci95": [3.0, 4.0]},
        },
        "pairwise": {"win_rate": 0.7},
    },
    "splits": {"unseen": {"metrics": {"exact_match": {**MATCH, "tuned": 0.3}}, "behaviour": {}}},
}


@pytest.mark.parametrize(
    "gate",
    [
        "exact_match>=0.8", "exact_match <= 0.8", "exact_match.baseline<0.2", "exact_match.delta>0.5",
        "exact_match.low>=0.6", "exact_match.high<0.76", "stop_rate>=1", "unseen:exact_match<0.5",
        "judge.score_0_100>=60", "judge.score_0_100.delta>-1", "judge.my-rubric>=3", "judge.pairwise>0.5",
        "exact_match>1e-3",
    ],
)  # fmt: skip
def test_gates_that_hold(gate):
    assert failures([parse_gate(gate)], METRICS) == []


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ("exact_match>0.8", "it is 0.8"),
        ("unseen:exact_match>=0.5", "it is 0.3"),
        ("perplexity<20", "not measured"),
        ("perplexity.low<20", "not measured"),
        ("empty_rate<=0", "not measured"),
        ("nowhere:exact_match>0", "not measured"),
        ("judge.rubric_1_5>3", "not measured"),
        ("judge.score_0_100>=62", "it is 61.5"),
        ("exact_match>=0.8000001", "it is 0.8"),
    ],
)
def test_gates_that_fail_say_why(gate, why):
    assert failures([parse_gate(gate)], METRICS) == [f"gate {gate}: {why}"]


def test_a_judge_that_was_not_asked_holds_no_gate():
    assert failures([parse_gate("judge.score_0_100>1")], {**METRICS, "judge": None}) != []


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("exact_match", "write NAME>=NUMBER"),
        ("exact_match>=high", "'exact_match>=high': write NAME>=NUMBER"),
        ("exact_match>=nan", "'exact_match>=nan': write NAME>=NUMBER"),
        ("unseen:judge.score_0_100>=1", "the judge is asked about the first split only"),
        ("exact_match==1", "write NAME>=NUMBER"),
        ("exact_macth>=0.5", "unknown metric 'exact_macth'; did you mean 'exact_match'"),
        ("exact_match.mean>=0.5", "unknown field 'mean'"),
        ("exact_match>=1.2.3", "write NAME>=NUMBER"),
    ],
)
def test_what_is_no_condition_is_refused(gate, message):
    with pytest.raises(UserError, match=message):
        parse_gate(gate)
