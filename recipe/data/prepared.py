"""Records that were tokenized once: a folder of Parquet shards with a manifest, which training reads as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from recipe.config import DataArguments, UserError
from recipe.data.encode import (
    encode_good_records,
    encoding_arguments,
    template_overhead,
    token_statistics,
    tokenizer_state,
)
from recipe.data.origin import RecordsInfo
from recipe.data.special_text import count_special_text, find_special_text, special_text_note
from recipe.data.split import data_hash, load_records
from recipe.files import draft_of, file_hash, read_sealed, write_sealed
from recipe.shapes import COUNT

MANIFEST = "prepared.json"
SHAPE = {"key": {str: object}, "data": {str: object}, "about": {str: object}, "files": {str: str},
         "splits": {str: [str]}, "origin": {str: {str: object}}, "notes": [str], "rows": COUNT}  # fmt: skip
OF_RECORDS = ("files", "first_rows", "read_as", "sources", "source_of_file", "records")
WHICH = ("data", "validation_ratio", "test_ratio", "split_seed", "bad_records", "instruction_column", "input_column",
         "output_column", "messages_column")  # fmt: skip


@dataclass
class Prepared:
    """The splits of a run, as text and as tokens, and what run.json says of them."""

    records: Mapping[str, Dataset]  # of a prepared folder without `train`
    splits: DatasetDict
    bad: list[dict[str, Any]]
    about: dict[str, Any]
    notes: list[str]


def is_prepared(data: Any) -> bool:
    """Whether `data` is a folder that `scripts/prepare.py` has written."""
    return isinstance(data, str) and (Path(data) / MANIFEST).is_file()


def prepare_records(config: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Load, validate, split and encode the records, and count what there is."""
    template = encoding_arguments(tokenizer, config)["template"]
    loaded, left_out = load_records(config)
    records, splits = encode_good_records(loaded, tokenizer, config, left_out)
    preamble, _ = template_overhead(template, tokenizer)
    statistics, special_text = token_statistics(records, splits, preamble), find_special_text(records, tokenizer)
    note = special_text_note(special_text, tokenizer)
    rows = {key: sum(row[key] for row in statistics) for key in ("dropped", "truncated")}
    about = {
        # by which evaluation, whose tokenizer may be another, finds the test split again
        "data_hash": data_hash(loaded),
        "splits": {row["split"]: row for row in statistics},
        "rows": rows
        | {"left_out_of_train_as_duplicates": left_out.duplicates, "bad": len(left_out.bad)}
        | count_special_text(special_text),
        "bad_records": left_out.reasons,
    }
    return Prepared(records, splits, left_out.bad, about, [*left_out.notes, *([note] if note else [])])


def save_prepared(
    prepared: Prepared, folder: Path, config: DataArguments, tokenizer: PreTrainedTokenizerBase, shard_records: int
) -> dict[str, Any]:
    """Write the shards, and last the manifest; shards that an interrupted call has written are kept.

    Returns:
        the manifest.
    """
    key = decides(config, tokenizer)
    stamp = hashlib.sha256(repr((key, prepared.about, shard_records)).encode()).hexdigest()[:12]
    splits: dict[str, list[str]] = {}
    parts = {
        **prepared.splits,
        **{f"records-{name}": each for name, each in prepared.records.items() if name != "train"},
    }
    for name, split in parts.items():
        count = max(1, -(-len(split) // shard_records))
        splits[name] = [f"{name}-{index:05}-of-{count:05}-{stamp}.parquet" for index in range(count)]
        for index, file in enumerate(splits[name]):
            if not (folder / file).is_file():  # the name tells what is in it
                with draft_of(folder / file) as draft:
                    split.shard(count, index, contiguous=True).to_parquet(str(draft))
    manifest = {
        "key": key,
        "data": {name: getattr(config, name) for name in WHICH},
        "about": prepared.about,
        "files": {file: file_hash(folder / file) for each in splits.values() for file in each},
        "splits": splits,
        "origin": {
            name: {part: getattr(split.info, part) for part in OF_RECORDS} for name, split in prepared.splits.items()
        },
        "notes": prepared.notes,
        "rows": sum(map(len, prepared.splits.values())),
    }
    write_sealed(folder / MANIFEST, manifest)
    return manifest


def load_prepared(config: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The shards of the folder `config.data`, memory-mapped; `config` becomes that of its records.

    Raises:
        UserError: tokenizer, template or settings are others than those the folder was made with; a shard is missing
            or damaged.
    """
    folder = Path(str(config.data))
    manifest = read_sealed(folder / MANIFEST, SHAPE, "prepare it again")
    now = decides(config, tokenizer)
    if changed := [name for name in now if manifest["key"].get(name) != now[name]]:
        raise UserError(
            f"--data {folder} was prepared with another {', '.join(changed)}; give the former one, or prepare it again"
        )
    for file, before in manifest["files"].items():
        if not (folder / file).is_file() or file_hash(folder / file) != before:
            raise UserError(f"--data {folder}: {file} is missing or damaged; remove it and prepare the folder again")
    found = {
        name: load_dataset("parquet", data_files=[str(folder / file) for file in files], split="train")
        for name, files in manifest["splits"].items()
    }
    records = {name.removeprefix("records-"): each for name, each in found.items() if name.startswith("records-")}
    splits = DatasetDict({name: each for name, each in found.items() if not name.startswith("records-")})
    for name, split in splits.items():
        split._info = RecordsInfo(**{**vars(split.info), **manifest["origin"][name]})
    for name, value in manifest["data"].items():
        setattr(config, name, value)
    return Prepared(records, splits, [], manifest["about"], manifest["notes"])


def decides(config: DataArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """By name, what decides the tokens of a record: hashes of tokenizer and template, and settings."""
    arguments = encoding_arguments(tokenizer, config)
    template = asdict(arguments["template"])
    text = repr(sorted((name, value) for name, value in template.items() if name not in ("name", "source")))
    state = "\0".join(tokenizer_state(tokenizer))
    hashes = {"tokenizer": state, "template": text}
    return {
        **{name: hashlib.sha256(value.encode()).hexdigest()[:16] for name, value in hashes.items()},
        **{name: arguments[name] for name in ("max_length", "mask_prompt", "overflow", "learn")},
    }
