"""Reads the columns that are needed from one file, as text; what the other columns hold does not matter.

Every value is checked in the same way, whatever the format and the row. A file is streamed into an Arrow file in the
cache of `datasets`, named by the content of the file, and memory-mapped from there.

Rows in messages count from 0, as `dataset[i]` does.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.metadata
import itertools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.table import MemoryMappedTable

from recipe.console import shorten
from recipe.data.columns import (
    FIELDS,
    OPTIONAL,
    Columns,
    UnreadableFileError,
    missing_columns,
    refuse_conversations,
    wanted_columns,
)
from recipe.data.json_values import BrokenJSONError, json_values

TEXT_TYPES = ("string", "large_string", "string_view", "null")
BATCH = 10_000  # records in memory at a time
NO_RECORDS = "holds no records; give it at least one"
SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in (*FIELDS, "family")]
    + [pa.field("row", pa.int64())]
    + [pa.field("extra", pa.string())]
    # null for a good record: why it is bad in few words, the whole message, and the values of its fields as JSON
    + [pa.field(name, pa.string()) for name in ("reason", "problem", "record")]
)
CSV_FIELD = re.compile(r'("[^"]*(?:""[^"]*)*"|[^,\r\n]*)(?:,|\r?\n|\r|$)')  # with its quotes
DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class Problem(NamedTuple):
    """Why a record is bad: in few words, to be counted, and in full."""

    reason: str
    text: str
    values: dict[str, Any] | None = None  # what the row holds instead of a record


Row = dict[str, Any] | Problem  # the values of a record by column, or why there are none


def read_file(path: str, kind: str, columns: Columns) -> Dataset:
    """The records of a file, good and bad, with the columns of `SCHEMA`; `kind` is `json`, `csv` or `parquet`.

    Raises:
        UnreadableFileError: it is broken, has no such columns, or no records.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        key = cache_key(hashlib.file_digest(file, "blake2b").hexdigest(), kind, columns)
    if kind == "parquet":
        return cached(key, parquet_rows(path, columns), columns)
    rows = json_rows(path, columns) if kind == "json" else csv_rows(path, columns)
    return cached(key, iter(lambda: list(itertools.islice(rows, BATCH)), []), columns)


def read_dataset(dataset: Dataset, columns: Columns) -> Dataset:
    """`read_file` for a dataset that was loaded by other means."""
    # datasets shows `_fingerprint` in its guide to caching, and has no public name for it
    key = cache_key(dataset._fingerprint, "dataset", columns)
    wanted = wanted_columns(dataset.column_names, columns, lambda: dataset.with_format(None)[:1])
    tables = dataset.select_columns(wanted).with_format("arrow").iter(batch_size=BATCH)
    batches = (batch for table in tables for batch in table.combine_chunks().to_batches())
    return cached(key, batches, columns)


def cache_key(content: str, kind: str, columns: Columns) -> str:
    """Identifies records by what decides them: the content, the columns, the code that reads, and its libraries."""
    code = [
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("columns.py", "readers.py", "json_values.py")
    ]
    parts = [content, kind, json.dumps(columns, sort_keys=True), *code, importlib.metadata.version("pyarrow")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def cached(key: str, parts: Iterable[list[Row] | pa.RecordBatch], columns: Columns) -> Dataset:
    """The records under this key, read into the cache unless they are there; whole or not at all."""
    path = Path(datasets.config.HF_DATASETS_CACHE) / "instruction_records" / f"{key}.arrow"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # other processes may read the same file now
        try:
            with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
                for batch in _batches(parts, columns):
                    writer.write_batch(batch)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=key)


def _batches(parts: Iterable[list[Row] | pa.RecordBatch], columns: Columns) -> Iterator[pa.RecordBatch]:
    """The lines of the Arrow file.

    Raises:
        UnreadableFileError: there are no records, they are conversations, or a column is in none of them.
    """
    start, seen = 0, set[str]()  # fields that a record has
    names: dict[str, None] = {}  # of columns, in order
    for part in parts:
        if isinstance(part, list):
            records = [row for row in part if isinstance(row, dict)]
            if start == 0:
                refuse_conversations(records[:100], columns)
            for record in records[:100] if len(names) < 100 else []:
                names |= dict.fromkeys(record)
            absent = [field for field in columns.fields if field not in seen]
            seen |= {f for f in absent if any(columns.fields[f] in record for record in records)}
        yield _checked(start, part, columns)
        start += len(part)
    if start == 0:
        raise UnreadableFileError(f" {NO_RECORDS}")
    if names:
        missing_columns(list(names), columns, seen)


def _checked(start: int, part: list[Row] | pa.RecordBatch, columns: Columns) -> pa.RecordBatch:
    """Lines of the Arrow file: the fields of good records, and the problems of bad ones.

    Texts are checked all at once; only suspicious ones are looked at one by one.
    """
    unread = {} if isinstance(part, pa.RecordBatch) else {i: row for i, row in enumerate(part) if type(row) is Problem}
    rows = [{} if type(row) is Problem else row for row in part] if unread else part
    fields = {
        field: _column(rows, column, "" if field == "input" else None) for field, column in columns.fields.items()
    }
    suspects = set().union(*(_suspects(field, fields[field]) for field in FIELDS)) - unread.keys()
    bad = {
        # the text may show bytes that are not UTF-8
        index: (row.reason, row.text.encode("utf-8", "backslashreplace").decode(), _as_json(row.values or {}))
        for index, row in unread.items()
    }
    for index in sorted(suspects):
        values = {field: _python_value(fields[field][index]) for field in FIELDS}
        problems = [problem for field in FIELDS if (problem := value_problem(field, values[field])) is not None]
        if problems:
            text = "\n".join(f": {problem.text}" for problem in problems)
            bad[index] = (problems[0].reason, text, _as_json(values))
    nothing = [None] * len(part)
    about = (
        list(zip(*(bad.get(index, (None,) * 3) for index in range(len(part))), strict=True)) if bad else [nothing] * 3
    )
    arrays = [_without(fields[field], bad) for field in FIELDS]
    arrays += [_families(fields["family"]), pa.array(range(start, start + len(part)), pa.int64())]
    arrays += [pa.array(texts, pa.string()) for texts in (_extra(rows, columns) if columns.extra else nothing, *about)]
    return pa.record_batch(arrays, schema=SCHEMA)


def _as_json(values: dict[str, Any]) -> str:
    """JSON that every reader takes: NaN, which JSON does not have, as text."""
    try:
        return json.dumps(values, default=str, allow_nan=False)
    except ValueError:
        return json.dumps({name: json.dumps(value, default=str) for name, value in values.items()})


def _python_value(value: Any) -> Any:
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _column(rows: list[dict[str, Any]] | pa.RecordBatch, name: str, default: Any) -> list[Any] | pa.Array:
    """The values of a column; as an Arrow array if all of them are text or null, and UTF-8."""
    if isinstance(rows, list):
        values = [row.get(name, default) for row in rows]
    elif name not in rows.schema.names:
        values = [default] * len(rows)
    else:
        array = rows.column(name)
        try:
            if str(array.type) in TEXT_TYPES:
                array.validate(full=True)
                return array.cast(pa.string())
        except pa.ArrowInvalid:
            texts = array.cast(pa.binary()).to_pylist()
            return [text and text.decode("utf-8", "surrogateescape") for text in texts]
        values = array.to_pylist()
    if set(map(type, values)) <= {str, type(None)}:
        with contextlib.suppress(UnicodeEncodeError):  # half a character
            return pa.array(values, pa.string())
    return values


def _suspects(field: str, values: list[Any] | pa.Array) -> Iterable[int]:
    """The rows to look at one by one: null and blank texts, or all if there is more than text."""
    if isinstance(values, list):
        return range(len(values))
    if field in OPTIONAL:  # it may be null or blank
        return ()
    blank = pc.or_(pc.equal(pc.binary_length(values), 0), pc.utf8_is_space(values))
    return np.flatnonzero(pc.fill_null(blank, True)).tolist()


def _without(values: list[Any] | pa.Array, bad: Mapping[int, Any]) -> pa.Array:
    """The texts of the good records, null for the bad ones."""
    if not bad:
        return values if isinstance(values, pa.Array) else pa.array(values, pa.string())
    texts = values if isinstance(values, list) else values.to_pylist()
    return pa.array([None if index in bad else text for index, text in enumerate(texts)], pa.string())


def _families(values: list[Any] | pa.Array) -> pa.Array:
    """As text whatever they are: they only name groups."""
    if isinstance(values, pa.Array):
        return values
    texts = [None if value is None else str(value).encode("utf-8", "replace").decode() for value in values]
    return pa.array(texts, pa.string())


def _extra(rows: list[dict[str, Any]] | pa.RecordBatch, columns: Columns) -> list[str]:
    """Other columns as JSON; what JSON has no type for, such as a date, comes as its type and text, not as text."""
    records = rows if isinstance(rows, list) else _python_rows(rows, columns.extra)
    return [json.dumps({name: r[name] for name in columns.extra if name in r}, default=_typed) for r in records]


def _python_rows(rows: pa.RecordBatch, names: Iterable[str]) -> list[dict[str, Any]]:
    """The values of some columns row by row; bytes that are not UTF-8 become surrogates, as in the other formats."""
    try:
        columns = {name: _column(rows, name, None) for name in names if name in rows.schema.names}
    except UnicodeDecodeError as error:  # inside a nested value
        raise UnreadableFileError(
            f" holds an answer that is not UTF-8 text ({error}); save the file as UTF-8"
        ) from error
    lists = [values if isinstance(values, list) else values.to_pylist() for values in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)] or [{}] * len(rows)


def _typed(value: Any) -> dict[str, str]:
    return {type(value).__name__: str(value)}


def value_problem(field: str, value: Any) -> Problem | None:
    """Why a field cannot have this value; an input may be null, missing or blank, but not a number."""
    fix = "write the instruction" if field == "instruction" else "write a response"
    if isinstance(value, str):
        if half := half_character(value):
            return Problem(f"{field!r} {half[0]}", f"{field!r} {half[0]}{half[1]}")
        if field in OPTIONAL or value.strip():
            return None
        what = "blank" if value else "empty"
        return Problem(f"{field!r} is {what}", f"{field!r} is {what} ({shorten(repr(value))}); {fix} or remove the row")
    if value is None:
        if field in OPTIONAL:
            return None
        reason = f"{field!r} is null or missing"
        return Problem(reason, f"{reason}; {fix} or remove the row")
    kind = "int" if type(value).__name__ == "Decimal" else type(value).__name__
    shown = shorten(str(value) if kind == "int" else json.dumps(value, default=str))
    return Problem(
        f"{field!r} is not text ({kind})",
        f"{field!r} is {shown} ({kind}), not text; write it as text or remove the row",
    )


def half_character(text: str) -> tuple[str, str] | None:
    """What is wrong with a text that UTF-8 cannot hold, and what to do; None if nothing is."""
    try:
        if not text.isascii():
            text.encode()
        return None
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
    if 0xDC80 <= code <= 0xDCFF:  # how Python decodes a byte that is not UTF-8
        try:  # three bytes may be half a character, too
            halves = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogatepass")
        except UnicodeError:
            return "is not UTF-8 text", "; save the file as UTF-8"
        code = next(ord(character) for character in halves if "\ud800" <= character <= "\udfff")
    return "holds half a character", f" (\\u{code:04x} without its other half); write it again or remove the row"


# --- formats --------------------------------------------------------------------------------------------------------


def json_rows(path: str, columns: Columns) -> Iterator[Row]:
    """The objects of a JSON array, or of JSON lines."""
    with open(path, "rb") as file:
        try:
            for place, value in json_values(file, columns.fields.values()):
                if isinstance(value, BrokenJSONError):
                    yield Problem("broken JSON", f"{place}: {value}; fix the line or remove it", {"text": value.text})
                elif isinstance(value, dict):
                    yield value
                else:
                    shown = shorten(json.dumps(value, default=str))
                    yield Problem(
                        "not an object", f"{place}: {shown} is not an object with named fields", {"value": value}
                    )
        except BrokenJSONError as error:
            raise UnreadableFileError(f" {error}") from error


def csv_rows(path: str, columns: Columns) -> Iterator[Row]:
    """The lines of a CSV file; text stays text: "007" is not 7, and "None" or an empty cell is not null."""
    with _csv_reader(path) as (reader, row_lines):
        lines = (fields for fields in reader if fields)
        try:
            header: list[str] = next(lines, [])
            if not header:
                return
            _check_header(header, columns)
            row_lines.clear()
            for fields in lines:
                if _has_backslash_quote(row_lines):
                    reason = 'a quote written as \\"'
                    text = f': {reason}; write it twice, as "", in a text in double quotes'
                    yield Problem(reason, text, {"fields": fields})
                elif len(fields) == len(header):
                    yield dict(zip(header, fields, strict=True))
                else:
                    text = (
                        f"{len(fields)} fields, but the header has {len(header)} ({', '.join(header)}); put text with "
                        "commas or quotes in double quotes"
                    )
                    yield Problem("another number of fields than the header", f": {text}", {"fields": fields})
                row_lines.clear()
        except csv.Error as error:
            raise UnreadableFileError(
                f' line {reader.line_num}: broken quotes ({error}); a quote in a text is written twice: "" and not \\"'
            ) from error


def parquet_rows(path: str, columns: Columns) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = wanted_columns(names, columns, lambda: next(file.iter_batches(1), pa.table({})).to_pydict())
            yield from file.iter_batches(BATCH, columns=wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise UnreadableFileError(f" cannot be read as parquet: {error}") from error


@contextlib.contextmanager
def _csv_reader(path: str) -> Iterator[tuple[Any, list[str]]]:
    """A reader of rows, and a list to which it adds the lines that it reads."""
    lines: list[str] = []

    def remember(text: Iterable[str]) -> Iterator[str]:
        for line in text:
            lines.append(line)
            yield line

    limit = csv.field_size_limit(2**31 - 1)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            yield csv.reader(remember(text), strict=True), lines
    finally:
        csv.field_size_limit(limit)


def _check_header(header: list[str], columns: Columns) -> None:
    for column in columns.fields.values():
        if header.count(column) > 1:
            raise UnreadableFileError(f" has the column {column!r} twice in its header; give each its own name")
    if columns.fields["instruction"] not in header:
        for delimiter, name in DELIMITERS.items():
            if columns.fields["instruction"] in (part.strip('"') for part in ",".join(header).split(delimiter)):
                raise UnreadableFileError(f" separates its columns by {name} ({delimiter!r}); save it with commas")
    missing_columns(header, columns, {field for field, column in columns.fields.items() if column in header})


def _has_backslash_quote(lines: list[str]) -> bool:
    r"""Whether a quote is written as `\"` in a field without quotes around it; the reader takes both signs as text.

    In a field with quotes around it, `\"` ends the field, and the strict reader refuses what follows.
    """
    if not any('\\"' in line for line in lines):
        return False
    fields = CSV_FIELD.findall("".join(lines))
    return any('\\"' in field and not field.startswith('"') for field in fields)
