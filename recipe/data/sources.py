"""Data sources: files, globs, folders and Hub ids become datasets, and what cannot be read becomes a problem in words.

Rows in messages count from 0, as `dataset[i]` does.
"""

from __future__ import annotations

import csv
import difflib
import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from recipe.config import UserError
from recipe.console import shorten

FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}

Places = list[tuple[str, int]]  # the files behind a dataset, each with the dataset's row at which it begins


def load_source(source: str | list[str], problems: list[str]) -> dict[str, tuple[Dataset, Places]]:
    """Split name to dataset and files; whatever cannot be read goes to `problems`."""
    patterns = [source] if isinstance(source, str) else source
    if all(Path(pattern).is_dir() for pattern in patterns):
        return _load_folders(patterns, problems)
    if len(patterns) > 1 or _names_files(patterns[0]):
        return _load_files("train", [file for pattern in patterns for file in _expand(pattern)], problems)
    try:
        return {name: (dataset, [(patterns[0], 0)]) for name, dataset in load_dataset(patterns[0]).items()}
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"data {patterns[0]!r}: not a file here, and no dataset that datasets can load ({error}); check the name, "
            "run `hf auth login` if it is private, or give a .json, .jsonl, .csv or .parquet file"
        ) from error


def _load_folders(folders: list[str], problems: list[str]) -> dict[str, tuple[Dataset, Places]]:
    """The files of a folder, in the splits their names tell, as on the Hub: train.jsonl, data/test-00000.parquet."""
    files: dict[str, list[str]] = {}
    for folder in folders:
        try:
            found = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)
        except EmptyDatasetError as error:
            raise UserError(
                f"data {folder!r}: the folder holds no data files; put .jsonl or other files into it"
            ) from error
        for split, paths in found.items():
            files.setdefault(str(split), []).extend(path for path in paths if Path(path).suffix in FORMATS)
    if not any(files.values()):
        raise UserError(f"data {', '.join(folders)}: no files in a known format; give one of {', '.join(FORMATS)}")
    loaded: dict[str, tuple[Dataset, Places]] = {}
    for split, paths in files.items():
        loaded |= _load_files(split, paths, problems)
    return loaded


def _names_files(source: str) -> bool:
    path = Path(source)
    return not path.is_dir() and (path.is_file() or path.suffix in FORMATS or bool(re.search(r"[*?\[]", source)))


def _expand(pattern: str) -> list[str]:
    is_glob = re.search(r"[*?\[]", pattern) and not Path(pattern).is_file()
    files = [
        file for file in (sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]) if Path(file).is_file()
    ]
    if not files:
        folder = Path(pattern).parent
        near = difflib.get_close_matches(Path(pattern).name, [file.name for file in folder.glob("*")], n=1)
        hint = f"; did you mean {str(folder / near[0])!r}?" if near else ""
        raise UserError(f"data {pattern!r}: no such file{hint}")
    for file in files:
        if Path(file).suffix not in FORMATS:
            raise UserError(f"data {file!r}: unknown format; give one of {', '.join(FORMATS)}")
    return files


def _load_files(split: str, files: list[str], problems: list[str]) -> dict[str, tuple[Dataset, Places]]:
    """One file at a time, so that each record's row in its own file stays known; datasets caches each."""
    parts: list[tuple[str, Dataset]] = []
    for file in files:
        part = _load_file(file, problems)
        if part is not None:
            parts.append((file, part))
    if not parts:
        return {}
    places, first_row = [], 0
    for file, part in parts:
        places.append((file, first_row))
        first_row += len(part)
    try:
        return {split: (concatenate_datasets([part for _, part in parts]), places)}
    except ValueError:  # raised without a file's name
        first_file, first = parts[0]
        problems += [
            f"{file}: columns {_describe(part.features)} do not go with those of {first_file}, "
            f"{_describe(first.features)}; give all files the same columns and types"
            for file, part in parts[1:]
            if part.features != first.features
        ]
        return {}


def _describe(features: Features) -> str:
    return ", ".join(f"{name} ({getattr(kind, 'dtype', type(kind).__name__)})" for name, kind in features.items())


def _load_file(file: str, problems: list[str]) -> Dataset | None:
    kind = FORMATS[Path(file).suffix]
    try:
        if Path(file).stat().st_size == 0:
            problems.append(f"{file}: the file is empty; give it at least one record")
            return None
        options: dict[str, Any] = {}
        if kind == "json" and not _starts_like_records(file):
            raise ValueError("not records")
        if kind == "csv":
            header, ragged = _read_csv_shape(file)
            if ragged:
                problems += ragged
                return None
            # text stays text: "007" is not 7, and "None" or an empty cell is not null
            options = {"features": Features({name: Value("string") for name in header}), "keep_default_na": False}
        dataset = load_dataset(kind, data_files=glob.escape(file), split="train", **options)
        if len(dataset) == 0:
            problems.append(f"{file}: holds no records; give it at least one")
            return None
        if kind == "json" and dataset.column_names == ["text"]:  # an array of things that are not records
            raise ValueError("not records")
        return _as_plain_text(dataset, file) if kind == "json" else dataset
    except (DatasetGenerationError, ValueError, TypeError, OSError, StopIteration, csv.Error) as error:
        found = list(_json_problems(file)) if kind == "json" and not isinstance(error, OSError) else []
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            found = found or [f"{file}: not UTF-8 text (at byte {cause.start}); save it as UTF-8"]
        if "corresponds to no data" in str(cause):
            found = found or [f"{file}: holds no records; give it at least one"]
        problems += found or [f"{file}: cannot be read as {kind}: {cause}"]
        return None


def _starts_like_records(file: str) -> bool:
    """Whether the first sign is that of an object or an array: the reader of datasets crashes on a leading `null`."""
    with open(file, "rb") as content:
        return content.read(100_000).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def _read_csv_shape(file: str) -> tuple[list[str], list[str]]:
    """The header, and a problem for each row that has more or fewer fields than it."""
    with open(file, encoding="utf-8-sig", newline="") as text:
        lines = (fields for fields in csv.reader(text) if fields)
        header = next(lines)
        problems = [
            f"{file} row {row}: {len(fields)} fields, but the header has {len(header)} ({', '.join(header)}); "
            "put text with commas or quotes in double quotes"
            for row, fields in enumerate(lines)
            if len(fields) != len(header)
        ]
    if not all(header):
        problems.insert(0, f"{file}: the header has a column without a name ({', '.join(header)}); name or remove it")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        problems.insert(0, f"{file}: the header names {', '.join(map(repr, repeated))} twice; rename one of them")
    return header, problems


def _as_plain_text(dataset: Dataset, file: str) -> Dataset:
    """A JSON column in which every text is a date is read as dates; read such a file again as what it says."""
    if not any(pa.types.is_temporal(kind) for kind in dataset.data.schema.types):
        return dataset
    text = Path(file).read_text(encoding="utf-8-sig")
    is_array = text.lstrip().startswith("[")
    return Dataset.from_list(
        json.loads(text) if is_array else [json.loads(line) for line in text.split("\n") if line.strip()]
    )


def _json_problems(file: str) -> Iterator[str]:
    """Where a JSON file cannot be read: the position in an array, or every broken line of JSON lines."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield f"{file}: not UTF-8 text (at byte {error.start}); save it as UTF-8"
        return
    if text.lstrip().startswith("["):
        try:
            elements = json.loads(text)
        except json.JSONDecodeError as error:
            yield f"{file} line {error.lineno} column {error.colno}: broken JSON ({error.msg}); mend it there"
            return
        if not elements:
            yield f"{file}: holds no records; give it at least one"
        for row, element in enumerate(elements):
            if not isinstance(element, dict):
                yield f"{file} row {row}: {shorten(json.dumps(element))} is not an object with named fields"
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        yield f"{file}: holds no records; give it at least one"
    for row, (number, line) in enumerate(lines):
        try:
            if not isinstance(json.loads(line), dict):
                yield f"{file} row {row} (line {number}): {shorten(line)} is not an object with named fields"
        except json.JSONDecodeError as error:
            yield (
                f"{file} row {row} (line {number}): broken JSON at column {error.colno} ({error.msg}): "
                f"{shorten(line)}; mend the line or remove it"
            )
