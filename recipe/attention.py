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

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from recipe.attention_kernels import FLASH, PRODUCTS, Drop, Kernel, Segments

NAME = "shared_prefix"


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
    return _over_segments(query, key, value, dropout, scaling, segments), None


@torch.compiler.disable  # runs differ from batch to batch: as Python values they would be compiled anew each time
def _over_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None,
    segments: Segments,
) -> torch.Tensor:  # fmt: skip
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings return float32
    if len(segments) == 1 and (query.is_cuda or (query.dtype == torch.float32 and dropout == 0)):
        # one example; on a CPU SDPA is slow in half precision, and keeps all scores where it drops some
        grouped = query.shape[1] != key.shape[1]
        output = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        return output.transpose(1, 2)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = FLASH if dropout == 0 and _flash_runs(query, key, value) else PRODUCTS
    states = [each[0] if kernel is FLASH else each[0].contiguous() for each in (query, key, value)]
    output = TreeAttention.apply(*states, segments, scale, dropout, kernel)
    return output.transpose(0, 1)[None]


def _flash_runs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlashAttention supports device, dtype and head size, without the padding of heads that SDPA adds."""
    grouped = query.shape[1] != key.shape[1]
    return (
        query.is_cuda
        and query.shape[-1] % 8 == 0
        and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, grouped))
    )


class TreeAttention(torch.autograd.Function):
    """The parts of a kernel, merged: (heads, time, head size) each. Scores are not kept, but computed again."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        segments: Segments, scale: float, dropout: float, kernel: Kernel,
    ) -> torch.Tensor:  # fmt: skip
        # the backward pass drops the same weights; the seed is the CPU's, so that no host waits for a GPU
        ctx.kernel, ctx.scale, ctx.dropout = kernel, scale, dropout
        ctx.seed = int(torch.randint(2**62, ())) if dropout else 0
        ctx.parts, drop = kernel.parts(segments, query.device), Drop(ctx.dropout, ctx.seed, query.device)
        first, *others = ctx.parts
        with torch.autocast(query.device.type, enabled=False):
            output, lse = kernel.forward(query, key, value, first, scale, drop)
            part_lses = [lse]
            for part in others:
                above, above_lse = kernel.forward(query, key, value, part, scale, drop)
                within, within_lse = output.index_select(1, part.queries), lse.index_select(1, part.queries)
                merged = torch.logaddexp(within_lse, above_lse)
                within_share, above_share = ((each - merged).exp_()[..., None] for each in (within_lse, above_lse))
                both = (within * within_share).add_(above * above_share)
                output = output.index_copy(1, part.queries, both.to(output.dtype))
                lse = lse.index_copy(1, part.queries, merged)
                part_lses.append(above_lse)
        ctx.save_for_backward(query, key, value, output, lse, *part_lses)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, lse, *part_lses = ctx.saved_tensors
        totals = [torch.zeros_like(each, dtype=lse.dtype) for each in (key, value)]
        drop = Drop(ctx.dropout, ctx.seed, query.device)
        of_query: Any = None
        with torch.autocast(query.device.type, enabled=False):
            known = gradient, query, key, value, output, lse
            for part, part_lse in zip(ctx.parts, part_lses, strict=True):
                found = ctx.kernel.backward(*known, part_lse, part, ctx.scale, drop, totals)
                of_query = found if of_query is None else of_query.index_add_(1, part.queries, found)
        gradients = (each.to(query.dtype) for each in (of_query, *totals))
        return *gradients, None, None, None, None


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """SDPA's mask, but none for a row of segments, in which transformers would see packed sequences."""
    cached = kwargs["q_length"] < kwargs["kv_length"]  # generation: no mask without padding, but new tokens need one
    window = kwargs.get("local_size") is not None  # no model with a window is given rows of segments
    return sdpa_mask(**kwargs) if cached or window or kwargs["attention_mask"] is not None else None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, _mask)
