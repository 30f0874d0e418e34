"""The values of a JSON file one by one, in bounded memory: the elements of an array, or one value a line."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Collection, Iterator
from decimal import Decimal
from typing import Any, BinaryIO

from recipe.console import shorten
from recipe.data.file_kinds import not_text
from recipe.data.values import EscapedHalf

BLOCK = 2**20  # bytes read at a time
BOM = b"\xef\xbb\xbf"
LONGEST_INT = 4000  # digits; Python refuses to convert more than 4,300


TOO_DEEP = "(nested too deeply to show)"
# a string, or a bracket outside of strings
PARTS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
BYTES = re.compile("[\udc80-\udcff]")  # that are not UTF-8, or halves of characters
SHORT_ESCAPES = dict(zip('"\\/\b\f\n\r\t', '"\\/bfnrt', strict=True))  # what stands behind the backslash


class BrokenJSONError(ValueError):
    """Text that is not JSON, with its place and the reason; `text` is the whole line, if one is broken."""

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= LONGEST_INT else Decimal(digits)


DECODER = json.JSONDecoder(parse_int=_integer, strict=False)


def json_values(file: BinaryIO, names: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """The values of a file, each with its line in words.

    A broken line gives a `BrokenJSONError`, and so does an object that has one of `names` twice; then the next is read.

    A byte that is not UTF-8 becomes a surrogate (`surrogateescape`), because it may stand where nobody looks.

    Raises:
        BrokenJSONError: an array that is broken, or a file that is no JSON at all.
    """
    start = file.read(BLOCK).removeprefix(BOM)
    while start and not start.strip():
        start = file.read(BLOCK)
    if said := not_text(start):
        raise BrokenJSONError(said)
    if not start.strip():
        return
    if start.lstrip()[:1] == b"[":
        yield from (("", value) for value in _array_elements(file, start, names))
    else:
        yield from _lines(file, start, names)


def _lines(file: BinaryIO, start: bytes, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    first = start.lstrip().split(b"\n", 1)[0].strip()
    if first == b"{":
        raise BrokenJSONError(
            "has objects over several lines; write each object on one line, or put them into an array: [{...}, {...}]"
        )
    rest = b""
    number, block = 0, start
    while block:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield f"(line {number})", _parse_line(line, names)
        block = file.read(BLOCK)
    if rest.strip():
        yield f"(line {number + 1})", _parse_line(rest, names)


def _parse_line(line: bytes, names: Collection[str]) -> Any:
    text = line.decode("utf-8", "surrogateescape").strip(" \t\r")
    try:
        value, end = _decode(text, 0)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        return BrokenJSONError(f"broken JSON at column {error.colno} ({error.msg}): {shorten(text)}", text)
    return _as_written(names, value, text)


def _decode(text: str, position: int) -> tuple[Any, int]:
    """The value that begins at a position, and where it ends."""
    try:
        return DECODER.raw_decode(text, position)
    except RecursionError:
        return _decode_shallow(text, position)


def _decode_shallow(text: str, position: int) -> tuple[Any, int]:
    """A value whose brackets are too deep for the parser; of an object, the fields that are not are read."""
    if text[position] != "{":
        return [TOO_DEEP], _end_of_brackets(text, position)
    pairs, end = _shallow_pairs(text, position)
    return dict(pairs), end


def _shallow_pairs(text: str, position: int) -> tuple[list[tuple[str, Any]], int]:
    pairs: list[tuple[str, Any]] = []
    while True:
        name, position = DECODER.raw_decode(text, _skip_space(text, position + 1))
        position = _skip_space(text, position)
        if not isinstance(name, str) or text[position : position + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, position)
        position = _skip_space(text, position + 1)
        try:
            value, position = DECODER.raw_decode(text, position)
        except RecursionError:
            value = {"": TOO_DEEP} if text[position] == "{" else [TOO_DEEP]
            position = _end_of_brackets(text, position)
        pairs.append((name, value))
        position = _skip_space(text, position)
        if text[position : position + 1] == "}":
            return pairs, position + 1
        if text[position : position + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)


def _end_of_brackets(text: str, position: int) -> int:
    depth = 0
    for part in PARTS.finditer(text, position):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part[0], 0)
        if depth == 0:
            return part.end()
    raise json.JSONDecodeError("Expecting a closing bracket", text, len(text))


def _as_written(names: Collection[str], value: Any, text: str) -> Any:
    """The value, or an error if an object has one of the names twice; the parser would keep the last."""
    if not isinstance(value, dict):
        return value
    if _may_repeat(names, text):
        present = [name for name, _ in _pairs(text)]
        for name in names:
            if present.count(name) > 1:
                return BrokenJSONError(f"{name!r} stands twice in one record: {shorten(text)}", text)
    if "\\u" in text and ("\\ud" in text or "\\uD" in text):
        _mark_halves(value, text)
    return value


def _may_repeat(names: Collection[str], text: str) -> bool:
    """Whether an object may have one of the names twice: without parsing it again, as nearly all have not."""
    if any(text.count(f'"{name}"') > 1 for name in names):
        return True
    if "\\" not in text:
        return False
    escape, spellings = _spellings(tuple(names))
    return escape.search(text) is not None and any(len(spelling.findall(text)) > 1 for spelling in spellings)


@functools.lru_cache(maxsize=4)
def _spellings(names: tuple[str, ...]) -> tuple[re.Pattern[str], list[re.Pattern[str]]]:
    """What finds an escape of any character of the names, and what finds all the ways to write each name."""

    def escapes(character: str) -> list[str]:  # without their backslash
        units = character.encode("utf-16-be", "surrogatepass").hex()
        code = r"\\".join(f"u(?i:{units[start : start + 4]})" for start in range(0, len(units), 4))
        return [code, *([re.escape(SHORT_ESCAPES[character])] if character in SHORT_ESCAPES else [])]

    # begins with its backslash alone, for which a search is fast
    any_escape = "|".join(escape for character in sorted({*"".join(names)}) for escape in escapes(character))
    spelled = ["".join(rf"(?:{re.escape(c)}|\\(?:{'|'.join(escapes(c))}))" for c in name) for name in names]
    return re.compile(rf"\\(?:{any_escape or '(?!)'})"), [re.compile(f'"{one}"') for one in spelled]


def _pairs(text: str) -> list[tuple[str, Any]]:
    """Names and values of an object, with those that stand there twice."""
    objects: list[list[tuple[str, Any]]] = []  # the outermost is complete last
    try:
        json.JSONDecoder(parse_int=_integer, strict=False, object_pairs_hook=objects.append).decode(text)
    except RecursionError:
        return _shallow_pairs(text, 0)[0]
    return objects[-1]


def _mark_halves(record: dict[str, Any], text: str) -> None:
    """Mark texts with half a character that is written as one, which else looks like a byte that is not UTF-8."""
    halves = [name for name, value in record.items() if isinstance(value, str) and BYTES.search(value)]
    if halves:
        escaped, _ = _decode(BYTES.sub("\ufffd", text), 0)  # the bytes are gone, what is left is written so
        record |= {name: EscapedHalf(record[name]) for name in halves if BYTES.search(escaped.get(name, ""))}


def _array_elements(file: BinaryIO, start: bytes, names: Collection[str]) -> Iterator[Any]:
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    text, line, column = decode(start), 1, 0  # of the beginning of `text`
    position = text.index("[") + 1
    ended, expected = False, {"value", "]"}
    while True:
        position = _skip_space(text, position)
        if position == len(text) and not ended:
            line, column = _advance(text, position, line, column)
            block = file.read(BLOCK)
            text, position, ended = decode(block, final=not block), 0, not block
            continue
        character = text[position : position + 1]
        if character == "]" and "]" in expected:
            rest = text[position + 1 :] + decode(file.read(BLOCK))
            if rest.strip():
                raise _broken(text, position + 1, line, column, "Extra data after the array")
            return
        if character == "," and "," in expected:
            position, expected = position + 1, {"value"}
            continue
        if "value" not in expected:
            raise _broken(text, position, line, column, "Expecting ',' delimiter")
        try:
            value, end = _decode(text, position)
        except json.JSONDecodeError as error:
            if ended:
                raise _broken(text, error.pos, line, column, error.msg) from error
            line, column = _advance(text, position, line, column)
            block = file.read(max(BLOCK, len(text)))  # doubles, for an element longer than a block
            text, position, ended = text[position:] + decode(block, final=not block), 0, not block
            continue
        yield _as_written(names, value, text[position:end])
        position, expected = end, {",", "]"}


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\n\r":
        position += 1
    return position


def _advance(text: str, end: int, line: int, column: int) -> tuple[int, int]:
    newlines = text.count("\n", 0, end)
    return line + newlines, end - (text.rfind("\n", 0, end) + 1) + (0 if newlines else column)


def _broken(text: str, position: int, line: int, column: int, message: str) -> BrokenJSONError:
    line, column = _advance(text, position, line, column)
    return BrokenJSONError(f"line {line} column {column + 1}: broken JSON ({message}); fix it there")
