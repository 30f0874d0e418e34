"""Figures of a run and of an evaluation: each drawn once for the light page, once for the dark one, and as a PNG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

from recipe.provenance import write_whole

# the page's colours, as report.css has them: safe for the colour-blind, 3:1 at least against the ground
TEXT, MUTED, LINE = "#1f2328", "#59636e", "#d9dde2"
BASELINE_COLOR, TUNED_COLOR, WORSE_COLOR = "#7a838e", "#4c72b0", "#c05f26"
TIE_COLOR, INK = "#d4d9de", "#fffffe"  # ink: numbers on coloured bars
TRAIN_COLOR, VALIDATION_COLOR = TUNED_COLOR, WORSE_COLOR
DARK = {
    TEXT: "#e6e9ed", MUTED: "#9aa4af", LINE: "#3a414a", BASELINE_COLOR: "#98a2ad", TUNED_COLOR: "#7ea6e0",
    WORSE_COLOR: "#dd8452", TIE_COLOR: "#4a525c", INK: "#14171a",
}  # fmt: skip
WIDTH = 4.4  # inches; the page shows it 330 to 520 pixels wide, so that 9 pt stay legible on a phone
MAX_FAMILIES = 24
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.sans-serif": ["Segoe UI", "Helvetica Neue", "DejaVu Sans"],  # near the page's own font on most machines
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a family may be called $x_1$
    "svg.fonttype": "none",  # names in any script are drawn by the browser's fonts
    "svg.hashsalt": "report",  # the same figures give the same page
}


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


def save_png(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_whole(path, buffer.getvalue())


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


# --- the comparison ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """One row of the forest plot: a difference with its 95 % interval, in points."""

    label: str
    delta: float
    low: float
    high: float
    direction: str  # better or worse; anything else: not shown


def draw_deltas(groups: Mapping[str, Sequence[Interval]]) -> Figure:
    """Forest plot: tuned minus baseline with 95 % intervals beside the zero line, in percentage points.

    Args:
        groups: rows under each heading; the headings stand above their rows.
    """
    rows = sum(len(rows) + 1 for rows in groups.values())
    figure, axes = _canvas(height=0.55 + 0.205 * rows)
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
            face = "none" if color == MUTED else color  # hollow: which way it went is not shown
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


def draw_outcomes(outcomes: Mapping[str, tuple[int, int, int]]) -> Figure:
    """Examples on which tuned is better, equal or worse than baseline: one stacked bar a score.

    Args:
        outcomes: (better, equal, worse) counts of each score.
    """
    figure, axes = _canvas(height=0.75 + 0.34 * len(outcomes))
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


@dataclass(frozen=True)
class Lengths:
    """Lengths of one model's responses, or of the references (`role` "reference"), and a note to stand beside them."""

    label: str
    role: str  # reference, baseline, tuned, other
    values: Sequence[int]
    note: str


def draw_lengths(lengths: Sequence[Lengths], unit: str) -> Figure:
    """Histograms of lengths, one below the other on the same axis; the last bin holds all that is longer."""
    colors = {"baseline": BASELINE_COLOR, "tuned": TUNED_COLOR, "reference": TEXT}
    everything = np.concatenate([np.asarray(row.values) for row in lengths])
    longest = everything.max()
    # the longest 1 % of one model may be a hundred times the rest: they share the last bin
    edge = max(1, min(longest, int(1.5 * max(np.quantile(row.values, 0.99) for row in lengths)) + 1))
    bins = np.linspace(0, edge + 1, min(40, edge + 2))
    figure = Figure(figsize=(WIDTH, 0.55 + 0.72 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), 1, sharex=True, squeeze=False)[:, 0]
    for axes, row in zip(panels, lengths, strict=True):
        _paint(axes)
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
        # words stand over the right end: leave them room where bars reach up there
        right = np.histogram(values, bins=bins, weights=weights)[0][len(bins) // 2 :].max(initial=0)
        axes.set_ylim(0, top if right < 0.35 * top else 2.4 * max(right, 0.4 * top))
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    suffix = f" (last bar: {edge:,} and more)" if longest > edge else ""
    panels[-1].set_xlabel(f"{unit} per response{suffix}")
    return figure


# --- the training run -------------------------------------------------------------------------------------------------


def plot_loss(log_history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw training and validation loss over optimizer steps, with the tokens seen on a second axis.

    Args:
        log_history: `trainer.state.log_history`.
        path: the PNG to write.
    """
    with matplotlib.rc_context(STYLE):
        save_png(draw_loss(log_history, size=(7, 4)), path, dpi=150)


def draw_loss(
    log_history: Sequence[Mapping[str, Any]],
    chosen_step: int | None = None,
    size: tuple[float, float] = (WIDTH, 3.0),
) -> Figure:
    """Training and validation loss over optimizer steps, with the evaluated checkpoint marked.

    Args:
        log_history: `trainer.state.log_history`, or the one of `trainer_state.json`.
        chosen_step: the step whose weights were evaluated; None marks nothing.
    """
    train = [entry for entry in log_history if "loss" in entry]
    if not train:  # a run shorter than logging_steps has its mean only
        train = [{**entry, "loss": entry["train_loss"]} for entry in log_history if "train_loss" in entry]
    validation = [entry for entry in log_history if "eval_loss" in entry]
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    _paint(axes)
    marker = "o" if len(train) == 1 else None
    axes.plot(
        [e["step"] for e in train], [e["loss"] for e in train], color=TRAIN_COLOR, marker=marker, label="training"
    )
    if validation:
        steps, losses = [e["step"] for e in validation], [e["eval_loss"] for e in validation]
        axes.plot(steps, losses, color=VALIDATION_COLOR, marker="o", markersize=4, label="validation")
    if chosen_step is not None:
        axes.axvline(chosen_step, color=TEXT, linestyle=":", linewidth=1.2, label=f"chosen: step {chosen_step:,}")
    highest = max((e.get("loss", e.get("eval_loss")) for e in [*train, *validation]), default=1.0)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", ylim=(0, 1.05 * highest))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(color=LINE, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=TEXT)
    if train and "num_input_tokens_seen" in train[-1]:
        tokens_per_step = train[-1]["num_input_tokens_seen"] / train[-1]["step"]
        top = axes.secondary_xaxis("top", functions=(lambda s: s * tokens_per_step, lambda t: t / tokens_per_step))
        top.xaxis.set_major_formatter(EngFormatter())
        top.xaxis.set_major_locator(MaxNLocator(6))
        top.tick_params(colors=MUTED)
        top.spines["top"].set_color(LINE)
        top.set_xlabel("tokens seen", color=MUTED)
    return figure


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    _paint(axes)
    return figure, axes


def _paint(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(axis="x", colors=MUTED)
    axes.tick_params(axis="y", colors=TEXT)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    for spine in axes.spines.values():
        spine.set_color(LINE)
