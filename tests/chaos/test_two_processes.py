"""Two processes save one checkpoint, and agree on which one is whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_two_processes_agree_and_one_may_save_the_model_alone(tmp_path):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/two_processes.yaml",
        "--main_process_port", "0", str(Path(__file__).with_name("in_two_processes.py")), str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"results-{rank}.json").read_text()) for rank in range(2))
    assert one == other
    before, last = (str(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 4))
    assert (one["whole"], one["without a random state"], one["again"]) == (last, before, last)
    assert one["named"] == (
        f"--resume_from_checkpoint {last} is damaged: rng_state_1.pth is missing; resume from {before}"
    )
    assert done.stdout.count(f"{last} is not resumed from: rng_state_1.pth is missing") == 1
    listed = json.loads((tmp_path / "run" / "checkpoint-4" / "manifest.json").read_text())
    assert listed["world_size"] == 2 and {"rng_state_0.pth", "rng_state_1.pth"} <= set(listed["files"])
    assert (tmp_path / "run" / "model.safetensors").is_file() and not (tmp_path / "run" / "_unfinished").exists()
