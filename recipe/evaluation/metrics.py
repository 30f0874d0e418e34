"""The scores of `recipe.evaluation.measures` as `evaluate.Metric` classes that need no download, alone or combined.

Fractions from 0 to 1, except the reference loss (nats per token), the perplexity, the bits per byte and the length
ratio. A combination takes the columns of all its metrics, and each metric picks its own::

    evaluate.combine([ExactMatch(), TokenF1(), RougeL(), StopRate()]).compute(
        predictions=["A cat."], references=["The cat."], stop_reasons=["eos"]
    )
    # {'exact_match': 0.0, 'token_f1': 1.0, 'rouge_l': 0.5, 'stop_rate': 1.0}
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

from recipe.evaluation.measures import MEASURES, score

TYPES = {
    "predictions": datasets.Value("string"),
    "references": datasets.Value("string"),
    "stop_reasons": datasets.Value("string"),  # "eos", "length", "context"
    "loss_sums": datasets.Value("float64"),  # nats
    "token_counts": datasets.Value("int64"),
}


def _metric(class_name: str, name: str, description: str) -> type[evaluate.Metric]:
    """A class whose `compute` takes the columns of the measure `name` and returns its score under that name."""
    measure = MEASURES[name]

    class MeasureMetric(evaluate.Metric):
        __doc__ = f"{description}\n\nTakes `{'`, `'.join(measure.features)}`.\n\nSource: {measure.source}."

        def __init__(self) -> None:
            super().__init__(keep_in_memory=True)

        def _info(self) -> evaluate.MetricInfo:
            features = datasets.Features({column: TYPES[column] for column in measure.features})
            return evaluate.MetricInfo(description=description, citation=measure.source, features=features)

        def _compute(self, **columns: Sequence) -> dict[str, float | None]:  # type: ignore[override]
            return {name: score(measure, columns)}  # columns of other metrics in a combination are ignored

    MeasureMetric.__name__ = MeasureMetric.__qualname__ = class_name
    return MeasureMetric


# fmt: off
ExactMatch = _metric("ExactMatch", "exact_match", "Share of pairs for which `exact_match` is 1.")
TokenF1 = _metric("TokenF1", "token_f1", "Mean of `token_f1`.")
RougeL = _metric("RougeL", "rouge_l", "Mean of `rouge_l`.")
ChrF = _metric("ChrF", "chrf",
    "chrF of the corpus, `sacrebleu.corpus_chrf` / 100: n-grams are summed over all pairs before the F2 is computed.")
Bleu = _metric("Bleu", "bleu",
    'BLEU of the corpus, `sacrebleu.corpus_bleu` / 100: 13a tokens (characters in scripts without spaces), up to '
    '4-grams, smoothing "exp"; None where no reference has four tokens.')
ReferenceLoss = _metric("ReferenceLoss", "reference_loss",
    "Cross-entropy of the references given their prompts, in nats per token, the end-of-text token included.\n\n"
    "`recipe.evaluation.likelihood.reference_losses` gives the columns; pairs with None are left out. Comparable only "
    "between models with the same tokenizer.")
Perplexity = _metric("Perplexity", "perplexity", "The exponential of `ReferenceLoss`.")
BitsPerByte = _metric("BitsPerByte", "bits_per_byte",
    "Cross-entropy of the references given their prompts, in bits per byte of their UTF-8 text; the end-of-text token "
    "counts, its bytes do not.\n\n"
    "Takes the nats of `ReferenceLoss`. Comparable between models with different tokenizers.")
StopRate = _metric("StopRate", "stop_rate",
    "Share of responses that the model ended itself, by an end-of-text token; None where a reason is unknown.")
LengthRatio = _metric("LengthRatio", "length_ratio",
    "Words of all predictions per word of all references; words of any script, characters where it has no spaces.")
Distinct2 = _metric("Distinct2", "distinct_2",
    "Different word bigrams per word bigram, over all predictions together; None where there is no bigram.\n\n"
    "Li et al. divide by the number of words; dividing by bigrams is usual today, and a text without repetition "
    "scores 1.")
Repeated4Grams = _metric("Repeated4Grams", "repeated_4grams",
    "Share of a response's word 4-grams that repeat an earlier one in it, averaged; 0 if it has fewer than 4 words.")
EmptyRate = _metric("EmptyRate", "empty_rate", "Share of predictions that are empty or white space.")
# fmt: on
