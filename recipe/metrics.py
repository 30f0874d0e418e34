"""Scores of responses against references: functions for one pair, and `evaluate.Metric` modules that need no download.

Every score is a fraction from 0 to 1, and a module's result is the mean over its pairs. Used alone::

    evaluate.combine([ExactMatch(), TokenF1(), RougeL()]).compute(predictions=["A cat."], references=["The cat."])
    # {'exact_match': 0.0, 'token_f1': 1.0, 'rouge_l': 0.5}
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

Score = Callable[[str, str], float]


def exact_match(prediction: str, reference: str) -> float:
    """1 if both texts are the same but for white space and Unicode composition (NFC); case and punctuation count.

    >>> exact_match("He goes  home.\\n", "He goes home."), exact_match("he goes home", "He goes home.")
    (1.0, 0.0)
    """
    return float(_normalize_space(prediction) == _normalize_space(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as in SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250).

    Words are lower-cased, without punctuation and without the articles a, an, the. Two empty texts score 1.

    >>> token_f1("The cat sat.", "A black cat sat")  # 2 words in common of 2 and of 3
    0.8
    """
    predicted, expected = _squad_words(prediction), _squad_words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), by the package `rouge_score`, without stemming.

    >>> rouge_l("He goes to school.", "He walks to school.")
    0.75
    """
    return _rouge_scorer().score(reference, prediction)["rougeL"].fmeasure


@cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(["rougeL"])


def _normalize_space(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _squad_words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


class ExactMatch(evaluate.Metric):
    """Share of pairs for which `exact_match` is 1; result key `exact_match`."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return _text_metric(exact_match, "Rajpurkar et al., 2016 (arXiv:1606.05250), without its normalisation")

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"exact_match": _mean(exact_match, predictions, references)}


class TokenF1(evaluate.Metric):
    """Mean of `token_f1`; result key `token_f1`."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return _text_metric(token_f1, "Rajpurkar et al., 2016 (arXiv:1606.05250)")

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"token_f1": _mean(token_f1, predictions, references)}


class RougeL(evaluate.Metric):
    """Mean of `rouge_l`; result key `rouge_l`."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return _text_metric(rouge_l, "Lin, 2004: ROUGE, a package for automatic evaluation of summaries")

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"rouge_l": _mean(rouge_l, predictions, references)}


def _text_metric(score: Score, citation: str) -> evaluate.MetricInfo:
    text = datasets.Value("string")
    return evaluate.MetricInfo(
        description=score.__doc__ or "",
        citation=citation,
        features=datasets.Features({"predictions": text, "references": text}),
    )


def _mean(score: Score, predictions: Sequence[str], references: Sequence[str]) -> float:
    if not predictions:
        raise ValueError("no predictions to score")
    return float(per_example(score, predictions, references).mean())


def per_example(score: Score, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """One score a pair, (pairs,) float64: what intervals and task families are made of."""
    return np.array([score(*pair) for pair in zip(predictions, references, strict=True)], dtype=np.float64)


def bootstrap_interval(scores: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean (Efron 1979); give paired differences for a paired interval.

    >>> bootstrap_interval(np.array([0.0, 1.0] * 50))
    (0.4, 0.6)
    """
    generator = np.random.default_rng(seed)
    # resampling n of n with replacement draws each score's count from a multinomial; in slices, to bound memory
    n, size = len(scores), max(1, 10_000_000 // len(scores))
    means = np.concatenate(
        [
            scores[generator.integers(0, n, size=(min(size, resamples - start), n))].mean(axis=1)
            for start in range(0, resamples, size)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


SCORES: dict[str, Score] = {"exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l}


def summarize(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of tuned beside baseline responses, as they stand in `metrics.json`.

    Args:
        predictions: one mapping an id with `output` (the reference), `tuned` and, for a comparison, `baseline`:
            mappings with `text` and `stop_reason` (None if unknown). With `family`, exact match is given by family.

    Returns:
        `n`; `metrics`: for each the mean of `baseline` and `tuned`, their `delta` and `ci95`, the paired bootstrap
        interval of the delta (of the tuned score where there is no baseline); `behaviour`: the `stop_rate`, the share
        of responses that ended by an end-of-text token; `families`.

    Raises:
        ValueError: no predictions.
    """
    if not predictions:
        raise ValueError("no predictions to score")
    models = ["baseline", "tuned"] if "baseline" in predictions[0] else ["tuned"]
    references = [prediction["output"] for prediction in predictions]
    metrics, exact = {}, {}
    for name, score in SCORES.items():
        scores = {model: per_example(score, [p[model]["text"] for p in predictions], references) for model in models}
        baseline = scores.get("baseline")
        difference = scores["tuned"] if baseline is None else scores["tuned"] - baseline
        metrics[name] = {
            "baseline": None if baseline is None else float(baseline.mean()),
            "tuned": float(scores["tuned"].mean()),
            "delta": None if baseline is None else float(difference.mean()),
            "ci95": list(bootstrap_interval(difference)),
        }
        if score is exact_match:
            exact = scores
    families: dict[str, dict] = {}
    for family in dict.fromkeys(p["family"] for p in predictions if p.get("family") is not None):
        rows = [index for index, p in enumerate(predictions) if p.get("family") == family]
        families[family] = {"n": len(rows), "exact_match": {m: float(exact[m][rows].mean()) for m in models}}
    return {
        "n": len(predictions),
        "metrics": metrics,
        "behaviour": {"stop_rate": {model: _stop_rate(predictions, model) for model in models}},
        "families": families,
    }


def _stop_rate(predictions: Sequence[Mapping[str, Any]], model: str) -> float | None:
    reasons = [prediction[model]["stop_reason"] for prediction in predictions]
    return None if None in reasons else sum(reason == "eos" for reason in reasons) / len(reasons)
