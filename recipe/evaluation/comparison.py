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
NO_NUMBERS = "what the model computes is NaN or infinite, though its weights are finite; try --dtype float32"
TOO_LARGE = "it is larger than a number can be"
OTHER_TOKENIZER = "the models' tokenizers differ, so tokens are not the same unit; compare the bits per byte"
DRAWN_AT_ONCE = 1_000_000  # bounds the memory of resampling to about 30 MB, for any number of examples


def labels_of(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The models that answered: `baseline` first, `tuned` next, others in the order of their first answers.

    >>> labels_of([{"id": "test/0", "output": "cats", "tuned": {"text": "cats"}, "baseline": {"text": "cat"}}])
    ['baseline', 'tuned']
    """
    labels = dict.fromkeys(key for line in predictions for key, value in line.items() if isinstance(value, Mapping))
    return sorted(labels, key=lambda label: {"baseline": 0, "tuned": 1}.get(label, 2))


def compare(
    predictions: Sequence[Mapping[str, Any]],
    model: str = "tuned",
    baseline: str = "baseline",
    tokenizers: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Scores of a model beside its baseline, as `metrics.json` holds them.

    Args:
        predictions: lines of `predictions.jsonl`: `id`, `output` (the reference), `family` if the data has one, and
            under each model's label its `text` and, if known, `stop_reason`, `reference_loss` (nats) and
            `reference_tokens`.
        model: the label of the answers to score; its scores are named `tuned`.
        baseline: the label of the answers to compare with; without them there are no differences.
        tokenizers: for each label what identifies its tokenizer, where that is known. Losses per token of different
            tokenizers are not compared: with the baseline, or without one with the model `tuned`. References of another
            number of tokens show a different one, too.

    Returns:
        `n`; `metrics` and `behaviour`: see `paired_scores`; `families`: the `n` and `metrics` of each; `outcomes`: for
        each metric of single examples, on how many the model was better (`win`), equal (`tie`) and worse (`loss`).

    Raises:
        UserError: no predictions, or predictions that do not pair: an id that occurs twice, or without an answer.

    Example::

        compare(predictions)["metrics"]["exact_match"]
        # {'baseline': 0.1, 'tuned': 0.8, 'delta': 0.7, 'ci95': [0.62, 0.78], 'p': 1e-16, 'better': 'higher', 'n': 110}
    """
    paired = baseline in labels_of(predictions) and baseline != model
    _check(predictions, [baseline, model] if paired else [model])
    tuned = _statistics(MEASURES, predictions, model)
    base = _statistics(MEASURES, predictions, baseline) if paired else None
    beside = baseline if paired else "tuned"  # what a reader compares it with
    per_token = beside in labels_of(predictions) and _tokenizers_differ(predictions, model, beside, tokenizers or {})
    scores = _without_loss_per_token(paired_scores(MEASURES, tuned, base), per_token)
    for label, side in {model: "tuned", **({baseline: "baseline"} if paired else {})}.items():
        for name in ("reference_loss", "perplexity", "bits_per_byte"):
            if scores[name][side] is None and any(is_not_a_number(line[label]) for line in predictions):
                scores[name]["reason"] = NO_NUMBERS

    families = {}
    for family in dict.fromkeys(line.get("family") for line in predictions if line.get("family")):
        rows = np.array([line.get("family") == family for line in predictions])
        of_tuned = {name: tuned[name][rows] for name in METRICS}
        of_base = {name: base[name][rows] for name in METRICS} if base else None
        of_family = _without_loss_per_token(paired_scores(METRICS, of_tuned, of_base), per_token)
        families[family] = {"n": int(rows.sum()), "metrics": of_family}
    return {
        "n": len(predictions),
        "metrics": {name: scores[name] for name in METRICS},
        "behaviour": {name: scores[name] for name in BEHAVIOUR},
        "families": families,
        "outcomes": _outcomes(tuned, base) if base else {},
    }


def is_not_a_number(answer: Mapping[str, Any]) -> bool:
    """Whether a model's outputs for the reference were NaN or infinite: it has tokens, and a loss that is null."""
    return answer.get("reference_tokens") is not None and answer.get("reference_loss", 0) is None


def _tokenizers_differ(
    predictions: Sequence[Mapping[str, Any]], model: str, baseline: str, tokenizers: Mapping[str, str | None]
) -> bool:
    """Whether the same reference is another number of tokens for the two models, or may be."""
    one, other = tokenizers.get(model), tokenizers.get(baseline)
    counts = ((line[model].get("reference_tokens"), line[baseline].get("reference_tokens")) for line in predictions)
    return bool(one and other and one != other) or any(None not in pair and pair[0] != pair[1] for pair in counts)


def _without_loss_per_token(scores: dict[str, dict[str, Any]], differ: bool) -> dict[str, dict[str, Any]]:
    """The scores, without what losses per token of different tokenizers would say of which model is better."""
    if differ:
        nothing = {"delta": None, "ci95": None, "p": None, "reason": OTHER_TOKENIZER}
        if None not in (scores["reference_loss"]["tuned"], scores["reference_loss"]["delta"]):
            scores["reference_loss"] |= nothing
        if scores["reference_loss"]["tuned"] is not None:
            scores["perplexity"] |= {**nothing, "baseline": None, "tuned": None, "n": 0}
    return scores


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

    The p-value of a difference is that of a paired permutation test (approximate randomization: Noreen 1989): how often
    a difference at least as large arises where each example's two answers change sides at random. See `swap_p_value`.

    Args:
        tuned, baseline: for each measure the statistics of each example, (n, k). An example that is not finite on one
            side is left out on both; a side without any finite example is missing.

    Returns:
        for each measure `baseline`, `tuned`, their `delta`, its `ci95` [low, high] and two-sided `p`, `better` as in
        `Measure`, and `n`, the examples that count; None where undefined, and `reason` where a score is. Without a
        baseline `ci95` belongs to the tuned score. It is None for a single example, and for distinct-2, which resamples
        underestimate: they repeat bigrams.
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
    swapped = sums[:1]
    if baseline is not None:
        swapped = np.vstack([swapped, _swapped_sums(blocks, labels, resamples, seed)])

    scores = {}
    parts = (np.split(table, ends[:-1], axis=1) for table in (sums, swapped))
    for (name, measure), known, drawn, turned in zip(measures.items(), labels, *parts, strict=True):
        # (1 + resamples,) each, the score itself first
        values, of_swapped = _values(measure, known, drawn), _values(measure, known, turned)
        scores[name] = _score(measure, values, of_swapped, int(drawn[0, 0]) if values else 0, list(sides))
    return scores


def _values(measure: Measure, known: Sequence[str], sums: np.ndarray) -> dict[str, np.ndarray]:
    """The score of each side from the sums of a block: how many examples count, then the statistics of each side."""
    n, statistics = sums[:, 0], np.split(sums[:, 1:], max(1, len(known)), axis=1)
    return {label: measure.from_sums(of_side, n) for label, of_side in zip(known, statistics, strict=False)}


def _swapped_sums(
    blocks: Sequence[np.ndarray], labels: Sequence[Sequence[str]], resamples: int, seed: int
) -> np.ndarray:
    """The sums of all blocks where, in each of the resamples, each example's sides are swapped with a chance of 1/2."""
    gains = []  # what the sum of a column gains if an example's sides are swapped
    for block, known in zip(blocks, labels, strict=True):
        first, second = np.split(block[:, 1:], 2, axis=1) if len(known) == 2 else (block[:, 1:], block[:, 1:])
        gain = [second - first, first - second] if len(known) == 2 else [np.zeros_like(first)]
        gains.append(np.hstack([np.zeros((len(block), 1)), *gain]))
    joined, totals = np.hstack(gains), np.hstack(blocks).sum(axis=0)
    generator, n, sums = np.random.default_rng([seed, 1]), len(joined), []
    at_once = max(1, DRAWN_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        swaps = np.unpackbits(np.frombuffer(generator.bytes(size * n // 8 + 1), np.uint8), count=size * n)
        sums.append(totals + swaps.reshape(size, n).astype(np.float64) @ joined)
    return np.concatenate(sums)


def _is_finite(statistics: np.ndarray) -> np.ndarray:
    return np.isfinite(statistics).all(axis=1, keepdims=True)  # (n, 1)


def _score(
    measure: Measure, values: Mapping[str, np.ndarray], swapped: Mapping[str, np.ndarray], n: int, sides: Sequence[str]
) -> dict[str, Any]:
    baseline, tuned = (finite(values[label][0]) if label in values else None for label in ("baseline", "tuned"))
    delta = None if tuned is None or baseline is None else tuned - baseline
    interval = p_value = None
    if measure.resampled and tuned is not None and n > 1:
        with np.errstate(invalid="ignore"):  # infinite perplexities
            resampled = values["tuned"][1:] if delta is None else values["tuned"][1:] - values["baseline"][1:]
            # where few examples have the score, a resample may hold none of them
            bounds = [finite(bound) for bound in np.quantile(resampled[~np.isnan(resampled)], [0.025, 0.975])]
            if delta is not None:
                p_value = swap_p_value(delta, (swapped["tuned"] - swapped["baseline"])[1:])
        interval = None if None in bounds else bounds
    found = {"baseline": baseline, "tuned": tuned, "delta": delta, "ci95": interval, "p": p_value}
    missing = [side for side in sides if found[side] is None]
    reason = TOO_LARGE if any(side in values and np.isinf(values[side][0]) for side in missing) else measure.missing
    if len(missing) < len(sides):
        reason += f" ({', '.join({'baseline': 'base'}.get(side, side) for side in missing)})"
    return {**found, "better": measure.better, "n": n, **({"reason": reason} if missing else {})}


def swap_p_value(delta: float, swapped: np.ndarray) -> float:
    """Two-sided p-value of a difference, given the differences where the models' answers were swapped at random.

    It is the share of those at least as large, each counted with the difference itself (Phipson and Smyth 2010), and so
    never below one in their number. Where that is too coarse for many comparisons, Hoeffding's bound for a sum of
    independent signs is smaller: 2 exp(-z²/2), where z is the difference over the standard deviation of the swapped
    ones. For a mean it bounds the exact p-value; for corpus scores it does so approximately.

    >>> swap_p_value(0.5, np.array([0.5, -0.5, 0.25, -0.25])), swap_p_value(0.0, np.zeros(9))
    (0.6, 1.0)
    """
    at_least = int((~(np.abs(swapped) < abs(delta) * (1 - 1e-9) - 1e-15)).sum())  # what is not a number counts
    share = (1 + at_least) / (1 + len(swapped))
    variance = float(np.mean(np.square(swapped)))
    bound = 2 * float(np.exp(-(delta**2) / (2 * variance))) if variance > 0 and np.isfinite(variance) else 1.0
    return min(share, bound)


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


def paired_p_value(gains: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of a mean of paired differences (n,): its examples change sides at random, see `swap_p_value`.

    >>> round(paired_p_value(np.array([1.0] * 5)), 2), paired_p_value(np.zeros(5))  # the first: 2 of 2 ** 5 choices
    (0.06, 1.0)
    """
    block = np.column_stack([np.ones(len(gains)), gains, np.zeros(len(gains))])
    sums = _swapped_sums([block], [("tuned", "baseline")], resamples, seed)
    return swap_p_value(float(np.mean(gains)), (sums[:, 1] - sums[:, 2]) / len(gains))


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
