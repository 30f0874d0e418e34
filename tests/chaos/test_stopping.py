"""What a run does that is told to stop, in the step that it is told: each of its processes and workers is told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny_runs import tiny_trainer
from transformers import TrainerCallback

from recipe.training.checkpoints import numbered
from recipe.training.resuming import find_problem
from recipe.training.stopping import StopOnSignal


class Tell(TrainerCallback):
    """Sends signals to this process, or also to what the run has started, in the middle of a step."""

    def __init__(self, step: int, *numbers: int, group: bool = False) -> None:
        self.step, self.numbers, self.group = step, numbers, group
        self.others = {*children()}  # of the tests: the server that forks their scripts, for one

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                send(number, os.getpid(), *({*children()} - self.others if self.group else ()))
                time.sleep(0.1)


def send(number: int, *pids: int) -> None:
    """From another process, as a launcher or a scheduler does: workers take it otherwise if it is their parent's."""
    subprocess.run(["kill", f"-{number}", *map(str, pids)], check=True)


def children() -> list[int]:
    """The processes that this one has started, as the workers of its loader."""
    task = Path(f"/proc/{os.getpid()}/task")
    return [int(pid) for file in task.glob("*/children") for pid in file.read_text().split()]


def stopped(folder: Path, *callbacks: TrainerCallback, **settings):
    """A run of six steps in two epochs, with its callbacks."""
    settings = {"max_steps": 8, "save_steps": 100, **settings}
    trainer = tiny_trainer(folder, **settings)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.add_callback(stop := StopOnSignal(trainer))
    with stop.listening():
        trainer.train()
    return trainer, stop


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


SETTINGS = {
    "a save in no other step": {},
    "a save in this step": {"save_steps": 3},
    "no saves": {"save_strategy": "no"},
    "the best model": {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "loss",
        "greater_is_better": True,  # so that the first is the best, and no later one would be saved
    },
    "one checkpoint, and the best": {
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "loss",
        "greater_is_better": True, "load_best_model_at_end": True, "save_total_limit": 1,
    },
    "epochs": {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
    "workers": {"dataloader_num_workers": 2},
    "persistent workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
}  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_step_is_saved_and_the_run_ends_as_if_never_stopped(name, number, tmp_path):
    settings = SETTINGS[name]
    straight, _ = stopped(tmp_path / "straight", **settings)
    trainer, stop = stopped(tmp_path / "run", Tell(3, number, group=True), **settings)
    assert trainer.stopped and stop.signal == number and trainer.state.global_step == 3
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert find_problem(checkpoint, 1) is None
    if "best" in name:  # it is not removed for the new one, nor the new one for it
        assert {folder.name for folder in numbered(tmp_path / "run")} == {"checkpoint-1", "checkpoint-3"}
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    expected = [entry for entry in straight.state.log_history if entry["step"] <= 3]
    timeless = [
        [{name: e.get(name) for name in ("step", "loss", "eval_loss")} for e in each] for each in (log, expected)
    ]
    assert timeless[0] == timeless[1]

    resumed = tiny_trainer(tmp_path / "run", **{"max_steps": 8, "save_steps": 100, **settings})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 8
    assert all(map(torch.equal, weights(resumed), weights(straight)))
    totals = [each.counts.totals["loss_sum"] for each in (resumed, straight)]
    assert totals[0] == totals[1] and resumed.state.best_metric == straight.state.best_metric


def test_it_stops_at_the_end_of_an_epoch_after_what_is_due_there(tmp_path):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch"}  # of four steps
    trainer, _ = stopped(tmp_path, Tell(4, signal.SIGTERM), **settings)
    log = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert trainer.state.global_step == 4 and [entry["step"] for entry in log if "eval_loss" in entry] == [4]


def test_before_the_first_step_it_ends_at_once(tmp_path):
    class TellEarly(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path, TellEarly())
    assert not numbered(tmp_path)


def test_in_the_last_step_it_ends_as_usual(tmp_path, capfd):
    trainer, _ = stopped(tmp_path, Tell(8, signal.SIGTERM))
    assert not trainer.stopped and trainer.state.global_step == 8


def test_a_run_that_is_resumed_at_its_last_step_ends_as_usual(tmp_path, capfd):
    """It takes no step; it is told to stop while its model is saved."""
    stopped(tmp_path, save_steps=8)
    again = tiny_trainer(tmp_path, max_steps=8, save_steps=8)
    again.add_callback(stop := StopOnSignal(again))
    with stop.listening():
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        send(signal.SIGTERM, os.getpid())
        again.save_model()
    assert not again.stopped and (tmp_path / "model.safetensors").is_file()
    assert "SIGTERM: the run is at its end, and ends when it is saved" in capfd.readouterr().err


def test_no_process_waits_for_a_save_that_was_cut_off(tmp_path):
    """Whatever cuts it off, as Ctrl-C between two lines: its thread flushes until the save ends."""
    code = "from pathlib import Path; from recipe.manifest import Seal; Seal(Path()); raise KeyboardInterrupt"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert ended.returncode == 1 and b"KeyboardInterrupt" in ended.stderr


def test_a_signal_that_is_ignored_stays_ignored_and_all_handlers_come_back(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        trainer, _ = stopped(tmp_path, Tell(3, signal.SIGHUP))
        assert not trainer.stopped
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_the_process_in_the_step(tmp_path):
    """In a child, which would need a minute for its step."""
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

            class Slow(TrainerCallback):
                def on_pre_optimizer_step(self, args, state, control, **kwargs):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.1)
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(60)

            stopped(tmp_path, Slow())
        finally:
            os._exit(99)
    killer = threading.Timer(50, os.kill, (child, signal.SIGKILL))
    killer.start()
    _, status = os.waitpid(child, 0)
    killer.cancel()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert not numbered(tmp_path)


def test_workers_end_with_a_trainer_that_is_killed(tmp_path):
    """They live on when all are told to stop, but not without their parent."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:

        class Say(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                send(signal.SIGTERM, *children())
                time.sleep(0.2)
                os.write(writing, json.dumps(children()).encode() + b"\n")
                time.sleep(60)

        try:
            stopped(tmp_path, Say(), dataloader_num_workers=2)
        finally:
            os._exit(99)
    os.close(writing)
    with open(reading) as lines:
        workers = json.loads(lines.readline())
    assert len(workers) == 2 and all(map(alive, workers))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    end = time.monotonic() + 30

    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, workers))
    shutil.rmtree(tmp_path)


def test_a_run_that_ends_keeps_its_best_checkpoint_alone_and_folders_of_other_names(tmp_path):
    settings = SETTINGS["one checkpoint, and the best"]

    class Copy(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-2-copy")

    stopped(tmp_path, Copy(), **settings)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2-copy"}
    assert not (tmp_path / "_unfinished").exists()
