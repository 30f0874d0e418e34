"""Reads files, globs, folders and Hub datasets; reports what cannot be read, and why.

Rows in messages count from 0, as `dataset[i]` does.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import glob
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from recipe.config import UserError
from recipe.console import shorten

# by file name extension; a value must be the name of a `datasets` builder
FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
NO_RECORDS = "holds no records; give it at least one"

LoadedSplits = dict[str, list[tuple[str, Dataset]]]  # by split: each file's name and its records


def load_source(source: str | list[str], problems: list[str]) -> LoadedSplits:
    """Read a source; return its splits by name, and append to `problems` what cannot be read."""
    patterns = [source] if isinstance(source, str) else source
    name = patterns[0]
    if all(Path(pattern).is_dir() for pattern in patterns):
        return _load_files(_files_by_split(patterns), problems)
    if len(patterns) > 1 or Path(name).is_file() or Path(name).suffix in FORMATS or glob.escape(name) != name:
        return _load_files({"train": [file for pattern in patterns for file in _expand(pattern)]}, problems)
    try:
        return {split: [(f"{name} {split}", dataset)] for split, dataset in load_dataset(name).items()}
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"data {name!r}: not a file here, and no dataset that datasets can load ({error}); check the name, "
            "run `hf auth login` if it is private, or give a .json, .jsonl, .csv or .parquet file"
        ) from error


def _files_by_split(folders: list[str]) -> dict[str, list[str]]:
    """The files of folders by the split that their names give, as on the Hub: train.jsonl, data/test-00000.parquet."""
    files: dict[str, list[str]] = {}
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):  # an empty folder
            # used only to list files by split; the builder name does not matter
            for split, paths in load_dataset_builder("json", data_dir=folder).config.data_files.items():
                for path in paths:
                    if Path(path).suffix in FORMATS:
                        files.setdefault(str(split), []).append(path)
    if not files:
        raise UserError(f"data {', '.join(folders)}: no files in a known format; give one of {', '.join(FORMATS)}")
    return files


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


def _load_files(files_by_split: dict[str, list[str]], problems: list[str]) -> LoadedSplits:
    """Load one file at a time, so that messages can name the row in its file; datasets caches each file."""
    loaded: LoadedSplits = {}
    for split, files in files_by_split.items():
        parts = [(file, _load_file(file, problems)) for file in files]
        loaded[split] = [(file, dataset) for file, dataset in parts if dataset is not None]
    return loaded


def _load_file(file: str, problems: list[str]) -> Dataset | None:
    """The records of a file; or None if it cannot be read, and the reason in `problems`."""
    kind = FORMATS[Path(file).suffix]
    options: dict[str, Any] = {}
    try:
        if kind == "csv":
            header, reasons = _check_csv(file)
            if reasons:
                problems += [f"{file} {reason}" for reason in reasons]
                return None
            # text stays text: "007" is not 7, and "None" or an empty cell is not null
            options = {"features": Features({name: Value("string") for name in header}), "keep_default_na": False}
        if kind == "json" and not _starts_like_records(file):
            raise ValueError("it does not begin with an object or an array")
        dataset = load_dataset(kind, data_files=glob.escape(file), split="train", **options)
        if kind == "json" and dataset.column_names == ["text"]:  # datasets reads an array of plain values so
            raise ValueError("its only field is 'text'; a record has an instruction and a response")
        if kind == "json" and any(pa.types.is_temporal(column) for column in dataset.data.schema.types):
            # datasets turns a column of date-like texts into dates; then read the file with `json` instead
            dataset = Dataset.from_list([json.loads(text) for _, text in _json_texts(file)])
        return dataset
    except (DatasetGenerationError, ValueError, TypeError, OSError, csv.Error) as error:
        reasons = _json_problems(file) if kind == "json" and not isinstance(error, OSError) else []
        reasons = reasons or [_error_in_words(error.__cause__ or error, kind)]
        problems += [f"{file} {reason}" for reason in reasons]
        return None


def _error_in_words(error: BaseException, kind: str) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text (at byte {error.start}); save it as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno} column {error.colno}: broken JSON ({error.msg}); fix it there"
    return f"cannot be read as {kind}: {error}"


def _starts_like_records(file: str) -> bool:
    """Whether the file begins with an object or an array: datasets crashes the process if it starts with `null`."""
    with open(file, "rb") as content:
        return content.read(100_000).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def _check_csv(file: str) -> tuple[list[str], list[str]]:
    """The names of the columns, and the problems that datasets hides: it fills short rows and shifts long ones."""
    with open(file, encoding="utf-8-sig", newline="") as text:
        lines = (fields for fields in csv.reader(text) if fields)
        header = next(lines, [])
        sizes = [len(fields) for fields in lines]
    names = ", ".join(header)
    problems = [
        f"row {row}: {size} fields, but the header has {len(header)} ({names}); "
        "put text with commas or quotes in double quotes"
        for row, size in enumerate(sizes)
        if size != len(header)
    ]
    if not sizes:
        problems.append(NO_RECORDS)
    if len(set(header)) < len(header) or not all(header):
        problems.append(f"has a column without a name, or one name twice, in its header ({names}); give each its own")
    return header, problems


def _json_problems(file: str) -> list[str]:
    """The first error of a broken JSON array, or every row that is broken or not an object."""
    try:
        texts = _json_texts(file)
    except ValueError as error:  # not UTF-8, or a broken array
        return [_error_in_words(error, "json")]
    problems = [] if texts else [NO_RECORDS]
    for place, text in texts:
        try:
            if not isinstance(json.loads(text), dict):
                problems.append(f"{place}: {shorten(text)} is not an object with named fields")
        except json.JSONDecodeError as error:
            reason = f"broken JSON at column {error.colno} ({error.msg})"
            problems.append(f"{place}: {reason}: {shorten(text)}; fix the line or remove it")
    return problems


def _json_texts(file: str) -> list[tuple[str, str]]:
    """The row in words and the JSON text of each element of an array, or of each line."""
    text = Path(file).read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return [(f"row {row}", json.dumps(element)) for row, element in enumerate(json.loads(text))]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [(f"row {row} (line {number})", line) for row, (number, line) in enumerate(lines)]
