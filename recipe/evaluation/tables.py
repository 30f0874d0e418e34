"""Scores as rows of text, for the page and the model card; scores and answers in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from recipe.console import one_line, print_table
from recipe.evaluation.headline import headline_of
from recipe.evaluation.measures import MEASURES
from recipe.evaluation.significance import ENOUGH_TO_JUDGE, direction, judged, lacks_p, standing
from recipe.evaluation.verdict import Scale, judge_scale, model_name, role_of, scale
from recipe.templates import transcript

FURTHER_MODELS = 2  # in one table of the terminal: it then fits into 80 characters


def score_row(name: str, score: Mapping[str, Any], n: int, others: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """One line of a table, as text; its `over` says how many of the n records the score covers, if not all.

    `others` are the same score of further models.
    """
    return _row(MEASURES[name].title, scale(name), score, n, others)


def judge_table(judge: Mapping[str, Any] | None, others: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One line for each prompt: the judge's mean scores and their difference, as text."""
    rows = []
    for prompt, score in (judge["scores"] if judge else {}).items():
        means = [{"tuned": score["other_models"].get(label), "delta": None, "n": score["n"]} for label in others]
        rows.append(_row(prompt, judge_scale(score), judged(score), score["n"], means))
    return rows


def _row(
    label: str, units: Scale, score: Mapping[str, Any], n: int, others: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "title": label,
        "unit": units.unit,
        "n": f"{n:,}",
        "over": "" if covers_all(score, n) else f"{score['n']:,} of {n:,}",
        "baseline": units.value(score["baseline"]),
        "tuned": units.value(score["tuned"]),
        "change": units.change(score["delta"]),
        "interval": units.interval(score),
        "direction": standing(score),
        "word": direction_word(score),
        "reason": score.get("reason", ""),
        "others": [
            {
                "value": units.value(other["tuned"]),
                "change": "" if other["delta"] is None else units.change(other["delta"]),
                "over": "" if covers_all(other, n) else f"n {other['n']:,}",
            }
            for other in others
        ],
    }


def covers_all(score: Mapping[str, Any], n: int) -> bool:
    """Whether a score is missing or covers all n records."""
    return score["tuned"] is None or score["n"] == n


def direction_word(score: Mapping[str, Any]) -> str:
    """The direction of a difference as a table says it, or why there is none."""
    result = standing(score)
    if result == "unclear":
        if direction(score) != "unclear":
            return "not tested" if lacks_p(score) else "may be chance"  # of so many differences
        return "too few" if score["n"] < ENOUGH_TO_JUDGE else "not significant" if score["ci95"] else "no interval"
    return "" if result == "neutral" else result


def print_scores(metrics: Mapping[str, Any]) -> None:
    """Print `metrics.json`: the scores of each split, base beside tuned, further models, the headline score by family.

    Why a score has no value, or is not compared, stands below them. A score that does not cover all records has their
    number behind its name, or behind that of a further model.
    """
    columns = {"baseline": "base", "tuned": "tuned", "change": "change", "interval": "95 % interval"}
    if all(score["baseline"] is None for part in metrics["splits"].values() for score in part["metrics"].values()):
        columns = {"tuned": "tuned", "interval": "95 % interval"}
    rows, further = [], []
    for split, part in metrics["splits"].items():
        others = [by_split[split] for by_split in metrics["other_models"].values()]
        for kind in ("metrics", "behaviour"):
            for name, score in part[kind].items():
                row = score_row(name, score, part["n"], [other[kind][name] for other in others])
                records, count = f"{one_line(split)} ({part['n']})", f" ({score['n']:,})" if row["over"] else ""
                rows.append([records, name + count, *(row[column] for column in columns)])
                further.append([records, name, *(f"{o['value']} {o['over']}".strip() for o in row["others"])])
    names = ["split (records)", "score"]
    print_table("Scores", [*names, *columns.values()], rows, text_columns=2, caption=_reasons(metrics["splits"]))
    models = [model_name(label) for label in metrics["other_models"]]
    for start in range(0, len(models), FURTHER_MODELS):
        end = start + FURTHER_MODELS
        rows = [row[:2] + row[2 + start : 2 + end] for row in further]
        print_table("Further models", [*names, *models[start:end]], rows, text_columns=2)
    _print_families(metrics["splits"], headline_of(metrics))


def _reasons(splits: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why scores have no value or are not compared, one line for each reason."""
    names: dict[str, dict[str, None]] = {}  # reason → scores
    for part in splits.values():
        for name, score in {**part["metrics"], **part["behaviour"]}.items():
            if score.get("reason"):
                names.setdefault(score["reason"], {})[name] = None
    return "\n".join(f"{', '.join(scores)}: {reason}" for reason, scores in names.items()) or None


def _print_families(splits: Mapping[str, Mapping[str, Any]], headline: str) -> None:
    families = dict.fromkeys(family for part in splits.values() for family in part["families"])
    rows = []
    for family in families:
        cells = [str(family)]
        for part in splits.values():
            entry = part["families"].get(family)
            match = score_row(headline, entry["metrics"][headline], entry["n"]) if entry else {}
            cells += [match.get(column, "") for column in ("n", "baseline", "tuned")]
        rows.append(cells)
    if rows:
        headings = ["family", *(heading for split in splits for heading in (f"{split}: n", "base", "tuned"))]
        print_table(f"{MEASURES[headline].title} by family", headings, rows)


def print_examples(predictions: Sequence[Mapping], count: int = 3) -> None:
    """Print a few prompts with the reference and what base and tuned answered, evenly spaced over the list."""
    console = Console(soft_wrap=True, highlight=False)
    for line in predictions[:: max(1, len(predictions) // count)][:count]:
        question = " | ".join(filter(None, (transcript(line, last=False), line["instruction"], line["input"])))
        console.print()
        console.print(Text(one_line(question), style="bold"))
        answers = {"reference": line["output"]}
        answers |= {role_of(label): line[label]["text"] for label in ("baseline", "tuned") if label in line}
        for label, text in answers.items():
            console.print(Text(f"  {label:<10} {one_line(text, 100)}"))
