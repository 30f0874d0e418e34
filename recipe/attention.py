"""Attention over rows in which a shared prefix stands once: `attn_implementation="shared_prefix"`.

Importing this module registers it with transformers. On batches of `recipe.collator.DataCollatorWithSharedPrefix`
(`attention="segments"`) each example attends to its group's prefix and to itself; all others (generation, padded
batches, rows with a mask) go to SDPA as with `attn_implementation="sdpa"`.

Where FlashAttention runs (CUDA, half precision, no attention dropout) a layer is one call for all segments of the row;
elsewhere it is one for each group's prefix, and one for each bundle of its rests, padded to the longest of the bundle.

Related work: Prefix Grouper (arXiv:2506.05433), Tree Training (arXiv:2511.00413).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"
MATMUL_LIMIT = 512 * 512  # queries times keys of a row
BUNDLE_COST = 32_768  # of a further call, in pairs of query and key

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
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings make float32 of them under autocast
    # (time, heads, head size): the rows of a batch of one
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]
    if dropout == 0 and _flash_runs(query, key, value):
        return _attend_varlen(rows, segments, scaling, varlen_attn)[None], None
    outputs, start = [], 0
    for prefix, rests in segments:
        length = prefix + sum(rests)
        group = [states[start : start + length] for states in rows] if len(segments) > 1 else rows
        start += length
        outputs.append(_attend_group(group, prefix, rests, dropout, scaling))
    return torch.cat(outputs)[None], None


def _flash_runs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlashAttention knows device, dtype and head size; torch pads other head sizes for SDPA alone."""
    grouped = query.shape[1] != key.shape[1]
    return (
        query.is_cuda
        and query.shape[-1] % 8 == 0
        and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, grouped))
    )


def _attend_varlen(
    rows: list[torch.Tensor], segments: Segments, scaling: float | None, kernel: Callable[..., Any]
) -> torch.Tensor:
    """All segments of the row in one call: (time, heads, head size).

    The queries are the row as it is. The keys of a rest are its prefix's and its own, and its queries are the last of
    them: that is how FlashAttention aligns causality where there are more keys than queries.

    Args:
        rows: query, key and value, (time, heads, head size) each.
        kernel: `torch.nn.attention.varlen.varlen_attn`, or another of its signature.
    """
    query, *shared = rows
    gather, query_starts, key_starts, most_queries, most_keys = _packing(segments, query.device)
    key, value = (_Repeat.apply(states, gather) for states in shared)
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}  # torch 2.11 has no such argument
    return kernel(
        query, key, value, query_starts, key_starts, most_queries, most_keys,
        scale=scaling, window_size=(-1, 0), **grouped,
    )  # fmt: skip


def _attend_group(
    group: list[torch.Tensor], prefix: int, rests: tuple[int, ...], dropout: float, scaling: float | None
) -> torch.Tensor:
    """A prefix to itself, and each rest, behind the prefix, to both: (time, heads, head size).

    The rests are padded to the longest of their bundle. Only attention sees the padding, and causality keeps it from
    real tokens, because it comes last.
    """
    if not any(rests):  # the same example, several times
        query, key, value = (states[None] for states in group)
        return _attend(query, key, value, dropout, scaling)[0]
    sizes = [prefix, sum(rests)]
    shared, own = zip(*(states.split(sizes) for states in group), strict=True)
    gather, scatter, bundles = _padding(rests, prefix, group[0].device)
    slots = [count * longest for count, longest in bundles]
    padded = (_Pad.apply(states, gather, scatter).split(slots) for states in own)
    outputs = []
    for (count, longest), *bundle in zip(bundles, *padded, strict=True):
        query, key, value = (states.unflatten(0, (count, longest)) for states in bundle)
        if prefix:
            before = (states.expand(count, *states.shape) for states in shared[1:])
            key, value = (torch.cat(pair, dim=1) for pair in zip(before, (key, value), strict=True))
        outputs.append(_attend(query, key, value, dropout, scaling).flatten(0, 1))
    output = _Unpad.apply(torch.cat(outputs), gather, scatter)
    if prefix:
        query, key, value = (states[None] for states in shared)
        output = torch.cat([_attend(query, key, value, dropout, scaling)[0], output])
    return output


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    """Causal attention of the last tokens of each row, (batch, time, heads, head size), to all of its keys."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    repeats = query.shape[1] // key.shape[1]  # grouped-query attention
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    time, keys = query.shape[2], key.shape[2]
    mask = _causal(time, keys, query.device)
    if query.device.type == "cpu" and time * keys <= MATMUL_LIMIT:
        # for short rows four times as fast in bfloat16 as the CPU kernel behind SDPA; softmax sums in float32 by itself
        with torch.autocast("cpu", enabled=False):
            scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            output = functional.dropout(weights, dropout) @ value
    else:
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    return output.transpose(1, 2)


class _Repeat(torch.autograd.Function):
    """(time, ...) to (keys, ...), prefixes once for each example. Sums gradients in float32, whatever the dtype."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gather)
        ctx.time = len(rows)
        return rows.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (gather,) = ctx.saved_tensors
        total = gradient.new_zeros(ctx.time, *gradient.shape[1:], dtype=torch.float32)
        return total.index_add_(0, gather, gradient.float()).to(gradient.dtype), None


class _Pad(torch.autograd.Function):
    """(time, ...) to (slots, ...). Its transpose is `_Unpad`, so that no gradient is added up row by row."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        return rows.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (scatter,) = ctx.saved_tensors
        return gradient.index_select(0, scatter), None, None  # no real token sees a padded one: its gradient is zero


class _Unpad(torch.autograd.Function):
    """(slots, ...) to (time, ...), the transpose of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, slots: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        ctx.slots = len(gather)
        return slots.index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (scatter,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.slots, *gradient.shape[1:]).index_copy_(0, scatter, gradient), None, None


@lru_cache(maxsize=8)  # every layer of a step asks for the same
@torch.inference_mode(False)  # what evaluation made first, training may save for its backward pass
def _packing(segments: Segments, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """Which keys the segments of a row see, and where each segment starts; empty segments are left out.

    Returns:
        The token of each key, (keys,); where the queries of each segment start and where the last end, and the same
        of its keys, (segments + 1,) int32; the most queries and the most keys of a segment.
    """
    gather, queries, keys, start = [], [0], [0], 0
    for prefix, rests in segments:
        shared = torch.arange(start, start + prefix)
        for length, before in ((prefix, shared[:0]), *((rest, shared) for rest in rests)):
            if length:
                gather += [before, torch.arange(start, start + length)]
                queries.append(length)
                keys.append(len(before) + length)
            start += length
    query_starts, key_starts = (torch.tensor(lengths).cumsum(0, dtype=torch.int32) for lengths in (queries, keys))
    index, query_starts, key_starts = (_move(each, device) for each in (torch.cat(gather), query_starts, key_starts))
    return index, query_starts, key_starts, max(queries), max(keys)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _padding(
    lengths: tuple[int, ...], prefix: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Rests of like length side by side in padded bundles; empty ones are left out.

    Returns:
        The token each slot holds, (slots,), in padding the first of its example; the slot of each token, (time,); and
        of each bundle the number of examples and the longest.
    """
    each = torch.tensor(lengths)
    first = each.cumsum(0) - each
    order = each.argsort(stable=True)[int((each == 0).sum()) :]
    tokens, real, bundles = [], [], []
    for members in order.split(bundle_sizes(each[order].tolist(), prefix)):
        slots = torch.arange(int(each[members[-1]]))
        real.append((slots < each[members, None]).flatten())
        tokens.append((first[members, None] + slots.where(slots < each[members, None], 0)).flatten())
        bundles.append((len(members), len(slots)))
    gather, taken = torch.cat(tokens), torch.cat(real).nonzero().flatten()
    scatter = torch.empty_like(taken).index_copy_(0, gather[taken], taken)
    return _move(gather, device), _move(scatter, device), bundles


def bundle_sizes(lengths: list[int], prefix: int) -> list[int]:
    """How to cut examples into bundles with the least work; `lengths` of their rests in tokens, shortest first.

    >>> bundle_sizes([10, 12, 14, 400, 410], prefix=24)
    [3, 2]
    """
    costs, starts = [0], [0]
    for end, longest in enumerate(lengths, start=1):
        each = longest * (prefix + longest)
        costs_from = [costs[start] + (end - start) * each for start in range(end)]
        best = min(costs_from)
        costs.append(best + BUNDLE_COST)
        starts.append(costs_from.index(best))
    sizes, end = [], len(lengths)
    while end:
        sizes.append(end - starts[end])
        end = starts[end]
    return sizes[::-1]


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _causal(time: int, keys: int, device: torch.device) -> torch.Tensor:
    """Which of its keys each of the last `time` tokens may see, (time, keys) bool."""
    return torch.ones(time, keys, dtype=torch.bool, device=device).tril(keys - time)


def _move(index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device, without waiting for what it has still to do."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """SDPA's mask; none for a row of segments, which transformers would take for a packed one.

    Without padding, generation comes without a mask too, and what it adds behind a cache needs one.
    """
    whole = kwargs["q_length"] == kwargs["kv_length"]
    return None if kwargs["attention_mask"] is None and whole else sdpa_mask(**kwargs)


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, _mask)
