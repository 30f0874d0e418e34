"""Models and datasets by their Hub ids, from a Hub on a loopback port."""

import json
import os
import sys

import processes
from conftest import DEMO, ROOT
from loopback_hub import serve_hub


def test_model_and_dataset_by_id(tmp_path):
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    lines = (DEMO / "records" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    (dataset / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with serve_hub({"models/someone/base": DEMO / "base", "datasets/someone/records": dataset}) as endpoint:
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        }  # fmt: skip
        command = [
            sys.executable, "scripts/train.py", "--model_name_or_path", "someone/base", "--data", "someone/records",
            "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--per_device_train_batch_size", "2",
        ]  # fmt: skip
        done = processes.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert run["weights_from"] == "someone/base"
        assert {name: split["rows"] for name, split in run["splits"].items()} == {
            "train": 51,
            "validation": 3,
            "test": 6,
        }
        card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
        assert "base_model: someone/base" in card and "datasets:\n- someone/records" in card

        command[command.index("someone/base")] = "someone/bass"
        command[command.index(str(tmp_path / "run"))] = str(tmp_path / "other")
        done = processes.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "error: tokenizer 'someone/bass'" in done.stderr
        assert not (tmp_path / "other").exists()
