"""Launchers that are told to stop or die, and runs that go on with another number of processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import processes
import pytest
from conftest import ROOT
from safetensors.torch import load_file

from recipe.training.output_dir import last_whole_checkpoint


def launched(folder: Path, data: Path, config: str) -> subprocess.Popen:
    """The real launcher, in a session of its own."""
    settings = {"max_steps": 4000, "save_steps": 1000, "eval_strategy": "no", "num_train_epochs": 1000}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--config_file",
        config,
        "scripts/train.py",
    ]
    if "two" in config:
        command.remove("--quiet")
    with open(folder.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(
            [*command, *kills.command(folder, data, settings)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def trainers(session: int) -> list[int]:
    """The processes of a session that run the training script, without the launcher."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields, command = status.read_text().rpartition(")")[2].split(), (status.parent / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session and fields[0] != "Z" and b"train.py" in command and b"accelerate" not in command:
            found.append(int(status.parent.name))
    return found


def wait_until(true, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (result := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(result)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="other systems do not tell a process of its parent's end"
)
@pytest.mark.parametrize(
    ("config", "number"),
    [
        ("accelerate_config.yaml", signal.SIGTERM),
        ("accelerate_config.yaml", signal.SIGKILL),
        ("configs/accelerate/two_processes.yaml", signal.SIGTERM),
    ],
)
def test_no_process_survives_its_launcher_and_the_run_is_saved(config, number, tmp_path):
    folder = tmp_path / "run"
    launcher = launched(folder, kills.records(tmp_path / "records.jsonl"), config)
    try:
        assert wait_until((folder / "run.json").is_file, 120), (tmp_path / "run.log").read_text()[-2000:]
        os.kill(launcher.pid, number)
        launcher.wait(timeout=60)
        assert wait_until(lambda: not trainers(launcher.pid), 60)
    finally:
        for pid in [*trainers(launcher.pid), *([launcher.pid] if launcher.poll() is None else [])]:
            os.kill(pid, signal.SIGKILL)
    said = (tmp_path / "run.log").read_text(errors="replace")
    assert "SIGTERM: the run stops when its step is done and saved" in said
    assert "stopped by SIGTERM after step" in said and "--resume_from_checkpoint true goes on" in said
    run = json.loads((folder / "run.json").read_text())
    assert run["state"] == "stopped" and run["legs"][-1]["state"] == "stopped"
    assert last_whole_checkpoint(folder) == str(folder / f"checkpoint-{run['result']['steps']}")


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    settings = {"max_steps": 4000, "eval_strategy": "no", "dataloader_num_workers": 1}
    [process] = kills.start(folder, kills.records(tmp_path / "records.jsonl"), settings, log)
    try:
        assert wait_until((folder / "run.json").is_file, 120), log.read_text()[-2000:]
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in (-signal.SIGINT, -signal.SIGTERM, 75)  # it may have been through in between
    finally:
        processes.kill_group(process)
        process.wait()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, tmp_path):
    """Each step holds as many records: each counts once an epoch, and the weights are the same but for rounding."""
    data = kills.records(tmp_path / "records.jsonl")
    straight, resumed, log = tmp_path / "straight", tmp_path / "resumed", tmp_path / "log.txt"
    # Adam divides by the gradient's own size: without an epsilon, rounding of the smallest gradients would be seen
    common = {"adam_epsilon": 1e-3}
    settings = {n: {**common, "processes": n, "per_device_train_batch_size": 4 // n} for n in (before, after)}
    ends = [process.wait(timeout=200) for process in kills.start(straight, data, settings[before], log)]
    assert not any(ends), log.read_text()[-2000:]
    shutil.copytree(straight, resumed)
    for step in (12, 15, 18):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    flags = ("--resume_from_checkpoint", "true")
    ends = [process.wait(timeout=200) for process in kills.start(resumed, data, settings[after], log, *flags)]
    assert not any(ends), log.read_text()[-2000:]
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-6
    runs = [json.loads((folder / "run.json").read_text()) for folder in (straight, resumed)]
    assert runs[0]["result"]["tokens_seen"] == runs[1]["result"]["tokens_seen"]
    assert runs[0]["result"]["train_loss"] == pytest.approx(runs[1]["result"]["train_loss"], rel=1e-5)
    assert [leg["processes"] for leg in runs[1]["legs"]] == [before, after]
