"""What is measured: the parts, and the rows and records that all contenders get.

A further part is one entry of `PARTS`, and a function where its records or its template must be made first.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipe.config import DataArguments, UserError
from recipe.data import encode_records
from recipe.templates import load_template

RESPONSE_TOKENS = 200  # mean of `long_responses`
SYSTEM_TOKENS = 512  # of `system_prompt`

Record = dict[str, Any]  # instruction, input, output
Row = dict[str, Any]  # input_ids, labels (aligned, not shifted), length, row, prompt, completion


@dataclass(frozen=True)
class Inputs:
    """What all parts are made from."""

    records: list[Record]  # of the train split, shuffled
    tokenizer: PreTrainedTokenizerBase
    template: str  # a name or the path of a Jinja file
    max_length: int  # longest row in tokens
    folder: Path  # for the files of this run

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        tokenizer: Any = self.tokenizer
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def prompts(self, records: list[Record], template: str) -> list[str]:
        loaded = load_template(template, self.tokenizer)
        return [loaded.prompt(record) for record in records]


def as_given(records: list[Record], inputs: Inputs) -> tuple[list[Record], str]:
    """The user's records and template."""
    return records, inputs.template


def with_long_responses(records: list[Record], inputs: Inputs) -> tuple[list[Record], str]:
    """Responses with a mean of about `RESPONSE_TOKENS` tokens, whose lengths vary as those of the data do."""
    lengths = [len(ids) + 1 for ids in inputs.token_ids([record["output"] for record in records])]
    return lengthen_responses(records, RESPONSE_TOKENS * len(lengths) / sum(lengths)), inputs.template


def lengthen_responses(records: list[Record], factor: float) -> list[Record]:
    """Each response `factor` times as long, in words: its own words and those of the responses after it.

    >>> [r["output"] for r in lengthen_responses([{"output": "a b"}, {"output": "c"}, {"output": "d e f"}], 2)]
    ['a b c d', 'c d', 'd e f a b c']
    """
    responses = [record["output"].split() for record in records]
    words = list(itertools.chain.from_iterable(responses))
    start, longer = 0, []
    for record, response in zip(records, responses, strict=True):
        end = start + max(1, round(factor * len(response)))
        joined = itertools.islice(itertools.cycle(words), start, end)
        longer.append({**record, "output": " ".join(joined)})
        start += len(response)
    return longer


def with_system_prompt(records: list[Record], inputs: Inputs) -> tuple[list[Record], str]:
    """The template with a system message of `SYSTEM_TOKENS` tokens, made of words of the data.

    Raises:
        UserError: the template does not show system messages.
    """
    words = re.findall(r"[A-Za-z]+", " ".join(record["output"] for record in inputs.records[:5000]))
    [ids] = inputs.token_ids([" ".join(itertools.islice(itertools.cycle(words), SYSTEM_TOKENS))])
    text = str(inputs.tokenizer.decode(ids[:SYSTEM_TOKENS]))
    message = f"{{%- set messages = [{{'role': 'system', 'content': '{text}'}}] + messages -%}}"
    path = inputs.folder / "system_prompt.jinja"
    path.write_text(message + load_template(inputs.template, inputs.tokenizer).chat_template, encoding="utf-8")
    if text not in inputs.prompts(records[:1], str(path))[0]:
        raise UserError(f"template {inputs.template}: it shows no system message; leave out the part system_prompt")
    return records, str(path)


@dataclass(frozen=True)
class Part:
    """Optimizer steps on one kind of data. Parts named `NAME=VALUE` are the points of a curve."""

    name: str
    batch_size: int
    steps: int  # timed ones
    make: Callable[[list[Record], Inputs], tuple[list[Record], str]] = as_given
    contenders: tuple[str, ...] = ()  # who is measured; empty: all


CURVE = ("recipe_shared_prefix", "recipe_padded", "trainer_by_length", "trl_by_length", "plain_loop")
PARTS = [
    Part("batch_8", batch_size=8, steps=16),
    Part("batch_32", batch_size=32, steps=8),
    Part("long_responses", batch_size=8, steps=8, make=with_long_responses),
    Part("system_prompt", batch_size=8, steps=4, make=with_system_prompt),
    *(Part(f"batch_size={size}", size, steps=3, contenders=CURVE) for size in (1, 2, 4, 8, 16, 32)),
]


def training_rows(part: Part, steps: int, inputs: Inputs) -> dict[str, list[Row]]:
    """Encoded rows of a part: `timed` for the timed steps and `warmup` for the steps before them.

    Two kinds of rows are left out: those that are too long for the model, and those whose prompt and response give
    other tokens together than apart, because not all contenders tokenize them apart.

    Raises:
        UserError: too few rows are left.
    """
    timed, warmup = part.batch_size * steps, 2 * part.batch_size
    candidates = list(itertools.islice(itertools.cycle(inputs.records), 2 * (timed + warmup)))
    records, template = part.make(candidates, inputs)
    prompts = inputs.prompts(records, template)
    together = inputs.token_ids([p + r["output"] for p, r in zip(prompts, records, strict=True)])
    dataset = Dataset.from_list([{**record, "row": row} for row, record in enumerate(records)])
    arguments = DataArguments(template=template, max_length=inputs.max_length, overflow="drop")
    encoded = encode_records({"train": dataset}, inputs.tokenizer, arguments)["train"]
    rows = [
        {**row, "prompt": prompts[row["row"]], "completion": records[row["row"]]["output"]}
        for row in encoded.select_columns(["input_ids", "labels", "length", "row"]).to_list()
        if row["input_ids"][:-1] == together[row["row"]]  # all but the end-of-text token
    ]
    if len(rows) < timed + warmup:
        raise UserError(
            f"{part.name}: {timed + warmup} rows are needed, but only {len(rows)} of {len(records)} fit into "
            f"{inputs.max_length} tokens; choose other parts with --only"
        )
    return {"timed": rows[:timed], "warmup": rows[timed : timed + warmup]}


def save_numbered_records(count: int, inputs: Inputs) -> str:
    """Save a data set of `count` records: the data again and again, numbered so that no two are equal. Its path."""
    records = [
        {**record, "input": record["input"] or "", "instruction": f"{record['instruction']} ({row})", "row": row}
        for row, record in enumerate(itertools.islice(itertools.cycle(inputs.records), count))
    ]
    for record, prompt in zip(records, inputs.prompts(records, inputs.template), strict=True):
        record |= {"prompt": prompt, "completion": record["output"]}
    path = str(inputs.folder / f"records_{count}")
    Dataset.from_list(records).save_to_disk(path)
    return path
