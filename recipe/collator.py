"""Batches for instruction tuning: pad, shift by one, mask the padding, keep the one end-of-text token to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy skips these targets


class DataCollatorForInstructionTuning:
    """Pads encoded records to the longest of the batch and shifts the targets by one.

    Padding is masked by length, never by id: GPT-2 pads with its end-of-text token, and the real one that ends a
    response is a target to learn. These are steps 3-5 of the collate function in chapter 7 of *Build a Large Language
    Model From Scratch* (https://github.com/rasbt/LLMs-from-scratch), vectorised.

    Works with any causal language model and the stock `transformers.Trainer`: `labels` and `shift_labels` are the same,
    already shifted tensor, which transformers does not shift again and whose targets it counts correctly.

    Args:
        pad_token_id: the id to pad `input_ids` with; for GPT-2 the end-of-text id, 50256.
        shift: `False` gives `labels` aligned with `input_ids` and no `shift_labels`, for loops that shift themselves.
        pad_to_multiple_of: round the width of the batch up to a multiple of this many tokens.

    Features: mappings with `input_ids` (T,) and `labels` (T,), aligned, not shifted, -100 where nothing is learned;
    without `labels`, all of `input_ids` is learned. A record of several examples, one after another, has their `ends`
    too: (examples,), rising to T. Other keys are dropped, except `row`, the number of a record.

    Returns a dict of int64 tensors, (batch, time) each, an example in a row: `input_ids`, `attention_mask`, `labels`,
    `shift_labels`. If the features have a `row`: also `row` (batch,); `lengths` (batch,), the tokens that predict one;
    `supervised` (targets,), the indices of the targets in the flattened labels, computed here to avoid a GPU sync; and
    `examples` (records,), how many each record has, if one has several.

    Raises:
        ValueError: no features, `labels` and `input_ids` of different lengths, or wrong `ends`.

    Example: two rows; 50256 ends each response and pads the shorter row.

    >>> collate = DataCollatorForInstructionTuning(pad_token_id=50256)
    >>> batch = collate([
    ...     {"input_ids": [21, 22, 23, 24, 50256], "labels": [-100, -100, 23, 24, 50256]},
    ...     {"input_ids": [21, 31, 50256], "labels": [-100, 31, 50256]},
    ... ])
    >>> batch["input_ids"]
    tensor([[   21,    22,    23,    24],
            [   21,    31, 50256, 50256]])
    >>> batch["labels"]
    tensor([[ -100,    23,    24, 50256],
            [   31, 50256,  -100,  -100]])
    >>> batch["attention_mask"]
    tensor([[1, 1, 1, 1],
            [1, 1, 1, 0]])
    """

    def __init__(self, pad_token_id: int, shift: bool = True, pad_to_multiple_of: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.shift = shift
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        examples = _examples(features)
        lengths = np.array([len(row) for row in examples.tokens])
        width = lengths.max()
        if self.pad_to_multiple_of:
            width += (self.shift - width) % self.pad_to_multiple_of  # the shift takes one column
        real = np.arange(width) < lengths[:, None]  # (batch, time)

        padded_tokens = np.full(real.shape, self.pad_token_id, dtype=np.int64)
        padded_tokens[real] = np.concatenate(examples.tokens)
        padded_labels = np.full(real.shape, IGNORE_INDEX, dtype=np.int64)
        padded_labels[real] = np.concatenate(examples.labels)

        if self.shift:  # position t predicts token t + 1
            padded_tokens, real, padded_labels = padded_tokens[:, :-1], real[:, :-1], padded_labels[:, 1:]
        arrays = {"input_ids": padded_tokens, "attention_mask": real.astype(np.int64), "labels": padded_labels}
        batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        if self.shift:
            batch["shift_labels"] = batch["labels"]
        if "row" in features[0]:
            batch |= examples.described(features)
            if self.shift:
                batch["supervised"] = (batch["labels"].flatten() != IGNORE_INDEX).nonzero().flatten()
        return batch


class DataCollatorWithSharedPrefix:
    """Lays a batch out as one row in which every start that examples have in common stands once: no padding.

    Examples form a tree: a preamble, under it the requests that begin alike, under these what each has alone. The row
    holds it depth first. A token attends to what its own example has up to there, and to nothing else; its position is
    the one it has in its example. So losses and gradients are those of the padded batch.

    Inputs alone decide what is shared. Targets belong to the examples: a position stands in `logits_to_keep` once for
    each example that learns something there.

    Works with the stock `transformers.Trainer` and any causal language model of transformers whose `forward` takes
    `logits_to_keep`, by which the vocabulary head is computed at supervised positions only. Features are those of
    `DataCollatorForInstructionTuning`.

    Args:
        pad_token_id: fills the padding, if `pad_to_multiple_of` asks for any.
        attention: "mask" gives a boolean mask, for any model with SDPA attention; "segments" gives lengths instead,
            which is faster, for models loaded with `attn_implementation="shared_prefix"` (import `recipe.attention`).
        pad_to_multiple_of: round the length of the row and the number of targets up to multiples of this, so that
            shapes repeat for `torch.compile`. Padding tokens are an example of their own; padding targets are -100 and
            point at position 0 of example 0.

    Returns a dict: `input_ids`, `position_ids` (1, time); `labels` and `shift_labels`, the same tensor of targets
    (1, targets), example by example, -100 only as padding; `logits_to_keep` (targets,), the position of each; and
    `attention_mask` (1, 1, time, time) bool, or `segments`: for each example that adds tokens to the row `(shared,
    length)`, how many it shares with the one before it in the row and how many it adds.
    If the features have a `row`: also `row` (examples,), `example` (targets,), the index of each target's example,
    `lengths` (examples,) in tokens; and `examples` (records,), how many each record has, if one has several.

    Raises:
        ValueError: no features, `labels` and `input_ids` of different lengths, wrong `ends`, or no target in the batch.

    Example: two rows that share their first two tokens.

    >>> collate = DataCollatorWithSharedPrefix(pad_token_id=50256, attention="segments")
    >>> batch = collate([
    ...     {"input_ids": [21, 22, 23, 24, 50256], "labels": [-100, -100, -100, 24, 50256]},
    ...     {"input_ids": [21, 22, 31, 50256], "labels": [-100, -100, -100, 50256]},
    ... ])
    >>> batch["input_ids"], batch["position_ids"]
    (tensor([[21, 22, 23, 24, 31]]), tensor([[0, 1, 2, 3, 2]]))
    >>> batch["labels"], batch["logits_to_keep"], batch["segments"]
    (tensor([[   24, 50256, 50256]]), tensor([2, 3, 4]), ((0, 4), (2, 1)))
    """

    def __init__(
        self, pad_token_id: int, attention: Literal["mask", "segments"] = "mask", pad_to_multiple_of: int | None = None
    ) -> None:
        if attention not in ("mask", "segments"):
            raise ValueError(f"attention={attention!r}: give 'mask' or 'segments'")
        self.pad_token_id = pad_token_id
        self.attention = attention
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        examples = _examples(features)
        inputs = [np.asarray(tokens[:-1], dtype=np.int64) for tokens in examples.tokens]
        targets = [np.asarray(labels[1:], dtype=np.int64) for labels in examples.labels]

        runs: list[tuple[int, int]] = []
        added, kept, time = [], targets.copy(), 0
        places = np.empty(0, dtype=np.int64)  # of an example's tokens in the row
        for example, shared in depth_first(inputs):
            length = len(inputs[example]) - shared
            places = np.concatenate([places[:shared], np.arange(time, time + length)])
            kept[example] = places[targets[example] != IGNORE_INDEX]
            if length:
                runs.append((shared, length))
                added.append(inputs[example][shared:])
                time += length
        keep = np.concatenate(kept)
        if len(keep) == 0:
            raise ValueError("no target in the whole batch: all labels are -100, so there is nothing to learn")
        multiple = self.pad_to_multiple_of or 1
        if padding := -time % multiple:
            runs.append((0, padding))
            added.append(np.full(padding, self.pad_token_id))
        filling = (0, -len(keep) % multiple)
        learned = np.concatenate(targets)
        learned = np.pad(learned[learned != IGNORE_INDEX], filling, constant_values=IGNORE_INDEX)

        labels = torch.from_numpy(learned)[None]
        positions = [np.arange(shared, shared + length) for shared, length in runs]
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(np.concatenate(added))[None],
            "position_ids": torch.from_numpy(np.concatenate(positions))[None],
            "labels": labels,
            "shift_labels": labels,
            "logits_to_keep": torch.from_numpy(np.pad(keep, filling)),
        }
        if self.attention == "mask":
            batch["attention_mask"] = torch.from_numpy(_mask(runs))[None, None]
        else:
            batch["segments"] = tuple(runs)
        if "row" in features[0]:
            owners = np.repeat(np.arange(len(kept)), [len(each) for each in kept])
            batch |= examples.described(features) | {"example": torch.from_numpy(np.pad(owners, filling))}
        return batch


class _Examples(NamedTuple):
    """The examples of a batch, those of a record one after another."""

    tokens: list[Any]
    labels: list[Any]  # aligned with the tokens
    counts: list[int]  # examples of each record

    def described(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """What the trainer counts by: `row` and `lengths` of each example; `examples`, if a record has several."""
        rows, counts = torch.tensor([feature["row"] for feature in features]), torch.tensor(self.counts)
        described = {
            "row": rows.repeat_interleave(counts),
            "lengths": torch.tensor([len(tokens) - 1 for tokens in self.tokens]),
        }
        return described if len(self.tokens) == len(rows) else described | {"examples": counts}


def _examples(features: Sequence[Mapping[str, Any]]) -> _Examples:
    """The records of a batch, cut at their `ends`."""
    if len(features) == 0:
        raise ValueError("a batch needs at least one feature")
    tokens, labels, counts = [], [], []
    for index, feature in enumerate(features):
        row, targets = feature["input_ids"], feature.get("labels", feature["input_ids"])
        if len(row) != len(targets):
            raise ValueError(f"feature {index}: {len(row)} input_ids but {len(targets)} labels; they must be aligned")
        ends = [len(row)] if feature.get("ends") is None else [int(end) for end in feature["ends"]]
        starts = [0, *ends[:-1]]
        if ends[-1:] != [len(row)] or (len(ends) > 1 and min(np.diff([0, *ends])) < 1):
            raise ValueError(f"feature {index}: its ends {ends} must rise to the number of its input_ids, {len(row)}")
        tokens += [row[start:end] for start, end in zip(starts, ends, strict=True)]
        labels += [targets[start:end] for start, end in zip(starts, ends, strict=True)]
        counts.append(len(ends))
    return _Examples(tokens, labels, counts)


@dataclass
class _Branch:
    """Examples that have their first `depth` tokens in common: those that end there, and those that go on."""

    depth: int
    longest: int  # the length of its longest example
    ending: list[int] = field(default_factory=list)
    children: list[_Branch] = field(default_factory=list)


def depth_first(rows: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """The examples in the order of their tree; each shares all that it has in common with earlier ones with the last.

    Sorted by their bytes, rows that begin alike are neighbours, and how much neighbours share gives the tree. Longer
    children come first, so that a conversation stands in one piece, and what branches off from it comes later.

    Args:
        rows: the inputs of each example, all of one type.

    Returns:
        For each example its index, and how many tokens it shares with the one before.

    >>> depth_first([np.array(row) for row in ([1, 2], [7], [1, 2, 3, 4], [1, 2, 5], [1, 2])])
    [(2, 0), (3, 2), (0, 2), (4, 2), (1, 0)]
    """
    path = [_Branch(0, 0)]  # from the root to the example before
    root, before = path[0], np.empty(0)
    for example in sorted(range(len(rows)), key=lambda index: rows[index].tobytes()):
        row = rows[example]
        shared = common_length(before, row)
        _end(path, shared)
        if path[-1].depth < shared:  # what has just ended branches off between two depths
            last = path[-1].children.pop()
            path[-1].children.append(_Branch(shared, last.longest, children=[last]))
            path.append(path[-1].children[-1])
        if path[-1].depth < len(row):
            path[-1].children.append(_Branch(len(row), len(row)))
            path.append(path[-1].children[-1])
        path[-1].ending.append(example)
        before = row
    _end(path, 0)

    order: list[tuple[int, int]] = []
    visits: list[tuple[_Branch | int, int]] = [(root, 0)]
    while visits:
        item, shared = visits.pop()
        if isinstance(item, int):
            order.append((item, shared))
            continue
        items: list[_Branch | int] = [*sorted(item.children, key=lambda child: -child.longest), *item.ending]
        visits += [(each, item.depth if place else shared) for place, each in enumerate(items)][::-1]
    return order


def _end(path: list[_Branch], depth: int) -> None:
    """Leave the branches that go deeper than `depth`."""
    while path[-1].depth > depth:
        ended = path.pop()
        path[-1].longest = max(path[-1].longest, ended.longest)


def common_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two rows begin with in common."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


def _mask(runs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens each token attends to, (time, time) bool: earlier ones that its example has too."""
    time = np.arange(sum(length for _, length in runs))
    unseen = np.full(len(time), len(time))  # from which token on each is not seen
    places, start = time[:0], 0
    for shared, length in runs:
        unseen[places[shared:]] = start
        places = np.concatenate([places[:shared], np.arange(start, start + length)])
        start += length
    return (time <= time[:, None]) & (time[:, None] < unseen)
