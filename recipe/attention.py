"""Attention over rows in which examples share their starts: `attn_implementation="shared_prefix"`.

Importing this module registers it with transformers. In batches of `DataCollatorWithSharedPrefix` with
`attention="segments"`, a token attends to what its example has up to there. All other batches (generation, padding,
rows with a mask) are computed by SDPA.

A run is what an example adds to the row; what it shares with earlier ones stands above it. Attention within runs, and
attention of runs to what stands above them, are computed on their own, and merged by their log-sum-exps, as in ring
attention: keys and values of a shared start are there once. FlashAttention does both where it runs (CUDA, half
precision, no dropout), elsewhere matrix products do.

Related work: Tree Training (arXiv:2511.00413), Prefix Grouper (arXiv:2506.05433), Ring Attention (arXiv:2310.01889).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"
LONGEST = 256  # tokens of a run that matrix products take at once; what precedes them stands above them
MOST_PAIRS = 2**17  # of query and key in one matrix product: few enough for a CPU's cache
BUNDLE_COST = 2**15  # of one more bundle: as many pairs take as long

Segments = tuple[tuple[int, int], ...]
Slices = tuple[tuple[int, int], ...]  # first token and end of each


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
    """Scaled dot-product attention of each token to its own example.

    Args:
        query: (1, heads, time, head size); key and value: (1, key heads, time, head size).
        segments: for each run of the row, how many tokens its example shares with the one before, and how many it adds;
            None for any other batch.

    Returns:
        (1, time, heads, head size), and None in place of the attention weights.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings return float32
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = FLASH if dropout == 0 and _flash_runs(query, key, value) else PRODUCTS
    output = TreeAttention.apply(query[0], key[0], value[0], segments, scale, dropout, kernel)
    return output.transpose(0, 1)[None], None


def _flash_runs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlashAttention supports device, dtype and head size, without the padding of heads that SDPA adds."""
    grouped = query.shape[1] != key.shape[1]
    return (
        query.is_cuda
        and query.shape[-1] % 8 == 0
        and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, grouped))
    )


class Kernel(NamedTuple):
    """A way to compute a part of the attention: within runs, or of runs to what stands above them.

    `parts(segments, device)` plans them; the first has all tokens of the row, in order. `forward(query, key, value,
    part, scale, drop)` gives outputs (heads, queries, head size) and log-sum-exps (heads, queries) for the tokens
    `part.queries`. `backward(gradient, query, key, value, output, lse, part, scale, drop, totals)` takes what all parts
    gave together, of the whole row, adds the gradients of keys and values to `totals`, and returns the queries'.
    """

    parts: Callable[[Segments, torch.device], list[Any]]
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., torch.Tensor]


class TreeAttention(torch.autograd.Function):
    """The parts of a kernel, merged: (heads, time, head size) each. Scores are not kept, but computed again."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        segments: Segments, scale: float, dropout: float, kernel: Kernel,
    ) -> torch.Tensor:  # fmt: skip
        # the backward pass drops the same weights; the seed is the CPU's, so that no host waits for a GPU
        ctx.kernel, ctx.scale, ctx.drop = kernel, scale, (dropout, int(torch.randint(2**62, ())) if dropout else 0)
        ctx.parts, drop = kernel.parts(segments, query.device), _Drop(*ctx.drop, query.device)
        first, *others = ctx.parts
        with torch.autocast(query.device.type, enabled=False):
            output, lse = kernel.forward(query, key, value, first, scale, drop)
            for part in others:
                above, above_lse = kernel.forward(query, key, value, part, scale, drop)
                within, within_lse = output.index_select(1, part.queries), lse.index_select(1, part.queries)
                merged = torch.logaddexp(within_lse, above_lse)
                within_share, above_share = ((each - merged).exp()[..., None] for each in (within_lse, above_lse))
                both = (within * within_share).add_(above * above_share)
                output.index_copy_(1, part.queries, both.to(output.dtype))
                lse.index_copy_(1, part.queries, merged)
        output = output.to(value.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, lse = ctx.saved_tensors
        totals = [torch.zeros_like(each, dtype=lse.dtype) for each in (key, value)]
        drop = _Drop(*ctx.drop, query.device)
        first, *others = ctx.parts
        with torch.autocast(query.device.type, enabled=False):
            known = gradient, query, key, value, output, lse
            of_query = ctx.kernel.backward(*known, first, ctx.scale, drop, totals)
            for part in others:
                found = ctx.kernel.backward(*known, part, ctx.scale, drop, totals)
                of_query.index_add_(1, part.queries, found)
        gradients = (each.to(query.dtype) for each in (of_query, *totals))
        return *gradients, None, None, None, None


class _Drop:
    """Drops attention weights; an equal one drops the same."""

    def __init__(self, share: float, seed: int, device: torch.device) -> None:
        self.share = share
        self.generator = torch.Generator(device).manual_seed(seed) if share else None

    def __call__(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weights that stay, enlarged; and the factors of all, None where nothing is dropped."""
        if not self.share:
            return weights, None
        factors = torch.empty_like(weights).bernoulli_(1 - self.share, generator=self.generator).div_(1 - self.share)
        return weights * factors, factors


# --- what stands above what -----------------------------------------------------------------------------------------


def runs_of(segments: Segments, longest: int | None = None) -> list[tuple[int, int, Slices]]:
    """First token and end of each run, and what of the row stands above it; runs that are too long are cut.

    >>> runs_of(((0, 5), (2, 3), (4, 1)))
    [(0, 5, ()), (5, 8, ((0, 2),)), (8, 9, ((0, 2), (5, 7)))]
    >>> runs_of(((0, 5),), longest=3)
    [(0, 3, ()), (3, 5, ((0, 3),))]
    """
    runs, path, start = [], [], 0  # type: list[tuple[int, int, Slices]], list[tuple[int, int]], int
    for shared, length in segments:
        path = _first_tokens(path, shared)
        stop = start + length
        for first in range(start, stop, longest or length):
            end = min(stop, first + (longest or length))
            runs.append((first, end, tuple(path)))
            begun = path.pop()[0] if path and path[-1][1] == first else first  # one slice, if they are neighbours
            path.append((begun, end))
        start = stop
    return runs


def _first_tokens(slices: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    kept = []
    for start, end in slices:
        if count <= 0:
            break
        kept.append((start, min(end, start + count)))
        count -= end - start
    return kept


def runs_below(runs: list[tuple[int, int, Slices]]) -> dict[Slices, list[tuple[int, int]]]:
    """The runs that stand below the same tokens, by these tokens."""
    below: dict[Slices, list[tuple[int, int]]] = {}
    for start, end, above in runs:
        if above:
            below.setdefault(above, []).append((start, end))
    return below


def _tokens(slices: Iterable[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([torch.arange(start, end) for start, end in slices])


# --- by matrix products ---------------------------------------------------------------------------------------------


class Bundle(NamedTuple):
    """Queries of one matrix product for each head: `count` runs, padded to the longest; slots `start` to `end`."""

    start: int
    end: int
    count: int
    above: Slices  # the keys; empty where each run attends to itself


class Products(NamedTuple):
    """A part. Padding takes the first token of its run; nothing attends to it, because it comes last."""

    queries: torch.Tensor  # (queries,)
    slots: torch.Tensor  # the token in each slot, (slots,)
    filled: torch.Tensor | None  # which slots are no padding, (slots,) bool
    taken: torch.Tensor | None  # the slot of each query, (queries,); None where it is its own
    bundles: list[Bundle]


@lru_cache(maxsize=8)  # all layers of a step use the same
@torch.inference_mode(False)  # training may use a tensor that evaluation has put into the cache
def _product_parts(segments: Segments, device: torch.device) -> list[Products]:
    runs = runs_of(segments, LONGEST)
    lengths = np.array([end - start for start, end, _ in runs])
    order = np.argsort(-lengths, kind="stable")
    slots, filled, bundles, begun = [], [], [], 0
    for size in bundle_sizes(lengths[order].tolist()):
        members, order = order[:size], order[size:]
        places = np.arange(lengths[members[0]])
        real = places < lengths[members, None]  # (runs, slots)
        slots.append((np.array([runs[member][0] for member in members])[:, None] + places * real).ravel())
        filled.append(real.ravel())
        bundles.append(Bundle(begun, begun + real.size, size, ()))
        begun += real.size
    slot_tokens, real_slots = torch.from_numpy(np.concatenate(slots)), torch.from_numpy(np.concatenate(filled))
    taken = torch.empty(int(lengths.sum()), dtype=torch.long)
    taken[slot_tokens[real_slots]] = real_slots.nonzero().flatten()
    padding = None if bool(real_slots.all()) else _move(real_slots, device)
    within = Products(
        _move(torch.arange(len(taken)), device), _move(slot_tokens, device), padding, _move(taken, device), bundles
    )
    if not (below := runs_below(runs)):
        return [within]
    tokens, bundles, begun = [], [], 0
    for above, members in below.items():
        tokens += members
        keys, queries = (sum(end - start for start, end in slices) for slices in (above, members))
        pieces = -(-queries * keys // MOST_PAIRS)
        ends = [begun + queries * piece // pieces for piece in range(pieces + 1)]
        bundles += [Bundle(start, end, 1, above) for start, end in itertools.pairwise(ends) if end > start]
        begun += queries
    index = _move(_tokens(tokens), device)
    return [within, Products(index, index, None, None, bundles)]


def bundle_sizes(lengths: list[int]) -> list[int]:
    """How many runs go into each bundle, without much padding; `lengths` in tokens, longest first.

    >>> bundle_sizes([410, 400, 14, 12, 10])
    [1, 1, 3]
    """
    sizes: list[int] = []
    longest = wasted = 0
    for length in lengths:
        wasted += longest**2 - length**2
        if not sizes or wasted > BUNDLE_COST or (sizes[-1] + 1) * longest**2 > MOST_PAIRS:
            sizes.append(0)
            longest, wasted = length, 0
        sizes[-1] += 1
    return sizes


def _products_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Products, scale: float, drop: _Drop
) -> tuple[torch.Tensor, torch.Tensor]:
    precise = torch.promote_types(query.dtype, torch.float32)
    queries = query.index_select(1, part.slots) * scale
    output, lse = torch.empty_like(queries, dtype=precise), queries.new_empty(queries.shape[:2], dtype=precise)
    for bundle in part.bundles:
        asking, keys, values = _bundled(queries, key, value, part, bundle)
        scores = _scores(asking, keys, bundle)
        highest = scores.amax(-1, keepdim=True).to(precise)
        weights = (scores - highest).exp_()
        total = weights.sum(-1, keepdim=True)
        found = (drop(weights)[0].to(value.dtype) @ values) / total
        output[:, bundle.start : bundle.end] = _by_head(found, bundle, query.shape[0])
        lse[:, bundle.start : bundle.end] = _by_head(total.log_().add_(highest), bundle, query.shape[0])[..., 0]
    if part.taken is None:
        return output, lse
    return output.index_select(1, part.taken), lse.index_select(1, part.taken)


def _products_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
    lse: torch.Tensor, part: Products, scale: float, drop: _Drop, totals: list[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    queries = query.index_select(1, part.slots) * scale
    gradients = gradient.index_select(1, part.slots)
    shift = (gradients * output.index_select(1, part.slots)).sum(-1, keepdim=True, dtype=lse.dtype)
    lses = lse.index_select(1, part.slots)[..., None]
    if part.filled is not None:
        padding = ~part.filled[:, None]
        gradients, shift = gradients.masked_fill(padding, 0), shift.masked_fill(padding, 0)
        lses = lses.masked_fill(padding, float("inf"))
    of_queries = torch.empty_like(queries, dtype=lse.dtype)
    of_slots = [each.new_empty(each.shape[0], len(part.slots), each.shape[2]) for each in totals]
    for bundle in part.bundles:
        asking, keys, values = _bundled(queries, key, value, part, bundle)
        given, lowered, below = (
            _by_key_head(each[:, bundle.start : bundle.end], bundle, key.shape[0]) for each in (gradients, lses, shift)
        )
        weights = (_scores(asking, keys, bundle) - lowered).exp_()
        kept, factors = drop(weights)
        of_weights = given @ values.mT
        of_scores = (of_weights if factors is None else of_weights * factors).sub(below).mul_(weights).to(key.dtype)
        found = (of_scores.mT @ asking, kept.to(value.dtype).mT @ given)
        of_queries[:, bundle.start : bundle.end] = _by_head(of_scores @ keys, bundle, query.shape[0]) * scale
        for total, slots, each in zip(totals, of_slots, found, strict=True):
            rows, done = each.unflatten(0, (-1, bundle.count)).flatten(1, 2), 0
            if not bundle.above:
                slots[:, bundle.start : bundle.end] = rows
            for start, end in bundle.above:
                total[:, start:end] += rows[:, done : done + end - start]
                done += end - start
    if part.taken is None:
        return of_queries
    for total, slots in zip(totals, of_slots, strict=True):
        total += slots.index_select(1, part.taken)
    return of_queries.index_select(1, part.taken)


def _bundled(
    queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Products, bundle: Bundle
) -> list[torch.Tensor]:
    """Queries of the bundle's slots, and the keys and values they see: (key heads * count, tokens, head size) each."""
    asking = _by_key_head(queries[:, bundle.start : bundle.end], bundle, key.shape[0])
    seen = []
    for states in (key, value):
        if not bundle.above:
            rows = states.index_select(1, part.slots[bundle.start : bundle.end])
        else:
            pieces = [states[:, start:end] for start, end in bundle.above]
            rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        seen.append(rows.unflatten(1, (bundle.count, -1)).flatten(0, 1))
    return [asking, *seen]


def _by_key_head(states: torch.Tensor, bundle: Bundle, key_heads: int) -> torch.Tensor:
    """(heads, slots, ...) to (key heads * count, queries, ...): queries that share a head of keys follow one another."""
    apart = states.unflatten(1, (bundle.count, -1)).unflatten(0, (key_heads, -1))
    return apart.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _by_head(states: torch.Tensor, bundle: Bundle, heads: int) -> torch.Tensor:
    """The reverse of `_by_key_head`."""
    key_heads = len(states) // bundle.count
    apart = states.unflatten(0, (key_heads, bundle.count)).unflatten(2, (heads // key_heads, -1))
    return apart.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _scores(asking: torch.Tensor, keys: torch.Tensor, bundle: Bundle) -> torch.Tensor:
    scores = asking @ keys.mT
    if not bundle.above:
        longest = keys.shape[1]
        scores.unflatten(1, (-1, longest)).masked_fill_(_later(longest, keys.device), float("-inf"))
    return scores


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _later(time: int, device: torch.device) -> torch.Tensor:
    """Which keys come after each query, (time, time) bool."""
    return torch.ones(time, time, dtype=torch.bool, device=device).triu(1)


PRODUCTS = Kernel(_product_parts, _products_forward, _products_backward)


# --- by FlashAttention ----------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """A part: sequences of queries, each with its own keys, one after another."""

    queries: torch.Tensor  # (queries,)
    keys: torch.Tensor | None  # (keys,), the token of each; None where they are those of the queries
    arguments: tuple  # of a call: first query and end of each sequence, the same of its keys, the most of both


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _packed_parts(segments: Segments, device: torch.device) -> list[Packed]:
    runs = runs_of(segments)
    starts, longest = _starts([end - start for start, end, _ in runs], device)
    within = Packed(_move(torch.arange(runs[-1][1]), device), None, (starts, starts, longest, longest))
    if not (below := runs_below(runs)):
        return [within]
    queries, keys = ([_tokens(each) for each in slices] for slices in (below.values(), below.keys()))
    counts = (_starts([len(tokens) for tokens in sequences], device) for sequences in (queries, keys))
    (query_starts, most_queries), (key_starts, most_keys) = counts
    above = Packed(
        _move(torch.cat(queries), device), _move(torch.cat(keys), device),
        (query_starts, key_starts, most_queries, most_keys),
    )  # fmt: skip
    return [within, above]


def _starts(counts: list[int], device: torch.device) -> tuple[torch.Tensor, int]:
    return _move(torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32), device), max(counts)


def packed_kernel(forward: Callable[..., Any], backward: Callable[..., Any]) -> Kernel:
    """A kernel from two functions of torch's `_flash_attention_forward` and `_flash_attention_backward`.

    Where runs stand below the same tokens, these are copied once for all of them. The gradients of copies are summed
    in a fixed order, so a run repeats bit by bit.
    """

    def packed(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:  # (tokens, heads, head size)
        rows = states.transpose(0, 1)
        return rows if index is None else rows.index_select(0, index)

    def chosen(part: Packed) -> list[torch.Tensor | None]:
        return [None if part.keys is None else part.queries, part.keys, part.keys]

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Packed, scale: float, drop: _Drop
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = [packed(*pair) for pair in zip((query, key, value), chosen(part), strict=True)]
        output, lse, *_ = forward(*states, *part.arguments, 0.0, part.keys is None, False, scale=scale)
        return output.transpose(0, 1), lse

    def add_gradients(
        gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
        lse: torch.Tensor, part: Packed, scale: float, drop: _Drop, totals: list[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        of_queries = chosen(part)[0]
        given, merged = packed(gradient, of_queries).contiguous(), packed(output, of_queries).contiguous()
        lses = lse if of_queries is None else lse.index_select(1, of_queries)
        states = [packed(*pair) for pair in zip((query, key, value), chosen(part), strict=True)]
        nothing = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
        found, *of_keys = backward(
            given, *states, merged, lses, *part.arguments, 0.0, part.keys is None, *nothing, scale=scale
        )
        for total, each in zip(totals, of_keys, strict=True):
            if part.keys is None:
                total += each.transpose(0, 1)
            else:  # on a GPU it sorts the index first, which `index_add_` does not
                total.transpose(0, 1).index_put_((part.keys,), each.to(total.dtype), accumulate=True)
        return found.transpose(0, 1).to(lse.dtype)

    return Kernel(_packed_parts, attend, add_gradients)


FLASH = packed_kernel(torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward)


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
