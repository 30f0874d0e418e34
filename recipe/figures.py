"""Colours and style of all figures, and the loss curve of a training run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from recipe.files import write_whole

# the colours of report.css: safe for the colour-blind, with a contrast of at least 3:1 to the background
TEXT, MUTED, LINE = "#1f2328", "#59636e", "#d9dde2"
BASELINE_COLOR, TUNED_COLOR, WORSE_COLOR = "#7a838e", "#4c72b0", "#c05f26"
WIDTH = 4.4  # inches; the page shows it 330 to 520 pixels wide, so 9 pt is legible on a phone
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.sans-serif": ["Segoe UI", "Helvetica Neue", "DejaVu Sans"],  # close to the page's font on most machines
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a family may be called $x_1$
    "svg.fonttype": "none",  # the browser draws names in any script with its own fonts
    "svg.hashsalt": "report",  # the same data give the same page
}


def save_png(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure, completely or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_whole(path, buffer.getvalue())


def plot_loss(log_history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw `trainer.state.log_history` to a PNG: losses over optimizer steps, the tokens seen on a second axis."""
    with matplotlib.rc_context(STYLE):
        save_png(draw_loss(log_history, size=(7, 4)), path, dpi=150)


def draw_loss(
    log_history: Sequence[Mapping[str, Any]], chosen_step: int | None = None, size: tuple[float, float] = (WIDTH, 3.0)
) -> Figure:
    """Training and validation loss over optimizer steps; `chosen_step`, if given, is marked as the one evaluated."""
    train = [entry for entry in log_history if "loss" in entry]
    if not train:  # a run shorter than logging_steps has only its mean
        train = [{**entry, "loss": entry["train_loss"]} for entry in log_history if "train_loss" in entry]
    validation = [entry for entry in log_history if "eval_loss" in entry]
    figure, axes = canvas(size[1], size[0])
    steps, losses = [e["step"] for e in train], [e["loss"] for e in train]
    axes.plot(steps, losses, color=TUNED_COLOR, marker="o" if len(train) == 1 else None, label="training")
    if validation:
        steps, losses = [e["step"] for e in validation], [e["eval_loss"] for e in validation]
        axes.plot(steps, losses, color=WORSE_COLOR, marker="o", markersize=4, label="validation")
    if chosen_step is not None:
        axes.axvline(chosen_step, color=TEXT, linestyle=":", linewidth=1.2, label=f"chosen: step {chosen_step:,}")
    highest = max([e["loss"] for e in train] + [e["eval_loss"] for e in validation], default=1.0)
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


def canvas(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure of this size in inches, with one painted plot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    paint(axes)
    return figure, axes


def paint(axes: Axes) -> None:
    """Give a plot the page's colours, on a transparent ground."""
    axes.patch.set_alpha(0)
    axes.tick_params(axis="x", colors=MUTED)
    axes.tick_params(axis="y", colors=TEXT)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.spines[:].set_color(LINE)
