"""Attention over rows in which a shared prefix stands once: `attn_implementation="shared_prefix"`.

Importing this module registers it with transformers. On batches of `recipe.collator.DataCollatorWithSharedPrefix`
(`attention="segments"`) each example attends to its group's prefix and to itself; all others (generation, padded
batches) go to SDPA as with `attn_implementation="sdpa"`.

Related work: Prefix Grouper (arXiv:2506.05433), Tree Training (arXiv:2511.00413).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"

Segments = tuple[tuple[int, tuple[int, ...]], ...]


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, segment by segment.

    Args:
        query: (1, heads, time, head size); key and value: (1, key heads, time, head size).
        segments: for each group the length of its prefix and the lengths of the rests of its examples, in tokens, in
            the order of the row; None for any other batch.

    Returns:
        (1, time, heads, head size), and None for the weights.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    repeats = query.shape[1] // key.shape[1]  # grouped-query attention
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    attend = partial(functional.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    outputs, start = [], 0
    for prefix, rests in segments:
        length = prefix + sum(rests)
        group = [states[:, :, start : start + length] for states in (query, key, value)]
        start += length
        if prefix:
            outputs.append(attend(*(states[:, :, :prefix] for states in group), is_causal=True))
        outputs.append(_attend_rests(attend, group, prefix, rests))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _attend_rests(
    attend: Callable[..., torch.Tensor], group: list[torch.Tensor], prefix: int, rests: tuple[int, ...]
) -> torch.Tensor:
    """The rests of one group, padded to (examples, heads, longest, head size), each behind the group's prefix.

    Only attention sees the padding, and causality keeps it from real tokens, because it comes last.
    """
    rows = [_pad(states[0, :, prefix:], rests) for states in group]
    mask = None
    if prefix:
        shared = [states[:, :, :prefix].expand(len(rests), -1, -1, -1) for states in group[1:]]
        rows[1:] = [torch.cat(pair, dim=2) for pair in zip(shared, rows[1:], strict=True)]
        longest = max(rests)
        mask = torch.ones(longest, prefix + longest, dtype=torch.bool, device=rows[0].device).tril(prefix)
    output = attend(*rows, attn_mask=mask, is_causal=mask is None)
    return torch.cat([row[:, :length] for row, length in zip(output, rests, strict=True)], dim=1)[None]


def _pad(states: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """(heads, time, head size) cut into `lengths`, as (examples, heads, longest, head size)."""
    parts = states.transpose(0, 1).split(lengths)
    return pad_sequence(parts, batch_first=True).transpose(1, 2)


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """SDPA's mask for padded batches; none for a row of segments, which transformers would take for a packed one."""
    return None if kwargs["attention_mask"] is None else sdpa_mask(**kwargs)


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, _mask)
