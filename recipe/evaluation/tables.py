"""Scores and answers in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from recipe.console import column_widths, one_line, print_table, table_room, table_width
from recipe.evaluation.verdict import PERCENT, counted, model_name, role_of, scale


def print_scores(metrics: Mapping[str, Any]) -> None:
    """Print `metrics.json`: the scores of each split, base beside tuned, and exact match by family.

    Further models stand beside them, or below if they do not fit. A score that does not cover all records has their
    number behind its name.
    """
    names = [["split (records)"], ["score"]]  # each column a heading and its cells
    figures = [["base"], ["tuned"], ["change"], ["95 % interval"]]
    others = [[model_name(label)] for label in metrics["other_models"]]
    for split, part in metrics["splits"].items():
        further = [by_split[split] for by_split in metrics["other_models"].values()]
        for kind in ("metrics", "behaviour"):
            for name, score in part[kind].items():
                units = scale(name)
                row = [f"{one_line(split)} ({part['n']})", name + _counted(score, part["n"])]
                row += [units.value(score["baseline"]), units.value(score["tuned"])]
                row += [units.change(score["delta"]), units.interval(score)]
                scores = [scores[kind][name] for scores in further]
                row += [units.value(score["tuned"]) + _counted(score, part["n"]) for score in scores]
                for column, cell in zip([*names, *figures, *others], row, strict=True):
                    column.append(cell)
    if set(figures[0][1:]) == {"–"}:  # no base model
        figures = [figures[1], figures[3]]
    tables = [("Scores", figures)]
    for column in others:
        if not _fits([*names, *tables[-1][1], column]):
            tables.append(("Further models", []))
        tables[-1][1].append(column)
    for title, columns in tables:
        headings, *rows = zip(*names, *columns, strict=True)
        print_table(title, headings, rows, text_columns=2)

    families = dict.fromkeys(family for part in metrics["splits"].values() for family in part["families"])
    if families:
        headings = ("family", *(h for split in metrics["splits"] for h in (f"{split}: n", "base", "tuned")))
        cells = [[_family_cells(part["families"].get(f)) for part in metrics["splits"].values()] for f in families]
        rows = [(str(family), *sum(row, ())) for family, row in zip(families, cells, strict=True)]
        print_table("Exact match by family", headings, rows)


def _fits(columns: Sequence[Sequence[str]]) -> bool:
    headings, *rows = zip(*columns, strict=True)
    return table_width(column_widths(headings, rows, text_columns=2)) <= table_room()


def _counted(score: Mapping[str, Any], n: int) -> str:
    part = counted(score, n)
    return "" if part is None else f" ({part:,})"


def _family_cells(entry: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if entry is None:
        return "", "", ""
    match = entry["metrics"]["exact_match"]
    return str(entry["n"]), PERCENT.value(match["baseline"]), PERCENT.value(match["tuned"])


def print_examples(predictions: Sequence[Mapping], count: int = 3) -> None:
    """Print a few prompts with the reference and what base and tuned answered, evenly spaced over the list."""
    console = Console(soft_wrap=True, highlight=False)
    for line in predictions[:: max(1, len(predictions) // count)][:count]:
        question = " | ".join(text for text in (line["instruction"], line["input"]) if text)
        console.print()
        console.print(Text(one_line(question), style="bold"))
        answers = {"reference": line["output"]}
        answers |= {role_of(label): line[label]["text"] for label in ("baseline", "tuned") if label in line}
        for label, text in answers.items():
            console.print(Text(f"  {label:<10} {one_line(text, 100)}"))
