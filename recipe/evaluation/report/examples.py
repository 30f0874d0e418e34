"""The examples of the report, as its script takes them: one JSON of columns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from recipe.evaluation.comparison import PER_EXAMPLE, example_scores
from recipe.evaluation.measures import MEASURES
from recipe.evaluation.verdict import model_name
from recipe.templates import transcript

SHOWN = ("text", "tokens", "stop_reason", "reasoning", "error")  # fields of an answer


def example_columns(
    predictions: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    judge_rows: Sequence[Mapping[str, Any]],
    judge: Mapping[str, Any],
) -> dict[str, Any]:
    """All examples by column, so that each name is written once and not once for each example."""
    row_of = {prediction["id"]: row for row, prediction in enumerate(predictions)}
    pairs: list[list] = [[] for _ in predictions]
    judgements: dict[str, dict[str, list]] = {label: {} for label in labels}  # label → prompt → for each example
    for judgement in judge_rows:
        row, reason = row_of[judgement["id"]], judgement.get("reason")
        if is_pair(judgement):
            pairs[row].append([judgement["order"], judgement["status"], judgement["winner"], reason])
        else:
            column = judgements[judgement["model"]].setdefault(judgement["prompt"], [None] * len(predictions))
            column[row] = [judgement["status"], judgement["score"], reason]
    return {
        "models": [[label, model_name(label)] for label in labels],
        "scores": {name: MEASURES[name].title for name in PER_EXAMPLE},
        "judge_scales": {
            prompt: judge["scores"][prompt]["scale"] for columns in judgements.values() for prompt in columns
        },
        "family": [family_of(prediction) for prediction in predictions],
        **{
            key: [prediction.get(key) or "" for prediction in predictions]
            for key in ("id", "split", "instruction", "input", "output")
        },
        "history": [transcript(prediction, last=False) for prediction in predictions],
        "answers": {
            label: {
                **{key: [line[label].get(key) for line in predictions] for key in SHOWN},
                "scores": {k: v.round(6).tolist() for k, v in example_scores(predictions, label).items()},
                "judge": judgements[label],
            }
            for label in labels
        },
        "pairwise": [asked or None for asked in pairs] if any(pairs) else None,
    }


def is_pair(judgement: Mapping[str, Any]) -> bool:
    """Whether a row of `judge.jsonl` compares two responses, whatever its prompt is called."""
    return "order" in judgement


def family_of(prediction: Mapping[str, Any]) -> str | None:
    """The family as text, None if it is missing or blank."""
    family = prediction.get("family")
    return None if family is None or not str(family).strip() else str(family)


def embed_json(content: Any) -> Markup:
    """JSON that can stand in a script element: nothing in it can end the element or start a comment.

    >>> print(embed_json({"text": "</script><!--"}))
    {"text":"\\u003c/script\\u003e\\u003c!--"}
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # half of a surrogate pair can stand in JSON, but not in a file
    return Markup(re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))
