"""A model beside its baseline on the same prompts: scores, paired intervals, task families, wins and losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recipe.config import UserError
from recipe.evaluation.measures import BEHAVIOUR, MEASURES, METRICS, Measure, finite

PER_EXAMPLE = {name: measure for name, measure in METRICS.items() if measure.per_example}
RESAMPLES = 10_000
DRAWN_AT_ONCE = 1_000_000  # bounds the memory of resampling to about 30 MB, for any number of examples


def labels_of(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The models that answered: `baseline` first, `tuned` next, others in the order of their first answers.

    >>> labels_of([{"id": "test/0", "output": "cats", "tuned": {"text": "cats"}, "baseline": {"text": "cat"}}])
    ['baseline', 'tuned']
    """
    labels = dict.fromkeys(key for line in predictions for key, value in line.items() if isinstance(value, Mapping))
    return sorted(labels, key=lambda label: {"baseline": 0, "tuned": 1}.get(label, 2))


def compare(
    predictions: Sequence[Mapping[str, Any]], model: str = "tuned", baseline: str = "baseline"
) -> dict[str, Any]:
    """Scores of a model beside its baseline, as `metrics.json` holds them.

    Args:
        predictions: lines of `predictions.jsonl`: `id`, `output` (the reference), `family` if the data has one, and
            under each model's label its `text` and, if known, `stop_reason`, `reference_loss` (nats) and
            `reference_tokens`.
        model: the label of the answers to score; its scores are named `tuned`.
        baseline: the label of the answers to compare with; without them there are no differences.

    Returns:
        `n`; `metrics` and `behaviour`: see `paired_scores`; `families`: the `n` and `metrics` of each; `outcomes`: for
        each metric of single examples, on how many the model was better (`win`), equal (`tie`) and worse (`loss`).

    Raises:
        UserError: no predictions, or predictions that do not pair: an id that occurs twice, or without an answer.

    Example::

        compare(predictions)["metrics"]["exact_match"]
        # {'baseline': 0.1, 'tuned': 0.8, 'delta': 0.7, 'ci95': [0.62, 0.78], 'better': 'higher', 'n': 110}
    """
    paired = baseline in labels_of(predictions) and baseline != model
    _check(predictions, [baseline, model] if paired else [model])
    tuned = _statistics(MEASURES, predictions, model)
    base = _statistics(MEASURES, predictions, baseline) if paired else None
    scores = paired_scores(MEASURES, tuned, base)

    families = {}
    for family in dict.fromkeys(line.get("family") for line in predictions if line.get("family")):
        rows = np.array([line.get("family") == family for line in predictions])
        of_tuned = {name: tuned[name][rows] for name in METRICS}
        of_base = {name: base[name][rows] for name in METRICS} if base else None
        families[family] = {"n": int(rows.sum()), "metrics": paired_scores(METRICS, of_tuned, of_base)}
    return {
        "n": len(predictions),
        "metrics": {name: scores[name] for name in METRICS},
        "behaviour": {name: scores[name] for name in BEHAVIOUR},
        "families": families,
        "outcomes": _outcomes(tuned, base) if base else {},
    }


def example_scores(predictions: Sequence[Mapping[str, Any]], label: str) -> dict[str, np.ndarray]:
    """For each metric that a single example has, the scores of one model, (n,) float64."""
    return _by_example(_statistics(PER_EXAMPLE, predictions, label))


def _by_example(statistics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: measure.from_sums(statistics[name], 1) for name, measure in PER_EXAMPLE.items()}


def _outcomes(tuned: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> dict[str, dict[str, int]]:
    outcomes, scores_of_base = {}, _by_example(base)
    for name, scores in _by_example(tuned).items():
        gains = (scores - scores_of_base[name]).round(9)  # the same score, added up in another order, is a tie
        counts = {"win": gains > 0, "tie": gains == 0, "loss": gains < 0}
        outcomes[name] = {outcome: int(rows.sum()) for outcome, rows in counts.items()}
    return outcomes


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
        tuned, baseline: for each measure the statistics of each example, (n, k). An example that is not finite on one
            side is left out on both; a side without any finite example is missing.

    Returns:
        for each measure `baseline`, `tuned`, their `delta`, its `ci95` [low, high], `better` as in `Measure`, and `n`,
        the examples that count; None where undefined. Without a baseline `ci95` belongs to the tuned score. It is None
        for a single example, and for distinct-2, which resamples underestimate: they repeat bigrams.
    """
    sides = {"tuned": tuned} if baseline is None else {"tuned": tuned, "baseline": baseline}
    labels, blocks = [], []  # for each measure the sides that have it; whether an example counts, then their statistics
    for name in measures:
        tables = {label: side[name] for label, side in sides.items() if _is_finite(side[name]).any()}
        counts = np.ones((len(tuned[name]), 1), dtype=bool)
        for table in tables.values():
            counts &= _is_finite(table)
        labels.append(list(tables))
        blocks.append(np.hstack([counts.astype(np.float64), *(np.where(counts, t, 0) for t in tables.values())]))
    joined = np.hstack(blocks)  # (examples, columns)
    sums = np.vstack([joined.sum(axis=0), resample_sums(joined, resamples, seed)])  # (1 + resamples, columns)
    ends = np.cumsum([block.shape[1] for block in blocks])

    scores = {}
    for (name, measure), known, block in zip(measures.items(), labels, np.split(sums, ends[:-1], axis=1), strict=True):
        n, statistics = block[:, 0], np.split(block[:, 1:], max(1, len(known)), axis=1)
        # (1 + resamples,) each, the score itself first
        values = {label: measure.from_sums(of_side, n) for label, of_side in zip(known, statistics, strict=False)}
        scores[name] = _score(measure, values, int(n[0]) if values else 0)
    return scores


def _is_finite(statistics: np.ndarray) -> np.ndarray:
    return np.isfinite(statistics).all(axis=1, keepdims=True)  # (n, 1)


def _score(measure: Measure, values: Mapping[str, np.ndarray], n: int) -> dict[str, Any]:
    baseline, tuned = (finite(values[label][0]) if label in values else None for label in ("baseline", "tuned"))
    delta = None if tuned is None or baseline is None else tuned - baseline
    interval = None
    if measure.resampled and tuned is not None and n > 1:
        with np.errstate(invalid="ignore"):  # infinite perplexities
            resampled = values["tuned"][1:] if delta is None else values["tuned"][1:] - values["baseline"][1:]
            # where few examples have the score, a resample may hold none of them
            bounds = [finite(bound) for bound in np.quantile(resampled[~np.isnan(resampled)], [0.025, 0.975])]
        interval = None if None in bounds else bounds
    return {"baseline": baseline, "tuned": tuned, "delta": delta, "ci95": interval, "better": measure.better, "n": n}


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


def _statistics(
    measures: Mapping[str, Measure], predictions: Sequence[Mapping[str, Any]], label: str
) -> dict[str, np.ndarray]:
    answers = [line[label] for line in predictions]
    columns = {
        "predictions": [answer["text"] for answer in answers],
        "references": [line["output"] for line in predictions],
        "stop_reasons": [answer.get("stop_reason") for answer in answers],
        "loss_sums": [answer.get("reference_loss") for answer in answers],
        "token_counts": [answer.get("reference_tokens") for answer in answers],
    }
    return {
        name: measure.statistics(*(columns[feature] for feature in measure.features))
        for name, measure in measures.items()
    }


def _check(predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    if not predictions:
        raise UserError("no predictions to score: the split is empty; name another one, or give it records")
    ids = [str(line.get("id", f"line {number}")) for number, line in enumerate(predictions, start=1)]
    problems = {"occur more than once": [id_ for id_, count in Counter(ids).items() if count > 1]}
    texts = {"have no reference in 'output'": [line.get("output") for line in predictions]}
    for label in labels:
        answers = [line.get(label) for line in predictions]
        texts[f"have no answer of {label!r}"] = [a.get("text") if isinstance(a, Mapping) else None for a in answers]
    for problem, column in texts.items():
        problems[problem] = [id_ for id_, text in zip(ids, column, strict=True) if not isinstance(text, str)]
    for problem, affected in problems.items():
        if affected:
            raise UserError(
                f"{len(affected)} ({', '.join(affected[:5])}{', ...' if len(affected) > 5 else ''}) of {len(ids)} ids "
                f"{problem}, so the models cannot be compared on the same prompts (there are answers of "
                f"{', '.join(labels_of(predictions)) or 'no model'}); generate what is missing, or remove these ids"
            )
