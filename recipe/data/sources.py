"""Reads files, globs, folders and Hub datasets; whatever cannot be read is reported in words.

Rows in messages count from 0, as `dataset[i]` does.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from recipe.config import UserError
from recipe.console import shorten

FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}

NO_RECORDS = "holds no records; give it at least one"

LoadedSplits = dict[str, list[tuple[str, Dataset]]]  # by split: each file's name and its records


def load_source(source: str | list[str], problems: list[str]) -> LoadedSplits:
    """Read a source; return its splits by name, and append to `problems` what cannot be read."""
    patterns = [source] if isinstance(source, str) else source
    name = patterns[0]
    if all(Path(pattern).is_dir() for pattern in patterns):
        return _load_folders(patterns, problems)
    if len(patterns) > 1 or Path(name).is_file() or Path(name).suffix in FORMATS or glob.escape(name) != name:
        return _load_files("train", [file for pattern in patterns for file in _expand(pattern)], problems)
    try:
        return {split: [(f"{name} {split}", dataset)] for split, dataset in load_dataset(name).items()}
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"data {name!r}: not a file here, and no dataset that datasets can load ({error}); check the name, "
            "run `hf auth login` if it is private, or give a .json, .jsonl, .csv or .parquet file"
        ) from error


def _load_folders(folders: list[str], problems: list[str]) -> LoadedSplits:
    """The files of a folder in the splits their names give, as on the Hub: train.jsonl, data/test-00000.parquet."""
    files: dict[str, list[str]] = {}
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):  # an empty folder
            # only the file names are looked up here, so that "json" stands for any format
            for split, paths in load_dataset_builder("json", data_dir=folder).config.data_files.items():
                for path in paths:
                    if Path(path).suffix in FORMATS:
                        files.setdefault(str(split), []).append(path)
    if not files:
        raise UserError(f"data {', '.join(folders)}: no files in a known format; give one of {', '.join(FORMATS)}")
    loaded: LoadedSplits = {}
    for split, paths in files.items():
        loaded |= _load_files(split, paths, problems)
    return loaded


def _expand(pattern: str) -> list[str]:
    """The files that a name or a glob stands for."""
    is_file = Path(pattern).is_file()
    files = [pattern] if is_file else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not files:
        folder = Path(pattern).parent
        near = difflib.get_close_matches(Path(pattern).name, [file.name for file in folder.glob("*")], n=1)
        hint = f"; did you mean {str(folder / near[0])!r}?" if near else ""
        raise UserError(f"data {pattern!r}: no such file{hint}")
    for file in files:
        if Path(file).suffix not in FORMATS:
            raise UserError(f"data {file!r}: unknown format; give one of {', '.join(FORMATS)}")
    return files


def _load_files(split: str, files: list[str], problems: list[str]) -> LoadedSplits:
    """One file at a time, so that each record's row in its own file stays known; datasets caches each."""
    parts = [(file, _load_file(file, problems)) for file in files]
    return {split: [(file, dataset) for file, dataset in parts if dataset is not None]}


def _load_file(file: str, problems: list[str]) -> Dataset | None:
    kind = FORMATS[Path(file).suffix]
    options: dict[str, Any] = {}
    reasons: list[str] = []  # why it cannot be read; each begins after the name of the file
    try:
        if kind == "csv":
            header, reasons = _check_csv(file)
            # text stays text: "007" is not 7, and "None" or an empty cell is not null
            options = {"features": Features({name: Value("string") for name in header}), "keep_default_na": False}
        if kind == "json" and not _starts_like_records(file):
            raise ValueError("not records")
        if not reasons:
            dataset = load_dataset(kind, data_files=glob.escape(file), split="train", **options)
            if kind == "json" and dataset.column_names == ["text"]:  # perhaps an array of other values
                reasons = list(_json_problems(file))
            if not reasons:
                return _keep_dates_as_text(dataset, file) if kind == "json" else dataset
    except (DatasetGenerationError, ValueError, TypeError, OSError, csv.Error) as error:
        cause = error.__cause__ or error
        if kind == "json" and not isinstance(error, OSError):
            reasons = list(_json_problems(file))
        if isinstance(cause, UnicodeDecodeError):
            reasons = reasons or [f"is not UTF-8 text (at byte {cause.start}); save it as UTF-8"]
        reasons = reasons or [f"cannot be read as {kind}: {cause}"]
    problems += [f"{file} {reason}" for reason in reasons]
    return None


def _starts_like_records(file: str) -> bool:
    """Whether the text begins an object or an array: on a leading `null` the reader of datasets ends the process."""
    with open(file, "rb") as content:
        return content.read(100_000).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def _check_csv(file: str) -> tuple[list[str], list[str]]:
    """The names in the header, and a problem for each row that has more or fewer fields."""
    row, problems = -1, []
    with open(file, encoding="utf-8-sig", newline="") as text:
        lines = (fields for fields in csv.reader(text) if fields)
        header = next(lines, [])
        for row, fields in enumerate(lines):
            if len(fields) != len(header):
                problems.append(
                    f"row {row}: {len(fields)} fields, but the header has {len(header)} ({', '.join(header)}); "
                    "put text with commas or quotes in double quotes"
                )
    if row < 0:
        problems.append(NO_RECORDS)
    if not all(header):
        problems.append(f"has a column without a name in its header ({', '.join(header)}); name or remove it")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        problems.append(f"names {', '.join(map(repr, repeated))} twice in its header; rename one of them")
    return header, problems


def _keep_dates_as_text(dataset: Dataset, file: str) -> Dataset:
    """datasets reads a JSON column in which every text is a date as dates; read such a file again without it."""
    if any(pa.types.is_temporal(kind) for kind in dataset.data.schema.types):
        return Dataset.from_list([json.loads(record) for _, record in _json_texts(file)])
    return dataset


def _json_texts(file: str) -> list[tuple[str, str]]:
    """The place in words and the JSON text of each element of an array, or of each line."""
    text = Path(file).read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return [(f"row {row}", json.dumps(element)) for row, element in enumerate(json.loads(text))]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [(f"row {row} (line {number})", line) for row, (number, line) in enumerate(lines)]


def _json_problems(file: str) -> Iterator[str]:
    """Where a JSON file cannot be read: the position in an array, or every broken line of JSON lines."""
    try:
        records = _json_texts(file)
    except UnicodeDecodeError as error:
        yield f"is not UTF-8 text (at byte {error.start}); save it as UTF-8"
        return
    except json.JSONDecodeError as error:
        yield f"line {error.lineno} column {error.colno}: broken JSON ({error.msg}); fix it there"
        return
    if not records:
        yield NO_RECORDS
    for place, record in records:
        try:
            if not isinstance(json.loads(record), dict):
                yield f"{place}: {shorten(record)} is not an object with named fields"
        except json.JSONDecodeError as error:
            problem = f"broken JSON at column {error.colno} ({error.msg}): {shorten(record)}"
            yield f"{place}: {problem}; fix the line or remove it"
