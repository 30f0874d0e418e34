"""Secrets are taken out in all spellings, and nothing else is."""

import json
import os
import runpy
import string
import sys

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from secret_samples import SECRETS, spellings

from recipe.console import run_script
from recipe.files import write_json, write_json_lines
from recipe.redaction import find_secrets, redact, secrets


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The samples are the only secrets of this process."""
    for name in os.environ:
        if "PYTEST" not in name:
            monkeypatch.delenv(name)
    for name, (raw, _) in SECRETS.items():
        monkeypatch.setenv(name, raw)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_found_in_every_spelling(name):
    secret = SECRETS[name][1]
    for kind, text in spellings(secret).items():
        line = f"an error in line 1: [{text}] is no key"
        assert text not in redact(line), kind
        assert redact(line).startswith("an error in line 1: [") and redact(line).endswith("] is no key"), kind
        assert name in {found for _, found in find_secrets(line)}, kind


@given(secret=st.text(st.sampled_from(string.ascii_letters + string.digits + "/+=_-%&\"'\\ äß€😀"), min_size=16))
def test_any_secret_is_found_in_every_spelling(secret):
    core = f"Xy4{secret}z7"  # no white space or quotes around it
    os.environ["OTHER_SECRET"] = core
    try:
        for kind, text in spellings(core).items():
            assert text not in redact(f"{{{text}}}"), kind
    finally:
        del os.environ["OTHER_SECRET"]


def test_json_stays_json(tmp_path):
    row = {"a\nb": [1.5, None, *(f"<{secret}>\n" for _, secret in SECRETS.values())], "n": 123456789012}
    write_json(tmp_path / "a.json", row)
    write_json_lines(tmp_path / "a.jsonl", [row, row])
    texts = [(tmp_path / "a.json").read_text(), *(tmp_path / "a.jsonl").read_text().splitlines()]
    assert [json.loads(text) for text in texts] == [{"a\nb": [1.5, None, *["<***>\n"] * 3], "n": 123456789012}] * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "true-or-false-1"),
        ("SSH_AUTH_SOCK", "/tmp/ssh-1/agent.12345"),
        ("PUBLIC_KEY_PATH", "/home/jane/keys/id.pub"),
        ("SIGNING_KEY", "/home/jane/keys/id.pub"),
        ("SORT_KEY", "reference_loss"),
        ("COLUMN_KEYS", "instruction,input,output,reference_loss"),
        ("EOS_TOKEN", "<|endoftext|>"),
        ("PAD_TOKEN", "[PAD_TOKEN_0]"),
        ("MAX_TOKENS", "123456789012"),
        ("PASSWORD", "instructions"),
        ("API_KEY", "${OTHER_VARIABLE}"),
        ("HF_TOKEN", "short_1"),
        ("KEYBOARD", "pc105-de-latin1"),
        ("HTTP_PROXY", "http://user:pass@localhost:3128"),
    ],
)
def test_what_is_no_secret_stays(monkeypatch, name, value):
    before = secrets()
    monkeypatch.setenv(name, value)
    assert secrets() == before and redact(f"a {value} b") == f"a {value} b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KEYS", "0a1b2c3d4e5f,6a7b8c9d0e1f"),  # a list
        ("service_password", "correct horse battery staple"),
        ("MY_API_KEY_2", "word-by-word-words"),
        ("CLIENT_SECRET", "/AbCdEfGh+12"),
        ("DATABASE_URL", "postgresql://me:1b4dAcE-0123456@db/records"),
    ],
)
def test_what_is_one_goes(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    secret = value.split(",")[-1].split("me:")[-1].split("@")[0]
    assert redact(f"a {secret} b") == "a *** b"


def test_values_of_flags_are_secrets(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["t.py", "--hub_token", "1b4dAcE0123456", "--api_key=1b4dAcE6543210", "--n", "1"])
    assert redact("1b4dAcE0123456, 1b4dAcE6543210") == "***, ***"


HUB = "hf_" + "aB3dE" * 6


@pytest.mark.parametrize(
    ("content", "flags", "secret"),
    [
        (f'learning_rate: 0.1\nhub_token: "{HUB}\n', [], HUB),  # no valid YAML
        (f"hub_token: [{HUB}]\n", [], HUB),
        (f"hub_token: {HUB}\n", [], HUB),
        (f"{HUB}: 1\n", [], HUB),
        ("data: https://me:hunter2-hunter2@host/a.jsonl\n", [], "hunter2-hunter2"),
        ("judge_key: 'Zq3_0123456789-abcdef'\n", [], "Zq3_0123456789-abcdef"),
        ("seed: 1\n", ["--learning_rate", HUB], HUB),
        ("seed: 1\n", [HUB], HUB),
        ("seed: 1\n", [f"--{HUB}=1"], HUB),
    ],
)
def test_secrets_of_config_files_and_flags_are_in_no_message(content, flags, secret, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "run.yaml"), *flags])
    main = runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"]
    with pytest.raises(SystemExit) as end:
        run_script(main, interrupted="")
    assert end.value.code.startswith("error: ") and "Traceback" not in end.value.code and secret not in end.value.code


def test_tokens_that_are_stored_are_secrets(monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "token").write_text("1b4dAcE0123456\n")
    (tmp_path / "tokens").write_text("[work]\nhf_token = 1b4dAcE6543210\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    assert redact("1b4dAcE0123456, 1b4dAcE6543210") == "***, ***"


def test_files_are_the_same_with_and_without_other_variables(monkeypatch, tmp_path):
    content = {"eos": "<|endoftext|>", "reference_loss": 1.5, "folder": str(tmp_path), "text": "false"}
    write_json(tmp_path / "a", content)
    others = {"TOKENIZERS_PARALLELISM": "false", "EOS_TOKEN": "<|endoftext|>", "SORT_KEY": "reference_loss"}
    for name, value in {**others, "SIGNING_KEY": str(tmp_path), "SSH_AUTH_SOCK": str(tmp_path / "agent")}.items():
        monkeypatch.setenv(name, value)
    write_json(tmp_path / "b", content)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
