"""Which records form a batch: similar lengths together, decided by the lengths, a seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

BUCKET = 8  # widths are rounded up to multiples of it: more records have equal width, and fewer shapes occur


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """Batches of records of similar length: of `batch_size` records, or of as many as a token budget holds.

    Each epoch shuffles records of equal width among themselves, then the order of the batches. It depends on the
    arguments and its number alone, so a resumed run sees the batches of a run that never stopped, and all processes see
    the same; transformers' `LengthGroupedSampler` draws from the global random state.

    Every epoch has the same number of batches, a multiple of `num_processes`: the largest ones are halved until it is.
    No record is repeated or left out. (If no batch can be halved, accelerate repeats some.)

    `max_tokens` bounds rows times width of a padded batch, its width being the longest row rounded up to a multiple of
    `BUCKET`; a record of `length` tokens has `length - 1` inputs. The idea is that of fairseq's `--max-tokens`
    (https://fairseq.readthedocs.io/en/latest/command_line_tools.html).

    Args:
        lengths: of each record, in tokens.
        batch_size: records in a batch of one process.
        max_tokens: input tokens, with padding, in a batch of one process; instead of `batch_size`.
        num_processes: processes that share the batches; batch i goes to process i modulo this.
        drop_last: with `batch_size`: each epoch leaves out the records that do not fill a batch for every process.

    Raises:
        ValueError: not exactly one of `batch_size` and `max_tokens`, a record longer than `max_tokens`, or no batch.

    Example: 40 input tokens hold one row of 32, two of 16, or five of 8.

    >>> sampler = LengthGroupedBatchSampler(np.array([7, 33, 9, 14, 5, 6, 17, 8]), max_tokens=40)
    >>> sorted(sorted(batch) for batch in sampler)
    [[0, 2, 4, 5, 7], [1], [3, 6]]
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        num_processes: int = 1,
        drop_last: bool = False,
    ) -> None:
        inputs = np.asarray(lengths) - 1  # (records,)
        self.widths = -(-inputs // BUCKET) * BUCKET  # (records,)
        self.seed = seed
        self.num_processes = num_processes
        self.epoch = 0
        self.records_per_epoch = len(inputs)
        if batch_size is not None and max_tokens is None:
            if drop_last:
                self.records_per_epoch -= self.records_per_epoch % (batch_size * num_processes)
            total = self.records_per_epoch
            sizes = [min(batch_size, total - start) for start in range(0, total, batch_size)]
        elif max_tokens is not None and batch_size is None:
            if inputs.max() > max_tokens:
                raise ValueError(
                    f"record {inputs.argmax()} alone has {inputs.max()} input tokens, and max_tokens_per_batch is "
                    f"{max_tokens}; give at least {inputs.max()}, or a smaller max_length"
                )
            sizes = _sizes_within(np.sort(self.widths)[::-1], max_tokens)
        else:
            raise ValueError("give either batch_size or max_tokens")
        if not sizes:
            raise ValueError(f"{len(inputs)} records fill no batch of {batch_size} on {num_processes} process(es)")
        self.sizes = _divisible(sizes, num_processes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch, of all processes."""
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.widths))[: self.records_per_epoch]
        order = order[np.argsort(-self.widths[order], kind="stable")]  # longest first, equal widths shuffled
        ends = np.cumsum(self.sizes)
        batches = [order[end - size : end].tolist() for end, size in zip(ends, self.sizes, strict=True)]
        steps = -(-len(batches) // self.num_processes)
        for step in generator.permutation(steps):  # the batches of one step stay together: they take equally long
            yield from batches[step * self.num_processes : (step + 1) * self.num_processes]


def record_lengths(dataset: Dataset, column: str = "length") -> np.ndarray:
    """The column of lengths in tokens, (records,), straight from Arrow: no record is read.

    Raises:
        ValueError: the dataset has no such column.
    """
    if column not in (getattr(dataset, "column_names", None) or ()):
        raise ValueError(
            f"no column {column!r} in the training data; length_column_name names the one of lengths in tokens"
        )
    return dataset.select_columns(column).with_format("arrow")[:][column].to_numpy()


def _sizes_within(widths: np.ndarray, max_tokens: int) -> list[int]:
    """How many records each batch holds, longest first; `widths` are sorted, longest first."""
    sizes, start = [], 0
    while start < len(widths):
        # 0 if one row, rounded up, is over the budget: it gets a batch of its own
        fitting = max_tokens // max(1, int(widths[start]))
        sizes.append(min(max(1, fitting), len(widths) - start))
        start += sizes[-1]
    return sizes


def _divisible(sizes: list[int], num_processes: int) -> list[int]:
    """The sizes with the largest batches halved until their number is a multiple of `num_processes`."""
    while len(sizes) % num_processes and max(sizes) > 1:
        largest = int(np.argmax(sizes))
        half = sizes[largest] // 2
        sizes[largest : largest + 1] = [sizes[largest] - half, half]
    return sizes
