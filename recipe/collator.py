"""Batches for instruction tuning: pad, shift by one, mask padding, keep the one end-of-text token to learn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy leaves these targets out


class DataCollatorForInstructionTuning:
    """Pads encoded records to the longest of the batch and shifts the targets by one.

    Padding is known by length, never by id: GPT-2 pads with its end-of-text token, and the real one that ends a
    response is a target to learn. These are steps 3-5 of the collate function in chapter 7 of *Build a Large Language
    Model From Scratch* (https://github.com/rasbt/LLMs-from-scratch), vectorised, and right for texts that hold an
    end-of-text token of their own.

    Works with any causal language model and with the stock `transformers.Trainer`: `labels` and `shift_labels` are the
    same, already shifted tensor, so the loss is computed on it as it is, and the Trainer counts its targets right.
    Extra keys of the features are left out, but for `row` (the number of the record): if there, it is passed on, and
    `supervised` (targets,) says which of the batch * time positions have a target, so that nobody waits for a GPU to
    find them.

    Args:
        pad_token_id: the id to pad `input_ids` with; for GPT-2 the end-of-text id, 50256.
        shift: `False` gives `labels` aligned with `input_ids` and no `shift_labels`, for loops that shift themselves.
        pad_to_multiple_of: round the width of the batch up to a multiple of this many tokens.

    Features: mappings with `input_ids` (T,) and `labels` (T,), aligned, not yet shifted, -100 where nothing is to be
    learned; without `labels` all of `input_ids` is learned.

    Returns a dict of int64 tensors, all (batch, time): `input_ids`, `attention_mask`, `labels`, `shift_labels`.

    Raises:
        ValueError: no features, or `labels` and `input_ids` of different lengths.

    Example: two rows, 50256 ends each response and pads the shorter row.

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
        if not features:
            raise ValueError("a batch needs at least one feature")
        tokens = [feature["input_ids"] for feature in features]
        labels = [feature.get("labels", feature["input_ids"]) for feature in features]
        lengths = np.array([len(row) for row in tokens])
        for index, (row, targets) in enumerate(zip(tokens, labels, strict=True)):
            if len(row) != len(targets):
                raise ValueError(
                    f"feature {index}: {len(row)} input_ids but {len(targets)} labels; they must be aligned"
                )

        width = lengths.max()
        if self.pad_to_multiple_of:
            kept = width - self.shift  # the shift takes one column
            width += -kept % self.pad_to_multiple_of
        real = np.arange(width) < lengths[:, None]  # (batch, time)

        padded_tokens = np.full(real.shape, self.pad_token_id, dtype=np.int64)
        padded_tokens[real] = np.concatenate(tokens)
        padded_labels = np.full(real.shape, IGNORE_INDEX, dtype=np.int64)
        padded_labels[real] = np.concatenate(labels)

        batch = {"input_ids": padded_tokens, "attention_mask": real.astype(np.int64), "labels": padded_labels}
        if self.shift:  # position t predicts token t + 1
            batch = {
                "input_ids": padded_tokens[:, :-1],
                "attention_mask": batch["attention_mask"][:, :-1],
                "labels": padded_labels[:, 1:],
            }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
        if self.shift:
            tensors["shift_labels"] = tensors["labels"]
        if "row" in features[0]:
            tensors["row"] = torch.tensor([feature["row"] for feature in features])
            if self.shift:
                tensors["supervised"] = (tensors["labels"].flatten() != IGNORE_INDEX).nonzero().flatten()
        return tensors


class Group(NamedTuple):
    """Examples of a batch that share a prefix: which, and its length in tokens."""

    examples: list[int]
    prefix: int


class DataCollatorWithSharedPrefix:
    """Lays a batch out as one row in which a prefix that examples share stands once: no padding, no repetition.

    `[prefix | rest of example 1 | rest of example 2 | ...]`, or several such groups one after another where a batch
    mixes prompts. A token attends to its group's prefix and to its own example, causally, and to nothing else, and its
    position is the one it has in its example: losses and gradients are those of the padded batch. The vocabulary head
    is computed at supervised positions only, by the models' own argument `logits_to_keep`.

    The prefix of a group is the longest run of tokens, from the start, in which all inputs and all targets are equal.
    Which examples form a group is chosen so that the row is short. A supervised target inside a prefix counts once
    for each example of its group: its position stands as often in `logits_to_keep`.

    Works with the stock `transformers.Trainer` and any causal language model of transformers whose `forward` takes
    `logits_to_keep`; takes the features of `DataCollatorForInstructionTuning`.

    Args:
        pad_token_id: what stands in the padding, if `pad_to_multiple_of` asks for any.
        attention: "mask" emits a boolean mask, for any model with SDPA attention; "segments" emits lengths instead, for
            models loaded with `attn_implementation="shared_prefix"` (import `recipe.attention` first), which is faster.
        pad_to_multiple_of: round the row, and the number of targets, up to a multiple of this many, so that shapes
            repeat, as `torch.compile` likes it. No example sees the padding: it is a group of its own, without examples
            and without targets. Targets are filled up with -100, taken from position 0 and counted to example 0.

    Returns a dict: `input_ids`, `position_ids` (1, time); `labels` and `shift_labels`, the same tensor of targets
    (1, targets), none of them -100 but those that pad; `logits_to_keep` (targets,), the position of each; and
    `attention_mask` (1, 1, time, time) bool, or `segments`, a tuple with, for each group, its prefix length and the
    tuple of its rests. If the features have a `row`: `row` (examples,), `example` (targets,), to which example each
    target belongs, and `lengths` (examples,) in tokens.

    Raises:
        ValueError: no features, `labels` and `input_ids` of different lengths, or nothing to learn in the batch.

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
        self,
        pad_token_id: int,
        attention: Literal["mask", "segments"] = "mask",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if attention not in ("mask", "segments"):
            raise ValueError(f"attention={attention!r}: give 'mask' or 'segments'")
        self.pad_token_id = pad_token_id
        self.attention = attention
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = [_input_target_pairs(index, feature) for index, feature in enumerate(features)]
        if not pairs:
            raise ValueError("a batch needs at least one feature")
        groups = shared_prefixes(pairs)

        # the segments of the row: each group's prefix, then the rests of its examples
        segments: list[np.ndarray] = []  # (length, 2) pairs
        starts: list[int] = []  # position of a segment's first token
        owners: list[list[int]] = []  # whose targets a segment holds
        for examples, prefix in groups:
            segments += [pairs[examples[0]][:prefix], *(pairs[example][prefix:] for example in examples)]
            starts += [0] + [prefix] * len(examples)
            owners += [examples, *([example] for example in examples)]
        multiple = self.pad_to_multiple_of or 1
        padding = -sum(map(len, segments)) % multiple
        if padding:
            groups.append(Group([], padding))
            segments.append(np.array([[self.pad_token_id, IGNORE_INDEX]] * padding, dtype=np.int32))
            starts.append(0)
            owners.append([])
        lengths = np.array([len(segment) for segment in segments])
        tokens, targets = np.concatenate(segments).T
        offsets = np.cumsum(lengths) - lengths
        positions = np.arange(len(tokens)) + np.repeat(np.array(starts) - offsets, lengths)

        kept, example = [], []
        for offset, segment, owner in zip(offsets, segments, owners, strict=True):
            supervised = offset + np.flatnonzero(segment[:, 1] != IGNORE_INDEX)
            kept += [supervised] * len(owner)
            example += [np.full(len(supervised), index) for index in owner]
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
            rests = iter(lengths.tolist())
            batch["segments"] = tuple((next(rests), tuple(next(rests) for _ in group.examples)) for group in groups)
        if "row" in features[0]:
            batch["row"] = torch.tensor([feature["row"] for feature in features])
            batch["example"] = torch.from_numpy(np.pad(np.concatenate(example), filling))
            batch["lengths"] = torch.tensor([len(pair) for pair in pairs])
        return batch


def _input_target_pairs(index: int, feature: Mapping[str, Any]) -> np.ndarray:
    """Each input token beside the token it should predict, (length - 1, 2) int32."""
    tokens, labels = feature["input_ids"], feature.get("labels", feature["input_ids"])
    if len(tokens) != len(labels):
        raise ValueError(f"feature {index}: {len(tokens)} input_ids but {len(labels)} labels; they must be aligned")
    return np.array([tokens[:-1], labels[1:]], dtype=np.int32).T


def shared_prefixes(pairs: Sequence[np.ndarray]) -> list[Group]:
    """Groups of examples, each with its shared prefix, that make the row short.

    In lexicographic order examples with a long common prefix are neighbours. Groups are runs of that order; the cut
    into runs that saves most tokens is found by dynamic programming over their ends.

    Args:
        pairs: of each example its (length, 2) inputs and targets.

    >>> rows = [[1, 2, 3], [7], [1, 2]]
    >>> [tuple(group) for group in shared_prefixes([np.array([row, row]).T for row in rows])]
    [([2, 0], 2), ([1], 0)]
    """
    order = sorted(range(len(pairs)), key=lambda index: pairs[index].tobytes())
    common = [_common_prefix(pairs[one], pairs[other]) for one, other in itertools.pairwise(order)]
    saved, cuts = [0], [0]  # most tokens saved among the first n examples, and where their last group begins
    for end in range(1, len(order) + 1):
        best, cut, shortest = saved[end - 1], end - 1, 0  # the last example alone
        for start in range(end - 2, -1, -1):
            shortest = min(shortest, common[start]) if start < end - 2 else common[start]
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


def _common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    different = (one[:length] != other[:length]).any(axis=1)
    return int(different.argmax()) if different.any() else length


def _mask(groups: Sequence[Group], lengths: np.ndarray) -> np.ndarray:
    """Which token may attend to which, (time, time) bool."""
    segment = np.repeat(np.arange(len(lengths)), lengths)  # (time,)
    prefixes, first = [], 0  # the segment of the prefix, for each segment
    for group in groups:
        prefixes += [first] * (1 + len(group.examples))
        first = len(prefixes)
    prefix = np.array(prefixes)[segment]
    time = np.arange(len(segment))
    visible = (segment == segment[:, None]) | (segment == prefix[:, None])
    return visible & (time <= time[:, None])
