"""Train, validation and test splits that share no record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from recipe.config import DataArguments, UserError
from recipe.data.conversations import beginning_of, select_texts, texts_of
from recipe.data.origin import source_names, source_of_rows
from recipe.data.records import LeftOut, read_records

MOST_WAYS = 3  # in which conversations go on that begin alike


def load_records(config: DataArguments) -> tuple[DatasetDict, LeftOut]:
    """Validated records in splits, not yet tokenized: see `recipe.data.records.read_records` for the columns.

    Splits that the data names are kept. A missing `validation` or `test` is taken from `train`, by `validation_ratio`
    and `test_ratio`; the choice depends on their content and `split_seed` alone. No two splits share a record.

    Returns:
        the splits, and what was left out: how many `duplicates` of `train` and `validation` because a later split has
        them too, and with `bad_records` "drop" the `bad` records, with file, row and reason.

    Raises:
        UserError: bad data (see `read_records`), too few records to split, a split whose records are all in later ones.
    """
    if config.streaming:  # training left bad records out
        config = replace(config, bad_records="drop")
    read, left_out = read_records(config)
    splits, left_out.duplicates = drop_cross_split_duplicates(split_by_content(read, config))
    return splits, left_out


def split_by_content(splits: DatasetDict, config: DataArguments) -> DatasetDict:
    """Take a missing `validation` and `test` out of `train`.

    Records are ranked by a keyed hash of their content: the order of the file does not matter, those that may not be in
    two splits have neighbouring ranks, and the cut between two splits moves past them. Of a mixture, each source is
    split on its own.
    """
    names = source_names(next(iter(splits.values()), None))
    if not names:
        return _split(splits, config)
    parts: dict[str, list[Dataset]] = {}
    for index, name in enumerate(names):
        own = DatasetDict()
        for split, records in splits.items():
            rows = np.flatnonzero(source_of_rows(records.info, records.with_format("numpy")["row"][:]) == index)
            if len(rows):
                own[split] = records.select(rows)
        try:
            found = _split(own, config)
        except UserError as error:
            raise UserError(f"data, source {name!r}: {error}") from error
        for split, records in found.items():
            parts.setdefault(split, []).append(records)
    order = dict.fromkeys(["train", "validation", "test", *parts])
    return DatasetDict({split: concatenate_datasets(parts[split]) for split in order if split in parts})


def _split(splits: DatasetDict, config: DataArguments) -> DatasetDict:
    ratios = {"test": config.test_ratio, "validation": config.validation_ratio}
    wanted = {name: ratio for name, ratio in ratios.items() if name not in splits and ratio > 0}
    if "train" not in splits or not wanted:
        return splits
    train = splits["train"]
    if config.streaming:
        hashes = np.array([beginning_hash(record, str(config.split_seed)) for record in _records(train)], np.uint64)
        return _with_parts(
            splits, {name: np.flatnonzero(split_of(hashes, wanted) == name) for name in (*wanted, "train")}
        )
    hashes = group_hashes({"train": train}, key=str(config.split_seed))["train"]
    ranked = np.argsort(hashes, kind="stable")
    parts, start = {}, 0
    for name, ratio in wanted.items():
        end = min(start + max(1, round(ratio * len(train))), len(train))
        while end < len(train) and hashes[ranked[end]] == hashes[ranked[end - 1]]:
            end += 1
        parts[name] = np.sort(ranked[start:end])
        start = end
    if start == len(train):
        raise UserError(
            f"{len(train)} records ({len(np.unique(hashes))} different) are too few to split into train, "
            f"{' and '.join(wanted)}; give more records, or set " + " and ".join(f"--{name}_ratio 0" for name in wanted)
        )
    return _with_parts(splits, {**parts, "train": np.sort(ranked[start:])})


def _with_parts(splits: DatasetDict, rows: Mapping[str, np.ndarray]) -> DatasetDict:
    """The splits, with these rows of `train` for some."""
    parts = {**splits, **{name: splits["train"].select(each) for name, each in rows.items() if len(each)}}
    order = dict.fromkeys(["train", "validation", "test", *splits])
    return DatasetDict({name: parts[name] for name in order if name in parts})


def split_of(hashes: np.ndarray, ratios: Mapping[str, float]) -> np.ndarray:
    """The split of each record of a stream, by its hash alone: it needs no other record, and any order gives the same.

    >>> split_of(np.array([0, 2**61, 2**63], dtype=np.uint64), {"test": 0.1, "validation": 0.05}).tolist()
    ['test', 'validation', 'train']
    """
    names = np.array([*ratios, "train"])
    return names[np.searchsorted(np.cumsum([*ratios.values()]), hashes / 2.0**64, side="right")]


def beginning_hash(record: Mapping[str, Any], key: str = "") -> int:
    """A 64-bit hash of what decides the split of a streamed record: all, or a conversation up to its first answer."""
    return _hash(beginning_of(record, 1)[0], key)


def drop_cross_split_duplicates(splits: DatasetDict) -> tuple[DatasetDict, int]:
    """Drop and count the records of `train` and `validation` that a later split has too: see `group_hashes`.

    Test splits stay as they are, so that scores on a published one stay comparable.

    Raises:
        UserError: all records of a split are also in later ones.
    """
    kept, dropped = dict(splits), 0
    hashes = group_hashes(splits)
    for name in ("train", "validation"):
        own = hashes.pop(name, None)  # then only later splits are left in `hashes`
        if own is None or not hashes:
            continue
        in_later = np.isin(own, np.concatenate(list(hashes.values())), kind="sort")
        if in_later.all():
            later = " or ".join(hashes)
            raise UserError(f"all records of the {name} split are also in {later}; add others")
        if in_later.any():
            kept[name] = splits[name].select(np.flatnonzero(~in_later))
            dropped += int(in_later.sum())
    return DatasetDict(kept), dropped


def group_hashes(splits: Mapping[str, Dataset], key: str = "") -> dict[str, np.ndarray]:
    """A 64-bit hash of each record, (records,) uint64: equal where two may not be in different splits.

    Of a conversation it is that of its beginning, up to the first answer. Where more than `MOST_WAYS` different
    messages follow a beginning, it is a greeting or a worked example, and the beginning goes on to the next answer.
    """
    found = {name: np.zeros((len(split), 2), np.uint64) for name, split in splits.items()}
    rows, answers = {name: np.arange(len(split)) for name, split in splits.items()}, 0
    while any(map(len, rows.values())):
        answers += 1
        for name, which in rows.items():
            parts = (beginning_of(record, answers) for record in _records(splits[name].select(which)))
            hashes = [[_hash(part, key) if part else 0 for part in each] for each in parts]
            found[name][which] = np.array(hashes, dtype=np.uint64).reshape(-1, 2)  # a beginning, and what follows it
        ways = np.unique(np.concatenate([*found.values()]), axis=0)
        beginnings, counts = np.unique(ways[ways[:, 1] > 0, 0], return_counts=True)
        common = beginnings[counts > MOST_WAYS]
        # not by a table, which numpy 2.0 cannot make of numbers above 2**63
        goes_on = {name: np.isin(f[:, 0], common, kind="sort") & (f[:, 1] > 0) for name, f in found.items()}
        rows = {name: np.flatnonzero(each) for name, each in goes_on.items()}
    return {name: each[:, 0] for name, each in found.items()}


def content_hashes(dataset: Dataset) -> np.ndarray:
    """A 64-bit hash of all that each record says, (records,) uint64; the same on every machine."""
    return np.array([_hash(texts_of(record)) for record in _records(dataset)], dtype=np.uint64)


def _records(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for batch in select_texts(dataset).iter(batch_size=10_000):
        yield from (dict(zip(batch, fields, strict=True)) for fields in zip(*batch.values(), strict=True))


def _hash(part: Any, key: str = "") -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(part).encode(), digest_size=8, key=key.encode()).digest())


def data_hash(splits: Mapping[str, Dataset]) -> str:
    """A hash of every record of every split, in order: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(name.encode() + content_hashes(splits[name]).tobytes())
    return digest.hexdigest()[:16]
