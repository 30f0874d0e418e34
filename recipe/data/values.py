"""What a value of a record may be, whatever format it comes from, and what is said of one that may not.

Rows in messages count from 0, as `dataset[i]` does.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import pyarrow as pa

from recipe.console import shorten
from recipe.data.columns import OPTIONAL

TEXT_TYPES = ("string", "large_string", "string_view", "null")
# of Arrow, where Python has no such value: a date after the year 9999, a time zone that nobody knows, bad UTF-8
NO_PYTHON_VALUE = (OverflowError, KeyError, ValueError, NotImplementedError)


class Problem(NamedTuple):
    """Why a record is bad: in few words, to be counted, and in full."""

    reason: str
    text: str
    values: dict[str, Any] | None = None  # what the row holds instead of a record


Row = dict[str, Any] | Problem  # the values of a record by column, or why there are none


class EscapedHalf(str):
    r"""A text with half a character that was written as one (`\udc80`): in others, it is a byte that is not UTF-8."""

    __slots__ = ()


@dataclass(frozen=True)
class Unheld:
    """A value that Python cannot hold: its Arrow type, and the value in words."""

    kind: str
    shown: str

    def __str__(self) -> str:
        return self.shown


def as_json(values: dict[str, Any]) -> str:
    """JSON that every reader takes: NaN, which JSON does not have, as text; other values stay what they are."""
    try:
        return json.dumps(values, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(values), default=str)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value


def arrow_texts(array: pa.Array) -> pa.Array | None:
    """An array as texts; None if it holds something else, or bytes that are not UTF-8."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if str(array.type) not in TEXT_TYPES:
        return None
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return array.cast(pa.string())


def python_values(array: pa.Array) -> list[Any]:
    """The values of an Arrow array; bytes that are not UTF-8 as surrogates, and `Unheld` where Python has no value."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        if str(array.type) in TEXT_TYPES:
            texts = array.cast(pa.binary()).to_pylist()
            return [text and text.decode("utf-8", "surrogateescape") for text in texts]
        return [_python_value(scalar) for scalar in array]
    except NO_PYTHON_VALUE:
        return [_python_value(scalar) for scalar in array]


def _python_value(scalar: pa.Scalar) -> Any:
    kind = str(scalar.type)
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Unheld(kind, "not UTF-8 text")
    except NO_PYTHON_VALUE:
        pass
    try:
        return Unheld(kind, scalar.cast(pa.string()).as_py())
    except NO_PYTHON_VALUE:
        return Unheld(kind, f"a value of type {kind}")


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
    kind, shown = kind_and_words(value)
    return Problem(
        f"{field!r} is not text ({kind})",
        f"{field!r} is {shorten(shown)} ({kind}), not text; write it as text or remove the row",
    )


def kind_and_words(value: Any) -> tuple[str, str]:
    if isinstance(value, Unheld):
        return value.kind, value.shown
    if isinstance(value, Decimal):  # an integer of thousands of digits, or a decimal number of Parquet
        return "int" if value.as_tuple().exponent == 0 else "Decimal", str(value)
    return type(value).__name__, str(value) if type(value) is int else json.dumps(value, default=str)


def half_character(text: str) -> tuple[str, str] | None:
    """What is wrong with a text that UTF-8 cannot hold, and what to do; None if nothing is."""
    try:
        if not text.isascii():
            text.encode()
        return None
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
    if 0xDC80 <= code <= 0xDCFF and not isinstance(text, EscapedHalf):  # how Python decodes a byte that is not UTF-8
        try:  # three bytes may be half a character, too
            halves = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogatepass")
        except UnicodeError:
            return "is not UTF-8 text", "; save the file as UTF-8"
        code = next(ord(character) for character in halves if "\ud800" <= character <= "\udfff")
    return "holds half a character", f" (\\u{code:04x} without its other half); write it again or remove the row"
