"""Errors after reading: they name the file and the row in it, for all records at once, and `drop` drops them."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from tokenizer_kinds import word_level

from recipe.config import DataArguments, UserError
from recipe.data import encode_records, load_records, load_splits
from recipe.data.encode import encode_good_records
from recipe.data.origin import origin, place
from recipe.training.sampling import TokenBudgetBatches, plan_batches

END = "</s>"
WORDS = ["cat", "dog", "house", "tree"]


def rows(count: int, tag: str = "") -> list[dict[str, str]]:
    return [{"instruction": f"Say {tag} {i}.", "input": "", "output": f"{tag} {i}"} for i in range(count)]


def write(path, records) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def config(source, **options) -> DataArguments:
    return DataArguments(**{"data": source, "validation_ratio": 0, "test_ratio": 0, "template": "phi3", **options})


def refuse(source, tokenizer, **options) -> list[str]:
    with pytest.raises(UserError) as error:
        load_splits(config(source, **options), tokenizer)
    return str(error.value).splitlines()


@pytest.fixture(params=["overflow", "end", "spelling"])
def fault(request, demo_tokenizer):
    """A record that is good until it becomes tokens, the tokenizer, the options, and what is said of it."""
    if request.param == "overflow":
        return {"output": "word " * 500}, demo_tokenizer, {"overflow": "error"}, "longer than --max_length"
    if request.param == "end":
        return {"output": f" {demo_tokenizer.eos_token}\n"}, demo_tokenizer, {}, "'output' is nothing but"
    return {"instruction": f"Say {END} twice."}, word_level(), {}, f"this tokenizer cannot read {END!r} as text"


def test_every_form_of_data_names_the_file_and_its_row(tmp_path, fault):
    change, tokenizer, options, said = fault
    bad = {**rows(1, "bad")[0], **change}
    a = write(tmp_path / "a.jsonl", rows(5, "a"))
    b = write(tmp_path / "b.jsonl", rows(2, "b"))
    e = write(tmp_path / "e.jsonl", [*rows(3, "e"), bad])
    f = write(tmp_path / "f.jsonl", [*rows(1, "f"), {**bad, "input": "other"}])
    folder = tmp_path / "folder"
    in_dev = write(folder / "dev.jsonl", [*rows(2, "dev"), bad])
    write(folder / "train-0.jsonl", rows(4, "t"))
    in_train = write(folder / "train-1.jsonl", [bad | {"input": "x"}, *rows(3, "u")])
    saved = {"train": Dataset.from_list(rows(3, "s")), "dev": Dataset.from_list([*rows(1, "d"), bad])}
    DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    for source, places in (
        ({"train": a, "dev": e}, [f"{e} row 3"]),
        ({"train": e, "holdout": f}, [f"{e} row 3", f"{f} row 1"]),
        ([a, e, f], [f"{e} row 3", f"{f} row 1"]),
        ({"train": a, "eval": [b, f]}, [f"{f} row 1"]),
        (str(tmp_path / "[aef].jsonl"), [f"{e} row 3", f"{f} row 1"]),
        (str(folder), [f"{in_train} row 0", f"{in_dev} row 2"]),
        (str(tmp_path / "saved"), [f"{tmp_path / 'saved'} validation row 1"]),
    ):
        lines = refuse(source, tokenizer, **options)
        if len(places) > 1:
            assert lines.pop(0) == f"{len(places)} problems in the data; nothing was trained or written:"
        assert all(line.startswith(f"{where}: {said}") for line, where in zip(lines, places, strict=True)), lines


def test_rows_of_files_after_bad_records_and_splits_taken_out(tmp_path, fault):
    """Bad rows that reading left out, a validation split taken out of train, and several processes."""
    change, tokenizer, options, said = fault
    late = [{**row, **change} | {"input": str(i)} for i, row in enumerate(rows(40, "late"))]
    first = write(tmp_path / "a.jsonl", [*rows(30, "a"), {"instruction": "x", "output": ""}, *rows(9, "b")])
    second = write(tmp_path / "b.jsonl", late)
    shares = {"validation_ratio": 0.2, "test_ratio": 0.2, "split_seed": 1}
    options = {**options, **shares, "num_proc": 2, "bad_records": "drop"}
    loaded, left_out = load_records(config([first, second], **options))
    for split in loaded.values():
        for record in split:
            found = origin(split, record["row"])
            name, row = (first, record["row"]) if record["row"] < 40 else (second, record["row"] - 40)
            assert found == {"file": name, "split": "train", "row": row}
    if "overflow" in options:
        lines = refuse([first, second], tokenizer, **options)[1:]
        assert sorted(line.split(": ")[0] for line in lines) == sorted(f"{second} row {row}" for row in range(40))
        return
    good, encoded = encode_good_records(loaded, tokenizer, config([first, second], **options), left_out)
    assert {name: split["row"][:] for name, split in good.items()} == {
        name: split["row"][:] for name, split in encoded.items()
    }
    assert sorted(row for split in encoded.values() for row in split["row"]) == [*range(30), *range(31, 40)]
    found = sorted((one["file"], one["row"]) for one in left_out.bad)
    assert found == [(first, 30), *((second, row) for row in range(40))]
    for one in left_out.bad[1:]:
        assert one["record"] == {name: late[one["row"]][name] for name in ("instruction", "input", "output")}
        assert said in one["problem"] and not one["problem"].startswith(":") and one["split"] == "train"
    assert left_out.reasons[left_out.bad[-1]["reason"]] == 40
    encoded = encode_records(loaded, tokenizer, config([first, second], **options))
    assert sum(map(len, encoded.values())) == 39
    assert place(encoded["train"], 45) == f"{second} row 5"


def test_a_split_of_which_no_record_is_good(tmp_path, demo_tokenizer):
    end = demo_tokenizer.eos_token
    data = {
        "train": write(tmp_path / "a.jsonl", rows(3)),
        "val": write(tmp_path / "b.jsonl", [{**row, "output": end * 2} for row in rows(2)]),
    }
    [line] = refuse(data, demo_tokenizer, bad_records="drop")
    told = "the validation split has no good record; the first of 2 bad ones: "
    assert line.startswith(f"{told}{data['val']} row 0: 'output' is nothing but")
    assert [line.split(": ")[0] for line in refuse(data, demo_tokenizer)[1:]] == [
        f"{data['val']} row {row}" for row in (0, 1)
    ]


def test_bad_and_too_long_records_are_in_one_report(tmp_path, demo_tokenizer):
    records = rows(4)
    records[1]["output"], records[2]["output"] = demo_tokenizer.eos_token, "word " * 500
    path = write(tmp_path / "a.jsonl", records)
    lines = refuse(path, demo_tokenizer, overflow="error")
    assert lines[0].startswith("2 problems") and [line.split(": ")[0] for line in lines[1:]] == [
        f"{path} row 1", f"{path} row 2",
    ]  # fmt: skip
    dropped = load_splits(config(path, overflow="drop", bad_records="drop"), demo_tokenizer)["train"]
    assert dropped["row"][:] == [0, 3]


def test_a_record_with_two_faults_is_told_with_both(tmp_path):
    tokenizer = word_level()
    record = {"instruction": f"Say {END} twice.", "input": "", "output": tokenizer.eos_token}
    path = write(tmp_path / "a.jsonl", [*rows(1), record])
    lines = refuse(path, tokenizer)
    assert len(lines) == 3 and all(line.startswith(f"{path} row 1: ") for line in lines[1:])
    _, left_out = load_records(config(path))
    encode_good_records(load_records(config(path))[0], tokenizer, config(path, bad_records="drop"), left_out)
    [bad] = left_out.bad
    assert "cannot read" in bad["problem"] and "; 'output' is nothing but" in bad["problem"]


def test_the_cache_of_tokens_does_not_depend_on_the_names_of_files(tmp_path, demo_tokenizer):
    first = write(tmp_path / "a.jsonl", [*rows(3), {**rows(1)[0], "output": demo_tokenizer.eos_token}])
    second = write(tmp_path / "b.jsonl", map(json.loads, Path(first).read_text().splitlines()))
    assert refuse(first, demo_tokenizer)[0].startswith(f"{first} row 3: ")
    assert refuse(second, demo_tokenizer)[0].startswith(f"{second} row 3: ")
    one, two = (load_splits(config(path, bad_records="drop"), demo_tokenizer)["train"] for path in (first, second))
    assert one.cache_files == two.cache_files and place(one, 1) != place(two, 1)


def test_records_of_other_origin_are_named_by_their_split():
    assert place(Dataset.from_list(rows(2)), 1, "holdout") == "holdout row 1"


class Budget:
    world_size, seed, data_seed, length_column_name = 1, 0, None, "length"

    def __init__(self, tokens: int) -> None:
        self.max_tokens_per_batch = tokens


def test_a_record_longer_than_a_batch_is_named_by_file_and_row(tmp_path, demo_tokenizer):
    first = write(tmp_path / "a.jsonl", rows(30, "a"))
    second = write(tmp_path / "b.jsonl", [*rows(9, "b"), {**rows(1)[0], "output": "word " * 120}, *rows(4, "c")])
    for shares in ({}, {"validation_ratio": 0.3, "split_seed": 5}, {"validation_ratio": 0.2, "split_seed": 4}):
        splits = load_splits(config([first, second], **shares), demo_tokenizer)
        split = next(split for split in splits.values() if 39 in split["row"][:])
        with pytest.raises(ValueError) as error:
            plan_batches(split, Budget(100), 8, lambda: None)
        assert str(error.value).startswith(f"{second} row 9 alone has ")
    other = split.remove_columns("row")
    index = split["row"][:].index(39)
    with pytest.raises(ValueError, match=f"record {index} alone has"):
        plan_batches(other, Budget(100), 8, lambda: None)
    assert isinstance(plan_batches(split, Budget(1000), 8, lambda: None), TokenBudgetBatches)
