"""Tables and answers in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipe.verdict import scale


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1, caption: str | None = None
) -> None:
    """Print a table in the terminal; the first `text_columns` hold text, the others figures."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < text_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 120).print(table)


def print_token_statistics(statistics: Sequence[Mapping], leaked: int) -> None:
    """Print `recipe.data.token_statistics` as a table, and below it what was cut or left out."""
    rows = [
        [
            s["split"], f"{s['rows']:,}", f"{s['tokens']:,}", f"{s['longest']:,}", f"{s['preamble']:.0%}",
            f"{s['supervised']:.0%}",
        ]
        for s in statistics
    ]  # fmt: skip
    counts = {
        "cut to max_length": sum(s["truncated"] for s in statistics),
        "left out as too long": sum(s["dropped"] for s in statistics),
        "left out because a later split holds them too": leaked,
    }
    caption = "; ".join(f"{count:,} records {what}" for what, count in counts.items() if count) or None
    print_table(
        "Records in tokens", ["split", "rows", "tokens", "longest", "% preamble", "% supervised"], rows, caption=caption
    )


def print_scores(metrics: Mapping[str, Any]) -> None:
    """Print `metrics.json`: the scores of each split, base beside tuned, and exact match by family."""
    paired = any(
        score is not None and score["baseline"] is not None
        for scores in metrics["splits"].values()
        for score in scores["metrics"].values()
    )
    columns = ["split (records)", "score", *(["base", "tuned", "change"] if paired else ["tuned"]), "95 % interval"]
    rows = []
    for split, scores in metrics["splits"].items():
        others = [of[split]["metrics"] | of[split]["behaviour"] for of in metrics["other_models"].values()]
        for name, score in {**scores["metrics"], **scores["behaviour"]}.items():
            base, tuned, change, interval = _cells(name, score)
            row = [base, tuned, change] if paired else [tuned]
            rows.append(
                [f"{split} ({scores['n']})", name, *row, interval, *(_value(name, o[name], "tuned") for o in others)]
            )
    print_table("Scores", [*columns, *metrics["other_models"]], rows, text_columns=2)

    families = dict.fromkeys(family for scores in metrics["splits"].values() for family in scores["families"])
    if families:
        columns = ["family"]
        for split in metrics["splits"]:
            columns += [f"{split}: n", "base", "tuned"]
        rows = [
            [family, *(cell for scores in metrics["splits"].values() for cell in _family_cells(scores, family))]
            for family in families
        ]
        print_table("Exact match by family", columns, rows)


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


def print_examples(predictions: Sequence[Mapping], count: int = 3) -> None:
    """Print a few prompts with the reference and what base and tuned answered, from the whole length of the list."""
    console = Console(soft_wrap=True, highlight=False)
    for prediction in predictions[:: max(1, len(predictions) // count)][:count]:
        question = " | ".join(text for text in (prediction["instruction"], prediction["input"]) if text)
        console.print(f"\n[bold]{escape(one_line(question))}[/bold]")
        answers = {"reference": prediction["output"]}
        answers |= {
            label: prediction[m]["text"] for m, label in (("baseline", "base"), ("tuned", "tuned")) if m in prediction
        }
        for label, text in answers.items():
            console.print(f"  {label:<10} {escape(one_line(text, 100))}")


def one_line(text: str, limit: int = 200) -> str:
    """A text in one line of at most `limit` characters, for a terminal."""
    shown = text.replace("\n", "\\n")
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def _family_cells(scores: Mapping, family: str) -> list[str]:
    entry = scores["families"].get(family)
    if entry is None:
        return ["", "", ""]
    match = entry["metrics"]["exact_match"]
    return [str(entry["n"]), *(_value("exact_match", match, side) for side in ("baseline", "tuned"))]
