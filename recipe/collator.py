"""Batches for instruction tuning: pad, shift by one, mask padding, keep the one end-of-text token to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    Extra keys of the features are left out, but for `row` (the number of the record), which is passed on if there.

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
        return tensors
