"""Keys are stripped of what copying adds, and refused without being shown."""

import os

import pytest
from huggingface_hub import get_token

from recipe.config import UserError
from recipe.keys import checked_key, clean_hub_token, read_key

KEY = "sk-0123/4567+89=="


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (f"{KEY}\r", "a line break"), (f"{KEY}\n\n", "a line break"), (f"  {KEY}\t", "white space"),
        (f"\ufeff{KEY}", "an invisible character"), (f"\u200b{KEY}\u2060", "an invisible character"),
        (f"“{KEY}”", "a quotation mark"), (f"'{KEY}'", "a quotation mark"),
        (f'"{KEY}" \r\n', "a line break and a quotation mark and white space"),
    ],
)  # fmt: skip
def test_what_copying_adds_is_left_out_and_said_once(monkeypatch, capsys, raw, what):
    checked_key.cache_clear()
    monkeypatch.setenv("SOME_KEY", raw)
    assert read_key("SOME_KEY") == read_key("SOME_KEY") == KEY
    assert capsys.readouterr().err == f"SOME_KEY: left out {what} around it\n"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("sk-01234\r\nsk-56789", "its character 9 of 18 is a line break"),
        ("Bearer sk-0123456", "its character 7 of 17 is white space"),
        ("sk–0123456789", "its character 3 of 13 is none of ASCII"),
        ("sk-0123\u200b456789", "its character 8 of 14 is an invisible character"),
        ("sk-0123\x07456789", "its character 8 of 14 is an invisible character"),
        ("sk-0123“456789", "its character 8 of 14 is a quotation mark"),
        ("SOME_KEY=sk-0123456", "begins with its own name"),
    ],
)
def test_what_is_no_key_is_refused_and_not_shown(monkeypatch, capsys, raw, message):
    monkeypatch.setenv("SOME_KEY", raw)
    with pytest.raises(UserError, match=f"SOME_KEY:? {message}") as refused:
        read_key("SOME_KEY")
    assert "0123" not in str(refused.value) + capsys.readouterr().err


@pytest.mark.parametrize("raw", ["“hf_abcdefghijklmnopqrstuvwxyz”", "hf_abcdefghijklmnopqrstuvwxyz\r\n"])
def test_the_hubs_library_gets_its_token_without_what_copying_adds(monkeypatch, capsys, raw):
    monkeypatch.setenv("HF_TOKEN", raw)
    clean_hub_token()
    assert os.environ["HF_TOKEN"] == get_token() == "hf_abcdefghijklmnopqrstuvwxyz"
    assert "HF_TOKEN: left out" in capsys.readouterr().err


def test_no_key_is_none(monkeypatch, capsys):
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert read_key("SOME_KEY") is None
    for raw in ("", " \r\n", '""'):
        monkeypatch.setenv("SOME_KEY", raw)
        assert read_key("SOME_KEY") is None
