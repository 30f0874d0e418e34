"""Cross-entropy straight from hidden states: the vocabulary head is computed in chunks, never for a whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import EvalPrediction

from recipe.collator import IGNORE_INDEX
from recipe.data.origin import source_names, source_of_rows

CHUNK = 2048  # positions whose logits are in memory at a time: 206 MB for GPT-2 in bfloat16
# how many logits to convert to float32 at once: few enough for a CPU's cache, enough to keep a GPU busy
SLICE = {"cpu": 2**20}
SLICE_ON_ACCELERATORS = 2**26


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """The summed cross-entropy, in nats, of the logits `linear(hidden, weight, bias)`, in float32 or wider.

    Equal to `cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="sum")`, which keeps three copies
    of all logits. Here each chunk of logits is overwritten by its own gradient. If there are several chunks, the
    forward pass also computes the gradients of the arguments, and keeps these instead of the logits, as Liger Kernel
    does (Hsu et al. 2024, arXiv:2410.10989). Under autocast, matrix products use its type. Call `backward` only once.

    `torch.nn.functional.linear_cross_entropy` (torch 2.13) does the same, but returns a bfloat16 loss for bfloat16
    inputs, which is off by up to half a percent.

    Args:
        hidden: (targets, hidden size). weight: (vocab, hidden size). bias: (vocab,) or None.
        targets: (targets,) ids; -100 where nothing is to be learned.

    Example::

        loss = linear_cross_entropy(hidden, head.weight, head.bias, targets) / (targets != -100).sum()
        loss.backward()
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        precision = _precise(hidden.dtype)
        states = _in_autocast_type(hidden)
        one_chunk = len(states) <= CHUNK
        hidden_gradient = torch.empty_like(states) if for_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=precision) if for_weight and not one_chunk else None
        bias_gradient = torch.zeros_like(bias, dtype=precision) if for_bias and bias is not None else None
        total = hidden.new_zeros((), dtype=precision)
        logits = states.new_empty(0)
        for chunk, logits in _chunks(states, weight, bias):
            for rows, log_probabilities in _slices(logits):
                target = targets[chunk][rows, None]
                counted = target != IGNORE_INDEX
                target = target.where(counted, 0)
                total -= log_probabilities.gather(-1, target).where(counted, 0).sum()
                # the gradient of the logits, in their place: the softmax, minus one at the target
                gradient = log_probabilities.exp_().scatter_add_(-1, target, -torch.ones_like(target, dtype=precision))
                logits[rows] = gradient.mul_(counted)
            if hidden_gradient is not None:
                hidden_gradient[chunk] = logits @ weight
            if weight_gradient is not None:
                weight_gradient += logits.T @ states[chunk]
            if bias_gradient is not None:
                bias_gradient += logits.sum(0, dtype=precision)
        # The head's gradient is as large as the head. With one chunk the backward pass computes it, which saves two
        # passes over that memory.
        kept = (hidden, logits) if for_weight and one_chunk else (None, None)
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient, *kept)
        ctx.types = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        *computed, hidden, logits_gradient = ctx.saved_tensors
        gradients = [None if each is None else each.to(scale.dtype).mul_(scale) for each in computed]
        if logits_gradient is not None:
            gradients[1] = logits_gradient.T @ (hidden * scale).to(logits_gradient.dtype)
        return *(
            None if each is None else each.to(dtype) for each, dtype in zip(gradients, ctx.types, strict=True)
        ), None


@torch.no_grad()
def token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy in nats of each target, and whether it has the largest logit: (targets,) float and bool.

    A target of -100 has the loss 0 and is not predicted. Arguments as for `linear_cross_entropy`.
    """
    losses, correct = [], []
    for chunk, logits in _chunks(_in_autocast_type(hidden), weight, bias):
        for rows, log_probabilities in _slices(logits):
            target = targets[chunk][rows]
            losses.append(functional.nll_loss(log_probabilities, target, reduction="none", ignore_index=IGNORE_INDEX))
            correct.append(log_probabilities.argmax(-1) == target)
    return torch.cat(losses), torch.cat(correct)


def _in_autocast_type(tensor: torch.Tensor) -> torch.Tensor:
    device = tensor.device.type
    lowered = tensor.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return tensor.to(torch.get_autocast_dtype(device)) if lowered else tensor


def _precise(dtype: torch.dtype) -> torch.dtype:
    """Float32 at least: half precision loses small probabilities."""
    return torch.promote_types(dtype, torch.float32)


def _chunks(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Positions, and their logits: (at most `CHUNK`, vocab)."""
    for start in range(0, max(1, len(states)), CHUNK):
        chunk = slice(start, start + CHUNK)
        yield chunk, functional.linear(states[chunk], weight, bias)


def _slices(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """A few rows of a chunk at a time, and their log-probabilities."""
    count = max(1, SLICE.get(logits.device.type, SLICE_ON_ACCELERATORS) // logits.shape[-1])
    for start in range(0, max(1, len(logits)), count):
        rows = slice(start, start + count)
        yield rows, functional.log_softmax(logits[rows], -1, dtype=_precise(logits.dtype))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    """In nats, in float32 at least: half precision loses small probabilities."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(
        precise.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction
    )


def sums_of_records(each: torch.Tensor, inputs: Mapping[str, Any], shape: Sequence[int]) -> torch.Tensor:
    """What belongs to the targets (targets, numbers), summed for each record of a batch: (records, numbers).

    Args:
        inputs: the batch. shape: of its labels; the targets are all of these, or those in `supervised`.
    """
    if "example" in inputs:  # a shared row
        rows, example = len(inputs["row"]), inputs["example"]
    else:
        rows, width = shape
        example = torch.arange(rows * width, device=each.device) // width
        if len(each) < len(example):
            example = example[inputs["supervised"]]
    if "examples" in inputs:  # of records that have several
        counts = inputs["examples"]
        record = torch.arange(len(counts), device=each.device).repeat_interleave(counts, output_size=rows)
        rows, example = len(counts), record[example]
    return each.new_zeros(rows, each.shape[1]).index_add(0, example, each)


def targets_of(inputs: Mapping[str, Any]) -> torch.Tensor:
    """What each position should predict, (batch, time): the collator's, or shifted here if it did not shift."""
    if "shift_labels" in inputs:
        return inputs["shift_labels"]
    return functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)


def rows_of_records(inputs: Mapping[str, Any], records: int) -> torch.Tensor:
    """The number of each record of a batch, (records,), as its dataset has it in `row`; -1 where it has none."""
    if "row" not in inputs:
        return torch.full((records,), -1, device=inputs["input_ids"].device)
    if "examples" not in inputs:
        return inputs["row"]
    return inputs["row"][inputs["examples"].cumsum(0) - 1]  # it stands there for each example


def token_weighted_metrics(predictions: EvalPrediction, dataset: Any = None) -> dict[str, float]:
    """Loss (nats per target), perplexity and accuracy from the per-row sums of `InstructionTrainer.prediction_step`.

    Of a mixture, `loss_SOURCE` is the loss of the records of each source in `dataset`.
    """
    sums, (targets, rows) = np.asarray(predictions.predictions, dtype=np.float64), np.transpose(predictions.label_ids)
    losses, correct = sums.sum(axis=0)
    loss = float(losses / targets.sum())
    metrics = {
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "next_token_accuracy": float(correct / targets.sum()),
    }
    if names := source_names(dataset):
        of_source = source_of_rows(dataset.info, rows)
        for index, name in enumerate(names):
            if count := targets[of_source == index].sum():  # a source may have no records to validate on
                metrics[f"loss_{name}"] = float(sums[of_source == index, 0].sum() / count)
    return metrics
