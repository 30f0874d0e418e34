"""Your own score, on the answers that `scripts/eval.py` wrote, with a paired interval.

    python examples/custom_metric.py
    python examples/custom_metric.py --predictions outputs/demo-eval/predictions.jsonl

The score: does an answer state the numbers of its reference, and no others? Records whose reference has no number do
not have the score. It is written in two ways, and neither needs a change to the recipe: as a `Measure` (statistics of
each example, and a score from their sums), which gives intervals as in `metrics.json`; and as an `evaluate.Metric`,
which combines with those of the recipe.
"""

import argparse
import re
from pathlib import Path

import datasets
import evaluate
import numpy as np

from recipe.evaluation.answers import read_answers
from recipe.evaluation.comparison import paired_scores
from recipe.evaluation.measures import Measure, score
from recipe.evaluation.metrics import ExactMatch


def numbers(text: str) -> list[str]:
    """The numbers of a text, in order.

    >>> numbers("There are 96 inches in 8 feet.")
    ['96', '8']
    """
    return re.findall(r"\d+(?:\.\d+)?", text)


def number_statistics(predictions: list[str], references: list[str]) -> np.ndarray:
    """1 or 0 for each example, (n, 1) float64; NaN for those that do not have the score."""
    rows = [
        float(numbers(predicted) == numbers(expected)) if numbers(expected) else np.nan
        for predicted, expected in zip(predictions, references, strict=True)
    ]
    return np.array(rows)[:, None]


NUMBERS_RIGHT = Measure(
    title="Numbers right",
    features=("predictions", "references"),
    statistics=number_statistics,
    from_sums=lambda sums, n: sums[..., 0] / n,
    better="higher",
    source="this example",
)


class NumbersRight(evaluate.Metric):
    """Share of answers with the numbers of their reference, among those whose reference has any."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | None]:
        return {"numbers_right": score(NUMBERS_RIGHT, {"predictions": predictions, "references": references})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, default="examples/predictions.jsonl", help="of scripts/eval.py")
    options = parser.parse_args()

    rows = list(read_answers(options.predictions, strict=True).values())
    references = [row["output"] for row in rows]
    answers = {label: [row[label]["text"] for row in rows] for label in ("baseline", "tuned")}

    statistics = {label: {"numbers_right": number_statistics(texts, references)} for label, texts in answers.items()}
    scores = paired_scores({"numbers_right": NUMBERS_RIGHT}, statistics["tuned"], statistics["baseline"])
    result = scores["numbers_right"]
    low, high = result["ci95"]
    print(f"{result['n']} of {len(rows)} records have a number in their reference")
    print(f"numbers right: base {result['baseline']:.4f}, tuned {result['tuned']:.4f}")
    print(f"difference {result['delta']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}")

    combined = evaluate.combine([NumbersRight(), ExactMatch()])
    for label, texts in answers.items():
        print(f"{label} by evaluate:", combined.compute(predictions=texts, references=references))


if __name__ == "__main__":
    main()
