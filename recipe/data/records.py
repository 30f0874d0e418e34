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
        splits with the columns `instruction`, `input`, `output` (text; `input` may be empty or null), `row`, the
        record's number in its split, and whatever other columns the data has.

    Raises:
        UserError: files or columns that are not there, and every bad record, all in one report.
    """
    if not config.data:
        raise UserError("no data: name a file, a glob, a folder or a Hub dataset id with --data")
    splits = DatasetDict()
    problems: list[str] = []
    for split, source in _sources_by_split(config.data).items():
        loaded = load_source(source, problems)
        if split is not None and len(loaded) > 1:  # a folder or Hub id that names splits itself
            if split not in loaded:
                raise UserError(
                    f"data, split {split!r}: {source} has {', '.join(loaded)}; name one of its files instead"
                )
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
    """Split name to files; None where the source names its own splits."""
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
        if column in present or (name == column == "input" and not near):  # data without inputs is ordinary
            continue
        fix = f"did you mean {near[0]!r}? Rename it or give" if near else f"name the column of the {name} with"
        missing.append(
            f"{file}: no column {column!r} among {', '.join(map(repr, present))}; "
            f"{fix} --{name}_column {near[0] if near else 'NAME'}"
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
    except ValueError:  # it names no file
        problems += [
            f"{file}: columns {part.features} do not match those of {first_file}, {first.features}; "
            "give all files the same columns and types"
            for file, part in parts
            if part.features != first.features
        ]
        return first
    return dataset.add_column("row", np.arange(len(dataset)))


def _record_problems(dataset: Dataset, file: str) -> list[str]:
    """Every null, blank or non-text value, in row order; Arrow finds the suspects, Python looks at them."""
    found: list[tuple[int, str]] = []
    for field in FIELDS:
        column = dataset.select_columns([field])
        is_text = getattr(column.features[field], "dtype", None) in ("string", "large_string")
        start = 0
        for table in column.with_format("arrow").iter(batch_size=10_000):
            for index in (start + np.flatnonzero(_suspects(field, table[field], is_text))).tolist():
                try:
                    problem = _value_problem(field, column[index][field])
                except UnicodeDecodeError:
                    problem = f"{field!r} is not UTF-8 text; save the file as UTF-8"
                if problem:
                    found.append((index, problem))
            start += len(table)
    found.sort(key=lambda item: item[0])
    return [f"{file} row {index}: {problem}" for index, problem in found]


def _suspects(field: str, column: pa.ChunkedArray, is_text: bool) -> np.ndarray:
    """Which values need a look, (rows,) bool: null, blank, and all of a column that is not text, or not UTF-8."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        is_text = False
    if not is_text or field == "input":  # an input may be null or blank
        return np.full(len(column), not is_text)
    trimmed = pc.utf8_trim_whitespace(pc.fill_null(column, ""))
    return pc.equal(trimmed, pa.scalar("", trimmed.type)).to_numpy()


def _value_problem(field: str, value: Any) -> str | None:
    if field == "input" and value is None:
        return None  # a record without an input
    fix = "write the instruction" if field == "instruction" else "write a response"
    if value is None:
        return f"{field!r} is null or missing; {fix} or remove the row"
    if not isinstance(value, str):
        shown = shorten(json.dumps(value, default=str))
        return f"{field!r} is {shown} ({type(value).__name__}), not text; write it as text or remove the row"
    if field == "input" or value.strip():
        return None
    return f"{field!r} is {'blank' if value else 'empty'} ({shorten(repr(value))}); {fix} or remove the row"
