"""Gates: conditions on the scores of an evaluation, for CI.

`exact_match>=0.8`, `test_unseen:token_f1.delta>0`, `perplexity<20`, `rouge_l.low>=0.5`, `judge.score_0_100>=60`.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipe.config import UserError
from recipe.evaluation.measures import BEHAVIOUR, METRICS

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
# low and high are the ends of the 95 % interval: of the delta, or of the tuned score if there is no baseline
FIELDS = ("tuned", "baseline", "delta", "low", "high")
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
GATE = re.compile(rf"(?:([\w.-]+):)?(judge\.)?([\w-]+)(?:\.(\w+))?\s*([<>]=?)\s*({NUMBER})")


@dataclass(frozen=True)
class Gate:
    """One condition: `split:metric.field comparison bound`; without a split, the first one counts."""

    text: str
    split: str | None
    metric: str
    field: str
    comparison: str
    bound: float


def parse_gate(text: str) -> Gate:
    """Read a gate as it is written on the command line.

    >>> parse_gate("test:exact_match>=0.8")
    Gate(text='test:exact_match>=0.8', split='test', metric='exact_match', field='tuned', comparison='>=', bound=0.8)

    Raises:
        UserError: not a condition, or a metric that does not exist.
    """
    match = GATE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"--gate {text!r}: write NAME>=NUMBER, for example exact_match>=0.8 or token_f1.delta>0")
    split, judge, metric, field, comparison, bound = match.groups()
    known = [*METRICS, *BEHAVIOUR]
    problem = None
    if not judge and metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        problem = f"unknown metric {metric!r}; {hint}there are {', '.join(known)}"
    elif judge and split is not None:
        problem = f"the judge is asked about the first split only; leave out {split + ':'!r}"
    elif field not in (None, *FIELDS):
        problem = f"unknown field {field!r}; there are {', '.join(FIELDS)}"
    if problem:
        raise UserError(f"--gate {text!r}: {problem}")
    return Gate(text, split, (judge or "") + metric, field or "tuned", comparison, float(bound))


def measure(gate: Gate, metrics: Mapping[str, Any]) -> float | None:
    """The figure a gate asks for, from the content of `metrics.json`; None if it was not measured."""
    if gate.metric.startswith("judge."):
        judge, name = metrics["judge"] or {}, gate.metric.removeprefix("judge.")
        scores = (judge.get("scores") or {}).get(name)
        if name == "pairwise" and judge.get("pairwise"):
            scores = {**dict.fromkeys(FIELDS), "ci95": None, "tuned": judge["pairwise"]["win_rate"]}
    else:
        split = metrics if gate.split is None else metrics["splits"].get(gate.split)
        scores = split and (split["metrics"].get(gate.metric) or split["behaviour"].get(gate.metric))
    if scores and gate.field in ("low", "high"):
        return scores["ci95"] and scores["ci95"][gate.field == "high"]
    return scores[gate.field] if scores else None


def failures(gates: list[Gate], metrics: Mapping[str, Any]) -> list[str]:
    """Why gates do not hold, one line each; a gate on a figure that was not measured does not hold."""
    values = [(gate, measure(gate, metrics)) for gate in gates]
    return [
        f"gate {gate.text}: " + ("not measured" if value is None else f"it is {value:.8g}")
        for gate, value in values
        if value is None or not COMPARISONS[gate.comparison](value, gate.bound)
    ]
