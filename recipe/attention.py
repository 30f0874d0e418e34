"""Attention over rows in which examples share their starts: `attn_implementation="shared_prefix"`.

Importing this module registers it with transformers. In batches of `DataCollatorWithSharedPrefix` with
`attention="segments"`, a token attends to what its example has up to there. All other batches (generation, padding,
rows with a mask) are computed by SDPA.

Keys and values of what examples share are there once. FlashAttention computes it where it runs (CUDA, half precision,
no dropout), elsewhere matrix products do.

Related work: Tree Training (arXiv:2511.00413), Prefix Grouper (arXiv:2506.05433).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from recipe.attention_flash import FLASH, MergedAttention
from recipe.attention_products import ProductAttention
from recipe.segments import Opaque, Segments

NAME = "shared_prefix"


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | Opaque | None = None,
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
    segments: Segments | Opaque,
) -> torch.Tensor:  # fmt: skip
    segments = segments.segments if isinstance(segments, Opaque) else segments
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings return float32
    if len(segments) == 1 and (query.is_cuda or (query.dtype == torch.float32 and dropout == 0)):
        # one example; on a CPU SDPA is slow in half precision, and keeps all scores where it drops some
        grouped = query.shape[1] != key.shape[1]
        output = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        return output.transpose(1, 2).contiguous()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout == 0 and _flash_runs(query, key, value):
        output = MergedAttention.apply(query[0], key[0], value[0], segments, scale, FLASH)
    else:
        output = ProductAttention.apply(query[0], key[0].contiguous(), value[0].contiguous(), segments, scale, dropout)
    return output.transpose(0, 1).contiguous()[None]  # as transformers returns it: some models view it in place


def _flash_runs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlashAttention supports device, dtype and head size, without the padding of heads that SDPA adds."""
    grouped = query.shape[1] != key.shape[1]
    return (
        query.is_cuda
        and query.shape[-1] % 8 == 0
        and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, grouped))
    )


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """SDPA's mask, but none for a row of segments, in which transformers would see packed sequences."""
    cached = kwargs["q_length"] < kwargs["kv_length"]  # generation: no mask without padding, but new tokens need one
    window = kwargs.get("local_size") is not None  # no model with a window is given rows of segments
    return sdpa_mask(**kwargs) if cached or window or kwargs["attention_mask"] is not None else None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, _mask)
