"""Secrets are taken out in all spellings, and nothing else is."""

import json
import os
import runpy
import string
import sys
import time

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from secret_samples import SECRETS, spellings

from recipe import redaction
from recipe.console import run_script
from recipe.files import write_json, write_json_lines
from recipe.provenance import command_line
from recipe.redaction import find_secrets, learn_from_config, learn_secret, redact, redact_message, secrets


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The samples are the only secrets of this process."""
    for name in os.environ:
        if "PYTEST" not in name:
            monkeypatch.delenv(name)
    for name, (raw, _) in SECRETS.items():
        monkeypatch.setenv(name, raw)
    for name in ("_learned_keys", "_config_secrets", "_config_addresses"):
        monkeypatch.setattr(redaction, name, set())


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


@pytest.mark.parametrize(
    "query", ["key=a", "sort_key=a", "token=7", "auth=12345", "sort_key=reference_loss", "sig=ab12"]
)
@pytest.mark.parametrize("where", ["variable", "flag", "config"])
def test_a_plain_parameter_of_an_address_spoils_no_text(query, where, monkeypatch):
    address = f"https://api.example.org/v1?{query}"
    monkeypatch.setenv("SERVER", address if where == "variable" else "")
    monkeypatch.setattr(sys, "argv", ["train.py", *([f"--data={address}"] if where == "flag" else [])])
    learn_from_config(f"data: {address}\n" if where == "config" else "")
    for text in ("monkey=apple", "resort_key=abc, key=apple", f"re{query}", f"{query}bc", "a loss: reference_loss 7"):
        assert redact(text) == text


@pytest.mark.parametrize(
    ("query", "text", "expected"),
    [
        ("sig=a1b2c3", "with sig=a1b2c3; not assig=a1b2c3, sig=a1b2c34", "with ***; not assig=a1b2c3, sig=a1b2c34"),
        ("sig=a1b2c3", '"body\\nsig=a1b2c3\\n"', '"body\\n***\\n"'),
        ("token=abcdefg", "/v1?token=abcdefg and token=abcdefg", "/v1*** and token=abcdefg"),
        ("token=abcdefg", "/v1?token=abcdefgh", "/v1?token=abcdefgh"),
        ("token=1b4dAcE0", "monkey 1b4dAcE0 apple", "monkey *** apple"),
    ],
)  # fmt: skip
def test_a_secret_parameter_of_an_address_goes(query, text, expected, monkeypatch):
    monkeypatch.setenv("SERVER", f"https://api.example.org/v1?{query}")
    assert redact(text) == expected


def test_user_and_password_of_an_address_spoil_no_longer_word(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter@db/records")
    assert redact("me:hunter@db, home:hunter@db") == "***db, home:hunter@db"


@pytest.mark.parametrize(
    "key",
    ["team-judge-local-key", "ab12cd34ef", "abcdefghijklmnopqrst", "12345678", "word_word", "/data/key", "<a-key->"],
)
def test_a_key_that_is_used_is_one_whatever_it_looks_like(key):
    assert redact(f"is {key} right?") == f"is {key} right?"
    learn_secret("JUDGE", f" {key}\n")
    assert redact(f"is {key} right?") == "is *** right?"
    assert [name for _, name in find_secrets(f"is {key} right?")] == ["JUDGE"]


def test_a_short_key_that_is_used_takes_nothing_out():
    learn_secret("JUDGE", "EMPTY")
    assert redact("EMPTY") == "EMPTY"


KEY = "sk-oops-local-judge-key"  # no digit in it
IN_PLACE = {
    "alone": ["--judge_key_env", KEY],
    "behind =": [f"--judge_key_env={KEY}"],
    "second word": ["--endpoint_key_env", "a.org=HOME", KEY],
    "third word, with its host": ["--endpoint_key_env", "a.org=HOME", "b.org:8000=HOME", f"c.org={KEY}"],
    "dashes": ["--judge-key-env", KEY],
    "dashes, behind =": [f"--endpoint-key-env=a.org={KEY}"],
    "a shortened flag": ["--judge_key_e", KEY],
}


@pytest.mark.parametrize("flags", IN_PLACE.values(), ids=IN_PLACE)
def test_a_key_in_place_of_its_variable_goes(flags, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags, "--output_dir", "some-long-folder-name"])
    shown = redact(command_line())
    assert KEY not in shown and redact(f"the server says: {KEY} is wrong") == "the server says: *** is wrong"
    assert "***" in shown and shown.endswith("--output_dir some-long-folder-name")


@pytest.mark.parametrize(
    "config",
    [
        f"judge_key_env: {KEY}",
        f"judge_key_env:   '{KEY}'  # ours",
        f"judge-key-env: {KEY}",
        f"endpoint_key_env: [a.org=HOME, b.org={KEY}]",
        f"endpoint_key_env:\n- a.org=HOME\n- {KEY}",
        f"endpoint_key_env:\n\n  # one each\n  - a.org=HOME\n  - b.org:8000={KEY}",
        f"endpoint_key_env: [\n  a.org=HOME,\n  {KEY}\n]",
    ],
)
def test_a_key_in_a_config_line_of_variables_goes(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    learn_from_config(f"seed: 1\n{config}\noutput_dir: some-long-folder-name\n")
    assert (
        redact(f"{KEY} is wrong, HOME, a.org, some-long-folder-name")
        == "*** is wrong, HOME, a.org, some-long-folder-name"
    )


def test_names_of_variables_are_no_keys(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "Zq3-0123456789ab")
    words = ["--endpoint_key_env", "a.org=JUDGE_API_KEY", "UNSET_VARIABLE_NAME", "--judge-key-env", "JUDGE_API_KEY"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *words])
    learn_from_config("judge_key_env: JUDGE_API_KEY  # whose team-judge-local-key is elsewhere\n")
    assert redact(" ".join([*words, "team-judge-local-key"])) == " ".join([*words, "team-judge-local-key"])


ADDRESSES = {
    "http://host:8000,mail:me@example.org": None,
    "http://host:8000;mail:me@example.org": None,
    "http://host:8000|me@example.org": None,
    "(http://host:8000)me@example.org": None,
    "http://host.example.org,mail:me@example.org": None,
    "http://[::1]:8000,mail:me@example.org": None,
    "http://host:8000/v1/@me": None,
    "http://host/a,b:c@d": None,
    "http://me@host/a": None,
    "http://me:pw@host,mail:you@example.org": "http://***@host,mail:you@example.org",
    "http://me:p@ss@host/a@b": "http://***@host/a@b",
    "http://me:p/s?s#w@host/a": "http://***@host/a",
    "http://:pw@host": "http://***@host",
    "http://a:p1@h1,http://b:p/2@h2,ftp://h3": "http://***@h1,http://***@h2,ftp://h3",
    "http://host:x,http://me:pw@h2": "http://host:x,http://***@h2",
    "http://host/x-http://me:pw@h2": "http://host/x-http://***@h2",
    "<http://me:pw@host> 'http://me:pw@host'": "<http://***@host> 'http://***@host'",
    "http://sk0123456789-abc@host/a?b=1&api_key=z#auth=y": "http://***@host/a?b=1&api_key=***#auth=***",
}


@pytest.mark.parametrize("text", ADDRESSES, ids=range(len(ADDRESSES)))  # the id is in a variable of pytest
def test_addresses_in_messages_lose_what_is_secret_and_nothing_else(text):
    assert redact_message(text) == (ADDRESSES[text] or text)


@given(
    st.lists(st.sampled_from(["://", "a", "me:", "@", ":80", ",", "/", "?key=", " ", "[::1]", "http", ";"])).map(
        "".join
    )
)
def test_messages_with_parts_of_addresses_keep_all_outside_of_them(text):
    shown = redact_message(text)
    assert redact_message(shown) == shown
    if "://" not in text:
        assert shown == text


@pytest.mark.parametrize(
    "part", ["://a:b", "://a:b,", "://a:b@", "://a,b@", "://a/@", "://?key", "?key&", "://a:b,x", "@"]
)
def test_no_message_takes_long(part):
    text = "://" + part * (1_000_000 // len(part))
    started = time.process_time()
    redact_message(text)
    assert time.process_time() - started < 10  # a quadratic one takes hours
