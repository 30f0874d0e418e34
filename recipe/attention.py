"""Attention over rows that hold a shared prefix once: `attn_implementation="shared_prefix"`.

Importing this module registers it with transformers. In batches of `DataCollatorWithSharedPrefix` with
`attention="segments"`, each example attends to its group's prefix and to itself. All other batches (generation,
padding, rows with a mask) are computed by SDPA.

A suffix is what follows the prefix in an example. Where FlashAttention runs (CUDA, half precision, no dropout), one
call computes a whole row; elsewhere a call computes the prefix of a group, or a bundle of its suffixes, padded.

Related work: Prefix Grouper (arXiv:2506.05433), Tree Training (arXiv:2511.00413).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"
MATMUL_LIMIT = 512 * 512  # queries times keys of a row; up to here, a CPU multiplies matrices instead of calling SDPA
BUNDLE_COST = 32_768  # of one more call: as many pairs of query and key take as long

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
        segments: for each group, in the order of the row, the length of its prefix and the lengths of its suffixes, in
            tokens; None for any other batch.

    Returns:
        (1, time, heads, head size), and None in place of the attention weights.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings return float32
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]  # (time, heads, head size)
    if dropout == 0 and _flash_runs(query, key, value):
        return _attend_varlen(rows, segments, scaling)[None], None
    outputs, start = [], 0
    for prefix, suffixes in segments:
        length = prefix + sum(suffixes)
        group = [states[start : start + length] for states in rows] if len(segments) > 1 else rows
        start += length
        outputs.append(_attend_group(group, prefix, suffixes, dropout, scaling))
    return torch.cat(outputs)[None], None


def _flash_runs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlashAttention supports device, dtype and head size, without the padding of heads that SDPA adds."""
    grouped = query.shape[1] != key.shape[1]
    return (
        query.is_cuda
        and query.shape[-1] % 8 == 0
        and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, grouped))
    )


def _attend_varlen(rows: list[torch.Tensor], segments: Segments, scaling: float | None) -> torch.Tensor:
    """All segments of the row in one call; query, key, value and result are (time, heads, head size) each.

    A suffix has the keys of its prefix and its own. Where there are more keys than queries, FlashAttention takes
    the queries for the last positions, which is what a suffix needs.
    """
    query, key, value = rows
    gather, query_starts, key_starts, most_queries, most_keys = _packing(segments, query.device)
    key, value = _Repeat.apply(key, gather), _Repeat.apply(value, gather)
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True  # torch 2.11 has no such argument
    output: Any = varlen_attn(query, key, value, query_starts, key_starts, most_queries, most_keys, **options)
    return output


def _attend_group(
    group: list[torch.Tensor], prefix: int, suffixes: tuple[int, ...], dropout: float, scaling: float | None
) -> torch.Tensor:
    """One group: the prefix attends to itself, each suffix to the prefix and to itself. (time, heads, head size).

    Suffixes are padded to the longest of their bundle. No real token attends to padding, because padding comes last.
    """
    if not any(suffixes):  # copies of one example
        query, key, value = (states[None] for states in group)
        return _attend(query, key, value, dropout, scaling)[0]
    sizes = [prefix, sum(suffixes)]
    shared, own = zip(*(states.split(sizes) for states in group), strict=True)
    gather, scatter, bundles = _padding(suffixes, prefix, group[0].device)
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
    """Causal attention, (batch, time, heads, head size) each; the queries are the last `time` positions of the keys."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # grouped-query attention
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    time, keys = query.shape[2], key.shape[2]
    mask = _causal(time, keys, query.device)
    if query.device.type == "cpu" and time * keys <= MATMUL_LIMIT:
        # for short rows in bfloat16 four times as fast as SDPA's CPU kernel; softmax sums in float32 on its own
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
    """(time, ...) to (keys, ...): a prefix is repeated for each example. Gradients are summed in float32."""

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
    """(time, ...) to (slots, ...): suffixes to padded bundles. Autograd's own backward pass would add row by row."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        return rows.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (scatter,) = ctx.saved_tensors
        return gradient.index_select(0, scatter), None, None  # the gradient of padding is zero: no token attends to it


class _Unpad(torch.autograd.Function):
    """(slots, ...) to (time, ...): padded bundles back to suffixes."""

    @staticmethod
    def forward(ctx: Any, slots: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        ctx.slots = len(gather)
        return slots.index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (scatter,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.slots, *gradient.shape[1:]).index_copy_(0, scatter, gradient), None, None


@lru_cache(maxsize=8)  # all layers of a step use the same
@torch.inference_mode(False)  # training may use a tensor that evaluation has put into the cache
def _packing(segments: Segments, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """The arguments of a call for all segments of a row; empty segments are left out.

    Returns:
        The token of each key, (keys,); the first query of each segment and the end of the last one, the same for keys,
        (segments + 1,) int32 each; the most queries and the most keys of a segment.
    """
    gather, queries, keys, start = [], [0], [0], 0
    for prefix, suffixes in segments:
        shared = torch.arange(start, start + prefix)
        for length, before in ((prefix, shared[:0]), *((suffix, shared) for suffix in suffixes)):
            if length:
                gather += [before, torch.arange(start, start + length)]
                queries.append(length)
                keys.append(len(before) + length)
            start += length
    starts = (torch.tensor(lengths).cumsum(0, dtype=torch.int32) for lengths in (queries, keys))
    index, query_starts, key_starts = (_move(each, device) for each in (torch.cat(gather), *starts))
    return index, query_starts, key_starts, max(queries), max(keys)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _padding(
    lengths: tuple[int, ...], prefix: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Suffixes of similar length in padded bundles; empty suffixes are left out.

    Returns:
        The token in each slot, (slots,), for padding the first token of its suffix; the slot of each token, (time,);
        and for each bundle its number of suffixes and the length of the longest.
    """
    sizes = torch.tensor(lengths)
    first = sizes.cumsum(0) - sizes
    order = sizes.argsort(stable=True)[int((sizes == 0).sum()) :]
    tokens, filled, bundles = [], [], []
    for members in order.split(bundle_sizes(sizes[order].tolist(), prefix)):
        slots = torch.arange(int(sizes[members[-1]]))
        real = slots < sizes[members, None]  # (suffixes, slots)
        filled.append(real.flatten())
        tokens.append((first[members, None] + slots.where(real, 0)).flatten())
        bundles.append((len(members), len(slots)))
    gather, taken = torch.cat(tokens), torch.cat(filled).nonzero().flatten()
    scatter = torch.empty_like(taken).index_copy_(0, gather[taken], taken)
    return _move(gather, device), _move(scatter, device), bundles


def bundle_sizes(lengths: list[int], prefix: int) -> list[int]:
    """How many suffixes go into each bundle, for the least work; `lengths` in tokens, shortest first.

    >>> bundle_sizes([10, 12, 14, 400, 410], prefix=24)
    [3, 2]
    """
    costs, starts = [0], [0]
    for end, longest in enumerate(lengths, start=1):
        pairs = longest * (prefix + longest)  # of query and key, for each rest of the bundle
        costs_from = [costs[start] + (end - start) * pairs for start in range(end)]
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
    """Which keys each of the last `time` tokens attends to, (time, keys) bool."""
    return torch.ones(time, keys, dtype=torch.bool, device=device).tril(keys - time)


def _move(index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device; the host does not wait for a GPU."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """SDPA's mask, but none for a row of segments, in which transformers would see packed sequences."""
    cached = kwargs["q_length"] < kwargs["kv_length"]  # generation: no mask without padding, but new tokens need one
    window = kwargs.get("local_size") is not None  # no model with a window is given rows of segments
    return sdpa_mask(**kwargs) if cached or window or kwargs["attention_mask"] is not None else None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, _mask)
