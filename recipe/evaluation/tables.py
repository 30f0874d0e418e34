"""Scores and answers in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from recipe.console import column_widths, one_line, print_table, table_room, table_width
from recipe.evaluation.verdict import counted, model_name, role_of, scale


def print_scores(metrics: Mapping[str, Any]) -> None:
    """Print `metrics.json`: the scores of each split, base beside tuned, and exact match by family.

    Further models stand beside them, or below where they do not fit. A score over a part of the records has their
    number behind its name.
    """
    paired = any(
        score is not None and score["baseline"] is not None
        for scores in metrics["splits"].values()
        for score in scores["metrics"].values()
    )
    names = ["split (records)", "score"]
    figures = [*(["base", "tuned", "change"] if paired else ["tuned"]), "95 % interval"]
    others = [model_name(label) for label in metrics["other_models"]]
    heads, rows, further = [], [], []
    for split, scores in metrics["splits"].items():
        by_model = [of[split]["metrics"] | of[split]["behaviour"] for of in metrics["other_models"].values()]
        for name, score in {**scores["metrics"], **scores["behaviour"]}.items():
            base, tuned, change, interval = _cells(name, score)
            heads.append([f"{one_line(split)} ({scores['n']})", name + _counted(score, scores["n"])])
            rows.append([*([base, tuned, change] if paired else [tuned]), interval])
            further.append([_value(name, of[name], "tuned") + _counted(of[name], scores["n"]) for of in by_model])
    tables = [("Scores", [*names, *figures, *others], _beside(heads, rows, further))]
    if not _fits(*tables[0][1:]):
        tables = [("Scores", [*names, *figures], _beside(heads, rows))]
        while others:
            count = len(others)
            while count > 1 and not _fits([*names, *others[:count]], _beside(heads, [row[:count] for row in further])):
                count -= 1
            lines = _beside(heads, [row[:count] for row in further])
            tables.append(("Further models", [*names, *others[:count]], lines))
            others, further = others[count:], [row[count:] for row in further]
    for title, columns, lines in tables:
        print_table(title, columns, lines, text_columns=2)

    families = dict.fromkeys(family for scores in metrics["splits"].values() for family in scores["families"])
    if families:
        columns = ["family"]
        for split in metrics["splits"]:
            columns += [f"{split}: n", "base", "tuned"]
        rows = [
            [str(family), *(cell for scores in metrics["splits"].values() for cell in _family_cells(scores, family))]
            for family in families
        ]
        print_table("Exact match by family", columns, rows)


def _fits(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    return table_width(column_widths(columns, rows, text_columns=2)) <= table_room()


def _beside(*blocks: Sequence[Sequence[str]]) -> list[list[str]]:
    """One table of several with the same rows."""
    return [[cell for part in parts for cell in part] for parts in zip(*blocks, strict=True)]


def _cells(name: str, score: Mapping[str, Any] | None) -> list[str]:
    """Base, tuned, change and interval of one score; a dash for what was not measured."""
    interval, delta = "–", None if score is None else score["delta"]
    if score and score["ci95"]:
        show = scale(name).value if delta is None else scale(name).change
        interval = " to ".join(show(bound) for bound in score["ci95"])
    change = scale(name).change(delta)
    return [_value(name, score, "baseline"), _value(name, score, "tuned"), change, interval]


def _value(name: str, score: Mapping[str, Any] | None, side: str) -> str:
    return scale(name).value(None if score is None else score[side])


def _counted(score: Mapping[str, Any] | None, n: int) -> str:
    part = counted(score, n)
    return "" if part is None else f" ({part:,})"


def print_examples(predictions: Sequence[Mapping], count: int = 3) -> None:
    """Print a few prompts with the reference and what base and tuned answered, from the whole length of the list."""
    console = Console(soft_wrap=True, highlight=False)
    for prediction in predictions[:: max(1, len(predictions) // count)][:count]:
        question = " | ".join(text for text in (prediction["instruction"], prediction["input"]) if text)
        console.print()
        console.print(Text(one_line(question), style="bold"))
        answers = {"reference": prediction["output"]}
        answers |= {role_of(m): prediction[m]["text"] for m in ("baseline", "tuned") if m in prediction}
        for label, text in answers.items():
            console.print(Text(f"  {label:<10} {one_line(text, 100)}"))


def _family_cells(scores: Mapping, family: str) -> list[str]:
    entry = scores["families"].get(family)
    if entry is None:
        return ["", "", ""]
    match = entry["metrics"]["exact_match"]
    return [str(entry["n"]), *(_value("exact_match", match, side) for side in ("baseline", "tuned"))]
