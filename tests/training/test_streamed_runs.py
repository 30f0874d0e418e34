"""Runs on streamed records: what is refused, what becomes of bad records, and batches by tokens."""

import itertools
import json
import subprocess
import sys
from collections import Counter

import processes
import pytest
from conftest import ROOT

from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import DataArguments, InstructionTrainingArguments
from recipe.data.streaming import load_stream
from recipe.training.streaming import StreamedBatches


@pytest.fixture
def data(tmp_path):
    """300 records, of which every tenth is bad."""
    rows = [
        {"instruction": f"Say word {i}{' again' * (i % 9)}.", "input": "", "output": f"word {i}" * (i % 10 > 0)}
        for i in range(300)
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(data, folder, *flags, run=processes.run):
    command = [
        sys.executable, "scripts/train.py", "configs/demo.yaml", "--data", str(data), "--output_dir", str(folder),
        "--streaming", "true", "--shuffle_buffer", "64", "--eval_strategy", "no", "--save_strategy", "steps",
        "--save_steps", "6", "--num_sample_generations", "0", "--disable_tqdm", "true", "--test_ratio", "0",
        "--validation_ratio", "0.1", "--logging_steps", "4", "--bf16", "false", *flags,
    ]  # fmt: skip
    return run(command, cwd=ROOT, capture_output=True, text=True)


def last_line(done) -> str:
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_what_a_stream_needs_is_said_at_once(tmp_path, data):
    assert "say how many steps to train: --max_steps 1000" in last_line(train(data, tmp_path / "run"))
    done = train(data, tmp_path / "run", "--max_steps", "3", "--train_sampling_strategy", "group_by_length")
    assert "the lengths are not known in advance" in last_line(done)
    done = train(data, tmp_path / "run", "--max_steps", "3")
    assert done.returncode == 1 and f"error: {data} row " in done.stderr and "'output' is empty" in done.stderr
    assert "--bad_records drop leaves bad ones out" in last_line(done)
    assert not list((tmp_path / "run").glob("*"))  # nothing was written


def test_bad_records_are_set_aside_once_also_by_resumed_runs(tmp_path, data):
    run = tmp_path / "run"
    flags = [
        "--bad_records",
        "drop",
        "--max_steps",
        "24",
        "--per_device_train_batch_size",
        "16",
    ]  # 384 of 270 good ones
    done = train(data, run, *flags)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "bad_records.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == list(range(0, 300, 10))
    assert {line["file"] for line in lines} == {str(data)} and {line["reason"] for line in lines} == {
        "'output' is empty"
    }
    record = json.loads((run / "run.json").read_text())
    assert record["rows"]["bad"] == 30 and record["bad_records"] == {"'output' is empty": 30}
    weights = (run / "model.safetensors").read_bytes()
    done = train(data, run, *flags, "--resume_from_checkpoint", str(run / "checkpoint-6"))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in (run / "bad_records.jsonl").read_text().splitlines()] == lines
    assert (run / "model.safetensors").read_bytes() == weights
    done = train(data, run, *flags, "--resume_from_checkpoint", "true", "--dataloader_num_workers", "1")
    assert "dataloader_num_workers: 0 → 1" in done.stderr and done.returncode == 1
    data.write_text(data.read_text().replace("word 7", "word 8"))
    done = train(data, run, *flags, "--resume_from_checkpoint", "true")
    assert "data: the train files, with other tokens or in another order" in done.stderr and done.returncode == 1


def test_too_many_bad_records_end_the_run_with_one_message(tmp_path, data):
    run = tmp_path / "run"
    flags = ["--bad_records", "drop", "--max_steps", "24", "--max_bad_records", "4", "--dataloader_num_workers", "2"]
    # not forked: a fork that ends with workers of a loader does not end as a process of its own does
    said = last_line(train(data, run, *flags, run=subprocess.run))
    assert "--max_bad_records 4: " in said and "'output' is empty" in said and str(run / "bad_records.jsonl") in said
    assert len((run / "bad_records.jsonl").read_text().splitlines()) > 4
    assert json.loads((run / "run.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("shared", [False, True])
def test_batches_hold_what_the_budget_allows(tmp_path, data, demo_tokenizer, shared):
    config = DataArguments(data=str(data), streaming=True, validation_ratio=0, test_ratio=0, bad_records="drop")
    stream, _, _ = load_stream(config, demo_tokenizer, seed=3)
    end = demo_tokenizer.eos_token_id
    collate = DataCollatorWithSharedPrefix(end) if shared else DataCollatorForInstructionTuning(end)
    args = InstructionTrainingArguments(str(tmp_path / "run"), max_tokens_per_batch=512, use_cpu=True, report_to=[])
    rows, sizes = Counter(), []
    for features, _ in StreamedBatches(stream, args, 8, collate):
        batch = collate(features)
        assert batch["input_ids"].numel() <= 512
        sizes.append(len(features))
        rows.update(batch["row"].tolist())
        if rows.total() >= 1000:  # a window: 270 good records, pass after pass
            break
    assert rows.total() == 1000 and set(rows.values()) == {3, 4} and len(rows) == 270
    assert sum(sizes) / len(sizes) > 4


def test_a_record_longer_than_the_budget_is_named(tmp_path, data, demo_tokenizer):
    config = DataArguments(data=str(data), streaming=True, validation_ratio=0, test_ratio=0, bad_records="drop")
    stream, _, _ = load_stream(config, demo_tokenizer, seed=3)
    args = InstructionTrainingArguments(str(tmp_path / "run"), max_tokens_per_batch=20, use_cpu=True, report_to=[])
    batches = StreamedBatches(stream, args, 8, DataCollatorForInstructionTuning(demo_tokenizer.eos_token_id))
    [(features, bad)] = itertools.islice(batches, 2)
    assert not features and f"{data} row " in bad[-1]["problem"] and "max_tokens_per_batch is 20" in bad[-1]["problem"]
