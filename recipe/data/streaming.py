"""Records that need not fit into memory: read while training, shuffled in a buffer, made tokens on the way.

Each process reads shards of its own, and each of its workers some of these. What a pass over the data gives follows
from the settings, the number of the pass, the processes and the workers alone: a resumed run reads again what it has
seen, and goes on at the very record.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from datasets.distributed import split_dataset_by_node
from transformers import PreTrainedTokenizerBase

from recipe.config import DataArguments, UserError
from recipe.data.columns import TEXTS, Columns, UnreadableFileError
from recipe.data.encode import ABOUT, encode_batch, encoding_arguments
from recipe.data.file_kinds import open_bytes
from recipe.data.mixture import is_mixture
from recipe.data.origin import RecordsInfo, origin
from recipe.data.readers import stream_file
from recipe.data.records import LeftOut, columns_of, files_by_split, in_one_line, read_records
from recipe.data.sources import File
from recipe.data.split import beginning_hash, drop_cross_split_duplicates, split_of

READ_AT_ONCE = 32  # records; readers of one file take turns by so many
ENCODED_AT_ONCE = 1_000
MOST_VALIDATION = 1_000  # records that a stream gives for validation
ROWS = 2**40  # between the numbers of the first records of two files, whose lengths nobody knows
ENDS = 2**16  # bytes of a file's beginning and end that tell whether it is the same
# of the training split, in run.json: nobody has counted
UNKNOWN = {"split": "train", **dict.fromkeys(("rows", "tokens", "longest", "supervised"))}
STOP = "stop"  # the reason that ends the run


class RecordStream(torch.utils.data.IterableDataset):
    """The training records of a stream, pass after pass without end, each pass shuffled anew.

    Iterating gives for each good record what `DataCollatorForInstructionTuning` takes, `input_ids`, `labels`, `row` and
    `ends`; for each bad one `file`, `split`, `row`, `reason`, `problem` and `record`, a line of `bad_records.jsonl`.
    A file that cannot be read to its end, and a pass without any good record, come as a bad record with the reason
    `STOP`.

    Args:
        ratios: what is held out of the files, by split: see `recipe.data.split.split_of`.
        held_out: hashes of the records of other splits, which are left out: see `beginning_hash`.
        seed: of the order.
    """

    def __init__(
        self, config: DataArguments, tokenizer: PreTrainedTokenizerBase, files: Sequence[File],
        ratios: dict[str, float], held_out: frozenset[int], seed: int = 0, rank: int = 0, processes: int = 1,
    ) -> None:  # fmt: skip
        self.config, self.files, self.ratios, self.held_out, self.seed = config, files, ratios, held_out, seed
        self.rank, self.processes = rank, processes
        self.tokenizer, self.arguments = tokenizer, encoding_arguments(tokenizer, config)
        self.info = RecordsInfo()
        for file in files:
            self.info.add_file(file.name, "train", 0, ROWS)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            records, found = iter(self.one_pass(number)), False
            while chunk := list(itertools.islice(records, ENCODED_AT_ONCE)):
                bad = [record for record in chunk if record["reason"] is not None]
                for one in bad:
                    yield self._about(one["row"], one["reason"], one["problem"], one["record"])
                    if one["reason"] == STOP:
                        return
                for record in self._encoded([record for record in chunk if record["reason"] is None]):
                    found = found or "input_ids" in record
                    yield record
            if not found:
                said = (
                    "the training data has no good record for one of its readers (processes × dataloader_num_workers)"
                )
                yield self._about(-1, STOP, said, None)
                return

    def one_pass(self, number: int) -> IterableDataset:
        """The records of this process in one pass over the data, good and bad, as texts."""
        worker = torch.utils.data.get_worker_info()
        readers = self.processes * (1 if worker is None else worker.num_workers)
        parts = readers // math.gcd(len(self.files), readers)  # of each file, so that each reader has as many
        shards = [
            (file.path, file.kind, first, part, parts)
            for file, first in zip(self.files, self.info.first_rows, strict=True)
            for part in range(parts)
        ]
        options = {"columns": columns_of(self.config), "config": self.config, "ratios": self.ratios}
        stream = IterableDataset.from_generator(
            read_shards, gen_kwargs={"shards": shards, **options, "held_out": self.held_out}
        )
        stream = split_dataset_by_node(stream, rank=self.rank, world_size=self.processes)
        generator = np.random.default_rng([self.seed, number])
        return stream.shuffle(generator=generator, buffer_size=self.config.shuffle_buffer)

    def first(self, count: int) -> Dataset:
        """The first good records of a pass as a dataset, to try something with."""
        good = (record for record in self if "input_ids" in record)
        return Dataset.from_list(list(itertools.islice(good, count)))

    def _encoded(self, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        if not records:
            return
        batch = {name: [record[name] for record in records] for name in (*TEXTS, "row")}
        table = encode_batch(batch, self.tokenizer, **self.arguments)
        by_row = {record["row"]: {name: record[name] for name in TEXTS} for record in records}
        tokens, labels = (pc.list_flatten(table[name]).to_numpy() for name in ("input_ids", "labels"))
        ends = table["length"].to_numpy().cumsum()
        rest = zip(*(table[name].to_pylist() for name in ("row", "ends", *ABOUT)), strict=True)
        for end, length, (row, examples, reason, problem) in zip(ends, table["length"].to_numpy(), rest, strict=True):
            texts = by_row.pop(row)
            if reason is not None:
                yield self._about(row, reason, problem, texts)
                continue
            own = slice(end - length, end)
            yield {"input_ids": tokens[own], "labels": labels[own], "row": row, "ends": examples}
        if self.config.overflow == "error":  # what has no row is too long
            limit = f"longer than --max_length {self.arguments['max_length']} tokens"
            advice = "shorten it, raise --max_length, or choose --overflow truncate or drop"
            for row, texts in by_row.items():
                yield self._about(row, limit, f": {limit}; {advice}", texts)

    def _about(self, row: int, reason: str, problem: str, record: Any) -> dict[str, Any]:
        where = origin(self, row) if reason != STOP else {"file": None, "split": "train", "row": None}
        record = json.loads(record) if isinstance(record, str) else record
        return {**where, "reason": reason, "problem": in_one_line(problem), "record": record}


def read_shards(
    shards: list[tuple], columns: Columns, config: DataArguments, ratios: dict[str, float], held_out: frozenset[int],
    split: str = "train",
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The records of a split in these parts of files, good and bad, as `recipe.data.readers.SCHEMA` has them."""
    for path, kind, first, part, parts in shards:
        try:
            for batch in stream_file(path, kind, columns, READ_AT_ONCE, part, parts):
                records = batch.to_pylist()
                for record, own in zip(records, _splits_of(records, config, ratios), strict=True):
                    record["row"] += first
                    if record["reason"] or (own == split and not (held_out and beginning_hash(record) in held_out)):
                        yield record
        except UnreadableFileError as error:
            lines = [f"{path}{line}" for line in str(error).split("\n")]
            nothing: dict[str, Any] = dict.fromkeys((*TEXTS, "family", "extra", "unanswered", "record"))
            yield {**nothing, "row": -1, "reason": STOP, "problem": "\n".join(lines)}


def _splits_of(records: list[dict[str, Any]], config: DataArguments, ratios: dict[str, float]) -> list[str]:
    if not ratios:
        return ["train"] * len(records)
    key = str(config.split_seed)
    hashes = [0 if record["reason"] else beginning_hash(record, key) for record in records]
    return split_of(np.array(hashes, dtype=np.uint64), ratios).tolist()


def load_stream(
    config: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int, rank: int = 0, processes: int = 1
) -> tuple[RecordStream, DatasetDict, LeftOut]:
    """A stream of the training records, and the records of the other splits, not yet tokenized.

    Splits that the data names are read whole. Else a record's hash decides its split, by `validation_ratio` and
    `test_ratio`, and for validation the first `MOST_VALIDATION` of its records are taken; those for testing are left to
    the evaluation.

    Raises:
        UserError: a mixture, or data that cannot be streamed; bad data in the other splits.
    """
    if is_mixture(config.data):
        raise UserError(
            "--streaming takes one source: a mixture is drawn from all records of its sources; leave --streaming out"
        )
    if not config.data:
        raise UserError("no data: name a file, a glob, a folder or a Hub dataset id with --data")
    left_out = LeftOut()
    by_split = files_by_split(config.data, left_out.notes, download=False)
    files = by_split.pop("train", [])
    if not files or any(file.path is None for file in files):
        what = "no train split" if not files else "not in files of a known format"
        raise UserError(f"--streaming, data {config.data}: {what}; give .json, .jsonl, .csv or .parquet files")
    others = DatasetDict()
    if by_split:
        read, left_out = read_records(config, only=by_split)
        others, left_out.duplicates = drop_cross_split_duplicates(read)
    wanted = {"test": config.test_ratio, "validation": config.validation_ratio}
    ratios = {name: ratio for name, ratio in wanted.items() if name not in by_split and ratio > 0}
    texts = (record for split in others.values() for record in split)
    held_out = frozenset(beginning_hash(record) for record in texts)
    stream = RecordStream(config, tokenizer, files, ratios, held_out, seed, rank, processes)
    if "validation" in ratios and len(taken := _take_validation(stream)):
        others["validation"] = taken
    return stream, others, left_out


def _take_validation(stream: RecordStream) -> Dataset:
    shards = [(f.path, f.kind, first, 0, 1) for f, first in zip(stream.files, stream.info.first_rows, strict=True)]
    found = read_shards(shards, columns_of(stream.config), stream.config, stream.ratios, stream.held_out, "validation")
    records = list(itertools.islice((record for record in found if not record["reason"]), MOST_VALIDATION))
    names = [*TEXTS, "family"] if any(record["messages"] for record in records) else [*TEXTS[:-1], "family"]
    features = Features({**dict.fromkeys(names, Value("string")), "row": Value("int64")})
    columns = {name: [record[name] for record in records] for name in features}
    taken = Dataset(pa.table(columns, schema=features.arrow_schema), info=RecordsInfo(features=features))
    taken.info.take_files(stream.info)
    return taken


def files_hash(stream: RecordStream) -> str:
    """A hash of the files by their size, beginning and end, without reading them: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in stream.files:
        path = str(file.path)
        if "://" in path:  # on the Hub, it holds the commit
            digest.update(path.encode())
            continue
        size = Path(path).stat().st_size
        with open_bytes(path) as content:
            digest.update(f"{size} ".encode() + content.read(ENDS))
            content.seek(max(0, size - ENDS))
            digest.update(content.read())
    return digest.hexdigest()[:16]
