"""A sample of the inputs of `make chaos`, and every fault that it has found."""

import json
import os
import re
import sys
import time
from pathlib import Path

import fuzz_records
import fuzz_settings
import fuzz_templates
import processes
import pytest
from conftest import DEMO, ROOT
from fuzz_settings import BASE, LAUGHS, STRUCTURES, TYPES, text_of
from fuzzing import Case, outcome, run_cases

from recipe.config import UserError, parse_arguments
from recipe.console import LONGEST_LINE, as_message
from recipe.files import check_place
from recipe.redaction import learn_from_config, strip_key


def test_a_sample_is_read_or_refused_in_words(tmp_path):
    """The program itself, in a process that may fork."""
    flags = ["--records", "60", "--configs", "4", "--templates", "30", "--seed", "ci"]
    command = [sys.executable, "tests/chaos/fuzz_inputs.py", *flags, "--output", tmp_path / "a.json"]
    done = processes.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert [found[name]["inputs"] for name in ("records", "configs", "templates")] == [60, 4, 30]
    assert all(found[name]["outcomes"].get("refused") for name in ("records", "configs", "templates"))
    assert found["records"]["outcomes"]["read"] >= 5 and found["templates"]["outcomes"]["read"] >= 2


def test_what_goes_wrong_is_noticed(tmp_path):
    """Each kind of fault, by an input that has it."""

    def refuse(said):
        def attempt(folder):
            raise UserError(said)

        return attempt

    faults = {
        "traceback": Case("", b"", lambda folder: 1 / 0),
        "unclear": Case("", b"", refuse("no"), words=("a.json",)),
        "refused wrongly": Case("", b"", refuse("no"), expected="read"),
        "read wrongly": Case("", b"", lambda folder: None, expected="refused"),
        "misread": Case("", b"", misread),
    }
    assert {name: outcome(case, tmp_path)[0] for name, case in faults.items()} == {name: name for name in faults}
    ends = [
        Case("", b"", lambda folder: time.sleep(60)),
        Case("", b"", lambda folder: sys.exit(3)),
        Case("", b"", crash),
    ]
    found = [result.outcome for result in run_cases([*ends, Case("", b"", lambda _: None)], tmp_path, limit=2, each=4)]
    assert found == ["hang", "traceback", "crash", "read"]


def misread(folder):
    """Two rows of which the second is said to be another."""
    content = b'{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n'
    rows = fuzz_records.plainly(content.replace(b'"d"', b'"e"'), "jsonl")
    fuzz_records.attempt(fuzz_records.prepare(), {"a.jsonl": content}, rows, {"data": str(folder / "a.jsonl")}, folder)


def crash(folder):
    os._exit(3)


# --- configs ----------------------------------------------------------------------------------------------------------


def parse(folder: Path, content: str, *flags: str):
    (folder / "run.yaml").write_text(content, encoding="utf-8")
    return parse_arguments(TYPES, [str(folder / "run.yaml"), *flags], "")


def refuse(folder: Path, content: str, *flags: str) -> str:
    with pytest.raises(UserError) as error:
        parse(folder, content, *flags)
    return str(error.value).replace(str(folder / "run.yaml"), "run.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seed: !!float x\n", "run.yaml line 1: 'x' is no float; write the value alone"),
        ("a: 1\nseed: !!int ''\n", "run.yaml line 2: '' is no int; write the value alone"),
        ("bf16: !!bool maybe\n", "run.yaml line 1: 'maybe' is no bool; write the value alone"),
        (f"seed: {'9' * 5000}\n", f"run.yaml line 1: '{'9' * 60}' is no int; write the value alone"),
        (
            "data: &a [*a]\n",
            "run.yaml line 1: more than 10,000 values, or an anchor (&) that holds itself; write fewer",
        ),
        ("data: &a {train: *a}\n", "run.yaml line 1: more than 10,000 values, or an anchor"),
        (LAUGHS, "more than 10,000 values, or an anchor (&) that holds itself; write fewer"),
        ("data: !!binary aGk=\n", "run.yaml line 1: the tag !!binary is not for settings; write the value alone"),
        ("data: !!set {a}\n", "run.yaml line 1: the tag !!set is not for settings; write the value alone"),
        ("data: !!timestamp x\n", "run.yaml line 1: the tag !!timestamp is not for settings; write the value alone"),
        ("seed: " + "[" * 3000, "run.yaml: cannot be read as YAML: maximum recursion depth exceeded"),
        ("# " + "x" * 300_000, "run.yaml: over 200,000 characters; give a config file, and records with --data"),
        ("seed: !mine 1\n", "run.yaml line 1: the tag !mine is not for settings; write the value alone"),
        ("", "run.yaml: expected `key: value` lines, found nothing"),
        ("config: {}\nlegs: []\n", "run.yaml tells of a run; start its command again"),
        ("lr_scheduler_kwargs: '" + "[" * 5000 + "'\n", "--lr_scheduler_kwargs [["),
    ],
)
def test_configs_that_ended_in_a_traceback_or_not_at_all(tmp_path, content, said):
    message = refuse(tmp_path, content)
    assert said in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("flag", ['--data={"train": ' + "9" * 5000 + "}", "--data=" + "[" * 99_999, "--data=[1"])
def test_json_of_the_command_line(tmp_path, flag):
    assert refuse(tmp_path, "seed: 1\n", flag).startswith(f"{flag.replace('=', ' ')}: not valid JSON (")


@pytest.mark.parametrize(
    "text", ["010", "1_000", "0x10", "1:30", "no", "off", "Yes", "1.0e-3", ".nan", "2024-01-01", "="]
)
def test_a_text_setting_has_the_text_that_is_written(tmp_path, text):
    """YAML 1.1 reads them as 8, 1000, 16, 90, False, False, True, 0.001, NaN, a date and nothing at all."""
    model, data, training = parse(tmp_path, f"model_revision: {text}\noutput_dir: {text}\ndata: {text}\n")
    assert (model.model_revision, data.data, training.output_dir) == (text, text, text)


def test_numbers_and_truth_values_of_a_config(tmp_path):
    _, data, training = parse(
        tmp_path,
        "seed: 010\nsplit_seed: 0x10\nmax_steps: 1_000\nlearning_rate: 1e-3\nmask_prompt: off\nsave_strategy: no\n"
        "max_grad_norm: .inf\nlr_scheduler_kwargs: {a: 1e-1, b: 2024-01-01}\nweight_decay: +5\n",
    )
    assert (training.seed, data.split_seed, training.max_steps, training.learning_rate) == (10, 16, 1000, 0.001)
    assert (data.mask_prompt, training.save_strategy.value, training.max_grad_norm) == (False, "no", float("inf"))
    assert training.lr_scheduler_kwargs == {"a": 0.1, "b": "2024-01-01"} and training.weight_decay == 5
    assert "invalid int value: '1:30'" in refuse(tmp_path, "seed: 1:30\n")


def test_other_structures_that_must_be_refused(tmp_path, monkeypatch):
    """As far as parsing refuses them; the whole way, to the first step, is that of the program."""
    monkeypatch.chdir(tmp_path)
    said = {}
    for lines in (lines for lines, refused in STRUCTURES.items() if refused):
        rest = {name: value for name, value in BASE.items() if not re.search(f"^{name}:", lines, re.MULTILINE)}
        try:
            parse(tmp_path, lines + text_of(rest))
        except UserError as error:
            said[lines] = str(error)
    assert len(said) >= 25 and all(text.startswith((str(tmp_path), "--", "command line")) for text in said.values())


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "x/" * 3000])
def test_names_that_no_folder_has(name):
    with pytest.raises(UserError, match=r"^--output_dir '.*; name another folder$"):
        check_place(name)


def test_secrets_are_looked_for_in_time():
    """Blank lines, blanks in a value, and long values took a time that grew with their square."""
    begun = time.monotonic()
    for text in (
        "\n" * 190_000,
        "a_token: a" + " " * 190_000 + "b",
        "a_key: " + "a1!" * 60_000,
        "a: ://" + "b:@" * 60_000,
    ):
        learn_from_config(text)
        as_message("what is shown of an error")
    assert time.monotonic() - begun < 30
    assert strip_key(" \u200b'sk-1 2'\u00a0\n") == "sk-1 2" and strip_key("'\u200b ") == ""


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_message_is_short_and_has_nothing_that_a_terminal_obeys():
    shown = as_message("a.json row 3: \x1b[2J\u202e" + "x" * 100_000 + "; write it again\nsecond line")
    first, second = shown.split("\n")
    assert first.startswith("a.json row 3: ␛[2J⟨U+202E⟩xxx") and first.endswith("; write it again")
    assert len(first) <= LONGEST_LINE + 20 and second == "second line"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('bf16: "\\e[2J"\n', "error: run.yaml: argument --bf16: Truthy value expected: got ␛[2J but expected one of"),
        ("output_dir: '" + "x" * 300 + "'\n", f"error: --output_dir '{'x' * 300}': File name too long; name another"),
    ],
)
def test_what_a_user_sees_of_a_config(tmp_path, lines, said):
    (tmp_path / "run.yaml").write_text(f"tokenizer_name: {DEMO / 'base'}\nmodel_type: gpt2\n{lines}", encoding="utf-8")
    command = [sys.executable, ROOT / "scripts" / "train.py", "run.yaml", "--report_to", "none"]
    done = processes.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(said) and "Traceback" not in done.stderr


# --- templates and records --------------------------------------------------------------------------------------------


def test_a_template_that_writes_half_a_character(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    maker = fuzz_templates.Maker(fuzz_records.prepare(), "")
    case = maker._case("", fuzz_templates.REFUSED["half a character alone"].encode(), "refused")
    assert outcome(case, tmp_path) == (
        "refused", "template own.jinja: it writes half a character ('\\ud800'); remove it",
    )  # fmt: skip


def test_records_of_which_none_is_good_say_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = b'{"instruction": "a", "input": Infinity, "output": "b"}\n' * 3
    settings = {"data": "a.jsonl", "bad_records": "drop"}
    rows = [fuzz_records.Row(fuzz_records.BAD)] * 3
    with pytest.raises(UserError) as error:
        fuzz_records.attempt(fuzz_records.prepare(), {"a.jsonl": content}, rows, settings, tmp_path)
    assert str(error.value) == (
        "the train split has no good record; the first of 3 bad ones: a.jsonl row 0: 'input' is Infinity (float), not "
        "text; write it as text or remove the row"
    )


@pytest.mark.parametrize("maker", [fuzz_records.Maker, fuzz_templates.Maker, fuzz_settings.Maker])
def test_a_seed_makes_the_same_inputs_again(maker):
    first, again, other = ([case.content for case in maker(None, seed).cases(30)] for seed in ("a", "a", "b"))
    assert first == again != other
