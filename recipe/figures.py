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

# the page's colours, as report.css has them: safe for the colour-blind, 3:1 at least against the ground
TEXT, MUTED, LINE = "#1f2328", "#59636e", "#d9dde2"
BASELINE_COLOR, TUNED_COLOR, WORSE_COLOR = "#7a838e", "#4c72b0", "#c05f26"
TRAIN_COLOR, VALIDATION_COLOR = TUNED_COLOR, WORSE_COLOR
WIDTH = 4.4  # inches; the page shows it 330 to 520 pixels wide, so that 9 pt stay legible on a phone
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.sans-serif": ["Segoe UI", "Helvetica Neue", "DejaVu Sans"],  # near the page's own font on most machines
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a family may be called $x_1$
    "svg.fonttype": "none",  # names in any script are drawn by the browser's fonts
    "svg.hashsalt": "report",  # the same figures give the same page
}


def save_png(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_whole(path, buffer.getvalue())


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
    paint(axes)
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


def canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    paint(axes)
    return figure, axes


def paint(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(axis="x", colors=MUTED)
    axes.tick_params(axis="y", colors=TEXT)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    for spine in axes.spines.values():
        spine.set_color(LINE)
