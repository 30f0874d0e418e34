"""From records to tokens: prompt and response of each record, cut to length, and counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

from recipe.collator import IGNORE_INDEX
from recipe.config import DataArguments, UserError
from recipe.data.conversations import select_texts
from recipe.data.examples import Examples, as_rows, example_bounds, examples_of
from recipe.data.mixture import mix
from recipe.data.origin import origin, place
from recipe.data.records import LeftOut, in_one_line, no_good_record, problem_report, report_lines
from recipe.data.split import load_records
from recipe.templates import Template, common_prefix, load_template
from recipe.tokens import FlatTokens, Turn, encode_chats, encode_responses, not_as_text, prompt_ids, turn_of

# what decides an encoding beside tokenizer, template and settings
PARTS = ("templates.py", "sandbox_process.py", "tokens.py")
CODE = [Path(__file__), Path(__file__).with_name("examples.py"), *(Path(__file__).parents[1] / name for name in PARTS)]
LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow", "numpy")
COUNT, TOKENS = Value("int32"), List(Value("int32"))
ENCODED_FEATURES = Features(
    {"input_ids": TOKENS, "labels": TOKENS, "length": COUNT, "row": Value("int64"), "truncated": Value("bool")}
)
# of conversations: where each example of a row ends; the row's inputs, shared ones once; turns learned, and too long
OF_TURNS = Features({"ends": TOKENS, "inputs": COUNT, "turns": COUNT, "turns_left_out": COUNT})
ABOUT = ("reason", "problem")  # of a bad record: why it is one, in few words and in full; null for a good one
ALL_FEATURES = Features({**ENCODED_FEATURES, **OF_TURNS, **dict.fromkeys(ABOUT, Value("string"))})


def load_splits(config: DataArguments, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Records as tokens, ready for the collator: load, validate, split, encode.

    Returns:
        a `DatasetDict` of `train` (of a mixture, an epoch of it), `validation`, `test` and whatever other splits the
        data names, with the columns `input_ids` and `labels` (T,), aligned, not yet shifted, -100 over the prompt with
        `mask_prompt`; `length` in tokens; `row`, the record's number in the split it was read from, counted from 0;
        `truncated`. Of conversations also what `encode_records` says.

    Raises:
        UserError: see `load_records` and `encode_records`.

    Example::

        tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")
        splits = load_splits(DataArguments(data="instruction-data.json"), tokenizer)
        splits["train"][0]["labels"][-1] == tokenizer.eos_token_id
    """
    records, _ = load_records(config)
    return mix(encode_records(records, tokenizer, config), config)[0]


def encode_records(
    records: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, config: DataArguments
) -> DatasetDict:
    """Prompt and response of each record as tokens, one batched `datasets.map` per split, cached.

    Each response ends with one end-of-text token, also if the data has written it there. Elsewhere the text of a record
    is text: it becomes no special token. A record longer than `max_length` is cut (`overflow="truncate"`, see
    `cut_lengths`) or left out (`"drop"`). A bad record spells a special token that the tokenizer cannot read as text,
    or its response is nothing but the end-of-text token; with `bad_records="drop"` it is left out.

    Of a conversation each assistant turn that `learn` chooses is an example: what the template renders of its history,
    and the turn with the template's own end. `max_length` holds for each. Where an example begins with all of the one
    before it, both are one. The examples of a row that are left stand one after another in `input_ids`, and `ends` (k,)
    says where each ends; `inputs` counts the row's inputs, those in common once; `turns` what is learned,
    `turns_left_out` what is too long with `overflow="drop"`. Splits that need none of these columns do not have them.

    Raises:
        UserError: the tokenizer has no end-of-text token, `max_length` is too small, all records of a split are bad or
            too long, or with `overflow="error"` any record is too long, or any is bad; that message names each.
    """
    return encode_good_records(records, tokenizer, config, LeftOut())[1]


def encode_good_records(
    records: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, config: DataArguments, left_out: LeftOut
) -> tuple[DatasetDict, DatasetDict]:
    """`encode_records`, and the records without the bad ones that it has left out; these are added to `left_out`."""
    arguments = encoding_arguments(tokenizer, config)
    good, encoded, problems = dict(records), DatasetDict(), []
    for name, split in records.items():
        encoded[name], bad = _without_bad(encode_split(name, split, tokenizer, arguments, config.num_proc))
        if not bad:
            continue
        rows = split.with_format("numpy")["row"][:]
        is_bad = np.isin(rows, [one["row"] for one in bad])
        texts = select_texts(split.select(np.flatnonzero(is_bad)))
        bad = [one | origin(split, one["row"], name) | {"record": t} for one, t in zip(bad, texts, strict=True)]
        good[name] = split.select(np.flatnonzero(~is_bad))
        if config.bad_records == "error":
            problems += [line for one in bad for line in report_lines(one)]
        elif is_bad.all():
            problems.append(no_good_record(name, bad))
        left_out.bad += [one | {"problem": in_one_line(one["problem"])} for one in bad]
    problems += _length_problems(good, encoded, config, arguments["max_length"])
    if problems:
        raise UserError(problem_report(problems))
    return DatasetDict(good), encoded


def encode_split(name: str, split: Dataset, tokenizer: Any, arguments: dict[str, Any], num_proc: int | None) -> Dataset:
    """One batched `datasets.map`, with the `encoding_arguments`. A bad record has no tokens, and what is `ABOUT` it."""
    return split.map(
        encode_batch,
        batched=True,
        remove_columns=split.column_names,
        features=ALL_FEATURES,
        fn_kwargs={"tokenizer": tokenizer, **arguments},
        num_proc=num_proc,
        # our own: datasets would hash the tokenizer, whose hash changes with use, and miss the cache
        new_fingerprint=fingerprint(split, tokenizer, arguments),
        desc=f"Tokenizing {name}",
    )


def _without_bad(mapped: Dataset) -> tuple[Dataset, list[dict[str, Any]]]:
    """Encoded records without the bad ones, and for each of these its row and what is `ABOUT` it."""
    about = mapped.select_columns(["row", *ABOUT])
    table = mapped.select_columns(list(OF_TURNS)).with_format("arrow")[:]
    nothing = dict.fromkeys(("ends", "inputs"), table["ends"].null_count == len(mapped))
    nothing["turns"] = pc.max(table["turns"]).as_py() == 1
    nothing["turns_left_out"] = not pc.sum(table["turns_left_out"]).as_py()
    good = mapped.remove_columns([*ABOUT, *(name for name, is_so in nothing.items() if is_so)])
    reasons = about.with_format("arrow")[:]["reason"]
    if reasons.null_count == len(mapped):
        return good, []
    is_bad = pc.is_valid(reasons).to_numpy()
    return good.select(np.flatnonzero(~is_bad)), about.select(np.flatnonzero(is_bad)).to_list()


def encoding_arguments(tokenizer: PreTrainedTokenizerBase, config: DataArguments) -> dict[str, Any]:
    """The settings of `encode_batch`."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token, so a model could not learn to stop; "
            "set its eos_token and save it, or give another --tokenizer_name"
        )
    template = load_template(config.template, tokenizer)
    max_length = resolve_max_length(config, tokenizer)
    _, header_length = template_overhead(template, tokenizer)
    if max_length < 2 * (header_length + 1):
        raise UserError(
            f"--max_length {max_length} leaves no room: the template's response header alone has {header_length} "
            f"tokens; give at least {2 * (header_length + 1)}"
        )
    arguments: dict[str, Any] = {"template": template, "max_length": max_length, "header_length": header_length}
    arguments |= {"mask_prompt": config.mask_prompt, "overflow": config.overflow, "learn": config.learn}
    return arguments | {"turn": turn_of(template, tokenizer)}


def encode_batch(
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    turn: Turn,
    learn: str,
    mask_prompt: bool,
    max_length: int,
    overflow: str,
    header_length: int,
) -> pa.Table:
    """Encode a batch of records for `datasets.map`, from flat arrays straight into Arrow.

    A cut prompt loses tokens just before the response header, its last `header_length` tokens. A cut response loses its
    end, and with it the end-of-text token. `overflow="error"` leaves out what `"drop"` does; the caller reports it. A
    bad record has no tokens, and what is `ABOUT` it.
    """
    chats, texts, owners = examples_of(batch, template, learn)
    # separately, so that training sees the boundary between prompt and response that generation will see
    prompts, responses = encode_chats(template, tokenizer, chats), encode_responses(tokenizer, texts, turn)
    about = _about_bad(prompts, responses, turn.end, owners.tolist())
    good = ~np.isin(owners, [*about])
    lengths = np.stack([prompts.lengths, responses.lengths], axis=1)  # (examples, 2)
    in_prompt = np.repeat(np.tile([True, False], len(lengths)), lengths.ravel())  # (tokens,)
    tokens = np.empty(len(in_prompt), dtype=np.int32)
    tokens[in_prompt], tokens[~in_prompt] = prompts.tokens, responses.tokens
    labels = np.where(in_prompt, IGNORE_INDEX, tokens).astype(np.int32) if mask_prompt else tokens

    totals = lengths.sum(axis=1)
    too_long = (totals > max_length) & good
    if overflow == "error":
        too_long = np.isin(owners, owners[too_long])
    kept = np.ones(len(totals), dtype=bool) if overflow == "truncate" else ~too_long
    keep = np.repeat(kept & good, totals)  # (tokens,)
    cut = cut_lengths(lengths, max_length) * good[:, None]
    ends = totals.cumsum()
    for index in np.flatnonzero(too_long & kept):
        prompt_end = ends[index] - lengths[index, 1]
        removed_prompt, removed_response = lengths[index] - cut[index]
        keep[prompt_end - header_length - removed_prompt : prompt_end - header_length] = False
        keep[ends[index] - removed_response : ends[index]] = False
    examples = Examples(owners[kept], cut[kept].sum(axis=1), tokens[keep], labels[keep])
    rows, columns = as_rows(examples)
    columns["row"] = np.array(batch["row"])[rows]
    columns["truncated"] = np.isin(rows, owners[too_long & kept])
    columns["turns_left_out"] = np.bincount(owners[~kept], minlength=len(batch["row"]))[rows].astype(np.int32)
    for part, name in enumerate(ABOUT):
        said = [about[index][part] if index in about else None for index in rows.tolist()] if about else None
        columns[name] = pa.nulls(len(rows), pa.string()) if said is None else pa.array(said, pa.string())
    return pa.table(columns, schema=ALL_FEATURES.arrow_schema)


def _about_bad(
    prompts: FlatTokens, responses: FlatTokens, end: str, owners: Sequence[int]
) -> dict[int, tuple[str, str]]:
    """Why records of a batch are bad, in few words and in full, by their indices."""
    about: dict[int, tuple[str, str]] = {}
    for index, said in sorted(prompts.refused.items()):
        text = f": the template refuses it: {said}; fix it, remove the row, or choose another --template"
        about.setdefault(owners[index], ("the template refuses it", text))
    for index in sorted({*prompts.unreadable, *responses.unreadable}):
        token = prompts.unreadable.get(index) or responses.unreadable[index]
        reason = "spells a special token that the tokenizer cannot read as text"
        text = f": {not_as_text(token)}, remove the row, or choose another tokenizer"
        about.setdefault(owners[index], (reason, text))
    for index in np.flatnonzero(responses.lengths == 1).tolist():
        reason, before = "'output' is nothing but the end-of-text token", about.get(owners[index])
        text = f": 'output' is nothing but {end!r}, the end-of-text token; write a response or remove the row"
        about[owners[index]] = reason, f"{before[1]}\n{text}" if before else text
    return about


def cut_lengths(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """How many tokens of prompt and response, (records, 2), are left when records are cut to `max_length`.

    The prompt is cut first, down to half of `max_length`. If the record is still too long, its response is cut too.

    >>> cut_lengths(np.array([[30, 90], [80, 40], [30, 60]]), 100)
    array([[30, 70],
           [60, 40],
           [30, 60]])
    """
    prompt, response = lengths.T
    prompt = np.minimum(prompt, np.maximum(max_length - response, max_length // 2))
    return np.stack([prompt, np.minimum(response, max_length - prompt)], axis=1)


def resolve_max_length(config: DataArguments, tokenizer: PreTrainedTokenizerBase) -> int:
    """`max_length` in tokens: as given, or the tokenizer's own (1024 where that is not set)."""
    if config.max_length is not None:
        return config.max_length
    return tokenizer.model_max_length if tokenizer.model_max_length < 1_000_000 else 1024


def template_overhead(template: Template, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """How many tokens all prompts begin with (the preamble), and how many they end with (the response header).

    For Alpaca and the GPT-2 tokenizer (24, 6): up to `### Instruction:\\n`, and from `\\n\\n### Response:\\n`.
    """
    records = [{"instruction": "Name it.", "input": ""}, {"instruction": "8 + 5 = ?", "input": ""}]
    prompts = prompt_ids(template, tokenizer, records)
    return len(common_prefix(prompts)), len(common_prefix([prompt[::-1] for prompt in prompts]))


def fingerprint(records: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    """Identifies a cached encoding by all that decides it, the code and the libraries included."""
    code = [path.read_text(encoding="utf-8") for path in CODE]
    libraries = [f"{name} {metadata.version(name)}" for name in LIBRARIES]
    settings = [f"{name}={value!r}" for name, value in sorted(arguments.items())]
    # datasets shows `_fingerprint` in its guide to caching, and has no public name for it
    parts = [records._fingerprint, *code, *libraries, *tokenizer_state(tokenizer), *settings]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All of a tokenizer that decides which tokens a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    added = [f"{index} {token!r}" for index, token in sorted(tokenizer.added_tokens_decoder.items())]
    own_settings = (
        [f"{name}={value!r}" for name, value in sorted(tokenizer.init_kwargs.items())] if backend is None else []
    )
    roles = [f"{role}={text}" for role, text in sorted(tokenizer.special_tokens_map.items())]
    return [type(tokenizer).__qualname__, vocabulary, *added, *own_settings, *roles, *tokenizer.all_special_tokens]


def _length_problems(
    records: Mapping[str, Dataset], encoded: DatasetDict, config: DataArguments, max_length: int
) -> list[str]:
    """The records that are too long with `overflow="error"`, and else the splits of which none is left."""
    problems = []
    for name, split in encoded.items():
        if config.overflow == "error":
            rows, kept = (dataset.with_format("numpy")["row"][:] for dataset in (records[name], split))
            problems += [
                f"{place(records[name], row, name)}: longer than --max_length {max_length} tokens; shorten it, raise "
                "--max_length, or choose --overflow truncate or drop"
                for row in np.setdiff1d(rows, kept).tolist()
            ]
        elif len(split) == 0 and len(records[name]):
            problems.append(
                f"the {name} split is empty: all of its {len(records[name])} records are longer than --max_length "
                f"{max_length}; raise it or choose --overflow truncate"
            )
    return problems


def token_statistics(records: Mapping[str, Dataset], encoded: Mapping[str, Dataset], preamble: int) -> list[dict]:
    """Token counts of each split, one dict per split; `preamble` is its length in tokens, from `template_overhead`.

    `preamble` and `supervised` are shares of the tokens. The first token of an example is never supervised. Splits with
    conversations also have `turns`, which are learned, and `turns_left_out` if some are too long.
    """
    statistics = []
    for name, split in encoded.items():
        table = split.with_format("arrow")[:]
        lengths = table["length"].to_numpy()
        supervised = pc.list_flatten(table["labels"]).to_numpy() != IGNORE_INDEX
        starts, _ = example_bounds(table)
        supervised[starts] = False
        turns = {
            name: pc.sum(table[name]).as_py() for name in ("turns", "turns_left_out") if name in table.column_names
        }
        statistics.append(
            {
                "split": name,
                "rows": len(split),
                "tokens": len(supervised),
                "mean": len(supervised) / len(split),
                "longest": int(lengths.max()),
                "preamble": preamble * len(starts) / len(supervised),
                "supervised": int(supervised.sum()) / len(supervised),
                "truncated": pc.sum(table["truncated"]).as_py(),
                "dropped": len(records[name]) - len(split),
                **turns,
            }
        )
    return statistics
