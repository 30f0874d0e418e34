"""Which columns of a file are needed, and what is said where they are missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

FIELDS = ("instruction", "input", "output")
OPTIONAL = ("input", "family")


class Columns(NamedTuple):
    """What is read: the column of each field (`instruction`, `input`, `output`, `family`), and others by their names.

    The others may hold anything; they come as one JSON text in the column `extra`.
    """

    fields: Mapping[str, str]
    extra: tuple[str, ...] = ()


class UnreadableFileError(Exception):
    """A file that cannot be read as records, in words that follow its name; each line is a problem of its own."""


def wanted_columns(names: list[str], columns: Columns, first: Any) -> list[str]:
    """The names of the columns to read; `first` gives the first values of each column.

    Raises:
        UnreadableFileError: one is missing or there twice, or the records are conversations.
    """
    refuse_repeated(names, columns)
    present = {field for field, column in columns.fields.items() if column in names}
    if not set(FIELDS) - set(OPTIONAL) <= present:
        refuse_conversations([{name: values[0] for name, values in first().items() if len(values)}], columns)
    missing_columns(names, columns, present)
    wanted = [column for field, column in columns.fields.items() if field in present]
    return wanted + [name for name in columns.extra if name in names and name not in wanted]


def missing_columns(names: list[str], columns: Columns, present: set[str]) -> None:
    """Refuse a file without a column that is needed; an `input` of that very name may be absent.

    Raises:
        UnreadableFileError: each missing column, with the one that is meant, probably.
    """
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
    for column in (*columns.fields.values(), *columns.extra):
        if names.count(column) > 1:
            raise UnreadableFileError(f" has the column {column!r} twice; give each its own name")


def refuse_conversations(rows: Iterable[Any], columns: Columns) -> None:
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
                raise UnreadableFileError(
                    f": its records are conversations (the turns are in {name!r}), and this recipe learns from records "
                    "of instruction, input and output: write one for each conversation, its first question as "
                    "instruction and the answer to it as output"
                )
