"""A model beside its baseline on the same prompts: scores, paired intervals, task families, wins and losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recipe.config import UserError
from recipe.evaluation.measures import BEHAVIOUR, METRICS, Measure, finite

RESAMPLES = 10_000
DRAWN_AT_ONCE = 1_000_000  # bounds the memory of resampling: some 30 MB, whatever the number of examples


def labels_of(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The models that answered: `baseline` first, `tuned` next, others as they come.

    >>> labels_of([{"id": "test/0", "output": "cats", "tuned": {"text": "cats"}, "baseline": {"text": "cat"}}])
    ['baseline', 'tuned']
    """
    found = dict.fromkeys(
        key for prediction in predictions for key, value in prediction.items() if isinstance(value, Mapping)
    )
    return sorted(found, key=lambda label: {"baseline": 0, "tuned": 1}.get(label, 2))


def compare(
    predictions: Sequence[Mapping[str, Any]], model: str = "tuned", baseline: str = "baseline"
) -> dict[str, Any]:
    """Scores of a model beside its baseline, as they stand in `metrics.json`.

    Args:
        predictions: lines of `predictions.jsonl`: `id`, `output` (the reference), `family` where the data has one, and
            under each model's label its answer: `text`, and where known `stop_reason`, `reference_loss` (nats) and
            `reference_tokens`.
        model: the label of the answers to score; its scores are named `tuned`.
        baseline: the label of those to compare with; without such answers there are no differences.

    Returns:
        `n`; `metrics` and `behaviour`: see `paired_scores`; `families`: of each its `n` and `metrics`; `outcomes`: of
        each metric that an example has by itself, how many were better (`win`), the same and worse than the baseline.

    Raises:
        UserError: no predictions, or predictions that do not pair: an id that stands twice, or without an answer.

    Example::

        compare(predictions)["metrics"]["exact_match"]
        # {'baseline': 0.1, 'tuned': 0.8, 'delta': 0.7, 'ci95': [0.62, 0.78], 'better': 'higher', 'n': 110}
    """
    paired = baseline in labels_of(predictions) and baseline != model
    _check(predictions, [baseline, model] if paired else [model])
    measures = {**METRICS, **BEHAVIOUR}
    tuned = _statistics(measures, predictions, model)
    base = _statistics(measures, predictions, baseline) if paired else None

    outcomes = {}
    for name, measure in METRICS.items():
        if base is not None and measure.per_example:
            gains = measure.from_sums(tuned[name], 1) - measure.from_sums(base[name], 1)
            gains = np.where(np.abs(gains) < 1e-9, 0, gains)  # the same score by another order of additions is a tie
            signs = {"win": 1, "tie": 0, "loss": -1}
            outcomes[name] = {outcome: int((np.sign(gains) == sign).sum()) for outcome, sign in signs.items()}

    families = {}
    named = [prediction.get("family") or "" for prediction in predictions]
    for family in dict.fromkeys(named):
        if family:
            rows = np.array([name == family for name in named])
            ours = {name: tuned[name][rows] for name in METRICS}
            theirs = {name: base[name][rows] for name in METRICS} if base else None
            families[family] = {"n": int(rows.sum()), "metrics": paired_scores(METRICS, ours, theirs)}

    scores = paired_scores(measures, tuned, base)
    return {
        "n": len(predictions),
        "metrics": {name: scores[name] for name in METRICS},
        "behaviour": {name: scores[name] for name in BEHAVIOUR},
        "families": families,
        "outcomes": outcomes,
    }


def example_scores(predictions: Sequence[Mapping[str, Any]], label: str) -> dict[str, np.ndarray]:
    """Of each metric that an example has by itself, the scores of one model, (n,) float64."""
    measures = {name: measure for name, measure in METRICS.items() if measure.per_example}
    statistics = _statistics(measures, predictions, label)
    return {name: measure.from_sums(statistics[name], 1) for name, measure in measures.items()}


# --- intervals ------------------------------------------------------------------------------------------------------


def paired_scores(
    measures: Mapping[str, Measure],
    tuned: Mapping[str, np.ndarray],
    baseline: Mapping[str, np.ndarray] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Scores of two models on the same examples, with paired bootstrap intervals of their difference.

    The interval is from the 2.5th to the 97.5th percentile of the difference over resamples of the examples (Efron
    1979; for corpus scores Koehn 2004). All measures and both models see the same resamples.

    Args:
        tuned, baseline: by measure the statistics of each example, (n, k); an example that is not finite on one side
            leaves the pair. A side without any statistic is missing.

    Returns:
        for each measure `baseline`, `tuned`, their `delta`, its `ci95` [low, high], `better` as in `Measure`, and `n`,
        the examples that count. Without a baseline, `delta` is None and `ci95` is the tuned score's. What is undefined
        is None, and so is `ci95` of a single example, and of distinct-2: drawing with replacement repeats responses and
        their bigrams, so that every resample has fewer distinct ones than new examples would have. Where all examples
        agree an interval has no width, which says that none differed, not that none ever will.
    """
    sides, blocks = {}, []
    for name in measures:
        given = {"tuned": tuned[name], "baseline": None if baseline is None else baseline[name]}
        known = {label: table for label, table in given.items() if table is not None and not _missing(table).all()}
        count = np.ones((len(tuned[name]), 1))
        for table in known.values():
            count[_missing(table)] = 0
        sides[name] = list(known)
        blocks += [count, *(np.where(count == 1, table, 0) for table in known.values())]
    joined = np.hstack(blocks)  # (examples, columns)
    sums = np.vstack([joined.sum(axis=0), resample_sums(joined, resamples, seed)])  # (1 + resamples, columns)

    scores, start = {}, 0
    for name, measure in measures.items():
        n = sums[:, start]
        start += 1
        found: dict[str, np.ndarray] = {}  # (1 + resamples,) each, the score itself first
        for label in sides[name]:
            width = tuned[name].shape[1]
            found[label] = measure.from_sums(sums[:, start : start + width], n)
            start += width
        scores[name] = _score(measure, found, int(n[0]) if found else 0)
    return scores


def resample_sums(statistics: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Sums of (n, k) statistics over resamples: n examples drawn with replacement, (resamples, k)."""
    generator = np.random.default_rng(seed)
    n, sums = len(statistics), []
    at_once = max(1, DRAWN_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = generator.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        sums.append(counts.astype(np.float64) @ statistics)
    return np.concatenate(sums)


def bootstrap_interval(scores: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean (Efron 1979); give paired differences for a paired interval.

    >>> bootstrap_interval(np.array([0.0, 1.0] * 50))
    (0.4, 0.6)
    """
    means = resample_sums(np.asarray(scores, dtype=np.float64)[:, None], resamples, seed)[:, 0] / len(scores)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _missing(statistics: np.ndarray) -> np.ndarray:
    return ~np.isfinite(statistics).all(axis=1)


def _score(measure: Measure, found: Mapping[str, np.ndarray], n: int) -> dict[str, Any]:
    point = {label: finite(found[label][0]) if label in found else None for label in ("baseline", "tuned")}
    ours, theirs = point["tuned"], point["baseline"]
    delta = None if ours is None or theirs is None else ours - theirs
    interval = None
    if measure.resampled and ours is not None and n > 1:
        with np.errstate(invalid="ignore"):  # infinite perplexities
            values = found["tuned"][1:] if delta is None else found["tuned"][1:] - found["baseline"][1:]
            # where few examples have the score, a resample may hold none of them
            bounds = [finite(bound) for bound in np.quantile(values[~np.isnan(values)], [0.025, 0.975])]
        interval = None if None in bounds else bounds
    return {**point, "delta": delta, "ci95": interval, "better": measure.better, "n": n}


# --- predictions ----------------------------------------------------------------------------------------------------


def _statistics(
    measures: Mapping[str, Measure], predictions: Sequence[Mapping[str, Any]], label: str
) -> dict[str, np.ndarray]:
    answers = [prediction[label] for prediction in predictions]
    columns = {
        "predictions": [answer["text"] for answer in answers],
        "references": [prediction["output"] for prediction in predictions],
        "stop_reasons": [answer.get("stop_reason") for answer in answers],
        "loss_sums": [answer.get("reference_loss") for answer in answers],
        "token_counts": [answer.get("reference_tokens") for answer in answers],
    }
    made: dict[Any, np.ndarray] = {}  # the loss and the perplexity are made of the same
    tables = {}
    for name, measure in measures.items():
        if measure.statistics not in made:
            made[measure.statistics] = measure.statistics(*(columns[feature] for feature in measure.features))
        tables[name] = made[measure.statistics]
    return tables


def _check(predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    if not predictions:
        raise UserError("no predictions to score: the split is empty; name another one, or give it records")
    ids = [str(prediction.get("id", f"line {number}")) for number, prediction in enumerate(predictions, start=1)]
    twice = [id_ for id_, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"{_some(twice)} of {len(ids)} ids stand twice or more; keep one prediction of each")
    texts = {"no reference in 'output'": [prediction.get("output") for prediction in predictions]}
    for label in labels:
        answers = [prediction.get(label) for prediction in predictions]
        texts[f"no answer of {label!r}"] = [a.get("text") if isinstance(a, Mapping) else None for a in answers]
    for problem, column in texts.items():
        lacking = [id_ for id_, text in zip(ids, column, strict=True) if not isinstance(text, str)]
        if lacking:
            raise UserError(
                f"{_some(lacking)} of {len(ids)} ids have {problem}, so the models cannot be compared on the same "
                f"prompts (there are answers of {', '.join(labels_of(predictions)) or 'no model'}); generate what is "
                "missing, or remove these ids"
            )


def _some(ids: Sequence[str]) -> str:
    """A count and the first few."""
    return f"{len(ids)} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
