"""What is in a record file, by readings of our own: the standard library, a CSV parser, pyarrow."""

import io
import json
import re
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

QUOTED, PLAIN = re.compile(r'"((?:[^"]|"")*)"'), re.compile(r'[^,\r\n"]*')
GOOD, BAD, UNKNOWN = "good", "bad", "unknown"
NEEDED = ("instruction", "input", "output")


@dataclass
class Row:
    """Whether a row is good, if that is known, and its instruction, input and output."""

    verdict: str
    values: tuple[str, str, str] | None = None
    broken: bool = False


def row_of(values: dict[str, Any]) -> Row:
    """A row whose values are texts, None, or something else."""
    texts = [values.get(name) for name in NEEDED]
    fine = all(text is None or (isinstance(text, str) and encodable(text)) for text in texts)
    if not fine or not all((text or "").strip() for text in (texts[0], texts[2])):
        return Row(BAD)
    return Row(GOOD, (texts[0], texts[1] or "", texts[2]))


def encodable(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def plainly(content: bytes, suffix: str) -> list[Row] | None:
    """What is in a file, where that is beyond doubt; None for one that is not what its name says."""
    try:
        if suffix == "parquet":
            table = pq.ParquetFile(io.BytesIO(content)).read(columns=[*NEEDED, "family"])
            return [row_of(row) for row in table.to_pylist()] if set(NEEDED) <= set(table.column_names) else None
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        return csv_rows(text) if suffix == "csv" else json_rows(text)
    except Exception:
        return None


def json_rows(text: str) -> list[Row] | None:
    if text.lstrip(" \t\r\n")[:1] != "[":
        return [json_row(line) for line in text.split("\n") if line.strip()]
    elements = json.JSONDecoder(strict=False, parse_constant=float, object_pairs_hook=Pairs).decode(text)
    return [pairs_row(element) for element in elements]


def json_row(line: str) -> Row:
    try:
        return pairs_row(json.JSONDecoder(strict=False, object_pairs_hook=Pairs).decode(line.strip(" \t\r")))
    except (ValueError, RecursionError):
        return Row(UNKNOWN)


class Pairs(list):
    """The names and values of a JSON object, with those that stand there twice."""


def pairs_row(pairs: Any) -> Row:
    if not isinstance(pairs, Pairs):
        return Row(BAD)
    names = [name for name, _ in pairs]
    twice = any(names.count(name) > 1 for name in (*NEEDED, "family"))
    odd = not set(NEEDED) <= set(names) and not set(names) <= {*NEEDED, "note", "family"}  # one may be meant
    return Row(BAD) if twice else Row(UNKNOWN) if odd else row_of(dict(pairs))


def csv_rows(text: str) -> list[Row] | None:
    """By RFC 4180; None where a quote stands that the standard does not have."""
    rows, fields, position, begun = [], [], 0, False
    while position < len(text):
        if text[position] == '"':
            begun, cell = True, QUOTED.match(text, position)
            fields.append(cell[1].replace('""', '"'))
        else:
            cell = PLAIN.match(text, position)
            fields.append(cell[0])
        position = cell.end()
        sign, position = text[position : position + 1], position + 1
        if sign not in ("", ",", "\r", "\n"):
            return None
        begun = begun or cell[0] != "" or sign == ","
        if sign == "," and position < len(text):
            continue
        fields += [""] if sign == "," else []
        position += text[position - 1 : position + 1] == "\r\n"
        rows += [fields] if begun else []
        fields, begun = [], False
    header, *lines = rows
    if len(set(header)) < len(header) or not {"instruction", "output"} <= set(header) or "\\" in text:
        return None
    if "input" not in header:  # another name may be meant
        return None
    return [row_of(dict(zip(header, line, strict=True))) if len(line) == len(header) else Row(BAD) for line in lines]
