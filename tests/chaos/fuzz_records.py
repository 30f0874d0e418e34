"""Record files that users may hand to training, and what is in them by a reading of our own.

Structures are built value by value, so that it is known which rows are good and what they say; bytes are damaged, and
then the standard library, a CSV parser of our own or pyarrow says what is in the file, if it can.
"""

import gzip
import io
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from fuzzing import ROOT, Case, MisreadError, damage
from plain_readers import BAD, GOOD, NEEDED, UNKNOWN, Row, plainly, row_of

from recipe.config import DataArguments, ModelArguments, UserError

NOT_TEXT = object()
BROKEN = object()


# --- what was read ----------------------------------------------------------------------------------------------------


def prepare() -> Callable[[dict[str, Any]], tuple[Any, list[dict]]]:
    """In the process that others are forked from: what scripts/train.py does with records, until they are tokens."""
    from recipe.data import load_records, token_statistics
    from recipe.data.encode import encode_good_records
    from recipe.data.special_text import find_special_text
    from recipe.data.split import data_hash
    from recipe.files import write_json_lines
    from recipe.model import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(ROOT / "recipe" / "demo" / "base")))

    def read(settings: dict[str, Any]) -> tuple[Any, list[dict]]:
        data_args = DataArguments(validation_ratio=0, test_ratio=0, **settings)
        loaded, left_out = load_records(data_args)
        records, splits = encode_good_records(loaded, tokenizer, data_args, left_out)
        token_statistics(records, splits, 0), find_special_text(records, tokenizer), data_hash(loaded)
        write_json_lines(Path("bad_records.jsonl"), left_out.bad)
        return records["train"], left_out.bad

    return read


def attempt(
    read: Callable, files: dict[str, bytes], rows: Sequence[Row] | None, settings: dict[str, Any], folder: Path
) -> None:
    """Read files as training does, and compare with what they hold, where that is known."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    drop = settings.get("bad_records") == "drop"
    known = rows is not None and all(row.verdict != UNKNOWN for row in rows)
    good = {number: row.values for number, row in enumerate(rows or ()) if row.verdict == GOOD}
    try:
        records, bad = read(settings)
    except UserError as error:
        if known and good and (drop or len(good) == len(rows)):
            raise MisreadError(f"refused, though {len(good)} of its {len(rows)} rows are good: {error}") from error
        raise
    for one in bad:
        json.loads(json.dumps(one, allow_nan=False))
    found = {one["row"]: (one["instruction"], one["input"] or "", one["output"]) for one in records}
    if rows is None:
        return
    for number, values in found.items():
        if number >= len(rows) or rows[number].verdict == BAD:
            raise MisreadError(f"row {number} was read as {ascii(values)[:300]}, and is bad or not there")
        if rows[number].verdict == GOOD and rows[number].values != values:
            raise MisreadError(
                f"row {number} was read as {ascii(values)[:300]}, not {ascii(rows[number].values)[:300]}"
            )
    if known and found.keys() != good.keys():
        raise MisreadError(f"rows {sorted(found)} were read, and {sorted(good)} are good")
    if known and not drop and len(good) < len(rows):
        raise MisreadError("bad rows were read without a word")


# --- what is built value by value -------------------------------------------------------------------------------------

TEXTS = [
    "plain", "two\nlines", "a\r\nb", "a\rb", "tab\there", "nul\0inside", "\0", "bom\ufeff", "\ufeff", "\u2028",
    "a\u2028b",
    "\x85", "a\x85b", "\x1c", "\x1f", "\x0b", "\x0c", "\u200b", "\u202eright", "\x1b[31m", "\x7f", "e\u0301",
    "\U0001f468\u200d\U0001f469",
    "\U0001f600", "\uffff", "\U0010ffff", "\ufffd", "007", "None", "null", "NaN", "Infinity", "true", "2024-01-01",
    "=1+1",
    "-", "{}", "[]", '"', '""', "'", "\\", "\\\\", "a,b", "a;b", "<b>", "%s", "{0}", "{{ x }}", "{% raw %}",
    "\U00012345" * 50,
    "x" * 200_000, "word " * 20_000, "\n" * 1000, "\u0300" * 2000, "", " ", "  \t", "\u3000", "\xa0", "\u2003", "\n",
]  # fmt: skip
DEEP = 100_000
JSON_OTHERS = {  # texts of JSON, and what they are
    NOT_TEXT: [
        b"Infinity", b"-Infinity", b"NaN", b"1e400", b"-0", b"0", b"12", b"1.5", b"9" * 5000, b"-" + b"9" * 5000,
        b"1e99999999999", b"1E-400", b"true", b"false", b"[]", b"{}", b'["a"]', b'{"a": "b"}',
        b"[" * DEEP + b"]" * DEEP,
        b'{"a":' * DEEP + b"1" + b"}" * DEEP, b"[[" + b"9" * 5000 + b"]]", b'{"a": {"a": Infinity}}', b"[NaN]",
        b'"\\ud800"', b'"a\\udfffb"', b'"\\udc80"', b'"\xff"', b'"\xc3"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"',
        b'"\xc0\x80"', b'"' + b"\xe9" * 1000 + b'"', b'[{"role": "user"}]',
        b"{" + b",".join(b'"k%d":1' % i for i in range(3000)) + b"}",
    ],
    None: [b"null"],
    BROKEN: [
        b"nan", b"None", b"'x'", b"tru", b'"unclosed', b'"\\x"', b'"\\u12"', b"01", b"1.", b"+1", b".5", b"0x10",
        b"[", b"{", b"]",
        b"}", b"[1,]", b'{"a":1,}', b"{1: 2}", b"/* */ 1", b"undefined", b"-", b"", b'"a" "b"', b"\xff", b"[" * DEEP,
        b"1 2",
        b'{"a":' * DEEP, b'"a', b"-Infinit", b"1e", b"\xef\xbb\xbf1", b'{"a" 1}', b'{"a"}',
    ],
}  # fmt: skip


def text_in_json(draw: random.Random, text: str) -> bytes:
    return json.dumps(text, ensure_ascii=draw.random() < 0.5).encode()


def odd_value(draw: random.Random) -> tuple[bytes, Any]:
    """JSON, and what it is: a text, None, NOT_TEXT or BROKEN."""
    kind = draw.choice(["text", "text", NOT_TEXT, NOT_TEXT, None, BROKEN])
    if kind == "text":
        text = draw.choice(TEXTS)
        return text_in_json(draw, text), text
    return draw.choice(JSON_OTHERS[kind]), kind


def json_file(draw: random.Random) -> tuple[bytes, str, list[Row] | None]:
    """A file of records, of which some have odd values; the name's ending; and its rows, if it has rows."""
    objects, rows = [], []
    for number in range(draw.randint(1, 6)):
        fields = {name: (text_in_json(draw, f"{name} {number}"), f"{name} {number}") for name in (*NEEDED, "note")}
        if draw.random() < 0.3:
            del fields[draw.choice(["input", "note"])]
        for _ in range(draw.choice([0, 0, 1, 1, 2])):
            fields[draw.choice([*NEEDED, "note", "family"])] = odd_value(draw)
        names = draw.sample([*fields], len(fields))
        objects.append(b"{" + b", ".join(b'"%s": %s' % (name.encode(), fields[name][0]) for name in names) + b"}")
        values = {name: value for name, (_, value) in fields.items()}
        rows.append(Row(BAD, broken=True) if BROKEN in values.values() else row_of(values))
    lines = draw.random() < 0.6
    if lines:
        newline = draw.choice([b"\n", b"\r\n", b"\n\n", b" \n"])
        content = newline.join(objects) + draw.choice([b"", newline])
    else:  # of an array, what stands behind a broken value is not known
        content = b"[" + b",\n".join(objects) + b"]"
        rows = None if any(row.broken for row in rows) else rows
    return draw.choice([b"", b"", b"\xef\xbb\xbf"]) + content, "jsonl" if lines else "json", rows


def csv_file(draw: random.Random) -> tuple[bytes, str, list[Row] | None]:
    names = draw.sample([*NEEDED, "note"], 4)
    lines, rows = [",".join(names).encode()], []
    for number in range(draw.randint(1, 6)):
        values = {name: f"{name} {number}" for name in names}
        cells = {name: value.encode() for name, value in values.items()}
        for name in draw.sample(names, draw.choice([0, 1, 1, 2])):
            values[name] = draw.choice([*TEXTS, "\udcff", "\udce9t\udce9", "\udced\udca0\udc80"])
            cells[name] = values[name].encode("utf-8", "surrogateescape")
            if draw.random() < 0.3 or any(sign in values[name] for sign in ',"\r\n'):
                cells[name] = b'"' + cells[name].replace(b'"', b'""') + b'"'
        row, cut = row_of(values), draw.random()
        line = [cells[name] for name in names]
        if cut < 0.1:  # another number of fields
            line, row = (line[:-1] if cut < 0.05 else [*line, b"x"]), Row(BAD)
        if any('\\"' in values[name] for name in names):
            row = Row(UNKNOWN)
        lines.append(b",".join(line))
        rows.append(row)
    newline = draw.choice([b"\n", b"\r\n", b"\r"])
    content = draw.choice([b"", b"\xef\xbb\xbf"]) + newline.join(lines) + draw.choice([b"", newline])
    return content, "csv", rows


ODD_ARRAYS: list[Callable[[int], pa.Array]] = [
    lambda n: pa.array(range(n)), lambda n: pa.array([float("nan")] * n), lambda n: pa.array([True] * n),
    lambda n: pa.array([None] * n), lambda n: pa.array([b"\xff"] * n), lambda n: pa.array([[1]] * n),
    lambda n: pa.array([{"a": 1}] * n), lambda n: pa.array([2**31 - 1] * n, pa.date32()),
    lambda n: pa.array([2**60] * n, pa.timestamp("ms")), lambda n: pa.array([0] * n, pa.timestamp("s", "Mars/Olympus")),
    lambda n: pa.array([2**62] * n, pa.duration("us")), lambda n: pa.array([1] * n, pa.time32("s")),
    lambda n: pa.array([2**62] * n, pa.time64("us")), lambda n: pa.array([b"\xff\xfe"] * n).view(pa.string()),
    lambda n: pa.array([b"\xff"] * n).view(pa.string()).dictionary_encode(),
    lambda n: pa.array([10**70] * n, pa.decimal256(76, 0)),
    lambda n: pa.array([Decimal("0.1")] * n, pa.decimal128(38, 37)),
    lambda n: pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int8())),
    lambda n: pa.array(["a"] * n, pa.large_string()), lambda n: pa.array(["a"] * n).dictionary_encode(),
    lambda n: pa.array(["a"] * n, pa.string_view()), lambda n: pa.array([""] * n), lambda n: pa.array([" "] * n),
    lambda n: pa.array([b"\xed\xa0\x80"] * n).view(pa.string()), lambda n: pa.array([0.5] * n, pa.float16()),
    lambda n: pa.array([b"abcd"] * n, pa.binary(4)), lambda n: pa.array([["a"]] * n, pa.list_(pa.string(), 1)),
]  # fmt: skip


def parquet_file(draw: random.Random) -> tuple[bytes, str, list[Row] | None]:
    count = draw.randint(1, 5)
    columns = {name: pa.array([f"{name} {number}" for number in range(count)]) for name in (*NEEDED, "note")}
    for _ in range(draw.choice([0, 1, 1, 2])):
        name = draw.choice([*columns, "family"])
        columns[name] = draw.choice(ODD_ARRAYS)(count)
    if draw.random() < 0.3:
        name = draw.choice(NEEDED)
        columns[name] = pa.array([draw.choice([*TEXTS, None]) for _ in range(count)])
    sink = io.BytesIO()
    options = {
        "compression": draw.choice(["snappy", "none", "gzip", "zstd", "brotli"]),
        "use_dictionary": draw.random() < 0.5,
    }
    pq.write_table(pa.table(columns), sink, **options, row_group_size=draw.choice([1, 2, 100]))
    rows = [row_of({name: _plain(columns[name], number) for name in NEEDED}) for number in range(count)]
    return sink.getvalue(), "parquet", rows


def _plain(array: pa.Array, number: int) -> Any:
    """A value, if it is a text."""
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    if str(kind) not in ("string", "large_string", "string_view", "null"):
        return NOT_TEXT
    try:
        return array[number].as_py()
    except UnicodeDecodeError:
        return NOT_TEXT


def disk_folder(draw: random.Random, folder: Path) -> dict[str, bytes]:
    """A folder of `save_to_disk`, of which one file is damaged."""
    datasets.Dataset.from_list([{name: f"{name} {n}" for name in NEEDED} for n in range(4)]).save_to_disk(str(folder))
    files = {f"disk/{path.name}": path.read_bytes() for path in folder.iterdir()}
    name = draw.choice(sorted(files))
    return files | {name: damage(draw, files[name], [*files.values()])}


# --- cases ------------------------------------------------------------------------------------------------------------


class Maker:
    """Makes cases, from a seed; damaged files that reach new lines of the reader are damaged further."""

    def __init__(self, read: Callable, seed: str) -> None:
        self.read, self.draw = read, random.Random(seed)
        self.corpus: dict[str, list[bytes]] = {}
        for _ in range(40):
            content, suffix, _ = self.draw.choice([json_file, csv_file, parquet_file])(self.draw)
            if len(content) < 20_000:
                self.corpus.setdefault(suffix, []).append(content)

    def learn(self, case: Case) -> None:
        """Damage an input further that has reached new lines."""
        known = self.corpus.get(case.kind.split()[-1])
        if known is not None and len(case.content) < 20_000 and len(known) < 500:
            known.append(case.content)

    def built(self) -> Case:
        content, suffix, rows = self.draw.choice([json_file, json_file, csv_file, parquet_file])(self.draw)
        return self._case(f"built {suffix}", suffix, content, rows)

    def damaged(self) -> Case:
        suffix = self.draw.choice(sorted(self.corpus))
        known = self.corpus[suffix]
        content = damage(self.draw, self.draw.choice(known), known)
        return self._case(f"damaged {suffix}", suffix, content, plainly(content, suffix))

    def wrapped(self) -> Case:
        """Compressed, cut off, or under another name."""
        content, suffix, rows = self.draw.choice([json_file, csv_file, parquet_file])(self.draw)
        packed = gzip.compress(content, mtime=0)
        what = self.draw.choice(["gz", "cut gz", "other name", "cut", "empty", "utf-16"])
        if what in ("gz", "cut gz"):
            content, rows = packed[: len(packed) // 2] if what == "cut gz" else packed, []
            suffix = self.draw.choice([suffix, f"{suffix}.gz", "gz"])
        elif what == "other name":
            suffix = self.draw.choice(["json", "jsonl", "csv", "tsv", "parquet", "txt", "JSON", "ndjson", "arrow"])
            rows = None
        elif what == "utf-16" and suffix != "parquet":
            content, rows = (
                content.decode("utf-8", "replace").encode(self.draw.choice(["utf-16", "utf-16-le", "utf-32"])),
                [],
            )
        else:
            content = content[: self.draw.randrange(len(content))] if what == "cut" else b" " * self.draw.randint(0, 3)
            rows = plainly(content, suffix)
        return self._case(f"wrapped: {what}", suffix, content, rows)

    def on_disk(self) -> Case:
        with tempfile.TemporaryDirectory() as folder:
            files = disk_folder(self.draw, Path(folder) / "disk")
        return self._case_of("folder of save_to_disk", files, "disk", None, b"")

    def _case(self, kind: str, suffix: str, content: bytes, rows: list[Row] | None) -> Case:
        return self._case_of(kind, {f"records.{suffix}": content}, f"records.{suffix}", rows, content)

    def _case_of(self, kind: str, files: dict[str, bytes], data: str, rows: list[Row] | None, content: bytes) -> Case:
        settings = {"data": data, "bad_records": self.draw.choice(["error", "error", "drop"])}
        words = (data,)
        if rows and settings["bad_records"] == "error" and all(row.verdict != UNKNOWN for row in rows):
            words += tuple(f" row {number}" for number, row in enumerate(rows) if row.verdict == BAD)[:1]
        if kind.startswith("damaged") or kind.startswith("wrapped"):
            words = (data,)
        return Case(kind, content, partial(attempt, self.read, files, rows, settings), words=words)

    def cases(self, count: int) -> list[Case]:
        makers = self.draw.choices([self.built, self.damaged, self.wrapped, self.on_disk], [45, 45, 8, 2], k=count)
        return [make() for make in makers]
