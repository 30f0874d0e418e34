"""Scalars and samples as the trackers have them, each read back from what it wrote, without a network."""

import json
import os
import runpy
import shutil
import sqlite3
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import DEMO, ROOT

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import DataArguments, InstructionTrainingArguments, UserError
from recipe.data import load_splits
from recipe.templates import load_template
from recipe.trainer import InstructionTrainer
from recipe.training.samples import COLUMNS, SampleGenerations

OPTIONAL = "an optional client: make test-all installs it"
RECORDS = [  # what a page could take for its own markup
    {"instruction": "Name **two** <b>colours</b> | one_of_them_red.", "input": "", "output": "`Red` & [blue](http://x.y)"},
    {"instruction": "# 1. Repeat\nboth lines", "input": "a\\|b &lt; c~d", "output": "<script>alert(1)</script>\n\nx"},
]  # fmt: skip
ONCE = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
# every connection to another machine that Python tries goes into a file
WATCH = """
import os, sys
def watch(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[-1], tuple) else args[0]
        if host not in ("127.0.0.1", "::1", "localhost"):
            print(event, host, file=log, flush=True)
log = open(os.environ["NETWORK_LOG"], "a")
print("watching", file=log, flush=True)
sys.addaudithook(watch)
"""


class Cells(HTMLParser):
    """The text of each cell of an HTML table's body, by rows; `<br>` is a newline."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows, self.tags = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br":
            self.rows[-1][-1] += "\n"

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


def read_events(output_dir: Path):
    """The only run that TensorBoard finds in a folder, or the last of several."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(max((output_dir / "runs").iterdir(), key=os.path.getmtime)), {"tensors": 0})
    return events.Reload()


def read_samples(output_dir: Path) -> dict[int, list[list[str]]]:
    """The rows of `samples.jsonl` by step."""
    samples: dict[int, list[list[str]]] = {}
    for line in (output_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        samples.setdefault(sample.pop("step"), []).append(list(sample.values()))
    return samples


def read_log(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def name_in_trackers(key: str) -> str:
    return "eval/" + key.removeprefix("eval_") if key.startswith("eval_") else "train/" + key


def train(folder: Path, *flags: str, processes: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", processes, "--main_process_port", "0",
        "scripts/train.py", str(folder / "config.yaml"), "--output_dir", str(folder / "run"), *flags,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "TRACKIO_DIR": str(folder / "trackio"),
        "PYTHONPATH": os.pathsep.join([str(folder / "watch"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "NETWORK_LOG": str(folder / "network.log"),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Four steps in two processes, reported to TensorBoard and to trackio."""
    for name in ("tensorboard", "trackio"):
        pytest.importorskip(name, reason=OPTIONAL)
    folder = tmp_path_factory.mktemp("trackers")
    (folder / "watch").mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    lines = (DEMO / "records" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:32]), encoding="utf-8")
    (folder / "validation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config |= {
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")},
        "report_to": ["tensorboard", "trackio"],
        "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "steps", "save_steps": 2, "num_sample_generations": 2, "disable_tqdm": True,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    train(folder, processes="configs/accelerate/two_processes.yaml")
    return folder


def test_tensorboard_has_every_number_of_the_log(trained):
    [run] = (trained / "run" / "runs").iterdir()
    assert len(list(run.iterdir())) == 1  # one of two processes writes
    events, expected = read_events(trained / "run"), {}
    for entry in read_log(trained / "run"):
        for key, value in entry.items():
            if key != "step":
                expected.setdefault(name_in_trackers(key), []).append((entry["step"], np.float32(value)))
    found = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == expected
    assert [step for step, _ in found["train/tokens_per_second"]] == [1, 2, 3, 4]
    assert found.keys() >= {
        "train/loss", "train/padding", "train/shared", "train/supervised", "train/num_input_tokens_seen", "eval/loss",
        "eval/perplexity", "eval/next_token_accuracy",
    }  # fmt: skip


def test_tensorboard_shows_the_samples_as_they_are(trained):
    """As its own page renders them: no character of a record becomes markup."""
    from tensorboard.plugin_util import markdown_to_safe_html

    samples = read_samples(trained / "run")
    assert samples.keys() == {2, 4}
    for rows in samples.values():
        assert [row[:3] for row in rows] == [[r["instruction"], r["input"], r["output"]] for r in RECORDS]
    events = read_events(trained / "run").Tensors("eval/samples/text_summary")
    assert [event.step for event in events] == [2, 4]
    for event in events:
        cells = Cells(markdown_to_safe_html(event.tensor_proto.string_val[0]))
        assert set(cells.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "br"}
        assert cells.rows == [list(COLUMNS), *([text.strip() for text in row] for row in samples[event.step])]


def test_trackio_has_both_and_nothing_leaves_the_machine(trained):
    [database] = (trained / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    tables = {entry["train/global_step"]: entry["eval/samples"] for entry in logged if "eval/samples" in entry}
    assert tables == {
        step: {"_type": "trackio.table", "_value": [dict(zip(COLUMNS, row, strict=True)) for row in rows]}
        for step, rows in read_samples(trained / "run").items()
    }
    numbers = [entry for entry in logged if "eval/samples" not in entry]
    assert numbers == [
        {name_in_trackers(key): value for key, value in entry.items() if key not in {"step", *ONCE}}
        | {"train/global_step": entry["step"]}
        for entry in read_log(trained / "run")
    ]
    assert set((trained / "network.log").read_text().splitlines()) == {"watching"}


def test_a_resumed_run_goes_on_with_its_samples(trained, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(trained, folder)
    with open(folder / "run" / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "instr')  # cut short, as by a full disk
    checkpoint = str(folder / "run" / "checkpoint-2")
    flags = ("--resume_from_checkpoint", checkpoint, "--allow_changed", "records_per_step")
    train(folder, *flags, processes="accelerate_config.yaml")
    assert [(step, len(rows)) for step, rows in read_samples(folder / "run").items()] == [(2, 2), (4, 2)]
    assert len(list((folder / "run" / "runs").iterdir())) == 2
    events = read_events(folder / "run")
    assert [point.step for point in events.Scalars("train/loss")] == [3, 4]
    assert [event.step for event in events.Tensors("eval/samples/text_summary")] == [4]


@pytest.fixture
def demo_rows(demo_tokenizer):
    data = DataArguments(data={"train": str(DEMO / "records" / "validation.jsonl")}, test_ratio=0)
    return load_splits(data, demo_tokenizer)["train"].select(range(8))


def test_wandb_has_the_last_numbers_and_every_table(demo_model, demo_tokenizer, demo_rows, tmp_path, monkeypatch):
    """In its offline mode: the summary of the run, and the tables as it keeps them for a later upload."""
    wandb = pytest.importorskip("wandb", reason=OPTIONAL)

    for name, value in {
        "MODE": "offline",
        "DIR": str(tmp_path),
        "SILENT": "true",
        "CONSOLE": "off",
        "PROJECT": "recipe",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    args = InstructionTrainingArguments(
        str(tmp_path / "run"), use_cpu=True, max_steps=2, per_device_train_batch_size=4, logging_steps=1,
        eval_strategy="steps", eval_steps=1, save_strategy="no", disable_tqdm=True, report_to=["wandb"],
    )  # fmt: skip
    trainer = InstructionTrainer(
        demo_model, args, data_collator=DataCollatorForInstructionTuning(demo_tokenizer.eos_token_id),
        train_dataset=demo_rows, eval_dataset=demo_rows, processing_class=demo_tokenizer,
    )  # fmt: skip
    trackers = trainer.callback_handler.callbacks
    trainer.add_callback(SampleGenerations(RECORDS, load_template("alpaca"), max_new_tokens=4, trackers=trackers))
    try:
        trainer.train()
        summary, run_folder = dict(wandb.run.summary), Path(wandb.run.dir)
    finally:
        wandb.teardown()
    last: dict[str, float] = {}
    for entry in trainer.state.log_history:
        last |= {key if key in ONCE else name_in_trackers(key): value for key, value in entry.items() if key != "step"}
    assert {name: summary[name] for name in last} == last and summary["train/global_step"] == 2
    tables = {path: json.loads(path.read_text()) for path in (run_folder / "media/table/eval").iterdir()}
    in_order = [tables[path] for path in sorted(tables, key=lambda path: int(path.name.split("_")[1]))]
    samples = read_samples(tmp_path / "run")
    assert [table["data"] for table in in_order] == [samples[1], samples[2]]
    assert all(table["columns"] == list(COLUMNS) for table in in_order)
    assert json.loads((run_folder / summary["eval/samples"]["path"]).read_text()) == in_order[-1]


def test_without_a_tracker_samples_stay_in_the_folder(demo_model, demo_tokenizer, demo_rows, tmp_path, capsys):
    args = InstructionTrainingArguments(
        str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no"
    )
    trainer = InstructionTrainer(
        demo_model, args, data_collator=DataCollatorForInstructionTuning(demo_tokenizer.eos_token_id),
        eval_dataset=demo_rows, processing_class=demo_tokenizer,
    )  # fmt: skip
    callback = SampleGenerations(
        RECORDS, load_template("alpaca"), max_new_tokens=4, trackers=trainer.callback_handler.callbacks
    )
    assert callback.trackers == []
    trainer.add_callback(callback)
    trainer.evaluate()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["samples.jsonl"]
    assert r"reference  <script>alert(1)</script>\n\nx" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("codecarbon", "--report_to codecarbon: its library is not installed"),
        ("nonsense", "nonsense is not supported"),
    ],
)
def test_a_tracker_that_is_not_there_is_named_before_anything_is_written(tracker, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, tracker, None)  # not there, even where it is installed
    monkeypatch.chdir(ROOT)
    main = runpy.run_path("scripts/train.py")["main"]
    with pytest.raises(UserError, match=message):
        main(["configs/demo.yaml", "--output_dir", str(tmp_path / "run"), "--report_to", tracker])
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_key_is_told_before_anything_is_written(tmp_path):
    pytest.importorskip("wandb", reason=OPTIONAL)
    """In a process of its own, because W&B remembers how it was first asked."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [
            sys.executable, "scripts/train.py", "configs/demo.yaml", "--output_dir", tmp_path / "run",
            "--report_to", "wandb",
        ],
        env=kept | {"HOME": str(tmp_path)},  # where a key may lie
        capture_output=True, text=True, cwd=ROOT, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stderr.splitlines()[-1].startswith("error: --report_to wandb: ")
    assert "run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline" in done.stderr
    assert "Traceback" not in done.stderr
