"""The figures of an evaluation: each drawn once for the light page, once for the dark one, and as a PNG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from recipe.console import one_line
from recipe.evaluation.headline import headline_of
from recipe.evaluation.measures import MEASURES
from recipe.evaluation.significance import standing
from recipe.evaluation.verdict import PERCENT, scale, weakest_first
from recipe.figures import (
    BASELINE_COLOR,
    LINE,
    MUTED,
    STYLE,
    TEXT,
    TUNED_COLOR,
    WORSE_COLOR,
    canvas,
    draw_loss,
    save_png,
)

TIE_COLOR, INK = "#d4d9de", "#fffffe"  # ink: numbers on coloured bars
DARK = {
    TEXT: "#e6e9ed", MUTED: "#9aa4af", LINE: "#3a414a", BASELINE_COLOR: "#98a2ad", TUNED_COLOR: "#7ea6e0",
    WORSE_COLOR: "#dd8452", TIE_COLOR: "#4a525c", INK: "#14171a",
}  # fmt: skip
NAMES = ("deltas", "outcomes", "loss")
MAX_ROWS = 24  # of a group in the forest plot; more families are in the table only
MAX_LABEL = 28  # characters
LabelledScore = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Picture:
    """A figure in the page: `data:` URIs of its SVG for both themes, what it shows in words, its size."""

    light: str
    dark: str
    alt: str
    width: int  # CSS pixels, so that the page does not move while it loads
    height: int


def make_picture(draw: Callable[[], Figure], alt: str, png: Path) -> Picture:
    """Draw a figure, write it as a PNG on white, and return it as a transparent SVG in the colours of both themes."""
    with matplotlib.rc_context(STYLE):
        figure = draw()
        save_png(figure, png, dpi=200)
        figure.set_layout_engine("none")  # the layout is done; doing it again would double the time
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    light = buffer.getvalue()
    dark = re.sub("(?<=: )#[0-9a-f]{6}", lambda match: DARK.get(match[0], match[0]), light)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Picture(_data_uri(light), _data_uri(dark), alt, width, height)


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def draw_pictures(
    output_dir: Path,
    metrics: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]] | None = None,
    chosen_step: int | None = None,
) -> dict[str, Picture]:
    """The figures of the first split, by name, each also as `{name}.png`; PNGs of an earlier report are removed."""
    part = next(iter(metrics["splits"].values()))
    drawings: dict[str, tuple[Callable[[], Figure], str]] = {}  # name → how it is drawn, what it shows in words
    if deltas := forest_groups(part, headline_of(metrics)):
        alt = "Forest plot of differences, tuned minus base, with 95 % intervals; the tables hold their values."
        drawings["deltas"] = partial(draw_deltas, deltas), alt
    if outcomes := outcome_counts(part, metrics["judge"]):
        counts = (f"{name}: better {o[0]:,}, equal {o[1]:,}, worse {o[2]:,}" for name, o in outcomes.items())
        drawings["outcomes"] = partial(draw_outcomes, outcomes), f"Examples where tuned is {'; '.join(counts)}."
    if any("loss" in entry or "train_loss" in entry for entry in log_history or ()):
        chosen = "" if chosen_step is None else f" Step {chosen_step:,} was chosen."
        alt = f"Training and validation loss over optimizer steps.{chosen}"
        drawings["loss"] = partial(draw_loss, log_history or (), chosen_step), alt
    for name in set(NAMES) - set(drawings):
        (output_dir / f"{name}.png").unlink(missing_ok=True)
    return {name: make_picture(draw, alt, output_dir / f"{name}.png") for name, (draw, alt) in drawings.items()}


def forest_groups(part: Mapping[str, Any], headline: str) -> dict[str, list[LabelledScore]]:
    """Differences with an interval, by group: all scores in percent, and the headline score by family."""
    scores = [(MEASURES[name].title, score) for name, score in part["metrics"].items() if scale(name) is PERCENT]
    groups: dict[str, list[LabelledScore]] = {"Scores": scores}
    if scale(headline) is PERCENT:
        ranked = weakest_first(part["families"], headline)
        groups["Families"] = [(str(family), entry["metrics"][headline]) for family, entry in ranked]
    shown = {
        name: [row for row in rows if row[1]["delta"] is not None and row[1]["ci95"]] for name, rows in groups.items()
    }
    return {name: rows for name, rows in shown.items() if rows and len(rows) <= MAX_ROWS}


def draw_deltas(groups: Mapping[str, Sequence[LabelledScore]]) -> Figure:
    """Forest plot: tuned minus baseline with 95 % intervals, in percentage points, under the heading of each group."""
    rows = sum(len(rows) + 1 for rows in groups.values())
    figure, axes = canvas(height=0.55 + 0.205 * rows)
    axes.update_datalim([(-1, 0), (1, 0)])  # zero, and at least two points around it
    position, labels = 0.0, {}
    for heading, scores in groups.items():
        axes.text(
            -0.01, position, heading, transform=axes.get_yaxis_transform(), ha="right", va="center",
            color=MUTED, fontsize=8, fontweight="bold",
        )  # fmt: skip
        for label, score in scores:
            position += 1
            color = {"better": TUNED_COLOR, "worse": WORSE_COLOR}.get(standing(score), MUTED)
            interval = [100 * bound for bound in score["ci95"]]
            axes.plot(interval, [position, position], color=color, linewidth=2, solid_capstyle="butt")
            face = "none" if color == MUTED else color  # hollow: not significant
            axes.plot(100 * score["delta"], position, "o", markersize=5, color=color, markerfacecolor=face)
            labels[position] = one_line(label, MAX_LABEL)
        position += 1.35
    axes.axvline(0, color=TEXT, linewidth=0.8)
    axes.set_yticks(list(labels), list(labels.values()))
    axes.set_ylim(position - 0.6, -0.6)
    axes.set_xlabel("tuned − base, percentage points")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def outcome_counts(part: Mapping[str, Any], judge: Mapping[str, Any] | None) -> dict[str, tuple[int, int, int]]:
    """(better, equal, worse) counts of examples for each score, and for the judge's pairs."""
    counts = {MEASURES[name].title: (o["win"], o["tie"], o["loss"]) for name, o in part["outcomes"].items()}
    pairs = judge and judge["pairwise"]
    if pairs:
        counts["Judge, pairs"] = (pairs["win"], pairs["tie"], pairs["loss"])
    return counts


def draw_outcomes(outcomes: Mapping[str, tuple[int, int, int]]) -> Figure:
    """One stacked bar for each score: the examples on which tuned is better than, equal to and worse than base."""
    figure, axes = canvas(height=0.75 + 0.34 * len(outcomes))
    kinds = (("tuned better", TUNED_COLOR), ("equal", TIE_COLOR), ("tuned worse", WORSE_COLOR))
    counts = np.array(list(outcomes.values()))  # (scores, 3)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for index, (label, color) in enumerate(kinds):
        left, width = shares[:, :index].sum(axis=1), shares[:, index]
        bars = axes.barh(range(len(outcomes)), width, left=left, color=color, height=0.62, label=label)
        texts = [f"{n:,}" if share > 0.07 else "" for n, share in zip(counts[:, index], width, strict=True)]
        ink = TEXT if color == TIE_COLOR else INK
        axes.bar_label(bars, texts, label_type="center", color=ink, fontsize=8)
    axes.set_yticks(range(len(outcomes)), list(outcomes))
    axes.set_ylim(len(outcomes) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_xlabel("share of examples")
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=TEXT, handlelength=0.9)
    return figure
