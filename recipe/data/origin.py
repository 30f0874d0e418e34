"""Where a record was read from: the file, and its row there, by the number that it has in its split."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetInfo


@dataclass
class RecordsInfo(DatasetInfo):
    """The files of a split, as part of what `datasets` hands on when rows are selected, mapped or saved."""

    read_as: str = ""  # the split that was read; `validation` may have been taken out of `train`
    files: list[str] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)  # the number of each file's first record in the split


def origin(dataset: Dataset, row: int, split: str = "train") -> dict[str, Any]:
    """The `file` of a record, its `row` in it, and the `split` it was read as.

    Args:
        row: the record's number in the split it was read from, as in the column `row`.
        split: names the records of a dataset that was not read by `recipe.data`.
    """
    info = dataset.info
    if not isinstance(info, RecordsInfo) or not info.files:
        return {"file": split, "split": split, "row": row}
    index = bisect.bisect_right(info.first_rows, row) - 1
    return {"file": info.files[index], "split": info.read_as, "row": row - info.first_rows[index]}


def place(dataset: Dataset, row: int, split: str = "train") -> str:
    """`origin` as messages begin: `a.jsonl row 3`."""
    found = origin(dataset, row, split)
    return f"{found['file']} row {found['row']}"


def rows_in_words(dataset: Any, rows: Iterable[int]) -> str:
    """Many records, by file: `a.jsonl rows 3, 5; b.jsonl row 0`."""
    if not isinstance(dataset, Dataset) or not isinstance(dataset.info, RecordsInfo):
        return f"training rows {', '.join(map(str, dict.fromkeys(rows)))}"
    by_file: dict[str, list[str]] = {}
    for row in dict.fromkeys(rows):  # a record with several examples stands there for each
        found = origin(dataset, row)
        by_file.setdefault(found["file"], []).append(str(found["row"]))
    return "; ".join(f"{file} row{'s' * (len(each) > 1)} {', '.join(each)}" for file, each in by_file.items())
