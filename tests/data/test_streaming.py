"""A stream beside the same records read whole: each record once a pass, the same tokens and splits, bad ones apart."""

import csv
import itertools
import json
import os
import sys
from collections import Counter
from dataclasses import replace

import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from loopback_hub import serve_hub
from torch.utils.data import DataLoader

from recipe.config import DataArguments, UserError
from recipe.data import encode_records, load_records
from recipe.data.streaming import STOP, load_stream


def rows(count: int, tag: str) -> list[dict[str, str]]:
    return [{"instruction": f"Say {tag} {i}.", "input": "now" * (i % 2), "output": f"{tag} {i}"} for i in range(count)]


def chats(count: int) -> list[dict]:
    return [
        {"messages": [
            {"role": "user", "content": f"Hi {i}."}, {"role": "assistant", "content": f"<think>{i}</think> Hi."},
            {"role": "user", "content": "Why?"}, {"role": "assistant", "content": f"So {i}."},
        ]} for i in range(count)
    ]  # fmt: skip


def write(path, records) -> str:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    return str(path)


def config(data, **options) -> DataArguments:
    settings = {"validation_ratio": 0, "test_ratio": 0, "template": "phi3", "streaming": True, "shuffle_buffer": 50}
    return DataArguments(data=data, **settings | options)


class OnePass(torch.utils.data.IterableDataset):
    """One pass of a stream, by the workers of a loader."""

    def __init__(self, stream):
        self.stream = stream

    def __iter__(self):
        return self.stream._encoded(list(self.stream.one_pass(0)))


def as_text(record) -> tuple:
    return tuple(record["input_ids"]), tuple(record["labels"]), tuple(record.get("ends") or [len(record["input_ids"])])


@pytest.fixture
def shards(tmp_path) -> list[str]:
    return [
        write(tmp_path / "a.jsonl", rows(150, "apple")), write(tmp_path / "b.csv", rows(70, "berry")),
        write(tmp_path / "c.parquet", rows(99, "cherry")), write(tmp_path / "d.jsonl", chats(60)),
    ]  # fmt: skip


@pytest.mark.parametrize("ranks, workers", [(1, 0), (1, 2), (2, 0), (3, 2), (8, 0)])
def test_a_pass_holds_each_record_once_whoever_reads_it(shards, demo_tokenizer, ranks, workers):
    """The answer is `load_records` and `encode_records` of the same files, which read them whole."""
    way = config(shards, template="chatml")
    whole = encode_records(load_records(way)[0], demo_tokenizer, way)["train"]
    expected = Counter(as_text(record) for record in whole)
    shares = []
    for rank in range(ranks):
        stream, _, _ = load_stream(way, demo_tokenizer, 1, rank, ranks)
        loader = DataLoader(OnePass(stream), batch_size=None, num_workers=workers, collate_fn=lambda record: record)
        shares.append(Counter(as_text(record) for record in loader))
    assert sum(shares, Counter()) == expected and expected.total() == 379
    assert all(share.total() > 0 for share in shares)


def test_each_pass_has_an_order_of_its_own_and_the_seed_decides(shards, demo_tokenizer):
    def orders(seed: int) -> list[list[int]]:
        stream, _, _ = load_stream(config(shards), demo_tokenizer, seed)
        return [[record["row"] for record in stream.one_pass(number)] for number in (0, 1)]

    (first, second), again, other = orders(1), orders(1), orders(2)
    assert [first, second] == again and first != second and first != other[0]
    assert sorted(first) == sorted(second) == sorted(other[0]) and first != sorted(first)


def test_a_buffer_of_one_keeps_the_order(shards, demo_tokenizer):
    stream, _, _ = load_stream(config(shards[:1], shuffle_buffer=1), demo_tokenizer, 1)
    assert [record["row"] for record in stream.one_pass(0)] == list(range(150))


def test_splits_follow_from_each_record_alone(tmp_path, shards, demo_tokenizer):
    """The same whether records are streamed or read whole, in any order, and with more records beside them."""
    way = config(shards, validation_ratio=0.1, test_ratio=0.2)
    splits, _ = load_records(way)
    texts = {name: set(zip(split["instruction"], split["output"], strict=True)) for name, split in splits.items()}
    stream, others, _ = load_stream(way, demo_tokenizer, 1)
    streamed = {(record["instruction"], record["output"]) for record in stream.one_pass(0)}
    assert streamed == texts["train"]
    assert (
        set(zip(others["validation"]["instruction"], others["validation"]["output"], strict=True))
        == texts["validation"]
    )
    assert not texts["train"] & texts["test"] and 40 < len(texts["test"]) < 110 and 15 < len(texts["validation"]) < 60
    more = write(tmp_path / "more.jsonl", rows(500, "date"))
    bigger, _ = load_records(replace(way, data=[more, *reversed(shards)]))
    assert all(
        texts[name] <= set(zip(split["instruction"], split["output"], strict=True)) for name, split in bigger.items()
    )


def test_what_named_splits_hold_is_left_out_of_training(tmp_path, shards, demo_tokenizer):
    held = write(tmp_path / "held.jsonl", [*rows(10, "apple"), *rows(5, "elder")])
    stream, others, _ = load_stream(config({"train": shards[0], "validation": held}), demo_tokenizer, 1)
    assert others["validation"]["output"] == [row["output"] for row in (*rows(10, "apple"), *rows(5, "elder"))]
    assert {record["output"] for record in stream.one_pass(0)} == {f"apple {i}" for i in range(10, 150)}


def test_bad_records_come_apart_with_file_row_and_reason(tmp_path, demo_tokenizer):
    bad = {
        3: {"output": 7},
        40: {"instruction": " "},
        77: {"output": demo_tokenizer.eos_token},
        90: {"output": "x " * 600},
    }
    records = [row | bad.get(index, {}) for index, row in enumerate(rows(100, "apple"))]
    one, two = write(tmp_path / "good.jsonl", rows(50, "berry")), write(tmp_path / "bad.jsonl", records)
    stream, _, _ = load_stream(config([one, two], bad_records="drop", overflow="error"), demo_tokenizer, 1)
    found = list(itertools.islice(stream, 150))
    apart = sorted((r for r in found if "input_ids" not in r), key=lambda record: record["row"])
    assert [(r["file"], r["row"], r["reason"].split(" tokens")[0]) for r in apart] == [
        (two, 3, "'output' is not text (int)"), (two, 40, "'instruction' is blank"),
        (two, 77, "'output' is nothing but the end-of-text token"), (two, 90, "longer than --max_length 256"),
    ]  # fmt: skip
    assert apart[0]["record"]["output"] == 7 and "write it as text or remove the row" in apart[0]["problem"]


def test_a_file_that_breaks_off_and_one_without_good_records_end_the_stream(tmp_path, demo_tokenizer):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(rows(50, "apple"))[:-20])
    bad = write(tmp_path / "bad.jsonl", [{"instruction": "Say.", "output": ""}])
    for file, said in ((str(path), "broken.json"), (bad, "no good record")):
        stream, _, _ = load_stream(config(file, bad_records="drop"), demo_tokenizer, 1)
        *_, last = stream
        assert last["reason"] == STOP and said in last["problem"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_data_set_on_the_hub_is_read_as_it_comes(tmp_path, kind):
    """In a process that may go online, from a server that speaks the Hub's protocol; nothing lands in the cache."""
    write(tmp_path / "hub" / f"train.{kind}", rows(3000, "apple"))
    (tmp_path / "hub" / "README.md").write_text("# A data set")
    with serve_hub({"datasets/someone/data": tmp_path / "hub"}) as endpoint:
        environment = os.environ | {
            "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        done = processes.run(
            [sys.executable, "scripts/train.py", "configs/demo.yaml", "--data", "someone/data", "--streaming", "true",
             "--max_steps", "3", "--output_dir", str(tmp_path / "run"), "--num_sample_generations", "0"],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["result"]["steps"] == 3 and run["hub"]["data"] == ["someone/data"]
    cached = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size > 50_000]
    assert not cached


@pytest.mark.parametrize(
    "data, said",
    [
        ([{"path": "a.jsonl", "weight": 1}], "--streaming takes one source"),
        ({"test": "a.jsonl"}, "no train split"),
        (None, "no data: name a file"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, monkeypatch, demo_tokenizer, data, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", rows(5, "apple"))
    with pytest.raises(UserError) as error:
        load_stream(config(data), demo_tokenizer, 1)
    assert said in str(error.value)
