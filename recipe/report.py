"""Pictures and tables of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

TRAIN_COLOR, VALIDATION_COLOR = "#4c72b0", "#dd8452"


def plot_loss(log_history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw training and validation loss over optimizer steps, with the tokens seen on a second axis.

    Args:
        log_history: `trainer.state.log_history`.
        path: the PNG to write.
    """
    train = [entry for entry in log_history if "loss" in entry]
    if not train:  # a run shorter than logging_steps has its mean only
        train = [{**entry, "loss": entry["train_loss"]} for entry in log_history if "train_loss" in entry]
    validation = [entry for entry in log_history if "eval_loss" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    marker = "o" if len(train) == 1 else None
    axes.plot(
        [e["step"] for e in train], [e["loss"] for e in train], color=TRAIN_COLOR, marker=marker, label="training"
    )
    if validation:
        steps, losses = [e["step"] for e in validation], [e["eval_loss"] for e in validation]
        axes.plot(steps, losses, color=VALIDATION_COLOR, marker="o", markersize=4, label="validation")
    highest = max((e.get("loss", e.get("eval_loss")) for e in [*train, *validation]), default=1.0)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", ylim=(0, 1.05 * highest))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    if train and "num_input_tokens_seen" in train[-1]:
        tokens_per_step = train[-1]["num_input_tokens_seen"] / train[-1]["step"]
        top = axes.secondary_xaxis("top", functions=(lambda s: s * tokens_per_step, lambda t: t / tokens_per_step))
        top.xaxis.set_major_formatter(EngFormatter())
        top.set_xlabel("tokens seen")
    figure.savefig(path, dpi=150)


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


def print_scores(splits: Mapping[str, Mapping]) -> None:
    """Print the scores of each split, base beside tuned, and exact match by family.

    Args:
        splits: for each split's name what `recipe.metrics.summarize` gives.
    """
    rows = []
    for name, scores in splits.items():
        for metric, value in scores["metrics"].items():
            low, high = value["ci95"]
            change = "" if value["delta"] is None else f"{100 * value['delta']:+.1f}"
            interval = f"{100 * low:+.1f} to {100 * high:+.1f}" if change else f"{low:.1%} to {high:.1%}"
            rows.append(
                [
                    f"{name} ({scores['n']})",
                    metric,
                    _percent(value["baseline"]),
                    _percent(value["tuned"]),
                    change,
                    interval,
                ]
            )
        stop_rate = scores["behaviour"]["stop_rate"]
        rows.append(
            [
                f"{name} ({scores['n']})",
                "stop_rate",
                _percent(stop_rate.get("baseline")),
                _percent(stop_rate["tuned"]),
                "",
                "",
            ]
        )
    columns = ["split (records)", "metric", "base", "tuned", "points", "95 % interval"]
    print_table("Scores", columns, rows, text_columns=2)

    families = dict.fromkeys(family for scores in splits.values() for family in scores["families"])
    if families:
        columns = ["family"]
        for name in splits:
            columns += [f"{name}: n", "base", "tuned"]
        rows = [
            [family, *(cell for scores in splits.values() for cell in _family_cells(scores, family))]
            for family in families
        ]
        print_table("Exact match by family", columns, rows)


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
    return [str(entry["n"]), _percent(entry["exact_match"].get("baseline")), _percent(entry["exact_match"]["tuned"])]


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.1%}"
