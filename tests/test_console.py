"""The terminal: whatever a text holds, it is shown and commands nothing; figures are never cut."""

import doctest
import json
import os
import re
import signal
import subprocess
import sys
import time

import processes
import pytest
from conftest import DEMO, ROOT
from evaluation_samples import FAMILIES, make_metrics, make_predictions
from rich.console import Console

import recipe.console
from recipe.config import UserError
from recipe.console import one_line, print_table, print_token_statistics, run_script
from recipe.disk import explain_disk
from recipe.evaluation.tables import print_examples, print_scores
from recipe.evaluation.verdict import scale
from recipe.provenance import versions

HOSTILE = [
    "[/b]",
    "[red]x",
    "[link=x]y[/link]",
    ":smile:",
    "a\x1b[2Jb",
    "c\rd\x08",
    "e\nf\tg",
    "\u202eh",
]
SHOWN = [*HOSTILE[:4], "a␛[2Jb", "c␍d␈", "e\\nf\\tg", "⟨U+202E⟩h"]


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(recipe.console).failed == 0


@pytest.mark.parametrize(("text", "shown"), list(zip(HOSTILE, SHOWN, strict=True)))
def test_names_are_shown_as_they_are_everywhere(capsys, text, shown):
    predictions = make_predictions(30, models=("baseline", "tuned", text))
    for prediction in predictions:
        prediction |= {"family": text, "split": text, "instruction": text, "input": text, "output": text}
        prediction["tuned"]["text"] = text
    print_scores(make_metrics(predictions))
    scores = capsys.readouterr().out
    print_examples(predictions)
    examples = capsys.readouterr().out
    print_table(text, [text, "n"], [[text, "1"]])
    table = capsys.readouterr().out
    counts = dict.fromkeys(("rows", "tokens", "longest", "preamble", "supervised", "truncated", "dropped"), 1)
    print_token_statistics([{"split": text, **counts}], leaked=0, bad={})
    statistics = capsys.readouterr().out
    assert f"“{shown}”" in scores and f"│ {shown} " in scores and f"│ {shown} (30) " in scores
    assert examples.count(shown) == 12  # of three examples instruction, input, reference and tuned response
    assert table.startswith(shown) and table.count(shown) == 3
    assert f"│ {shown} " in statistics
    for said in (scores, examples, table, statistics):
        assert not set(said) & set("\x1b\r\b\t\u202e")


def test_a_line_is_short_and_in_one_line():
    assert one_line("a\nb\x1b") == "a\\nb␛"
    assert one_line("x" * 1000, 10) == "xxxxxxx..."
    assert one_line("x" * 10, 10) == "x" * 10
    assert len(one_line("\n" * 10, 10)) == 10


def cells_of(said: str) -> list[str]:
    said = re.sub("\x1b\\[[0-9;]*m", "", said)  # bold
    return [cell.strip() for line in said.splitlines() if line.startswith("│") for cell in line.strip("│").split("│")]


@pytest.fixture(scope="module")
def metrics():
    """Of 14 models."""
    checkpoints = [f"checkpoint-{100 * step}" for step in range(1, 13)]
    return make_metrics(make_predictions(60, models=("baseline", "tuned", *checkpoints)))


def test_further_models_have_tables_of_their_own(capsys, metrics):
    print_scores(metrics)
    said = capsys.readouterr().out
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 120
    assert [line.strip() for line in said.splitlines()].count("Further models") == 6
    cells = cells_of(said)
    for label, by_split in metrics["other_models"].items():
        assert said.count(f"“{label}”") == 1
        assert f"{by_split['test']['metrics']['reference_loss']['tuned']:.3f}" in cells


@pytest.mark.parametrize("width", [30, 60, 80])
def test_a_narrow_terminal_cuts_names_and_no_figure(capsys, monkeypatch, metrics, width):
    for name, value in {"COLUMNS": str(width), "FORCE_COLOR": "1", "TERM": "xterm"}.items():  # a terminal, to rich
        monkeypatch.setenv(name, value)
    assert Console().is_terminal and Console().width == width
    print_scores(metrics)
    cells = cells_of(capsys.readouterr().out)
    for name, score in metrics["splits"]["test"]["metrics"].items():
        interval = " to ".join(map(scale(name).change, score["ci95"]))
        assert {name, interval, scale(name).value(score["tuned"])} <= set(cells)
    cut = {cell.removesuffix("…").strip() for cell in cells if "…" in cell}
    assert cut
    assert all(any(name.startswith(start) for name in [*metrics["splits"], *FAMILIES]) for start in cut)


def test_a_score_over_a_part_of_the_records_has_their_number(capsys):
    predictions = make_predictions(100, models=("baseline", "tuned", "other"))
    for prediction in predictions[30:]:
        prediction["tuned"]["reference_loss"] = None
    predictions[0]["other"]["reference_loss"] = None
    metrics = make_metrics(predictions)
    print_scores(metrics)
    cells = cells_of(capsys.readouterr().out)
    assert cells.count("perplexity (24)") == cells.count("reference_loss (24)") == 1
    assert cells.count("perplexity (6)") == 1
    assert "chrf" in cells
    other = metrics["other_models"]["other"]["test"]["metrics"]["reference_loss"]["tuned"]
    assert f"{other:.3f} n 79" in cells


# --- how scripts end ------------------------------------------------------------------------------------------------

SAYS = """
import sys
from tqdm.auto import tqdm
from recipe.config import UserError
from recipe.console import print_table, run_script
def main(argv):
    print("é 漢 🙂 \\ud83d")
    print_table("漢", ["é", "n"], [["ü", "1"]])
    tqdm.write("漢")
    for _ in tqdm(range(2), desc="漢"): pass
    raise UserError("no 漢: " + argv[0])
run_script(main, interrupted="")
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "utf-8"},
    ],
    ids=lambda environment: " ".join(environment.values()),
)
def test_no_encoding_of_a_console_ends_a_script(tmp_path, environment):
    (tmp_path / "says.py").write_text(SAYS, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith("LC_")} | environment
    command = [sys.executable, tmp_path / "says.py", "x"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)})
    encoding = environment.get("PYTHONIOENCODING", "ascii")
    said, complained = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == 1 and "Traceback" not in complained
    shown = "漢".encode(encoding, "backslashreplace").decode(encoding)
    assert complained.splitlines()[-1] == f"error: no {shown}: x"
    assert said.splitlines()[0].endswith("\\ud83d")  # half of a pair, which no encoding has
    assert said.splitlines()[-1] == shown
    assert ("+--" in said and "─" not in said) == (encoding != "utf-8")  # a table in plain characters


def test_a_real_script_on_an_ascii_console(tmp_path):
    rows = [{"instruction": f"翻译 {n}", "input": "", "output": f"“é” {n} 漢"} for n in range(30)]
    (tmp_path / "records.json").write_text(json.dumps(rows), encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable, "scripts/inspect_data.py", "--data", tmp_path / "records.json", "--tokenizer_name",
            DEMO / "base", "--output_dir", tmp_path / "out",
        ],
        capture_output=True, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert b"\\u7ffb\\u8bd1" in done.stdout and "翻译" in (tmp_path / "out" / "inspection.json").read_text("utf-8")


@pytest.mark.parametrize("script", sorted([*(ROOT / "scripts").glob("*.py"), ROOT / "benchmarks" / "benchmark.py"]))
def test_every_script_ends_the_same_way(script):
    *_, last = script.read_text(encoding="utf-8").split('if __name__ == "__main__":')
    assert "run_script(main, interrupted=" in last


def end_of(monkeypatch, error: BaseException) -> object:
    """What `run_script` exits with: a code, or a text that Python prints before it exits with 1."""

    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        run_script(main, interrupted="again", after_os_error="; again", expected=(FloatingPointError,))
    return end.value.code


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("wrong"), "error: wrong"),
        (OSError(30, "Read-only", "a"), f"error: {explain_disk(OSError(30, '', 'a'), then='')}; again"),
        (OSError(13, "Permission denied", "a.json"), "error: [Errno 13] Permission denied: 'a.json'; again"),
        (
            BrokenPipeError(32, "a server's, not the terminal's"),
            "error: [Errno 32] a server's, not the terminal's; again",
        ),
        (FloatingPointError("the loss is nan"), "error: the loss is nan"),
        (KeyboardInterrupt(), "interrupted: again"),
        (SystemExit(3), 3),
    ],
)
def test_what_a_script_says_at_its_end(monkeypatch, capfd, error, said):
    assert end_of(monkeypatch, error) == said


def test_an_error_of_ours_shows_its_traceback_and_how_to_report_it_without_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_TOKEN", "s3cret-and-long")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "report.json"))
    said = str(end_of(monkeypatch, KeyError("s3cret-and-long")))
    *trace, bug, report = said.splitlines()
    assert said.startswith("Traceback") and trace[-2:] == ["KeyError: '***'", ""]
    assert bug.startswith(
        f"This is a bug in the recipe {recipe.__version__}, not in what you gave it. It ran with python "
    )
    assert all(f"{name} {version}" in bug for name, version in versions().items())
    assert "(CONTRIBUTING.md)" in report and "(SECURITY.md)" in report
    shown = json.loads((tmp_path / "report.json").read_text())["message"]["message"]
    assert shown == "This is a bug in the recipe: KeyError: '***'"
    assert end_of(monkeypatch, UserError("a s3cret-and-long b")) == "error: a *** b"


def test_a_reader_that_has_left_is_no_error():
    code = """
from recipe.console import run_script
def main(argv):
    while True:
        print("x" * 1000)
run_script(main, interrupted="")
"""
    process = processes.start([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_after_the_end_does_not_change_the_exit_code(number):
    """Python has given up its own handlers when it frees what a module holds."""
    code = f"""
import os
from recipe.console import run_script
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, {int(number)})
last = Last()
run_script(lambda argv: None, interrupted="")
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_one_process_speaks_for_all(monkeypatch):
    """The others wait for the launcher to end them, and tell what they alone have met."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def fail(argv):
        raise UserError("wrong")

    for rank, said in (("0", "error: wrong"), ("3", "process 3: error: wrong")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            run_script(fail, interrupted="")
        assert end.value.code == said
    assert slept == [recipe.console.SECONDS_OF_PATIENCE]
