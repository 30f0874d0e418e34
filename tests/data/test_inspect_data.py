"""scripts/inspect_data.py: what it prints and writes, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from conftest import DEMO, ROOT
from PIL import Image

from recipe.config import UserError


def run(*arguments: str, cache: Path, expect: int = 0) -> subprocess.CompletedProcess:
    done = processes.run(
        [sys.executable, "scripts/inspect_data.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == expect, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def test_the_command_looks_at_the_demo_data(tmp_path):
    before = {path: path.read_bytes() for path in (DEMO / "records").iterdir()}
    out = tmp_path / "out"
    done = run("configs/demo.yaml", "--output_dir", str(out), "--limits", "48", "64", "--show", "2", cache=tmp_path)
    assert {path: path.read_bytes() for path in (DEMO / "records").iterdir()} == before

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads((out / "inspection.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert {name: split["records"] for name, split in report["splits"].items()} == {
        "train": 3200, "validation": 200, "test": 400, "test_unseen": 200,
    }  # fmt: skip
    assert report["settings"]["max_length"] == 256 and report["settings"]["batch_size"] == 32
    assert [cost["limit"] for cost in report["splits"]["test"]["overflow"]] == [48, 64, 256]
    assert report["left_out_of_train_as_duplicates"] == 0 and report["repetition"]["complete"]

    def shingles(row: str) -> set[str]:
        texts = [json.loads(row)[field] for field in ("instruction", "input", "output")]
        plain = " ".join("\n".join(texts).lower().split())
        return {plain[i : i + 5] for i in range(len(plain) - 4)}

    pairs = [json.loads(line) for line in (out / "near_duplicates.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(pairs) >= sum(found["near"] for found in report["repetition"]["splits"]) > 30
    rows = {name: (DEMO / "records" / f"{name}.jsonl").read_text().splitlines() for name in report["splits"]}
    for pair in pairs:
        first, second = (shingles(rows[name][row]) for name, row in zip(pair["splits"], pair["rows"], strict=True))
        assert pair["similarity"] == len(first & second) / len(first | second) >= 0.8

    with Image.open(out / "lengths.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert sorted(path.name for path in out.iterdir()) == ["inspection.json", "lengths.png", "near_duplicates.jsonl"]
    assert done.stdout.index("Records that appear more than once") < done.stdout.index("Lengths in tokens")
    assert "Near (from 0.8): test in train" in done.stdout and "max_length" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Test records that train has word for word, nearly, and with another response."""
    france = "What is the capital of France, please?"
    train = [
        (france, "", "The capital of France is Paris."),
        ("Say it in German.", "the house", "das Haus"),
        ("Count the letters of this word.", "tree", "There are four letters."),
        ("Name a colour.", "", "Red."),
    ]
    test = [train[2], (france.lower(), "", "The capital of France is Paris!"), (*train[1][:2], "Das ist ein Haus.")]
    folder = tmp_path_factory.mktemp("files")
    for name, rows in {"train": train, "test": test}.items():
        lines = [json.dumps(dict(zip(("instruction", "input", "output"), row, strict=True))) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}


@pytest.fixture(scope="module")
def script():
    import importlib.util

    spec = importlib.util.spec_from_file_location("inspect_data_script", ROOT / "scripts" / "inspect_data.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def arguments(files: dict[str, str], *more: str) -> list[str]:
    return ["--model_name_or_path", str(DEMO / "base"), "--data", json.dumps(files), "--validation_ratio", "0", *more]


def test_leaks_come_first_in_the_terminal(script, files, tmp_path, capsys):
    script.main(arguments(files, "--output_dir", str(tmp_path / "out")))
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if line.startswith("│ test"))
    assert [cell.strip() for cell in first.strip("│").split("│")] == ["test", "train", "3", "1", "1", "1"]
    assert "1 records are left out of training" in "\n".join(lines)
    start = lines.index("Exact: test in train")
    assert lines[start + 1].split("→")[0].split()[:5] == ["test", "row", "0", "Count", "the"]
    assert lines[start + 2].startswith("  train row 2 ")
    report = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert report["left_out_of_train_as_duplicates"] == 1 and report["splits"]["train"]["records"] == 3


def test_two_runs_write_the_same(script, files, tmp_path, capsys):
    written = []
    for _ in range(2):
        script.main(arguments(files, "--output_dir", str(tmp_path / "out"), "--near_duplicates", "0.5"))
        written.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
        shutil.rmtree(tmp_path / "out")
    assert written[0] == written[1]


def test_a_training_file_is_accepted_and_its_output_folder_is_left_alone(script, files, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    text = (ROOT / "configs" / "gpt2_alpaca.yaml").read_text(encoding="utf-8")
    config.write_text(text.replace("outputs/gpt2-alpaca", str(run_dir)), encoding="utf-8")
    flags = arguments(files, "--max_length", "60", "--overflow", "error", "--near_duplicates", "0")
    script.main([str(config), *flags])
    assert not any(run_dir.iterdir())
    settings = json.loads((tmp_path / "run-data" / "inspection.json").read_text())["settings"]
    assert (settings["max_length"], settings["overflow"], settings["batch_size"]) == (60, "error", 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name a folder for the results with --output_dir"),
        (["--output_dir", "OUT", "--near_duplicates", "0.3"], "--near_duplicates 0.3: give a similarity from 0.5 to 1"),
        (["--output_dir", "OUT", "--near_duplicates", "nan"], "--near_duplicates nan: give a similarity"),
        (
            ["--output_dir", "OUT", "--per_device_train_batch_size", "0"],
            "--per_device_train_batch_size 0: give a number from 1 up",
        ),
        (["--output_dir", "OUT", "--show", "-1"], "--show -1: give a number from 0 up"),
        (["--output_dir", "OUT", "--max_length", "9999"], "the model has only 256 positions; give at most 256"),
        (["--output_dir", "OUT", "--limts", "64"], "unknown flag --limts; did you mean 'limits'?"),
        (["--output_dir", "FILE"], "is a file; name a folder"),
    ],
)
def test_mistakes_are_reported(script, files, tmp_path, flags, message):
    (tmp_path / "file").write_text("")
    places = {"OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "file")}
    with pytest.raises(UserError) as caught:
        script.main(arguments(files, *(places.get(flag, flag) for flag in flags)))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_records_are_reported_as_training_reports_them(tmp_path):
    (tmp_path / "bad.json").write_text('[{"instruction": "Why?", "output": ""}, {"instruction": "", "output": "x"}]')
    flags = ["--tokenizer_name", str(DEMO / "base"), "--data", str(tmp_path / "bad.json"), "--output_dir", "unused"]
    done = run(*flags, cache=tmp_path, expect=1)
    assert (
        "bad.json row 0: 'output' is empty" in done.stderr and "bad.json row 1: 'instruction' is empty" in done.stderr
    )
    assert "Traceback" not in done.stderr and not (ROOT / "unused").exists()
