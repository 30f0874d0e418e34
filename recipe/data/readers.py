"""Reads the columns that are needed from one file, as text; what the other columns hold does not matter.

Every value is checked in the same way, whatever the format and the row. A file is streamed into an Arrow file in the
cache of `datasets`, named by the content of the file, and memory-mapped from there.

Rows in messages count from 0, as `dataset[i]` does.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.table import MemoryMappedTable

from recipe.console import shorten
from recipe.data.json_values import BrokenJSON, json_values

FIELDS = ("instruction", "input", "output")
OPTIONAL = ("input", "family")
BATCH = 10_000  # records in memory at a time
NO_RECORDS = "holds no records; give it at least one"
SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in (*FIELDS, "family")]
    + [pa.field("row", pa.int64())]
    + [pa.field("extra", pa.string())]
    # null for a good record: why it is bad in few words, the whole message, and the values of its fields as JSON
    + [pa.field(name, pa.string()) for name in ("reason", "problem", "record")]
)
DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class Problem(NamedTuple):
    """Why a record is bad: in few words, to be counted, and in full."""

    reason: str
    text: str


class Columns(NamedTuple):
    """What is read: the column of each field (`instruction`, `input`, `output`, `family`), and others by their names.

    The others may hold anything; they come as one JSON text in the column `extra`.
    """

    fields: Mapping[str, str]
    extra: tuple[str, ...] = ()


class UnreadableFile(Exception):
    """A file that cannot be read as records, in words that follow its name; each line is a problem of its own."""


Row = dict[str, Any] | Problem  # the values of a record by column, or why there are none


def read_file(path: str, kind: str, columns: Columns) -> Dataset:
    """The records of a file, good and bad, with the columns of `SCHEMA`; `kind` is `json`, `csv` or `parquet`.

    Raises:
        UnreadableFile: it is broken, has no such columns, or no records.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        key = cache_key(hashlib.file_digest(file, "blake2b").hexdigest(), kind, columns)
    rows = {"json": json_rows, "csv": csv_rows, "parquet": parquet_rows}[kind]
    return cached(key, lambda: rows(path, columns), columns)


def read_dataset(dataset: Dataset, columns: Columns) -> Dataset:
    """`read_file` for a dataset that was loaded by other means."""
    # datasets shows `_fingerprint` in its guide to caching, and has no public name for it
    key = cache_key(dataset._fingerprint, "dataset", columns)
    wanted = _wanted(dataset.column_names, columns, lambda: dataset.with_format(None)[:1])
    tables = dataset.select_columns(wanted).with_format("arrow").iter(batch_size=BATCH)
    return cached(key, lambda: itertools.chain.from_iterable(map(_table_rows, tables)), columns)


def cache_key(content: str, kind: str, columns: Columns) -> str:
    """Identifies records by what decides them: the content, the columns, the code that reads, and its libraries."""
    code = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("readers.py", "json_values.py")]
    parts = [content, kind, json.dumps(columns, sort_keys=True), *code, importlib.metadata.version("pyarrow")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def cached(key: str, make_rows: Any, columns: Columns) -> Dataset:
    """The records under this key, read into the cache unless they are there; whole or not at all."""
    path = Path(datasets.config.HF_DATASETS_CACHE) / "instruction_records" / f"{key}.arrow"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
                for batch in _batches(make_rows(), columns):
                    writer.write_batch(batch)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=key)


def _batches(rows: Iterable[Row], columns: Columns) -> Iterator[pa.RecordBatch]:
    count, seen, names = 0, set(), dict.fromkeys(())
    numbered = enumerate(rows)
    while part := list(itertools.islice(numbered, BATCH)):
        if count == 0:
            _refuse_conversations([values for _, values in part[:100]], columns)
        for _, values in part:
            if isinstance(values, dict):
                seen.update(field for field, column in columns.fields.items() if column in values)
                if len(names) < 100:
                    names |= dict.fromkeys(values)
        checked = [_checked(row, values, columns) for row, values in part]
        yield pa.RecordBatch.from_pylist(checked, schema=SCHEMA)
        count += len(part)
    if count == 0:
        raise UnreadableFile(f" {NO_RECORDS}")
    if names:
        missing_columns(list(names), columns, seen)


def _checked(row: int, values: Row, columns: Columns) -> dict[str, Any]:
    """A line of the Arrow file: the fields of a good record, or the problems of a bad one."""
    if isinstance(values, Problem):
        return {"row": row, "reason": values.reason, "problem": values.text, "record": "{}"}
    fields = {field: values.get(column) for field, column in columns.fields.items()}
    if columns.fields["input"] not in values:
        fields["input"] = ""
    problems = [problem for field in FIELDS if (problem := value_problem(field, fields[field])) is not None]
    if problems:
        shown = json.dumps({name: fields[name] for name in FIELDS}, default=str)
        text = "\n".join(f": {problem.text}" for problem in problems)
        return {"row": row, "reason": problems[0].reason, "problem": text, "record": shown}
    family = fields.get("family")
    if family is not None:
        family = str(family).encode("utf-8", "replace").decode()
    extra = {name: values[name] for name in columns.extra if name in values}
    others = {"family": family, "extra": json.dumps(extra, default=str) if columns.extra else None}
    return {"row": row, **{name: fields[name] for name in FIELDS}, **others}


def value_problem(field: str, value: Any) -> Problem | None:
    """Why a field cannot have this value; an input may be null, missing or blank, but not a number."""
    fix = "write the instruction" if field == "instruction" else "write a response"
    if isinstance(value, str):
        if not value.isascii() and (half := _half_character(value)):
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
    shown = shorten(json.dumps(value, default=str))
    return Problem(
        f"{field!r} is not text ({kind})",
        f"{field!r} is {shown} ({kind}), not text; write it as text or remove the row",
    )


def _half_character(text: str) -> tuple[str, str] | None:
    """What is wrong with a text that UTF-8 cannot hold, and what to do; None if nothing is."""
    try:
        text.encode()
        return None
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
    if 0xDC80 <= code <= 0xDCFF:  # how Python decodes a byte that is not UTF-8
        return "is not UTF-8 text", "; save the file as UTF-8"
    return "holds half a character", f" (\\u{code:04x} without its other half); write it again or remove the row"


# --- formats --------------------------------------------------------------------------------------------------------


def json_rows(path: str, columns: Columns) -> Iterator[Row]:
    """The objects of a JSON array, or of JSON lines."""
    with open(path, "rb") as file:
        try:
            for place, value in json_values(file):
                if isinstance(value, BrokenJSON):
                    yield Problem("broken JSON", f"{place}: {value}; fix the line or remove it")
                elif isinstance(value, dict):
                    yield value
                else:
                    shown = shorten(json.dumps(value, default=str))
                    yield Problem("not an object", f"{place}: {shown} is not an object with named fields")
        except BrokenJSON as error:
            raise UnreadableFile(f" {error}") from error


def csv_rows(path: str, columns: Columns) -> Iterator[Row]:
    """The lines of a CSV file; text stays text: "007" is not 7, and "None" or an empty cell is not null."""
    with _csv_reader(path) as reader:
        lines = (fields for fields in reader if fields)
        try:
            header = next(lines, [])
            if not header:
                return
            _check_header(header, columns)
            for fields in lines:
                if len(fields) == len(header):
                    yield dict(zip(header, fields, strict=True))
                else:
                    text = (
                        f"{len(fields)} fields, but the header has {len(header)} ({', '.join(header)}); put text with "
                        "commas or quotes in double quotes"
                    )
                    yield Problem("another number of fields than the header", f": {text}")
        except csv.Error as error:
            raise UnreadableFile(
                f' line {reader.line_num}: broken quotes ({error}); a quote in a text is written twice: "" and not \\"'
            ) from error
    _refuse_backslash_quotes(path, header)


def parquet_rows(path: str, columns: Columns) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = _wanted(names, columns, lambda: next(file.iter_batches(1), pa.table({})).to_pydict())
            for batch in file.iter_batches(BATCH, columns=wanted):
                yield from _table_rows(batch)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise UnreadableFile(f" cannot be read as parquet: {error}") from error


def _table_rows(table: pa.Table | pa.RecordBatch) -> Iterator[Row]:
    names = table.schema.names
    for values in zip(*(_python_values(table.column(name)) for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def _python_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        texts = array.cast(pa.large_binary()).to_pylist()
        return [text and text.decode("utf-8", "surrogateescape") for text in texts]


@contextlib.contextmanager
def _csv_reader(path: str, **options: Any) -> Iterator[Any]:
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            yield csv.reader(text, strict=True, **options)
    finally:
        csv.field_size_limit(limit)


def _check_header(header: list[str], columns: Columns) -> None:
    for column in columns.fields.values():
        if header.count(column) > 1:
            raise UnreadableFile(f" has the column {column!r} twice in its header; give each its own name")
    if len(header) == 1:
        for delimiter, name in DELIMITERS.items():
            if columns.fields["instruction"] in header[0].split(delimiter):
                raise UnreadableFile(f" separates its columns by {name} ({delimiter!r}); save it with commas")
    missing_columns(header, columns, {field for field, column in columns.fields.items() if column in header})


def _refuse_backslash_quotes(path: str, header: list[str]) -> None:
    r"""Refuse a file that writes a quote in a text as `\"`, where reading it as CSV gives other texts, silently."""
    with open(path, "rb") as file:
        if not any(b'\\"' in block for block in file):
            return
    quotes = False
    try:
        with _csv_reader(path, escapechar="\\", doublequote=False) as escaped:
            for fields in filter(None, escaped):
                if len(fields) != len(header):
                    return
                quotes = quotes or any('"' in value for value in fields)
    except csv.Error:
        return
    if quotes:
        raise UnreadableFile(r' writes quotes in texts as \" instead of ""; save it with doubled quotes')


# --- columns --------------------------------------------------------------------------------------------------------


def _wanted(names: list[str], columns: Columns, first: Any) -> list[str]:
    present = {field for field, column in columns.fields.items() if column in names}
    if not set(FIELDS) - set(OPTIONAL) <= present:
        _refuse_conversations([{name: values[0] for name, values in first().items() if len(values)}], columns)
    missing_columns(names, columns, present)
    wanted = [column for field, column in columns.fields.items() if field in present]
    return wanted + [name for name in columns.extra if name in names and name not in wanted]


def missing_columns(names: list[str], columns: Columns, present: set[str]) -> None:
    """Refuse a file without a column that is needed; an `input` of that very name may be absent.

    Raises:
        UnreadableFile: each missing column, with the one that is meant, probably.
    """
    unused = sorted(set(names) - set(columns.fields.values()))
    missing = []
    for field in FIELDS:
        column = columns.fields[field]
        near = difflib.get_close_matches(column, unused, n=1, cutoff=0.7)
        if field in present or (field == column == "input" and not near):  # many data sets have no inputs
            continue
        hint = f"did you mean {near[0]!r}? " if near else ""
        missing.append(
            f": no column {column!r} among {', '.join(map(repr, names))}; {hint}"
            f"name the column of the {field} with --{field}_column {near[0] if near else 'NAME'}"
        )
    if missing:
        raise UnreadableFile("\n".join(missing))


def _refuse_conversations(rows: list[Row], columns: Columns) -> None:
    """Refuse chat records with one line that is true: no column of them is an instruction."""
    for values in rows:
        if not isinstance(values, dict):
            continue
        complete = all(isinstance(values.get(columns.fields[field]), str) for field in ("instruction", "output"))
        for name, value in values.items():
            turns = value if isinstance(value, list) else []
            is_chat = bool(turns) and all(
                isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
                for turn in turns
            )
            if is_chat and not complete:
                raise UnreadableFile(
                    f": its records are conversations (the turns are in {name!r}), and this recipe learns from records "
                    "of instruction, input and output: write one for each conversation, its first question as "
                    "instruction and the answer to it as output"
                )
