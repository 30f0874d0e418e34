"""Which records form a batch, and which process gets it: each record once an epoch, whatever the number of processes.

An order of records is dealt in steps. An optimizer step holds the next records of the order, as many as fill all
micro-batches of all processes, and the last step of an epoch holds what is left. So one process and several take the
same steps if their steps hold equally many records, and the loss, a mean over all targets of a step, is the same too.

`accelerate.data_loader.BatchSamplerShard` hands out the batches: batch i goes to process i modulo their number. It
repeats none, because their number is always a multiple of the processes; where no records are left, a batch is empty.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler, Sampler
from torch.utils.data import IterableDataset as Stream

from recipe.collator import IGNORE_INDEX, DataCollatorWithSharedPrefix
from recipe.data.examples import example_bounds
from recipe.data.origin import place
from recipe.data.streaming import RecordStream

if TYPE_CHECKING:
    from transformers import TrainingArguments

BUCKET = 8  # widths are rounded up to multiples of it: more records have equal width, and fewer shapes occur


class DealtBatches(Sampler[list[int]]):
    """Batches of `batch_size` records, dealt to the processes from an order of records.

    The last batches of an epoch are smaller, and as even as possible. If fewer records are left than processes, some
    batches are empty: see `CollateShare`.

    Args:
        records: the order, as record indices. A `RandomSampler` is seeded for each epoch, as accelerate's
            `SeedableRandomSampler` is; other samplers are told the epoch if they have a `set_epoch`.
        batch_size: records in a batch of one process.
        num_processes: processes that share the batches; batch i goes to process i modulo this.
        drop_last: each epoch leaves out the records that do not fill a batch for every process.

    Raises:
        ValueError: no batch.

    Example: seven records for two processes; of the last three, one gets two.

    >>> list(DealtBatches(range(7), batch_size=2, num_processes=2))
    [[0, 1], [2, 3], [4, 5], [6]]
    >>> list(DealtBatches(range(5), batch_size=2, num_processes=2))
    [[0, 1], [2, 3], [4], []]
    """

    def __init__(
        self,
        records: Sampler[int] | Sequence[int],
        batch_size: int,
        *,
        num_processes: int = 1,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.records = records
        self.num_processes = num_processes
        self.seed = seed
        self.epoch = 0
        self.dealt_at_once = batch_size * num_processes  # one micro-batch for each process
        count = len(records)  # type: ignore[arg-type]
        self.records_per_epoch = count - count % self.dealt_at_once if drop_last else count
        if not self.records_per_epoch:
            raise ValueError(
                f"{count} records fill no batch of {batch_size} on {num_processes} process(es); leave out "
                "dataloader_drop_last, or lower per_device_train_batch_size"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch, of all processes."""
        return -(-self.records_per_epoch // self.dealt_at_once) * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        if isinstance(self.records, RandomSampler):
            self.records.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        elif hasattr(self.records, "set_epoch"):
            self.records.set_epoch(self.epoch)
        order = list(self.records)[: self.records_per_epoch]
        for start in range(0, len(order), self.dealt_at_once):
            yield from deal(order[start : start + self.dealt_at_once], self.num_processes)


class GroupedByLength(Sampler[int]):
    """An order of records in which each step holds records of similar length.

    Each epoch shuffles all records, sets those aside that do not fill a step, sorts the others by length, cuts them
    into steps, and shuffles the steps. The records set aside come last, so they are others in each epoch. The order
    depends on the arguments and the epoch alone; transformers' `LengthGroupedSampler` draws from the global state.

    Args:
        lengths: of each record, in tokens.
        records_per_step: of all micro-batches of all processes.

    >>> list(GroupedByLength(np.array([7, 90, 9, 40, 90]), records_per_step=2))  # record 1 is set aside
    [4, 3, 2, 0, 1]
    """

    def __init__(self, lengths: np.ndarray, records_per_step: int, seed: int = 0) -> None:
        self.widths = _rounded_up(np.asarray(lengths) - 1, BUCKET)  # (records,)
        self.records_per_step = records_per_step
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.widths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.widths))
        whole, left = np.split(order, [len(order) - len(order) % self.records_per_step])
        whole = whole[np.argsort(-self.widths[whole], kind="stable")].reshape(-1, self.records_per_step)
        yield from generator.permutation(whole).ravel().tolist()
        yield from left.tolist()


class TokenBudgetBatches(Sampler[list[int]]):
    """Batches of records of similar length, as many as a token budget holds.

    Each epoch shuffles records of equal width among themselves, then the order of the batches; it depends on the
    arguments and its number alone. Every epoch has the same number of batches, a multiple of `num_processes`: the
    largest ones are halved until it is, and if all hold one record, the missing ones are empty: see `CollateShare`.

    `max_tokens` bounds the inputs that a model computes for a batch. A padded batch has rows times width, the longest
    row rounded up to a multiple of `BUCKET`; a shared row what all records begin with once, and of each the rest, so
    rounded. The idea is fairseq's (https://fairseq.readthedocs.io/en/latest/command_line_tools.html).

    Args:
        lengths: of each record's longest example, in tokens; all but the last are inputs. With `shared`: of the record.
        max_tokens: input tokens, with padding, in a batch of one process.
        examples: how many each record has, (records,), each a row of a padded batch; by default one.
        shared: for a shared row, the inputs that all records begin with.
        multiple: what the collator rounds rows up to a multiple of.
        num_processes: processes that share the batches; batch i goes to process i modulo this.
        name: what to call a record in an error, by its index in `lengths`.

    Raises:
        ValueError: a record longer than `max_tokens`.

    Example: 40 input tokens hold one row of 32, two of 16, or five of 8.

    >>> batches = TokenBudgetBatches(np.array([7, 33, 9, 14, 5, 6, 17, 8]), max_tokens=40)
    >>> sorted(sorted(batch) for batch in batches)
    [[0, 2, 4, 5, 7], [1], [3, 6]]
    """

    def __init__(
        self,
        lengths: np.ndarray,
        max_tokens: int,
        *,
        examples: np.ndarray | None = None,
        shared: int | None = None,
        multiple: int = 1,
        num_processes: int = 1,
        seed: int = 0,
        name: Callable[[int], str] | None = None,
    ) -> None:
        inputs = np.asarray(lengths) - 1  # (records,)
        rows = np.ones_like(inputs) if examples is None or shared is not None else np.asarray(examples)
        alone = rows * _rounded_up(inputs, multiple)
        if alone.max() > max_tokens:
            longest = int(alone.argmax())
            record = name(longest) if name else f"record {longest}"
            raise ValueError(
                f"{record} alone has {alone.max()} input tokens, and max_tokens_per_batch is {max_tokens}; give at "
                f"least {alone.max()}, or a smaller max_length"
            )
        if shared is None:
            widths = np.maximum(1, _rounded_up(inputs, np.lcm(BUCKET, multiple)))
            costs, room = rows, max_tokens // widths  # in rows, of a batch that is as wide as a record
        else:
            costs = widths = _rounded_up(inputs - shared, BUCKET)
            room = np.full_like(inputs, max_tokens // multiple * multiple - shared)
        self.kinds = widths * (rows.max() + 1) + rows  # records of one kind cost the same
        longest_first = np.argsort(-self.kinds)
        self.num_processes = num_processes
        self.seed = seed
        self.epoch = 0
        self.records_per_epoch = len(inputs)
        self.sizes = _divisible(_sizes_within(costs[longest_first], room[longest_first]), num_processes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch, of all processes."""
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.kinds))
        order = order[np.argsort(-self.kinds[order], kind="stable")]
        batches = [batch.tolist() for batch in np.split(order, np.cumsum(self.sizes[:-1]))]
        for step in generator.permutation(len(batches) // self.num_processes):  # its batches take equally long
            yield from batches[step * self.num_processes : (step + 1) * self.num_processes]


Batches = DealtBatches | TokenBudgetBatches


class CollateShare:
    """`collate`, and for an empty batch one that weighs nothing.

    A process without records must still run forward and backward with the others: DDP and FSDP exchange gradients and
    weights there. It takes the first record of the dataset, without targets, and counts none of its tokens.
    """

    def __init__(self, collate: Callable[[list], dict[str, Any]], dataset: Any) -> None:
        self.collate = collate
        self.dataset = dataset

    def __call__(self, features: list) -> dict[str, Any]:
        if features:
            return self.collate(features)
        batch = dict(self.collate([self.dataset[0]]))
        batch.pop("row", None)  # which a message about a bad loss would name
        for name in {"labels", "shift_labels"} & batch.keys():
            batch[name] = torch.full_like(batch[name], IGNORE_INDEX)
        return batch | {"lengths": torch.zeros(1, dtype=torch.int64)}


def deal(items: list, num_processes: int) -> list[list]:
    """Consecutive shares, one for each process, whose sizes differ by one at most, larger ones first.

    >>> deal([1, 2, 3, 4, 5], 3)
    [[1, 2], [3, 4], [5]]
    """
    size, more = divmod(len(items), num_processes)
    ends = [index * size + min(index, more) for index in range(num_processes + 1)]
    return [items[start:end] for start, end in itertools.pairwise(ends)]


def plan_batches(
    dataset: Any, args: TrainingArguments, batch_size: int, stock_order: Callable[[], Any], collate: Any = None
) -> Batches | None:
    """The batches that the arguments ask for; None for data without an order, such as a stream.

    Args:
        batch_size: records in a batch of one process.
        stock_order: gives transformers' sampler of single records, random or sequential, or a subclass's own.
        collate: lays the batches out; what it computes is what a token budget counts.

    Raises:
        ValueError: no column of lengths where one is needed, a record longer than `max_tokens_per_batch`, no batch, or
            a `train_sampling_strategy` that repeats records.
    """
    if isinstance(dataset, RecordStream):  # see recipe.training.streaming
        return None
    processes, seed = args.world_size, args.seed if args.data_seed is None else args.data_seed
    if getattr(args, "max_tokens_per_batch", None) is not None:  # stock arguments do not have it
        return budget_batches(dataset, args, collate, processes)
    records: Sampler[int] | None = None
    if args.train_sampling_strategy == "group_by_length":
        records_per_step = batch_size * processes * args.gradient_accumulation_steps
        records = GroupedByLength(record_lengths(dataset, args.length_column_name), records_per_step, seed)
    elif args.train_sampling_strategy == "batch_rebalance":
        raise ValueError("train_sampling_strategy batch_rebalance repeats records; group_by_length repeats none")
    elif not isinstance(dataset, Stream):
        records = stock_order()
    if records is None:
        return None
    return DealtBatches(records, batch_size, num_processes=processes, seed=seed, drop_last=args.dataloader_drop_last)


def budget_batches(dataset: Any, args: TrainingArguments, collate: Any, processes: int) -> TokenBudgetBatches:
    """Batches of so many input tokens as `max_tokens_per_batch` allows, in the layout that `collate` makes of them."""
    max_tokens: int = args.max_tokens_per_batch  # type: ignore[attr-defined]
    seed = args.seed if args.data_seed is None else args.data_seed
    options: dict[str, Any] = {
        "num_processes": processes,
        "seed": seed,
        "name": functools.partial(_record_name, dataset),
    }
    options["multiple"] = getattr(collate, "pad_to_multiple_of", None) or 1
    padded, in_a_row, examples = example_lengths(dataset, args.length_column_name)
    if isinstance(collate, DataCollatorWithSharedPrefix):
        return TokenBudgetBatches(in_a_row, max_tokens, shared=common_start(dataset), **options)
    return TokenBudgetBatches(padded, max_tokens, examples=examples, **options)


def loader_of(batches: Batches, stock: DataLoader) -> DataLoader:
    """The dataset, collate function and workers of transformers' loader, with other batches."""
    names = (
        "num_workers", "worker_init_fn", "pin_memory", "persistent_workers", "multiprocessing_context",
        "prefetch_factor", "in_order",
    )  # fmt: skip
    options: dict[str, Any] = {name: getattr(stock, name) for name in names}
    if stock.persistent_workers:
        # they are seeded once a run, a resumed run's again: from the global state, that would change its dropout
        options["generator"] = torch.Generator().manual_seed(batches.seed)
    collate = CollateShare(stock.collate_fn, stock.dataset)
    return DataLoader(stock.dataset, batch_sampler=batches, collate_fn=collate, **options)


def check_accelerator_config(config: Any) -> None:
    """Refuse the settings of transformers' `AcceleratorConfig` that share out records in another way.

    Raises:
        ValueError: such a setting.
    """
    problems = {
        "dispatch_batches": config.dispatch_batches and "splits tensors by their first dimension",
        "split_batches": config.split_batches and "makes the batch size of a process that of all processes",
        "even_batches": not config.even_batches and "false lets processes wait forever for one without a batch",
        "use_seedable_sampler": not config.use_seedable_sampler and "false lets the order depend on more than the seed",
    }
    for name, problem in problems.items():
        if problem:
            raise ValueError(f"accelerator_config: {name} {problem}; leave it out")


def record_lengths(dataset: Dataset, column: str = "length") -> np.ndarray:
    """The column of lengths in tokens, (records,), straight from Arrow: no record is read.

    Raises:
        ValueError: the dataset has no such column.
    """
    if not isinstance(dataset, Dataset) or column not in dataset.column_names:
        raise ValueError(
            f"no column {column!r} in the training data; length_column_name names the one of lengths in tokens"
        )
    return dataset.select_columns(column).with_format("arrow")[:][column].to_numpy()


def example_lengths(dataset: Dataset, column: str = "length") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each record, (records,): the length of its longest example; its length in a shared row; how many examples."""
    lengths = record_lengths(dataset, column).astype(np.int64)
    names = [name for name in ("ends", "inputs") if name in dataset.column_names]
    if "ends" not in names:
        return lengths, lengths, np.ones_like(lengths)
    table = dataset.select_columns(names).with_format("arrow")[:]
    starts, stops = example_bounds(table.append_column("length", pa.array(lengths)))
    counts = pc.list_value_length(table["ends"]).fill_null(1).to_numpy().astype(np.int64)
    longest = np.maximum.reduceat(stops - starts, counts.cumsum() - counts)
    return longest, table["inputs"].to_numpy() + 1 if "inputs" in names else lengths - counts + 1, counts


def common_start(dataset: Dataset) -> int:
    """How many inputs all records begin with."""
    start, names = None, [name for name in ("input_ids", "ends") if name in dataset.column_names]
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=10_000):
        tokens, lengths = (each(table["input_ids"]).to_numpy() for each in (pc.list_flatten, pc.list_value_length))
        firsts = lengths.cumsum() - lengths
        if "ends" in names:  # those of each first example
            lengths = pc.coalesce(pc.list_element(table["ends"], 0), pa.array(lengths, pa.int32())).to_numpy()
        start = (tokens[: lengths[0]] if start is None else start)[: lengths.min() - 1]
        same = (tokens[firsts[:, None] + np.arange(len(start))] == start).all(axis=0)  # (inputs,)
        start = start[np.logical_and.accumulate(same)]
    return 0 if start is None else len(start)


def _record_name(dataset: Dataset, index: int) -> str:
    """The file and the row of a record that `recipe.data` has read; of others, the index."""
    row = dataset[index].get("row") if "row" in dataset.column_names else None
    return f"record {index}" if row is None else place(dataset, row)


def _rounded_up(counts: np.ndarray, multiple: int) -> np.ndarray:
    return -(-counts // multiple) * multiple


def _sizes_within(costs: np.ndarray, room: np.ndarray) -> list[int]:
    """How many records each batch holds: what they cost fits into the room of the first, or it is alone."""
    sizes, start, ends = [], 0, costs.cumsum()
    while start < len(costs):
        fitting = int(np.searchsorted(ends, ends[start] - costs[start] + room[start], side="right")) - start
        sizes.append(max(1, fitting))
        start += sizes[-1]
    return sizes


def _divisible(sizes: list[int], num_processes: int) -> list[int]:
    """The sizes with the largest batches halved, or empty ones added, to make a multiple of `num_processes`."""
    while len(sizes) % num_processes and max(sizes) > 1:
        largest = int(np.argmax(sizes))
        half = sizes[largest] // 2
        sizes[largest : largest + 1] = [sizes[largest] - half, half]
    return sizes + [0] * (-len(sizes) % num_processes)
