"""The main job as a user runs it: real processes, real records, the folder that comes out."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import DEMO, ROOT, SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from recipe.config import UserError
from recipe.evaluation.measures import METRICS
from recipe.generation import generate_responses
from recipe.templates import load_template
from recipe.training.output_dir import explain_full_disk


def run(*command: str, cache: Path, expect: int = 0) -> subprocess.CompletedProcess:
    done = processes.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == expect, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def launch(script: str, *arguments: str, cache: Path) -> subprocess.CompletedProcess:
    """As the README has it: by the real launcher."""
    launcher = ("-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml")
    return run(*launcher, script, *arguments, cache=cache)


def texts_of(folder: Path) -> list[tuple]:
    """Each record's id with what each model answered and why it stopped; not how long that took."""
    rows = map(json.loads, (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        (row["id"], [(k, v["text"], v["tokens"], v["stop_reason"]) for k, v in row.items() if isinstance(v, dict)])
        for row in rows
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache) -> Path:
    """A GPT-2 of small size with random weights, a few steps on real records (the demo's, where those are absent)."""
    output_dir = tmp_path_factory.mktemp("runs") / "real"
    real = SHARED.is_dir()
    tokenizer = SHARED / "gpt2-tokenizer" if real else DEMO / "base"
    data = SHARED / "data" / "instruction-data.json" if real else DEMO / "records" / "train.jsonl"
    done = launch(
        "scripts/train.py", "configs/gpt2.yaml", "--model_type", "gpt2", "--tokenizer_name", str(tokenizer),
        "--config_overrides", "n_layer=2,n_head=2,n_embd=64,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0",
        "--data", str(data), "--output_dir", str(output_dir), "--max_steps", "6", "--learning_rate", "3e-3",
        "--gradient_accumulation_steps", "1", "--logging_steps", "2", "--eval_strategy", "steps", "--eval_steps", "3",
        "--save_strategy", "steps", "--save_steps", "3", "--num_sample_generations", "2", cache=cache,
    )  # fmt: skip
    assert "random weights (gpt2)" in done.stdout
    assert "% supervised" in done.stdout
    return output_dir


def test_the_folder_holds_what_the_design_lists(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "trainer_state.json", "run.json", "loss.png", "README.md", "samples.jsonl",
    }  # fmt: skip
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)  # no pickles
    assert (trained / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((trained / "config.json").read_text())["use_cache"] is True


def test_the_books_config_takes_its_file_of_records(cache, tmp_path):
    """As the book's repository has it: one array of 1,100 records, most inputs empty; 110 of them are for testing."""
    data = SHARED / "data" / "instruction-data.json"
    if not data.is_file():
        data = tmp_path / "records.json"
        rows = [{"instruction": f"Name {i}.", "input": "" if i % 3 else f"{i}", "output": f"{i}."} for i in range(1100)]
        data.write_text(json.dumps(rows), encoding="utf-8")
    run(
        "scripts/train.py", "configs/gpt2_medium_book.yaml", "--data", str(data), "--model_type", "gpt2",
        "--tokenizer_name", str(DEMO / "base"), "--config_overrides", "n_layer=1,n_head=2,n_embd=32,n_positions=1024",
        "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no",
        "--num_sample_generations", "0", cache=cache,
    )  # fmt: skip
    run_record = json.loads((tmp_path / "run" / "run.json").read_text())
    rows = {name: split["rows"] for name, split in run_record["splits"].items()}
    assert rows == {"train": 935, "validation": 55, "test": 110} and set(run_record["rows"].values()) == {0}


def test_run_record_tells_how_to_repeat_it(trained):
    run_record = json.loads((trained / "run.json").read_text())
    assert run_record["weights_from"] == "random weights (gpt2)"
    assert run_record["versions"].keys() >= {"torch", "transformers", "datasets", "accelerate"}
    assert run_record["seed"] == run_record["config"]["training"]["seed"] == 123
    counts = ("dropped", "truncated", "left_out_of_train_as_duplicates", "bad", "special_token_text", "own_end_of_text")
    assert run_record["rows"] == dict.fromkeys(counts, 0)
    assert run_record["result"]["steps"] == 6
    assert run_record["result"]["eval"]["eval_loss"] > 0
    assert len(run_record["data_hash"]) == 16


def test_the_log_has_loss_speed_padding_and_evaluations(trained):
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    train = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in train] == [2, 4, 6]
    assert train[-1]["loss"] < train[0]["loss"]
    for entry in train:
        assert entry["tokens_per_second"] > 0 and 0 <= entry["padding"] < 1 and entry["learning_rate"] >= 0
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6]
    for entry in evaluations:
        assert entry["eval_perplexity"] == pytest.approx(math.exp(entry["eval_loss"]))
        assert 0 <= entry["eval_next_token_accuracy"] <= 1
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [3, 3, 6, 6]


def test_saved_folder_loads_in_a_pipeline_and_answers_as_we_do(trained):
    generator = pipeline("text-generation", model=str(trained), device="cpu")
    message = {"role": "user", "content": "Rewrite it in the past tense.", "input": "She walks to school."}
    [answer] = generator([message], max_new_tokens=10)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    prompt = load_template("alpaca").prompt({"instruction": message["content"], "input": message["input"]})
    [response] = generate_responses(model, tokenizer, [prompt], max_new_tokens=10)
    assert answer["generated_text"][-1]["content"] == response.text


def test_evaluation_with_one_and_two_processes_gives_the_same_answers(trained, cache, tmp_path):
    written = {}
    for name, count in (("one", 1), ("two", 2)):
        done = processes.run_ranks(
            "scripts/eval.py", count, "--model", str(trained), "--baseline", str(trained / "checkpoint-3"),
            "--output_dir", str(tmp_path / name), "--max_new_tokens", "4", "--batch_size", "7", cwd=ROOT,
            env=os.environ | {"HF_DATASETS_CACHE": str(cache)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("exact_match") == 1  # two processes, one table
        written[name] = texts_of(tmp_path / name)
    assert written["one"] == written["two"]
    predictions = written["one"]
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert metrics["n"] == len(predictions) == len({id_ for id_, *_ in predictions})
    run_record = json.loads((trained / "run.json").read_text())
    assert metrics["n"] == run_record["splits"]["test"]["rows"]  # the very split that training held out
    assert metrics["metrics"].keys() == METRICS.keys()
    for value in metrics["metrics"].values():
        assert value["delta"] == pytest.approx(value["tuned"] - value["baseline"])
        assert value["ci95"][0] <= value["delta"] <= value["ci95"][1]
    assert metrics["judge"] is None and metrics["behaviour"]["stop_rate"]["tuned"] is not None


def test_another_run_in_the_folder_is_not_touched_unless_asked(trained, cache):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    arguments = ("scripts/train.py", "configs/demo.yaml", "--output_dir", str(trained))
    done = run(*arguments, cache=cache, expect=1)
    assert done.stderr.startswith(f"error: --output_dir {trained} already holds another run")
    assert "Traceback" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_resuming_goes_on_and_overwriting_starts_over(trained, cache, tmp_path):
    options = (
        "scripts/train.py", "configs/demo.yaml", "--output_dir", str(tmp_path / "run"), "--save_strategy", "steps",
        "--save_steps", "1", "--eval_strategy", "no", "--warmup_steps", "0", "--per_device_train_batch_size", "2",
        "--lr_scheduler_type", "constant",
    )  # fmt: skip
    run(*options, "--max_steps", "2", cache=cache)
    resume = ("--resume_from_checkpoint", "true", "--allow_changed", "max_steps")
    before = (tmp_path / "run" / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns
    done = run(*options, "--max_steps", "3", *resume, cache=cache)
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 3
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns == before
    torn = tmp_path / "run" / "checkpoint-9"  # what kill -9 leaves in the middle of a save
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    run(*options, "--max_steps", "4", *resume, cache=cache)
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 4
    other = ("--output_dir", str(trained), "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2"))
    done = run(*options, "--max_steps", "3", *other, cache=cache, expect=1)
    assert f"error: --output_dir {trained} already holds another run" in done.stderr
    run(*options, "--max_steps", "2", "--save_strategy", "no", "--overwrite_output_dir", cache=cache)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["steps"] == 2


def test_a_full_disk_is_named_with_what_is_left_of_the_run(tmp_path):
    def model_of(size: int) -> SimpleNamespace:
        weight = SimpleNamespace(nbytes=size, data_ptr=lambda: 1, requires_grad=True)
        return SimpleNamespace(parameters=lambda: [weight])

    model, small = model_of(10**18), model_of(0)  # the first is more than any disk has left

    def save_model() -> None:
        raise RuntimeError("unexpected pos 64 vs 0")  # what torch says of it

    def cut_short() -> str:
        with pytest.raises(UserError) as error, explain_full_disk(tmp_path, model):
            save_model()
        return str(error.value)

    for said in (
        Exception("No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left", "loss.png"),
    ):
        with pytest.raises(UserError, match="is full"), explain_full_disk(tmp_path, small):
            raise said
    elsewhere = RuntimeError("of a step, not of a save")
    for other in (torch.OutOfMemoryError("CUDA out of memory"), KeyError("a bug"), UserError("a mistake"), elsewhere):
        with pytest.raises(type(other)), explain_full_disk(tmp_path, model):  # whatever the disk has left
            raise other

    assert "last whole checkpoint: none" in cut_short() and "--overwrite_output_dir" in cut_short()
    whole = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")
    for step, files in ((4, whole), (8, ())):  # the second was cut short
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    assert f"checkpoint: {tmp_path / 'checkpoint-4'}" in cut_short() and "--resume_from_checkpoint true" in cut_short()


def test_bad_records_stop_everything_before_anything_is_written(cache, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": ""}\n{"instruction": null, "output": "b"}\n')
    done = run(
        "scripts/train.py",
        "configs/demo.yaml",
        "--data",
        str(bad),
        "--output_dir",
        str(tmp_path / "run"),
        cache=cache,
        expect=1,
    )
    assert [line for line in done.stderr.splitlines() if "row" in line] == [
        f"{bad} row 0: 'output' is empty (''); write a response or remove the row",
        f"{bad} row 1: 'instruction' is null or missing; write the instruction or remove the row",
    ]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    done = run(
        "scripts/eval.py",
        "--model",
        str(DEMO / "base"),
        "--data",
        str(bad),
        "--output_dir",
        str(tmp_path / "e"),
        cache=cache,
        expect=1,
    )
    assert "row 0: 'output' is empty" in done.stderr and "Traceback" not in done.stderr


def test_flags_that_cannot_go_together_are_refused_before_anything_is_written(cache, tmp_path):
    options = ("scripts/train.py", "configs/demo.yaml", "--output_dir", str(tmp_path / "run"))
    data = ("--data", str(DEMO / "records" / "validation.jsonl"), "--validation_ratio", "0")
    done = run(*options, *data, cache=cache, expect=1)
    assert "error: nothing to evaluate on: --eval_strategy epoch needs a validation split" in done.stderr
    assert not (tmp_path / "run").exists()
    done = run(*options, "--max_length", "300", cache=cache, expect=1)
    assert done.stderr.strip() == "error: --max_length 300: the model has only 256 positions; give at most 256"


def test_a_checkpoint_is_asked_with_its_runs_template(cache, tmp_path):
    options = ("--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "no")
    small = ("--per_device_train_batch_size", "2", "--template", "phi3", "--output_dir", str(tmp_path / "run"))
    run("scripts/train.py", "configs/demo.yaml", *options, *small, cache=cache)
    checkpoint, alone = tmp_path / "run" / "checkpoint-1", tmp_path / "alone"
    shutil.copytree(checkpoint, alone)
    asked = ("--max_new_tokens", "3", "--split", "validation")
    demo = ("--data", json.dumps({"validation": str(DEMO / "records" / "validation.jsonl")}))
    run("scripts/eval.py", "--model", str(checkpoint), "--output_dir", str(tmp_path / "a"), *asked, cache=cache)
    run("scripts/eval.py", "--model", str(alone), "--output_dir", str(tmp_path / "b"), *asked, *demo, cache=cache)
    assert texts_of(tmp_path / "a") == texts_of(tmp_path / "b")
    [first, *_] = map(json.loads, (tmp_path / "a" / "predictions.jsonl").read_text().splitlines())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(alone), AutoTokenizer.from_pretrained(alone)
    [response] = generate_responses(model, tokenizer, [load_template("phi3").prompt(first)], max_new_tokens=3)
    assert response.text == first["tuned"]["text"]


def test_half_precision_flag_trains_on_a_cpu(cache, tmp_path):
    run(
        "scripts/train.py", "configs/demo.yaml", "--output_dir", str(tmp_path / "run"), "--max_steps", "2",
        "--bf16", "true", "--eval_strategy", "no", "--per_device_train_batch_size", "2", cache=cache,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.dtype == torch.float32  # the weights stay whole; only the arithmetic was half
