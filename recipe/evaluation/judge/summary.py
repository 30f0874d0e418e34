"""Counts over a judge's rows: means with intervals and worst-case bounds, and how often a response beat another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recipe.evaluation.comparison import bootstrap_interval, paired_p_value
from recipe.evaluation.failures import may_pass

# statuses of faults that the judge names and only a user can remove, such as a wrong key or an account without money
TO_PUT_RIGHT = ("http_401", "http_402", "http_403", "http_404", "http_405", "http_407", "malformed", "error_reply")
WITH_VALUE = ("scored", "empty", "identical")  # statuses of rows that have a score or a winner


def summarize_scores(rows: Sequence[Mapping[str, Any]], scale: tuple[int, int], allow_missing: bool) -> dict[str, Any]:
    """Means of a prompt's scores, on its own scale.

    Args:
        rows: of `judge.jsonl`, of one prompt; `score` is None where it is missing.
        allow_missing: give means over the ids that are scored for both baseline and tuned, instead of none.

    Returns:
        `scale`, `n` ids; by model how many are `scored` and of these `empty`; `missing`: how many rows by status;
        `baseline`, `tuned`, `delta`, its paired bootstrap interval `ci95` and its paired permutation `p` (without a
        baseline the interval of the tuned score, and no p), None if scores are missing; `other_models`: the means of
        further models; `bounds` by model: its mean if each missing score were the lowest, and the highest.
    """
    labels = list(dict.fromkeys(row["model"] for row in rows))
    scores = {m: np.array([row["score"] for row in rows if row["model"] == m], dtype=np.float64) for m in labels}
    is_scored = {label: ~np.isnan(values) for label, values in scores.items()}
    compared = [label for label in ("baseline", "tuned") if label in labels]
    paired = np.logical_and.reduce([is_scored[label] for label in compared])

    def mean(label: str, among: np.ndarray) -> float | None:
        return float(scores[label][among].mean()) if among.any() and (among.all() or allow_missing) else None

    means = {label: mean(label, paired) for label in compared}
    difference = (scores["tuned"] - scores["baseline"] if "baseline" in compared else scores["tuned"])[paired]
    is_known = means["tuned"] is not None
    several, compares = is_known and len(difference) > 1, "baseline" in compared
    low, high = scale
    return {
        "scale": [low, high],
        "n": len(paired),
        "scored": {label: int(is_scored[label].sum()) for label in labels},
        "empty": {label: sum(row["model"] == label and row["status"] == "empty" for row in rows) for label in labels},
        "missing": _missing(rows),
        "baseline": means.get("baseline"),
        "tuned": means["tuned"],
        "delta": float(difference.mean()) if is_known and compares else None,
        "ci95": list(bootstrap_interval(difference)) if several else None,
        "p": paired_p_value(difference) if several and compares else None,
        "other_models": {label: mean(label, is_scored[label]) for label in labels if label not in compared},
        "bounds": {m: [float(np.nan_to_num(scores[m], nan=end).mean()) for end in (low, high)] for m in labels},
    }


def summarize_pairs(rows: Sequence[Mapping[str, Any]], allow_missing: bool) -> dict[str, Any]:
    """How often the tuned response beat the baseline's, asked in both orders.

    A pair counts as won or lost only if both orders say so; if they differ, it is a flip and counts as a tie.

    Args:
        rows: of `judge.jsonl`, two a pair; `winner` is `tuned`, `baseline`, `tie` or, where it is missing, None.
        allow_missing: give rates over the pairs that are judged in both orders, instead of none.

    Returns:
        `n` pairs, of which `judged` in both orders: `win`, `tie`, `loss` of tuned; `flips` and `flip_rate`, the share
        of flips among the judged pairs that needed asking (not `decided` because a response was empty or both were the
        same); `win_rate`, a tie as half, its bootstrap interval `ci95`, and worst-case `bounds`; `missing`: how many
        rows by status.
    """
    winners: dict[str, list[str | None]] = {}
    for row in rows:
        winners.setdefault(row["id"], []).append(row["winner"])
    decided = len({row["id"] for row in rows if row["status"] in ("empty", "identical")})
    judged = [pair for pair in winners.values() if None not in pair]
    points = np.array([_points(pair) for pair in judged])
    n, flips = len(winners), sum(len(set(pair)) > 1 for pair in judged)
    is_known = bool(judged) and (len(judged) == n or allow_missing)
    return {
        "n": n,
        "judged": len(judged),
        "decided": decided,
        "win": int((points == 1).sum()),
        "tie": int((points == 0.5).sum()),
        "loss": int((points == 0).sum()),
        "flips": flips,
        "flip_rate": flips / (len(judged) - decided) if len(judged) > decided else None,
        "win_rate": float(points.mean()) if is_known else None,
        "ci95": list(bootstrap_interval(points)) if is_known and len(judged) > 1 else None,
        "bounds": [float(points.sum() + end * (n - len(judged))) / n for end in (0, 1)],
        "missing": _missing(rows),
    }


def missing_advice(rows: Sequence[Mapping[str, Any]], most_tokens: int, may_be_asked: bool = True) -> str | None:
    """What can help against the missing scores of `judge.jsonl`, None if none is missing.

    >>> missing_advice([{"status": "cut_off"}, {"status": "scored"}], 8192)
    '1 cut_off: a --judge_max_tokens above 8192 if it takes as many, or another --judge'

    Args:
        rows: of `judge.jsonl`.
        most_tokens: with how many the judge was asked at last.
        may_be_asked: False if nothing could be asked, and another attempt would end as this one did.
    """
    counts = _missing(rows)
    passing = [status for status in counts if may_pass(status) and (may_be_asked or status != "not_asked")]
    wrong = [status for status in counts if status not in passing and status in (*TO_PUT_RIGHT, "not_asked")]
    cut = [status for status in counts if status == "cut_off"]
    lasting = [status for status in counts if status not in (*passing, *wrong, *cut)]
    advice = {
        "the same command asks again": passing,
        "put right what the error says, or name another --judge": wrong,
        f"a --judge_max_tokens above {most_tokens} if it takes as many, or another --judge": cut,
        "another --judge or --judge_prompts, as it would say the same again": lasting,
    }
    parts = [
        f"{', '.join(f'{counts[status]:,} {status}' for status in statuses)}: {what}"
        for what, statuses in advice.items()
        if statuses
    ]
    return "; ".join(parts) or None


def _points(pair: Sequence[str | None]) -> float:
    return {"tuned": 1.0, "baseline": 0.0}.get(str(pair[0]), 0.5) if pair[0] == pair[1] else 0.5


def _missing(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["status"] for row in rows if row["status"] not in WITH_VALUE))
