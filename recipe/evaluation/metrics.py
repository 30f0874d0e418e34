"""Scores of responses as `evaluate.Metric` modules that need no download, alone or combined.

Fractions from 0 to 1, but for the reference loss (nats per token), the perplexity and the length ratio. A combination
takes the features of all its modules; each picks its own::

    evaluate.combine([ExactMatch(), TokenF1(), RougeL(), StopRate()]).compute(
        predictions=["A cat."], references=["The cat."], stop_reasons=["eos"]
    )
    # {'exact_match': 0.0, 'token_f1': 1.0, 'rouge_l': 0.5, 'stop_rate': 1.0}

The scores themselves are in `recipe.evaluation.measures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import datasets
import evaluate

from recipe.evaluation.measures import BEHAVIOUR, METRICS, Measure, score

_FEATURES = {
    "predictions": datasets.Value("string"),
    "references": datasets.Value("string"),
    "stop_reasons": datasets.Value("string"),
    "loss_sums": datasets.Value("float64"),
    "token_counts": datasets.Value("int64"),
}


class _Module(evaluate.Metric):
    """What `evaluate` asks of a module, from the measure of that name; features of other modules are left alone."""

    key: ClassVar[str]

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    @classmethod
    def measure(cls) -> Measure:
        return {**METRICS, **BEHAVIOUR}[cls.key]

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({feature: _FEATURES[feature] for feature in self.measure().features})
        return evaluate.MetricInfo(description=self.__doc__ or "", citation=self.measure().source, features=features)

    def _compute(self, **columns: Sequence) -> dict[str, float | None]:  # type: ignore[override]
        return {self.key: score(self.measure(), columns)}


class ExactMatch(_Module):
    """Share of pairs for which `exact_match` is 1.

    >>> ExactMatch().compute(predictions=["A cat.", "Two  cats."], references=["The cat.", "Two cats."])
    {'exact_match': 0.5}
    """

    key = "exact_match"


class TokenF1(_Module):
    """Mean of `token_f1`.

    >>> TokenF1().compute(predictions=["A cat."], references=["The cat."])
    {'token_f1': 1.0}
    """

    key = "token_f1"


class RougeL(_Module):
    """Mean of `rouge_l`.

    >>> RougeL().compute(predictions=["A cat."], references=["The cat."])
    {'rouge_l': 0.5}
    """

    key = "rouge_l"


class ChrF(_Module):
    """chrF of the corpus, `sacrebleu.corpus_chrf` / 100: n-grams are summed over all pairs before the F2 is taken.

    >>> result = ChrF().compute(predictions=["abcd", "x"], references=["abcd", "y"])
    >>> round(result["chrf"], 4)  # 4 of 5 letters, and all 2-, 3- and 4-grams
    0.95
    """

    key = "chrf"


class Bleu(_Module):
    """BLEU of the corpus, `sacrebleu.corpus_bleu` / 100: 13a tokens, up to 4-grams, smoothing "exp".

    >>> Bleu().compute(predictions=["a b c d"], references=["a b c d"])
    {'bleu': 1.0}
    """

    key = "bleu"


class ReferenceLoss(_Module):
    """Cross-entropy of the references given their prompts, in nats per token, the end-of-text token included.

    `loss_sums` (nats) and `token_counts` are what `recipe.evaluation.likelihood.reference_losses` gives; pairs with
    None are left out. Comparable only between models with the same tokenizer.

    >>> ReferenceLoss().compute(loss_sums=[2.0, 4.0, None], token_counts=[1, 3, None])
    {'reference_loss': 1.5}
    """

    key = "reference_loss"


class Perplexity(_Module):
    """The exponential of `ReferenceLoss`.

    >>> Perplexity().compute(loss_sums=[0.0, 0.0], token_counts=[1, 3])
    {'perplexity': 1.0}
    """

    key = "perplexity"


class StopRate(_Module):
    """Share of responses that the model ended itself, by an end-of-text token; None where a reason is not known.

    >>> StopRate().compute(stop_reasons=["eos", "eos", "length", "context"])
    {'stop_rate': 0.5}
    """

    key = "stop_rate"


class LengthRatio(_Module):
    """Words of all predictions per word of all references, words being what white space separates.

    >>> LengthRatio().compute(predictions=["one two three"], references=["one two"])
    {'length_ratio': 1.5}
    """

    key = "length_ratio"


class Distinct2(_Module):
    """Different word bigrams per word bigram, over all predictions together; None where there is no bigram.

    Li et al. divide by the number of words; bigrams are the custom today, so that a text without repetition scores 1.

    >>> Distinct2().compute(predictions=["a b a b", "a b"])  # "a b", "b a" of four
    {'distinct_2': 0.5}
    """

    key = "distinct_2"


class Repeated4Grams(_Module):
    """Share of a response's word 4-grams that repeat an earlier one of it, averaged; 0 if it has fewer than 4 words.

    >>> Repeated4Grams().compute(predictions=["a a a a a", "a b c"])  # a half, and none
    {'repeated_4grams': 0.25}
    """

    key = "repeated_4grams"


class EmptyRate(_Module):
    """Share of predictions that are empty or white space.

    >>> EmptyRate().compute(predictions=["", "\\n", "a", "b"])
    {'empty_rate': 0.5}
    """

    key = "empty_rate"
