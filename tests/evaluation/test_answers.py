"""predictions.jsonl: appended, merged, with incomplete lines; recorded answers paired by the texts of a record."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from recipe.config import UserError
from recipe.evaluation.answers import (
    append_answers,
    as_predictions,
    echoes,
    is_answer_file,
    merge_answers,
    pair_answers,
    read_answer_file,
    read_answers,
)

RECORDS = DatasetDict(
    test=Dataset.from_list(
        [
            {"instruction": "Make it plural.", "input": "cat", "output": "cats", "row": 4, "family": "plural"},
            {"instruction": "Name a colour.", "input": None, "output": "Blue.", "row": 7, "family": "colour"},
        ]
    )
)


def answer(text: str) -> dict:
    return {"text": text, "tokens": 1, "stop_reason": "eos"}


def test_ids_of_predictions_name_split_and_row():
    assert as_predictions(RECORDS) == [
        {
            "id": "test/4", "split": "test", "instruction": "Make it plural.", "input": "cat", "output": "cats",
            "family": "plural",
        },
        {
            "id": "test/7", "split": "test", "instruction": "Name a colour.", "input": "", "output": "Blue.",
            "family": "colour",
        },
    ]  # fmt: skip
    assert {prediction["split"] for prediction in as_predictions(RECORDS, merged=True)} == {"all"}


def test_appended_answers_are_merged_into_one_line_per_record_in_their_order(tmp_path):
    path, predictions = tmp_path / "predictions.jsonl", as_predictions(RECORDS)
    append_answers(path, "tuned", predictions[::-1], [answer("Red."), answer("cats")])
    append_answers(path, "baseline", predictions, [answer("cat"), answer("")])
    merge_answers(path, predictions, ["baseline", "tuned"])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [list(row)[-2:] for row in rows] == [["baseline", "tuned"]] * 2
    assert rows == [
        {**predictions[0], "baseline": answer("cat"), "tuned": answer("cats")},
        {**predictions[1], "baseline": answer(""), "tuned": answer("Red.")},
    ]
    before = path.read_bytes()
    merge_answers(path, predictions, ["baseline", "tuned"])
    assert path.read_bytes() == before


def test_an_incomplete_line_costs_only_its_own_answers(tmp_path):
    path = tmp_path / "predictions.jsonl"
    append_answers(path, "tuned", [{"id": "test/4"}], [answer("cats")])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "test/7", "tuned": {"text": "Re')  # kill -9
    assert read_answers(path).keys() == {"test/4"}
    append_answers(path, "tuned", [{"id": "test/7"}], [answer("Red.")])
    assert {id_: row["tuned"]["text"] for id_, row in read_answers(path).items()} == {
        "test/4": "cats",
        "test/7": "Red.",
    }
    with pytest.raises(UserError, match=r"line 3: not a prediction .* run the generate stage again"):
        read_answers(path, strict=True)


@pytest.mark.parametrize("text", ["\u2028line\u2029\x85", "\0\x1b[31m", "half \ud800", "\r\n\t", "a" * 100_000, "שלום"])
def test_any_text_comes_back(tmp_path, text):
    path = tmp_path / "predictions.jsonl"
    append_answers(path, "tuned", [{"id": "test/4"}], [answer(text)])
    assert read_answers(path)["test/4"]["tuned"]["text"] == text.replace("\ud800", "?")


def test_no_file_holds_no_answers(tmp_path):
    assert read_answers(tmp_path / "absent.jsonl") == {}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_recorded_answers_bring_their_records(tmp_path):
    path = write(
        tmp_path / "answers.jsonl", [{"instruction": "Say A.", "input": "", "output": "A", "model_response": "B"}]
    )
    assert is_answer_file(path) and not is_answer_file(str(tmp_path)) and not is_answer_file("gpt2.json")
    _, predictions, answers = read_answer_file(path)
    assert predictions == [{"id": "all/0", "split": "all", "instruction": "Say A.", "input": "", "output": "A"}]
    assert answers == [{"text": "B"}]


def test_an_evaluations_own_answers_keep_their_ids_and_splits(tmp_path):
    rows = [
        {**prediction, "split": split, "tuned": answer("x")}
        for prediction, split in zip(as_predictions(RECORDS), ("test", "other"), strict=True)
    ]
    _, predictions, answers = read_answer_file(write(tmp_path / "predictions.jsonl", rows))
    assert [(p["id"], p["split"]) for p in predictions] == [("test/4", "test"), ("test/7", "other")]
    assert answers == [answer("x")] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"output": "A"}, "neither a 'model_response' nor a 'tuned' column"),
        ({"output": "A", "model_response": None}, "row 0: 'text' of 'model_response' is None; fix or"),
        ({"output": "A", "model_response": 3}, "row 0: 'text' of 'model_response' is 3; fix or"),
        ({"output": "", "model_response": "B"}, "'output' is empty"),
    ],
)
def test_bad_answer_files_are_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_answer_file(write(tmp_path / "bad.jsonl", [{"instruction": "Say A.", "input": "", **row}]))


def test_answers_are_paired_by_record_and_not_by_position(tmp_path):
    rows = [
        {"instruction": "Name a colour.", "output": "Blue.", "model_response": "Red."},
        {"instruction": "Make it plural.", "input": "cat", "output": "cats", "model_response": "cat"},
        {"instruction": "Nobody asked.", "output": "No.", "model_response": "Yes."},
    ]
    paired = pair_answers(write(tmp_path / "a.jsonl", rows), as_predictions(RECORDS))
    assert paired == [{"text": "cat"}, {"text": "Red."}]
    with pytest.raises(UserError, match=r"no answer to 1 of 2 records(.|\n)*test/4: 'Make it plural\.'"):
        pair_answers(write(tmp_path / "b.jsonl", rows[:1]), as_predictions(RECORDS))
    again = [*rows, {**rows[0], "model_response": "Green."}]
    with pytest.raises(UserError, match="row 3: the same record has another answer above"):
        pair_answers(write(tmp_path / "c.jsonl", again), as_predictions(RECORDS))


def test_echo_answers_with_the_input_or_the_instruction():
    assert [answer["text"] for answer in echoes(as_predictions(RECORDS))] == ["cat", "Name a colour."]


def test_a_family_is_text_and_a_missing_one_is_left_out():
    rows = [{"instruction": "a", "input": "", "output": "b", "row": n, "family": f} for n, f in enumerate([0, None, 3])]
    records = DatasetDict(test=Dataset.from_list(rows))
    assert [prediction.get("family") for prediction in as_predictions(records)] == ["0", None, "3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "test/0"}, "row 1: the id 'test/0' is in a row above"),
        ({"split": None}, "row 1: 'split' is None, not text"),
        ({"tuned": {**answer("x"), "stop_reason": "stop"}}, "row 1: 'stop_reason' of 'tuned' is 'stop'"),
    ],
)
def test_recorded_predictions_are_checked(tmp_path, change, message):
    rows = [
        {"id": f"test/{n}", "split": "test", "instruction": f"Do {n}.", "output": "x", "tuned": answer("x")}
        for n in range(2)
    ]
    rows[1] |= change
    with pytest.raises(UserError, match=message):
        read_answer_file(write(tmp_path / "a.jsonl", rows))


def test_answers_as_plain_text_are_taken_with_ids_of_their_own(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "Do it.", "output": "x", "tuned": "y"}])
    _, predictions, answers = read_answer_file(path)
    assert (predictions[0]["id"], answers) == ("all/0", [{"text": "y"}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuned": {"text": None}}, "'text' of 'tuned' is None"),
        ({"tuned": {"text": "x", "reference_loss": "abc"}}, "'reference_loss' of 'tuned' is 'abc'"),
        ({"id": "test/0"}, "the id 'test/0' is in a line above"),
        ({"split": 3}, "'split' is 3, not text"),
    ],
)
def test_an_edited_file_is_checked_before_it_is_scored(tmp_path, change, message):
    rows = [
        {"id": f"test/{n}", "split": "test", "instruction": "Do.", "output": "x", "tuned": answer("x")}
        for n in range(2)
    ]
    path = write(tmp_path / "predictions.jsonl", [rows[0], rows[1] | change])
    with pytest.raises(UserError, match=rf"line 2: .*{message}"):
        read_answers(Path(path), strict=True)
