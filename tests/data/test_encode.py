"""Splitting, encoding and counting, on records a person can check."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from conftest import DEMO, ROOT
from datasets import Dataset
from tokenizer_kinds import byte_level
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from recipe.config import DataArguments, UserError
from recipe.data import encode_records, load_records, load_splits, template_overhead, token_statistics
from recipe.data.encode import CODE, LIBRARIES, fingerprint
from recipe.data.split import content_hashes
from recipe.templates import load_template


def records(count: int, **changes) -> list[dict]:
    return [{"instruction": f"Count to {i}.", "input": "", "output": f"1 to {i}", **changes} for i in range(count)]


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def instructions(splits) -> dict[str, list[str]]:
    return {name: split["instruction"][:] for name, split in splits.items()}


def test_default_split_is_85_5_10_and_keeps_every_record_once(tmp_path):
    splits, leaked = load_records(DataArguments(data=write(tmp_path / "a.json", records(200))))
    assert {name: len(split) for name, split in splits.items()} == {"train": 170, "validation": 10, "test": 20}
    assert leaked.duplicates == 0
    rows = sorted(row for split in splits.values() for row in split["row"])
    assert rows == list(range(200))
    for split in splits.values():
        assert [int(text.split()[2][:-1]) for text in split["instruction"]] == split["row"][:]


def test_split_depends_on_the_seed_and_the_records_not_on_their_order(tmp_path):
    rows = records(100)
    config = DataArguments(data=write(tmp_path / "a.json", rows))
    shuffled = DataArguments(data=write(tmp_path / "b.json", rows[::-1]))
    other_seed = DataArguments(data=config.data, split_seed=124)
    first, second, third = (instructions(load_records(c)[0]) for c in (config, shuffled, other_seed))
    assert {name: set(texts) for name, texts in first.items()} == {name: set(texts) for name, texts in second.items()}
    assert set(first["test"]) != set(third["test"])


def test_exact_duplicates_stay_on_one_side(tmp_path):
    rows = records(40) * 5
    splits, _ = load_records(DataArguments(data=write(tmp_path / "a.json", rows)))
    hashes = [set(content_hashes(split).tolist()) for split in splits.values()]
    assert not (hashes[0] & hashes[1] | hashes[0] & hashes[2] | hashes[1] & hashes[2])
    assert sum(len(split) for split in splits.values()) == 200


def test_given_splits_are_kept_and_leaked_records_leave_train(tmp_path):
    data = {
        "train": write(tmp_path / "train.jsonl", records(20)),
        "validation": write(tmp_path / "validation.jsonl", records(27)[24:]),
        "test": write(tmp_path / "test.jsonl", records(25)[18:25]),
        "extra": write(tmp_path / "extra.jsonl", records(30)[28:]),
    }
    splits, leaked = load_records(DataArguments(data=data))
    assert leaked.duplicates == 3  # two of train and one of validation are also in test
    assert {name: len(split) for name, split in splits.items()} == {"train": 18, "validation": 2, "test": 7, "extra": 2}
    assert splits["train"]["row"][:] == list(range(18))


def test_a_train_split_that_is_all_in_the_test_split_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", records(5))
    with pytest.raises(UserError, match="all records of the train split are also in test; add others"):
        load_records(DataArguments(data={"train": path, "test": path}, validation_ratio=0))


def test_mapping_on_the_command_line_is_json(tmp_path):
    path = write(tmp_path / "a.json", records(4))
    assert DataArguments(data=json.dumps({"train": path})).data == {"train": path}
    with pytest.raises(UserError, match="not valid JSON"):
        DataArguments(data='{"train": ')


def test_a_folder_names_its_splits_and_a_mapping_takes_one_of_them():
    folder = str(DEMO / "records")
    with pytest.raises(UserError, match="name one of its files instead"):
        load_records(DataArguments(data={"extra": folder}))
    splits, _ = load_records(DataArguments(data={"train": folder, "validation": folder}, test_ratio=0))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3200, "validation": 200}


def test_dates_stay_the_text_they_are(tmp_path):
    rows = [
        {"instruction": f"Add {day} days.", "input": "2024-01-01", "output": f"2024-01-0{day}"} for day in range(1, 5)
    ]
    for name in ("a.json", "a.jsonl"):
        config = DataArguments(data=write(tmp_path / name, rows), validation_ratio=0, test_ratio=0)
        assert load_records(config)[0]["train"]["output"][:] == [row["output"] for row in rows]


def test_swapped_columns(tmp_path):
    path = write(tmp_path / "a.json", [{"output": "Why?", "instruction": "Because.", "row": "x", "id": 7}])
    config = DataArguments(
        data=path, instruction_column="output", output_column="instruction", validation_ratio=0, test_ratio=0
    )
    [row] = load_records(config)[0]["train"]
    assert row == {"instruction": "Why?", "output": "Because.", "input": "", "family": None, "row": 0}


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "parquet", "glob", "folder"])
def test_every_form_of_data_gives_the_same_records(tmp_path, form):
    import pandas

    rows = [
        {"instruction": "Say seven.", "input": "", "output": "007"},
        {"instruction": "None of these?", "input": "a, b", "output": "None"},
        {"instruction": "Translate.", "input": 'où, "là"', "output": "where, «there»"},
    ]
    frame = pandas.DataFrame(rows)
    if form == "json":
        source = write(tmp_path / "a.json", rows)
    elif form == "jsonl":
        source = write(tmp_path / "a.jsonl", rows)
    elif form == "csv":
        frame.to_csv(source := str(tmp_path / "a.csv"), index=False)
    elif form == "parquet":
        frame.to_parquet(source := str(tmp_path / "a.parquet"))
    elif form == "glob":
        write(tmp_path / "part-0.jsonl", rows[:1])
        write(tmp_path / "part-1.jsonl", rows[1:])
        source = str(tmp_path / "part-*.jsonl")
    else:
        (tmp_path / "folder").mkdir()
        write(tmp_path / "folder" / "train.jsonl", rows)
        source = str(tmp_path / "folder")
    splits, _ = load_records(DataArguments(data=source, validation_ratio=0, test_ratio=0))
    fields = ("instruction", "input", "output")
    assert [{name: row[name] for name in fields} for row in splits["train"]] == rows


def test_columns_are_mapped_and_a_missing_input_is_empty(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "Because."}] * 2)
    config = DataArguments(
        data=path, instruction_column="question", output_column="answer", validation_ratio=0, test_ratio=0
    )
    [row, _] = load_records(config)[0]["train"]
    assert row == {"instruction": "Why?", "input": "", "output": "Because.", "family": None, "row": 0}


def test_encoded_record_by_hand(tmp_path, demo_tokenizer):
    record = {"instruction": "Write the plural.", "input": "cat", "output": "cats"}
    path = write(tmp_path / "a.json", [record])
    tokenize = lambda text: demo_tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prompt = tokenize(load_template("alpaca").prompt(record))
    response = [*tokenize("cats"), demo_tokenizer.eos_token_id]
    for mask_prompt in (True, False):
        config = DataArguments(data=path, validation_ratio=0, test_ratio=0, mask_prompt=mask_prompt)
        [row] = load_splits(config, demo_tokenizer)["train"]
        assert row == {
            "input_ids": prompt + response,
            "labels": [-100] * len(prompt) + response if mask_prompt else prompt + response,
            "length": len(prompt) + len(response),
            "row": 0,
            "truncated": False,
        }


def test_second_encoding_comes_from_the_cache_and_a_changed_setting_does_not(tmp_path, demo_tokenizer):
    config = DataArguments(data=write(tmp_path / "a.json", records(50)), validation_ratio=0, test_ratio=0)
    first = load_splits(config, demo_tokenizer)["train"]
    demo_tokenizer(["a", "b c"], padding=False, truncation=False)  # a used tokenizer hashes differently
    again = load_splits(config, demo_tokenizer)["train"]
    assert again.cache_files == first.cache_files
    changed = load_splits(
        DataArguments(data=config.data, validation_ratio=0, test_ratio=0, mask_prompt=False), demo_tokenizer
    )["train"]
    assert changed.cache_files != first.cache_files
    assert changed[0]["labels"] == changed[0]["input_ids"]


KEY = """
import json, sys
from datasets import Dataset
from tokenizer_kinds import byte_level
from recipe.data.encode import fingerprint
from recipe.templates import load_template
tokenizer = byte_level(begins=True)
records = Dataset.from_dict({"row": [0]}, split="train")
records._fingerprint = "records"
print(fingerprint(records, tokenizer, {"template": load_template("phi3", tokenizer), "max_length": 8}))
"""


def test_the_key_of_the_cache_is_the_same_in_another_process():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    other = subprocess.run(
        [sys.executable, "-c", KEY], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path},
    )  # fmt: skip
    records, tokenizer = Dataset.from_dict({"row": [0]}), byte_level(begins=True)
    records._fingerprint = "records"
    here = fingerprint(records, tokenizer, {"template": load_template("phi3", tokenizer), "max_length": 8})
    assert other.stdout.strip() == here


def test_all_that_decides_an_encoding_is_in_the_key_of_the_cache(tmp_path, monkeypatch):
    """Each part is changed in turn, and no two keys are the same."""
    records = Dataset.from_dict({"row": [0]})
    template = load_template("phi3")

    def key(tokenizer=None, template=template, records=records, **settings) -> str:
        return fingerprint(records, tokenizer or byte_level(), {"template": template, "max_length": 8, **settings})

    def changed(change) -> PreTrainedTokenizerBase:
        change(tokenizer := byte_level())
        return tokenizer

    assert key() == key()
    keys = [
        key(),
        key(records=Dataset.from_dict({"row": [1]})),
        key(max_length=9),
        key(mask_prompt=False),
        key(template=replace(template, chat_template=template.chat_template + " ")),
        key(template=replace(template, special_tokens={"bos_token": "<s>"})),
        key(byte_level(begins=True)),  # another post-processor
        key(byte_level(ignore_merges=True)),
        key(byte_level(strips=True)),  # other flags of the same special tokens
        key(changed(lambda tokenizer: tokenizer.add_tokens(["cat"]))),
        key(changed(lambda tokenizer: tokenizer.add_special_tokens({"extra_special_tokens": ["cat"]}))),
        key(changed(lambda tokenizer: setattr(tokenizer, "eos_token", "<|user|>"))),
        key(ByT5Tokenizer()),
        key(ByT5Tokenizer(extra_ids=100)),
    ]
    for library in LIBRARIES:
        version = metadata.version
        with monkeypatch.context() as patch:
            patch.setattr(metadata, "version", lambda name, old=version, this=library: old(name) + "x" * (name == this))
            keys.append(key())
    for path in CODE:
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8") + "# changed", encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr("recipe.data.encode.CODE", [tmp_path / path.name if p == path else p for p in CODE])
            keys.append(key())
    assert {path.name for path in CODE} == {
        "encode.py",
        "examples.py",
        "sandbox_process.py",
        "templates.py",
        "tokens.py",
    }
    assert len(set(keys)) == len(keys)


def test_two_processes_encode_the_same(tmp_path, demo_tokenizer):
    path = write(tmp_path / "a.json", records(30))
    one, two = (
        load_splits(DataArguments(data=path, validation_ratio=0, test_ratio=0, num_proc=n), demo_tokenizer)["train"]
        for n in (None, 2)
    )
    assert one[:] == two[:]


def test_a_template_may_begin_with_a_special_token(tmp_path, demo_tokenizer):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ m.input }}{% if m.role == 'user' %}\n{% endif %}"
        "{% endfor %}"
    )
    source = write(tmp_path / "a.json", [{"instruction": "Say hello.", "input": "", "output": "Hello."}])
    config = DataArguments(data=source, template=str(path), validation_ratio=0, test_ratio=0)
    [row] = load_splits(config, demo_tokenizer)["train"]
    prompt = load_template(str(path), demo_tokenizer).prompt({"instruction": "Say hello.", "input": ""})
    prompt_ids = demo_tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert prompt_ids[0] == demo_tokenizer.bos_token_id
    assert row["input_ids"][: len(prompt_ids)] == prompt_ids and row["labels"][len(prompt_ids)] != -100


def test_truncation_with_a_template_without_response_header(tmp_path, demo_tokenizer):
    path = tmp_path / "bare.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{{ m.input }}{% endfor %}")
    source = write(tmp_path / "a.json", [LONG])
    config = DataArguments(data=source, template=str(path), max_length=64, validation_ratio=0, test_ratio=0)
    [row] = load_splits(config, demo_tokenizer)["train"]
    assert row["length"] == len(row["input_ids"]) == 64 and row["labels"][-1] == demo_tokenizer.eos_token_id


LONG = {"instruction": "Repeat the words. " + "one two three " * 30, "input": "", "output": "one two three"}
WORDY = {"instruction": "Write a lot.", "input": "", "output": "one two three " * 60}
SHORT = {"instruction": "Say hello.", "input": "", "output": "Hello."}


def encode_long(tmp_path, tokenizer, overflow):
    path = write(tmp_path / "a.json", [LONG, WORDY, SHORT])
    config = DataArguments(data=path, validation_ratio=0, test_ratio=0, max_length=80, overflow=overflow)
    loaded, _ = load_records(config)
    return loaded, encode_records(loaded, tokenizer, config)


def test_truncation_shortens_the_prompt_first_and_adds_no_false_end(tmp_path, demo_tokenizer):
    loaded, encoded = encode_long(tmp_path, demo_tokenizer, "truncate")
    long, wordy, short = encoded["train"]
    header = demo_tokenizer("\n\n### Response:\n", add_special_tokens=False)["input_ids"]
    eos = demo_tokenizer.eos_token_id

    assert long["truncated"] and long["length"] == 80
    response = [label for label in long["labels"] if label != -100]
    assert response == [*demo_tokenizer(LONG["output"])["input_ids"], eos]
    prompt = long["input_ids"][: -len(response)]
    assert prompt[-len(header) + 1 :] == header[1:]

    assert wordy["truncated"] and wordy["length"] == 80
    assert eos not in wordy["labels"]
    assert sum(label != -100 for label in wordy["labels"]) >= 40

    assert not short["truncated"] and short["labels"][-1] == eos
    [statistics] = token_statistics(loaded, encoded, preamble=0)
    assert (statistics["truncated"], statistics["dropped"]) == (2, 0)


def test_dropped_records_are_counted(tmp_path, demo_tokenizer):
    loaded, encoded = encode_long(tmp_path, demo_tokenizer, "drop")
    assert encoded["train"]["row"][:] == [2]
    [statistics] = token_statistics(loaded, encoded, preamble=0)
    assert (statistics["truncated"], statistics["dropped"]) == (0, 2)


def test_too_long_records_are_named_when_overflow_is_an_error(tmp_path, demo_tokenizer):
    with pytest.raises(UserError) as error:
        encode_long(tmp_path, demo_tokenizer, "error")
    assert f"{tmp_path / 'a.json'} row 0: longer than --max_length 80" in str(error.value)
    assert f"{tmp_path / 'a.json'} row 1: longer than --max_length 80" in str(error.value)


def test_statistics_by_hand(tmp_path, demo_tokenizer):
    rows = [SHORT, {"instruction": "Say goodbye to them.", "input": "", "output": "Goodbye."}]
    path = write(tmp_path / "a.json", rows)
    preamble, _ = template_overhead(load_template("alpaca"), demo_tokenizer)
    for mask_prompt in (True, False):
        config = DataArguments(data=path, validation_ratio=0, test_ratio=0, mask_prompt=mask_prompt)
        loaded, _ = load_records(config)
        encoded = encode_records(loaded, demo_tokenizer, config)
        [statistics] = token_statistics(loaded, encoded, preamble)
        lengths = [len(row["input_ids"]) for row in encoded["train"]]
        supervised = sum(label != -100 for row in encoded["train"] for label in row["labels"][1:])
        assert statistics["tokens"] == sum(lengths)
        assert statistics["longest"] == max(lengths)
        assert statistics["supervised"] == supervised / sum(lengths)
        assert statistics["preamble"] == 2 * preamble / sum(lengths)


def test_preamble_and_response_header_of_the_real_tokenizer(gpt2_tokenizer):
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    expected = gpt2_tokenizer(preamble + "\n\n### Instruction:\n")["input_ids"]
    assert template_overhead(load_template("alpaca"), gpt2_tokenizer) == (len(expected), 6)


def test_demo_records_load_as_they_are():
    data = {name: str(DEMO / "records" / f"{name}.jsonl") for name in ("train", "validation", "test", "test_unseen")}
    splits, leaked = load_records(DataArguments(data=data))
    assert leaked.duplicates == 0
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 3200, "validation": 200, "test": 400, "test_unseen": 200,
    }  # fmt: skip
