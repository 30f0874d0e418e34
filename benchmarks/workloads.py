"""What is measured: the parts, and the rows that all contenders get.

To add a part, add an entry to `PARTS`, and a function if its records or its template must be made first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

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
    tokenizer: Any
    template: str  # a name or the path of a Jinja file
    max_length: int  # longest row in tokens
    folder: Path  # for the files of this run

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def prompts(self, records: list[Record], template: str) -> list[str]:
        loaded = load_template(template, self.tokenizer)
        return [loaded.prompt(record) for record in records]


def with_long_responses(records: list[Record], inputs: Inputs) -> tuple[list[Record], str]:
    """Each response repeated, to a mean of about `RESPONSE_TOKENS` tokens; the lengths vary as those of the data do."""
    lengths = [len(ids) for ids in inputs.token_ids([record["output"] for record in records])]
    times = max(1, round(RESPONSE_TOKENS * len(lengths) / sum(lengths)))
    return [{**record, "output": " ".join([record["output"]] * times)} for record in records], inputs.template


def with_system_prompt(records: list[Record], inputs: Inputs) -> tuple[list[Record], str]:
    """The template with a system message of about `SYSTEM_TOKENS` tokens.

    Raises:
        UserError: the template does not show system messages.
    """
    [ids] = inputs.token_ids(["Answer in plain words. " * SYSTEM_TOKENS])
    text = str(inputs.tokenizer.decode(ids[:SYSTEM_TOKENS])).strip()
    message = f"{{%- set messages = [{{'role': 'system', 'content': '{text}'}}] + messages -%}}"
    path = inputs.folder / "system_prompt.jinja"
    path.write_text(message + load_template(inputs.template, inputs.tokenizer).chat_template, encoding="utf-8")
    if text not in inputs.prompts(records[:1], str(path))[0]:
        raise UserError(f"template {inputs.template}: it shows no system message; leave out the part system_prompt")
    return records, str(path)


@dataclass(frozen=True)
class Part:
    """Optimizer steps on one kind of data."""

    batch_size: int
    make: Callable[[list[Record], Inputs], tuple[list[Record], str]] | None = None  # None: the records as they are


PARTS = {
    "batch_8": Part(batch_size=8),
    "batch_32": Part(batch_size=32),
    "long_responses": Part(batch_size=8, make=with_long_responses),
    "system_prompt": Part(batch_size=8, make=with_system_prompt),
    **{f"batch_size={size}": Part(batch_size=size) for size in (1, 2, 4, 16)},
}


def training_rows(part: Part, warmup_steps: int, steps: int, inputs: Inputs) -> list[Row]:
    """Encoded rows of a part: those of the warm-up steps, then those of the timed steps.

    Two kinds of rows are left out: those that are too long for the model, and those whose prompt and response become
    other tokens when they are tokenized together, because not all contenders tokenize them separately.

    Raises:
        UserError: too few rows are left.
    """
    timed, warmup = part.batch_size * steps, part.batch_size * warmup_steps
    candidates = list(itertools.islice(itertools.cycle(inputs.records), 2 * (timed + warmup)))
    records, template = part.make(candidates, inputs) if part.make else (candidates, inputs.template)
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
            f"{timed + warmup} rows are needed, but only {len(rows)} of {len(records)} fit into "
            f"{inputs.max_length} tokens; choose other parts with --only"
        )
    return rows[timed : timed + warmup] + rows[:timed]
