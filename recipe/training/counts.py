"""What a run has seen and lost: tokens and losses, kept on the device until something is logged or saved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

NO_TOTALS = {"loss_sum": 0.0, "seconds": 0.0}
UNCHECKED_LIMIT = 1000  # losses that may wait to be checked, where nothing is logged; a check is one host sync


class Counts(TrainerCallback):
    """Tokens since the last log, losses that are not checked yet, and totals of the whole run; a trainer's callback.

    Attributes:
        window: input tokens without padding, with padding, and supervised ones, of all processes since the last log.
        window_start: when that window began; None before its first step.
        loss_sum: of all steps, also those before a checkpoint that was resumed; None if that checkpoint does not tell.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.before: Mapping[str, Any] = NO_TOTALS  # of a checkpoint that is resumed
        self.on_train_begin()

    def on_train_begin(self, *further: Any, **kwargs: Any) -> None:
        """Start to count, also anew with a smaller batch; from the totals of a checkpoint that is resumed."""
        totals, self.before = self.before, NO_TOTALS
        self.unchecked: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []  # step, loss, rows of micro-batches
        self.real: torch.Tensor | int = 0  # on the device
        self.supervised: torch.Tensor | int = 0
        self.computed = 0
        self.window, self.window_start = [0, 0, 0], None  # type: list[int], float | None
        self.loss_sum: float | None = totals.get("loss_sum")
        self._seconds_before: float | None = totals.get("seconds")
        self._start = time.perf_counter()

    @property
    def totals(self) -> dict[str, float | None]:
        """What a checkpoint keeps: the sum of the steps' losses, and the seconds of training until now."""
        before, now = self._seconds_before, time.perf_counter() - self._start
        return {"loss_sum": self.loss_sum, "seconds": None if before is None else before + now}

    def add(self, step: int, loss: torch.Tensor, inputs: Mapping[str, Any]) -> bool:
        """Keep what the next fetch needs of a micro-batch; whether a fetch is due."""
        computed = inputs["input_ids"].numel()
        real = inputs.get("lengths", inputs.get("attention_mask"))  # lengths of records in a shared row, or a 0/1 mask
        self.computed += computed
        self.real += computed if real is None else real.sum()
        self.unchecked.append((step, loss, inputs.get("row")))
        return len(self.unchecked) >= UNCHECKED_LIMIT

    def fetch(self) -> tuple[list[int], list[bool]] | None:
        """The tokens of all processes since the last fetch, as in `window`; which losses are finite, if not all are.

        None if there was no micro-batch. It is one host sync; every process calls it.
        """
        if not self.unchecked:
            return None
        losses = torch.stack([loss for _, loss, _ in self.unchecked]).float()  # each a share of its step's
        finite = losses.isfinite()
        counts = [self.real, self.computed, self.supervised, (~finite).sum()]
        summary = torch.stack([torch.as_tensor(count, device=losses.device) for count in counts])
        *tokens, bad = self.accelerator.reduce(summary, reduction="sum").tolist()
        if bad:
            return tokens, finite.tolist()
        if self.loss_sum is not None:
            for loss in self.accelerator.reduce(losses, reduction="mean").tolist():
                self.loss_sum += loss  # one by one: the sum does not depend on when it is fetched
        self.unchecked, self.real, self.computed, self.supervised = [], 0, 0, 0
        self.window = [before + new for before, new in zip(self.window, tokens, strict=True)]
        return tokens, []

    def first_bad(self, finite: list[bool]) -> list[tuple[int, float, list[int] | None]]:
        """Step, loss and rows of the first loss of this process that is not finite, as `fetch` told; or nothing."""
        if all(finite):
            return []
        step, loss, rows = self.unchecked[finite.index(False)]
        return [(step, loss.item(), None if rows is None else rows.tolist())]

    def end_window(self) -> dict[str, float]:
        """What the log tells of the window, which the next step begins anew: docs/trackers.md has the names."""
        real, computed, supervised = self.window
        seconds = time.perf_counter() - (self.window_start or 0)
        self.window, self.window_start = [0, 0, 0], None
        return {
            "tokens_per_second": round(real / seconds, 1),
            "padding": round(max(0.0, 1 - real / max(1, computed)), 4),
            "shared": round(max(0.0, 1 - computed / max(1, real)), 4),
            "supervised": round(supervised / max(1, real), 4),
        }
