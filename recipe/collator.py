"""Batches for instruction tuning: pad, shift by one, mask the padding, keep the one end-of-text token to learn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
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
    without `labels`, all of `input_ids` is learned. Other keys are dropped, except `row`, the number of a record.

    Returns a dict of int64 tensors, (batch, time) each: `input_ids`, `attention_mask`, `labels`, `shift_labels`. If the
    features have a `row`: also `row` (batch,); `lengths` (batch,), the tokens that predict one; and `supervised`
    (targets,), the indices of the targets in the flattened labels, computed here to avoid a GPU sync.

    Raises:
        ValueError: no features, or `labels` and `input_ids` of different lengths.

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
        tokens, labels = _tokens_and_labels(features)
        lengths = np.array([len(row) for row in tokens])
        width = lengths.max()
        if self.pad_to_multiple_of:
            width += (self.shift - width) % self.pad_to_multiple_of  # the shift takes one column
        real = np.arange(width) < lengths[:, None]  # (batch, time)

        padded_tokens = np.full(real.shape, self.pad_token_id, dtype=np.int64)
        padded_tokens[real] = np.concatenate(tokens)
        padded_labels = np.full(real.shape, IGNORE_INDEX, dtype=np.int64)
        padded_labels[real] = np.concatenate(labels)

        if self.shift:  # position t predicts token t + 1
            padded_tokens, real, padded_labels = padded_tokens[:, :-1], real[:, :-1], padded_labels[:, 1:]
        arrays = {"input_ids": padded_tokens, "attention_mask": real.astype(np.int64), "labels": padded_labels}
        batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        if self.shift:
            batch["shift_labels"] = batch["labels"]
        if "row" in features[0]:
            batch["row"] = torch.tensor([feature["row"] for feature in features])
            batch["lengths"] = torch.from_numpy(lengths - 1)
            if self.shift:
                batch["supervised"] = (batch["labels"].flatten() != IGNORE_INDEX).nonzero().flatten()
        return batch


class Group(NamedTuple):
    """Examples of a batch that share a prefix: their indices, and the length of the prefix in tokens."""

    examples: list[int]
    prefix: int


class DataCollatorWithSharedPrefix:
    """Lays a batch out as one row that holds a prefix shared by examples once: no padding, no repetition.

    `[prefix | rest of example 1 | rest of example 2 | ...]`, or several such groups one after another where a batch
    mixes prompts. A token attends to its group's prefix and to its own example, causally, and to nothing else; its
    position is the one it has in its example. So losses and gradients are those of the padded batch.

    A group's prefix is the longest common start in which all inputs and all targets are equal; groups are chosen to
    make the row short. A supervised target inside a prefix counts once for each example of the group.

    Works with the stock `transformers.Trainer` and any causal language model of transformers whose `forward` takes
    `logits_to_keep`, by which the vocabulary head is computed at supervised positions only. Features are those of
    `DataCollatorForInstructionTuning`.

    Args:
        pad_token_id: fills the padding, if `pad_to_multiple_of` asks for any.
        attention: "mask" gives a boolean mask, for any model with SDPA attention; "segments" gives lengths instead,
            which is faster, for models loaded with `attn_implementation="shared_prefix"` (import `recipe.attention`).
        pad_to_multiple_of: round the length of the row and the number of targets up to multiples of this, so that
            shapes repeat for `torch.compile`. Padding tokens form a group of their own; padding targets are -100 and
            point at position 0 of example 0.

    Returns a dict: `input_ids`, `position_ids` (1, time); `labels` and `shift_labels`, the same tensor of targets
    (1, targets), -100 only as padding; `logits_to_keep` (targets,), the position of each; and `attention_mask`
    (1, 1, time, time) bool, or `segments`: for each group `(prefix length, (suffix lengths))`.
    If the features have a `row`: also `row` (examples,), `example` (targets,), the index of each target's example, and
    `lengths` (examples,) in tokens.

    Raises:
        ValueError: no features, `labels` and `input_ids` of different lengths, or no target in the batch.

    Example: two rows that share their first two tokens.

    >>> collate = DataCollatorWithSharedPrefix(pad_token_id=50256, attention="segments")
    >>> batch = collate([
    ...     {"input_ids": [21, 22, 23, 24, 50256], "labels": [-100, -100, -100, 24, 50256]},
    ...     {"input_ids": [21, 22, 31, 50256], "labels": [-100, -100, -100, 50256]},
    ... ])
    >>> batch["input_ids"], batch["position_ids"]
    (tensor([[21, 22, 23, 24, 31]]), tensor([[0, 1, 2, 3, 2]]))
    >>> batch["labels"], batch["logits_to_keep"], batch["segments"]
    (tensor([[   24, 50256, 50256]]), tensor([2, 3, 4]), ((2, (2, 1)),))
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
        rows = zip(*_tokens_and_labels(features), strict=True)
        pairs = [np.array([tokens[:-1], labels[1:]], dtype=np.int32).T for tokens, labels in rows]  # (length, 2) each
        groups = shared_prefixes(pairs)

        # the segments of the row: each group's prefix, then its examples' suffixes. A segment has pairs (length, 2),
        # the position of its first token, and the examples whose targets it holds.
        segments: list[tuple[np.ndarray, int, list[int]]] = []
        for examples, prefix in groups:
            segments.append((pairs[examples[0]][:prefix], 0, examples))
            segments += [(pairs[example][prefix:], prefix, [example]) for example in examples]
        multiple = self.pad_to_multiple_of or 1
        padding = -sum(len(segment) for segment, _, _ in segments) % multiple
        if padding:
            groups.append(Group([], padding))
            segments.append((np.array([[self.pad_token_id, IGNORE_INDEX]] * padding, dtype=np.int32), 0, []))
        lengths = np.array([len(segment) for segment, _, _ in segments])
        tokens, targets = np.concatenate([segment for segment, _, _ in segments]).T
        offsets = np.cumsum(lengths) - lengths
        starts = np.array([start for _, start, _ in segments])
        positions = np.arange(len(tokens)) + np.repeat(starts - offsets, lengths)

        kept, example_of_kept = [], []
        for offset, (segment, _, owner) in zip(offsets, segments, strict=True):
            supervised = offset + np.flatnonzero(segment[:, 1] != IGNORE_INDEX)
            kept += [supervised] * len(owner)
            example_of_kept += [np.full(len(supervised), index) for index in owner]
        keep = np.concatenate(kept)
        if len(keep) == 0:
            raise ValueError("no target in the whole batch: all labels are -100, so there is nothing to learn")
        filling = (0, -len(keep) % multiple)

        kept_targets = np.pad(targets[keep].astype(np.int64), filling, constant_values=IGNORE_INDEX)
        labels = torch.from_numpy(kept_targets)[None]
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(tokens.astype(np.int64))[None],
            "position_ids": torch.from_numpy(positions)[None],
            "labels": labels,
            "shift_labels": labels,
            "logits_to_keep": torch.from_numpy(np.pad(keep, filling)),
        }
        if self.attention == "mask":
            batch["attention_mask"] = torch.from_numpy(_mask(groups, lengths))[None, None]
        else:
            length = iter(lengths.tolist()).__next__
            batch["segments"] = tuple((length(), tuple(length() for _ in group.examples)) for group in groups)
        if "row" in features[0]:
            batch["row"] = torch.tensor([feature["row"] for feature in features])
            batch["example"] = torch.from_numpy(np.pad(np.concatenate(example_of_kept), filling))
            batch["lengths"] = torch.tensor([len(pair) for pair in pairs])
        return batch


def _tokens_and_labels(features: Sequence[Mapping[str, Any]]) -> tuple[list, list]:
    """`input_ids` and `labels` of each feature, aligned."""
    if len(features) == 0:
        raise ValueError("a batch needs at least one feature")
    tokens = [feature["input_ids"] for feature in features]
    labels = [feature.get("labels", feature["input_ids"]) for feature in features]
    for index, (row, targets) in enumerate(zip(tokens, labels, strict=True)):
        if len(row) != len(targets):
            raise ValueError(f"feature {index}: {len(row)} input_ids but {len(targets)} labels; they must be aligned")
    return tokens, labels


def shared_prefixes(pairs: Sequence[np.ndarray]) -> list[Group]:
    """Groups of examples, each with its shared prefix, that make the row short.

    In lexicographic order, examples with a long common prefix are neighbours, and a group is a run of neighbours. The
    cut into runs that saves most tokens is found by dynamic programming over the end of the last run.

    Args:
        pairs: the inputs and targets of each example, (length, 2).

    >>> rows = [[1, 2, 3], [7], [1, 2]]
    >>> [tuple(group) for group in shared_prefixes([np.array([row, row]).T for row in rows])]
    [([2, 0], 2), ([1], 0)]
    """
    order = sorted(range(len(pairs)), key=lambda index: pairs[index].tobytes())
    common = [_common_prefix(pairs[index], pairs[following]) for index, following in itertools.pairwise(order)]
    saved, cuts = [0], [0]  # for the first n examples: most tokens saved, and the start of the last group
    for end in range(1, len(order) + 1):
        best, cut, shortest = saved[end - 1], end - 1, len(pairs[order[end - 1]])  # the last example alone
        for start in range(end - 2, -1, -1):
            shortest = min(shortest, common[start])
            if shortest == 0:
                break
            gain = saved[start] + (end - start - 1) * shortest
            if gain > best:
                best, cut = gain, start
        saved.append(best)
        cuts.append(cut)
    groups, end = [], len(order)
    while end:
        start = cuts[end]
        groups.append(Group(order[start:end], min(common[start : end - 1], default=0)))
        end = start
    return groups[::-1]


def _common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    length = min(len(first), len(second))
    different = (first[:length] != second[:length]).any(axis=1)
    return int(different.argmax()) if different.any() else length


def _mask(groups: Sequence[Group], lengths: np.ndarray) -> np.ndarray:
    """Which tokens each token attends to, (time, time) bool."""
    segment = np.repeat(np.arange(len(lengths)), lengths)  # (time,)
    prefixes, first = [], 0  # for each segment, the segment of its group's prefix
    for group in groups:
        prefixes += [first] * (1 + len(group.examples))
        first = len(prefixes)
    prefix = np.array(prefixes)[segment]
    time = np.arange(len(segment))
    visible = (segment == segment[:, None]) | (segment == prefix[:, None])
    return visible & (time <= time[:, None])
