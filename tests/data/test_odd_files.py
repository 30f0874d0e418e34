"""Files that other programs write and people mangle: refused with file and row, in one line, or read as they are."""

import gzip
import json
from datetime import date
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from recipe.config import DataArguments, UserError
from recipe.data import load_records

GOOD = {"instruction": "Say hello.", "input": "", "output": "Hello."}
GOOD_LINE = json.dumps(GOOD)


def load(source, **options):
    source = source if isinstance(source, list | dict) else str(source)
    return load_records(DataArguments(**{"data": source, "validation_ratio": 0, "test_ratio": 0, **options}))


def refuse(source, **options) -> str:
    with pytest.raises(UserError) as error:
        load(source, **options)
    return str(error.value)


def bad_values(source) -> list[dict]:
    """The values of bad records, as bad_records.jsonl has them."""
    return [json.loads(json.dumps(one["record"], allow_nan=False)) for one in load(source, bad_records="drop")[1].bad]


# --- folders of save_to_disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [0, 10**9])
@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_save_to_disk_that_has_changed_is_read_again(tmp_path, monkeypatch, in_memory, splits):
    """One function, with another result each time: the fingerprint that datasets gives is the same."""
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", in_memory)
    for text in ("old", "new", "newest"):
        mapped = Dataset.from_list([{**GOOD, "output": text}] * 3).map(dict, new_fingerprint="same")
        folder = tmp_path / text
        (DatasetDict({"train": mapped}) if splits else mapped).save_to_disk(str(folder))
        records = load(folder)[0]["train"]
        assert records["output"][:] == [text] * 3
        assert load(folder)[0]["train"]._fingerprint == records._fingerprint  # what has not changed is found again


def test_words_of_a_dictionary_are_part_of_the_content(tmp_path):
    for text in ("old", "new"):
        column = pa.array([text, text]).dictionary_encode()
        table = pa.table({"instruction": ["a", "b"], "output": ["c", "d"], "input": column})
        pq.write_table(table, tmp_path / "a.parquet")
        dataset = Dataset(pq.read_table(tmp_path / "a.parquet"), fingerprint="same")
        dataset.save_to_disk(str(tmp_path / text))
        assert load(tmp_path / text)[0]["train"]["input"][:] == [text] * 2


def test_a_damaged_arrow_file_is_refused_in_a_line(tmp_path):
    Dataset.from_list([GOOD] * 1000).save_to_disk(str(tmp_path / "a"))
    [file] = (tmp_path / "a").glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[900:1400] = b"\xff" * 500
    file.write_bytes(content)
    message = refuse(tmp_path / "a")
    assert str(tmp_path / "a") in message and len(message.splitlines()) < 3


# --- names that stand twice, or in another case -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "spelled"),
    [
        ("instruction", r"instructio\u006e"),
        ("instruction", r"\u0069nstruction"),
        ("指令", r"\u6307\u4ee4"),
        ("指令", r"指\u4EE4"),
        ('the "task"', r"the \"task\""),
        ('the "task"', r"the \u0022task\""),
        ("in/out", r"in\/out"),
        ("a\\b", r"a\u005cb"),
        ("\U0001f600", r"\uD83d\ude00"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_name_that_stands_twice_is_refused_however_it_is_spelled(tmp_path, column, spelled, suffix, deep):
    name = json.dumps(column)
    more = ', "more": ' + "[" * 3000 + "]" * 3000 if deep else ""
    good = f'{{{name}: "a", "output": "b"{more}}}'
    for first, second in ((name, f'"{spelled}"'), (f'"{spelled}"', name), (f'"{spelled}"',) * 2):
        bad = f'{{{first}: "a", "output": "b", {second} : "c"{more}}}'
        path = tmp_path / f"a.{suffix}"
        path.write_text(f"[{good},\n{bad}]" if suffix == "json" else f"{good}\n{bad}\n", encoding="utf-8")
        message = refuse(path, instruction_column=column)
        assert message.startswith(f"{path} row 1") and f"{column!r} stands twice in one record" in message
    path.write_text(f"[{good.replace(name, chr(34) + spelled + chr(34))}]")  # once, it is the name it means
    assert load(path, instruction_column=column)[0]["train"]["instruction"][:] == ["a"]


def test_a_text_that_spells_names_is_a_text(tmp_path):
    text = r"{\"instruction\": \"x\", \"instructio\\u006e\": 5} \u006e instructio\u006e"
    (tmp_path / "a.jsonl").write_text(f'{{"instruction": "{text}", "output": "{text}", "x": {{"output": 1}}}}\n')
    [record] = load(tmp_path / "a.jsonl")[0]["train"]
    assert record["instruction"] == record["output"] == json.loads(f'"{text}"')


@pytest.mark.parametrize("name", ["Input", "INPUT", " input", "input ", "in put"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_an_input_is_not_lost_by_the_case_of_its_name(tmp_path, name, suffix):
    other = {"instruction": "Say it.", name: "bye", "output": "Bye."}
    rows = [GOOD, other, {**GOOD, name: "kept apart"}, {"instruction": "No input.", "output": "x"}]
    path = tmp_path / f"a.{suffix}"
    path.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert refuse(path) == f"{path} row 1: {name!r} stands where 'input' should; rename it or remove the row"
    assert load(path, bad_records="drop")[0]["train"]["row"][:] == [0, 2, 3]
    assert bad_values(path) == [{"instruction": "Say it.", "input": "", "output": "Bye.", name: "bye"}]


def test_another_case_in_a_header(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,INPUT,output\na,b,c\n")
    pq.write_table(pa.table({"instruction": ["a"], "INPUT": ["b"], "output": ["c"]}), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([{"Instruction": "a", "OUTPUT ": "b"}]))
    for name, meant in (("a.csv", "INPUT"), ("a.parquet", "INPUT"), ("a.json", "Instruction")):
        assert f"did you mean {meant!r}?" in refuse(tmp_path / name)
    assert "did you mean 'OUTPUT '?" in refuse(tmp_path / "a.json")


# --- values of Parquet that Python cannot hold ------------------------------------------------------------------------

FAR_DAY = pa.array([0, 2**31 - 1], pa.date32())
NO_ZONE = pa.array([0, 10**9], pa.timestamp("s", "Mars/Olympus"))
FAR_SECOND = pa.array([0, 2**60], pa.timestamp("ms"))
BAD_WORDS = pa.array([b"ok", b"\xff"]).view(pa.string()).dictionary_encode()
IN_A_LIST = pa.array([[0], [2**31 - 1]], pa.list_(pa.date32()))


@pytest.mark.parametrize("column", [FAR_DAY, NO_ZONE, FAR_SECOND, IN_A_LIST], ids=["day", "zone", "second", "list"])
def test_dates_that_python_does_not_have(tmp_path, column):
    path, texts = tmp_path / "a.parquet", pa.array(["a", "b"])
    for field in ("instruction", "input", "output"):
        table = {"instruction": texts, "input": texts, "output": texts, field: column}
        pq.write_table(pa.table(table), path)
        message = refuse(path)
        assert f"{path} row 1: {field!r} is " in message and "not text" in message.splitlines()[-1]
    for unused in ("family", "when"):
        pq.write_table(pa.table({"instruction": texts, "output": texts, unused: column}), path)
        assert load(path)[0]["train"]["output"][:] == ["a", "b"]
    pq.write_table(pa.table({"instruction": texts, "when": column}), path)
    assert "no column 'output'" in refuse(path)
    Dataset(pa.table({"instruction": texts, "output": texts, "family": FAR_DAY})).save_to_disk(str(tmp_path / "disk"))
    assert len(load(tmp_path / "disk")[0]["train"]) == 2


def test_words_of_a_dictionary_that_are_not_utf8(tmp_path):
    path, texts = tmp_path / "a.parquet", pa.array(["a", "b"])
    pq.write_table(pa.table({"instruction": texts, "output": BAD_WORDS}), path)
    assert refuse(path) == f"{path} row 1: 'output' is not UTF-8 text; save the file as UTF-8"
    pq.write_table(pa.table({"instruction": texts, "output": texts, "family": BAD_WORDS}), path)
    assert load(path)[0]["train"]["family"][:] == ["ok", "?"]


@pytest.mark.parametrize("name", ["instruction", "input", "output"])
def test_parquet_with_a_column_twice(tmp_path, name):
    path = tmp_path / "a.parquet"
    names = ["instruction", "input", "output"]
    pq.write_table(pa.table([pa.array(["a"])] * 4, names=[*names, name]), path)
    assert refuse(path) == f"{path} has the column {name!r} twice; give each its own name"
    pq.write_table(pa.table([pa.array(["a"])] * 5, names=[*names, "x", "x"]), path)
    assert load(path)[0]["train"]["output"][:] == ["a"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([Decimal("1.5")], "1.5 (Decimal)"),
        ([Decimal("-2.00")], "-2.00 (Decimal)"),
        ([Decimal("7")], "7 (int)"),
        ([date(2024, 1, 2)], '"2024-01-02" (date)'),
    ],
)
def test_the_type_of_a_value_is_its_own(tmp_path, values, said):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"instruction": ["a"], "output": values}), path)
    assert refuse(path).startswith(f"{path} row 0: 'output' is {said}, not text")


@pytest.mark.parametrize("column", ["output", "instruction"])
def test_a_damaged_page_is_one_problem(tmp_path, column):
    path = tmp_path / "a.parquet"
    rows = [{"instruction": f"{column} {i} " * 20, "output": f"{i} {column} " * 20} for i in range(2000)]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="snappy", use_dictionary=False)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0 if column == "instruction" else 1)
    content = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    for damage in (content[:], content[:]):
        end = start + (200 if damage is content else chunk.total_compressed_size)
        damage[start:end] = b"\xfe" * (end - start)
        path.write_bytes(damage)
        assert refuse(path).startswith(f"{path} cannot be read as parquet: ") and len(refuse(path).splitlines()) == 1


def test_a_damaged_column_that_is_not_needed_costs_nothing(tmp_path):
    path, texts = tmp_path / "a.parquet", [f"{i} text" for i in range(200)]
    table = pa.table({"note": texts, "instruction": texts, "output": texts})
    pq.write_table(table, path, use_dictionary=False, compression="none")
    chunk, content = pq.ParquetFile(path).metadata.row_group(0).column(0), bytearray(path.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + 99] = b"\xfe" * 99
    path.write_bytes(content)
    with pytest.raises(OSError):
        pq.read_table(path)
    assert load(path)[0]["train"]["output"][:] == texts


def test_the_name_of_a_column_may_be_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"instruction": ["a"], "noteworthy": ["b"], "output": ["c"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"noteworthy", b"note\xb7orthy"))
    assert refuse(path).startswith(f"{path} cannot be read as parquet: ")


@pytest.mark.parametrize("kind", ["Value", {"a": "Value"}, "x", 5])
def test_features_of_another_type_are_the_folders_fault(tmp_path, kind):
    Dataset.from_list([GOOD]).save_to_disk(str(tmp_path / "saved"))
    path = tmp_path / "saved" / "dataset_info.json"
    content = json.loads(path.read_text())
    content["features"]["instruction"] = kind
    path.write_text(json.dumps(content))
    assert "a folder of save_to_disk that cannot be loaded" in refuse(tmp_path / "saved")


# --- halves of characters, and NaN ------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [r"\udc80", r"\uDCFF", r"\udced\udca0\udcbd", r"\ud83d", r"a\ude00", r"\udbff x"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_half_a_character_is_no_matter_of_the_encoding(tmp_path, half, suffix):
    path = tmp_path / f"a.{suffix}"
    line = f'{{"instruction": "x", "output": "y {half}"}}'
    whole = r'{"instruction": "\ud83d\ude00", "output": "\u00e9", "more": "\udc81"}'
    path.write_text(f"[{whole}, {line}]" if suffix == "json" else f"{whole}\n{line}\n", encoding="ascii")
    message = refuse(path)
    assert message.startswith(f"{path} row 1: 'output' holds half a character (\\ud") and "UTF-8" not in message
    # beside a byte that is not UTF-8, each is called what it is
    path.write_bytes(f'{{"instruction": "\udcff", "output": "y {half}"}}\n'.encode("utf-8", "surrogateescape"))
    first, second = refuse(path).splitlines()[1:]
    assert "'instruction' is not UTF-8 text" in first and "'output' holds half a character" in second


def test_only_nan_becomes_text_in_bad_records(tmp_path):
    lines = [
        '{"instruction": "a \\"b\\" \\n", "input": NaN, "output": "é"}',
        '{"instruction": [1.5, -Infinity, {"x": NaN}], "output": "c"}',
        "[NaN, 1]",
    ]
    (tmp_path / "a.jsonl").write_text("\n".join([GOOD_LINE, *lines]))
    assert bad_values(tmp_path / "a.jsonl") == [
        {"instruction": 'a "b" \n', "input": "NaN", "output": "é"},
        {"instruction": [1.5, "-Infinity", {"x": "NaN"}], "input": "", "output": "c"},
        {"value": ["NaN", 1]},
    ]


# --- CSV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("before", [["a,b"], ['"two\nlines",b', "", "c,d"], ["", ""]])
def test_an_unclosed_quote_is_reported_where_its_record_begins(tmp_path, newline, before):
    lines = "\n".join(["instruction,output", *before, 'open,"never closed', *["e,f"] * 500]) + "\n"
    path = tmp_path / "a.csv"
    path.write_text(lines, newline=newline)
    line = lines[: lines.index("open,")].count("\n") + 1
    assert refuse(path).startswith(f"{path} line {line}: broken quotes in the record that begins there")
    path.write_text('instruction,"output\na,b\n')
    assert refuse(path).startswith(f"{path} line 1: ")


TABLE = "instruction\toutput\nSay é.\té\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TABLE.encode("utf-16"), "is UTF-16 text, not UTF-8"),
        (TABLE.encode("utf-16-le"), "is UTF-16 text, not UTF-8"),
        (TABLE.encode("utf-16-be"), "is UTF-16 text, not UTF-8"),
        (TABLE.encode("utf-32"), "is UTF-32 text, not UTF-8"),
        (gzip.compress(TABLE.encode(), mtime=0), "compressed with gzip"),
        (b"PK\x03\x04\x14\x00\x06\x00", "a zip archive or an Excel file"),
        (b"PAR1\x15\x04", "a Parquet file"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, content, said, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    assert refuse(path).startswith(f"{path} is ") and said in refuse(path) and len(refuse(path).splitlines()) == 1


def test_the_first_line_of_excel(tmp_path):
    path = tmp_path / "a.csv"
    for first in ("sep=,", '"sep=,"', "SEP=,", "\ufeffsep=,"):
        path.write_text(f"{first}\r\ninstruction,output\r\na,b\r\n", encoding="utf-8")
        assert [(row["row"], row["output"]) for row in load(path)[0]["train"]] == [(0, "b")]
    for sign, name in ((";", "semicolons"), ("\t", "tabs"), ("#", "another sign than commas")):
        path.write_text(f"sep={sign}\ninstruction{sign}output\na{sign}b\n")
        assert name in refuse(path) and len(refuse(path).splitlines()) == 1


def test_a_header_with_a_line_break_is_one_line_of_a_message(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('instruction,"my\nnotes",output\na,b\n')
    assert refuse(path).startswith(f"{path} row 0: 2 fields, but the header has 3") and "\n" not in refuse(path)
