"""The values of a JSON file one by one, in bounded memory: the elements of an array, or one value a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, BinaryIO

from recipe.console import shorten

BLOCK = 2**20  # bytes read at a time
BOM = b"\xef\xbb\xbf"
LONGEST_INT = 4000  # digits; Python refuses to convert more than 4,300


class BrokenJSONError(ValueError):
    """Text that is not JSON, with its place and the reason."""


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= LONGEST_INT else Decimal(digits)


DECODER = json.JSONDecoder(parse_int=_integer, strict=False)


def json_values(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The values of a file, each with its line in words. A broken line gives a `BrokenJSONError`, and the next is read.

    A byte that is not UTF-8 becomes a surrogate (`surrogateescape`), because it may stand where nobody looks.

    Raises:
        BrokenJSONError: an array that is broken, or a file that is no JSON at all.
    """
    start = file.read(BLOCK).removeprefix(BOM)
    while start and not start.strip():
        start = file.read(BLOCK)
    if start[:4] in (b"PAR1", b"\x1f\x8b\x08\x00") or start[:2] in (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b"):
        raise BrokenJSONError("is not UTF-8 text (at byte 0); save it as UTF-8")
    if not start.strip():
        return
    if start.lstrip()[:1] == b"[":
        yield from (("", value) for value in _array_elements(file, start))
    else:
        yield from _lines(file, start)


def _lines(file: BinaryIO, start: bytes) -> Iterator[tuple[str, Any]]:
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
                yield f"(line {number})", _parse_line(line)
        block = file.read(BLOCK)
    if rest.strip():
        yield f"(line {number + 1})", _parse_line(rest)


def _parse_line(line: bytes) -> Any:
    text = line.decode("utf-8", "surrogateescape").strip("\r ")
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        return BrokenJSONError(f"broken JSON at column {error.colno} ({error.msg}): {shorten(text)}")
    except RecursionError:
        return BrokenJSONError(f"values nested too deeply to be read: {shorten(text)}")


def _array_elements(file: BinaryIO, start: bytes) -> Iterator[Any]:
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
            value, end = DECODER.raw_decode(text, position)
        except RecursionError as error:
            raise _broken(text, position, line, column, "values nested too deeply to be read") from error
        except json.JSONDecodeError as error:
            if ended:
                raise _broken(text, error.pos, line, column, error.msg) from error
            line, column = _advance(text, position, line, column)
            block = file.read(max(BLOCK, len(text)))  # doubles, for an element longer than a block
            text, position, ended = text[position:] + decode(block, final=not block), 0, not block
            continue
        yield value
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
