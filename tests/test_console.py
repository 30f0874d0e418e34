"""The terminal: whatever a text holds, it is shown and commands nothing; figures are never cut."""

import doctest
import re

import pytest
from evaluation_samples import FAMILIES, make_metrics, make_predictions
from rich.console import Console

import recipe.console
from recipe.console import one_line, print_table, print_token_statistics
from recipe.evaluation.tables import print_examples, print_scores
from recipe.evaluation.verdict import scale

HOSTILE = [
    "[/b]",
    "[red]x",
    "[link=x]y[/link]",
    ":smile:",
    "a\x1b[2Jb",
    "c\rd\x08",
    "e\nf\tg",
    "\u202eh",
]
SHOWN = [*HOSTILE[:4], "a␛[2Jb", "c␍d␈", "e\\nf\\tg", "⟨U+202E⟩h"]


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(recipe.console).failed == 0


@pytest.mark.parametrize(("text", "shown"), list(zip(HOSTILE, SHOWN, strict=True)))
def test_names_are_shown_as_they_are_everywhere(capsys, text, shown):
    predictions = make_predictions(30, models=("baseline", "tuned", text))
    for prediction in predictions:
        prediction |= {"family": text, "split": text, "instruction": text, "input": text, "output": text}
        prediction["tuned"]["text"] = text
    print_scores(make_metrics(predictions))
    scores = capsys.readouterr().out
    print_examples(predictions)
    examples = capsys.readouterr().out
    print_table(text, [text, "n"], [[text, "1"]])
    table = capsys.readouterr().out
    counts = dict.fromkeys(("rows", "tokens", "longest", "preamble", "supervised", "truncated", "dropped"), 1)
    print_token_statistics([{"split": text, **counts}], leaked=0, bad={})
    statistics = capsys.readouterr().out
    assert f"“{shown}”" in scores and f"│ {shown} " in scores and f"│ {shown} (30) " in scores
    assert examples.count(shown) == 12  # of three examples instruction, input, reference and tuned response
    assert table.startswith(shown) and table.count(shown) == 3
    assert f"│ {shown} " in statistics
    for said in (scores, examples, table, statistics):
        assert not set(said) & set("\x1b\r\b\t\u202e")


def test_a_line_is_short_and_in_one_line():
    assert one_line("a\nb\x1b") == "a\\nb␛"
    assert one_line("x" * 1000, 10) == "xxxxxxx..."
    assert one_line("x" * 10, 10) == "x" * 10
    assert len(one_line("\n" * 10, 10)) == 10


def cells_of(said: str) -> list[str]:
    said = re.sub("\x1b\\[[0-9;]*m", "", said)  # bold
    return [cell.strip() for line in said.splitlines() if line.startswith("│") for cell in line.strip("│").split("│")]


@pytest.fixture(scope="module")
def metrics():
    """Of 14 models."""
    checkpoints = [f"checkpoint-{100 * step}" for step in range(1, 13)]
    return make_metrics(make_predictions(60, models=("baseline", "tuned", *checkpoints)))


def test_further_models_have_tables_of_their_own(capsys, metrics):
    print_scores(metrics)
    said = capsys.readouterr().out
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 120
    assert [line.strip() for line in said.splitlines()].count("Further models") == 6
    cells = cells_of(said)
    for label, by_split in metrics["other_models"].items():
        assert said.count(f"“{label}”") == 1
        assert f"{by_split['test']['metrics']['reference_loss']['tuned']:.3f}" in cells


@pytest.mark.parametrize("width", [30, 60, 80])
def test_a_narrow_terminal_cuts_names_and_no_figure(capsys, monkeypatch, metrics, width):
    for name, value in {"COLUMNS": str(width), "FORCE_COLOR": "1", "TERM": "xterm"}.items():  # a terminal, to rich
        monkeypatch.setenv(name, value)
    assert Console().is_terminal and Console().width == width
    print_scores(metrics)
    cells = cells_of(capsys.readouterr().out)
    for name, score in metrics["splits"]["test"]["metrics"].items():
        interval = " to ".join(map(scale(name).change, score["ci95"]))
        assert {name, interval, scale(name).value(score["tuned"])} <= set(cells)
    cut = {cell.removesuffix("…").strip() for cell in cells if "…" in cell}
    assert cut
    assert all(any(name.startswith(start) for name in [*metrics["splits"], *FAMILIES]) for start in cut)


def test_a_score_over_a_part_of_the_records_has_their_number(capsys):
    predictions = make_predictions(100, models=("baseline", "tuned", "other"))
    for prediction in predictions[30:]:
        prediction["tuned"]["reference_loss"] = None
    predictions[0]["other"]["reference_loss"] = None
    metrics = make_metrics(predictions)
    print_scores(metrics)
    cells = cells_of(capsys.readouterr().out)
    assert cells.count("perplexity (24)") == cells.count("reference_loss (24)") == 1
    assert cells.count("perplexity (6)") == 1
    assert "chrf" in cells
    other = metrics["other_models"]["other"]["test"]["metrics"]["reference_loss"]["tuned"]
    assert f"{other:.3f} n 79" in cells
