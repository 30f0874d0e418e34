"""Reads the columns that are needed from one file, as text; what the other columns hold does not matter.

Every value is checked in the same way, whatever the format and the row. A file is streamed into an Arrow file in the
cache of `datasets`, named by the content of the file, and memory-mapped from there.

Rows in messages count from 0, as `dataset[i]` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
    TEXTS,
    Columns,
    UnreadableFileError,
    missing_columns,
    misspelt,
    wanted_columns,
    with_shape,
)
from recipe.data.conversations import another_shape, fields_of, read_conversation
from recipe.data.csv_rows import csv_rows
from recipe.data.file_kinds import open_bytes
from recipe.data.json_values import BrokenJSONError, json_values
from recipe.data.origin import RecordsInfo
from recipe.data.values import Problem, Row, Unheld, arrow_texts, as_json, python_values, value_problem

BATCH = 10_000  # records in memory at a time
NO_RECORDS = "holds no records; give it at least one"
SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in (*TEXTS, "family")]
    + [pa.field("row", pa.int64())]
    + [pa.field("extra", pa.string())]
    + [pa.field("unanswered", pa.int64())]  # turns at the end of a conversation that nothing is learned from
    # null for a good record: why it is bad in few words, the whole message, and the values of its fields as JSON
    + [pa.field(name, pa.string()) for name in ("reason", "problem", "record")]
)
# what decides which records a file holds, beside its content
CODE = ("columns.py", "conversations.py", "csv_rows.py", "file_kinds.py", "json_values.py", "readers.py", "values.py")


def read_file(path: str, kind: str, columns: Columns) -> Dataset:
    """The records of a file, good and bad, with the columns of `SCHEMA`; `kind` is `json`, `csv` or `parquet`.

    Raises:
        UnreadableFileError: it is broken, has no such columns, or no records.
        OSError: it cannot be opened.
    """
    with open_bytes(path) as file:
        digest = hashlib.file_digest(file, "blake2b")  # type: ignore[arg-type]
    key = cache_key(digest.hexdigest(), kind, columns)
    return cached(key, file_parts(path, kind, columns, BATCH), columns)


def file_parts(path: str, kind: str, columns: Columns, size: int) -> Iterator[list[Row] | pa.RecordBatch]:
    """The records of a file as it holds them, `size` at a time; of Parquet at most."""
    if kind == "parquet":
        return parquet_rows(path, columns, size)
    rows = json_rows(path, columns) if kind == "json" else csv_rows(path, columns)
    return iter(lambda: list(itertools.islice(rows, size)), [])


def stream_file(path: str, kind: str, columns: Columns, size: int, part: int, parts: int) -> Iterator[pa.RecordBatch]:
    """`read_file` without a cache, `size` records at a time; only every batch whose number is `part` modulo `parts`."""
    yield from _batches(file_parts(path, kind, columns, size), columns, lambda number: number % parts == part)


def read_dataset(dataset: Dataset, columns: Columns) -> Dataset:
    """`read_file` for a dataset that was loaded by other means."""
    tables = dataset.with_format("arrow")
    with _arrow_errors("a dataset"):
        wanted = wanted_columns(dataset.column_names, columns, lambda: _first_values(tables[:1]))
    tables = tables.select_columns(wanted)
    # its fingerprint says how it was made, not what is in it
    return cached(cache_key(_content_hash(tables), "dataset", columns), _record_batches(tables), columns)


def _record_batches(tables: Dataset) -> Iterator[pa.RecordBatch]:
    """The values of a dataset; an Arrow file has no checksum, so that a damaged one must be found before it is used."""
    with _arrow_errors("a dataset"):
        for table in tables.iter(batch_size=BATCH):
            for batch in table.combine_chunks().to_batches():
                for array in batch.columns:
                    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(array.type)
                    if as_bytes is None:
                        array.validate()
                    else:
                        array.view(as_bytes).validate(full=True)
                yield batch


def _content_hash(tables: Dataset) -> str:
    """A hash of all values of a dataset, whether they are in memory or in Arrow files."""
    digest = hashlib.blake2b()
    for batch in _record_batches(tables):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:  # not the batch alone: it would lack its dictionaries
            writer.write_batch(batch)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def cache_key(content: str, kind: str, columns: Columns) -> str:
    """Identifies records by what decides them: the content, the columns, the code that reads, and its libraries."""
    code = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in CODE]
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
    return Dataset(MemoryMappedTable.from_file(str(path)), info=RecordsInfo(), fingerprint=key)


def _batches(
    parts: Iterable[list[Row] | pa.RecordBatch], columns: Columns, wanted: Callable[[int], bool] = lambda number: True
) -> Iterator[pa.RecordBatch]:
    """The lines of the Arrow file, of those parts whose number is wanted.

    Raises:
        UnreadableFileError: there are no records, their shape is not known, or a column is in none of them.
    """
    start, seen = 0, set[str]()  # fields that a record has
    names: dict[str, None] = {}  # of columns, in order
    for number, part in enumerate(parts):
        records = [row for row in part if isinstance(row, dict)] if isinstance(part, list) else []
        if start == 0:
            columns = with_shape(columns, records[:100] if isinstance(part, list) else _rows(part[:100]))
        if isinstance(part, list):
            for record in records[:100] if len(names) < 100 else []:
                names |= dict.fromkeys(record)
            absent = [field for field in columns.fields if field not in seen]
            seen |= {f for f in absent if any(columns.fields[f] in record for record in records)}
        if wanted(number):
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
    rows: Any = [{} if type(row) is Problem else row for row in part] if unread else part
    fields: dict[str, Any] = {}
    unanswered: list[int] | None = None
    if columns.turns:
        fields, unanswered, problems = _conversations(rows, columns, unread)
    else:
        problems = _field_problems(rows, columns, unread, fields)
    bad = {index: _about_bad(found, values, index in unread) for index, (found, values) in problems.items()}
    nothing = [None] * len(part)
    about = (
        list(zip(*(bad.get(index, (None,) * 3) for index in range(len(part))), strict=True)) if bad else [nothing] * 3
    )
    arrays = [_without(fields.get(field, nothing), bad) for field in TEXTS]
    arrays += [_families(_column(rows, columns.fields["family"], None))]
    arrays += [pa.array(range(start, start + len(part)), pa.int64())]
    arrays += [pa.array(_extra(rows, columns) if columns.extra else nothing, pa.string())]
    arrays += [pa.array(unanswered or nothing, pa.int64()), *(pa.array(texts, pa.string()) for texts in about)]
    return pa.record_batch(arrays, schema=SCHEMA)


Problems = dict[int, tuple[list[Problem], dict[str, Any]]]  # of each bad row, with what it holds


def _about_bad(found: list[Problem], values: dict[str, Any], unread: bool) -> tuple[str, str, str]:
    """Why a record is bad, in few words and in full, and what it holds; a row that was not read tells its place."""
    text = "\n".join(problem.text if unread else f": {problem.text}" for problem in found)
    return found[0].reason, text.encode("utf-8", "backslashreplace").decode(), as_json(values)  # bytes may be shown


def _field_problems(
    rows: Any, columns: Columns, unread: Mapping[int, Problem], fields: dict[str, list[Any] | pa.Array]
) -> Problems:
    """What is wrong with records of instruction, input and output, whose values are put into `fields`."""
    fields |= {field: _column(rows, columns.fields[field], "" if field == "input" else None) for field in FIELDS}
    misnamed = _misnamed(rows, columns) if isinstance(rows, list) else {}
    suspects = set(misnamed).union(*(_suspects(field, fields[field]) for field in FIELDS)) - unread.keys()
    found: Problems = {index: ([problem], problem.values or {}) for index, problem in unread.items()}
    for index in sorted(suspects):
        values = {field: _python_value(fields[field][index]) for field in FIELDS}
        problems = [
            problem
            for field in FIELDS
            if (problem := misnamed.get(index, {}).get(field) or value_problem(field, values[field])) is not None
        ]
        if problems and (other := another_shape(columns, _rows(rows[index : index + 1])[0])):
            problems = [other]
        if problems:
            others = {name: value for problem in problems for name, value in (problem.values or {}).items()}
            found[index] = (problems, values | others)
    return found


def _conversations(
    rows: Any, columns: Columns, unread: Mapping[int, Problem]
) -> tuple[dict[str, list[Any]], list[int], Problems]:
    """Conversations as the fields of records, the turns left out at the end of each, and what is wrong."""
    assert columns.turns
    found: Problems = {index: ([problem], problem.values or {}) for index, problem in unread.items()}
    records: list[dict[str, str]] = []
    unanswered = []
    for index, row in enumerate(_rows(rows)):
        other = another_shape(columns, row)
        read = [other] if other else read_conversation(columns.turns, row)
        if isinstance(read, list):
            values = {name: row.get(name) for name in columns.turns}
            found.setdefault(index, (read, values | (read[0].values or {})))
        messages, left_out = read if isinstance(read, tuple) else ([], 0)
        records.append(fields_of(messages) if messages else dict.fromkeys(TEXTS, ""))
        unanswered.append(left_out)
    return {field: [record[field] for record in records] for field in TEXTS}, unanswered, found


def _rows(rows: list[dict[str, Any]] | pa.RecordBatch) -> list[dict[str, Any]]:
    if isinstance(rows, list):
        return rows
    values = {name: python_values(column) for name, column in zip(rows.schema.names, rows.columns, strict=True)}
    return [{name: values[name][index] for name in values} for index in range(len(rows))]


def _misnamed(rows: list[dict[str, Any]], columns: Columns) -> dict[int, dict[str, Problem]]:
    """The fields of each record whose text stands under a name of another case, where it would be lost."""
    alike = misspelt(set().union(*rows), columns)
    found: dict[int, dict[str, Problem]] = {}
    for index, row in enumerate(rows) if alike else ():
        for name in row.keys() & alike.keys():
            if (column := alike[name]) not in row:
                field = next(field for field in FIELDS if columns.fields[field] == column)
                reason = f"{name!r} stands where {column!r} should"
                text = f"{reason}; rename it or remove the row"
                found.setdefault(index, {})[field] = Problem(reason, text, {name: row[name]})
    return found


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
        if (texts := arrow_texts(array)) is not None:
            return texts
        values = python_values(array)
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
    if isinstance(rows, list):
        records = rows
    else:
        values = {name: python_values(rows.column(name)) for name in columns.extra if name in rows.schema.names}
        records = [{name: values[name][index] for name in values} for index in range(len(rows))]
    return [json.dumps({name: r[name] for name in columns.extra if name in r}, default=_typed) for r in records]


def _typed(value: Any) -> dict[str, str]:
    return {value.kind if isinstance(value, Unheld) else type(value).__name__: str(value)}


# --- formats --------------------------------------------------------------------------------------------------------


def json_rows(path: str, columns: Columns) -> Iterator[Row]:
    """The objects of a JSON array, or of JSON lines."""
    with open_bytes(path) as file:
        try:
            for place, value in json_values(file, columns.candidates):
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


def parquet_rows(path: str, columns: Columns, size: int = BATCH) -> Iterator[pa.RecordBatch]:
    with _arrow_errors("parquet"), pq.ParquetFile(open_bytes(path) if "://" in path else path) as file:
        names = file.schema_arrow.names
        known = [name for name in names if name in columns.candidates]
        is_enough = any(set(shape) <= set(known) for shape in columns.shapes)  # another column may be damaged
        first = file.iter_batches(1, columns=known if is_enough else None)
        wanted = wanted_columns(names, columns, lambda: _first_values(next(first, None)))
        yield from file.iter_batches(size, columns=wanted)


def _first_values(batch: pa.RecordBatch | pa.Table | None) -> dict[str, list[Any]]:
    if batch is None:
        return {}
    arrays = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in batch.columns)
    return {name: python_values(array) for name, array in zip(batch.schema.names, arrays, strict=True)}


@contextlib.contextmanager
def _arrow_errors(kind: str) -> Iterator[None]:
    """What Arrow says of a damaged file, in one line: it is one problem."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last, for the name of a column
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise UnreadableFileError(f" cannot be read as {kind}: {' '.join(str(error).split())}") from error
