"""Bad input: one clear message with file, row, field, value and the way out, for all bad rows at once."""

import json
from pathlib import Path

import pytest

from recipe.config import DataArguments, UserError
from recipe.data import load_records, load_splits

GOOD = {"instruction": "Say hello.", "input": "", "output": "Hello."}


def refuse(source, **options) -> str:
    """The message with which the data is refused."""
    with pytest.raises(UserError) as error:
        load_records(DataArguments(data=str(source) if isinstance(source, Path) else source, **options))
    return str(error.value)


def write(path: Path, rows: list) -> Path:
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_all_bad_rows_are_in_one_report(tmp_path, suffix):
    rows = [
        GOOD,
        {**GOOD, "output": ""},
        {**GOOD, "instruction": "  \n"},
        {**GOOD, "output": None},
        {**GOOD, "input": None},  # a record without an input
        {"prompt": "Say hello.", "completion": "Hello."},
    ]
    path = write(tmp_path / f"a.{suffix}", rows)
    assert refuse(path).splitlines() == [
        "4 problems in the data; nothing was trained or written:",
        f"{path} row 1: 'output' is empty (''); write a response or remove the row",
        f"{path} row 2: 'instruction' is blank ('  \\n'); write the instruction or remove the row",
        f"{path} row 3: 'output' is null or missing; write a response or remove the row",
        f"{path} row 5: has 'prompt' and 'completion' where the file's first record has 'instruction' and 'output'; "
        "put records of each shape into a file of their own",
    ]


def test_a_column_of_nulls(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**GOOD, "output": None}] * 2)
    assert refuse(path).splitlines()[1:] == [
        f"{path} row {row}: 'output' is null or missing; write a response or remove the row" for row in range(2)
    ]


def test_blank_in_any_script(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**GOOD, "output": text} for text in ("\u3000", " \x1c", "\u200b x", "\u00a0")])
    assert [line.split(": ")[0] for line in refuse(path).splitlines()[1:]] == [f"{path} row {row}" for row in (0, 1, 3)]


@pytest.mark.parametrize(
    ("value", "shown"), [(5, "5 (int)"), (["x"], '["x"] (list)'), ({"a": 1}, '{"a": 1} (dict)'), (True, "true (bool)")]
)
def test_values_that_are_not_text(tmp_path, value, shown):
    path = write(tmp_path / "a.jsonl", [GOOD, {**GOOD, "output": value}, GOOD])
    assert refuse(path) == f"{path} row 1: 'output' is {shown}, not text; write it as text or remove the row"
    path = write(tmp_path / "b.jsonl", [{**GOOD, "input": value}] * 2)
    assert f"{path} row 0: 'input' is {shown}, not text" in refuse(path)
    assert f"{path} row 1: 'input' is {shown}, not text" in refuse(path)


def test_misspelt_and_missing_columns(tmp_path):
    path = write(tmp_path / "a.json", [{"instructon": "a", "input": "", "response": "b"}])
    assert refuse(path).splitlines()[1:] == [
        f"{path}: no column 'instruction' among 'instructon', 'input', 'response'; "
        "did you mean 'instructon'? name the column of the instruction with --instruction_column instructon",
        f"{path}: no column 'output' among 'instructon', 'input', 'response'; "
        "name the column of the output with --output_column NAME",
    ]
    path = write(tmp_path / "b.json", [{"instruction": "a", "inptu": "", "output": "b"}])
    message = refuse(path)
    assert "did you mean 'inptu'?" in message and "--input_column inptu" in message


def test_broken_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps(GOOD)}\n\n{{"instruction": \n{json.dumps(GOOD)}\n"just text"\n', encoding="utf-8")
    lines = refuse(path).splitlines()
    assert lines[1].startswith(f"{path} row 1 (line 3): broken JSON at column")
    assert lines[2] == f'{path} row 3 (line 5): "just text" is not an object with named fields'


def test_broken_json_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"instruction": "a"},\n {"instruction" "b"}]', encoding="utf-8")
    assert refuse(path).startswith(f"{path} line 2 column 17: broken JSON")


@pytest.mark.parametrize("text", ["", "[]", "\n"])
def test_files_without_records(tmp_path, text):
    for name in ("a.json", "a.jsonl", "a.csv"):
        path = tmp_path / name
        path.write_text("" if name == "a.csv" else text, encoding="utf-8")
        assert refuse(path) == f"{path} holds no records; give it at least one"


def test_text_in_another_encoding(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({**GOOD, "output": "é"}, ensure_ascii=False).encode("latin-1"))
    assert refuse(path) == f"{path} row 0: 'output' is not UTF-8 text; save the file as UTF-8"
    path = tmp_path / "a.csv"
    path.write_bytes("instruction,output\nSay it.,é\n".encode("latin-1"))
    assert refuse(path) == f"{path} row 0: 'output' is not UTF-8 text; save the file as UTF-8"
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps([GOOD]).encode("utf-16"))
    assert refuse(path) == f"{path} is UTF-16 text, not UTF-8; save it as UTF-8 (in Excel: CSV UTF-8)"


def test_csv_rows_that_do_not_fit_the_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,input,output\nSort: b, a,,a b\n\na,b,c\nd,e\n")
    assert refuse(path).splitlines()[1:] == [
        f"{path} row {row}: {count} fields, but the header has 3 (instruction, input, output); "
        "put text with commas or quotes in double quotes"
        for row, count in ((0, 4), (2, 2))
    ]
    path.write_text("instruction,output,output\na,b,c\n")
    assert refuse(path) == f"{path} has the column 'output' twice; give each its own name"
    path.write_text("instruction,output,,x,x\na,b,c,1,2\nd,e,f,3,4\n")  # columns that nobody needs
    config = DataArguments(data=str(path), validation_ratio=0, test_ratio=0)
    assert load_records(config)[0]["train"]["output"][:] == ["b", "e"]
    path.write_text("instruction,input,output\n")
    assert refuse(path) == f"{path} holds no records; give it at least one"


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("null\n", 0),
        ("null\n" + json.dumps(GOOD), 0),
        ('["a", "b"]', 0),
        ("[null]", 0),
        (f"[{json.dumps(GOOD)}, 5]", 1),
    ],
)
def test_json_that_is_no_record(tmp_path, text, row):
    path = tmp_path / "a.json"
    path.write_text(text)
    message = refuse(path)
    assert f"{path} row {row}" in message and "is not an object with named fields" in message


def test_bad_files_of_a_folder_are_named_with_their_rows(tmp_path):
    write(tmp_path / "train-0.jsonl", [GOOD, {**GOOD, "output": ""}])
    (tmp_path / "train-1.jsonl").write_text('{"instruction": \n')
    (tmp_path / "test.csv").write_text("instruction,input,output\nSay seven.,,007\nSay None.,None,None\n")
    lines = refuse(tmp_path).splitlines()
    assert any(f"{tmp_path / 'train-0.jsonl'} row 1: 'output' is empty" in line for line in lines)
    assert any(f"{tmp_path / 'train-1.jsonl'} row 0 (line 1): broken JSON" in line for line in lines)
    assert len(lines) == 3


def test_one_column_for_two_fields(tmp_path):
    path = write(tmp_path / "a.json", [GOOD])
    assert "two fields are mapped to one column" in refuse(path, instruction_column="output")


def test_data_that_names_no_file():
    for data in ([["a.json"]], [1], {"train": []}, {"train": None}):
        assert "is not a file, a glob or a list of them" in refuse(data)


def test_rows_are_counted_in_their_own_file(tmp_path):
    write(tmp_path / "part-0.jsonl", [GOOD, GOOD])
    second = write(tmp_path / "part-1.jsonl", [GOOD, {**GOOD, "output": ""}])
    assert refuse(tmp_path / "part-*.jsonl").startswith(f"{second} row 1: 'output' is empty")


def test_files_that_do_not_go_together(tmp_path):
    write(tmp_path / "part-0.jsonl", [GOOD])
    second = write(tmp_path / "part-1.jsonl", [{**GOOD, "output": 3}])
    assert refuse(tmp_path / "part-*.jsonl").startswith(f"{second} row 0: 'output' is 3 (int), not text")


def test_files_with_and_without_inputs_go_together(tmp_path):
    write(tmp_path / "part-0.jsonl", [GOOD])
    write(tmp_path / "part-1.jsonl", [{"instruction": "Say goodbye.", "output": "Goodbye."}])
    config = DataArguments(data=str(tmp_path / "part-*.jsonl"), validation_ratio=0, test_ratio=0)
    assert load_records(config)[0]["train"]["input"][:] == ["", ""]


def test_a_folder_may_hold_other_files(tmp_path):
    (tmp_path / "test.txt").write_text("a note")
    with pytest.raises(UserError, match="no files in a known format"):
        load_records(DataArguments(data=str(tmp_path)))
    write(tmp_path / "train.jsonl", [GOOD])
    assert list(load_records(DataArguments(data=str(tmp_path), validation_ratio=0, test_ratio=0))[0]) == ["train"]


def test_missing_file_names_the_near_one(tmp_path):
    path = write(tmp_path / "records.json", [GOOD])
    assert f"did you mean {str(path)!r}?" in refuse(tmp_path / "recrods.json")
    assert "no such file" in refuse(str(tmp_path / "*.parquet"))
    (tmp_path / "notes.txt").write_text("x")
    assert "unknown format" in refuse(tmp_path / "notes.txt")


def test_hub_id_that_cannot_be_reached():
    message = refuse("nobody/no-such-dataset")
    assert "'nobody/no-such-dataset'" in message and "hf auth login" in message


def test_no_data_and_too_few_records(tmp_path):
    with pytest.raises(UserError, match="no data"):
        load_records(DataArguments())
    path = write(tmp_path / "a.json", [GOOD])
    assert "1 records (1 different) are too few to split into train, test and validation" in refuse(path)


def test_empty_split_after_dropping(tmp_path, demo_tokenizer):
    path = write(tmp_path / "a.json", [{**GOOD, "output": "word " * 300}])
    config = DataArguments(data=str(path), validation_ratio=0, test_ratio=0, overflow="drop")
    with pytest.raises(
        UserError, match="the train split is empty: all of its 1 records are longer than --max_length 256"
    ):
        load_splits(config, demo_tokenizer)


def test_tokenizer_without_end_of_text_token(tmp_path, demo_tokenizer):
    import copy

    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.eos_token = None
    path = write(tmp_path / "a.json", [GOOD])
    with pytest.raises(UserError, match="no end-of-text token"):
        load_splits(DataArguments(data=str(path), validation_ratio=0, test_ratio=0), tokenizer)


def test_a_long_report_counts_the_rest(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**GOOD, "output": ""}] * 1000)
    lines = refuse(path).splitlines()
    assert lines[0].startswith("1000 problems") and lines[-1] == "... and 900 more" and len(lines) == 102
