"""Micro-batches of a stream of records, and what becomes of the bad records on the way."""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from recipe.config import UserError
from recipe.data.records import report_lines
from recipe.data.streaming import STOP, RecordStream
from recipe.training.sampling import TokenBudgetBatches, budget_batches

WINDOW = 1_000  # records from which batches of a token budget are made
BAD = "bad"  # the key of a batch under which bad records travel to the trainer


class StreamedBatches(torch.utils.data.IterableDataset):
    """The micro-batches of one process: the features of each, and the bad records that were met before it.

    With `max_tokens_per_batch`, `WINDOW` records at a time are put into batches as `TokenBudgetBatches` does; else each
    batch has the next `batch_size` records. Batches are full also where a pass over the data ends.
    """

    def __init__(self, stream: RecordStream, args: TrainingArguments, batch_size: int, collate: Any) -> None:
        self.stream, self.args, self.batch_size, self.collate = stream, args, batch_size, collate

    def __iter__(self) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        bad: list[dict[str, Any]] = []
        good = _without_bad(self.stream, bad)
        budget = getattr(self.args, "max_tokens_per_batch", None)
        windows = iter(lambda: list(itertools.islice(good, WINDOW if budget else self.batch_size)), [])
        for number, window in enumerate(windows):
            try:
                batches = self._within_budget(window, number) if budget else [range(len(window))]
            except ValueError as error:  # a record is longer than the budget
                bad.append({"reason": STOP, "problem": str(error)})
                break
            for batch in batches:
                yield [window[index] for index in batch], bad[:]
                bad.clear()
        yield [], bad

    def _within_budget(self, window: list[dict[str, Any]], number: int) -> TokenBudgetBatches:
        ends = [record["ends"] or [len(record["input_ids"])] for record in window]
        records = [record | {"length": end[-1], "ends": end} for record, end in zip(window, ends, strict=True)]
        batches = budget_batches(Dataset.from_list(records, info=self.stream.info.copy()), self.args, self.collate, 1)
        batches.set_epoch(number)
        return batches


def _without_bad(stream: RecordStream, bad: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in stream:
        if "input_ids" in record:
            yield record
        else:
            bad.append(record)
            if record["reason"] == STOP or stream.config.bad_records == "error":
                return


def stream_loader(stream: RecordStream, args: TrainingArguments, batch_size: int, collate: Callable) -> DataLoader:
    """The batches of this process on its device; the stream itself shares out the records."""
    workers: dict[str, Any] = (
        {"prefetch_factor": args.dataloader_prefetch_factor} if args.dataloader_num_workers else {}
    )
    loader = DataLoader(
        StreamedBatches(stream, args, batch_size, collate),
        batch_size=None,
        collate_fn=functools.partial(_collated, collate),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        **workers,
    )
    device: Any = {"device": args.device, "put_on_device": True, "dispatch_batches": False}
    return prepare_data_loader(loader, num_processes=1, process_index=0, **device)


def _collated(collate: Callable, parts: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> dict[str, Any]:
    features, bad = parts
    batch = collate(features) if features else {}
    return batch | ({BAD: json.dumps(bad)} if bad else {})


class Quarantine(TrainerCallback):
    """Keeps bad records out of training: notes them in `bad_records.jsonl`, counts them, and stops where it must.

    A record is noted when its batch is used, once, whatever the number of passes and of resumed runs.

    Example::

        quarantine = Quarantine(stream, output_dir)
        trainer.add_callback(quarantine)
        quarantine.take(batch)  # of each batch
    """

    def __init__(self, stream: RecordStream, output_dir: str | None) -> None:
        self.config, self.path = stream.config, Path(output_dir or "") / "bad_records.jsonl"
        self.waiting: list[dict[str, Any]] = []  # what is not in the file yet
        self.reasons: Counter[str] = Counter()

    def take(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch without its bad records, which wait until the run has taken its folder.

        Raises:
            UserError: no bad record is allowed, or the data ends here.
        """
        bad = json.loads(batch.pop(BAD, "[]"))
        for record in bad:
            if record["reason"] == STOP:
                raise UserError(f"--streaming: {record['problem']}")
            if self.config.bad_records == "error":
                first = report_lines(record | {"problem": f": {record['problem']}"})[0]
                raise UserError(
                    f"{first}\n--streaming stops at the first bad record; --bad_records drop leaves bad ones out, and "
                    "writes them to bad_records.jsonl"
                )
        self.waiting += bad
        return batch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what waits: from here on, the folder is the run's own.

        Raises:
            UserError: more records are bad than are allowed.
        """
        if not self.waiting:
            return
        noted = self._read()
        known = {(record["file"], record["row"]) for record in noted}
        new = [record for record in self.waiting if (record["file"], record["row"]) not in known]
        self.waiting = []
        with self.path.open("a", encoding="utf-8") as file:  # other processes write there too, whole lines at once
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new))
        noted += new
        self.reasons = Counter(record["reason"] for record in noted)
        limit = self.config.max_bad_records
        if limit is not None and len(noted) > limit:
            reasons = ", ".join(f"{reason} ({count:,})" for reason, count in self.reasons.most_common(3))
            raise UserError(
                f"--max_bad_records {limit:,}: {len(noted):,} records are bad until step {state.global_step + 1:,}: "
                f"{reasons}; each is in {self.path}. Mend them, or allow more"
            )

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
