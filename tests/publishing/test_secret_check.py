"""What stops a push: this process's secrets in any spelling, well-known keys, passwords, local folders, odd names."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import DEMO
from secret_samples import SECRETS, spellings
from transformers import TrainingArguments

from recipe.config import UserError
from recipe.publishing.hub import check_reference, check_repo_id, files_to_push, push_files, refuse_local_folders
from recipe.publishing.push_while_training import PushToHub, replace_trainer_push
from recipe.publishing.secret_check import SecretError, refuse_secrets, secret_like

pytest_plugins = ["hub_fixtures"]

BODY = "A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8"


@pytest.mark.parametrize("name", SECRETS)
def test_an_own_secret_is_found_in_every_spelling_and_cannot_be_allowed(monkeypatch, tmp_path, name):
    raw, secret = SECRETS[name]
    monkeypatch.setenv(name, raw)
    file = tmp_path / "run.json"
    for kind, text in spellings(secret).items():
        file.write_text(f"\n[{text}]\n", encoding="utf-8")
        with pytest.raises(SecretError, match=rf"run\.json line 2: holds .*the value of {name}") as error:
            refuse_secrets({"run.json": file}, allowed=["run.json:2"])
        assert text not in str(error.value) and error.value.flags == [], kind
    file.write_text(secret, encoding="utf-16")
    with pytest.raises(SecretError, match=name):
        refuse_secrets({"run.json": file})


@pytest.mark.parametrize(
    "key",
    [
        f"hf_{BODY}", f"sk-{BODY}", f"sk-proj-{BODY}", f"sk-ant-api03-{BODY}", f"ghp_{BODY}", f"github_pat_{BODY}",
        f"glpat-{BODY[:20]}", "AKIAI44QH8DHBEXAMP1E", f"xoxb-{BODY}", f"AIza{BODY[:35]}", f"sk_live_{BODY}",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE", "-----BEGIN OPENSSH PRIVATE KEY-----\\nb3Bl",
        "https://me:1b4dAcE@data.internal/a", "redis://:1b4dAcE@cache", "https:\\/\\/me:1b4dAcE@data.internal\\/a",
    ],
)  # fmt: skip
def test_well_known_keys_are_found_wherever_they_stand(key):
    for before in ("", "KEY=", '{"a": "\\n', "x\n", "%3D" if "/" not in key else "", "task-sk-1 "):
        assert [name for _, name in secret_like(f"{before}{key}")], before


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://user:password@localhost", "https://user:pass@example.com/a", "http://username:token@host",
        "https://me:1b4dAcE@127.0.0.1:80/", "https://me:${PASSWORD}@db.internal", "https://user:<token>@db.internal",
        "https://git@github.com.example/a", "https://YOUR_TOKEN@github.com/a", "amqp://me:***@db.internal",
        "hf_" + "x" * 34, "sk-...", "sk-your-key-goes-in-here-please", "sk-" + "X" * 40, "AKIAIOSFODNN7EXAMPLE",
        "sk-container-id-1 sk-estimator-doc-link", "task-0123456789abcdefghijkl", "-----BEGIN PRIVATE KEY-----\n...",
        "-----BEGIN PUBLIC KEY-----\nMIIB", "sha256:0123456789abcdef", "ssh://git@host/a", "see http://a.org/@me",
    ],
)  # fmt: skip
def test_placeholders_are_no_secrets(text):
    assert list(secret_like(text)) == []


def test_the_demo_holds_none(monkeypatch):
    for name, (raw, _) in SECRETS.items():
        monkeypatch.setenv(name, raw)
    records = {path.name: path for path in (DEMO / "records").iterdir()}
    assert refuse_secrets(files_to_push(DEMO / "base") | records) == []


def test_what_only_looks_like_a_secret_can_be_allowed(hub, folder):
    (folder / "run.json").write_text(f'{{"a": "hf_{BODY}",\n"b": "redis://:1b4dAcE@cache"}}')
    files = files_to_push(folder)
    with pytest.raises(SecretError) as error:
        refuse_secrets(files)
    assert error.value.flags == ["--allow_secret_like", "run.json:1", "--allow_secret_like", "run.json:2"]
    assert "--allow_secret_like run.json:1 --allow_secret_like run.json:2" in str(error.value)
    with pytest.raises(SecretError, match=r"run\.json line 2: holds credentials") as error:
        refuse_secrets(files, allowed=["run.json:1"])
    assert error.value.flags == ["--allow_secret_like", "run.json:2"]
    with pytest.raises(UserError, match=r"--allow_secret_like run\.json:3: nothing is found there"):
        refuse_secrets(files, allowed=["run.json:1", "run.json:2", "run.json:3"])
    allowed = refuse_secrets(files, allowed=["run.json:1", "run.json:2"])
    assert allowed[0] == "run.json:1 holds a token of the Hub, which was allowed" and len(allowed) == 2
    with pytest.raises(UserError, match=r"scripts/publish\.py .* --allow_secret_like run\.json:1"):
        PushToHub("someone/model", folder).finish()
    hub.add("models/someone/model")
    assert push_files(files, "someone/model", message="x", allowed=["run.json:1", "run.json:2"]).sent


# --- folders of this machine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("adapter_config.json", "base_model_name_or_path"),
        ("config.json", "_name_or_path"),
        ("tokenizer_config.json", "name_or_path"),
    ],
)
def test_names_of_local_folders_are_refused(hub, folder, tmp_path, monkeypatch, name, field):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    for base in ("/home/jane.doe/base", "./base", "~/base", "a/b/c", "runs/base", "D:\\models\\base"):
        (folder / name).write_text(json.dumps(content | {field: base}))
        with pytest.raises(UserError, match=rf"{name}: '{field}' is {re.escape(repr(base))}, a folder of this machine"):
            push_files(files_to_push(folder), "someone/model", message="x")
    assert hub.requests == []
    for base in ("openai-community/gpt2", "gpt2", "", None):
        (folder / name).write_text(json.dumps(content | {field: base}))
        assert refuse_local_folders(files_to_push(folder)) is None  # raises for a folder


# --- names ----------------------------------------------------------------------------------------------------------

NO_NAMES = [
    "someone/my model", "someone/a--b", "a/b/c", "someone/name.git", "-someone/name", "someone/-name", "someone/.name",
    "someone/name.", "someone/a..b", "someone/" + "a" * 97, "someone/naïve", "https://huggingface.co/someone/name",
    "someone/", "/name", "some\none/name", "",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_of_a_repository(hub, tmp_path, name):
    with pytest.raises(UserError, match="is no name of a repository: write owner/name"):
        check_repo_id(name)
    if name:
        with pytest.raises(UserError, match="is no name of a repository"):
            replace_trainer_push(TrainingArguments(str(tmp_path), push_to_hub=True, hub_model_id=name))
    assert hub.requests == []


def test_the_name_of_the_output_folder_is_checked(hub, tmp_path):
    with pytest.raises(UserError, match=r"'my run' is no name .*--hub_model_id gives another"):
        replace_trainer_push(TrainingArguments(str(tmp_path / "my run"), push_to_hub=True))
    with pytest.raises(UserError, match=r"--hub_revision 'a b': git refuses"):
        replace_trainer_push(TrainingArguments(str(tmp_path / "run"), push_to_hub=True, hub_revision="a b"))
    assert hub.requests == []
    assert check_repo_id("someone/my-model_1.0") is None and check_repo_id("name") is None  # raise for no name


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.parametrize(
    "name",
    [
        "v1", "v1.0", "next/one", "é", "a-b_c", "refs/pr/1", "a@b", "x.locked", "@a", "a{b}", "headless",
        "a b", "a..b", "a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "/a", "a/", "a//b", ".a", "a/.b", "a.", "a.lock",
        "a.lock/b", "@", "a@{b", "-a", "HEAD", "a\tb", "a\x7fb",
    ],
)  # fmt: skip
def test_names_of_branches_are_refused_as_git_does(name):
    done = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True)
    if done.returncode == 0:
        assert check_reference(name, "--revision") is None
    else:
        with pytest.raises(UserError, match=r"--revision .*git refuses this name"):
            check_reference(name, "--revision")
