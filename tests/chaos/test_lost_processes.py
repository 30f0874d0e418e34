"""A process of a run that fails, ends or hangs: the others do not wait for ever, and one cause is told."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fills
import kills
import processes
import pytest
from conftest import DEMO, ROOT

from recipe.peers import GONE, peer_error, tell_launcher

# the training script, with a fault that one process, or a worker of its data loader, has in its second step
FAULTY = f"""
import os, runpy, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}]
import torch
from recipe.collator import DataCollatorForInstructionTuning
from recipe.console import run_script
from recipe.trainer import InstructionTrainer

fault, compute_loss = os.environ["FAULT"], InstructionTrainer.compute_loss
collate = DataCollatorForInstructionTuning.__call__

def faulty_loss(self, *args, **kwargs):
    if self.model.training and self.state.global_step == 1 and os.environ.get("RANK") == "1":
        if fault == "bug":
            raise KeyError("of process 1")
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        os.kill(os.getpid(), {{"ends": signal.SIGKILL, "hangs": signal.SIGSTOP}}[fault])
    return compute_loss(self, *args, **kwargs)

def faulty_collate(self, *args):
    if fault == "worker hangs" and torch.utils.data.get_worker_info():
        os.kill(os.getpid(), signal.SIGSTOP)
    return collate(self, *args)

InstructionTrainer.compute_loss, DataCollatorForInstructionTuning.__call__ = faulty_loss, faulty_collate
run_script(runpy.run_path({str(ROOT / "scripts" / "train.py")!r})["main"], interrupted="")
"""
BUG = "This is a bug in the recipe"
LATE = "another process of this run did not answer for 4 s (--ddp_timeout)"


def start(folder: Path, count: int, fault: str, *flags: str) -> list[subprocess.Popen]:
    """The processes, as the launcher starts them: each has a file for the launcher's report."""
    script = folder / "faulty.py"
    script.write_text(FAULTY)
    settings = fills.TRAINING | fills.TINY | {"eval_strategy": "no", "save_strategy": "no", "ddp_timeout": 4}
    settings |= {"output_dir": folder / "run", "data": kills.records(folder / "records.jsonl")}
    started = []
    for rank, environment in enumerate(processes.ranks_environment(config_of(count), count)):
        report = {"TORCHELASTIC_ERROR_FILE": str(folder / f"report-{rank}.json"), "FAULT": fault}
        started.append(
            processes.start(
                [sys.executable, script, *fills.flags(settings), *flags], cwd=ROOT, text=True,
                env=os.environ | environment | report, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    return started


def config_of(count: int) -> Path:
    return ROOT / ("accelerate_config.yaml" if count == 1 else "configs/accelerate/two_processes.yaml")


def end(started: list[subprocess.Popen]) -> None:
    for process in started:
        processes.kill_group(process)
        process.communicate()


@pytest.mark.parametrize(
    ("script", "flags", "number"),
    [
        ("train.py", ["--model_name_or_path", DEMO / "base", "--data", DEMO / "records"], signal.SIGTERM),
        ("eval.py", ["--model", DEMO / "base"], signal.SIGINT),
    ],
)
def test_a_process_that_waits_for_others_to_begin_ends_when_it_is_told_to(script, flags, number, tmp_path):
    """The other one was told, too, and has gone before they met."""
    environment = processes.ranks_environment(config_of(2), 2)[0]
    process = processes.start(
        [sys.executable, ROOT / "scripts" / script, *flags, "--output_dir", tmp_path / "run"], cwd=ROOT,
        env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(600):  # until it listens for the other one
            with socket.socket() as other:
                if not other.connect_ex((environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))):
                    break
            time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=30) == -number
    finally:
        processes.kill_group(process)
        process.wait()


def reports(folder: Path) -> dict[str, str]:
    """What the launcher's table would show, by process."""
    found = {path.stem: json.loads(path.read_text())["message"] for path in folder.glob("report-*.json")}
    assert all(int(message["extraInfo"]["timestamp"]) > 0 for message in found.values())
    return {name: message["message"] for name, message in found.items()}


@pytest.mark.parametrize("fault", ["bug", "memory", "ends"])
def test_who_failed_tells_why_and_the_other_only_that_somebody_did(fault, tmp_path):
    started = start(tmp_path, 2, fault, "--ddp_timeout", "60")
    try:
        _, other = started[1].communicate(timeout=120)
        _, first = started[0].communicate(timeout=60)  # of which the launcher would have ended this one
    finally:
        end(started)
    assert "Traceback" not in first and first.splitlines()[-1] == f"process 0: error: {GONE}"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"
    told = reports(tmp_path)
    if fault == "bug":
        assert other.count("Traceback") == 1 and other.count(BUG) == 1 and "process 1: Traceback" in other
        assert told == {"report-1": f"{BUG}: KeyError: 'of process 1'"}
    elif fault == "memory":
        assert "Traceback" not in other and "process 1: error: what followed step 1 does not fit in memory" in other
        assert list(told) == ["report-1"] and f"process 1: {told['report-1']}" == other.splitlines()[-1]
    else:
        assert started[1].returncode == -signal.SIGKILL and told == {}  # torchrun itself names the signal


def test_nobody_waits_for_ever_for_a_process_that_hangs(tmp_path):
    started = start(tmp_path, 2, "hangs")
    try:
        _, said = started[0].communicate(timeout=120)
    finally:
        end(started)
    assert started[0].returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"error: {LATE}")
    assert reports(tmp_path) == {"report-0": said.splitlines()[-1]}


def test_nobody_waits_for_ever_for_a_worker_that_hangs(tmp_path):
    started = start(tmp_path, 1, "worker hangs", "--dataloader_num_workers", "1")
    try:
        _, said = started[0].communicate(timeout=120)
    finally:
        end(started)
    assert started[0].returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: a worker of the data loader gave no batch for 4 s (--ddp_timeout)")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17798", GONE),
        ("NCCL error: remote process exited or there was a network error", GONE),
        ("failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", GONE),
        ("wait timeout after 4000ms, keys: /default_pg/0//cpu//0", LATE),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, Timeout(ms)=4000) ran for 4026", LATE),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", "use fewer --dataloader_num_workers"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "use fewer --dataloader_num_workers"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_what_libraries_say_of_another_process(said, told):
    found = peer_error(RuntimeError(said))
    assert found is None if told is None else found is not None and told in found
    assert peer_error(ValueError(said)) is None  # of a server's, say


def test_the_launchers_report_is_cut_and_costs_no_message(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "report-0.json"))
    tell_launcher("x" * 5000)
    assert reports(tmp_path) == {"report-0": "x" * 600 + " ... (all of it is above)"}
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "report.json"))
    tell_launcher("x")
