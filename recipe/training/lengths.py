"""How long the records of a dataset are, in tokens, as it bears on the batches that are made of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from recipe.data.examples import example_bounds


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
    if "ends" not in dataset.column_names:
        return lengths, lengths, np.ones_like(lengths)
    names = [name for name in ("ends", "inputs") if name in dataset.column_names]
    table = dataset.select_columns(names).with_format("arrow")[:]
    starts, stops = example_bounds(table.append_column("length", pa.array(lengths)))
    counts = pc.list_value_length(table["ends"]).fill_null(1).to_numpy().astype(np.int64)
    longest = np.maximum.reduceat(stops - starts, counts.cumsum() - counts)
    return longest, table["inputs"].to_numpy() + 1 if "inputs" in names else lengths - counts + 1, counts


def common_start(dataset: Dataset) -> int:
    """How many inputs all records begin with; 0 if there is no column of them."""
    if "input_ids" not in dataset.column_names:
        return 0
    start, names = None, [name for name in ("input_ids", "ends") if name in dataset.column_names]
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=10_000):
        tokens, lengths = (each(table["input_ids"]).to_numpy() for each in (pc.list_flatten, pc.list_value_length))
        firsts = lengths.cumsum() - lengths
        if "ends" in names:  # those of each first example
            lengths = pc.coalesce(pc.list_element(table["ends"], 0), pa.array(lengths, pa.int32())).to_numpy()
        start = (tokens[: lengths[0]] if start is None else start)[: max(0, lengths.min() - 1)]
        same = (tokens[firsts[:, None] + np.arange(len(start))] == start).all(axis=0)
        start = start[: len(same) if same.all() else int(same.argmin())]
    return 0 if start is None else len(start)
