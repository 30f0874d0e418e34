"""Reading files: columns that nobody needs do not matter, and a value means the same in every format, row and size."""

import csv
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipe.config import DataArguments, UserError
from recipe.data import load_records

FIELDS = ("instruction", "input", "output")
GOOD = {"instruction": "Say hello.", "input": "", "output": "Hello."}


def config(source, **options) -> DataArguments:
    return DataArguments(**{"data": str(source), "validation_ratio": 0, "test_ratio": 0, **options})


def read(source, **options) -> list[dict[str, str]]:
    """The records as they were read, in order; their numbers are checked."""
    dataset = load_records(config(source, **options))[0]["train"]
    assert dataset["row"][:] == list(range(len(dataset)))
    return [{name: row[name] for name in FIELDS} for row in dataset]


def refuse(source, **options) -> str:
    with pytest.raises(UserError) as error:
        load_records(config(source, **options))
    return str(error.value)


# --- 500 generated files whose unused columns are anything at all -----------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
words = text.filter(str.strip)
records = st.lists(
    st.fixed_dictionaries({"instruction": words, "input": text, "output": words}), min_size=1, max_size=6
)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
odd_json = st.sampled_from([
    b"9" * 5000, b"-123456789012345678901234567890", b"NaN", b"-Infinity", b"1e999", b'"\\ud83d"', b'"\\udc80x"',
    b'"\xff\xfe"', b'"2024-01-01"', b'"2024-01-01T00:00:00Z"', b"[" * 3000 + b"]" * 3000,
    b'{"a":' * 2000 + b"1" + b"}" * 2000, b'"\xed\xa0\xbd"',
    b'[{"role": "user", "content": "Hi."}]', b'[1, "a", null]', b'"' + b"x" * 3000 + b'"', b'"\\"output\\": \\"no\\""',
])  # fmt: skip
unused_json = st.one_of(json_value.map(lambda value: json.dumps(value).encode()), odd_json)
unused_names = st.sampled_from(["id", "created", "Output", "text", "row", "reason", "extra", "problem", "", "é", "a.b"])
FAST = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def as_object(record: dict[str, str], others: dict[str, bytes], before: bool, ascii_only: bool) -> bytes:
    needed = [(json.dumps(k).encode(), json.dumps(v, ensure_ascii=ascii_only).encode()) for k, v in record.items()]
    unused = [(json.dumps(k).encode(), v) for k, v in others.items()]
    pairs = [*unused, *needed] if before else [*needed, *unused]
    return b"{" + b", ".join(name + b": " + value for name, value in pairs) + b"}"


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_with_anything_in_unused_columns(tmp_path, suffix):
    @settings(max_examples=150, **FAST)
    @given(st.data(), records, st.booleans(), st.booleans(), st.sampled_from([b"", b"\xef\xbb\xbf"]), st.booleans())
    def check(data, rows, before, ascii_only, bom, crlf):
        others = [data.draw(st.dictionaries(unused_names, unused_json, max_size=3)) for _ in rows]
        lines = [as_object(row, other, before, ascii_only) for row, other in zip(rows, others, strict=True)]
        end = b"\r\n" if crlf else b"\n"
        content = b"[" + (b"," + end).join(lines) + b"]" if suffix == "json" else end.join(lines) + end
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(bom + content)
        assert read(path) == rows

    check()


csv_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "\udcff\udcfe",
        "x" * 200_000,
        '\\"',
        "NaN",
        "null",
        "2024-01-01",
        "9" * 5000,
        'a "quoted" part',
        "C:\\dir\\",
        ";\t|",
    ]
)


def test_csv_with_anything_in_unused_columns(tmp_path):
    @settings(max_examples=100, **FAST)
    @given(st.data(), records, st.lists(unused_names, max_size=3), st.sampled_from(["", "\ufeff"]), st.booleans())
    def check(data, rows, names, bom, before):
        others = [[data.draw(csv_text) for _ in names] for _ in rows]
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator=data.draw(st.sampled_from(["\r\n", "\n"])), quoting=csv.QUOTE_ALL)
        for needed, other in zip(
            [FIELDS, *([row[name] for name in FIELDS] for row in rows)], [names, *others], strict=True
        ):
            writer.writerow([*other, *needed] if before else [*needed, *other])
        path = tmp_path / "a.csv"
        path.write_bytes((bom + out.getvalue()).encode("utf-8", "surrogateescape"))
        assert read(path) == rows

    check()


def odd_arrays(size: int) -> dict[str, pa.Array]:
    """Columns of every kind that Parquet has."""
    bad_text = pa.array([b"\xff\xfe"] * size, pa.binary()).view(pa.string())
    return {
        "ints": pa.array([2**63 - 1] * size),
        "unsigned": pa.array([2**64 - 1] * size, pa.uint64()),
        "decimal": pa.array([10**37] * size, pa.decimal128(38, 0)),
        "nan": pa.array([float("nan")] * size),
        "nulls": pa.nulls(size),
        "when": pa.array([10**18 + 1] * size, pa.timestamp("ns", "UTC")),
        "day": pa.array([1] * size, pa.date32()),
        "not_utf8": bad_text,
        "family_of_bytes": pa.array([b"\xff"] * size),
        "turns": pa.array([[{"role": "user", "content": "Hi."}]] * size),
        "map": pa.array([[("a", 1)]] * size, pa.map_(pa.string(), pa.int64())),
        "deep": pa.array([{"a": {"b": [[1], []]}}] * size),
        "words": pa.array(["a"] * size).dictionary_encode(),
    }


text_types = st.sampled_from([pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])


def test_parquet_with_anything_in_unused_columns(tmp_path):
    @settings(max_examples=100, **FAST)
    @given(
        records, st.lists(st.sampled_from(sorted(odd_arrays(1))), max_size=4, unique=True), text_types, st.booleans()
    )
    def check(rows, names, kind, before):
        needed = {name: pa.array([row[name] for row in rows], pa.string()) for name in FIELDS}
        if pa.types.is_dictionary(kind):
            needed = {name: column.dictionary_encode() for name, column in needed.items()}
        else:
            needed = {name: column.cast(kind) for name, column in needed.items()}
        others = {name: odd_arrays(len(rows))[name] for name in names}
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table(others | needed if before else needed | others), path, row_group_size=2)
        assert read(path) == rows

    check()


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_large_file_means_what_a_small_one_means(tmp_path, suffix):
    """12 MB of nulls, then text, lists and numbers in the unused columns; and a value that is bad, at the end."""
    rows = [
        {"instruction": f"Say {i}.", "input": "x" * (i % 7), "output": f"{i} " + "word " * 60} for i in range(40_000)
    ]
    late = [{"created": None}] * 39_000 + [
        {"created": "2024-01-01", "tags": ["a", i], "id": 10**30} for i in range(1000)
    ]
    path = tmp_path / f"a.{suffix}"

    def write(rows):
        if suffix == "csv":
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["created", "tags", *FIELDS, "id"])
                writer.writeheader()
                writer.writerows(rows)
        elif suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text(json.dumps(rows))

    write([{**other, **row} for other, row in zip(late, rows, strict=True)])
    assert path.stat().st_size > 10_000_000
    assert read(path) == rows
    value, shown = ("", "empty ('')") if suffix == "csv" else (["one", "two"], '["one", "two"] (list), not text')
    write([*rows[:-1], {**rows[-1], "output": value}])
    assert refuse(path).startswith(f"{path} row 39999: 'output' is {shown}; ")


# --- one table of odd values, in every format -------------------------------------------------------------------------

HUGE, HUGE_DIGITS = object(), "1" + "0" * 5000  # an integer that Python does not convert
HALF = "holds half a character"
ODD_VALUES = [  # a value of `output`, what is read or said of it, and the formats that can hold it
    ("None", None, "all"),
    ("nan", None, "all"),
    ("007", None, "all"),
    ("2024-01-01", None, "all"),
    ("null", None, "all"),
    ("1e5", None, "all"),
    ("a\u2028b\x85c", None, "all"),
    ("line one\nline two\r\n", None, "all"),
    ("\U0001f600", None, "all"),
    (' "quoted", with commas; and\ttabs ', None, "all"),
    ("\x00", None, "all"),
    ("x" * 200_000, None, "all"),
    ("", "'output' is empty ('')", "all"),
    (" \t\n", "'output' is blank", "all"),
    ("\u3000", "'output' is blank", "all"),
    ("\ud83d", f"'output' {HALF} (\\ud83d", "all"),
    ("x\udc00", f"'output' {HALF} (\\udc00", "all"),
    ("\ude00\ud83d", f"'output' {HALF} (\\ude00", "all"),
    (None, "'output' is null or missing", "typed"),
    (5, "'output' is 5 (int), not text", "typed"),
    (1.5, "'output' is 1.5 (float), not text", "typed"),
    (float("nan"), "'output' is NaN (float), not text", "typed"),
    (float("inf"), "'output' is Infinity (float), not text", "typed"),
    (True, "'output' is true (bool), not text", "typed"),
    (["a", "b"], "'output' is [\"a\", \"b\"] (list), not text", "typed"),
    ({"a": 1}, "'output' is {\"a\": 1} (dict), not text", "typed"),
    (10**30, f"'output' is {10**30} (int), not text", "json"),
    (HUGE, f"'output' is 1{'0' * 56}... (int), not text", "json"),
]  # fmt: skip


def write_value(path, value) -> None:
    """A good record, and one with this output."""
    if path.suffix == ".csv":
        out = io.StringIO(newline="")
        csv.writer(out).writerows([FIELDS, GOOD.values(), (*list(GOOD.values())[:2], value)])
        path.write_bytes(out.getvalue().encode("utf-8", "surrogatepass"))
    elif path.suffix == ".parquet":
        if isinstance(value, str):
            texts = [part.encode("utf-8", "surrogatepass") for part in ("Hello.", value)]
            output = pa.array(texts, pa.binary()).view(pa.string())
        else:
            output = pa.array([value, value])
        pq.write_table(pa.table({"instruction": ["a", "b"], "input": ["", ""], "output": output}), path)
    else:
        dumped = HUGE_DIGITS if value is HUGE else json.dumps(value)
        rows = [json.dumps(GOOD), json.dumps({**GOOD, "output": 0})[:-2] + dumped + "}"]
        path.write_text("[" + ",\n".join(rows) + "]" if path.suffix == ".json" else "\n".join(rows))


@pytest.mark.parametrize(("value", "said", "formats"), ODD_VALUES, ids=map(str, range(len(ODD_VALUES))))
def test_a_value_means_the_same_in_every_format(tmp_path, value, said, formats):
    suffixes = {
        "all": ["json", "jsonl", "csv", "parquet"],
        "typed": ["json", "jsonl", "parquet"],
        "json": ["json", "jsonl"],
    }
    messages = set()
    for suffix in suffixes[formats]:
        path = tmp_path / f"a.{suffix}"
        write_value(path, value)
        if said is None:
            assert read(path)[1]["output"] == value, suffix
        else:
            message = refuse(path).splitlines()[-1]
            assert message.startswith(f"{path} row 1: {said}"), suffix
            messages.add(message.replace(str(path), ""))
    assert len(messages) == (said is not None)


@pytest.mark.parametrize("token", ["NaN", "-Infinity", "true", "[]"])
def test_an_input_that_is_no_text_is_refused_by_row(tmp_path, token):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + f'\n{{"instruction": "a", "input": {token}, "output": "b"}}\n')
    assert refuse(path).startswith(f"{path} row 1: 'input' is {token} (")


# --- whole files ------------------------------------------------------------------------------------------------------


def test_the_content_decides_and_not_path_size_or_time(tmp_path):
    path = tmp_path / "a.jsonl"
    for word in ("old", "new"):
        path.write_text(json.dumps({**GOOD, "output": word}))
        os.utime(path, (1, 1))
        assert read(path)[0]["output"] == word
    first = load_records(config(path))[0]["train"]
    again = tmp_path / "b.jsonl"
    again.write_bytes(path.read_bytes())
    assert load_records(config(again))[0]["train"]._fingerprint == first._fingerprint  # tokens are found again, too


def test_a_file_may_be_read_twice_at_once(tmp_path, datasets_cache):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "output": f"Hello {i}."}) + "\n" for i in range(20_000)))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(read, [path, path])
    assert first == second and len(first) == 20_000
    assert len(list((datasets_cache / "instruction_records").iterdir())) == 1  # no draft is left


@pytest.mark.parametrize(
    "text",
    [
        'instruction,output\n"Say ""hi"".","He said \\"hi\\"."\n',
        'instruction,output\n"Say it.","\\"hi\\", then \\"ho\\""\n"a","b"\n',
        'instruction,output\nSay it.,He said \\"hi\\".\n',
        'instruction,output\nSay it.,plain\nSay it.,"x \\"y\\""\n',
    ],
)
def test_csv_with_backslash_quotes_is_refused(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(text)
    message = refuse(path)
    assert str(path) in message and '""' in message and '\\"' in message


def test_csv_texts_that_hold_backslashes_and_quotes_are_texts(tmp_path):
    rows = [{**GOOD, "output": value} for value in ('print(\\"hi\\")', "C:\\dir\\", '\\"', '"\\', 'a\\"b,c\\"')]
    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    assert read(path) == rows


@pytest.mark.parametrize(("sign", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
@pytest.mark.parametrize("row", ["a{}b{}c", "a, or b{}{}c, and d, e", '"a{}b"{}""{}c'])
def test_another_delimiter_is_named(tmp_path, sign, name, row):
    path = tmp_path / "a.csv"
    for header in (FIELDS, ("id", *FIELDS), ("instruction", "notes, mine", "input", "output")):
        path.write_text(sign.join(header) + "\n" + row.replace("{}", sign) + "\n")
        message = refuse(path)
        assert name in message and "--instruction_column" not in message and len(message.splitlines()) == 1


def test_a_column_of_conversations_that_nobody_named_is_said(tmp_path):
    """Of preferences: `chosen` holds whole conversations, and may be learned from if somebody says so."""
    rows = [
        {"prompt": "Hi.", "chosen": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    ]
    for name in ("a.json", "a.jsonl", "a.parquet"):
        path = tmp_path / name
        if name == "a.parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text(json.dumps(rows) if name == "a.json" else json.dumps(rows[0]))
        for options in ({}, {"instruction_column": "chosen", "output_column": "x"}):
            message = refuse(path, **options)
            assert "conversations" in message and "--messages_column chosen" in message
            assert "did you mean" not in message and len(message.splitlines()) == 1
        [record] = read(path, messages_column="chosen")
        assert (record["instruction"], record["output"]) == ("Hi.", "Hello.")


def test_a_repeated_name_in_an_object_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"instruction": "a", "output": "b", "output": "c", "id": 1, "id": 2}\n')
    assert refuse(path).startswith(f"{path} row 1 (line 2): 'output' stands twice")
    path.write_text('{"instruction": "a", "output": "b", "id": 1, "id": {"output": "x", "output": "output"}}\n')
    assert read(path)[0]["output"] == "b"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"instruction": "a", "output": "b"},]', "line 1 column 38: broken JSON"),
        ('[{"instruction": "a", "output": "b"}\n', "broken JSON"),
        ('[{"instruction": "a", "output": "b"}]\n[]', "Extra data"),
        ('{\n  "instruction": "a",\n  "output": "b"\n}\n', "objects over several lines"),
        ('{"instruction": "a", "output": "b"} {"instruction": "c", "output": "d"}', "row 0 (line 1): broken JSON"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_read_is_refused_in_words(tmp_path, content, said):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert said in refuse(path)


def test_blank_lines_and_a_missing_last_newline_do_not_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n  \n{json.dumps(GOOD)}\r\n\r\n\t{json.dumps(GOOD)}\t")
    assert read(path) == [GOOD] * 2
