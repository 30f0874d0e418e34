"""Every fault of the Hub at every kind of request: told in a line, soon, without a token; the same push works later.

What a push got past, tests/publishing/test_hub.py has; here the fault stays until the push gives up.
"""

import json
import os
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from conftest import ROOT
from loopback_hub import WRITE_TOKEN, LoopbackHub, Reply
from safetensors.torch import save_file
from test_push_while_training import command_in, train

import recipe.publishing.hub
from recipe.config import UserError
from recipe.publishing.hub import files_to_push, open_repository, push_files
from recipe.publishing.push_while_training import PushToHub

pytest_plugins = ["hub_fixtures"]

HTML = b"<!doctype html><title>Sign in</title><p>Please sign in to this network."
REQUESTS = {  # kind → method, part of the path
    "create": ("POST", "/repos/create"), "access": ("GET", "/auth-check"), "branch": ("POST", "/branch/next"),
    "look": ("GET", "/revision/next"), "preupload": ("POST", "/preupload/"), "card": ("POST", "/validate-yaml"),
    "batch": ("POST", "/objects/batch"), "upload": ("PUT", "/lfs/"), "verify": ("POST", "/lfs/verify"),
    "commit": ("POST", "/commit/"),
}  # fmt: skip
FAULTS = {
    **{str(status): status for status in (401, 403, 404, 409, 412, 413, 429, 500, 502, 503, 504)},
    "429, wait": Reply(429, b'{"error": "slow down"}', {"Retry-After": "1"}),
    "429, wait for long": Reply(429, b'{"error": "slow down"}', {"Retry-After": "9000"}),
    "HTML": Reply(200, HTML, {"Content-Type": "text/html"}),
    "cut JSON": Reply(200, b'{"url": "http', {"Content-Type": "application/json"}),
    "other JSON": Reply(200, b"[]", {"Content-Type": "application/json"}),
    "refused": "refused", "cut": "cut", "lost": "lost", "silent": "silent", "drip": "drip",
}  # fmt: skip
# What a push may get past: what was obeyed, and whose answer was lost, is found to be there; of an answer that tells
# nothing, the state alone counts; what is uploaded is not sent, and not verified, in the next attempt.
PASSED = {
    **{kind: {"lost"} for kind in ("create", "branch", "upload", "commit")},
    "access": {"HTML", "cut JSON", "other JSON", "moved"},
    "verify": {*FAULTS, "moved"} - {"401", "403", "404", "413"},
}
WORDS = ("push again", "login", "token", "check", "smaller files", "refused")
SOON = 20  # seconds, on a busy machine; a push takes 0.1


@pytest.fixture
def small(tmp_path) -> Path:
    """The smallest model that can be pushed."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_file({"a": torch.zeros(4)}, folder / "model.safetensors")
    for name in ("config.json", "run.json"):
        (folder / name).write_text("{}\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
    return folder


@pytest.fixture
def soon(monkeypatch):
    """All times in small, of the library too, which waits up to 8 seconds before it repeats an upload."""
    monkeypatch.setattr(recipe.publishing.hub, "SILENCE", 0.2)
    monkeypatch.setattr(recipe.publishing.hub, "LONGEST", 1.0)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.001) if seconds < 100 else seconds))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push(folder: Path):
    repo_id = open_repository("someone/model", revision="next")
    return push_files(files_to_push(folder), repo_id, message="Publish", revision="next")


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_fault_that_stays_is_told_and_the_same_push_works_later(small, hub, soon, kind, caplog):
    before, method, part = contents(small), *REQUESTS[kind]
    with LoopbackHub() as elsewhere:
        elsewhere.fail(method, "", Reply(200, HTML), times=99)
        elsewhere.fail("GET", "", Reply(200, HTML), times=99)
        moved = Reply(307, b"", {"Location": f"{elsewhere.endpoint}/login"})
        for name, how in {**FAULTS, "moved": moved}.items():
            hub.repositories.clear()
            hub.objects.clear()
            hub.faults.clear()
            hub.released.clear()
            hub.fail(method, part, how, times=10_000)
            begun, error = time.monotonic(), None
            try:
                push(small)
            except UserError as raised:
                error = raised
            assert time.monotonic() - begun < SOON, name
            hub.faults.clear()
            hub.released.set()
            repository = hub.repositories.get("models/someone/model")
            if error is None:
                assert name in PASSED.get(kind, ()), name
            else:
                said = str(error)
                assert "\n" not in said and said.startswith("someone/model: ") and len(said) < 700, (name, said)
                assert WRITE_TOKEN not in said and "Traceback" not in said
                assert any(word in said for word in WORDS), (name, said)
                assert repository is None or repository.messages == ["initial commit"], name
            assert contents(small) == before
            pushed = push(small)  # the fault is gone
            repository = hub.repositories["models/someone/model"]
            assert repository.messages == ["initial commit", "Publish"], name
            assert repository.branches["next"] == pushed.commit
            assert all(repository.files("next")[path] == before[path] for path in files_to_push(small))
        assert not any("Authorization" in request.headers for request in elsewhere.requests)
    assert WRITE_TOKEN not in caplog.text


def test_a_fault_that_stays_while_training_leaves_the_rest_to_the_end(small, hub, soon, capsys):
    """Each kind of fault at a save, then none: training is not held up, and the last push sends the whole run."""
    push = PushToHub(open_repository("someone/model"), small)
    for step, (name, how) in enumerate(FAULTS.items(), start=1):
        checkpoint = small / f"checkpoint-{step}"
        checkpoint.mkdir()
        save_file({"a": torch.full((4,), float(step))}, checkpoint / "model.safetensors")
        (checkpoint / "config.json").write_text("{}\n")
        hub.fail("POST", "/preupload/", how, times=10_000)
        begun = time.monotonic()
        push.on_save(None, type("State", (), {"is_world_process_zero": True, "global_step": step}), None)
        assert time.monotonic() - begun < 5, name
        push.thread.join(timeout=SOON)
        assert not push.thread.is_alive(), name
        hub.faults.clear()
        line = capsys.readouterr().out
        assert line.startswith(f"  checkpoint-{step}: not pushed: someone/model: ") and line.count("\n") == 1, (
            name,
            line,
        )
    hub.released.set()
    assert push.finish().sent
    repository = hub.repositories["models/someone/model"]
    late = f"Training in progress, step {len(FAULTS)}"  # the answer that began and did not end has ended now
    assert [message for message in repository.messages if message != late] == ["initial commit", "End of training"]
    assert repository.files()["model.safetensors"] == (small / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "how", [403, 413, 429, 503, "refused", "cut", "silent", "drip", FAULTS["HTML"], FAULTS["other JSON"]]
)
def test_a_last_push_that_fails_names_a_command_that_works_later(small, hub, soon, how, publish_main):
    push = PushToHub(open_repository("someone/model"), small, every_save=False)
    hub.fail("POST", "/commit/", how, times=10_000)
    with pytest.raises(UserError) as error:
        push.finish()
    hub.faults.clear()
    hub.released.set()
    reason, way_out = str(error.value).split("\n")
    assert reason.startswith("someone/model: ") and WRITE_TOKEN not in reason
    assert way_out.startswith(f"the run is complete in {small}/; this pushes it later: python scripts/publish.py ")
    repository = hub.repositories["models/someone/model"]
    assert repository.messages == ["initial commit"]
    (small / "run.json").unlink()  # a card of its own needs a whole run
    publish_main(command_in(error.value)[2:])
    assert repository.messages == ["initial commit", "Publish"]


@pytest.fixture
def publish_main():
    return runpy.run_path(str(ROOT / "scripts" / "publish.py"))["main"]


def test_time_for_a_push_grows_with_its_size(hub, monkeypatch):
    """A slow line is no fault: each 100 kB gets a second more."""
    monkeypatch.setattr(recipe.publishing.hub, "LONGEST", 0.2)
    monkeypatch.setattr(recipe.publishing.hub, "SLOWEST", 10)

    def slow():
        time.sleep(1)
        return "done"

    assert recipe.publishing.hub.with_retries(slow, "a/b", size=1000) == "done"
    with pytest.raises(
        UserError, match=r"a/b: the Hub has not answered within 0 s, and what is on its way may still arrive; push"
    ):
        recipe.publishing.hub.with_retries(slow, "a/b")


def test_a_mistake_of_our_own_is_no_fault_of_the_hub(hub):
    with pytest.raises(KeyError):
        recipe.publishing.hub.with_retries(lambda: {}["a"], "a/b")


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [503, "refused"])
def test_a_run_whose_pushes_all_fail_ends_with_its_model_and_the_command(tmp_path, how):
    output_dir = tmp_path / "tuned"
    with LoopbackHub() as hub:
        hub.fail("POST", "/commit/", how, times=10_000)
        done = train(hub.endpoint, tmp_path, "--output_dir", str(output_dir))
        assert done.returncode == 1 and "Traceback" not in done.stderr and WRITE_TOKEN not in done.stdout + done.stderr
        run = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
        assert run["state"] == "finished" and run["result"]["steps"] == 4
        reason, way_out = done.stderr.strip().splitlines()[-2:]
        assert reason.startswith("error: someone/tuned: the Hub failed 4 times") and "push again" in reason
        assert way_out.startswith("the run is complete in ")
        assert hub.repositories["models/someone/tuned"].messages == ["initial commit"]
        hub.faults.clear()
        command = shlex.split(way_out.split("this pushes it later: ")[1])
        assert publish(hub, tmp_path, command).returncode == 0
        files = hub.repositories["models/someone/tuned"].files()
        assert files["model.safetensors"] == (output_dir / "model.safetensors").read_bytes()


def publish(hub: LoopbackHub, cache: Path, command: list[str]) -> subprocess.CompletedProcess:
    environment = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": WRITE_TOKEN, "HF_HOME": str(cache / "home"),
    }  # fmt: skip
    words = [sys.executable, *command[1:]]
    return processes.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
