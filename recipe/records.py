"""Reading records and refusing bad ones: every problem of every file in one report, before anything is trained.

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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from recipe.config import DataArguments, UserError

FIELDS = ("instruction", "input", "output")
FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
LONGEST_REPORT = 100  # problems spelt out in one report; the rest are counted

Places = list[tuple[str, int]]  # the files behind a dataset, each with the dataset's row at which it begins


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
    for split, source in _named_sources(config.data).items():
        loaded = _load_source(source, problems)
        if split is not None and len(loaded) > 1:  # a folder or Hub id that names splits itself
            if split not in loaded:
                raise UserError(
                    f"data, split {split!r}: {source} has {', '.join(loaded)}; name one of its files instead"
                )
            loaded = {split: loaded[split]}
        for name, (dataset, places) in loaded.items():
            mapped = _map_columns(dataset, config, source, problems)
            if mapped is not None:
                problems += _record_problems(mapped, places, name)
                splits[split or name] = mapped
    if problems:
        raise UserError(report(problems))
    return splits


def report(problems: list[str]) -> str:
    """One message for many problems, spelling out the first `LONGEST_REPORT` and counting the rest."""
    lines = problems[:LONGEST_REPORT]
    if len(problems) > LONGEST_REPORT:
        lines.append(f"... and {len(problems) - LONGEST_REPORT} more")
    if len(problems) > 1:
        lines.insert(0, f"{len(problems)} problems in the data; nothing was trained or written:")
    return "\n".join(lines)


def _named_sources(data: dict | str | list) -> dict[str | None, str | list[str]]:
    """Split name to files; None where the source names its own splits."""
    if not isinstance(data, dict):
        data = {None: data}
    for split, source in data.items():
        names = source if isinstance(source, list) else [source]
        if not names or not all(isinstance(name, str) and name for name in names):
            where = f"data, split {split!r}" if split else "data"
            raise UserError(f"{where}: {source!r} is not a file, a glob or a list of them")
    return dict(data)


# --- reading --------------------------------------------------------------------------------------------------------


def _load_source(source: str | list[str], problems: list[str]) -> dict[str, tuple[Dataset, Places]]:
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
                yield f"{file} row {row}: {_shorten(json.dumps(element))} is not an object with named fields"
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        yield f"{file}: holds no records; give it at least one"
    for row, (number, line) in enumerate(lines):
        try:
            if not isinstance(json.loads(line), dict):
                yield f"{file} row {row} (line {number}): {_shorten(line)} is not an object with named fields"
        except json.JSONDecodeError as error:
            yield (
                f"{file} row {row} (line {number}): broken JSON at column {error.colno} ({error.msg}): "
                f"{_shorten(line)}; mend the line or remove it"
            )


# --- validating -----------------------------------------------------------------------------------------------------


def _map_columns(dataset: Dataset, config: DataArguments, source: Any, problems: list[str]) -> Dataset | None:
    """Rename the configured columns to `instruction`, `input`, `output`; add `row`, and `input` if there is none."""
    columns = {name: getattr(config, f"{name}_column") for name in FIELDS}
    missing = []
    for name, column in columns.items():
        if column in dataset.column_names:
            continue
        free = sorted(set(dataset.column_names) - set(columns.values()))
        near = difflib.get_close_matches(column, free, n=1, cutoff=0.7)
        if name == "input" and column == "input" and not near:
            continue  # data without inputs is ordinary
        mend = f"did you mean {near[0]!r}? Rename it or give" if near else f"name the column of the {name} with"
        missing.append(
            f"{source}: no column {column!r} among {', '.join(map(repr, dataset.column_names))}; "
            f"{mend} --{name}_column {near[0] if near else 'NAME'}"
        )
    if missing:
        problems += missing
        return None
    renames = {column: name for name, column in columns.items() if column in dataset.column_names}
    if len(renames) < len([column for column in columns.values() if column in dataset.column_names]):
        problems.append(f"{source}: two fields are mapped to one column ({columns}); give each its own")
        return None
    kept = [name for name in dataset.column_names if name in renames or name not in (*FIELDS, "row")]
    dataset = dataset.select_columns(kept).rename_columns(renames)
    if "input" not in dataset.column_names:
        dataset = dataset.add_column("input", [""] * len(dataset))
    return dataset.add_column("row", np.arange(len(dataset)))


def _record_problems(dataset: Dataset, places: Places, split: str) -> list[str]:
    """Every null, blank or non-text value, in row order. Columns are scanned in Arrow; only suspects are looked at."""
    found: list[tuple[int, str]] = []
    for field in FIELDS:
        is_text = getattr(dataset.features[field], "dtype", None) in ("string", "large_string")
        start = 0
        for table in dataset.select_columns([field]).with_format("arrow").iter(batch_size=10_000):
            for index in (start + np.flatnonzero(_suspects(table[field], is_text))).tolist():
                try:
                    problem = _value_problem(field, dataset[field][index])
                except UnicodeDecodeError:
                    problem = f"{field!r} is not UTF-8 text; save the file as UTF-8"
                if problem:
                    found.append((index, problem))
            start += len(table)
    return [f"{_place(places, index, split)}: {problem}" for index, problem in sorted(found, key=lambda item: item[0])]


def _suspects(column: pa.ChunkedArray, is_text: bool) -> np.ndarray:
    """Which values need a look, (rows,) bool: null, blank, and all of a column that is not text, or not UTF-8."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        is_text = False
    if not is_text:
        return np.ones(len(column), dtype=bool)
    trimmed = pc.utf8_trim_whitespace(pc.fill_null(column, ""))
    return pc.equal(trimmed, pa.scalar("", trimmed.type)).to_numpy()


def _value_problem(field: str, value: Any) -> str | None:
    if field == "input" and value is None:
        return None  # a record without an input
    mend = "write the instruction" if field == "instruction" else "write a response"
    if value is None:
        return f"{field!r} is null or missing; {mend} or remove the row"
    if not isinstance(value, str):
        shown = _shorten(json.dumps(value, default=str))
        return f"{field!r} is {shown} ({type(value).__name__}), not text; write it as text or remove the row"
    if field == "input" or value.strip():
        return None
    return f"{field!r} is {'blank' if value else 'empty'} ({_shorten(repr(value))}); {mend} or remove the row"


def _place(places: Places, index: int, split: str) -> str:
    file, first_row = max((place for place in places if place[1] <= index), key=lambda place: place[1])
    return f"{file} row {index - first_row}" if Path(file).is_file() else f"{file} {split} row {index}"


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
