"""Reads records and refuses bad ones: every problem of every file in one report, before anything is trained.

Rows in messages count from 0, as `dataset[i]` does.
"""

from __future__ import annotations

import difflib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, concatenate_datasets

from recipe.config import DataArguments, UserError
from recipe.console import shorten
from recipe.data.sources import load_source

FIELDS = ("instruction", "input", "output")
LONGEST_REPORT = 100  # problems listed in one report; the rest are counted


def read_records(config: DataArguments) -> DatasetDict:
    """The validated records of `config.data` in the splits it names (a plain file is `train`).

    Returns:
        splits with the columns `instruction`, `input`, `output` (text; `input` may be empty or null); `row`, the
        record's number in the split it was read from, counted from 0; and all other columns of the data.

    Raises:
        UserError: missing files or columns, and all bad records in one report.
    """
    if not config.data:
        raise UserError("no data: name a file, a glob, a folder or a Hub dataset id with --data")
    splits = DatasetDict()
    problems: list[str] = []
    for split, source in _sources_by_split(config.data).items():
        loaded = load_source(source, problems)
        if split is not None and len(loaded) > 1:  # a folder or Hub id that names splits itself
            if split not in loaded:
                names = ", ".join(loaded)
                raise UserError(f"data, split {split!r}: {source} has {names}; name one of its files instead")
            loaded = {split: loaded[split]}
        for name, files in loaded.items():
            parts = [(file, _map_columns(dataset, config, file, problems)) for file, dataset in files]
            for file, dataset in parts:
                problems += _record_problems(dataset, file) if dataset is not None else []
            if not problems:
                splits[split or name] = _concatenate(parts, problems)
    if problems:
        raise UserError(problem_report(problems))
    return splits


def problem_report(problems: list[str]) -> str:
    """One message for many problems: the first `LONGEST_REPORT` in full, and how many more there are."""
    lines = problems[:LONGEST_REPORT]
    if len(problems) > LONGEST_REPORT:
        lines.append(f"... and {len(problems) - LONGEST_REPORT} more")
    if len(problems) > 1:
        lines.insert(0, f"{len(problems)} problems in the data; nothing was trained or written:")
    return "\n".join(lines)


def _sources_by_split(data: dict | str | list) -> dict[str | None, str | list[str]]:
    """The files of each split; the name None stands for a source that names its own splits."""
    by_split = data if isinstance(data, dict) else {None: data}
    for split, source in by_split.items():
        names = source if isinstance(source, list) else [source]
        if not names or not all(isinstance(name, str) and name for name in names):
            where = f"data, split {split!r}" if split else "data"
            raise UserError(f"{where}: {source!r} is not a file, a glob or a list of them")
    return dict(by_split)


def _map_columns(dataset: Dataset, config: DataArguments, file: str, problems: list[str]) -> Dataset | None:
    """Rename the configured columns to `instruction`, `input`, `output`; add an empty `input` if there is none."""
    columns = {name: getattr(config, f"{name}_column") for name in FIELDS}
    if len(set(columns.values())) < len(columns):
        problems.append(f"{file}: two fields are mapped to one column ({columns}); give each its own")
        return None
    present, unused = dataset.column_names, sorted(set(dataset.column_names) - set(columns.values()))
    missing = []
    for name, column in columns.items():
        near = difflib.get_close_matches(column, unused, n=1, cutoff=0.7)
        if column in present or (name == column == "input" and not near):  # many data sets have no inputs
            continue
        hint = f"did you mean {near[0]!r}? " if near else ""
        missing.append(
            f"{file}: no column {column!r} among {', '.join(map(repr, present))}; {hint}"
            f"name the column of the {name} with --{name}_column {near[0] if near else 'NAME'}"
        )
    if missing:
        problems += missing
        return None
    renames = {column: name for name, column in columns.items() if column in present}
    kept = [name for name in present if name in renames or name not in (*FIELDS, "row")]
    dataset = dataset.select_columns(kept).rename_columns(renames)
    return dataset if "input" in dataset.column_names else dataset.add_column("input", [""] * len(dataset))


def _concatenate(parts: list[tuple[str, Dataset]], problems: list[str]) -> Dataset:
    """The records of all files, with their number in the column `row`."""
    first_file, first = parts[0]
    try:
        dataset = concatenate_datasets([part for _, part in parts])
    except ValueError:  # its message names no file
        problems += [
            f"{file}: columns {part.features} do not match those of {first_file}, {first.features}; "
            "give all files the same columns and types"
            for file, part in parts
            if part.features != first.features
        ]
        return first
    return dataset.add_column("row", np.arange(len(dataset)))


def _record_problems(dataset: Dataset, file: str) -> list[str]:
    """Every null, blank or non-text value, in row order."""
    problems: list[tuple[int, str]] = []
    for field in FIELDS:
        values, rows = dataset[field], list(range(len(dataset)))
        if getattr(dataset.features[field], "dtype", None) in ("string", "large_string", "null"):
            values = dataset.with_format("arrow")[:][field]
            rows = _suspects(field, values)
        checked = ((row, _value_problem(field, values[row])) for row in rows)
        problems += [(row, problem) for row, problem in checked if problem]
    problems.sort(key=lambda problem: problem[0])
    return [f"{file} row {row}: {problem}" for row, problem in problems]


def _suspects(field: str, texts: pa.ChunkedArray) -> list[int]:
    """The rows to look at one by one: null and blank texts, or all if one of them is not UTF-8."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return list(range(len(texts)))
    if field == "input":  # it may be null or blank
        return []
    texts = texts.cast(pa.large_string())  # a column of nulls has no text type yet
    blank = pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts))
    return np.flatnonzero(pc.fill_null(blank, True)).tolist()


def _value_problem(field: str, value: Any) -> str | None:
    try:
        value = value.as_py() if isinstance(value, pa.Scalar) else value
    except UnicodeDecodeError:
        return f"{field!r} is not UTF-8 text; save the file as UTF-8"
    if field == "input" and (value is None or isinstance(value, str)):
        return None  # an input may be missing or blank
    fix = "write the instruction" if field == "instruction" else "write a response"
    if value is None:
        return f"{field!r} is null or missing; {fix} or remove the row"
    if not isinstance(value, str):
        shown = shorten(json.dumps(value, default=str))
        return f"{field!r} is {shown} ({type(value).__name__}), not text; write it as text or remove the row"
    if value.strip():
        return None
    return f"{field!r} is {'blank' if value else 'empty'} ({shorten(repr(value))}); {fix} or remove the row"
