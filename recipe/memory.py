"""Batches that are halved when they do not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from recipe.config import UserError

Result = TypeVar("Result")

UNKNOWN_TO_ACCELERATE = (
    "could not create a primitive",  # all that oneDNN says when it cannot allocate its generated code
    "error: out of memory",  # CUDA's own, outside of torch's allocator
    "STATUS_ALLOC_FAILED",  # cuBLAS's and cuSPARSE's
    "Cannot allocate memory",  # the system's, where torch maps a file
)


def halve_if_out_of_memory(
    batches: Iterable[list[int]], compute: Callable[[list[int]], Result]
) -> Iterator[tuple[list[int], Result]]:
    """Each batch of indices and what `compute` returns for it.

    A batch that does not fit in memory is halved, and so are later ones. Results so far are kept, where
    `accelerate.utils.find_executable_batch_size` would start again from the first batch.

    Raises:
        UserError: not even a batch of one fits.
    """
    limit = None  # the largest batch that may fit
    for batch in batches:
        while batch:
            part, failure = batch[:limit], None
            try:
                result = compute(part)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error).partition("\n")[0] or type(error).__name__
            if failure is None:
                yield part, result
                batch = batch[len(part) :]
            elif len(part) == 1:
                raise UserError(
                    f"not even one prompt fits in memory ({failure}); use fewer --max_new_tokens or --dtype bfloat16"
                )
            else:  # outside the except block, which keeps the tensors of the failed batch alive
                limit = len(part) // 2
                tqdm.write(f"out of memory: continuing with batches of {limit}")
                clear_device_cache(garbage_collection=True)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on any device."""
    says_so = isinstance(error, RuntimeError) and any(words in str(error) for words in UNKNOWN_TO_ACCELERATE)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error) or says_so
