"""Pushing to a Hub on a loopback port: what arrives, what never does, what is not sent twice, and faults on the way."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from hub_fixtures import CARD
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from loopback_hub import READ_TOKEN, WRITE_TOKEN
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.config import UserError
from recipe.publishing.hub import files_to_push, is_temporary, open_repository, push_files
from recipe.publishing.secret_check import refuse_secrets

pytest_plugins = ["hub_fixtures"]


def push(folder: Path, **more):
    repo_id = open_repository("someone/model")
    return push_files(files_to_push(folder), repo_id, message="Publish", **more)


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


def test_what_was_pushed_is_read_back_with_equal_weights(hub, folder, tmp_path):
    pushed = push(folder)
    assert pushed.url == f"{hub.endpoint}/someone/model/tree/main"
    assert pushed.sent and not pushed.removed
    downloaded = Path(HfApi().snapshot_download("someone/model", cache_dir=tmp_path / "cache"))
    files = {path.name: path.read_bytes() for path in downloaded.iterdir()}
    assert files.keys() == files_to_push(folder).keys() | {".gitattributes"}
    assert all(files[name] == path.read_bytes() for name, path in files_to_push(folder).items())
    model, original = (AutoModelForCausalLM.from_pretrained(source) for source in (downloaded, DEMO / "base"))
    for name, weight in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(downloaded)("She walks.") == AutoTokenizer.from_pretrained(folder)(
        "She walks."
    )


def test_nothing_secret_is_in_any_byte_that_was_sent(hub, folder):
    assert WRITE_TOKEN.encode() in (folder / "training_args.bin").read_bytes()  # why it must stay
    push(folder)
    assert hub.sent("PUT", "/lfs/") and hub.sent("POST", "/commit/")
    for request in hub.requests:
        assert WRITE_TOKEN.encode() not in request.body and WRITE_TOKEN not in request.path


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"--hub_token {WRITE_TOKEN}", "a token of the Hub"),
        ("https://me:1b4dAcE@data.internal/a.json", "credentials in an address"),
        ("https://ghp_123@data.internal/a.json", "credentials in an address"),
        ("postgresql://me:1b4dAcE@db/records", "credentials in an address"),
        ("key=0123456789abcdef", "the value of WANDB_API_KEY"),
    ],
)
def test_secrets_in_text_files_are_refused(hub, folder, monkeypatch, text, what):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    (folder / "run.json").write_text(json.dumps({"fine": 1, "command": text}, indent=1))
    with pytest.raises(UserError, match=rf"run\.json line 3: holds {what}") as error:
        push(folder)
    assert "0123456789abcdef" not in str(error.value) and WRITE_TOKEN not in str(error.value)
    assert not hub.sent("POST", "preupload") and not hub.sent("POST", "commit")


def test_addresses_and_handles_are_no_secrets(folder):
    text = "see https://example.com/@someone, git@github.com:a/b, ssh://git@host/a, a@b.org, http://host:8000/v1?x=a@b"
    text += ", https://example.com?mail=a@b.org, postgresql://host#a:b@c"
    (folder / "run.json").write_text(text)
    assert refuse_secrets(files_to_push(folder)) == []  # raises for a secret


def test_weights_that_are_not_whole_or_not_safetensors_are_refused(folder, tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"missing: model-00002-of-00002\.safetensors"):
        files_to_push(folder)
    with pytest.raises(UserError, match="no such folder"):
        files_to_push(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no model\.safetensors to push"):
        files_to_push(tmp_path / "empty")


@pytest.mark.parametrize("name", ["adapter_config.json", "run.json", "evaluation/metrics.json"])
def test_what_is_no_file_is_named_and_not_left_out(folder, tmp_path, name):
    (tmp_path / "evaluation").mkdir()
    place = (tmp_path if "/" in name else folder) / name
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    with pytest.raises(UserError, match=f"{place.name}: a folder, a pipe or a link to nothing, not a file"):
        files_to_push(folder, tmp_path / "evaluation")


# --- once is enough -------------------------------------------------------------------------------------------------


def test_a_second_push_sends_nothing_and_a_third_what_changed(hub, folder):
    first = push(folder)
    hub.requests.clear()
    second = push(folder)
    assert first.sent and not second.sent and second.commit == first.commit
    assert not hub.sent("PUT", "/lfs/") and not hub.sent("POST", "/commit/")
    (folder / "README.md").write_text(CARD + "\nMore.\n")
    assert push(folder).sent
    assert not hub.sent("PUT", "/lfs/") and paths_in_commits(hub) == [{"README.md"}]
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    push(folder)
    assert len(hub.sent("PUT", "/lfs/")) == 1 and paths_in_commits(hub)[1] == {"model.safetensors"}
    assert hub.repositories["models/someone/model"].messages == ["initial commit", *["Publish"] * 3]


def test_weights_of_an_earlier_push_go_and_other_files_stay(hub, folder):
    push(folder)
    repository = hub.repositories["models/someone/model"]
    extra = {"adapter_config.json", "NOTES.md", "other/model.safetensors"}
    files = repository.commits[repository.branches["main"]]
    files.update(dict.fromkeys(extra, files["config.json"]))
    pushed = push(folder)
    assert pushed.sent and pushed.removed == ["adapter_config.json"]
    assert {"NOTES.md", "other/model.safetensors"} <= repository.files().keys()
    assert "adapter_config.json" not in repository.files()


def test_scores_of_old_weights_go_with_them(hub, folder, tmp_path):
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    for name in ("metrics.json", "report.html", "scores.png"):
        (evaluation / name).write_text("of the first weights")
    repo_id = open_repository("someone/model")
    push_files(files_to_push(folder, evaluation), repo_id, message="Scored")
    repository = hub.repositories["models/someone/model"]
    files = repository.commits[repository.branches["main"]]
    files["evaluation/NOTES.md"] = files["config.json"]
    assert not push(folder).sent  # the same weights: their scores stay
    name, weight = next(iter(load_file(folder / "model.safetensors").items()))
    save_file({name: weight}, folder / "model.safetensors", metadata={"format": "pt"})
    (evaluation / "report.html").write_text("of the second")
    for other in ("metrics.json", "scores.png"):
        (evaluation / other).unlink()
    pushed = push_files(files_to_push(folder, evaluation), repo_id, message="Scored")
    assert set(pushed.removed) == {"evaluation/metrics.json", "evaluation/scores.png"}
    assert paths_in_commits(hub)[-1] == {"model.safetensors", "evaluation/report.html", *pushed.removed}
    assert {path for path in repository.files() if "/" in path} == {"evaluation/NOTES.md", "evaluation/report.html"}


def test_revisions_and_tags(hub, folder):
    push(folder, tag="v1")
    (folder / "README.md").write_text(CARD + "\nSecond.\n")
    repo_id = open_repository("someone/model", revision="next")
    files = files_to_push(folder)
    pushed = push_files(files, repo_id, message="Next", revision="next", tag="v2")
    assert pushed.url.endswith("/someone/model/tree/v2")
    repository = hub.repositories["models/someone/model"]
    assert repository.files("main")["README.md"] == repository.files("v1")["README.md"] == CARD.encode()
    assert repository.files("next")["README.md"] == repository.files("v2")["README.md"]
    assert repository.tags.keys() == {"v1", "v2"}


def test_a_tag_stays_where_it_is(hub, folder):
    first = push(folder, tag="v1")
    again = push(folder, tag="v1")  # the same command once more
    assert not again.sent and again.commit == first.commit and again.url.endswith("/tree/v1")
    push(folder, tag="v1.0")  # nothing changed, a further tag
    repository = hub.repositories["models/someone/model"]
    hub.requests.clear()

    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    changes = {
        "README.md": (CARD + "\nMore.\n").encode(),
        "model.safetensors": save({**weights, name: weights[name] + 1}, metadata={"format": "pt"}),
    }
    for path, content in changes.items():
        before = (folder / path).read_bytes()
        (folder / path).write_bytes(content)
        with pytest.raises(UserError, match=r"--tag v1: someone/model has this tag on another commit"):
            push(folder, tag="v1")
        (folder / path).write_bytes(before)
    with pytest.raises(UserError, match=r"--tag main: someone/model has .*a branch of this name"):
        push(folder, tag="main")
    (folder / "README.md").write_bytes(changes["README.md"])
    sent = push(folder)
    with pytest.raises(UserError, match=r"--tag v1: someone/model has this tag on another commit"):
        push(folder, tag="v1")  # nothing changed, and the tag is on an earlier commit
    assert len(hub.sent("POST", "/commit/")) == 1 and not hub.sent("PUT", "/lfs/") and not hub.sent("POST", "/tag/")
    assert repository.tags == {"v1": first.commit, "v1.0": first.commit} and repository.branches["main"] == sent.commit


def test_private_is_private(hub, folder):
    assert open_repository("model", private=True) == "someone/model"  # the owner is the token's
    assert hub.repositories["models/someone/model"].private
    open_repository("someone/open", private=False)
    with pytest.raises(UserError, match="someone/open exists and is public"):
        open_repository("someone/open", private=True)


# --- faults ---------------------------------------------------------------------------------------------------------


def test_an_answer_that_was_cut_is_asked_for_again_and_a_wrong_name_is_not():
    assert is_temporary(json.JSONDecodeError("Expecting value", "", 0))
    assert not is_temporary(HFValidationError("a name with blanks"))


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
def test_a_fault_is_got_past_without_a_second_commit(hub, folder, monkeypatch, method, part, how):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library's own pause, before it uploads again
    hub.fail(method, part, how)
    pushed = push(folder, tag="v1")
    repository = hub.repositories["models/someone/model"]
    assert repository.messages == ["initial commit", "Publish"] and not hub.faults[0].times
    assert repository.tags == {"v1": pushed.commit}
    for name, path in files_to_push(folder).items():
        assert repository.files("v1")[name] == path.read_bytes()


def test_a_commit_of_somebody_else_in_between_is_noticed(hub, folder):
    """It adds an adapter after we looked, which would be loaded with our weights: the second look removes it."""
    push(folder)
    (folder / "README.md").write_text(CARD + "\nMore.\n")
    repository = hub.repositories["models/someone/model"]

    def commit_an_adapter():
        files = repository.commits[repository.branches["main"]]
        repository.commit({**files, "adapter_config.json": files["config.json"]}, "Of somebody else")

    hub.fail("POST", "/commit/", commit_an_adapter)
    pushed = push(folder)
    assert repository.messages == ["initial commit", "Publish", "Of somebody else", "Publish"]
    assert pushed.sent and pushed.removed == ["adapter_config.json"]
    assert "adapter_config.json" not in repository.files()
    assert repository.files()["README.md"].endswith(b"More.\n")
    hub.fail("POST", "/commit/", commit_an_adapter, times=4)
    (folder / "README.md").write_text(CARD)
    with pytest.raises(UserError, match=r"failed 4 times, the last time with: .*412.*A commit has happened since"):
        push(folder)
    assert repository.messages[4:] == ["Of somebody else"] * 4


def test_a_push_that_failed_for_good_is_resumed_without_uploading_again(hub, folder):
    hub.fail("POST", "/commit/", 500, times=4)
    with pytest.raises(UserError, match=r"failed 4 times, the last time with: .*500.*push again"):
        push(folder)
    repository = hub.repositories["models/someone/model"]
    assert repository.messages == ["initial commit"]  # nothing half published
    uploaded = len(hub.sent("PUT", "/lfs/"))
    assert uploaded == 2  # the weights and the picture, once in four attempts
    push(folder)
    assert len(hub.sent("PUT", "/lfs/")) == uploaded and repository.messages == ["initial commit", "Publish"]


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", "someone/model", r"no token, or a wrong one \(401\); run `hf auth login`, or set HF_TOKEN"),
        ("", "someone/model", r"no token, or a wrong one \(401\)"),
        (READ_TOKEN, "someone/model", r"may not write there \(403\)"),
        (READ_TOKEN, "someone/readable", r"may not write there \(403\)"),
        (WRITE_TOKEN, "other/model", r"may not write there \(403\).*namespace 'other'"),
        (WRITE_TOKEN, "not a name", "'not a name' is no name of a repository: .*Repo id must use"),
    ],
)
def test_who_may_not_write_is_told_so_at_once(hub, monkeypatch, token, repo_id, message):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.add("models/someone/readable")
    with pytest.raises(UserError, match=message) as error:
        open_repository(repo_id)
    assert "\n" not in str(error.value) and len(hub.sent("POST", "/repos/create")) <= 1


def test_a_hub_that_is_off_or_gone(hub, folder, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.add("models/someone/model")
    files = files_to_push(folder)
    with pytest.raises(UserError, match=r"check owner, name and revision .*none"):
        push_files(files, "someone/model", message="x", revision="none")
    with pytest.raises(UserError, match=r"someone/none: not found, or not for this token \(404\)"):
        push_files(files, "someone/none", message="x")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="failed 4 times"):
        push_files(files, "someone/model", message="x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="unset the `HF_HUB_OFFLINE`"):
        push_files(files, "someone/model", message="x")


def test_a_card_the_hub_refuses(hub, folder):
    (folder / "README.md").write_text("---\n- no mapping\n---\n")
    with pytest.raises(UserError, match=r"refused: Invalid metadata in README\.md"):
        push(folder)
    assert not hub.sent("PUT", "/lfs/")
