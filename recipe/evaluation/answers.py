"""`predictions.jsonl`: one line a record with the answer of each model, appended while they answer, and resumable.

While models answer, each new line holds a record's id and one answer; lines of the same id belong together. `settle`
joins them into one line an id, in the order of the records::

    {"id": "test/0", "split": "test", "instruction": "Make it plural.", "input": "cat", "output": "cats",
     "tuned": {"text": "cats", "tokens": 2, "stop_reason": "eos", "seconds": 0.01}}
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from recipe.config import DataArguments, UserError
from recipe.files import write_json_lines

if TYPE_CHECKING:
    from datasets import DatasetDict

RECORD_FIELDS = ("instruction", "input", "output", "family")
ECHO = "echo"
STOP_REASONS = ("eos", "length", "context", None)
ANSWER_FIELDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "tokens": (int, NoneType),
    "seconds": (int, float, NoneType),
    "reference_loss": (int, float, NoneType),
    "reference_tokens": (int, NoneType),
}


def as_predictions(records: DatasetDict, merged: bool = False) -> list[dict[str, Any]]:
    """Predictions without answers: one a record, with an id that is unique over splits; `merged` into one split."""
    return [
        {"id": f"{name}/{record['row']}", "split": "all" if merged else name, **_kept(record)}
        for name, split in records.items()
        for record in split
    ]


def read_answers(path: Path, strict: bool = False) -> dict[str, dict[str, Any]]:
    """What each id holds so far, the lines of an id joined; none where there is no file.

    A line that cannot be read, as a killed run leaves one, is as good as missing: its answers are asked again.

    Raises:
        UserError: with `strict`, a line that cannot be read.
    """
    joined: dict[str, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            earlier = joined.setdefault(row["id"], {})
        except (ValueError, TypeError, KeyError) as error:
            if strict:
                raise UserError(
                    f"{path} line {number + 1}: not a prediction ({error!r}); run the generate stage again, which asks "
                    "for what is missing"
                ) from error
            continue
        if strict:
            check_prediction(row, f"{path} line {number + 1}")
            if "split" in row and "split" in earlier:
                raise UserError(f"{path} line {number + 1}: the id {row['id']!r} stands above, too; remove one of them")
        earlier.update(row)
    return joined


def check_prediction(row: Mapping[str, Any], where: str) -> None:
    """Refuse a line that is no prediction, as an edited file or another program's may hold.

    Raises:
        UserError: a field of the wrong kind, with `where`, its name and its value.
    """
    problems = [
        f"{name!r} is {row[name]!r}, not text"
        for name in ("id", "split", "instruction", "output")
        if name in row and not isinstance(row[name], str)
    ]
    for label, answer in row.items():
        if isinstance(answer, Mapping):
            for name, kinds in ANSWER_FIELDS.items():
                value = answer.get(name, "" if name == "text" else None)
                if not isinstance(value, kinds) or isinstance(value, bool):
                    problems.append(f"{name!r} of {label!r} is {value!r}")
            if answer.get("stop_reason") not in STOP_REASONS:
                problems.append(
                    f"'stop_reason' of {label!r} is {answer['stop_reason']!r}, none of eos, length, context"
                )
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; mend or remove it")


def append_answers(path: Path, ids: Iterable[str], label: str, answers: Iterable[Mapping[str, Any]]) -> None:
    """Append finished answers of one model, in one write, so that several processes may append to one file."""
    rows = ({"id": id_, label: answer} for id_, answer in zip(ids, answers, strict=True))
    # the newline in front ends what a killed run may have left torn; half a surrogate pair is no text in UTF-8
    text = "\n" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with open(path, "ab", buffering=0) as file:
        content = text.encode("utf-8", "replace")
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, "the disk is full; free some space and run the same command again", str(path))


def settle(path: Path, predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Join what was appended into one line a record, in the order of `predictions`, and write that whole."""
    answers = read_answers(path)
    write_json_lines(
        path,
        ({**prediction, **{label: answers[prediction["id"]][label] for label in labels}} for prediction in predictions),
    )


def is_answer_file(name: str) -> bool:
    """Whether a model's name is a file of recorded answers."""
    from recipe.data.sources import FORMATS  # here: datasets takes a second, and --help needs none of it

    return Path(name).suffix in FORMATS and Path(name).is_file()


def read_answer_file(path: str) -> tuple[DatasetDict, list[dict[str, Any]], list[dict[str, Any]]]:
    """Recorded answers: the records of a file, their predictions without answers, and the answer to each.

    An answer is in the column `model_response`, as the book's code writes it, or in `tuned`, as `predictions.jsonl`
    does; `id` and `split` of the latter are kept.

    Raises:
        UserError: no such column, or an answer that is not text.
    """
    from recipe.data.records import read_records  # here: datasets takes a second, and --help needs none of it

    splits = read_records(DataArguments(data=path))
    if len(splits) != 1:
        raise UserError(f"--model {path}: {len(splits)} splits; name one file")
    [dataset] = splits.values()
    column = next((name for name in ("model_response", "tuned") if name in dataset.column_names), None)
    if column is None:
        raise UserError(f"{path}: neither a 'model_response' nor a 'tuned' column; found {dataset.column_names}")
    ours = column == "tuned" and {"id", "split"} <= set(dataset.column_names)
    predictions, answers = [], []
    for row in dataset:
        answer = row[column] if isinstance(row[column], dict) else {"text": row[column]}
        if not isinstance(answer.get("text"), str):
            raise UserError(
                f"{path} row {row['row']}: {column!r} is {answer.get('text')!r}, not text; answer it or remove the row"
            )
        check_prediction({"tuned": answer}, f"{path} row {row['row']}")
        answers.append(answer)
        names = {"id": row["id"], "split": row["split"]} if ours else {"id": f"all/{row['row']}", "split": "all"}
        predictions.append({**names, **_kept(row)})
        check_prediction(predictions[-1], f"{path} row {row['row']}")
    ids = Counter(prediction["id"] for prediction in predictions)
    twice = [id_ for id_, count in ids.items() if count > 1]
    if twice:
        raise UserError(
            f"{path}: the id {twice[0]!r} stands {ids[twice[0]]} times ({len(twice)} such ids); keep one each"
        )
    return splits, predictions, answers


def pair_answers(path: str, predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The recorded answer to each prediction's record, found by what the record says.

    Raises:
        UserError: records without an answer, or two different answers to one record.
    """
    _, rows, answers = read_answer_file(path)
    recorded: dict[tuple, dict[str, Any]] = {}
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        first = recorded.setdefault(_content(row), answer)
        if first["text"] != answer["text"]:
            raise UserError(f"{path} row {number}: the same record has another answer above; remove one of them")
    missing = [prediction for prediction in predictions if _content(prediction) not in recorded]
    if missing:
        shown = "\n".join(f"  {p['id']}: {p['instruction'][:100]!r}" for p in missing[:5])
        raise UserError(
            f"{path} has no answer to {len(missing)} of {len(predictions)} records, so the models cannot be compared "
            f"on the same ones; the first:\n{shown}\nanswer them, or give the file's own records by --data"
        )
    return [recorded[_content(prediction)] for prediction in predictions]


def echo(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """The trivial answer a model should beat: the record's input, or the instruction where there is none."""
    return {"text": prediction["input"] or prediction["instruction"]}


def _content(record: Mapping[str, Any]) -> tuple:
    return tuple(record.get(name) or "" for name in ("instruction", "input", "output"))


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: record[name] or "" for name in ("instruction", "input", "output") if name in record}
    if record.get("family") is not None:
        kept["family"] = str(record["family"])
    return kept
