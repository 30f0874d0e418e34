"""What a step on a CPU can leave undone to its gradients: each saves a pass or more over the memory of all weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def clip_where_needed(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_`, which multiplies all gradients even where the factor is 1.

    Whether it is needed is read from the device, so use it on a CPU alone.

    Returns:
        The norm of all gradients before, a scalar.

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_where_needed([weight], max_norm=1.0), weight.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """
    with_gradients = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in with_gradients])  # type: ignore[misc]
    if not max_norm / (norm + 1e-6) >= 1:  # the factor of `clip_grads_with_norm_`; true for NaN, too
        torch.nn.utils.clip_grads_with_norm_(with_gradients, max_norm, norm)
    return norm


@contextmanager
def embedding_rows_only(model: nn.Module | None) -> Iterator[None]:
    """While it lasts, a backward pass adds the gradients of looked-up rows to the embedding's `weight.grad` in place.

    PyTorch's own makes a gradient of the size of the weight, zero but for the rows of a batch's tokens, and adds it
    whole: for GPT-2 154 MB that are written, read and added in each micro-batch, though its head, which has the same
    weight, has already left a gradient there. Sums are the same but for the order of their terms.

    Input embeddings that are frozen, sparse, renormalized or of another class than `nn.Embedding` stay as they are, and
    without a model nothing changes. What listens to the weight's gradient does not see that of the rows: do not use it
    with DDP or sharding.

    Example::

        with embedding_rows_only(model):
            model(input_ids=ids, labels=ids).loss.backward()
    """
    embedding: Any = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(embedding) is not nn.Embedding or not _is_plain(embedding):
        yield
        return
    handle = embedding.register_forward_hook(_add_rows_in_backward)
    try:
        yield
    finally:
        handle.remove()


def _is_plain(embedding: nn.Embedding) -> bool:
    special = embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm is not None
    return embedding.weight.requires_grad and embedding.weight.is_leaf and not special


def _add_rows_in_backward(module: Any, args: tuple[torch.Tensor, ...], looked_up: torch.Tensor) -> torch.Tensor | None:
    """A forward hook: the same vectors, (…, hidden size), whose gradient goes to the rows of the weight."""
    if not looked_up.requires_grad:  # in an evaluation
        return None
    ids, weight = args[0].flatten(), module.weight

    def add(gradient: torch.Tensor) -> None:
        rows = gradient.flatten(0, -2).to(weight.dtype)
        if module.padding_idx is not None:  # its row never learns
            rows = rows.masked_fill((ids == module.padding_idx)[:, None], 0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, rows)

    vectors = looked_up.detach().requires_grad_()
    vectors.register_hook(add)
    return vectors
