"""Reads records and refuses bad ones: every problem of every file in one report, before anything is trained.

Rows in messages count from 0, as `dataset[i]` does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, concatenate_datasets

from recipe.config import DataArguments, UserError
from recipe.data.columns import FIELDS, Columns, UnreadableFileError
from recipe.data.mixture import Source, sources_of
from recipe.data.origin import RecordsInfo
from recipe.data.sources import Files, find_source
from recipe.data.split_names import by_meaning

LONGEST_REPORT = 100  # problems listed in one report; the rest are counted


@dataclass
class LeftOut:
    """What of the data is not used: records that a later split has too, bad ones, and files."""

    duplicates: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)  # file, split, row, reason, problem, record
    notes: list[str] = field(default_factory=list)  # of files, in words

    @property
    def reasons(self) -> dict[str, int]:
        """How many records are bad for which reason, the most frequent first."""
        return dict(Counter(record["reason"] for record in self.bad).most_common())


def read_records(
    config: DataArguments, extra: tuple[str, ...] = (), only: Collection[str] | None = None
) -> tuple[DatasetDict, LeftOut]:
    """The records of `config.data` in the splits it names (a plain file is `train`), or in `only` some of these.

    Only the columns of one shape are read (see `recipe.data.columns.Columns`), and `family`, by which evaluation groups
    its scores.

    Returns:
        splits with the columns `instruction`, `input`, `output` (text; `input` may be empty or null), `family` (text
        or null) and `row`, the record's number in the split it was read from, counted from 0; and what is left out.
        With conversations also `messages`, JSON of one (see `recipe.data.conversations`) or null; then instruction and
        output are its last question and the answer to it.
        With `extra`, the names of other columns, also `extra`: JSON of those that the record has.

    Raises:
        UserError: missing files or columns, and all bad records in one report, unless `bad_records` is "drop".
    """
    if not config.data:
        raise UserError("no data: name a file, a glob, a folder or a Hub dataset id with --data")
    left_out, problems = LeftOut(), list[str]()
    sources = sources_of(config)
    parts: dict[str, list[Dataset]] = {}
    infos: dict[str, RecordsInfo] = {}
    for index, source in enumerate(sources):
        columns = columns_of(source.config, extra)
        for split, files in files_by_split(source.config.data, left_out.notes).items():  # type: ignore[arg-type]
            for name, read, *_ in files if only is None or split in only else ():
                try:
                    records = read(columns)
                except UnreadableFileError as error:
                    problems += [f"{name}{line}" for line in str(error).split("\n")]
                    continue
                if cut := pc.sum(pc.greater(records.with_format("arrow")[:]["unanswered"], 0)).as_py():
                    note = f"{name}: what follows the last answer is left out ({cut:,} conversations)"
                    left_out.notes.append(note)
                info = _info_of(split, infos, sources)
                good, bad = _good_and_bad(records, info.add_file(name, split, index, len(records)))
                left_out.bad += [{"file": name, "split": split, **record} for record in bad]
                parts.setdefault(split, []).append(_with_family(good, source.name))
    splits = _joined(parts, infos, extra)
    if config.bad_records == "error":
        problems += [line for record in left_out.bad for line in report_lines(record)]
    else:
        empty = [name for name, split in splits.items() if not len(split)]
        problems += [no_good_record(name, [one for one in left_out.bad if one["split"] == name]) for name in empty]
    if problems:
        raise UserError(problem_report(problems))
    for record in left_out.bad:
        record["problem"] = in_one_line(record["problem"])
    return splits, left_out


def _info_of(split: str, infos: dict[str, RecordsInfo], sources: list[Source]) -> RecordsInfo:
    """What numbers the records of a split; the splits of a mixture share one, as its sources may have other splits."""
    names = [source.name for source in sources if source.name]
    if split not in infos:
        infos[split] = next(iter(infos.values())) if names and infos else RecordsInfo(sources=names)
    return infos[split]


def _joined(parts: dict[str, list[Dataset]], infos: dict[str, RecordsInfo], extra: tuple[str, ...]) -> DatasetDict:
    """The records of all files of each split."""
    splits = DatasetDict({name: concatenate_datasets(each) for name, each in parts.items()})
    chats = {name: split.with_format("arrow")[:]["messages"].null_count < len(split) for name, split in splits.items()}
    for name, split in splits.items():
        has_chats = any(chats.values()) if infos[name].sources else chats[name]  # the splits of a mixture are alike
        unused = [*([] if extra else ["extra"]), *([] if has_chats else ["messages"])]
        splits[name] = split.remove_columns(unused)
        # not as an argument of `concatenate_datasets`: the cache of the tokens would depend on names of files
        splits[name].info.take_files(infos[name])
    return splits


def _with_family(records: Dataset, source: str) -> Dataset:
    """Evaluation groups its scores by family; in a mixture by source, where the records do not say it."""
    if not source:
        return records
    families = pc.fill_null(records.with_format("arrow")[:]["family"], source)
    return records.remove_columns("family").add_column("family", families.combine_chunks())


def columns_of(config: DataArguments, extra: tuple[str, ...] = ()) -> Columns:
    """The columns that the settings name."""
    named = {name: getattr(config, f"{name}_column") for name in FIELDS}
    if len(set(named.values())) < len(named):
        raise UserError(f"two fields are mapped to one column ({named}); give each its own")
    turns = (config.messages_column,) if config.messages_column else None
    return Columns({**named, "family": "family"}, extra, turns)


def problem_report(problems: Sequence[str]) -> str:
    """One message for many problems: the first `LONGEST_REPORT` in full, and how many more there are."""
    lines = list(problems[:LONGEST_REPORT])
    if len(problems) > LONGEST_REPORT:
        lines.append(f"... and {len(problems) - LONGEST_REPORT} more")
    if len(problems) > 1:
        lines.insert(0, f"{len(problems)} problems in the data; nothing was trained or written:")
    return "\n".join(lines)


def no_good_record(split: str, bad: Sequence[Mapping[str, Any]]) -> str:
    """What is said of a split of which all records are left out."""
    return f"the {split} split has no good record; the first of {len(bad):,} bad ones: {report_lines(bad[0])[0]}"


def in_one_line(problem: str) -> str:
    """The problems of a bad record as `bad_records.jsonl` has them."""
    return "; ".join(part.lstrip(": ") for part in problem.split("\n"))


def report_lines(bad: Mapping[str, Any]) -> list[str]:
    """The problems of a bad record as lines: the problem begins with a colon, or with the place in its file."""
    parts = bad["problem"].split("\n")
    return [f"{bad['file']} row {bad['row']}{part if part.startswith(': ') else f' {part}'}" for part in parts]


def files_by_split(data: dict | str | list, notes: list[str], download: bool = True) -> Files:
    """The files of each split, under the name it means; see `recipe.data.sources.find_source`."""
    if not isinstance(data, dict):
        return find_source(_names(data, "data"), notes, download)
    if odd := [name for name in data if not isinstance(name, str) or not name.strip()]:
        hint = "; YAML reads on, off, yes, no and null as other values, so put such a name in quotes"
        raise UserError(f"data: {odd[0]!r} is no name of a split{hint if not isinstance(odd[0], str) else ''}")
    by_split: Files = {}
    for split, source in by_meaning(data, "data", notes).items():
        found = find_source(_names(source, f"data, split {split!r}"), notes, download)
        if len(found) > 1 and split not in found:  # a folder or Hub id that names splits itself
            names = ", ".join(found)
            raise UserError(f"data, split {split!r}: {source} has {names}; name one of its files instead")
        by_split[split] = found[split] if split in found else next(iter(found.values()))
    return by_split


def _names(source: Any, subject: str) -> str | list[str]:
    names = source if isinstance(source, list) else [source]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{subject}: {source!r} is not a file, a glob or a list of them")
    return source


def _good_and_bad(records: Dataset, start: int) -> tuple[Dataset, list[dict[str, Any]]]:
    """The good records of a file, with their numbers in the split, and the bad ones."""
    reasons = records.with_format("arrow")[:]["reason"]
    bad = []
    good = records.remove_columns(["reason", "problem", "record", "unanswered"])
    if reasons.null_count < len(records):
        is_bad = pc.is_valid(reasons).to_numpy()
        for record in records.select(np.flatnonzero(is_bad)):
            bad.append(
                {name: record[name] for name in ("row", "reason", "problem")} | {"record": json.loads(record["record"])}
            )
        good = good.select(np.flatnonzero(~is_bad))
    if start:
        rows = good.with_format("numpy")["row"][:] + start
        good = good.remove_columns("row").add_column("row", pa.array(rows))
    return good, bad
