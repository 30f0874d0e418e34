"""A prepared folder beside the records it was made of: the same tokens, the same weights, and refusals by name."""

import json
import subprocess
import sys

import processes
import pytest
from conftest import DEMO, ROOT

from recipe.config import DataArguments, UserError
from recipe.data import load_splits
from recipe.data.prepared import MANIFEST, load_prepared, prepare_records, save_prepared


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "records.jsonl"
    lines = (DEMO / "records" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def config(data, **options) -> DataArguments:
    return DataArguments(data=data, template="phi3", max_length=128, **options)


def test_the_tokens_are_those_of_the_records(tmp_path, data, demo_tokenizer):
    folder = tmp_path / "prepared"
    folder.mkdir()
    manifest = save_prepared(prepare_records(config(data), demo_tokenizer), folder, config(data), demo_tokenizer, 100)
    assert len(manifest["splits"]["train"]) == 3
    way = config(str(folder))
    prepared, direct = load_prepared(way, demo_tokenizer), load_splits(config(data), demo_tokenizer)
    assert way.data == data  # run.json and the evaluation know the records themselves
    assert list(prepared.splits) == list(direct)
    for name, split in direct.items():
        assert prepared.splits[name].to_list() == split.to_list()
        assert prepared.splits[name].info.files == split.info.files == [data]


def test_what_is_there_is_not_written_again(tmp_path, data, demo_tokenizer):
    folder = tmp_path / "prepared"
    folder.mkdir()
    ready = prepare_records(config(data), demo_tokenizer)
    manifest = save_prepared(ready, folder, config(data), demo_tokenizer, 100)
    first, second, *_ = manifest["splits"]["train"]
    (folder / MANIFEST).unlink()
    (folder / second).unlink()
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert save_prepared(ready, folder, config(data), demo_tokenizer, 100) == manifest
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times and first in times


@pytest.mark.parametrize("name, value", [("template", "alpaca"), ("max_length", 64), ("mask_prompt", False)])
def test_other_settings_are_refused_by_name(tmp_path, data, demo_tokenizer, name, value):
    folder = tmp_path / "prepared"
    folder.mkdir()
    save_prepared(prepare_records(config(data), demo_tokenizer), folder, config(data), demo_tokenizer, 100)
    way = config(str(folder))
    setattr(way, name, value)
    with pytest.raises(UserError, match=f"was prepared with another {name}"):
        load_prepared(way, demo_tokenizer)


def test_another_tokenizer_and_a_damaged_shard_are_refused(tmp_path, data, demo_tokenizer, gpt2_tokenizer):
    folder = tmp_path / "prepared"
    folder.mkdir()
    manifest = save_prepared(prepare_records(config(data), demo_tokenizer), folder, config(data), demo_tokenizer, 100)
    with pytest.raises(UserError, match="was prepared with another tokenizer"):
        load_prepared(config(str(folder)), gpt2_tokenizer)
    shard = folder / manifest["splits"]["train"][1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is missing or damaged"):
        load_prepared(config(str(folder)), demo_tokenizer)


def test_a_run_on_prepared_data_ends_with_the_same_weights(tmp_path, data):
    """The command as it is started, and the runs beside each other."""
    common = ["configs/demo.yaml", "--data", data]
    done = subprocess.run(
        [sys.executable, "scripts/prepare.py", *common, "--output_dir", str(tmp_path / "prepared"), "--num_proc", "2"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "300 records in 5 files" in done.stdout
    weights, runs = [], []
    for name, source in (("direct", data), ("from", str(tmp_path / "prepared"))):
        flags = ["--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "4", "--save_strategy", "no"]
        done = processes.run(
            [sys.executable, "scripts/train.py", "configs/demo.yaml", "--data", source, *flags, "--output_dir",
             str(tmp_path / name)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
        runs.append(json.loads((tmp_path / name / "run.json").read_text()))
    assert weights[0] == weights[1]
    assert runs[0]["config"]["data"] == runs[1]["config"]["data"] and runs[0]["data_hash"] == runs[1]["data_hash"]
    assert runs[0]["splits"] == runs[1]["splits"]
