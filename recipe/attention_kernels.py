"""How `recipe.attention` computes the two parts of its attention: by matrix products, or by FlashAttention.

A run is what an example adds to the row. One part is attention within runs, the other that of runs to what stands above
them. A kernel plans both once a batch, and computes one at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

LONGEST = 256  # tokens of a run that matrix products take at once; what precedes them stands above them
MOST_PAIRS = 2**17  # of query and key in one matrix product: few enough for a CPU's cache
BUNDLE_COST = 2**11  # of one more bundle: as many pairs take as long

Segments = tuple[tuple[int, int], ...]
Slices = tuple[tuple[int, int], ...]  # first token and end of each


class Kernel(NamedTuple):
    """A way to compute a part of the attention: within runs, or of runs to what stands above them.

    `parts(segments, device)` plans them; the first has all tokens of the row, in order. `forward(query, key, value,
    part, scale, drop)` gives outputs (heads, queries, head size) and log-sum-exps (heads, queries) for the tokens
    `part.queries`. `backward(gradient, query, key, value, output, lse, part_lse, part, scale, drop, totals)` takes what
    all parts gave together, of the whole row, and the part's own log-sum-exps; it adds the gradients of keys and
    values to `totals`, and returns those of the part's queries.
    """

    parts: Callable[[Segments, torch.device], list[Any]]
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., torch.Tensor]


class Drop:
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
    """Queries of one matrix product for each head: `runs` runs, padded to the longest; slots `start` to `end`."""

    start: int
    end: int
    runs: int
    above: Slices  # the keys; empty where each run attends to itself


class Products(NamedTuple):
    """A part. Padding takes the first token of its run; nothing attends to it, because it comes last."""

    queries: torch.Tensor  # (queries,)
    slots: torch.Tensor  # the token in each slot, (slots,)
    taken: torch.Tensor | None  # the slot of each query, (queries,); None where it is its own
    bundles: list[Bundle]


@lru_cache(maxsize=8)  # all layers of a step use the same
@torch.inference_mode(False)  # training may use a tensor that evaluation has put into the cache
def _product_parts(segments: Segments, device: torch.device) -> list[Products]:
    runs = runs_of(segments, LONGEST)
    lengths = np.array([end - start for start, end, _ in runs])
    order = np.argsort(-lengths, kind="stable")
    slots, real, begun = [], [], 0
    bundles: list[Bundle] = []
    for size in bundle_sizes(lengths[order].tolist()):
        members, order = order[:size], order[size:]
        places = np.arange(lengths[members[0]])
        real.append(places < lengths[members, None])  # (runs, slots)
        slots.append(np.array([runs[member][0] for member in members])[:, None] + places * real[-1])
        bundles.append(Bundle(begun, begun + real[-1].size, size, ()))
        begun += real[-1].size
    slot_tokens, filled = (np.concatenate([each.ravel() for each in grids]) for grids in (slots, real))
    taken = np.empty(lengths.sum(), dtype=np.int64)
    taken[slot_tokens[filled]] = np.flatnonzero(filled)
    every, slot_index, taken_index = (
        _move(torch.from_numpy(index), device) for index in (np.arange(len(taken)), slot_tokens, taken)
    )
    within = Products(every, slot_index, taken_index, bundles)
    if not (below := runs_below(runs)):
        return [within]
    tokens: list[tuple[int, int]] = []
    bundles, begun = [], 0
    for above, asking in below.items():
        tokens += asking
        keys, queries = (sum(end - start for start, end in slices) for slices in (above, asking))
        pieces = -(-queries * keys // MOST_PAIRS)
        ends = [begun + queries * piece // pieces for piece in range(pieces + 1)]
        bundles += [Bundle(start, end, 1, above) for start, end in itertools.pairwise(ends) if end > start]
        begun += queries
    index = _move(_tokens(tokens), device)
    return [within, Products(index, index, None, bundles)]


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
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Products, scale: float, drop: Drop
) -> tuple[torch.Tensor, torch.Tensor]:
    precise = torch.promote_types(query.dtype, torch.float32)
    queries = query.index_select(1, part.slots) * scale
    output = queries.new_empty(*queries.shape[:2], value.shape[2])
    lse = queries.new_empty(queries.shape[:2], dtype=precise)
    for bundle in part.bundles:
        asking, keys, values = _bundled(queries, key, value, part, bundle)
        scores = _scores(asking, keys, bundle)
        weights = scores.softmax(-1)
        logs = scores.amax(-1).to(lse.dtype) - weights.amax(-1).to(lse.dtype).log()
        output[:, bundle.start : bundle.end] = _by_head(drop(weights)[0] @ values, bundle, len(query))
        lse[:, bundle.start : bundle.end] = _by_head(logs[..., None], bundle, len(query))[..., 0]
    if part.taken is None:
        return output, lse
    return output.index_select(1, part.taken), lse.index_select(1, part.taken)


def _products_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
    lse: torch.Tensor, part_lse: torch.Tensor, part: Products, scale: float, drop: Drop, totals: list[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    share = (part_lse - lse.index_select(1, part.queries)).exp_()  # of the part in each query's output
    if part.taken is not None:
        share = share.new_zeros(len(share), len(part.slots)).index_copy_(1, part.taken, share)
    gradients = gradient.contiguous().index_select(1, part.slots) * share[..., None].to(gradient.dtype)
    shift = (gradients * output.index_select(1, part.slots)).sum(-1, keepdim=True, dtype=lse.dtype)
    queries = query.index_select(1, part.slots) * scale
    of_queries = torch.empty_like(queries)
    of_slots = [each.new_empty(len(each), len(part.slots), each.shape[2]) for each in (key, value)]
    for bundle in part.bundles:
        asking, keys, values = _bundled(queries, key, value, part, bundle)
        given, below = (
            _by_key_head(each[:, bundle.start : bundle.end], bundle, len(key)) for each in (gradients, shift)
        )
        weights = _scores(asking, keys, bundle).softmax(-1)
        kept, factors = drop(weights)
        of_weights = given @ values.mT
        of_scores = (of_weights if factors is None else of_weights * factors).sub(below).mul_(weights).to(key.dtype)
        found = (of_scores.mT @ asking, kept.mT @ given)
        of_queries[:, bundle.start : bundle.end] = _by_head(of_scores @ keys, bundle, len(query))
        for total, slots, each in zip(totals, of_slots, found, strict=True):
            rows, done = each.unflatten(0, (-1, bundle.runs)).flatten(1, 2), 0
            if not bundle.above:
                slots[:, bundle.start : bundle.end] = rows
            for start, end in bundle.above:
                total[:, start:end] += rows[:, done : done + end - start]
                done += end - start
    of_queries *= scale
    if part.taken is None:
        return of_queries
    for total, slots in zip(totals, of_slots, strict=True):
        total += slots.index_select(1, part.taken)
    return of_queries.index_select(1, part.taken)


def _bundled(
    queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Products, bundle: Bundle
) -> list[torch.Tensor]:
    """Queries of the bundle's slots, and the keys and values they see: (key heads * runs, tokens, head size) each."""
    asking = _by_key_head(queries[:, bundle.start : bundle.end], bundle, key.shape[0])
    seen = []
    for states in (key, value):
        if not bundle.above:
            rows = states.index_select(1, part.slots[bundle.start : bundle.end])
        else:
            pieces = [states[:, start:end] for start, end in bundle.above]
            rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        seen.append(rows.unflatten(1, (bundle.runs, -1)).flatten(0, 1))
    return [asking, *seen]


def _by_key_head(states: torch.Tensor, bundle: Bundle, key_heads: int) -> torch.Tensor:
    """(heads, slots, ...) to (key heads * runs, queries, ...): queries with the same keys follow one another."""
    apart = states.unflatten(1, (bundle.runs, -1)).unflatten(0, (key_heads, -1))
    return apart.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _by_head(states: torch.Tensor, bundle: Bundle, heads: int) -> torch.Tensor:
    """The reverse of `_by_key_head`."""
    key_heads = len(states) // bundle.runs
    apart = states.unflatten(0, (key_heads, bundle.runs)).unflatten(2, (heads // key_heads, -1))
    return apart.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _scores(asking: torch.Tensor, keys: torch.Tensor, bundle: Bundle) -> torch.Tensor:
    scores = asking @ keys.mT
    if not bundle.above:  # adding is much faster than filling
        scores.unflatten(1, (-1, keys.shape[1])).add_(_later(keys.shape[1], keys.dtype, keys.device))
    return scores


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _later(time: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Minus infinity for the keys that come after a query, else 0: (time, time)."""
    return torch.full((time, time), float("-inf"), dtype=dtype, device=device).triu(1)


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
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Packed, scale: float, drop: Drop
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = [packed(*pair) for pair in zip((query, key, value), chosen(part), strict=True)]
        output, lse, *_ = forward(*states, *part.arguments, 0.0, part.keys is None, False, scale=scale)
        return output.transpose(0, 1), lse

    def add_gradients(
        gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
        lse: torch.Tensor, part_lse: torch.Tensor, part: Packed, scale: float, drop: Drop, totals: list[torch.Tensor],
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
        return found.transpose(0, 1)

    return Kernel(_packed_parts, attend, add_gradients)


FLASH = packed_kernel(torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward)


def _move(index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device; the host does not wait for a GPU."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)
