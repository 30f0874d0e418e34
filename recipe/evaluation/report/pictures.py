"""The figures of an evaluation: each drawn once for the light page, once for the dark one, and as a PNG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from recipe.console import one_line
from recipe.evaluation.comparison import labels_of
from recipe.evaluation.verdict import PERCENT, direction, headline_metric, model_name, scale, title, weakest_first
from recipe.figures import (
    BASELINE_COLOR,
    LINE,
    MUTED,
    STYLE,
    TEXT,
    TUNED_COLOR,
    WIDTH,
    WORSE_COLOR,
    canvas,
    draw_loss,
    paint,
    save_png,
)

TIE_COLOR, INK = "#d4d9de", "#fffffe"  # ink: numbers on coloured bars
DARK = {
    TEXT: "#e6e9ed", MUTED: "#9aa4af", LINE: "#3a414a", BASELINE_COLOR: "#98a2ad", TUNED_COLOR: "#7ea6e0",
    WORSE_COLOR: "#dd8452", TIE_COLOR: "#4a525c", INK: "#14171a",
}  # fmt: skip
NAMES = ("deltas", "outcomes", "lengths", "loss")
MAX_FAMILIES = 24  # in the forest plot
MAX_LABEL = 28  # characters


@dataclass(frozen=True)
class Picture:
    """A figure as the page holds it: `data:` URIs of SVG for both themes, what it shows in words, its size.

    The size is in CSS pixels, so that the page keeps its place while it loads.
    """

    light: str
    dark: str
    alt: str
    width: int
    height: int


def make_picture(draw: Callable[[], Figure], alt: str, png: Path) -> Picture:
    """Draw a figure, write it to a PNG on white, and give it in SVG on nothing, in the colours of both themes."""
    with matplotlib.rc_context(STYLE):
        figure = draw()
        save_png(figure, png, dpi=200)
        figure.set_layout_engine("none")  # it is laid out now; a second time takes as long as all else
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    light = buffer.getvalue()
    dark = re.sub("(?<=: )#[0-9a-f]{6}", lambda found: DARK.get(found[0], found[0]), light)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Picture(_data_uri(light), _data_uri(dark), alt, width, height)


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def draw_pictures(
    output_dir: Path,
    predictions: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]] | None = None,
    chosen_step: int | None = None,
) -> dict[str, Picture]:
    """The figures of the first split, by name, each also as `{name}.png`; PNGs of an earlier report are removed."""
    part = next(iter(metrics["splits"].values()))
    intervals, outcomes = forest_rows(part), outcome_counts(part, metrics["judge"])
    lengths, unit = response_lengths(predictions, part)
    drawings: dict[str, tuple[Callable[[], Figure], str]] = {}  # name → how it is drawn, what it shows in words
    if any(intervals.values()):
        alt = "Forest plot of differences, tuned minus base, with 95 % intervals; the tables hold their values."
        drawings["deltas"] = partial(draw_deltas, intervals), alt
    if outcomes:
        counts = (f"{name}: better {o[0]:,}, equal {o[1]:,}, worse {o[2]:,}" for name, o in outcomes.items())
        drawings["outcomes"] = partial(draw_outcomes, outcomes), f"Examples where tuned is {'; '.join(counts)}."
    notes = "; ".join(f"{row.label}: {row.note}" for row in lengths)
    drawings["lengths"] = partial(draw_lengths, lengths, unit), f"Histograms of {unit} per response. {notes}."
    if any("loss" in entry or "train_loss" in entry for entry in log_history or ()):
        chosen = "" if chosen_step is None else f" Step {chosen_step:,} was chosen."
        alt = f"Training and validation loss over optimizer steps.{chosen}"
        drawings["loss"] = partial(draw_loss, log_history or (), chosen_step), alt
    for name in set(NAMES) - set(drawings):
        (output_dir / f"{name}.png").unlink(missing_ok=True)
    return {name: make_picture(draw, alt, output_dir / f"{name}.png") for name, (draw, alt) in drawings.items()}


# --- differences ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """One row of the forest plot: a difference with its 95 % interval, in points."""

    label: str
    delta: float
    low: float
    high: float
    direction: str  # better or worse; anything else is not significant


def forest_rows(part: Mapping[str, Any]) -> dict[str, list[Interval]]:
    """Differences in points by group: all scores in percent, and the headline score by family."""

    def rows(scores: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Interval]:
        return [
            Interval(one_line(label, MAX_LABEL), 100 * s["delta"], 100 * s["ci95"][0], 100 * s["ci95"][1], direction(s))
            for label, s in scores
            if s["delta"] is not None and s["ci95"] is not None
        ]

    in_percent = {name: score for name, score in part["metrics"].items() if scale(name) is PERCENT}
    groups = {"Scores": rows((title(name), score) for name, score in in_percent.items())}
    headline = headline_metric(part["metrics"])
    if headline and headline in in_percent:
        ranked = weakest_first(part["families"], headline)
        families = rows((str(family), entry["metrics"][headline]) for family, entry in ranked)
        if len(families) > MAX_FAMILIES:
            groups["Extreme families"] = families[: MAX_FAMILIES // 2] + families[-MAX_FAMILIES // 2 :]
        elif families:
            groups["Families"] = families
    return groups


def draw_deltas(groups: Mapping[str, Sequence[Interval]]) -> Figure:
    """Forest plot: tuned minus baseline with 95 % intervals, in percentage points, under the heading of each group."""
    rows = sum(len(rows) + 1 for rows in groups.values())
    figure, axes = canvas(height=0.55 + 0.205 * rows)
    position, labels = 0.0, {}
    for heading, intervals in groups.items():
        axes.text(
            -0.01, position, heading, transform=axes.get_yaxis_transform(), ha="right", va="center",
            color=MUTED, fontsize=8, fontweight="bold",
        )  # fmt: skip
        for row in intervals:
            position += 1
            color = {"better": TUNED_COLOR, "worse": WORSE_COLOR}.get(row.direction, MUTED)
            axes.plot([row.low, row.high], [position, position], color=color, linewidth=2, solid_capstyle="butt")
            face = "none" if color == MUTED else color  # hollow: not significant
            axes.plot(row.delta, position, "o", markersize=5, color=color, markerfacecolor=face)
            labels[position] = row.label
        position += 1.35
    axes.axvline(0, color=TEXT, linewidth=0.8)
    axes.set_yticks(list(labels), list(labels.values()))
    axes.set_ylim(position - 0.6, -0.6)
    axes.set_xlabel("tuned − base, percentage points")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _make_room_for_zero(axes)
    return figure


def _make_room_for_zero(axes: Axes) -> None:
    """Keep zero in the picture, off its edge, and the view no narrower than two points."""
    low, high = axes.get_xlim()
    low, high = min(low, -0.05 * max(abs(low), abs(high)), -1), max(high, 0.05 * max(abs(low), abs(high)), 1)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(6))


# --- outcomes ---------------------------------------------------------------------------------------------------------


def outcome_counts(part: Mapping[str, Any], judge: Mapping[str, Any] | None) -> dict[str, tuple[int, int, int]]:
    """(better, equal, worse) counts of examples for each score, and for the judge's pairs."""
    counts = {title(name): (o["win"], o["tie"], o["loss"]) for name, o in part["outcomes"].items()}
    pairs = judge and judge["pairwise"]
    if pairs:
        counts["Judge, pairs"] = (pairs["win"], pairs["tie"], pairs["loss"])
    return counts


def draw_outcomes(outcomes: Mapping[str, tuple[int, int, int]]) -> Figure:
    """One stacked bar for each score: the examples on which tuned is better than, equal to and worse than base."""
    figure, axes = canvas(height=0.75 + 0.34 * len(outcomes))
    kinds = (("tuned better", TUNED_COLOR), ("equal", TIE_COLOR), ("tuned worse", WORSE_COLOR))
    left = np.zeros(len(outcomes))
    for index, (label, color) in enumerate(kinds):
        counts = np.array([counts[index] for counts in outcomes.values()], dtype=float)
        totals = np.array([max(1, sum(counts)) for counts in outcomes.values()])
        bars = axes.barh(range(len(outcomes)), counts / totals, left=left, color=color, height=0.62, label=label)
        ink = TEXT if color == TIE_COLOR else INK
        texts = [f"{count:,.0f}" if count / total > 0.07 else "" for count, total in zip(counts, totals, strict=True)]
        axes.bar_label(bars, texts, label_type="center", color=ink, fontsize=8)
        left += counts / totals
    axes.set_yticks(range(len(outcomes)), list(outcomes))
    axes.set_ylim(len(outcomes) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_xlabel("share of examples")
    axes.tick_params(axis="y", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=TEXT, handlelength=0.9)
    return figure


# --- lengths ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Lengths of one model's responses, or of the references, and a note to show beside them."""

    label: str
    role: str  # reference, baseline, tuned; anything else is a further model
    values: Sequence[int]
    note: str


def response_lengths(predictions: Sequence[Mapping[str, Any]], part: Mapping[str, Any]) -> tuple[list[Lengths], str]:
    """Lengths of the references and of each model's responses, all in tokens, or all in words if a count is unknown."""
    answers = {label: [line[label] for line in predictions] for label in labels_of(predictions)}
    references = [answer.get("reference_tokens") for answer in answers["tuned"]]
    counts = {label: [answer.get("tokens") for answer in column] for label, column in answers.items()}
    if None in references or any(None in column for column in counts.values()):
        unit = "words"
        references = [len(line["output"].split()) for line in predictions]
        counts = {label: [len(answer["text"].split()) for answer in column] for label, column in answers.items()}
    else:
        unit = "tokens"
        references = [count - 1 for count in references]  # without the end-of-text token, as in responses
    stop_rate = part["behaviour"]["stop_rate"]
    rows = [Lengths("References", "reference", references, f"median {median(references):g}")]
    for label, values in counts.items():
        rate = stop_rate.get(label)
        note = f"median {median(values):g}" + ("" if rate is None else f", stop rate {PERCENT.value(rate)}")
        rows.append(Lengths(one_line(model_name(label), MAX_LABEL), label, values, note))
    return rows, unit


def draw_lengths(lengths: Sequence[Lengths], unit: str) -> Figure:
    """Histograms of lengths, one below the other on the same axis; the last bin also holds all longer responses."""
    colors = {"baseline": BASELINE_COLOR, "tuned": TUNED_COLOR, "reference": TEXT}
    everything = np.concatenate([np.asarray(row.values) for row in lengths])
    longest = everything.max()
    # the longest 1 % of one model's may be a hundred times longer than the rest: they share the last bin
    edge = max(1, min(longest, int(1.5 * max(np.quantile(row.values, 0.99) for row in lengths)) + 1))
    bins = np.linspace(0, edge + 1, min(40, edge + 2))
    figure = Figure(figsize=(WIDTH, 0.55 + 0.72 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), 1, sharex=True, squeeze=False)[:, 0]
    for axes, row in zip(panels, lengths, strict=True):
        paint(axes)
        values = np.minimum(row.values, edge)
        weights = np.full(len(values), 1 / len(values))
        color = colors.get(row.role, MUTED)
        axes.hist(values, bins=bins, weights=weights, color=color, alpha=0.45 if row.role == "reference" else 1)
        axes.text(0.99, 0.93, row.label, transform=axes.transAxes, ha="right", va="top", color=TEXT)
        axes.text(0.99, 0.66, row.note, transform=axes.transAxes, ha="right", va="top", color=MUTED, fontsize=8)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="x", length=0 if axes is not panels[-1] else 3)
        top = axes.get_ylim()[1]
        # the label is above the right half: leave it room where bars are high there
        right = np.histogram(values, bins=bins, weights=weights)[0][len(bins) // 2 :].max(initial=0)
        axes.set_ylim(0, top if right < 0.35 * top else 2.4 * max(right, 0.4 * top))
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    suffix = f" (last bar: {edge:,} and more)" if longest > edge else ""
    panels[-1].set_xlabel(f"{unit} per response{suffix}")
    return figure
