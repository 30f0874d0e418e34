"""What is in the data before anything is trained on it: lengths, what would be cut, padding, odd records.

Nothing is changed. Rows count from 0, as `dataset[i]` does, in the split that a record was read from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from transformers import PreTrainedTokenizerBase

from recipe.collator import IGNORE_INDEX, depth_first
from recipe.config import DataArguments
from recipe.console import UNSEEN
from recipe.data.conversations import text_of
from recipe.data.duplicates import Record, flatten
from recipe.data.encode import (
    cut_lengths,
    encode_good_records,
    encode_split,
    encoding_arguments,
    template_overhead,
)
from recipe.data.examples import example_bounds
from recipe.data.records import LeftOut
from recipe.figures import STYLE, TEXT, paint, save_png
from recipe.templates import Template
from recipe.tokens import prompt_ids

ODD = re.compile(f"{UNSEEN.pattern}|\ufffd")  # a decoder writes U+FFFD for bytes that it cannot read
UNCUT = 10**9  # tokens: a max_length that cuts nothing
SHUFFLES = 20  # orders of the records over which the cost of padding is averaged


def measure_lengths(
    records: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, config: DataArguments, left_out: LeftOut
) -> tuple[DatasetDict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tokens of each record's uncut prompt, and of its response with the token that ends it: (records, 2).

    Of a conversation, the response is all that is learned, and the prompt all else in its row.

    Returns:
        the records without bad ones, which are added to `left_out`: see `recipe.data.encode.encode_good_records`;
        the lengths of each split; and those of its examples, (examples, 2), one for each turn that is learned.
    """
    config = replace(config, max_length=UNCUT, overflow="truncate", mask_prompt=True)
    lengths, examples = {}, {}
    good, encoded = encode_good_records(records, tokenizer, config, left_out)
    for name, split in encoded.items():
        table = split.with_format("arrow")[:]
        whole = table["length"].to_numpy()
        supervised = pc.list_flatten(table["labels"]).to_numpy() != IGNORE_INDEX
        response = np.add.reduceat(supervised, whole.cumsum() - whole, dtype=np.int64)
        lengths[name] = np.stack([whole - response, response], axis=1)
        starts, _ = example_bounds(table)
        edges = np.flatnonzero(np.diff(supervised, prepend=False, append=False)).reshape(-1, 2)  # of each turn
        before = starts[np.searchsorted(starts, edges[:, 0], side="right") - 1]
        examples[name] = np.stack([edges[:, 0] - before, edges[:, 1] - edges[:, 0]], axis=1)
    return good, lengths, examples


def encode_trained(
    records: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, config: DataArguments
) -> dict[str, pa.Table]:
    """The rows that training sees of each split without bad records, cut to `max_length` or left out.

    `overflow="error"` would stop the run; these are the rows that `"drop"` would leave. All prompts are masked.
    """
    overflow = "drop" if config.overflow == "error" else config.overflow
    arguments = encoding_arguments(tokenizer, replace(config, overflow=overflow, mask_prompt=True))
    encoded = {
        name: encode_split(name, split, tokenizer, arguments, config.num_proc) for name, split in records.items()
    }
    return {name: split.with_format("arrow")[:] for name, split in encoded.items()}


def preamble_ids(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that all prompts without a system message begin with."""
    [prompt] = prompt_ids(template, tokenizer, [{"instruction": "Name it.", "input": ""}])
    return prompt[: template_overhead(template, tokenizer)[0]]


def inspect_lengths(
    lengths: Mapping[str, np.ndarray],
    examples: Mapping[str, np.ndarray],
    trained: Mapping[str, pa.Table],
    limits: Sequence[int],
    batch_size: int,
    preamble: Sequence[int],
) -> dict[str, Any]:
    """Lengths of each split, the tokens that training sees, and what each limit would cut; see docs/data.md.

    Args:
        lengths: from `measure_lengths`.
        examples: from `measure_lengths`; a limit holds for each turn of a conversation that is learned, with its
            history.
        trained: from `encode_trained`.
        preamble: from `preamble_ids`.
    """
    report = {}
    for name, split in lengths.items():
        rows = trained[name]
        tokens, labels = (pc.list_flatten(rows[column]).to_numpy() for column in ("input_ids", "labels"))
        in_preamble, response = _of_preamble(rows, tokens, preamble), int((labels != IGNORE_INDEX).sum())
        report[name] = {
            "records": len(split),
            "trained_records": len(rows),
            "turns": len(examples[name]),
            "tokens": {
                "preamble": in_preamble, "prompt": len(tokens) - response - in_preamble, "response": response,
            },
            "batches": batch_costs(rows, batch_size),
            "overflow": [overflow_at(examples[name], limit) for limit in limits],
            "lengths": {part: _describe(values) for part, values in _parts(split).items()},
        }  # fmt: skip
    return report


def _of_preamble(rows: pa.Table, tokens: np.ndarray, preamble: Sequence[int]) -> int:
    """How many tokens all examples together begin with that are those of the preamble."""
    starts, stops = example_bounds(rows)
    place = starts[:, None] + np.arange(len(preamble))  # (examples, tokens)
    same = (tokens.take(place, mode="clip") == preamble) & (place < stops[:, None]) if len(tokens) else place
    return int(np.logical_and.accumulate(same, axis=1).sum())


def overflow_at(lengths: np.ndarray, limit: int) -> dict[str, int]:
    """How many examples of a split are longer than `limit` tokens, and what `truncate` would cut off them.
    `without_end` counts the responses that would lose their end-of-text token."""
    removed = lengths - cut_lengths(lengths, limit)
    return {
        "limit": limit,
        "too_long": int((lengths.sum(axis=1) > limit).sum()),
        "cut_prompt_tokens": int(removed[:, 0].sum()),
        "cut_response_tokens": int(removed[:, 1].sum()),
        "without_end": int((removed[:, 1] > 0).sum()),
    }


def batch_costs(rows: pa.Table, batch_size: int) -> dict[str, float | None]:
    """Input tokens of one epoch of random batches of encoded rows, padded and with shared prefixes.

    An example of n tokens has n - 1 inputs. `padded` is the mean over `SHUFFLES` orders of the rows, drawn with a fixed
    seed, where each example of a row has the width of the longest example of the batch; `padding` is the share of it
    that is padding. `shared_prefix` is what `DataCollatorWithSharedPrefix` makes of the first order.

    Two rows of 5 and 3 tokens have 4 and 2 inputs: padded 2 x 4, of which 2 are padding; shared 4 + 2 - 1.

    >>> batch_costs(pa.table({"input_ids": [[7, 1, 2, 3, 4], [7, 5, 6]], "length": [5, 3]}), 2)
    {'inputs': 6, 'padded': 8, 'padding': 0.25, 'shared_prefix': 5}
    """
    begins, ends = example_bounds(rows)
    inputs, total = ends - begins - 1, int((ends - begins - 1).sum())
    if not total:
        return {"inputs": 0, "padded": 0, "padding": None, "shared_prefix": 0}
    tokens = pc.list_flatten(rows["input_ids"]).to_numpy()
    row_ends = rows["length"].to_numpy().cumsum()
    firsts = np.searchsorted(begins, row_ends - rows["length"].to_numpy())  # the first example of each row
    longest, counts = np.maximum.reduceat(inputs, firsts), np.diff(firsts, append=len(inputs))
    batches = np.arange(0, len(rows), batch_size)
    draw = np.random.default_rng(0)
    orders = [draw.permutation(len(rows)) for _ in range(SHUFFLES)]
    sums = [np.add.reduceat(counts[o], batches) @ np.maximum.reduceat(longest[o], batches) for o in orders]
    padded, shared = float(np.mean(sums)), 0
    for batch in np.split(orders[0], batches[1:]):
        places = np.concatenate([np.arange(firsts[row], firsts[row] + counts[row]) for row in batch])
        examples = [tokens[begins[place] : ends[place] - 1] for place in places]
        shared += sum(len(examples[index]) - common for index, common in depth_first(examples))
    return {"inputs": total, "padded": round(padded), "padding": 1 - total / padded, "shared_prefix": shared}


def _parts(lengths: np.ndarray) -> dict[str, np.ndarray]:
    return {"prompt": lengths[:, 0], "response": lengths[:, 1], "whole": lengths.sum(axis=1)}


def _describe(values: np.ndarray) -> dict[str, float]:
    median, p95, p99 = np.quantile(values, [0.5, 0.95, 0.99], method="inverted_cdf").tolist()
    mean, shortest, longest = float(values.mean()), int(values.min()), int(values.max())
    return {"shortest": shortest, "median": median, "mean": mean, "p95": p95, "p99": p99, "longest": longest}


def inspect_records(
    trained: Mapping[str, Dataset],
    lengths: Mapping[str, np.ndarray],
    special_text: Mapping[str, Mapping[str, Sequence[int]]],
    show: int,
) -> dict[str, Any]:
    """The longest and the shortest records, those without an input, and what is odd; see docs/data.md.

    Args:
        lengths: of the same splits, from `measure_lengths`.
        special_text: rows of the same splits, from `recipe.data.special_text.find_special_text`.
        show: how many examples to report of each finding.
    """
    records = flatten(trained)
    for record, tokens in zip(records, np.concatenate([*lengths.values()]).sum(axis=1).tolist(), strict=True):
        record["tokens"] = tokens
    by_length = sorted(records, key=lambda record: record["tokens"])
    no_input = [record for record in records if not record["input"].strip() and "messages" not in record]
    odd = [record for record in records if ODD.search(text_of(record))]
    findings = {}
    for finding, rows in special_text.items():
        wanted = {(name, row) for name in rows for row in rows[name]}
        found = [record for record in records if (record["split"], record["row"]) in wanted]
        findings[finding] = {"by_split": _by_split(trained, found), "examples": found[:show]}
    return {
        **findings,
        "longest": by_length[::-1][:show],
        "shortest": by_length[:show],
        "empty_input": {"by_split": _by_split(trained, no_input)},
        "odd_characters": {"by_split": _by_split(trained, odd), "examples": odd[:show]},
    }


def _by_split(names: Iterable[str], records: Iterable[Record]) -> dict[str, int]:
    counts = Counter(record["split"] for record in records)
    return {name: counts[name] for name in names}


@matplotlib.rc_context(STYLE)
def plot_lengths(lengths: Mapping[str, np.ndarray], max_length: int, path: Path) -> None:
    """Draw to a PNG what share of each split's records has at most a given number of tokens."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    titles = {"prompt": "prompt", "response": "response and end of text", "whole": "whole record"}
    for axes, (part, title) in zip(figure.subplots(1, 3, sharey=True), titles.items(), strict=True):
        paint(axes)
        for name, split in lengths.items():
            axes.ecdf(_parts(split)[part], label=name)
        axes.set(xlabel="tokens at most", xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(title, color=TEXT, fontsize=9)
    if max_length < axes.get_xlim()[1]:
        axes.axvline(max_length, color=TEXT, linestyle=":", linewidth=1.2, label=f"max_length {max_length:,}")
    axes.legend(frameon=False, labelcolor=TEXT)
    figure.axes[0].set_ylabel("share of the records")
    save_png(figure, path, dpi=150)
