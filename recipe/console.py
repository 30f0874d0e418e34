"""Tables and answers in the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipe.verdict import counted, model_name, scale

WIDTH = 120  # of tables that go to a file
NARROWEST = 6  # a name's column where a terminal is narrow
HEADING = 20  # a heading over a column of figures is folded from here on
# invisible, or able to reorder what stands around them: C0 but tab and newline, C1, soft hyphen, zero width, bidi marks
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """A text with its unseen characters shown: control characters by their picture, others by their code point.

    >>> visible("a\\x00b\\u202ec")
    'a␀b⟨U+202E⟩c'
    """
    return UNSEEN.sub(lambda found: _picture(ord(found[0])), text)


def _picture(code: int) -> str:
    if code == 0x7F:
        return "␡"
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def one_line(text: str, limit: int = 200) -> str:
    """A text in one line of at most `limit` characters, for a terminal: nothing in it can command the terminal."""
    shown = visible(text[: limit + 1]).replace("\n", "\\n").replace("\t", "\\t")
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1, caption: str | None = None
) -> None:
    """Print a table in the terminal; the first `text_columns` hold text, the others figures.

    Where it is too wide, the names in the first column are cut, and figures never: the lines then run over.
    """
    headings, *lines = [[one_line(cell) for cell in row] for row in (columns, *rows)]
    widths = _widths(headings, lines, text_columns)
    widths[0] -= max(0, min(_total(widths) - _room(), widths[0] - NARROWEST))
    # everything is a Text, so that nothing in it is read as markup
    table = Table(title=Text(one_line(title), style="table.title"), title_justify="left", caption_justify="left")
    table.caption = Text(caption, style="table.caption") if caption else None
    for index, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        is_text = index < text_columns
        table.add_column(
            Text(heading), width=width, justify="left" if is_text else "right", no_wrap=is_text,
            overflow="ellipsis" if is_text else "fold",
        )  # fmt: skip
    for line in lines:
        table.add_row(*map(Text, line))
    Console(width=max(_room(), _total(widths))).print(table)


def _room() -> int:
    console = Console()
    return console.width if console.is_terminal else WIDTH


def _widths(headings: Sequence[str], lines: Sequence[Sequence[str]], text_columns: int) -> list[int]:
    """What each column needs to be read wholly; a long heading over figures can be folded."""
    widths = []
    for index, heading in enumerate(headings):
        needed = cell_len(heading) if index < text_columns else min(cell_len(heading), HEADING)
        widths.append(max([needed, *(cell_len(line[index]) for line in lines)]))
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(width + 3 for width in widths) + 1  # a rule and a blank on both sides of each


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
    return _total(_widths(columns, rows, text_columns=2)) <= _room()


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
        answers |= {
            label: prediction[m]["text"] for m, label in (("baseline", "base"), ("tuned", "tuned")) if m in prediction
        }
        for label, text in answers.items():
            console.print(Text(f"  {label:<10} {one_line(text, 100)}"))


def _family_cells(scores: Mapping, family: str) -> list[str]:
    entry = scores["families"].get(family)
    if entry is None:
        return ["", "", ""]
    match = entry["metrics"]["exact_match"]
    return [str(entry["n"]), *(_value("exact_match", match, side) for side in ("baseline", "tuned"))]
