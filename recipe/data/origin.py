"""Where a record was read from: the file, and its row there, by the number that it has in its split."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, DatasetInfo


@dataclass
class RecordsInfo(DatasetInfo):
    """The files of a split, as part of what `datasets` hands on when rows are selected, mapped or saved.

    Records are numbered in the split they were read from; in a mixture, through all splits of all sources.
    """

    files: list[str] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)  # the number of each file's first record
    # of each file, the split that was read; `validation` may have been taken out of `train`
    read_as: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # of a mixture, by their place in the list
    source_of_file: list[int] = field(default_factory=list)  # their indices
    records: int = 0  # of all files

    def add_file(self, name: str, split: str, source: int, records: int) -> int:
        """Note a file that is read next, and return the number of its first record."""
        self.files.append(name)
        self.first_rows.append(self.records)
        self.read_as.append(split)
        self.source_of_file.append(source)
        self.records += records
        return self.first_rows[-1]

    def take_files(self, other: RecordsInfo) -> None:
        """Become the information about the files of another."""
        for name in ("files", "first_rows", "read_as", "sources", "source_of_file", "records"):
            setattr(self, name, getattr(other, name))


def origin(dataset: Any, row: int, split: str = "train") -> dict[str, Any]:
    """The `file` of a record, its `row` in it, and the `split` it was read as.

    Args:
        row: the record's number, as in the column `row`.
        split: names the records of a dataset that was not read by `recipe.data`.
    """
    info = dataset.info
    if not isinstance(info, RecordsInfo) or not info.files:
        return {"file": split, "split": split, "row": row}
    index = bisect.bisect_right(info.first_rows, row) - 1
    return {"file": info.files[index], "split": info.read_as[index], "row": row - info.first_rows[index]}


def place(dataset: Dataset, row: int, split: str = "train") -> str:
    """`origin` as messages begin: `a.jsonl row 3`."""
    found = origin(dataset, row, split)
    return f"{found['file']} row {found['row']}"


def source_names(dataset: Any) -> list[str]:
    """The sources of a mixture; none for other data."""
    info = getattr(dataset, "info", None)
    return info.sources if isinstance(info, RecordsInfo) else []


def source_of_rows(info: RecordsInfo, rows: np.ndarray) -> np.ndarray:
    """The index of each record's source in `info.sources`, (records,), by its number."""
    return np.array(info.source_of_file)[np.searchsorted(info.first_rows, rows, side="right") - 1]


def rows_in_words(dataset: Any, rows: Iterable[int]) -> str:
    """Many records, by file: `a.jsonl rows 3, 5; b.jsonl row 0`."""
    if not isinstance(getattr(dataset, "info", None), RecordsInfo):
        return f"training rows {', '.join(map(str, dict.fromkeys(rows)))}"
    by_file: dict[str, list[str]] = {}
    for row in dict.fromkeys(rows):  # a record with several examples stands there for each
        found = origin(dataset, row)
        by_file.setdefault(found["file"], []).append(str(found["row"]))
    return "; ".join(f"{file} row{'s' * (len(each) > 1)} {', '.join(each)}" for file, each in by_file.items())
