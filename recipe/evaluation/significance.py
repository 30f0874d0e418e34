"""Which differences are more than chance: each by its own interval, and all that are looked at together, by Holm.

A page shows dozens of differences. If each were called by its own 95 % interval, two equal models would differ
"significantly" somewhere in every third evaluation. So what stands in "got better" and "got worse" holds the
family-wise error rate: the chance that any of it is wrong, if the models are equal, is at most 5 % (Holm 1979).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from recipe.evaluation.headline import headline_of

Direction = Literal["better", "worse", "unclear", "neutral", "missing"]
Kind = Literal["score", "family", "judge"]
LEVEL = 0.05
# bootstrap intervals of a few records are too narrow: for two equal models they exclude 0 in up to 48 % of data sets of
# 2 records, 15 % of 5, 10 % of 10, 7.5 % of 20, and in the expected 5 % from 100 records up
ENOUGH_TO_JUDGE = 20


def direction(score: Mapping[str, Any]) -> Direction:
    """Whether a difference is significant by itself, and on which side; unclear below `ENOUGH_TO_JUDGE` records.

    Its 95 % interval excludes 0, and its p-value, where there is one, is at most 0.05: with few records a bootstrap
    interval alone is too narrow.

    >>> direction({"baseline": 0.1, "tuned": 0.3, "delta": 0.2, "ci95": [0.1, 0.3], "better": "higher", "n": 200})
    'better'
    """
    if score["tuned"] is None:
        return "missing"
    if score["delta"] is None or score["better"] is None:
        return "neutral"
    if score["ci95"] is None or score["n"] < ENOUGH_TO_JUDGE or (score.get("p") or 0) > LEVEL:
        return "unclear"
    low, high = score["ci95"] if score["better"] == "higher" else (-score["ci95"][1], -score["ci95"][0])
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def standing(score: Mapping[str, Any]) -> Direction:
    """The direction of a difference among all that are looked at: unclear too where Holm's method does not hold it.

    So is one that was not tested, as its `p` is not known.

    >>> score = {"baseline": 0.1, "tuned": 0.3, "delta": 0.2, "ci95": [0.1, 0.3], "better": "higher", "n": 200}
    >>> [standing({**score, "p_holm": adjusted}) for adjusted in (0.01, 0.3, None)]
    ['better', 'unclear', 'unclear']
    """
    own = direction(score)
    is_held = not lacks_p(score) and score.get("p_holm", 0) <= LEVEL
    return own if is_held or own not in ("better", "worse") else "unclear"


def lacks_p(score: Mapping[str, Any]) -> bool:
    """Whether a difference would have been tested, had an earlier version written its p-value (see `adjust`)."""
    return "p_holm" in score and score["p_holm"] is None


def judged(score: Mapping[str, Any]) -> dict[str, Any]:
    """A judge's score as `direction` takes it: higher is better; `n` are the records that surely have both scores."""
    lacking = sum(score["n"] - score["scored"][label] for label in ("baseline", "tuned") if label in score["scored"])
    return {**score, "better": "higher", "n": max(0, score["n"] - lacking)}


def differences(metrics: Mapping[str, Any]) -> Iterator[tuple[Kind, str, str, dict[str, Any]]]:
    """What a reader looks at: of each split all scores, and the headline score of each family; the judge's means.

    Yields:
        its kind, the name of the score, family or prompt, the split, and its entry in `metrics.json`.
    """
    headline = headline_of(metrics)
    for split, part in metrics["splits"].items():
        for name, score in {**part["metrics"], **part["behaviour"]}.items():
            yield "score", name, split, score
        for family, entry in part["families"].items():
            if headline in entry["metrics"]:
                yield "family", str(family), split, entry["metrics"][headline]
    for prompt, score in ((metrics["judge"] or {}).get("scores") or {}).items():
        yield "judge", prompt, next(iter(metrics["splits"])), score


def adjust(metrics: dict[str, Any]) -> None:
    """Write Holm's adjusted p-value, `p_holm`, to each difference of `metrics.json`, and their number, `comparisons`.

    Differences of fewer than `ENOUGH_TO_JUDGE` records, and those that have no better side, are not tested. Nor are
    those to which an earlier version wrote no p-value, such as a judge's means: their `p_holm` is None.
    """
    tested = []
    for kind, _, _, score in differences(metrics):
        score.pop("p_holm", None)
        seen = judged(score) if kind == "judge" else score
        if seen["delta"] is not None and seen["better"] and seen["ci95"] and seen["n"] >= ENOUGH_TO_JUDGE:
            if seen.get("p") is None:
                score["p_holm"] = None
            else:
                tested.append((score, seen["p"]))
    for (score, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
        score["p_holm"] = adjusted
    metrics["comparisons"] = len(tested)
    metrics.update(next(iter(metrics["splits"].values())))  # the top level repeats the first split


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: those of at most 5 % are wrong together in at most 5 % of the cases (Holm 1979).

    The smallest is multiplied by their number, the next by one less, and so on; none is below one before it.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
