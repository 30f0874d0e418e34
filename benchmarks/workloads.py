"""What is measured: the parts, and the rows that all contenders get.

To add a part, add an entry to `PARTS`, and a function if its records or its template must be made first.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from recipe.config import DataArguments, UserError
from recipe.data import encode_records, load_records
from recipe.data.conversations import fields_of
from recipe.templates import load_template

RESPONSE_TOKENS = 200  # mean of `long_responses`
SYSTEM_TOKENS = 512  # of `system_prompt`
CHAT_SYSTEM_TOKENS = 256  # of `conversations_system`
ANSWERS = 4  # to one prompt, in `answers`
QUESTION_WORDS, ANSWER_WORDS = (5, 20), (10, 50)  # of a turn, from the fewest to the most

Record = dict[str, Any]  # instruction, input, output, and of a conversation messages
Row = dict[str, Any]  # input_ids, labels (aligned, not shifted), length, row, ends, prompt, completion, messages


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


def conversations(
    records: list[Record], inputs: Inputs, turns: int, system_tokens: int = 0
) -> tuple[list[Record], str]:
    """As many conversations as there are records, of words of the records, read as a run reads them from a file.

    Turns have as many words as `QUESTION_WORDS` and `ANSWER_WORDS` say. A seed makes them, so they are always the same.
    """
    words = Words(inputs.records)
    system = [{"role": "system", "content": words.of_tokens(system_tokens, inputs)}] if system_tokens else []
    chats = [[*system, *words.turns(turns)] for _ in records]
    path = inputs.folder / f"conversations_{turns}.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    loaded, _ = load_records(DataArguments(data=str(path), validation_ratio=0, test_ratio=0))
    columns = ["instruction", "input", "output", "messages"]
    return loaded["train"].select_columns(columns).to_list(), inputs.template


def answers(records: list[Record], inputs: Inputs) -> tuple[list[Record], str]:
    """`ANSWERS` records with the same prompt one after another, as data for preferences and rejection sampling have."""
    words, made = Words(inputs.records), []
    for _ in range(len(records) // ANSWERS):
        question = words.text(3 * QUESTION_WORDS[0], 3 * QUESTION_WORDS[1])
        made += [{"instruction": question, "input": "", "output": words.text(*ANSWER_WORDS)} for _ in range(ANSWERS)]
    return made, inputs.template


class Words:
    """Makes texts from the words of records, the same ones each time."""

    def __init__(self, records: list[Record]) -> None:
        self.random = random.Random(1)
        self.known = sorted({word for r in records for word in re.findall(r"[a-z]+", r["output"])}) or ["word"]

    def text(self, fewest: int, most: int) -> str:
        words = self.random.choices(self.known, k=self.random.randint(fewest, most))
        return f"{' '.join(words).capitalize()}."

    def turns(self, count: int) -> Iterator[dict[str, str]]:
        for _ in range(count):
            yield {"role": "user", "content": self.text(*QUESTION_WORDS)}
            yield {"role": "assistant", "content": self.text(*ANSWER_WORDS)}

    def of_tokens(self, count: int, inputs: Inputs) -> str:
        [ids] = inputs.token_ids([self.text(count, count)])
        return str(inputs.tokenizer.decode(ids[:count])).strip()


@dataclass(frozen=True)
class Part:
    """Optimizer steps on one kind of data."""

    batch_size: int  # records of a step
    make: Callable[[list[Record], Inputs], tuple[list[Record], str]] | None = None  # None: the records as they are
    together: int = 1  # records one after another that are kept or left out together
    turns: int = 0  # of a conversation


BATCH_SIZES = (1, 2, 4, 8, 32)  # of conversations, and of prompts with several answers
PARTS = {
    "batch_8": Part(batch_size=8),
    "batch_32": Part(batch_size=32),
    "long_responses": Part(batch_size=8, make=with_long_responses),
    "system_prompt": Part(batch_size=8, make=with_system_prompt),
    **{f"batch_size={size}": Part(batch_size=size) for size in (1, 2, 4, 16)},
    **{f"conversations_{n}": Part(n, partial(conversations, turns=5), turns=5) for n in BATCH_SIZES},
    **{
        f"conversations_system_{n}": Part(n, partial(conversations, turns=8, system_tokens=CHAT_SYSTEM_TOKENS), turns=8)
        for n in BATCH_SIZES
    },
    **{f"answers_{n}": Part(ANSWERS * n, answers, together=ANSWERS) for n in BATCH_SIZES},
}


def training_rows(part: Part, warmup_steps: int, steps: int, inputs: Inputs) -> dict[str, Any]:
    """What the contenders get of a part: rows of the warm-up steps, then those of the timed steps.

    Two kinds of records are left out: those that are too long for the model, and those whose prompts and responses
    become other tokens when they are tokenized together, because not all contenders tokenize them separately.

    Returns:
        `rows`, an encoded record each. Of conversations also `samples`, each learned turn with its history as a row of
        its own, those of a record one after another; and `chat_template`, for who renders whole conversations.

    Raises:
        UserError: too few rows are left.
    """
    timed, warmup = part.batch_size * steps, part.batch_size * warmup_steps
    candidates = list(itertools.islice(itertools.cycle(inputs.records), 2 * (timed + warmup)))
    records, template = part.make(candidates, inputs) if part.make else (candidates, inputs.template)
    unrolled = [(owner, sample) for owner, record in enumerate(records) for sample in samples_of(record)]
    samples: dict[int, list[Row]] = {}
    for row in encoded([sample for _, sample in unrolled], template, inputs, learn="last"):
        samples.setdefault(unrolled[row["row"]][0], []).append(row)
    whole = encoded(records, template, inputs) if part.turns else [row for [row] in samples.values()]
    rows = {row["row"]: row for row in whole if len(samples.get(row["row"], ())) == max(1, part.turns)}
    groups = [range(start, start + part.together) for start in range(0, len(records), part.together)]
    kept = [index for group in groups if all(index in rows for index in group) for index in group]
    if len(kept) < timed + warmup:
        raise UserError(
            f"{timed + warmup} rows are needed, but only {len(kept)} of {len(records)} fit into "
            f"{inputs.max_length} tokens; choose other parts with --only"
        )
    kept = kept[timed : timed + warmup] + kept[:timed]
    found: dict[str, Any] = {"rows": [rows[index] for index in kept]}
    if part.turns:
        found["samples"] = [sample for index in kept for sample in samples[index]]
        found["chat_template"] = with_markers(load_template(template, inputs.tokenizer).chat_template)
    return found


def samples_of(record: Record) -> list[Record]:
    """A conversation once for each of its answers, up to there; any other record as it is."""
    messages = json.loads(record.get("messages") or "[]")
    ends = [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]
    return [fields_of(messages[:end]) for end in ends] or [record]


def encoded(records: list[Record], template: str, inputs: Inputs, learn: Literal["all", "last"] = "all") -> list[Row]:
    """The rows of records that fit and whose last answer has the same tokens behind its prompt as alone.

    Args:
        learn: all of a conversation's answers, or the last one.
    """
    prompts = inputs.prompts(records, template)
    together = inputs.token_ids([p + r["output"] for p, r in zip(prompts, records, strict=True)])
    dataset = Dataset.from_list([{**record, "row": row} for row, record in enumerate(records)])
    arguments = DataArguments(template=template, max_length=inputs.max_length, overflow="drop", learn=learn)
    rows = encode_records({"train": dataset}, inputs.tokenizer, arguments)["train"]
    columns = [name for name in ("input_ids", "labels", "length", "row", "ends") if name in rows.column_names]
    return [
        {
            **row,
            "prompt": prompts[row["row"]],
            "completion": records[row["row"]]["output"],
            "messages": json.loads(records[row["row"]].get("messages") or "null"),
        }
        for row in rows.select_columns(columns).to_list()
        if row["input_ids"][:-1] == together[row["row"]] or row.get("ends")  # all but the end-of-text token
    ]


def with_markers(chat_template: str) -> str:
    """`{% generation %}` around what the model says, by which TRL finds it; in templates like our alpaca and phi3."""
    return re.sub(
        r"\{\{- ('[^']*') \+ message\.content -\}\}\{\{- eos_token -\}\}",
        r"{{- \1 -}}{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}",
        chat_template,
    )
