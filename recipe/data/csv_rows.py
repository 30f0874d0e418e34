"""The lines of a CSV file as records. Its dialect is that of RFC 4180: commas, and a quote in a text written twice."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

from recipe.console import one_line
from recipe.data.columns import Columns, UnreadableFileError, has_shape, missing_columns, refuse_repeated
from recipe.data.file_kinds import not_text, open_bytes
from recipe.data.values import Problem, Row

CSV_FIELD = re.compile(r'("[^"]*(?:""[^"]*)*"|[^,\r\n]*)(?:,|\r?\n|\r|$)')  # with its quotes
DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def csv_rows(path: str, columns: Columns) -> Iterator[Row]:
    """The lines of a CSV file; text stays text: "007" is not 7, and "None" or an empty cell is not null."""
    with _csv_reader(path) as (reader, row_lines):
        lines = _filled(reader, row_lines)
        try:
            header: list[str] = next(lines, [])
            if ",".join(header).lower() == "sep=,":  # Excel's own line, which says what the delimiter is
                header = next(lines, [])
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
                    names = one_line(", ".join(header), 500)  # a name may hold a line break
                    text = (
                        f"{len(fields)} fields, but the header has {len(header)} ({names}); put text with "
                        "commas or quotes in double quotes"
                    )
                    yield Problem("another number of fields than the header", f": {text}", {"fields": fields})
                row_lines.clear()
        except csv.Error as error:
            start = reader.line_num - len(row_lines) + 1
            raise UnreadableFileError(
                f" line {start}: broken quotes in the record that begins there ({error}, line {reader.line_num}); a "
                'quote in a text is written twice: "" and not \\"'
            ) from error


def _filled(reader: Any, row_lines: list[str]) -> Iterator[list[str]]:
    """The rows that are not blank; `row_lines` are those of the row alone."""
    for fields in reader:
        if fields:
            yield fields
        else:
            row_lines.clear()


@contextlib.contextmanager
def _csv_reader(path: str) -> Iterator[tuple[Any, list[str]]]:
    """A reader of rows, and a list to which it adds the lines that it reads.

    Raises:
        UnreadableFileError: the file is not UTF-8 text.
    """
    lines: list[str] = []

    def remember(text: Iterable[str]) -> Iterator[str]:
        for line in text:
            lines.append(line)
            yield line

    with open_bytes(path) as file:
        if said := not_text(file.read(16)):
            raise UnreadableFileError(f" {said}")
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with io.TextIOWrapper(open_bytes(path), "utf-8-sig", errors="surrogateescape", newline="") as text:
            yield csv.reader(remember(text), strict=True), lines
    finally:
        csv.field_size_limit(limit)


def _check_header(header: list[str], columns: Columns) -> None:
    refuse_repeated(header, columns)
    if sign := re.fullmatch(r"sep=(.+)", header[0], re.IGNORECASE):
        name = DELIMITERS.get(sign[1], "another sign than commas")
        raise UnreadableFileError(f" separates its columns by {name} ({header[0]!r}); save it with commas")
    if columns.fields["instruction"] not in header and not has_shape(header, columns):
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
