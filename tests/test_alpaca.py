"""The README's Alpaca command, as written, on a stand-in for the data set: same file, columns, size and quirk."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import DEMO, ROOT
from loopback_hub import serve_hub

RECORDS = 52_002
EMPTY = range(1000, RECORDS, 1858)  # 28 records have an empty output


def write_alpaca(folder) -> None:
    verbs, things = ("Name", "Describe", "Compare", "Draw", "Count"), ("a cat", "two dogs", "the sea", "my hat")
    instruction = [f"{verbs[i % 5]} {things[i % 4]} in {i} words." for i in range(RECORDS)]
    given = [f"line {i}" if i % 5 < 2 else "" for i in range(RECORDS)]
    output = ["" if i in EMPTY else f"It is {i}." for i in range(RECORDS)]
    text = [f"### Instruction:\n{a}\n\n### Response:\n{b}" for a, b in zip(instruction, output, strict=True)]
    table = pa.table({"instruction": instruction, "input": given, "output": output, "text": text})
    (folder / "data").mkdir(parents=True)
    pq.write_table(table, folder / "data" / "train-00000-of-00001-a09b74b3ef9c3b56.parquet")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Alpaca\n")


def test_the_readmes_alpaca_command_trains_and_lists_what_it_leaves_out(tmp_path):
    assert len(EMPTY) == 28
    write_alpaca(tmp_path / "alpaca")
    tiny = "n_layer=1,n_embd=32,n_head=2,n_positions=512"
    with serve_hub({"datasets/tatsu-lab/alpaca": tmp_path / "alpaca"}) as endpoint:
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        }  # fmt: skip
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml",
            "scripts/train.py", "configs/gpt2_alpaca.yaml", "--model_type", "gpt2", "--config_overrides", tiny,
            "--tokenizer_name", str(DEMO / "base"), "--max_length", "256", "--num_proc", "1", "--bf16", "false",
            "--max_steps", "1", "--per_device_train_batch_size", "2", "--eval_strategy", "no", "--save_strategy", "no",
            "--num_sample_generations", "0", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "run"),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "28 records left out as bad: 'output' is empty" in done.stdout
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert sum(split["rows"] for split in run["splits"].values()) == RECORDS - 28
    assert run["rows"]["bad"] == 28 and run["bad_records"] == {"'output' is empty": 28}
    assert run["hub"]["data"] == ["tatsu-lab/alpaca"]
    lines = (tmp_path / "run" / "bad_records.jsonl").read_text(encoding="utf-8").splitlines()
    bad = [json.loads(line) for line in lines]
    assert [record["row"] for record in bad] == list(EMPTY)
    for record in bad:
        assert record["file"].endswith("train-00000-of-00001-a09b74b3ef9c3b56.parquet") and record["split"] == "train"
        assert record["record"]["instruction"].endswith(f"in {record['row']} words.")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "28 bad records were left out" in card and "datasets:\n- tatsu-lab/alpaca" in card
