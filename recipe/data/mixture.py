"""Several sources of records in one run: how many records of each an epoch has, and which they are.

The shares are drawn from records that are tokens already, so that another mix tokenizes nothing again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from recipe.collator import IGNORE_INDEX
from recipe.config import DataArguments, UserError
from recipe.data.examples import example_bounds
from recipe.data.origin import source_of_rows

KEYS = ("path", "name", "weight", "count", "columns")
COLUMNS = ("instruction", "input", "output", "messages")


@dataclass(frozen=True)
class Source:
    """A source of a mixture: its name ("" where there is no mixture), how it is read, and how much of it is wanted."""

    name: str
    config: DataArguments
    weight: float | None = None
    count: int | None = None


def is_mixture(data: Any) -> bool:
    """Whether `data` is a list of sources, and not a file, a mapping of splits or a list of files."""
    return isinstance(data, list) and any(isinstance(entry, dict) for entry in data)


def sources_of(config: DataArguments) -> list[Source]:
    """The sources of `config.data`, each with settings of its own; one without a name if it is no mixture.

    >>> data = [{"path": "a.json", "weight": 2}, {"path": "b.json", "weight": 1, "columns": {"output": "answer"}}]
    >>> [(source.name, source.weight, source.config.output_column) for source in sources_of(DataArguments(data=data))]
    [('a', 2, 'output'), ('b', 1, 'answer')]

    Raises:
        UserError: an entry that is no source, unknown keys, a weight or count that is none, weights for some only, or
            one name twice.
    """
    data: Any = config.data
    if not is_mixture(data):
        return [Source("", config)]
    found = [_source(index, entry, config) for index, entry in enumerate(data)]
    names = [source.name for source in found]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"data: two sources are called {twice[0]!r}; give each a name of its own, name: {twice[0]}_2")
    weighted = [source.name for source in found if source.weight is not None]
    if weighted and len(weighted) < len(found):
        others = ", ".join(repr(name) for name in names if name not in weighted)
        raise UserError(
            f"data: {', '.join(map(repr, weighted))} has a weight and {others} has none; give all sources a weight, or "
            "none (then each has its count, or all its records)"
        )
    return found


def _source(index: int, entry: Any, config: DataArguments) -> Source:
    where = f"data, source {index}"
    if not isinstance(entry, dict) or "path" not in entry:
        raise UserError(f"{where}: {entry!r} is no source; write {{path: records.json, weight: 1}}")
    if unknown := [key for key in entry if key not in KEYS]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; a source has {', '.join(KEYS)}")
    weight, count, path = entry.get("weight"), entry.get("count"), entry["path"]
    if weight is not None and (not _is_number(weight, int | float) or not 0 < weight < float("inf")):
        raise UserError(f"{where}: weight {weight!r} is not a number above 0")
    if count is not None and (not _is_number(count, int) or count < 1):
        raise UserError(f"{where}: count {count!r} is not a whole number above 0")
    if weight is not None and count is not None:
        raise UserError(f"{where}: it has a weight and a count; give one of them")
    columns = entry.get("columns") or {}
    if not isinstance(columns, dict) or not set(columns) <= set(COLUMNS):
        raise UserError(
            f"{where}: columns {columns!r}; give a mapping from {', '.join(COLUMNS)} to columns of the file"
        )
    if any(not isinstance(column, str) or not column for column in columns.values()) or is_mixture(path):
        raise UserError(f"{where}: a column, and the path, are names: {entry!r}")
    own = replace(config, data=path, **{f"{field}_column": column for field, column in columns.items()})
    return Source(_name(where, entry.get("name"), path), own, weight, count)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _name(where: str, name: Any, path: Any) -> str:
    """What the scores of a source are called: the name that is given, or that of its file."""
    if name is None:
        first = next(iter(path.values()), "") if isinstance(path, dict) else path
        first = first[0] if isinstance(first, list) and first else first
        name = re.sub(r"[^\w.-]+", "_", PurePosixPath(str(first)).stem).strip("_")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{where}: name {name!r}; give it a name of letters, digits, _, - and .")
    return name


def mix(encoded: DatasetDict, config: DataArguments) -> tuple[DatasetDict, list[dict[str, Any]]]:
    """The training split with the records of an epoch, and what each source has in it; others stay as they are.

    With weights an epoch has as many records as all sources together, shared out by weight; with counts those. Of a
    source that has fewer, all records are taken as often as they go into it, and a drawn remainder once more; of a
    source that has more, as many are drawn. What is drawn depends on `split_seed` and the source's place in the list.

    Args:
        encoded: splits of `recipe.data.encode`.

    Returns:
        the splits, and for each source of a mixture `source`; `records`, how many it has to train on; `used`, how many
        of these an epoch has, repeated ones counted each time; `repeated`, used / records; `left_out`, how many are
        never used; and of an epoch the `tokens`, and the `supervised` ones of these.

    Raises:
        UserError: a source has no record to train on, or its share is less than one record.
    """
    sources = sources_of(config)
    if not sources[0].name or "train" not in encoded:
        return encoded, []
    train = encoded["train"]
    of_source = source_of_rows(train.info, train.with_format("numpy")["row"][:])
    available = [np.flatnonzero(of_source == index) for index in range(len(sources))]
    sizes = [len(rows) for rows in available]
    wanted = _wanted(sources, sizes)
    tokens, supervised = _tokens(train)
    chosen, told = [], []
    for index, (source, rows, want) in enumerate(zip(sources, available, wanted, strict=True)):
        if not len(rows) or not want:
            what = "no record to train on" if want else f"less than one record, by its weight {source.weight}"
            raise UserError(f"data, source {source.name!r}: {what}; give it more, or leave it out")
        times, rest = divmod(want, len(rows))
        drawn = np.random.default_rng([config.split_seed, index]).choice(rows, rest, replace=False)
        chosen.append(used := np.concatenate([np.repeat(rows, times), drawn]))
        told.append(
            {
                "source": source.name,
                "records": len(rows),
                "used": want,
                "repeated": round(want / len(rows), 4),
                "left_out": max(0, len(rows) - want),
                "tokens": int(tokens[used].sum()),
                "supervised": int(supervised[used].sum()),
            }
        )
    # mixed, for a run that takes the records in their order
    order = np.random.default_rng(config.split_seed).permutation(np.concatenate(chosen))
    return DatasetDict({**encoded, "train": train.select(order)}), told


def _wanted(sources: Sequence[Source], sizes: Sequence[int]) -> list[int]:
    """How many records of each source an epoch has: whole numbers, as near to the shares as they can be."""
    if sources[0].weight is None:
        return [size if source.count is None else source.count for source, size in zip(sources, sizes, strict=True)]
    weights = np.array([source.weight for source in sources], dtype=np.float64)
    shares = sum(sizes) * weights / weights.sum()
    whole = np.floor(shares).astype(np.int64)
    whole[np.argsort(whole - shares, kind="stable")[: sum(sizes) - whole.sum()]] += 1  # the largest remainders
    return whole.tolist()


def _tokens(split: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Of each record, (records,), its tokens, and how many of them are learned."""
    counts = []
    columns = [name for name in ("labels", "length", "ends") if name in split.column_names]
    for table in split.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        lengths = table["length"].to_numpy()
        supervised = pc.list_flatten(table["labels"]).to_numpy() != IGNORE_INDEX
        supervised[example_bounds(table)[0]] = False  # the first token of an example is never learned
        counts.append(np.stack([lengths, np.add.reduceat(supervised, lengths.cumsum() - lengths, dtype=np.int64)]))
    tokens, learned = np.concatenate(counts, axis=1)
    return tokens, learned
