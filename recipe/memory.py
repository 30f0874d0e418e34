"""Batches that are halved when they do not fit in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from recipe.config import UserError

Result = TypeVar("Result")

# all that oneDNN says when no memory is left for its generated code; should_reduce_batch_size does not know it
ONEDNN_FAILURE = "could not create a primitive"


def halve_if_out_of_memory(
    batches: Iterable[list[int]], compute: Callable[[list[int]], Result]
) -> Iterator[tuple[list[int], Result]]:
    """Each batch of indices with what `compute` makes of it; one that does not fit is halved, as are those after it.

    `accelerate.utils.find_executable_batch_size` starts everything anew instead.

    Raises:
        UserError: not even a batch of one fits.

    Example::

        for indices, losses in halve_if_out_of_memory([[0, 1, 2, 3], [4, 5]], compute_losses):
            ...
    """
    queue, limit = deque(batches), None
    while queue:
        batch = queue.popleft()
        if limit is not None and len(batch) > limit:
            queue.extendleft(batch[i : i + limit] for i in range(0, len(batch), limit)[::-1])
            continue
        outcome = _try(compute, batch)
        if not isinstance(outcome, _OutOfMemory):
            yield batch, outcome
            continue
        if len(batch) == 1:
            raise UserError(
                f"not even one prompt fits in memory ({outcome}); use fewer --max_new_tokens or --dtype bfloat16"
            )
        limit = len(batch) // 2
        tqdm.write(f"out of memory: going on with batches of {limit}")
        clear_device_cache(garbage_collection=True)
        queue.appendleft(batch)


class _OutOfMemory(str):
    """What the library said."""


def _try(compute: Callable[[list[int]], Result], batch: list[int]) -> Result | _OutOfMemory:
    try:
        return compute(batch)
    except MemoryError:
        said = "MemoryError"
    except RuntimeError as error:
        said = str(error)
        if not should_reduce_batch_size(error) and ONEDNN_FAILURE not in said:
            raise
    return _OutOfMemory(said.partition("\n")[0])  # outside of the except block, which holds on to the tensors
