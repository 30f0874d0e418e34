"""Pushing while a run trains, and the finished run, to a Hub on a loopback port; and the main job in real processes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from conftest import ROOT
from loopback_hub import WRITE_TOKEN, LoopbackHub
from safetensors.torch import save_file
from transformers import TrainerState, TrainingArguments

from recipe.config import UserError
from recipe.publishing.hub import files_to_push, open_repository
from recipe.publishing.push_while_training import PushToHub, replace_trainer_push

pytest_plugins = ["hub_fixtures"]


def save(folder: Path, step: int) -> None:
    """What a save leaves, in small."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(exist_ok=True)
    save_file({"weight": torch.full((4,), float(step))}, checkpoint / "model.safetensors")
    for name in ("config.json", "trainer_state.json", "optimizer.pt", "rng_state.pth", "training_args.bin"):
        (checkpoint / name).write_text(json.dumps({"name": name, "step": step}))


def saved(push: PushToHub, folder: Path, step: int) -> None:
    save(folder, step)
    state = TrainerState(global_step=step, is_world_process_zero=True)
    push.on_save(SimpleNamespace(output_dir=str(folder)), state, None)


def test_a_checkpoint_is_pushed_behind_training(hub, folder, capsys):
    push = PushToHub(open_repository("someone/model"), folder)
    hub.fail("POST", "/preupload/", "hold")
    start = time.perf_counter()
    saved(push, folder, 2)
    saved(push, folder, 3)  # skipped: the one before is still on its way
    assert capsys.readouterr().out == "  checkpoint-3: not pushed, an earlier push is still running\n"
    assert time.perf_counter() - start < 2
    threading.Timer(0.2, hub.released.set).start()
    push.finish()
    repository = hub.repositories["models/someone/model"]
    assert repository.messages == ["initial commit", "Training in progress, step 2", "End of training"]
    assert json.loads(list(repository.commits.values())[1]["config.json"].content)["step"] == 2


def test_a_checkpoint_that_is_removed_while_it_is_pushed(hub, folder, capsys):
    push = PushToHub(open_repository("someone/model"), folder)
    hub.fail("POST", "/preupload/", "hold")
    saved(push, folder, 2)
    shutil.rmtree(folder / "checkpoint-2")
    hub.released.set()
    assert push.finish().sent
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("  checkpoint-2: not pushed: it was removed") and "--save_total_limit" in line
    assert hub.repositories["models/someone/model"].messages == ["initial commit", "End of training"]


@pytest.mark.parametrize("every_save", [False, True])
def test_only_safetensors_and_text_go(hub, folder, every_save):
    push = PushToHub(open_repository("someone/model"), folder, every_save=every_save)
    saved(push, folder, 2)
    push.finish()
    repository = hub.repositories["models/someone/model"]
    assert len(repository.messages) == (3 if every_save else 2)
    for files in repository.commits.values():
        assert not any("/" in path or path.endswith((".pt", ".pth", ".bin")) for path in files)


def test_a_push_that_fails_while_training_is_reported(hub, folder, capsys):
    push = PushToHub(open_repository("someone/model"), folder)
    hub.fail("POST", "/commit/", 403)
    saved(push, folder, 2)
    assert push.finish().sent
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("  checkpoint-2: not pushed: someone/model: the token may not write")
    repository = hub.repositories["models/someone/model"]
    assert repository.messages == ["initial commit", "End of training"]
    assert files_to_push(folder).keys() <= repository.files().keys()


def command_in(error: UserError) -> list[str]:
    return shlex.split(str(error).split("this pushes it later: ")[1])


def test_a_last_push_that_fails_names_the_command_for_later(hub, folder):
    folder = folder.rename(folder.with_name("my run"))
    repo_id = open_repository("someone/model", revision="next")
    push = PushToHub(repo_id, folder, every_save=False, revision="next")
    hub.fail("POST", "/commit/", 403)
    with pytest.raises(UserError, match="may not write there") as error:
        push.finish()
    wanted = ["python", "scripts/publish.py", str(folder), "--repo_id", "someone/model", "--revision", "next"]
    assert command_in(error.value) == wanted


def test_an_interrupted_last_push_names_it_too(hub, folder):
    push = PushToHub(open_repository("someone/model"), folder)
    hub.fail("POST", "/preupload/", "hold")
    saved(push, folder, 2)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(UserError, match=r"^the push was interrupted\n") as error:
        push.finish()
    assert command_in(error.value)[2:] == [str(folder), "--repo_id", "someone/model"]
    hub.released.set()
    push.thread.join()  # before the Hub ends


def test_the_stock_trainer_is_told_not_to_push(hub, tmp_path):
    args = TrainingArguments(
        str(tmp_path / "run"), push_to_hub=True, hub_strategy="end", hub_private_repo=True, hub_revision="next"
    )
    push = replace_trainer_push(args)
    assert args.push_to_hub is False
    assert (push.repo_id, push.every_save, push.revision) == ("someone/run", False, "next")
    repository = hub.repositories["models/someone/run"]
    assert repository.private and "next" in repository.branches


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_push_pickles_are_refused(hub, tmp_path, strategy):
    args = TrainingArguments(str(tmp_path / "run"), push_to_hub=True, hub_strategy=strategy)
    with pytest.raises(
        UserError, match=rf"--hub_strategy {strategy} .*pickles.*optimizer\.pt.*use every_save or end"
    ) as e:
        replace_trainer_push(args)
    assert "\n" not in str(e.value) and not hub.requests


def test_pushing_always_is_refused(hub, tmp_path):
    args = TrainingArguments(str(tmp_path / "run"), push_to_hub=True, hub_always_push=True)
    with pytest.raises(UserError, match=r"--hub_always_push: .*leave the flag out"):
        replace_trainer_push(args)
    assert not hub.requests


# --- the main job ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def training(endpoint: str, cache: Path, *flags: str, token: str = WRITE_TOKEN) -> dict:
    """What a process needs to train and push."""
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token,
        "HF_HOME": str(cache / "home"), "HF_DATASETS_CACHE": str(cache),
    }  # fmt: skip
    command = [
        sys.executable, "scripts/train.py", "configs/demo.yaml", "--save_strategy", "steps", "--save_steps", "2",
        "--max_steps", "4", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--logging_steps", "1",
        "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--push_to_hub", "true", *flags,
    ]  # fmt: skip
    return {"command": command, "cwd": ROOT, "env": environment, "text": True}


def train(*where: Any, token: str = WRITE_TOKEN) -> subprocess.CompletedProcess:
    return processes.run(**training(*where, token=token), capture_output=True, timeout=200)


def test_training_pushes_every_save_and_the_finished_run(cache, tmp_path):
    output_dir = tmp_path / "tuned"
    with LoopbackHub() as hub:
        done = train(
            hub.endpoint, cache, "--output_dir", str(output_dir), "--hub_private_repo", "true", "--hub_revision", "next"
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"Pushed: {hub.endpoint}/someone/tuned/tree/next" in done.stdout
        repository = hub.repositories["models/someone/tuned"]  # no --hub_model_id, no owner
        assert repository.private and repository.messages[-1] == "End of training"
        assert repository.messages[:2] == ["initial commit", "Training in progress, step 2"]
        files = repository.files("next")
        assert {"README.md", "run.json", "loss.png", "model.safetensors", "chat_template.jinja"} <= files.keys()
        assert not any(path.endswith((".pt", ".pth", ".bin")) for path in files)
        assert files["model.safetensors"] == (output_dir / "model.safetensors").read_bytes()
        assert json.loads(files["run.json"])["config"]["training"]["push_to_hub"] is True
        assert 'model="someone/tuned"' in files["README.md"].decode()

        # nothing secret: in what was sent, and in what was written
        assert not any(WRITE_TOKEN.encode() in request.body for request in hub.requests)
        assert not any(WRITE_TOKEN in request.path for request in hub.requests)
        assert WRITE_TOKEN not in done.stdout + done.stderr
        for path in output_dir.rglob("*"):
            assert not path.is_file() or WRITE_TOKEN.encode() not in path.read_bytes(), path


def test_ctrl_c_ends_the_push_that_is_running(cache, tmp_path):
    log = tmp_path / "log"
    with LoopbackHub() as hub, open(log, "w") as output:
        hub.fail("POST", "/preupload/", "hold")
        wanted = training(
            hub.endpoint, cache, "--output_dir", str(tmp_path / "run"), "--hub_model_id", "someone/tuned",
            "--max_steps", "400",
        )  # fmt: skip
        wanted["env"] |= {"PYTHONUNBUFFERED": "1"}
        process = processes.start(**wanted, stdout=output, stderr=subprocess.STDOUT)
        try:
            until(lambda: "checkpoint-4: not pushed, an earlier push is still running" in log.read_text())
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 75  # though the Hub does not answer
        finally:
            hub.released.set()
            process.kill()
            process.wait()
    assert hub.repositories["models/someone/tuned"].messages == ["initial commit"]
    last = log.read_text().splitlines()[-1]
    assert last.startswith("stopped by SIGINT after step") and last.endswith("--resume_from_checkpoint true goes on")
    assert "Traceback" not in log.read_text()


def until(happened: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_mistake_costs_no_training(cache, tmp_path):
    with LoopbackHub() as hub:
        output_dir = ("--output_dir", str(tmp_path / "run"))
        wrong_token = train(hub.endpoint, cache, *output_dir, token="hf_wrongwrongwrongwrong")
        assert len(hub.sent("POST", "")) == 1
        hub.requests.clear()
        pickles = train(hub.endpoint, cache, *output_dir, "--hub_strategy", "checkpoint")
        assert not hub.requests
    assert not (tmp_path / "run").exists()
    for done, message in [
        (wrong_token, "error: run: no token, or a wrong one (401); run `hf auth login`, or set HF_TOKEN"),
        (pickles, "error: --hub_strategy checkpoint would push pickles (optimizer.pt, rng_state.pth)"),
    ]:
        [line] = [line for line in done.stderr.splitlines() if line.strip()]
        assert done.returncode == 1 and line.startswith(message)


def test_a_token_as_a_flag_is_refused_and_not_repeated(cache, tmp_path):
    done = train("http://127.0.0.1:9", cache, "--output_dir", str(tmp_path / "run"), "--hub_token", WRITE_TOKEN)
    assert done.returncode == 1 and "set the environment variable HF_TOKEN" in done.stderr
    assert WRITE_TOKEN not in done.stdout + done.stderr and not (tmp_path / "run").exists()
