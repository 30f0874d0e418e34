"""Which columns of a file are needed, and what is said where they are missing."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

FIELDS = ("instruction", "input", "output")
OPTIONAL = ("input", "family")
TEXTS = (*FIELDS, "messages")  # all that a record says
PAIR = ("prompt", "completion")  # stand for instruction and output in data made for other trainers
CHATS = ("messages", "conversations", "conversation")  # where other data have the turns of a conversation
KEYS = (("role", "content"), ("from", "value"))  # of a turn; the second are ShareGPT's


class Columns(NamedTuple):
    """What is read: the column of each field (`instruction`, `input`, `output`, `family`), and others by their names.

    `turns` are the columns whose messages, one after another, are a conversation: one, or a prompt's and a
    completion's. It is empty where records have the fields, and None until the first records have been seen.

    The others may hold anything; they come as one JSON text in the column `extra`.
    """

    fields: Mapping[str, str]
    extra: tuple[str, ...] = ()
    turns: tuple[str, ...] | None = None

    @property
    def shapes(self) -> list[tuple[str, ...]]:
        """The columns that a record of each shape has, in the order in which they are looked for."""
        if self.turns:
            return [self.turns]
        named = (self.fields["instruction"], self.fields["output"])
        pair = [PAIR] if named == ("instruction", "output") else []
        return [named, *pair, *((name,) for name in CHATS)] if self.turns is None else [named]

    @property
    def candidates(self) -> list[str]:
        """All columns that may be read."""
        return list(dict.fromkeys([*self.fields.values(), *(name for shape in self.shapes for name in shape)]))


class UnreadableFileError(Exception):
    """A file that cannot be read as records, in words that follow its name; each line is a problem of its own."""


def wanted_columns(names: list[str], columns: Columns, first: Any) -> list[str]:
    """The names of the columns to read; `first` gives the first values of each column.

    Raises:
        UnreadableFileError: one is missing or there twice.
    """
    refuse_repeated(names, columns)
    if not has_shape(names, columns):
        with_shape(columns, [{name: values[0] for name, values in first().items() if len(values)}])
    missing_columns(names, columns, {field for field, column in columns.fields.items() if column in names})
    complete = [name for shape in columns.shapes if set(shape) <= set(names) for name in shape]
    wanted = [name for name in columns.candidates if name in names and name in (*complete, *columns.fields.values())]
    return wanted + [name for name in columns.extra if name in names and name not in wanted]


def has_shape(names: Iterable[str], columns: Columns) -> bool:
    """Whether the columns are enough for records of another shape than instruction and output."""
    return any(set(shape) <= set(names) for shape in columns.shapes[0 if columns.turns else 1 :])


def with_shape(columns: Columns, rows: Iterable[Mapping[str, Any]]) -> Columns:
    """With the columns of the shape that the first complete row has.

    >>> with_shape(Columns({field: field for field in FIELDS}), [{"prompt": "Name a colour.", "completion": "Blue."}])
    Columns(fields={'instruction': 'prompt', 'input': 'input', 'output': 'completion'}, extra=(), turns=())

    Raises:
        UnreadableFileError: no shape is known, and another column holds turns.
    """
    rows = list(rows)
    if columns.turns is not None:
        return columns
    shapes = ((row, shape_of(row, columns)) for row in rows)
    row, found = next((pair for pair in shapes if pair[1]), ({}, None))
    names = {name for row in rows for name in row}
    if found is None:  # a bad record cannot tell: the names alone
        found = next((shape for shape in columns.shapes if set(shape) <= names), columns.shapes[0])
        others = [name for row in rows for name, value in row.items() if is_chat(value)]
        if others and not set(found) <= names:
            raise UnreadableFileError(
                f": its records are conversations, in the column {others[0]!r}; say so with --messages_column "
                f"{others[0]}"
            )
    chats = [is_chat(row.get(name)) for name in found]  # of a completion, its text will do
    if len(found) == 1 or all(chats) or (chats[0] and found == PAIR):
        return columns._replace(turns=found)
    fields = {**columns.fields, "instruction": found[0], "output": found[1]}
    return columns._replace(fields=fields, turns=())


def shape_of(row: Mapping[str, Any], columns: Columns) -> tuple[str, ...] | None:
    """The columns of the first shape of which a row has all; those of conversations hold turns."""
    for shape in columns.shapes:
        values = [row.get(name) for name in shape]
        if all(value is not None for value in values) and (len(shape) == 2 or columns.turns or is_chat(values[0])):
            return shape
    return None


def is_chat(value: Any) -> bool:
    """Whether a value is a list of turns, or JSON of one.

    >>> is_chat([{"role": "user", "content": "Hi."}]), is_chat('[{"from": "human", "value": "Hi."}]'), is_chat("[]")
    (True, True, False)
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, dict) and any(role in turn for role, _ in KEYS) for turn in value)


def missing_columns(names: list[str], columns: Columns, present: set[str]) -> None:
    """Refuse a file without a column that is needed; an `input` of that very name may be absent.

    Raises:
        UnreadableFileError: each missing column, with the one that is meant, probably.
    """
    if columns.turns and (absent := [name for name in columns.turns if name not in names]):
        raise UnreadableFileError(f": no column {absent[0]!r} among {', '.join(map(repr, names))}")
    if columns.turns or (columns.turns is None and has_shape(names, columns)):
        return
    unused = sorted(set(names) - set(columns.fields.values()))
    alike = misspelt(unused, columns)
    missing = []
    for field in FIELDS:
        column = columns.fields[field]
        near = [name for name, meant in alike.items() if meant == column]
        near = near or difflib.get_close_matches(column, unused, n=1, cutoff=0.7)
        if field in present or (field == column == "input" and not near):  # many data sets have no inputs
            continue
        hint = f"did you mean {near[0]!r}? " if near else ""
        missing.append(
            f": no column {column!r} among {', '.join(map(repr, names))}; {hint}"
            f"name the column of the {field} with --{field}_column {near[0] if near else 'NAME'}"
        )
    if missing:
        raise UnreadableFileError("\n".join(missing))


def misspelt(names: Iterable[str], columns: Columns) -> dict[str, str]:
    """The column that each name means that is like one but for its case and blanks.

    >>> misspelt(["Input", "id"], Columns({field: field for field in FIELDS}))
    {'Input': 'input'}
    """
    meant = {_plain(columns.fields[field]): columns.fields[field] for field in FIELDS}
    others = (name for name in names if name not in columns.fields.values())
    return {name: meant[plain] for name in others if (plain := _plain(name)) in meant}


def _plain(name: str) -> str:
    return "".join(name.split()).casefold()


def refuse_repeated(names: list[str], columns: Columns) -> None:
    """Refuse a file that has a column twice which is to be read.

    Raises:
        UnreadableFileError: the column.
    """
    for column in dict.fromkeys([*columns.candidates, *columns.extra]):
        if names.count(column) > 1:
            raise UnreadableFileError(f" has the column {column!r} twice; give each its own name")
