"""Secrets in variables, flags, addresses and files: in no file, log line, message of the terminal, or packet."""

import io
import json
import logging
import sys
import warnings

import pytest
from stub_endpoint import Raw, Say, Status, serve_stub

from recipe import redaction
from recipe.config import DataArguments, ModelArguments, UserError, parse_arguments
from recipe.console import run_script
from recipe.redaction import redact_message

# where each is, and the secret itself
VARIABLES = {
    "OPENAI_API_KEY": "sk-canaryA\n0123456789",  # a line break in the middle
    "JUDGE": "canaryB-Zq3-0123456789",  # its name says nothing
    "WANDB_API_KEY": "canaryC\u201d0a1b",  # a typographic quote, and short
    "HTTPS_PROXY": "http://me:canaryD/x@proxy.invalid:3128",
    "DATABASE_URL": "postgresql://me:canaryE%2Fx%40y@db.invalid/a",
    "STORE": "https://store.invalid/a?X-Amz-Signature=canaryFabc&b=1",
}
FLAGS = [
    "--data", "https://user:canaryG/p?q#r@data.invalid/a.json",
    "--model_name_or_path", "ftp://user:canaryH@models.invalid/gpt2",
    "--tokenizer_name", "https://canaryItoken1@models.invalid/gpt2",
]  # fmt: skip
YAML = """
data: 'https://me:canaryJ/x@data.invalid/records.jsonl?token=canaryK'
hub_token: canaryL-0123456789
learning_rate: [
"""
CANARIES = [f"canary{letter}" for letter in "ABCDEFGHIJKL"]


@pytest.fixture(autouse=True)
def secrets(monkeypatch, tmp_path):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(redaction, "_config_secrets", set())
    monkeypatch.setattr(redaction, "_learned_keys", set())
    monkeypatch.setattr(redaction, "_config_addresses", set())
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS])
    (tmp_path / "config.yaml").write_text(YAML)


def leaked(text: str) -> list[str]:
    return [canary for canary in CANARIES if canary in text]


def all_of_them() -> str:
    values = [*VARIABLES.values(), *FLAGS[1::2], YAML]
    return "\n".join([*values, *map(repr, values), *map(json.dumps, values)])


def test_nothing_that_is_printed_warned_of_or_logged_shows_one(tmp_path, capfd, monkeypatch):
    log = io.StringIO()
    before = logging.StreamHandler(log)  # as a library makes it when it is imported
    logging.getLogger("some.library").addHandler(before)

    def main(argv):
        with pytest.raises(UserError) as error:
            parse_arguments([ModelArguments, DataArguments], [str(tmp_path / "config.yaml")], "")
        print("PRINTED", error.value, all_of_them())
        print("ON STDERR", all_of_them(), file=sys.stderr)
        logging.getLogger("some.library").warning("LOGGED %s", all_of_them())
        warnings.warn(f"WARNED {all_of_them()}", stacklevel=1)
        raise UserError(f"RAISED {all_of_them()}")

    redaction.learn_secret("JUDGE", VARIABLES["JUDGE"])  # as `read_key` does
    with pytest.raises(SystemExit) as end, pytest.warns(UserWarning):
        run_script(main, interrupted="")
    logging.getLogger("some.library").removeHandler(before)
    printed = capfd.readouterr()
    assert "PRINTED" in printed.out and "ON STDERR" in printed.err and "LOGGED" in log.getvalue()
    assert "RAISED" in end.value.code and "***" in end.value.code
    for text in (printed.out, printed.err, log.getvalue(), end.value.code):
        assert leaked(text) == []


def test_a_traceback_and_a_foreign_address_show_none(capfd):
    def main(argv):
        raise RuntimeError(f"redirected to http://a:canaryA/b@x.invalid and ftp://b:canaryB@y.invalid: {all_of_them()}")

    redaction.learn_secret("JUDGE", VARIABLES["JUDGE"])
    redaction.learn_from_config(YAML)
    with pytest.raises(SystemExit) as end:
        run_script(main, interrupted="")
    assert end.value.code.startswith("Traceback") and leaked(end.value.code) == []


@pytest.mark.parametrize(
    "text", ["see http://localhost:8000/v1/@me", "mail me@example.org", "at 12:30 https://example.org/a@b", "a: b@c"]
)
def test_ordinary_addresses_stay(text):
    assert redact_message(text) == text


def test_an_evaluation_writes_and_sends_none(tmp_path, monkeypatch, capfd, evaluate):
    """A model and a judge on this machine, which send back all that they could know, in answers and in errors."""
    monkeypatch.setenv("OPENAI_API_KEY", "canaryA-0123456789abc")  # one that can be sent
    monkeypatch.setitem(VARIABLES, "OPENAI_API_KEY", "canaryA-0123456789abc")
    echo = f"{all_of_them()} Bearer {VARIABLES['OPENAI_API_KEY']} Bearer {VARIABLES['JUDGE']}"
    rows = [{"instruction": f"do:{name}", "input": "", "output": "a"} for name in ("bad", "odd", "ok")]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    bad = Status(400, body=json.dumps({"error": {"message": echo}}))
    script = {"": [Say("85")], "bad": [bad], "odd": [Raw(echo.encode())], "ok": [Say(echo)]}
    out = tmp_path / "evaluation"

    def main(argv):
        with serve_stub({"": [Say(f"the answer is {echo}")]}) as model, serve_stub(script) as judge:
            try:
                evaluate(
                    "--model", f"{model.url}#m", "--data", tmp_path / "records.json", "--split", "all",
                    "--judge", f"{judge.url}#j", "--judge_key_env", "JUDGE", "--output_dir", out,
                )  # fmt: skip
            finally:
                keys.append((set(model.keys), set(judge.keys)))
                packets.append(json.dumps([model.bodies, judge.bodies]) + str([*model.headers, *judge.headers]))

    keys, packets = [], []
    redaction.learn_from_config(YAML)
    with pytest.raises(SystemExit) as end:
        run_script(main, interrupted="")
    assert keys == [({"Bearer canaryA-0123456789abc"}, {f"Bearer {VARIABLES['JUDGE']}"})]
    assert "answer is" in packets[0] and "***" in packets[0]
    sent = packets[0].replace("Bearer canaryA-0123456789abc", "").replace(f"Bearer {VARIABLES['JUDGE']}", "")
    assert leaked(sent) == []
    printed = capfd.readouterr()
    assert leaked(printed.out + printed.err + str(end.value.code)) == []
    files = {path.name: path.read_bytes().decode("utf-8", "replace") for path in out.iterdir()}
    assert {"judge.jsonl", "metrics.json", "predictions.jsonl", "report.html", "evaluation.json"} <= files.keys()
    assert {name: leaked(text) for name, text in files.items() if leaked(text)} == {}
