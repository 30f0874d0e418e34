"""The shape that the content of a file must have: checked once, where it is read, so that what uses it need not ask.

A shape is written as what it describes::

    {"n": COUNT, "ci95": (None, [float, float]), "reason?": str, "scores": {str: float}, "rows": [{"id": str}]}

`float` is a number that is finite, `int` a whole one, a `range` bounds it, `None` is null, `object` anything. A tuple
lists alternatives, a set the values that are allowed. `[shape]` is a list of any length, `[shape, shape]` one of two.
An object has the names that are given, those with `?` if it likes, and any others; with `str` for a name, all of them
have one shape.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from recipe.config import UserError

LARGEST = 2**53  # above, a whole number is not one of JSON
COUNT = range(LARGEST)
WORDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false", None: "null"}


def check_shape(value: Any, shape: Any, where: str, way_out: str) -> None:
    """Refuse what has another shape.

    Raises:
        UserError: with the place, what stands there, what should, and the way out.
    """
    for place, found, wanted in misfits(value, shape):
        at = f"{place} is {shown(found)}" if place else f"it is {shown(found)}"
        at = f"{place} is missing" if found is ... else at
        raise UserError(f"{where}: {at}{'' if found is ... else f', not {wanted}'}; {way_out}")


def fits(value: Any, shape: Any) -> bool:
    """Whether a value has a shape.

    >>> fits({"n": 2, "more": 1}, {"n": int, "p?": float}), fits({"n": True}, {"n": int}), fits([0.5, None], [float])
    (True, False, False)
    """
    return next(misfits(value, shape), None) is None


def misfits(value: Any, shape: Any, place: str = "") -> Iterator[tuple[str, Any, str]]:
    """Where a value has another shape: the place, what stands there (`...` if nothing), and what should, in words."""
    if isinstance(shape, tuple):
        if not any(fits(value, one) for one in shape):
            alike = [one for one in shape if isinstance(value, dict | list) and type(one) is type(value)]
            yield from misfits(value, alike[0], place) if alike else [(place, value, in_words(shape))]
    elif isinstance(shape, dict) and isinstance(value, dict):
        for name, one in shape.items():
            if name is str:
                for key, inner in value.items():
                    yield from misfits(inner, one, f"{place}.{key}".lstrip("."))
                continue
            bare = name.rstrip("?")
            if bare in value or bare == name:
                yield from misfits(value.get(bare, ...), one, f"{place}.{bare}".lstrip("."))
    elif isinstance(shape, list) and isinstance(value, list) and len(shape) in (1, len(value)):
        for index, inner in enumerate(value):
            yield from misfits(inner, shape[index if len(shape) > 1 else 0], f"{place}[{index}]")
    elif not _is(value, shape):
        yield place, value, in_words(shape)


def _is(value: Any, shape: Any) -> bool:
    if shape is object:
        return value is not ...
    if shape is float:  # no NaN, and no whole number beyond those of floats
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if shape is int:
        return type(value) is int and abs(value) <= LARGEST
    if isinstance(shape, range):
        return type(value) is int and value in shape
    if isinstance(shape, set | frozenset):
        return isinstance(value, str | int | None) and value in shape
    return value is None if shape is None else isinstance(shape, type) and type(value) is shape


def in_words(shape: Any) -> str:
    """What should stand there.

    >>> in_words((None, float)), in_words([float, float]), in_words({"higher", "lower"}), in_words(COUNT)
    ('a number or null', 'a list of 2', "'higher' or 'lower'", 'a whole number from 0 up')
    """
    if isinstance(shape, tuple):
        return " or ".join(in_words(one) for one in sorted(shape, key=lambda one: one is None))
    if isinstance(shape, set | frozenset):
        return " or ".join(map(repr, sorted(shape, key=str)))
    if isinstance(shape, range):
        return f"a whole number from {shape.start} up"
    if isinstance(shape, list):
        return f"a list of {len(shape)}" if len(shape) > 1 else "a list"
    return "an object" if isinstance(shape, dict) else WORDS.get(shape, "a value")


def shown(value: Any) -> str:
    """A value as a message names it."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)[:60]
