"""The examples of records: which turns of a conversation are learned, and how those of one record make a row."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from recipe.collator import IGNORE_INDEX, common_length, depth_first
from recipe.templates import Template, conversation_of


def examples_of(
    batch: Mapping[str, list], template: Template, learn: str
) -> tuple[list[list[dict[str, str]]], list[str], np.ndarray]:
    """The messages before each turn to be learned, its text, and the index of its record."""
    chats, texts, owners = [], [], []
    names = [name for name in ("instruction", "input", "output", "messages") if name in batch]
    for index, fields in enumerate(zip(*(batch[name] for name in names), strict=True)):
        record = dict(zip(names, fields, strict=True))
        turns = conversation_of(record)
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        learned = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("weight") != 0]
        learned = learned[-1:] if learn == "last" else learned
        chats += [messages[:i] for i in learned] or [template.messages(record)]
        texts += [messages[i]["content"] for i in learned] or [record["output"]]
        owners += [index] * max(1, len(learned))
    return chats, texts, np.array(owners)


class Examples(NamedTuple):
    """Examples one after another: the record, the length, and the tokens and labels of each."""

    owners: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray


def as_rows(examples: Examples) -> tuple[np.ndarray, dict[str, Any]]:
    """The examples of each record in one row, and which records have one."""
    rows, first, turns = np.unique(examples.owners, return_index=True, return_counts=True)
    lengths, tokens, labels = examples.lengths, examples.tokens, examples.labels
    ends = None
    if len(rows) < len(examples.owners):
        starts = np.cumsum(lengths) - lengths
        joined = [
            _join([(tokens[s : s + n], labels[s : s + n]) for s, n in zip(starts[f:t], lengths[f:t], strict=True)])
            for f, t in zip(first, first + turns, strict=True)
        ]
        tokens, labels = (np.concatenate([row[part] for row in joined]) for part in (0, 1))
        lengths = np.array([len(row[0]) for row in joined])
        inputs = [_inputs(row[0], row[2]) for row in joined]
        ends = pa.array([row[2] if len(row[2]) > 1 else None for row in joined], pa.list_(pa.int32()))
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    return rows, {
        "input_ids": pa.ListArray.from_arrays(offsets, tokens),
        "labels": pa.ListArray.from_arrays(offsets, labels),
        "length": np.diff(offsets),
        "ends": pa.nulls(len(rows), pa.list_(pa.int32())) if ends is None else ends,
        "inputs": (lengths - 1 if ends is None else np.array(inputs)).astype(np.int32),
        "turns": turns.astype(np.int32),
    }


def _join(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Tokens and labels of a record's examples one after another, and where each ends.

    An example that begins with all of the one before it takes its place, and learns what that one would have. Where
    prompts are learned, what two examples begin with is learned once.
    """
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for tokens, labels in examples:
        labels = labels.copy()
        if rows:
            before, learned = rows[-1]
            shared = common_length(before, tokens)
            labels[:shared] = IGNORE_INDEX
            if shared == len(before):
                labels[:shared] = learned
                rows.pop()
        rows.append((tokens, labels))
    ends = np.cumsum([len(tokens) for tokens, _ in rows]).tolist()
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows]), ends


def _inputs(tokens: np.ndarray, ends: Sequence[int]) -> int:
    """The inputs of a row's examples, those that they begin with in common counted once."""
    examples = [tokens[start : end - 1] for start, end in itertools.pairwise([0, *ends])]
    return sum(len(examples[index]) - shared for index, shared in depth_first(examples))


def example_bounds(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Where each example of encoded rows starts and ends in their flattened tokens."""
    lengths = table["length"].to_numpy()
    starts = lengths.cumsum() - lengths
    if "ends" not in table.column_names or table["ends"].null_count == len(table):
        return starts, starts + lengths
    inner = zip(starts.tolist(), lengths.tolist(), table["ends"].to_pylist(), strict=True)
    ends = np.concatenate([start + np.array(ends or [length]) for start, length, ends in inner])
    return np.concatenate([[0], ends[:-1]]), ends
