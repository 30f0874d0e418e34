"""Attention over rows of segments by FlashAttention, which runs on CUDA, in half precision, without dropout.

Attention within runs, and attention of runs to what stands above them, are computed on their own, and merged by their
log-sum-exps, as in ring attention (arXiv:2310.01889): keys and values of a shared start are there once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from recipe.segments import Segments, on_device, runs_below, runs_of, tokens_of


class Kernel(NamedTuple):
    """Functions of torch's `_flash_attention_forward` and `_flash_attention_backward`; tests give their own."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


FLASH = Kernel(torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward)


class MergedAttention(torch.autograd.Function):
    """Both parts, merged: query (heads, time, head size), key and value (key heads, time, head size).

    Where runs stand below the same tokens, these are copied once for all of them. The gradients of copies are summed
    in a fixed order, so a run repeats bit by bit.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        segments: Segments, scale: float, kernel: Kernel,
    ) -> torch.Tensor:  # fmt: skip
        ctx.kernel, ctx.scale, ctx.parts = kernel, scale, _parts(segments, query.device)
        within, *others = ctx.parts
        with torch.autocast(query.device.type, enabled=False):
            output, lse = _attend(query, key, value, within, scale, kernel)
            for part in others:
                above, above_lse = _attend(query, key, value, part, scale, kernel)
                own, own_lse = output.index_select(1, part.queries), lse.index_select(1, part.queries)
                merged = torch.logaddexp(own_lse, above_lse)
                own_share, above_share = ((each - merged).exp_()[..., None] for each in (own_lse, above_lse))
                both = (own * own_share).add_(above * above_share)
                output = output.index_copy(1, part.queries, both.to(output.dtype))
                lse = lse.index_copy(1, part.queries, merged)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, lse = ctx.saved_tensors
        totals = [torch.zeros_like(each, dtype=lse.dtype) for each in (key, value)]
        of_query: Any = None
        with torch.autocast(query.device.type, enabled=False):
            for part in ctx.parts:
                found, *of_keys = _gradients(gradient, query, key, value, output, lse, part, ctx.scale, ctx.kernel)
                of_query = found if of_query is None else of_query.index_add_(1, part.queries, found)
                for total, each in zip(totals, of_keys, strict=True):
                    if part.keys is None:
                        total += each
                    else:  # on a GPU it sorts the index first, which `index_add_` does not
                        rows = each.transpose(0, 1).to(total.dtype)
                        total.transpose(0, 1).index_put_((part.keys,), rows, accumulate=True)
        gradients = (each.to(query.dtype) for each in (of_query, *totals))
        return *gradients, None, None, None


class Packed(NamedTuple):
    """A part: sequences of queries, each with its own keys, one after another."""

    queries: torch.Tensor  # (queries,)
    keys: torch.Tensor | None  # (keys,), the token of each; None where they are those of the queries
    arguments: tuple  # of a call: first query and end of each sequence, the same of its keys, the most of both


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _parts(segments: Segments, device: torch.device) -> list[Packed]:
    runs = runs_of(segments)
    starts, longest = _starts([end - start for start, end, _ in runs], device)
    within = Packed(on_device(torch.arange(runs[-1][1]), device), None, (starts, starts, longest, longest))
    below = runs_below(runs)
    below.pop((), None)
    if not below:
        return [within]
    queries, keys = ([tokens_of(each) for each in slices] for slices in (below.values(), below.keys()))
    counts = (_starts([len(tokens) for tokens in sequences], device) for sequences in (queries, keys))
    (query_starts, most_queries), (key_starts, most_keys) = counts
    above = Packed(
        on_device(torch.cat(queries), device), on_device(torch.cat(keys), device),
        (query_starts, key_starts, most_queries, most_keys),
    )  # fmt: skip
    return [within, above]


def _starts(counts: list[int], device: torch.device) -> tuple[torch.Tensor, int]:
    return on_device(torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32), device), max(counts)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Packed, scale: float, kernel: Kernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (heads, queries, head size) and log-sum-exps (heads, queries) of a part."""
    states = _packed_states(query, key, value, part)
    output, lse, *_ = kernel.forward(*states, *part.arguments, 0.0, part.keys is None, False, scale=scale)
    return output.transpose(0, 1), lse


def _gradients(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
    lse: torch.Tensor, part: Packed, scale: float, kernel: Kernel,
) -> list[torch.Tensor]:  # fmt: skip
    """Of a part's queries, and of its copies of keys and values, (heads, tokens, head size) each.

    `gradient`, `output` and `lse` are those of the whole row, of all parts together.
    """
    of_queries = None if part.keys is None else part.queries
    given, merged = (_packed(each, of_queries).contiguous() for each in (gradient, output))
    lses = lse if of_queries is None else lse.index_select(1, of_queries)
    nothing = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    states = _packed_states(query, key, value, part)
    found = kernel.backward(
        given, *states, merged, lses, *part.arguments, 0.0, part.keys is None, *nothing, scale=scale
    )
    return [each.transpose(0, 1) for each in found]


def _packed_states(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Packed) -> list[torch.Tensor]:
    of_queries = None if part.keys is None else part.queries
    return [_packed(query, of_queries), _packed(key, part.keys), _packed(value, part.keys)]


def _packed(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """(heads, time, head size) to (tokens, heads, head size)."""
    rows = states.transpose(0, 1)
    return rows if index is None else rows.index_select(0, index)
