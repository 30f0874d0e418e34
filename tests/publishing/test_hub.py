"""Pushing to a Hub on a loopback port: what arrives, what never does, what is not sent twice, and faults on the way."""

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
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEMO, ROOT
from huggingface_hub import HfApi, constants
from loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState, TrainingArguments

import recipe.publishing.hub
from recipe.config import UserError
from recipe.publishing.hub import files_to_push, open_repository, push_files, refuse_secrets
from recipe.publishing.trainer_push import PushToHub, replace_trainer_push

CARD = "---\nlibrary_name: transformers\n---\n\n# A model\n"


@pytest.fixture
def hub(monkeypatch):
    """All tests but those of whole scripts talk to it in this process, in which the library was told to be offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(recipe.publishing.hub, "WAITS", (0, 0, 0))
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a run leaves, with all that must stay here; `training_args.bin` as the stock Trainer writes it."""
    folder = tmp_path / "run"
    shutil.copytree(DEMO / "base", folder)
    for name, text in {"README.md": CARD, "run.json": "{}\n", "trainer_state.json": "{}\n"}.items():
        (folder / name).write_text(text)
    (folder / "loss.png").write_bytes(b"\x89PNG" + bytes(100))
    torch.save(TrainingArguments(str(folder), hub_token=WRITE_TOKEN), folder / "training_args.bin")
    for name in ("optimizer.pt", "rng_state.pth", "events.out.tfevents.1", "pytorch_model.bin", "run.json.tmp"):
        (folder / name).write_text("stays here")
    for name in ("checkpoint-2/model.safetensors", ".cache/huggingface/x.json", "runs/events", "modeling_own.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stays here")
    return folder


def push(folder: Path, api: HfApi, **more):
    repo_id = open_repository("someone/model", api=api)
    return push_files(files_to_push(folder), repo_id, message="Publish", api=api, **more)


def paths_in_commits(hub) -> list[set[str]]:
    """The files of each commit, as they were sent."""
    lines = [[json.loads(line) for line in request.body.splitlines()] for request in hub.sent("POST", "/commit/")]
    return [{line["value"]["path"] for line in commit if line["key"] != "header"} for commit in lines]


# --- what goes ------------------------------------------------------------------------------------------------------


def test_only_what_is_named_goes(folder):
    assert files_to_push(folder).keys() == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "loss.png", "model.safetensors",
        "run.json", "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
    } - ({"chat_template.jinja"} - {path.name for path in folder.iterdir()})  # fmt: skip


def test_what_was_pushed_is_read_back_with_equal_weights(hub, api, folder, tmp_path):
    pushed = push(folder, api)
    assert pushed.url == f"{hub.endpoint}/someone/model/tree/main"
    assert pushed.sent and not pushed.removed
    downloaded = Path(api.snapshot_download("someone/model", cache_dir=tmp_path / "cache"))
    files = {path.name: path.read_bytes() for path in downloaded.iterdir()}
    assert files.keys() == files_to_push(folder).keys() | {".gitattributes"}
    assert all(files[name] == path.read_bytes() for name, path in files_to_push(folder).items())
    model, original = (AutoModelForCausalLM.from_pretrained(source) for source in (downloaded, DEMO / "base"))
    for name, weight in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(downloaded)("She walks.") == AutoTokenizer.from_pretrained(folder)(
        "She walks."
    )


def test_nothing_secret_is_in_any_byte_that_was_sent(hub, api, folder):
    assert WRITE_TOKEN.encode() in (folder / "training_args.bin").read_bytes()  # why it must stay
    push(folder, api)
    assert hub.sent("PUT", "/lfs/") and hub.sent("POST", "/commit/")
    for request in hub.requests:
        assert WRITE_TOKEN.encode() not in request.body and WRITE_TOKEN not in request.path


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"--hub_token {WRITE_TOKEN}", "a token of the Hub"),
        ("https://me:pass@example.com/data.json", "credentials in an address"),
        ("https://ghp_123@example.com/data.json", "credentials in an address"),
        ("postgresql://me:pass@db/records", "credentials in an address"),
        ("key=0123456789abcdef", "the value of WANDB_API_KEY"),
    ],
)
def test_secrets_in_text_files_are_refused(hub, api, folder, monkeypatch, text, what):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    (folder / "run.json").write_text(json.dumps({"fine": 1, "command": text}, indent=1))
    with pytest.raises(UserError, match=rf"run\.json line 3: holds {what}") as error:
        push(folder, api)
    assert "0123456789abcdef" not in str(error.value) and WRITE_TOKEN not in str(error.value)
    assert not hub.sent("POST", "preupload") and not hub.sent("POST", "commit")


def test_addresses_and_handles_are_no_secrets(folder):
    text = "see https://example.com/@someone, git@github.com:a/b, ssh://git@host/a, a@b.org, http://host:8000/v1?x=a@b"
    text += ", https://example.com?mail=a@b.org, postgresql://host#a:b@c"
    (folder / "run.json").write_text(text)
    refuse_secrets(files_to_push(folder))


def test_weights_that_are_not_whole_or_not_safetensors_are_refused(folder, tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"missing: model-00002-of-00002\.safetensors"):
        files_to_push(folder)
    with pytest.raises(UserError, match="no such folder"):
        files_to_push(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no model.safetensors to push"):
        files_to_push(tmp_path / "empty")


# --- once is enough -------------------------------------------------------------------------------------------------


def test_a_second_push_sends_nothing_and_a_third_what_changed(hub, api, folder):
    first = push(folder, api)
    hub.requests.clear()
    second = push(folder, api)
    assert first.sent and not second.sent and second.commit == first.commit
    assert not hub.sent("PUT", "/lfs/") and not hub.sent("POST", "/commit/")
    (folder / "README.md").write_text(CARD + "\nMore.\n")
    assert push(folder, api).sent
    assert not hub.sent("PUT", "/lfs/") and paths_in_commits(hub) == [{"README.md"}]
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    push(folder, api)
    assert len(hub.sent("PUT", "/lfs/")) == 1 and paths_in_commits(hub)[1] == {"model.safetensors"}
    assert hub.repositories["models/someone/model"].messages == ["initial commit", *["Publish"] * 3]


def test_weights_of_an_earlier_push_go_and_other_files_stay(hub, api, folder):
    push(folder, api)
    repository = hub.repositories["models/someone/model"]
    extra = {"adapter_config.json", "NOTES.md", "other/model.safetensors"}
    files = repository.commits[repository.branches["main"]]
    files.update(dict.fromkeys(extra, files["config.json"]))
    pushed = push(folder, api)
    assert pushed.sent and pushed.removed == ["adapter_config.json"]
    assert {"NOTES.md", "other/model.safetensors"} <= repository.files().keys()
    assert "adapter_config.json" not in repository.files()


def test_scores_of_old_weights_go_with_them(hub, api, folder, tmp_path):
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    for name in ("metrics.json", "report.html", "scores.png"):
        (evaluation / name).write_text("of the first weights")
    repo_id = open_repository("someone/model", api=api)
    push_files(files_to_push(folder, evaluation), repo_id, message="Scored", api=api)
    repository = hub.repositories["models/someone/model"]
    files = repository.commits[repository.branches["main"]]
    files["evaluation/NOTES.md"] = files["config.json"]
    assert not push(folder, api).sent  # the same weights: their scores stay
    name, weight = next(iter(load_file(folder / "model.safetensors").items()))
    save_file({name: weight}, folder / "model.safetensors", metadata={"format": "pt"})
    (evaluation / "report.html").write_text("of the second")
    for other in ("metrics.json", "scores.png"):
        (evaluation / other).unlink()
    pushed = push_files(files_to_push(folder, evaluation), repo_id, message="Scored", api=api)
    assert set(pushed.removed) == {"evaluation/metrics.json", "evaluation/scores.png"}
    assert paths_in_commits(hub)[-1] == {"model.safetensors", "evaluation/report.html", *pushed.removed}
    assert {path for path in repository.files() if "/" in path} == {"evaluation/NOTES.md", "evaluation/report.html"}


def test_revisions_and_tags(hub, api, folder):
    push(folder, api, tag="v1")
    (folder / "README.md").write_text(CARD + "\nSecond.\n")
    repo_id = open_repository("someone/model", revision="next", api=api)
    files = files_to_push(folder)
    pushed = push_files(files, repo_id, message="Next", revision="next", tag="v2", api=api)
    assert pushed.url.endswith("/someone/model/tree/v2")
    repository = hub.repositories["models/someone/model"]
    assert repository.files("main")["README.md"] == repository.files("v1")["README.md"] == CARD.encode()
    assert repository.files("next")["README.md"] == repository.files("v2")["README.md"]
    (folder / "README.md").write_text(CARD + "\nThird.\n")
    for name in ("v1", "main", "next"):
        with pytest.raises(UserError, match=f"--tag {name}: someone/model has a tag or branch of this name already"):
            push(folder, api, tag=name)
    assert repository.files("v1")["README.md"] == CARD.encode() and len(repository.messages) == 3
    assert repository.tags.keys() == {"v1", "v2"}


def test_private_is_private(hub, api, folder):
    assert open_repository("model", private=True, api=api) == "someone/model"  # the owner is the token's
    assert hub.repositories["models/someone/model"].private
    open_repository("someone/open", private=False, api=api)
    with pytest.raises(UserError, match="someone/open exists and is public"):
        open_repository("someone/open", private=True, api=api)


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "part", "how"),
    [
        ("POST", "/commit/", 409), ("POST", "/commit/", 412), ("POST", "/commit/", 500), ("POST", "/commit/", "lost"),
        ("POST", "/commit/", "cut"), ("POST", "/repos/create", 503), ("GET", "/auth-check", "lost"),
        ("POST", "/validate-yaml", 500), ("POST", "/tag/", 500), ("POST", "/tag/", "lost"),
        ("POST", "/preupload/", 503), ("POST", "/objects/batch", 500), ("PUT", "/lfs/", 500), ("PUT", "/lfs/", "cut"),
        ("PUT", "/lfs/", "lost"),
    ],
)  # fmt: skip
def test_a_fault_is_got_past_without_a_second_commit(hub, api, folder, monkeypatch, method, part, how):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library's own pause, before it uploads again
    hub.fail(method, part, how)
    pushed = push(folder, api, tag="v1")
    repository = hub.repositories["models/someone/model"]
    assert repository.messages == ["initial commit", "Publish"] and not hub.faults[0].times
    assert repository.tags == {"v1": pushed.commit}
    for name, path in files_to_push(folder).items():
        assert repository.files("v1")[name] == path.read_bytes()


def test_a_commit_of_somebody_else_in_between_is_noticed(hub, api, folder):
    """It adds an adapter after we looked, which would be loaded with our weights: the second look removes it."""
    push(folder, api)
    (folder / "README.md").write_text(CARD + "\nMore.\n")
    repository = hub.repositories["models/someone/model"]

    def commit_an_adapter():
        files = repository.commits[repository.branches["main"]]
        repository.commit({**files, "adapter_config.json": files["config.json"]}, "Of somebody else")

    hub.fail("POST", "/commit/", commit_an_adapter)
    pushed = push(folder, api)
    assert repository.messages == ["initial commit", "Publish", "Of somebody else", "Publish"]
    assert pushed.sent and pushed.removed == ["adapter_config.json"]
    assert "adapter_config.json" not in repository.files()
    assert repository.files()["README.md"].endswith(b"More.\n")
    hub.fail("POST", "/commit/", commit_an_adapter, times=4)
    (folder / "README.md").write_text(CARD)
    with pytest.raises(UserError, match=r"failed 4 times, the last time with: .*412.*A commit has happened since"):
        push(folder, api)
    assert repository.messages[4:] == ["Of somebody else"] * 4


def test_a_push_that_failed_for_good_is_resumed_without_uploading_again(hub, api, folder):
    hub.fail("POST", "/commit/", 500, times=4)
    with pytest.raises(UserError, match=r"failed 4 times, the last time with: .*500.*push again"):
        push(folder, api)
    repository = hub.repositories["models/someone/model"]
    assert repository.messages == ["initial commit"]  # nothing half published
    uploaded = len(hub.sent("PUT", "/lfs/"))
    assert uploaded == 2  # the weights and the picture, once in four attempts
    push(folder, api)
    assert len(hub.sent("PUT", "/lfs/")) == uploaded and repository.messages == ["initial commit", "Publish"]


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", "someone/model", r"no token, or a wrong one \(401\); run `hf auth login`, or set HF_TOKEN"),
        (False, "someone/model", r"no token, or a wrong one \(401\)"),
        (READ_TOKEN, "someone/model", r"may not write there \(403\)"),
        (READ_TOKEN, "someone/readable", r"may not write there \(403\)"),
        (WRITE_TOKEN, "other/model", r"may not write there \(403\).*namespace 'other'"),
        (WRITE_TOKEN, "not a name", "not a name: this is no name of a repository; write owner/name"),
    ],
)
def test_who_may_not_write_is_told_so_at_once(hub, monkeypatch, token, repo_id, message):
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    hub.add("models/someone/readable")
    with pytest.raises(UserError, match=message) as error:
        open_repository(repo_id, api=HfApi(endpoint=hub.endpoint, token=token))
    assert "\n" not in str(error.value) and len(hub.sent("POST", "/repos/create")) <= 1


def test_a_hub_that_is_off_or_gone(hub, api, folder, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.add("models/someone/model")
    files = files_to_push(folder)
    with pytest.raises(UserError, match=r"check owner, name and revision .*none"):
        push_files(files, "someone/model", message="x", revision="none", api=api)
    with pytest.raises(UserError, match=r"someone/none: not found, or not for this token \(404\)"):
        push_files(files, "someone/none", message="x", api=api)
    with pytest.raises(UserError, match="failed 4 times"):
        push_files(files, "someone/model", message="x", api=HfApi(endpoint="http://127.0.0.1:9", token=WRITE_TOKEN))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it to push"):
        push_files(files, "someone/model", message="x", api=api)


def test_a_card_the_hub_refuses(hub, api, folder):
    (folder / "README.md").write_text("---\n- no mapping\n---\n")
    with pytest.raises(UserError, match=r"the Hub refused the push: Invalid metadata in README\.md"):
        push(folder, api)
    assert not hub.sent("PUT", "/lfs/")


# --- while training -------------------------------------------------------------------------------------------------


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


def test_a_checkpoint_is_pushed_behind_training_and_may_be_removed_meanwhile(hub, api, folder, capsys):
    push = PushToHub(open_repository("someone/model", api=api), "checkpoint", api=api)
    hub.fail("POST", "/preupload/", "hold")
    start = time.perf_counter()
    saved(push, folder, 2)
    saved(push, folder, 3)  # skipped: the one before is still on its way
    assert capsys.readouterr().out == "  checkpoint-3: not pushed, an earlier push is still running\n"
    assert time.perf_counter() - start < 2
    shutil.rmtree(folder / "checkpoint-2")
    threading.Timer(0.2, hub.released.set).start()
    push.finish(folder)
    repository = hub.repositories["models/someone/model"]
    assert repository.messages == [
        "initial commit", "Training in progress, step 2", "Training in progress, step 2, checkpoint",
        "Training in progress, step 3, checkpoint", "End of training",
    ]  # fmt: skip
    assert json.loads(repository.files()["last-checkpoint/trainer_state.json"])["step"] == 3
    files = {path for path in repository.files() if path.startswith("last-checkpoint/")}
    assert files == {
        f"last-checkpoint/{name}"
        for name in ("model.safetensors", "config.json", "trainer_state.json", "optimizer.pt", "rng_state.pth")
    }
    uploads = [request.path for request in hub.sent("PUT", "/lfs/")]
    assert len(uploads) == len(set(uploads))  # weights that are in the repository twice were sent once
    assert not (folder / ".push").exists()


def test_all_checkpoints_always(hub, api, folder):
    push = PushToHub(open_repository("someone/model", api=api), "all_checkpoints", always=True, api=api)
    hub.fail("POST", "/preupload/", "hold")
    for step in (2, 4, 6):
        saved(push, folder, step)
    hub.released.set()
    push.finish(folder)
    files = hub.repositories["models/someone/model"].files()
    assert {path.split("/")[0] for path in files if "/" in path} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert json.loads(files["checkpoint-4/config.json"])["step"] == 4


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_strategies_without_checkpoints(hub, api, folder, strategy):
    push = PushToHub(open_repository("someone/model", api=api), strategy, api=api)
    saved(push, folder, 2)
    push.finish(folder)
    repository = hub.repositories["models/someone/model"]
    assert len(repository.messages) == (2 if strategy == "end" else 3)
    assert not any("/" in path or path.endswith((".pt", ".pth", ".bin")) for path in repository.files())


def test_a_push_that_fails_while_training_is_told_and_made_good(hub, api, folder, capsys):
    push = PushToHub(open_repository("someone/model", api=api), "checkpoint", api=api)
    hub.fail("POST", "/commit/", 403)
    saved(push, folder, 2)
    assert push.finish(folder).sent
    failed, pushed = capsys.readouterr().out.splitlines()
    assert failed.startswith("  checkpoint-2: not pushed: someone/model: the token may not write")
    assert pushed == "  checkpoint-2: pushed to someone/model"
    repository = hub.repositories["models/someone/model"]
    assert repository.messages == ["initial commit", "Training in progress, step 2, checkpoint", "End of training"]
    assert json.loads(repository.files()["last-checkpoint/optimizer.pt"])["step"] == 2
    assert files_to_push(folder).keys() <= repository.files().keys()


def test_what_is_missing_for_resuming_is_told(hub, api, folder, capsys):
    push = PushToHub(open_repository("someone/model", api=api), "all_checkpoints", api=api)
    hub.fail("POST", "/commit/", 403)
    saved(push, folder, 2)
    wait(push._jobs)
    shutil.rmtree(folder / "checkpoint-2")
    assert push.finish(folder).sent
    [_, line] = capsys.readouterr().out.splitlines()
    assert line.startswith("  checkpoint-2: not pushed: ") and str(folder / "checkpoint-2") in line


def test_a_save_that_cannot_be_staged_does_not_stop_training(hub, api, folder, capsys):
    (folder / ".push").write_text("in the way")
    push = PushToHub(open_repository("someone/model", api=api), "every_save", api=api)
    saved(push, folder, 2)
    assert capsys.readouterr().out.startswith("  checkpoint-2: not pushed: [Errno ")
    assert push.finish(folder).sent


def test_saves_that_wait_are_not_pushed_when_training_fails(hub, api, folder, capsys):
    push = PushToHub(open_repository("someone/model", api=api), "every_save", always=True, api=api)
    hub.fail("POST", "/preupload/", "hold")
    threading.Timer(0.5, hub.released.set).start()
    with pytest.raises(ZeroDivisionError), push:
        for step in (2, 4, 6):
            saved(push, folder, step)
        raise ZeroDivisionError
    assert hub.repositories["models/someone/model"].messages == ["initial commit", "Training in progress, step 2"]
    waiting, pushed = capsys.readouterr().out.splitlines()
    assert waiting == "waiting for the push to someone/model that is still running"
    assert pushed == "  checkpoint-2: pushed to someone/model"


def command_in(error: UserError) -> list[str]:
    return shlex.split(str(error).split("this pushes it later: ")[1])


def test_a_last_push_that_fails_names_the_command_for_later(hub, api, folder):
    folder = folder.rename(folder.with_name("my run"))
    push = PushToHub(open_repository("someone/model", revision="next", api=api), "end", revision="next", api=api)
    hub.fail("POST", "/commit/", 403)
    with pytest.raises(UserError, match="may not write there") as error:
        push.finish(folder)
    wanted = ["python", "scripts/publish.py", str(folder), "--repo_id", "someone/model", "--revision", "next"]
    assert command_in(error.value) == wanted


def test_an_interrupted_last_push_names_it_too(hub, api, folder):
    push = PushToHub(open_repository("someone/model", api=api), "every_save", api=api)
    hub.fail("POST", "/preupload/", "hold")
    saved(push, folder, 2)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(UserError, match=r"^the push was interrupted\n") as error:
        push.finish(folder)
    assert command_in(error.value)[2:] == [str(folder), "--repo_id", "someone/model"]
    hub.released.set()
    with pytest.raises(KeyboardInterrupt), push:  # let the thread end before the Hub does
        raise KeyboardInterrupt


def test_the_stock_trainer_is_told_not_to_push(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    args = TrainingArguments(
        str(tmp_path / "run"), push_to_hub=True, hub_strategy="checkpoint", hub_private_repo=True, hub_revision="next",
        hub_always_push=True,
    )  # fmt: skip
    push = replace_trainer_push(args)
    assert args.push_to_hub is False
    assert (push.repo_id, push.strategy, push.revision, push.always) == ("someone/run", "checkpoint", "next", True)
    repository = hub.repositories["models/someone/run"]
    assert repository.private and "next" in repository.branches


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
    return {"args": command, "cwd": ROOT, "env": environment, "text": True}


def train(*where: Any, token: str = WRITE_TOKEN) -> subprocess.CompletedProcess:
    return subprocess.run(**training(*where, token=token), capture_output=True, timeout=200)


def test_training_pushes_what_a_download_resumes_from(cache, tmp_path):
    output_dir = tmp_path / "run"
    with LoopbackHub() as hub:
        done = train(
            hub.endpoint, cache, "--output_dir", str(output_dir), "--hub_model_id", "someone/tuned",
            "--hub_strategy", "checkpoint", "--hub_always_push", "true", "--hub_private_repo", "true",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"Pushed: {hub.endpoint}/someone/tuned/tree/main" in done.stdout
        repository = hub.repositories["models/someone/tuned"]
        steps = [f"Training in progress, step {step}{part}" for step in (2, 4) for part in ("", ", checkpoint")]
        assert repository.private and repository.messages == ["initial commit", *steps, "End of training"]
        files = repository.files()
        assert {"README.md", "run.json", "loss.png", "model.safetensors", "chat_template.jinja"} <= files.keys()
        assert not any("training_args" in path for path in files)
        assert files["model.safetensors"] == (output_dir / "model.safetensors").read_bytes()
        assert json.loads(files["run.json"])["config"]["training"]["push_to_hub"] is True

        # nothing secret: in what was sent, and in what was written
        assert not any(WRITE_TOKEN.encode() in request.body for request in hub.requests)
        assert not any(WRITE_TOKEN in request.path for request in hub.requests)
        assert WRITE_TOKEN not in done.stdout + done.stderr
        for path in output_dir.rglob("*"):
            assert not path.is_file() or WRITE_TOKEN.encode() not in path.read_bytes(), path

        # from step 2, as the Hub had it then: the weights that the run reached without a break
        commit = list(repository.commits)[2]
        downloads = cache / "downloads"
        code = (
            "from huggingface_hub import snapshot_download\n"
            f"snapshot_download('someone/tuned', revision={commit!r}, local_dir={str(downloads)!r})"
        )
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": WRITE_TOKEN}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=100)
        assert not (downloads / "last-checkpoint" / "training_args.bin").exists()
        done = train(
            hub.endpoint, cache, "--output_dir", str(tmp_path / "resumed"), "--hub_strategy", "every_save",
            "--hub_revision", "next", "--resume_from_checkpoint", str(downloads / "last-checkpoint"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        resumed = hub.repositories["models/someone/resumed"]
        assert resumed.messages == ["initial commit", "Training in progress, step 4", "End of training"]
        assert 'model="someone/resumed"' in resumed.files("next")["README.md"].decode()  # no --hub_model_id, no owner
        assert resumed.files("next")["model.safetensors"] == files["model.safetensors"]
        state = json.loads(resumed.files("next")["trainer_state.json"])
        assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]


def test_ctrl_c_waits_for_the_push_that_is_under_way_and_no_other(cache, tmp_path):
    log = tmp_path / "log"
    with LoopbackHub() as hub, open(log, "w") as output:
        hub.fail("POST", "/preupload/", "hold")
        wanted = training(
            hub.endpoint, cache, "--output_dir", str(tmp_path / "run"), "--hub_model_id", "someone/tuned",
            "--hub_always_push", "true", "--max_steps", "400",
        )  # fmt: skip
        wanted["env"] |= {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(**wanted, stdout=output, stderr=subprocess.STDOUT)
        try:
            until(lambda: len(list((tmp_path / "run" / ".push").glob("*"))) > 1)  # one is held, others wait
            process.send_signal(signal.SIGINT)
            until(lambda: "waiting for the push to someone/tuned that is still running" in log.read_text())
            hub.released.set()
            assert process.wait(timeout=60) == 1
        finally:
            process.kill()
            process.wait()
    said = log.read_text()
    assert hub.repositories["models/someone/tuned"].messages == ["initial commit", "Training in progress, step 2"]
    assert said.splitlines()[-1].startswith("interrupted: --resume_from_checkpoint true goes on")
    assert "checkpoint-2: pushed" in said and "Traceback" not in said and "after interpreter shutdown" not in said


def until(happened: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_wrong_token_costs_no_training(cache, tmp_path):
    with LoopbackHub() as hub:
        done = train(hub.endpoint, cache, "--output_dir", str(tmp_path / "run"), token="hf_wrongwrongwrongwrong")
        assert done.returncode == 1 and not (tmp_path / "run").exists() and len(hub.sent("POST", "")) == 1
    [line] = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: run: no token, or a wrong one (401); run `hf auth login`, or set HF_TOKEN")


def test_a_token_as_a_flag_is_refused_and_not_repeated(cache, tmp_path):
    done = train("http://127.0.0.1:9", cache, "--output_dir", str(tmp_path / "run"), "--hub_token", WRITE_TOKEN)
    assert done.returncode == 1 and "set the environment variable HF_TOKEN" in done.stderr
    assert WRITE_TOKEN not in done.stdout + done.stderr and not (tmp_path / "run").exists()
