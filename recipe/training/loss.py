"""Cross-entropy straight from hidden states: the head in chunks, so that no logits of a whole batch exist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from recipe.collator import IGNORE_INDEX

CHUNK = 2048  # positions whose logits are in memory at a time, for GPT-2 in bfloat16 206 MB
# logits in float32 at a time: on a CPU as many as a cache holds, on a GPU as many as make a launch worthwhile
SLICE = {"cpu": 2**20}
SLICE_ON_ACCELERATORS = 2**26


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Cross-entropies in nats, summed in float32 at least, of a linear layer's logits.

    Equal to `cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="sum")`, which keeps all logits in
    three copies. Here one chunk of logits becomes its own slope in place; more than one are made gradients with the
    loss, chunk by chunk, and only these are kept, as in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989). Under
    autocast the products are in its type. Good for one backward pass.

    `torch.nn.functional.linear_cross_entropy` (torch 2.13) does the same, but returns a bfloat16 loss from bfloat16
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
        wanted = ctx.needs_input_grad[:3]
        precision = _precise(hidden.dtype)
        states = _in_autocast_type(hidden)
        one_chunk = len(states) <= CHUNK
        of_hidden = torch.empty_like(states) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=precision) if wanted[1] and not one_chunk else None
        of_bias = torch.zeros_like(bias, dtype=precision) if wanted[2] and bias is not None else None
        total = hidden.new_zeros((), dtype=precision)
        logits = states.new_empty(0)
        for chunk, logits in _chunks(states, weight, bias):
            for piece, log_probabilities in _slices(logits):
                target = targets[chunk][piece, None]
                counted = target != IGNORE_INDEX
                target = target.where(counted, 0)
                total -= log_probabilities.gather(-1, target).where(counted, 0).sum()
                # the slope, in place of the logits: the softmax, minus one at the target
                slope = log_probabilities.exp_().scatter_add_(-1, target, -torch.ones_like(target, dtype=precision))
                logits[piece] = slope.mul_(counted)
            if of_hidden is not None:
                of_hidden[chunk] = logits @ weight
            if of_weight is not None:
                of_weight += logits.T @ states[chunk]
            if of_bias is not None:
                of_bias += logits.sum(0, dtype=precision)
        # The head's gradient is as large as the head: written twice less where it is made once, by the backward pass.
        kept = (hidden, logits) if wanted[1] and one_chunk else (None, None)
        ctx.save_for_backward(of_hidden, of_weight, of_bias, *kept)
        ctx.types = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        *slopes, hidden, slope = ctx.saved_tensors
        scaled = [None if each is None else each.to(scale.dtype).mul_(scale) for each in slopes]
        if slope is not None:
            scaled[1] = slope.T @ (hidden * scale).to(slope.dtype)
        gradients = (None if each is None else each.to(dtype) for each, dtype in zip(scaled, ctx.types, strict=True))
        return *gradients, None


@torch.no_grad()
def token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy in nats of each target, and whether it has the largest logit: (targets,) float and bool.

    A target of -100 has the loss 0 and is not predicted. Arguments as for `linear_cross_entropy`.
    """
    losses, correct = [], []
    for chunk, logits in _chunks(_in_autocast_type(hidden), weight, bias):
        for piece, log_probabilities in _slices(logits):
            target = targets[chunk][piece]
            losses.append(functional.nll_loss(log_probabilities, target, reduction="none", ignore_index=IGNORE_INDEX))
            correct.append(log_probabilities.argmax(-1) == target)
    return torch.cat(losses), torch.cat(correct)


def _in_autocast_type(tensor: torch.Tensor) -> torch.Tensor:
    device = tensor.device.type
    lowered = tensor.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return tensor.to(torch.get_autocast_dtype(device)) if lowered else tensor


def _precise(dtype: torch.dtype) -> torch.dtype:
    """Half precision loses small probabilities."""
    return torch.promote_types(dtype, torch.float32)


def _chunks(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits, (at most `CHUNK`, vocab), and the positions they belong to."""
    for start in range(0, max(1, len(states)), CHUNK):
        chunk = slice(start, start + CHUNK)
        yield chunk, functional.linear(states[chunk], weight, bias)


def _slices(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Log-probabilities of a few rows at a time, and which rows of the chunk they are."""
    rows = max(1, SLICE.get(logits.device.type, SLICE_ON_ACCELERATORS) // logits.shape[-1])
    for start in range(0, max(1, len(logits)), rows):
        piece = slice(start, start + rows)
        yield piece, functional.log_softmax(logits[piece], -1, dtype=_precise(logits.dtype))
