"""From records to tokens: prompt and response of each record, cut to length, and counted."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

from recipe.collator import IGNORE_INDEX
from recipe.config import DataArguments, UserError
from recipe.data.records import problem_report
from recipe.data.split import load_records
from recipe.templates import Template, load_template

TOKENS = List(Value("int32"))
ENCODED_FEATURES = Features(
    {"input_ids": TOKENS, "labels": TOKENS, "length": Value("int32"), "row": Value("int64"), "truncated": Value("bool")}
)


def load_splits(config: DataArguments, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Records as tokens, ready for the collator: load, validate, split, encode.

    Returns:
        a `DatasetDict` of `train`, `validation`, `test` and whatever other splits the data names, with the columns
        `input_ids` and `labels` (T,), aligned, not yet shifted, -100 over the prompt with `mask_prompt`; `length` in
        tokens; `row`, the record's number in its source; `truncated`.

    Raises:
        UserError: see `load_records` and `encode_records`.

    Example::

        tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")
        splits = load_splits(DataArguments(data="instruction-data.json"), tokenizer)
        splits["train"][0]["labels"][-1] == tokenizer.eos_token_id
    """
    records, _ = load_records(config)
    return encode_records(records, tokenizer, config)


def encode_records(
    records: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, config: DataArguments
) -> DatasetDict:
    """Prompt and response of each record as tokens, one batched `datasets.map` per split, cached.

    One end-of-text token ends the response. A record longer than `max_length` is cut (`overflow="truncate"`, see
    `cut_lengths`) or left out (`"drop"`).

    Raises:
        UserError: a tokenizer without an end-of-text token, `max_length` out of range, with `overflow="error"` each
            record that is too long, and a split in which nothing is left.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token, so a model could not learn to stop; "
            "set its eos_token and save it, or give another --tokenizer_name"
        )
    template = load_template(config.template, tokenizer)
    max_length = resolve_max_length(config, tokenizer)
    _, ending = template_overhead(template, tokenizer)
    if max_length < 2 * (ending + 1):
        raise UserError(
            f"--max_length {max_length} leaves no room: the template's response header alone has {ending} tokens; "
            f"give at least {2 * (ending + 1)}"
        )
    arguments: dict[str, Any] = {"template": template, "max_length": max_length, "ending": ending}
    arguments |= {"mask_prompt": config.mask_prompt, "overflow": config.overflow}
    encoded = DatasetDict()
    for name, split in records.items():
        encoded[name] = split.map(
            encode_batch,
            batched=True,
            remove_columns=split.column_names,
            features=ENCODED_FEATURES,
            fn_kwargs={"tokenizer": tokenizer, **arguments},
            num_proc=config.num_proc,
            # our own fingerprint: hashing the tokenizer object misses the cache once it has been used
            new_fingerprint=_fingerprint(split, tokenizer, arguments),
            desc=f"Tokenizing {name}",
        )
    _check_encoded(records, encoded, config, max_length)
    return encoded


def encode_batch(
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    mask_prompt: bool,
    max_length: int,
    overflow: str,
    ending: int,
) -> pa.Table:
    """Encode a batch of records for `datasets.map`, from flat arrays straight into Arrow.

    A prompt is cut before its last `ending` tokens (the response header), a response at its end, so that it then has no
    end-of-text token to learn. `overflow="error"` leaves out as `"drop"` does; the caller reports what is missing.
    """
    inputs = zip(batch["instruction"], batch["input"], strict=True)
    prompts = template.prompts({"instruction": instruction, "input": text} for instruction, text in inputs)
    # separately, so that training sees the boundary between prompt and response that generation will see
    tokens, lengths = token_ids(tokenizer, [*itertools.chain.from_iterable(zip(prompts, batch["output"], strict=True))])
    tokens = np.insert(tokens, lengths.cumsum()[1::2], tokenizer.eos_token_id)
    lengths = lengths.reshape(-1, 2) + np.array([0, 1])  # (records, 2): prompt, and response with its end-of-text token
    labels = tokens.copy()
    if mask_prompt:
        labels[np.repeat(np.tile([True, False], len(lengths)), lengths.ravel())] = IGNORE_INDEX

    totals = lengths.sum(axis=1)
    too_long = totals > max_length
    kept = np.ones(len(totals), dtype=bool) if overflow == "truncate" else ~too_long
    keep = np.repeat(kept, totals)  # (tokens,)
    cut = cut_lengths(lengths, max_length)
    ends = totals.cumsum()
    for index in np.flatnonzero(too_long & kept):
        prompt_end = ends[index] - lengths[index, 1]
        removed_prompt, removed_response = lengths[index] - cut[index]
        keep[prompt_end - ending - removed_prompt : prompt_end - ending] = False
        keep[ends[index] - removed_response : ends[index]] = False
    offsets = np.concatenate([[0], cut[kept].sum(axis=1).cumsum()]).astype(np.int32)
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, tokens[keep]),
        "labels": pa.ListArray.from_arrays(offsets, labels[keep]),
        "length": np.diff(offsets),
        "row": np.array(batch["row"])[kept],
        "truncated": too_long[kept],
    }
    return pa.table(columns, schema=ENCODED_FEATURES.arrow_schema)


def cut_lengths(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Tokens of prompt and response, (records, 2), that are left when records are cut to `max_length`.

    The prompt is cut first, down to half of `max_length`; what is still too long is cut off the response.

    >>> cut_lengths(np.array([[30, 90], [80, 40], [30, 60]]), 100)
    array([[30, 70],
           [60, 40],
           [30, 60]])
    """
    prompt, response = lengths.T
    prompt = np.minimum(prompt, np.maximum(max_length - response, max_length // 2))
    return np.stack([prompt, np.minimum(response, max_length - prompt)], axis=1)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all texts in a row, without special ones, (tokens,) int32, and how many each has, (texts,) int64.

    Lists of numbers are not kept: thousands of them at a time make Python's garbage collector run again and again.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # Python tokenizers have none
    rows: Iterable[list[int]]
    if backend is not None and backend.truncation is None and backend.padding is None:
        # fast, because it does not compute character offsets
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        lengths, rows = [len(encoding) for encoding in encodings], (encoding.ids for encoding in encodings)
    else:
        rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        lengths = [len(ids) for ids in rows]
    tokens = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=sum(lengths))
    return tokens, np.array(lengths)


def resolve_max_length(config: DataArguments, tokenizer: PreTrainedTokenizerBase) -> int:
    """`max_length` in tokens: as given, or the tokenizer's own (1024 where that is not set)."""
    if config.max_length is not None:
        return config.max_length
    return tokenizer.model_max_length if tokenizer.model_max_length < 1_000_000 else 1024


def template_overhead(template: Template, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Tokens that begin and that end every prompt of a template: (preamble, response header).

    For Alpaca and the GPT-2 tokenizer (24, 6): up to `### Instruction:\\n`, and from `\\n\\n### Response:\\n`.
    """
    records = [{"instruction": "Name it.", "input": ""}, {"instruction": "8 + 5 = ?", "input": ""}]
    prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in template.prompts(records)]
    return _common_prefix(*prompts), _common_prefix(*(prompt[::-1] for prompt in prompts))


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _fingerprint(records: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    """Names the cached result of an encoding: the records, the code of this file, the tokenizer and the settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    settings = [str(value) for _, value in sorted(arguments.items())]
    code = Path(__file__).read_text(encoding="utf-8")
    # datasets shows `_fingerprint` in its guide to caching, and has no public name for it
    parts = [records._fingerprint, code, vocabulary, str(tokenizer.special_tokens_map), *settings]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _check_encoded(
    records: Mapping[str, Dataset], encoded: DatasetDict, config: DataArguments, max_length: int
) -> None:
    sources = config.data if isinstance(config.data, dict) else {"train": config.data}
    problems = []
    for name, split in encoded.items():
        if config.overflow == "error":
            rows, kept = (dataset.with_format("numpy")["row"][:] for dataset in (records[name], split))
            problems += [
                f"{sources.get(name, sources.get('train'))} {name} row {row}: longer than --max_length {max_length} "
                "tokens; shorten it, raise --max_length, or choose --overflow truncate or drop"
                for row in np.setdiff1d(rows, kept)
            ]
        elif len(split) == 0:
            problems.append(
                f"the {name} split is empty: all of its {len(records[name])} records are longer than --max_length "
                f"{max_length}; raise it or choose --overflow truncate"
            )
    if problems:
        raise UserError(problem_report(problems))


def token_statistics(records: Mapping[str, Dataset], encoded: Mapping[str, Dataset], preamble: int) -> list[dict]:
    """Token counts of each split, one dict a split; `preamble` is the template's, from `template_overhead`.

    `supervised` counts the targets of the loss: the first token of a record is never one.
    """
    statistics = []
    for name, split in encoded.items():
        table = split.with_format("arrow")[:]
        lengths = table["length"].to_numpy()
        learned = pc.list_flatten(table["labels"]).to_numpy() != IGNORE_INDEX
        learned[lengths.cumsum() - lengths] = False
        statistics.append(
            {
                "split": name,
                "rows": len(split),
                "tokens": len(learned),
                "longest": int(lengths.max()),
                "preamble": preamble * len(split) / len(learned),
                "supervised": int(learned.sum()) / len(learned),
                "truncated": pc.sum(table["truncated"]).as_py(),
                "dropped": len(records[name]) - len(split),
            }
        )
    return statistics
