"""What each score is: functions of one pair of texts, and `METRICS` and `BEHAVIOUR` for many examples.

The score of many examples is computed in two steps: statistics of each example, then a function of their sums. The
score of a whole split, of one task family and of a bootstrap resample differ only in the examples that are summed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rouge_score.scoring import fmeasure
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.helpers import extract_all_char_ngrams

from recipe.evaluation.words import answer_words, apart, composed, words

CHAR_ORDER = 6  # chrF's longest character n-gram, as in sacrebleu
WORD_ORDER = 4  # BLEU's longest word n-gram

# --- one pair -------------------------------------------------------------------------------------------------------


def exact_match(prediction: str, reference: str) -> float:
    """1 if both texts are the same except for white space and Unicode composition (NFC); case and punctuation count.

    >>> exact_match("He goes  home.\\n", "He goes home."), exact_match("he goes home", "He goes home.")
    (1.0, 0.0)
    """
    predicted, expected = (" ".join(composed(text).split()) for text in (prediction, reference))
    return float(predicted == expected)


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as in SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250).

    Words are those of `recipe.evaluation.words.answer_words`: in lower case, without punctuation and articles, but with
    the signs that SQuAD loses, and characters in scripts without spaces. Two empty texts score 1.

    >>> token_f1("The cat sat.", "A black cat sat")  # 2 words in common of 2 and of 3
    0.8
    >>> token_f1("5", "-5"), token_f1("", "A")
    (0.0, 0.0)
    """
    predicted, expected = answer_words(prediction), answer_words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), as in the package `rouge_score`, unstemmed.

    Words are those of `recipe.evaluation.words.words`, of any script; for text of a-z and 0-9 they are the package's.

    >>> rouge_l("He goes to school.", "He walks to school."), rouge_l("答案是水。", "答案是火。")
    (0.75, 0.75)
    """
    predicted, expected = words(prediction), words(reference)
    if not predicted or not expected:
        return 0.0
    common = _longest_common_subsequence(predicted, expected)
    return float(fmeasure(common / len(predicted), common / len(expected)))


def chrf(prediction: str, reference: str) -> float:
    """F2-measure of character 1- to 6-grams without white space (Popović 2015), as `sacrebleu.sentence_chrf` / 100.

    Texts are put into Unicode's composed form (NFC) first.

    >>> round(chrf("He goes to school.", "He walks to school."), 3)
    0.589
    """
    return float(_chrf_from_sums(_chrf_statistics([prediction], [reference])[0], 1))


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length; each row of the usual table is held in the bits of one integer (Hyyrö 2004, bit-parallel LCS).

    The table of `rouge_score` takes minutes and gigabytes for two texts of 100 kB; this takes a tenth of a second.
    """
    positions: dict[str, int] = {}  # word → bits of the positions in `a` that hold it
    for index, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << index
    all_bits = (1 << len(a)) - 1
    row = all_bits  # a zero bit is a position where the length grows by one
    for word in b:
        matches = row & positions.get(word, 0)
        row = (row + matches | row - matches) & all_bits
    return len(a) - row.bit_count()


# --- statistics of each example, (n, k), and scores from their sums -------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """How a score is computed.

    Attributes:
        title: its name for people.
        features: the columns that it needs: `predictions` and `references` (texts), `stop_reasons` ("eos", "length",
            "context"), `loss_sums` (nats) and `token_counts`. In the last three None means unknown.
        statistics: takes these columns of n examples, returns (n, k) float64; not finite where the score is missing.
        from_sums: takes sums (..., k) over examples and their number (...), returns scores (...), NaN if undefined.
        better: whether "higher" or "lower" is an improvement; None if neither is.
        source: where its definition comes from.
        per_example: whether a single example has this score.
        resampled: False if the score of examples drawn with replacement does not estimate the score.
        missing: why a score is missing, where it is.
    """

    title: str
    features: tuple[str, ...]
    statistics: Callable[..., np.ndarray]
    from_sums: Callable[[np.ndarray, Any], np.ndarray]
    better: Literal["higher", "lower"] | None
    source: str
    per_example: bool = False
    resampled: bool = True
    missing: str = "it cannot be computed"


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


def _mean(sums: np.ndarray, n: Any) -> np.ndarray:
    return _ratio(sums[..., 0], np.asarray(n))


def _ratio_of_sums(sums: np.ndarray, n: Any) -> np.ndarray:
    return _ratio(sums[..., 0], sums[..., 1])


def _each(score: Callable[..., float]) -> Callable[..., np.ndarray]:
    """The statistics of a mean: the score of each example, (n, 1)."""

    def statistics(*columns: Sequence) -> np.ndarray:
        return np.array([score(*row) for row in zip(*columns, strict=True)], dtype=np.float64).reshape(-1, 1)

    return statistics


def _chrf_statistics(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(n, 18): for each order the n-grams of the prediction, those of the reference, and those in common."""
    rows = []
    for texts in zip(predictions, references, strict=True):
        row: list[int] = []
        for predicted, expected in zip(*(extract_all_char_ngrams(composed(t), CHAR_ORDER) for t in texts), strict=True):
            common = sum(min(count, expected[gram]) for gram, count in predicted.items() if gram in expected)
            # as in sacrebleu, the prediction's n-grams count only where the reference has some of that order
            row += [predicted.total() if expected else 0, expected.total(), common]
        rows.append(row)
    return np.array(rows, dtype=np.float64)


def _chrf_from_sums(sums: np.ndarray, n: Any) -> np.ndarray:
    """F2 of the mean precision and the mean recall over the orders that both sides have, sacrebleu's default."""
    predicted, expected, common = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]  # each (..., order)
    counted = (predicted > 0) & (expected > 0)
    orders = np.maximum(counted.sum(-1), 1)
    precision = (counted * common / np.maximum(predicted, 1)).sum(-1) / orders
    recall = (counted * common / np.maximum(expected, 1)).sum(-1) / orders
    return np.nan_to_num(_ratio(5 * precision * recall, 4 * precision + recall))  # nothing in common scores 0


def _bleu_statistics(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(n, 11): for each order the n-grams in common, those of the prediction; both lengths in tokens, 4-grams expected.

    Characters of scripts without spaces are tokens, as in sacrebleu's tokenizer `zh`; else its `13a` finds the tokens.
    """
    scorer = BLEU(effective_order=True)  # does not change the counts, and stops a warning for each sentence
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.sentence_score(apart(composed(p)), [apart(composed(r))]) for p, r in pairs]
    rows = [[*s.counts, *s.totals, s.sys_len, s.ref_len, max(0, s.ref_len - WORD_ORDER + 1)] for s in scores]
    return np.array(rows, dtype=np.float64)


def _bleu_from_sums(sums: np.ndarray, n: Any) -> np.ndarray:
    """Geometric mean of the precisions times the brevity penalty, smoothed as in NIST's script (sacrebleu's "exp").

    NaN where no reference has a 4-gram: right answers would have a precision of 0 of 0.
    """
    common, predicted = sums[..., :WORD_ORDER], sums[..., WORD_ORDER : 2 * WORD_ORDER]  # each (..., order)
    length, expected_length, expected_4grams = sums[..., -3], sums[..., -2], sums[..., -1]
    # the first order without a match counts half a match, the next a quarter, ...
    matches = np.where(common == 0, 0.5 ** np.cumsum(common == 0, axis=-1), common)
    logarithms = np.log(matches / np.maximum(predicted, 1))
    brevity = np.exp(np.minimum(0, 1 - expected_length / np.maximum(length, 1)))
    score = brevity * np.exp(logarithms.mean(-1))
    return np.where(expected_4grams > 0, np.where(common.any(-1) & predicted.all(-1), score, 0.0), np.nan)


def _loss_statistics(loss_sums: Sequence[float | None], token_counts: Sequence[int | None]) -> np.ndarray:
    """(n, 2): nats and targets."""
    return np.array([loss_sums, token_counts], dtype=np.float64).T  # None becomes NaN


def _perplexity_from_sums(sums: np.ndarray, n: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(_ratio_of_sums(sums, n))


def _bits_statistics(loss_sums: Sequence[float | None], references: Sequence[str]) -> np.ndarray:
    """(n, 2): bits and bytes of UTF-8."""
    bits = np.array(loss_sums, dtype=np.float64) / math.log(2)  # None becomes NaN
    return np.column_stack([bits, [float(len(text.encode("utf-8", "replace"))) for text in references]])


def _stop_statistics(stop_reasons: Sequence[str | None]) -> np.ndarray:
    """(n, 1); one unknown reason makes the whole score unknown: missing values are rarely missing at random."""
    if None in stop_reasons:
        return np.full((len(stop_reasons), 1), np.nan)
    return _each(lambda reason: reason == "eos")(stop_reasons)


def _length_statistics(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(n, 2): words of the prediction and of the reference."""
    pairs = zip(predictions, references, strict=True)
    return np.array([[len(words(p)), len(words(r))] for p, r in pairs], dtype=np.float64)


def _distinct_statistics(predictions: Sequence[str]) -> np.ndarray:
    """(n, 2): bigrams that no earlier prediction has, and all bigrams."""
    seen: set[tuple[str, ...]] = set()
    rows = []
    for prediction in predictions:
        bigrams, before = _ngrams(prediction, 2), len(seen)
        seen.update(bigrams)
        rows.append([len(seen) - before, len(bigrams)])
    return np.array(rows, dtype=np.float64)


def _repeated_4grams(prediction: str) -> float:
    ngrams = _ngrams(prediction, 4)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _ngrams(text: str, order: int) -> list[tuple[str, ...]]:
    found = words(text)
    return list(zip(*(found[start:] for start in range(order)), strict=False))


# --- the tables -----------------------------------------------------------------------------------------------------

TEXTS = ("predictions", "references")
LOSSES = ("loss_sums", "token_counts")
SQUAD = "Rajpurkar et al. 2016, SQuAD, arXiv:1606.05250"

NO_LOSS = "the likelihood of the references is not known, as of served and of recorded answers"

METRICS: dict[str, Measure] = {
    "exact_match": Measure("Exact match", TEXTS, _each(exact_match), _mean, "higher",
        f"{SQUAD}, without its normalisation", per_example=True),
    "token_f1": Measure("Token F1", TEXTS, _each(token_f1), _mean, "higher", SQUAD, per_example=True),
    "rouge_l": Measure("ROUGE-L", TEXTS, _each(rouge_l), _mean, "higher",
        "Lin 2004, ROUGE: a package for automatic evaluation of summaries", per_example=True),
    "chrf": Measure("chrF", TEXTS, _chrf_statistics, _chrf_from_sums, "higher",
        "Popović 2015, chrF: character n-gram F-score for automatic MT evaluation", per_example=True),
    "bleu": Measure("BLEU", TEXTS, _bleu_statistics, _bleu_from_sums, "higher",
        "Papineni et al. 2002, BLEU; Post 2018, sacreBLEU, arXiv:1804.08771",
        missing="no reference has four words, so no 4-gram can match"),
    "reference_loss": Measure("Reference loss", LOSSES, _loss_statistics, _ratio_of_sums, "lower",
        "Bengio et al. 2003, A neural probabilistic language model", missing=NO_LOSS),
    "perplexity": Measure("Perplexity", LOSSES, _loss_statistics, _perplexity_from_sums, "lower",
        "Jelinek et al. 1977, Perplexity: a measure of the difficulty of speech recognition tasks", missing=NO_LOSS),
    "bits_per_byte": Measure("Bits per byte", ("loss_sums", "references"), _bits_statistics, _ratio_of_sums, "lower",
        "Gao et al. 2020, The Pile, arXiv:2101.00027", missing=NO_LOSS),
}  # fmt: skip

BEHAVIOUR: dict[str, Measure] = {
    "stop_rate": Measure("Stop rate", ("stop_reasons",), _stop_statistics, _mean, "higher",
        "Welleck et al. 2020, Consistency of a recurrent language model, arXiv:2002.02492 (its complement)",
        missing="it is not known how each response ended"),
    "length_ratio": Measure("Length ratio", TEXTS, _length_statistics, _ratio_of_sums, None,
        "Papineni et al. 2002, BLEU (the ratio in its brevity penalty)", missing="no reference has a word"),
    "distinct_2": Measure("Distinct-2", ("predictions",), _distinct_statistics, _ratio_of_sums, "higher",
        "Li et al. 2016, A diversity-promoting objective function, arXiv:1510.03055",
        missing="no response has two words", resampled=False),
    "repeated_4grams": Measure("Repeated 4-grams", ("predictions",), _each(_repeated_4grams), _mean, "lower",
        "Welleck et al. 2020, Neural text generation with unlikelihood training, arXiv:1908.04319 (seq-rep-4)"),
    "empty_rate": Measure("Empty rate", ("predictions",), _each(lambda text: not text.strip()), _mean, "lower",
        "the share of responses without any text"),
}  # fmt: skip

MEASURES = {**METRICS, **BEHAVIOUR}


def score(measure: Measure, columns: Mapping[str, Sequence]) -> float | None:
    """One score over all examples that have it; None where none has, or where it is undefined or infinite.

    Raises:
        ValueError: no examples.
    """
    statistics = measure.statistics(*(columns[feature] for feature in measure.features))
    if len(statistics) == 0:
        raise ValueError(f"{measure.title}: no predictions to score")
    present = statistics[np.isfinite(statistics).all(axis=1)]
    return finite(measure.from_sums(present.sum(axis=0), len(present)))


def finite(value: Any) -> float | None:
    """A plain float; None for NaN and infinity, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def score_responses(
    texts: Sequence[str], references: Sequence[str], stop_reasons: Sequence[str] | None = None
) -> dict[str, float]:
    """The scores of one model's responses that need no model; without `stop_reasons` no `stop_rate`.

    >>> scores = score_responses(["cats", "dog dog"], ["cats", "dogs"], ["eos", "length"])
    >>> scores["exact_match"], scores["stop_rate"], scores["length_ratio"]
    (0.5, 0.5, 1.5)

    Raises:
        ValueError: no responses.
    """
    columns: dict[str, Sequence] = {"predictions": texts, "references": references}
    if stop_reasons is not None:
        columns["stop_reasons"] = stop_reasons
    scores = {name: score(m, columns) for name, m in MEASURES.items() if columns.keys() >= set(m.features)}
    return {name: value for name, value in scores.items() if value is not None}
