"""Recorded answers are read as records are: by the columns that are named, as text, and refused by their row."""

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_answers import answer, write

from recipe.config import DataArguments, UserError
from recipe.evaluation.answers import pair_answers, read_answer_file, read_answers

OTHER = {"instruction_column": "frage", "input_column": "kontext", "output_column": "antwort"}
DATES = ["2024-01-31", "1999-12-01", "2024-02-29T12:30:00"]


def saved(folder: Path, kind: str, rows: list[dict]) -> str:
    path = folder / f"answers.{kind}"
    if kind == "jsonl":
        return write(path, rows)
    if kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "csv":
        lines = [list(rows[0]), *([row[name] or "" for name in rows[0]] for row in rows)]
        path.write_text("".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_the_columns_that_are_named_hold_for_recorded_answers(tmp_path, kind):
    rows = [
        {"antwort": f"Zahl {n}.", "frage": f"Sag {n}.", "kontext": "laut" if n else "", "model_response": f"Zahl {n}"}
        for n in range(3)
    ]
    path, data_args = saved(tmp_path, kind, rows), DataArguments(data="x", **OTHER)
    _, predictions, answers = read_answer_file(path, data_args)
    found = [(p["instruction"], p["input"], p["output"]) for p in predictions]
    assert found == [(row["frage"], row["kontext"], row["antwort"]) for row in rows]
    assert [a["text"] for a in answers] == [row["model_response"] for row in rows]
    assert pair_answers(path, predictions[::-1], data_args=data_args) == answers[::-1]
    with pytest.raises(UserError, match=r"no column 'instruction'.*--instruction_column"):
        read_answer_file(path)


def test_an_evaluations_own_answers_need_no_flags_beside_data_with_other_columns(tmp_path):
    rows = [{"id": "test/0", "split": "test", "instruction": "Do.", "input": "", "output": "x", "tuned": answer("y")}]
    _, predictions, answers = read_answer_file(write(tmp_path / "a.jsonl", rows), DataArguments(data="x", **OTHER))
    assert (predictions[0]["id"], predictions[0]["instruction"], answers[0]["text"]) == ("test/0", "Do.", "y")


def test_bad_rows_of_recorded_answers_are_dropped_where_those_of_the_data_are(tmp_path):
    rows = [{"instruction": "Do.", "output": "x", "model_response": "y"}, {"instruction": "", "output": "x"}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match="row 1: 'instruction' is empty"):
        read_answer_file(path)
    assert len(read_answer_file(path, DataArguments(data="x", bad_records="drop"))[2]) == 1


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("nested", [False, True])
def test_answers_that_are_all_dates_stay_text(tmp_path, kind, nested):
    if nested and kind == "csv":
        pytest.skip("a CSV file holds no nested values")
    rows = [
        {"instruction": f"When {n}?", "output": date, "tuned": {"text": date} if nested else date}
        for n, date in enumerate(DATES)
    ]
    _, predictions, answers = read_answer_file(saved(tmp_path, kind, rows))
    assert [a["text"] for a in answers] == [p["output"] for p in predictions] == DATES


@pytest.mark.parametrize("value", [datetime.date(2024, 1, 31), datetime.datetime(2024, 1, 31, 12)])
@pytest.mark.parametrize("nested", [False, True])
def test_answers_that_are_no_text_are_refused_by_row(tmp_path, value, nested):
    rows = [{"instruction": "When?", "output": "x", "model_response": {"text": value} if nested else value}]
    with pytest.raises(UserError, match=r"row 0: 'text' of 'model_response' is .*2024-01-31"):
        read_answer_file(saved(tmp_path, "parquet", rows))


def with_half_character(folder: Path, kind: str, nested: bool) -> str:
    """An answer "half \\ud800" in the second row, as each format can hold it."""
    texts = ["whole", "half ?"]
    rows = [
        {"instruction": f"Do {n}.", "output": "x", "tuned": {"text": text} if nested else text}
        for n, text in enumerate(texts)
    ]
    path = Path(saved(folder, kind, rows))
    # one byte for another of the same length keeps a Parquet file whole
    half = b"half \\ud800" if kind.startswith("json") else b"half \xff"
    content = path.read_bytes()
    assert content.count(b"half ?") >= 1
    path.write_bytes(content.replace(b"half ?", half))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "nested"),
    [("json", False), ("json", True), ("jsonl", False), ("jsonl", True), ("csv", False), ("parquet", False)],
)
def test_half_a_character_in_an_answer_is_refused_by_row_in_every_format(tmp_path, kind, nested):
    with pytest.raises(UserError, match=r"row 1: .*(holds half a character|is not UTF-8 text)"):
        read_answer_file(with_half_character(tmp_path, kind, nested))


def test_bytes_that_are_no_text_inside_a_nested_answer_of_parquet_are_refused(tmp_path):
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_answer_file(with_half_character(tmp_path, "parquet", nested=True))


@pytest.mark.parametrize("field", ["instruction", "output", "text"])
def test_half_a_character_in_another_evaluations_answers_is_refused_by_row(tmp_path, field):
    row = {"id": "test/0", "split": "test", "instruction": "Do.", "input": "", "output": "x", "tuned": answer("y")}
    row |= {"tuned": answer("\udc00 y")} if field == "text" else {field: "\ud83d x"}
    with pytest.raises(UserError, match=r"row 0: .*holds half a character \(\\ud"):
        read_answer_file(write(tmp_path / "predictions.jsonl", [row]))


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_an_input_that_is_not_a_number_is_refused_by_row(tmp_path, kind):
    rows = [{"instruction": f"Do {n}.", "input": float("nan"), "output": "x", "model_response": "y"} for n in range(2)]
    with pytest.raises(UserError, match=r"row 1: 'input' is NaN \(float\), not text"):
        read_answer_file(saved(tmp_path, kind, rows))


@pytest.mark.parametrize("value", [float("nan"), 3])
def test_an_input_of_predictions_that_is_no_text_is_refused_by_line(tmp_path, value):
    row = {"id": "test/0", "split": "test", "instruction": "Do.", "input": value, "output": "x", "tuned": answer("y")}
    with pytest.raises(UserError, match=r"line 1: 'input' is (nan|3), not text"):
        read_answers(Path(write(tmp_path / "predictions.jsonl", [row])), strict=True)
