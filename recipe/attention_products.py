"""Attention over rows of segments by matrix products: on a CPU, and on a GPU where FlashAttention does not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from recipe.segments import Segments, Slices, first_tokens, on_device, runs_below, runs_of

LONGEST = 256  # tokens of a run that are taken at once; what precedes them stands above them
MOST_PAIRS = 2**17  # of query and key in one matrix product: few enough for a CPU's cache
KEPT = 2  # times the room of the queries, by a batch of short examples
BUNDLE_COST = 2**11  # of one more bundle: as many pairs take as long
MOST_COPIES = 2**8  # of keys: more of them take longer than a bundle of their own


class Bundle(NamedTuple):
    """Runs below the same tokens, padded to the longest; of a few tokens more that stand above one, it has copies."""

    queries: slice  # of the slots, (runs, tokens)
    keys: slice  # of the slots of keys, (runs, copies + tokens)
    runs: int
    above: Slices
    places: list[slice]  # of each of these slices in `Plan.shared`
    missing: torch.Tensor  # minus infinity where a run has fewer copies, else 0: (runs, copies)


class Plan(NamedTuple):
    """Padding takes the first token of its run; nothing attends to it."""

    bundles: list[Bundle]
    pairs: int  # of query and key, with padding
    slots: torch.Tensor  # the token in each slot, (slots,)
    taken: torch.Tensor  # the slot of each token, (time,)
    key_slots: torch.Tensor
    key_taken: torch.Tensor
    shared: torch.Tensor  # tokens that stand above any run, rising
    copies: torch.Tensor  # slots of keys that are copies of them, (copies,)
    copied: torch.Tensor  # the places in `shared` of these, (copies,)


class ProductAttention(torch.autograd.Function):
    """Scores of what stands above a run and of the run itself side by side, in one softmax.

    Query (heads, time, head size); key and value (key heads, time, head size), contiguous; values may have a size of
    their own. What runs stand below is
    there once for all of them. Weights that take more room than `KEPT` times the queries are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        segments: Segments, scale: float, dropout: float,
    ) -> torch.Tensor:  # fmt: skip
        # the backward pass drops the same weights; the seed is the CPU's, so that no host waits for a GPU
        ctx.seed = int(torch.randint(2**62, ())) if dropout else 0
        ctx.plan, ctx.scale, ctx.dropout, kept = _plan(segments, query.device, query.dtype), scale, dropout, []
        keep = ctx.plan.pairs <= KEPT * query.shape[1] * query.shape[2]
        drop = Drop(dropout, ctx.seed, query.device)
        with torch.autocast(query.device.type, enabled=False):
            queries = query.index_select(1, ctx.plan.slots) * scale
            output = queries.new_empty(*queries.shape[:2], value.shape[2])
            for bundle in ctx.plan.bundles:
                asking = _by_key_head(queries, bundle, len(key))
                keys, values = (_seen(states, ctx.plan, bundle) for states in (key, value))
                weights = _weights(asking, keys, bundle)
                kept += [weights] if keep else []
                found = _mixed(drop(weights)[0], values, bundle)
                output[:, bundle.queries] = _by_head(found, bundle, len(query))
            ctx.save_for_backward(query, key, value, *kept)
            return output.index_select(1, ctx.plan.taken)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *known = ctx.saved_tensors
        plan, drop = ctx.plan, Drop(ctx.dropout, ctx.seed, query.device)
        with torch.autocast(query.device.type, enabled=False):
            queries = query.index_select(1, plan.slots) * ctx.scale
            gradients = gradient.new_zeros(*queries.shape[:2], value.shape[2])  # for padding
            gradients.index_copy_(1, plan.taken, gradient)
            of_queries = torch.empty_like(queries)
            sums = [_Sum(each, plan) for each in (key, value)]
            for number, bundle in enumerate(plan.bundles):
                asking, given = (_by_key_head(states, bundle, len(key)) for states in (queries, gradients))
                keys, values = (_seen(states, plan, bundle) for states in (key, value))
                weights = known[number] if known else _weights(asking, keys, bundle)
                kept, factors = drop(weights)
                of_weights = _side_by_side(given, values, bundle)
                of_weights = of_weights if factors is None else of_weights * factors
                of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                of_queries[:, bundle.queries] = _by_head(_mixed(of_scores, keys, bundle), bundle, len(query))
                sums[0].add(of_scores, asking, bundle)
                sums[1].add(kept, given, bundle)
            of_query = of_queries.mul_(ctx.scale).index_select(1, plan.taken)
        return of_query, *(each.of_tokens() for each in sums), None, None, None


class _Sum:
    """Gradients of keys or values: of each token as a part of its run, and of those that stand above others."""

    def __init__(self, states: torch.Tensor, plan: Plan) -> None:
        heads, _, size = states.shape
        self.plan, precise = plan, torch.promote_types(states.dtype, torch.float32)
        self.of_slots = states.new_empty(heads, len(plan.key_slots), size)
        self.of_shared = states.new_zeros(heads, len(plan.shared), size, dtype=precise)  # a sum of many

    def add(self, pairs: torch.Tensor, rows: torch.Tensor, bundle: Bundle) -> None:
        above, own = _apart(pairs, bundle)
        self.of_slots[:, bundle.keys] = _flat(own.mT @ rows, bundle)
        if bundle.above:
            found = above.mT @ _flat(rows, bundle)
            parts = found.split([place.stop - place.start for place in bundle.places], dim=1)
            for place, part in zip(bundle.places, parts, strict=True):
                self.of_shared[:, place] += part

    def of_tokens(self) -> torch.Tensor:
        plan, found = self.plan, self.of_slots.index_select(1, self.plan.key_taken)
        of_copies = self.of_slots.index_select(1, plan.copies).to(self.of_shared.dtype)
        # on a GPU it sorts the index first, so that a run repeats bit by bit
        self.of_shared.transpose(0, 1).index_put_((plan.copied,), of_copies.transpose(0, 1), accumulate=True)
        total = self.of_shared + found.index_select(1, plan.shared)
        return found.index_copy_(1, plan.shared, total.to(found.dtype))


class _Run(NamedTuple):
    start: int
    end: int
    copied: Sequence[int]  # tokens above it that its bundle copies for it


@lru_cache(maxsize=8)  # all layers of a step use the same
@torch.inference_mode(False)  # training may use a tensor that evaluation has put into the cache
def _plan(segments: Segments, device: torch.device, dtype: torch.dtype) -> Plan:
    below = runs_below(runs_of(segments, LONGEST))
    slices = {each for above in below for each in above}
    shared = np.unique(np.concatenate([np.arange(0), *(np.arange(*each) for each in slices)]))
    grids: dict[str, list[np.ndarray]] = {"slots": [], "real": [], "keys": [], "known": [], "own": []}
    bundles: list[Bundle] = []
    query, key, pairs = 0, 0, 0
    for above, runs in _with_copies(below).items():
        firsts = [int(shared.searchsorted(start)) for start, _ in above]
        places = [slice(first, first + end - start) for first, (start, end) in zip(firsts, above, strict=True)]
        seen = sum(end - start for start, end in above)
        runs.sort(key=lambda run: run.start - run.end)
        for size in bundle_sizes([(run.end - run.start, len(run.copied)) for run in runs], seen):
            members, runs = runs[:size], runs[size:]
            grid = _laid_out(members)
            for name, each in grid.items():
                grids[name].append(each.ravel())
            missing = torch.zeros(size, grid["known"].shape[1] - grid["real"].shape[1], dtype=dtype)
            missing.masked_fill_(~torch.from_numpy(grid["known"][:, : missing.shape[1]]), float("-inf"))
            stop, key_stop = query + grid["slots"].size, key + grid["keys"].size
            bundles.append(
                Bundle(slice(query, stop), slice(key, key_stop), size, above, places, on_device(missing, device))
            )
            pairs += grid["slots"].size * (seen + grid["keys"].shape[1])
            query, key = stop, key_stop
    slots, real, keys, known, own = (np.concatenate(each) for each in grids.values())
    taken, key_taken = np.empty((2, real.sum()), dtype=np.int64)
    taken[slots[real]] = np.flatnonzero(real)
    key_taken[keys[own]] = np.flatnonzero(own)
    copies = np.flatnonzero(known & ~own)
    copied = shared.searchsorted(keys[copies])
    arrays = (slots, taken, keys, key_taken, shared, copies, copied)
    return Plan(bundles, pairs, *(on_device(torch.from_numpy(each), device) for each in arrays))


def _laid_out(runs: list[_Run]) -> dict[str, np.ndarray]:
    """The tokens in the slots of a bundle's queries, and which are no padding; of its keys, and which are no copies."""
    starts, lengths = (np.array(each)[:, None] for each in ([r.start for r in runs], [r.end - r.start for r in runs]))
    times, most = np.arange(lengths.max()), max(len(run.copied) for run in runs)
    real = times < lengths
    slots = starts + times * real
    keys, known = np.repeat(starts, most, axis=1), np.zeros((len(runs), most), dtype=bool)
    for number, run in enumerate(runs):
        if run.copied:
            keys[number, -len(run.copied) :] = run.copied
            known[number, -len(run.copied) :] = True
    return {
        "slots": slots, "real": real, "keys": np.concatenate([keys, slots], axis=1),
        "known": np.concatenate([known, real], axis=1), "own": np.concatenate([known & False, real], axis=1),
    }  # fmt: skip


def _with_copies(below: Mapping[Slices, list[tuple[int, int]]]) -> dict[Slices, list[_Run]]:
    """Where few runs stand below a few more tokens than others, they go with these, and get copies of those tokens."""
    groups = {above: [_Run(*run, ()) for run in runs] for above, runs in below.items()}
    counts = {above: sum(end - start for start, end in above) for above in groups}
    lengths = sorted(set(counts.values()), reverse=True)
    for above in sorted(groups, key=lambda each: -counts[each]):
        shorter = (first_tokens(above, length) for length in lengths if length < counts[above])
        fewer = next((each for each in shorter if each in groups), None)
        if fewer is None:
            continue
        further = [token for each in above for token in range(*each)][counts[fewer] :]
        runs = [run._replace(copied=[*further, *run.copied]) for run in groups[above]]
        if sum(len(run.copied) for run in runs) <= MOST_COPIES:
            groups[fewer] += runs
            del groups[above]
    return groups


def bundle_sizes(shapes: Sequence[tuple[int, int]], above: int) -> list[int]:
    """How many runs go into each bundle, without much padding.

    Args:
        shapes: tokens of each run, and tokens that are copied for it; longest first.
        above: how many tokens stand above all.

    >>> bundle_sizes([(410, 0), (400, 0), (14, 0), (12, 3), (10, 0)], above=0)
    [1, 1, 3]
    """
    sizes: list[int] = []
    longest = copies = needed = 0
    for length, copied in shapes:
        most, own = max(copies, copied), length * (above + copied + length)
        pairs = (sizes[-1] + 1 if sizes else 0) * longest * (above + most + longest)
        if not sizes or pairs - needed - own > BUNDLE_COST or pairs > MOST_PAIRS:
            sizes.append(0)
            longest, most, needed = length, copied, 0
        sizes[-1] += 1
        copies, needed = most, needed + own
    return sizes


Seen = tuple[torch.Tensor | None, torch.Tensor]  # what stands above, (key heads, above, head size); and the runs' own


def _seen(states: torch.Tensor, plan: Plan, bundle: Bundle) -> Seen:
    """Keys or values that a bundle sees; its own are (key heads * runs, copies + tokens, head size)."""
    own = states.index_select(1, plan.key_slots[bundle.keys])
    pieces = [states[:, start:end] for start, end in bundle.above]
    above = None if not pieces else pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return above, own.unflatten(1, (bundle.runs, -1)).flatten(0, 1)


def _weights(asking: torch.Tensor, keys: Seen, bundle: Bundle) -> torch.Tensor:
    """Attention weights, (key heads * runs, queries, above + copies + tokens)."""
    scores = _side_by_side(asking, keys, bundle)
    own, copies = _apart(scores, bundle)[1], bundle.missing.shape[1]
    tokens = own.shape[2] - copies
    by_run = own.unflatten(1, (-1, tokens)).unflatten(0, (-1, bundle.runs))
    by_run[..., copies:] += _later(tokens, own.dtype, own.device)  # adding is much faster than filling
    if copies:
        by_run[..., :copies] += bundle.missing[:, None, None]
    return scores.softmax(-1)


def _mixed(pairs: torch.Tensor, states: Seen, bundle: Bundle) -> torch.Tensor:
    """The keys or values that queries see, each in its share: (key heads * runs, queries, head size)."""
    above, own = _apart(pairs, bundle)
    found = own @ states[1]
    return found if states[0] is None else _flat(found, bundle).baddbmm_(above, states[0]).view_as(found)


def _side_by_side(rows: torch.Tensor, columns: Seen, bundle: Bundle) -> torch.Tensor:
    above, own = columns
    products = rows @ own.mT
    if above is None:
        return products
    return torch.cat([(_flat(rows, bundle) @ above.mT).view(*rows.shape[:2], -1), products], -1)


def _apart(pairs: torch.Tensor, bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_side_by_side` put together: (key heads, runs * queries, above) and (key heads * runs, queries, tokens)."""
    count = sum(end - start for start, end in bundle.above)
    return _flat(pairs[..., :count], bundle), pairs[..., count:]


def _flat(states: torch.Tensor, bundle: Bundle) -> torch.Tensor:
    """(key heads * runs, queries, ...) to (key heads, runs * queries, ...)."""
    return states.unflatten(0, (-1, bundle.runs)).flatten(1, 2)


def _by_key_head(states: torch.Tensor, bundle: Bundle, key_heads: int) -> torch.Tensor:
    """(heads, slots, ...) to (key heads * runs, queries, ...): queries with the same keys follow one another."""
    apart = states[:, bundle.queries].unflatten(1, (bundle.runs, -1)).unflatten(0, (key_heads, -1))
    return apart.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _by_head(states: torch.Tensor, bundle: Bundle, heads: int) -> torch.Tensor:
    """The reverse of `_by_key_head`."""
    key_heads = len(states) // bundle.runs
    apart = states.unflatten(0, (key_heads, bundle.runs)).unflatten(2, (heads // key_heads, -1))
    return apart.transpose(1, 2).flatten(0, 1).flatten(1, 2)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _later(time: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Minus infinity for the keys that come after a query, else 0: (time, time)."""
    return torch.full((time, time), float("-inf"), dtype=dtype, device=device).triu(1)


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
