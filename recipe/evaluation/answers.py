"""`predictions.jsonl`: appended to while models answer, then merged into one line per record.

While models answer, each new line holds a record's id and one answer, so that an interrupted evaluation can be resumed.
`merge_answers` writes one line per id, in the order of the records::

    {"id": "test/0", "split": "test", "instruction": "Make it plural.", "input": "cat", "output": "cats",
     "tuned": {"text": "cats", "tokens": 2, "stop_reason": "eos", "seconds": 0.01}}

A conversation also has its `messages`; instruction and output are its last question and the answer to it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from recipe.config import DataArguments, UserError
from recipe.files import is_there, naming, parse_json, read_file, write_json_lines
from recipe.redaction import redact
from recipe.shapes import fits
from recipe.templates import conversation_of, to_messages

if TYPE_CHECKING:
    from datasets import DatasetDict

TEXT_FIELDS = ("instruction", "input", "output")
OF_RECORD = ("id", "split", "family", *TEXT_FIELDS)
ECHO = "echo"
STOP_REASONS = ("eos", "length", "context", "refused", None)
MANY = range(2**40)  # what can be counted
ANSWER_FIELDS = {  # shapes, see `recipe.shapes`
    "text": str,
    "reasoning": (None, str),  # before the text, of a model that thinks
    "error": (None, str),  # of the server that refused the prompt
    "tokens": (None, MANY),
    "seconds": (None, float),
    "reference_loss": (None, float),
    "reference_tokens": (None, MANY),
    "stop_reason": set(STOP_REASONS),
}


def as_predictions(records: DatasetDict, merged: bool = False) -> list[dict[str, Any]]:
    """Predictions without answers: one per record, with an id that is unique over splits; `merged` into one split."""
    return [
        {"id": f"{name}/{record['row']}", "split": "all" if merged else name, **_record_fields(record)}
        for name, split in records.items()
        for record in split
    ]


def read_answers(path: Path, strict: bool = False) -> dict[str, dict[str, Any]]:
    """The rows of `predictions.jsonl` by id, the lines of one id merged; empty if there is no file.

    A line that cannot be read, as a killed run may leave one, and an answer that is none, are skipped and asked again.

    Raises:
        UserError: with `strict`, a line that cannot be read or is no prediction.
    """
    merged: dict[str, dict[str, Any]] = {}
    lines = read_file(path).split(b"\n") if is_there(path) else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            earlier = merged.setdefault(row["id"], {})
        except (ValueError, TypeError, KeyError) as error:
            if strict:
                raise UserError(
                    f"{path} line {number}: not a prediction ({error!r}); run the generate stage again, which asks for "
                    "what is missing"
                ) from error
            continue
        if strict:
            check_prediction(row, f"{path} line {number}")
            if "split" in row and "split" in earlier:
                raise UserError(f"{path} line {number}: the id {row['id']!r} is in a line above, too; remove one")
        earlier.update({name: value for name, value in row.items() if strict or name in OF_RECORD or not wrong(value)})
    return merged


def check_prediction(row: Mapping[str, Any], where: str) -> None:
    """Refuse a line that is no prediction: somebody may have edited the file, or another program written it.

    Raises:
        UserError: with `where`, and the name and the value of each field of a wrong type.
    """
    texts = ("id", "split", "instruction", "output")
    problems = [f"{name!r} is {row[name]!r:.60}, not text" for name in texts if type(row.get(name, "")) is not str]
    problems += [f"'input' is {row['input']!r:.60}, not text"] if type(row.get("input")) not in (str, NoneType) else []
    problems += [f"'family' is {row['family']!r:.60}, not text"] if isinstance(row.get("family"), dict | list) else []
    for label, answer in row.items():
        if isinstance(answer, Mapping):
            problems += [f"{name!r} of {label!r} is {answer.get(name)!r:.60}" for name in wrong(answer)]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; fix or remove it")


def wrong(answer: Any) -> list[str]:
    """The fields of an answer that are none of an answer."""
    if not isinstance(answer, Mapping):
        return ["text"]
    return [name for name, shape in ANSWER_FIELDS.items() if not fits(answer.get(name), shape)]


def append_answers(
    path: Path, label: str, predictions: Iterable[Mapping[str, Any]], answers: Iterable[Mapping[str, Any]]
) -> None:
    """Append one model's answers to `predictions`."""
    pairs = zip(predictions, answers, strict=True)
    append_lines(path, [{"id": prediction["id"], label: answer} for prediction, answer in pairs])


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines without secrets in one write, so that several processes may append to one file.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    # the newline in front ends the incomplete line that a killed run may have left
    text = "\n" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = redact(text).encode("utf-8", "replace")  # UTF-8 cannot hold half a surrogate pair
    with naming(path), open(path, "ab", buffering=0) as file:
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def merge_answers(path: Path, predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Merge what was appended into one line per record, in the order of `predictions`, and replace the file."""
    answers = read_answers(path)
    write_json_lines(path, ({**p, **{label: answers[p["id"]][label] for label in labels}} for p in predictions))


def is_answer_file(name: str) -> bool:
    """Whether a model's name is a file of recorded answers."""
    from recipe.data.sources import FORMATS  # here: datasets takes a second, and --help needs none of it

    return Path(name).suffix.lower() in FORMATS and Path(name).is_file()


def read_answer_file(
    path: str, data_args: DataArguments | None = None
) -> tuple[DatasetDict, list[dict[str, Any]], list[dict[str, Any]]]:
    """Recorded answers: the records of a file, their predictions without answers, and the answer to each.

    An answer is in the column `model_response`, as the book's code writes it, or in `tuned`, as `predictions.jsonl`
    has it; `id` and `split` of the latter are kept. The record is in the columns that `data_args` names; the answers of
    another evaluation, which has names of its own, need no flags.

    Raises:
        UserError: no such column, an answer that is not text, or an id in two rows.
    """
    from recipe.data.records import read_records
    from recipe.data.values import half_character  # here: datasets takes a second, and --help needs none of it

    arguments = _answer_arguments(path, data_args)
    splits, _ = read_records(arguments, extra=("model_response", "tuned", "id", "split", "messages"))
    if len(splits) != 1:
        raise UserError(f"--model {path}: {len(splits)} splits; name one file")
    [dataset] = splits.values()
    others = [json.loads(extra) for extra in dataset["extra"][:]]
    found = set().union(*others)
    column = next((name for name in ("model_response", "tuned") if name in found), None)
    if column is None:
        raise UserError(f"{path}: neither a 'model_response' nor a 'tuned' column with the answers")
    has_ids = column == "tuned" and {"id", "split"} <= found
    predictions: dict[str, dict[str, Any]] = {}
    answers = []
    for row, other in zip(dataset, others, strict=True):
        names = {"id": other.get("id"), "split": other.get("split")}
        names = names if has_ids else {"id": f"all/{row['row']}", "split": "all"}
        where = f"{path} row {row['row']}"
        answer = other.get(column)
        answer = answer if isinstance(answer, dict) and "text" in answer else {"text": answer}
        check_prediction({**names, column: answer}, where)
        if half := half_character(answer["text"]):
            raise UserError(f"{where}: the answer {half[0]}{half[1]}")
        if names["id"] in predictions:
            raise UserError(f"{where}: the id {names['id']!r} is in a row above, too; remove one")
        turns = {"messages": other["messages"]} if has_ids and other.get("messages") else {}  # as we wrote them
        predictions[names["id"]] = {**names, **_record_fields({**row, **turns})}
        answers.append(answer)
    return splits, list(predictions.values()), answers


def _answer_arguments(path: str, data_args: DataArguments | None) -> DataArguments:
    """How a file of answers is read: its records have the columns of the data, unless an evaluation wrote it."""
    from recipe.data.json_values import json_values
    from recipe.data.sources import FORMATS

    if FORMATS[Path(path).suffix.lower()] == "json":
        first = None
        with open(path, "rb") as file, contextlib.suppress(ValueError):  # what is broken is refused below, with its row
            first = next((value for _, value in json_values(file)), None)
        if isinstance(first, dict) and {"id", "split", *TEXT_FIELDS} <= first.keys():
            return DataArguments(data=path)
    named = ("instruction_column", "input_column", "output_column", "messages_column", "bad_records")
    return DataArguments(data=path, **{name: getattr(data_args, name) for name in named if data_args})


def pair_answers(
    path: str,
    predictions: Sequence[Mapping[str, Any]],
    clean: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    data_args: DataArguments | None = None,
) -> list[dict[str, Any]]:
    """The recorded answer to each prediction's record, found by the texts of the record, after `clean`.

    Raises:
        UserError: records without an answer, or two different answers to one record.
    """
    _, rows, answers = read_answer_file(path, data_args)
    recorded: dict[tuple, dict[str, Any]] = {}
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        first = recorded.setdefault(_texts(clean(row)), answer)
        if first["text"] != answer["text"]:
            raise UserError(f"{path} row {number}: the same record has another answer above; remove one of them")
    missing = [prediction for prediction in predictions if _texts(prediction) not in recorded]
    if missing:
        shown = "\n".join(f"  {p['id']}: {p['instruction'][:100]!r}" for p in missing[:5])
        raise UserError(
            f"{path} has no answer to {len(missing)} of {len(predictions)} records, so the models cannot be compared "
            f"on the same ones; the first:\n{shown}\nanswer them, or give the file's own records by --data"
        )
    return [recorded[_texts(prediction)] for prediction in predictions]


def echoes(predictions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The trivial answers that a model should beat: each record's input, or its instruction if there is none."""
    return [{"text": prediction["input"] or prediction["instruction"]} for prediction in predictions]


def _texts(prediction: Mapping[str, Any]) -> tuple[str, ...]:
    return (*(prediction[name] for name in TEXT_FIELDS), json.dumps(to_messages(prediction)))


def _record_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: record.get(name) or "" for name in TEXT_FIELDS}
    if turns := conversation_of(record):
        fields["messages"] = turns
    return fields if record.get("family") is None else {**fields, "family": str(record["family"])}
