"""Which split a name means: keys of a mapping, files of a folder, folders of save_to_disk."""

import json

import pytest
from datasets import Dataset, DatasetDict

from recipe.config import DataArguments, UserError, parse_arguments
from recipe.data import load_records
from recipe.files import read_json_lines, write_json_lines


def rows(name: str, count: int) -> list[dict[str, str]]:
    return [{"instruction": f"{name} {i}?", "input": "", "output": f"{name}."} for i in range(count)]


def write(path, count: int = 2) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(path.as_posix(), count)), encoding="utf-8")
    return str(path)


def load(source, **options):
    return load_records(DataArguments(**{"data": source, "validation_ratio": 0, "test_ratio": 0, **options}))


def sizes(source) -> dict[str, int]:
    return {name: len(split) for name, split in load(source)[0].items()}


def refuse(source) -> str:
    with pytest.raises(UserError) as error:
        load(source)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(
            (name, "validation")
            for name in ("val", "valid", "dev", "eval", "Validation", "validation_sft", "dev_matched")
        ),
        *((name, "test") for name in ("testing", "test_sft", "TEST")),
        *((name, name) for name in ("test_unseen", "test1", "holdout", "extra", "hard_test")),
    ],
)
def test_a_key_of_a_mapping_means_its_split(tmp_path, name, split):
    data = {"train_sft": write(tmp_path / "a.jsonl"), name: write(tmp_path / "b.jsonl", 3)}
    assert sizes(data) == {"train": 2, split: 3}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("vaildation", "validation"),
        ("validate", "validation"),
        ("my_val", "validation"),
        ("trian", "train"),
        ("tset", "test"),
    ],
)
def test_a_misspelt_split_is_refused(tmp_path, name, meant):
    files = {"train": write(tmp_path / "train.jsonl"), name: write(tmp_path / f"{name}.jsonl")}
    assert f"split {name!r}: did you mean {meant!r}?" in refuse(files)


def test_a_misspelt_file_of_a_folder_is_refused(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "vaildation.jsonl")
    assert "split 'vaildation': did you mean 'validation'?" in refuse(str(tmp_path))


@pytest.mark.parametrize("names", [("val", "dev"), ("validation", "valid"), ("eval", "validation")])
def test_two_names_of_one_split_are_refused(tmp_path, names):
    files = {name: write(tmp_path / f"{name}.jsonl") for name in ("train", *names)}
    for source in (files, str(tmp_path)):
        message = refuse(source)
        assert all(repr(name) in message for name in names) and "both mean the validation split" in message


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train", "dev"], {"train": 2, "validation": 2}),
        (["my-train-data", "my-val-data", "my-test-data"], {"train": 2, "validation": 2, "test": 2}),
        (["train-0", "train-1", "eval"], {"train": 4, "validation": 2}),
        (["train", "test", "test_unseen"], {"train": 2, "test": 2, "test_unseen": 2}),
        (["train/a", "train/b", "valid/a"], {"train": 4, "validation": 2}),
        (["train_sft-00000-of-00002", "train_sft-00001-of-00002", "test_sft-00000-of-00001"], {"train": 4, "test": 2}),
        (["one", "two"], {"train": 4}),
        (["[1] train", "ü dev"], {"train": 2, "validation": 2}),
    ],
)
def test_a_folder_names_its_splits_by_its_files(tmp_path, names, expected):
    folder = tmp_path / "a folder [1] ü"
    for name in names:
        write(folder / f"{name}.JSONL" if name == names[0] else folder / f"{name}.jsonl")
    assert sizes(str(folder)) == expected
    assert load(str(folder))[1].notes == []


def test_what_is_left_out_of_a_folder_is_named(tmp_path):
    for name in ("train_sft-00000-of-00001", "train_gen-00000-of-00001", "more"):
        write(tmp_path / f"{name}.jsonl")
    (tmp_path / "test.tsv").write_text("instruction\toutput\n")
    (tmp_path / "README.md").write_text("# Records\n")
    records, left_out = load(str(tmp_path))
    assert {name: len(split) for name, split in records.items()} == {"train": 2}
    notes = "\n".join(left_out.notes)
    assert "train_gen" in notes and "more.jsonl" in notes and "test.tsv" in notes and "README" not in notes


def test_folders_of_save_to_disk(tmp_path):
    with_dates = [{**row, "when": {"a": [1]}} for row in rows("a", 5)]
    saved = {"train": Dataset.from_list(with_dates), "dev": Dataset.from_list(rows("b", 3))}
    DatasetDict(saved).save_to_disk(str(tmp_path / "both"))
    saved["train"].save_to_disk(str(tmp_path / "one"))
    assert sizes(str(tmp_path / "both")) == {"train": 5, "validation": 3}
    assert sizes(str(tmp_path / "one")) == {"train": 5}
    assert sizes({"train": str(tmp_path / "one"), "val": str(tmp_path / "both")}) == {"train": 5, "validation": 3}
    assert load(str(tmp_path / "one"))[0]["train"]["instruction"][:] == [row["instruction"] for row in with_dates]


def test_dropped_records_leave_gaps_and_are_told_with_their_values(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [json.dumps(row) for row in rows("good", 3)]
    bad = ['{"instruction": "a", "output": " "}', '{"instruction": "b", ', "5", '{"instruction": NaN, "output": "c"}']
    path.write_text("\n".join([good[0], bad[0], bad[1], good[1], bad[2], good[2], bad[3]]), encoding="utf-8")
    more = write(tmp_path / "b.jsonl", 2)
    records, left_out = load([str(path), more], bad_records="drop")
    assert records["train"]["row"][:] == [0, 3, 5, 7, 8]
    assert [(one["file"], one["row"]) for one in left_out.bad] == [(str(path), row) for row in (1, 2, 4, 6)]
    assert left_out.reasons == {
        "'output' is blank": 1, "broken JSON": 1, "not an object": 1, "'instruction' is not text (float)": 1,
    }  # fmt: skip
    values = [one["record"] for one in left_out.bad]
    assert values[0] == {"instruction": "a", "input": "", "output": " "}
    assert values[1:3] == [{"text": bad[1].strip()}, {"value": 5}] and "NaN" in values[3]["instruction"]
    assert len(refuse([str(path), more]).splitlines()) == 5
    path.write_text("\n".join(bad), encoding="utf-8")
    with pytest.raises(UserError, match="the train split has no good record"):
        load(str(path), bad_records="drop")


def test_the_values_of_bad_records_can_be_written_whatever_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [
        b'{"instruction": "a", "output": "\\ud83d"}',
        b'{"instruction": "\xff", "output": "b"}',
        b'{"x": "\xff',
        b'"\xff"',
    ]
    path.write_bytes(b"\n".join([json.dumps(rows("good", 1)[0]).encode(), *bad]))
    _, left_out = load(str(path), bad_records="drop")
    write_json_lines(tmp_path / "bad.jsonl", left_out.bad)
    written = read_json_lines(tmp_path / "bad.jsonl")
    assert [one["row"] for one in written] == [1, 2, 3, 4] and written == left_out.bad
    assert list(left_out.reasons) == [
        "'output' holds half a character", "'instruction' is not UTF-8 text", "broken JSON", "not an object",
    ]  # fmt: skip
    assert len(refuse(str(path)).encode().splitlines()) == 5


@pytest.mark.parametrize("key", [1, True, None, 1.5, "", "  "])
def test_a_name_of_a_split_is_a_text(tmp_path, key):
    files = {"train": write(tmp_path / "a.jsonl"), key: write(tmp_path / "b.jsonl")}
    message = refuse(files)
    assert f"data: {key!r} is no name of a split" in message and ("quotes" in message) == (not isinstance(key, str))


def test_yaml_keys_that_are_no_text_are_refused(tmp_path):
    for line, shown in (("on: b.jsonl", "True"), ("null: b.jsonl", "None"), ("7: b.jsonl", "7")):
        path = tmp_path / "a.yaml"
        path.write_text(f"data:\n  train: {write(tmp_path / 'a.jsonl')}\n  {line}\n")
        [config] = parse_arguments([DataArguments], [str(path)], "")
        assert f"data: {shown} is no name of a split" in refuse(config.data)


def test_a_folder_among_files_is_named_as_one(tmp_path):
    file = write(tmp_path / "a.jsonl")
    folder = tmp_path / "f18"
    write(folder / "b.jsonl")
    for source in ([file, str(folder)], [str(folder), file], {"train": file, "test": [str(folder), file]}):
        message = refuse(source)
        assert f"data {str(folder)!r}: a folder in a list with files" in message and "did you mean" not in message
    assert sizes([file, str(folder / "*.jsonl")]) == {"train": 4}


@pytest.mark.parametrize("name", ["b.jsonl", "train-1.json", "records"])
def test_a_link_to_nothing_is_named_as_one(tmp_path, name):
    write(tmp_path / "train-0.jsonl")
    (tmp_path / name).symlink_to(tmp_path / "gone.jsonl")
    said = f"data {str(tmp_path / name)!r}: a link to {str(tmp_path / 'gone.jsonl')!r}, where there is nothing"
    assert refuse(str(tmp_path / name)) == refuse([str(tmp_path / "train-0.jsonl"), str(tmp_path / name)]) == said
    if name != "records":  # in a folder or a glob, its records would be missing without a word
        assert refuse(str(tmp_path)) == refuse(str(tmp_path / "*.json*")) == said
    (tmp_path / "gone.jsonl").write_bytes((tmp_path / "train-0.jsonl").read_bytes())
    assert name == "records" or sizes(str(tmp_path / name)) == {"train": 2}
