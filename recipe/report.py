"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

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
