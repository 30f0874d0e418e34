"""The examples as a user runs them, and their numbers against a plain computation."""

import ast
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import DEMO, ROOT
from datasets import Dataset
from torch.nn import functional
from transformers import AutoTokenizer

from recipe.collator import DataCollatorWithSharedPrefix
from recipe.config import DataArguments
from recipe.data import load_splits

EXAMPLES = ROOT / "examples"
TRAIN = DEMO / "records" / "train.jsonl"
TESTED = {
    "stock_trainer_llama.py", "accelerate_loop.py", "trl_sft.py", "both_collators.py", "custom_template.py",
    "custom_metric.py",
}  # fmt: skip
OPTIONAL = "make test-all installs the optional clients"
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def records(cache) -> list[dict[str, str]]:
    """The 32 records that the training examples take."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    splits = load_splits(DataArguments(data=str(TRAIN.relative_to(ROOT))), tokenizer)
    lines = TRAIN.read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[row]) for row in splits["train"][:32]["row"]]


def run(*command: str, cache: Path, expect: int = 0) -> subprocess.CompletedProcess:
    done = processes.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == expect, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def numbers_shown(pattern: str, text: str) -> list[float]:
    """The numbers of a pattern's group, where it matches."""
    return [float(number.replace(",", "")) for number in re.findall(pattern, text, flags=re.MULTILINE)]


def encode(tokenizer, record: dict[str, str]) -> tuple[torch.Tensor, int]:
    """The tokens of a record as chapter 7's prompt has them, (1, time), and how many of them are its prompt."""
    prompt = f"{PREAMBLE}\n\n### Instruction:\n{record['instruction']}"
    prompt += f"\n\n### Input:\n{record['input']}" if record["input"] else ""
    prompt_ids = tokenizer.encode(prompt + "\n\n### Response:\n")
    return torch.tensor([[*prompt_ids, *tokenizer.encode(record["output"]), tokenizer.eos_token_id]]), len(prompt_ids)


def plain_steps(model, tokenizer, records, learning_rate: float, clip: float = math.inf) -> Iterator[float]:
    """The losses of full-batch steps, record by record: no padding, no collator, no micro-batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    rows = [encode(tokenizer, record) for record in records]
    targets = sum(ids.shape[1] - prompt for ids, prompt in rows)
    while True:
        loss = 0.0
        for ids, prompt in rows:
            logits = model(ids, use_cache=False).logits[0, prompt - 1 : -1]
            nats = functional.cross_entropy(logits, ids[0, prompt:], reduction="sum") / targets
            nats.backward()
            loss += nats.item()
        yield loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def first_losses(*arguments, count: int = 3, **options) -> list[float]:
    steps = plain_steps(*arguments, **options)
    return [next(steps) for _ in range(count)]


def load(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_and_listed():
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert files == TESTED
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([\w.]+)\)", readme)) == {path.name for path in EXAMPLES.iterdir()} - {
        "README.md", "__pycache__"
    }  # fmt: skip
    for name in files:
        source = (EXAMPLES / name).read_text(encoding="utf-8")
        assert f"python examples/{name}" in ast.get_docstring(ast.parse(source))


def test_stock_trainer_on_a_llama(cache, records, demo_tokenizer):
    done = run("examples/stock_trainer_llama.py", cache=cache)
    [shown] = re.findall(r"^loss of each step.*: (.*)", done.stdout, flags=re.MULTILINE)
    losses = [float(loss) for loss in shown.split()]
    llama = load("stock_trainer_llama").make_llama(len(demo_tokenizer))
    expected = first_losses(llama, demo_tokenizer, records, learning_rate=5e-3, clip=1.0)
    assert losses[:3] == pytest.approx(expected, abs=2e-4)
    assert len(losses) == 5 and losses[-1] < 0.75 * losses[0]


def test_accelerate_loop_with_one_and_two_processes(cache, records, demo_tokenizer, demo_model):
    one = run("examples/accelerate_loop.py", cache=cache).stdout
    two = processes.run_ranks(
        "examples/accelerate_loop.py", 2, "--data", str(TRAIN), "--model", str(DEMO / "base"), cwd=ROOT,
        env=os.environ | {"HF_DATASETS_CACHE": str(cache)},
    )  # fmt: skip
    assert two.returncode == 0, two.stderr[-3000:]
    assert "1 process(es) x 8 micro-batches x 4 records" in one
    assert "2 process(es) x 4 micro-batches x 4 records" in two.stdout
    expected = first_losses(demo_model, demo_tokenizer, records, learning_rate=1e-3)
    targets = sum(ids.shape[1] - prompt for ids, prompt in (encode(demo_tokenizer, record) for record in records))
    for stdout in (one, two.stdout):
        losses = numbers_shown(r"^step \d  targets \d+  loss (\S+)", stdout)
        assert losses[:3] == pytest.approx(expected, abs=5e-3)
        assert losses[0] == pytest.approx(expected[0], abs=1e-4)
        assert len(losses) == 5 and losses[-1] < 0.5 * losses[0]
        assert set(numbers_shown(r"targets (\d+)", stdout)) == {targets}


def test_trl(cache, records, demo_tokenizer, demo_model):
    pytest.importorskip("trl", reason=OPTIONAL)
    done = run("examples/trl_sft.py", cache=cache)
    [shown] = re.findall(r"^loss of each step.*: (.*)", done.stdout, flags=re.MULTILINE)
    losses = [float(loss) for loss in shown.split()]
    expected = first_losses(demo_model, demo_tokenizer, records, learning_rate=1e-3, clip=1.0)
    assert losses[0] == pytest.approx(expected[0], abs=1e-4)
    assert losses[:3] == pytest.approx(expected, abs=5e-3)
    assert len(losses) == 5 and losses[-1] < 0.5 * losses[0]


def test_trl_refuses_the_shared_prefix_as_the_example_says(demo_tokenizer, demo_model, tmp_path):
    trl = pytest.importorskip("trl", reason=OPTIONAL)
    rows = [{"input_ids": [1, 2, 3, 4, 0], "labels": [-100, -100, 3, 4, 0]}] * 4
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer = trl.SFTTrainer(
        demo_model, arguments, train_dataset=Dataset.from_list(rows), processing_class=demo_tokenizer,
        data_collator=DataCollatorWithSharedPrefix(demo_tokenizer.eos_token_id),
    )  # fmt: skip
    with pytest.raises((IndexError, RuntimeError, ValueError), match="shape"):
        trainer.train()


def test_both_collators(cache, records, demo_tokenizer, demo_model):
    done = run("examples/both_collators.py", cache=cache)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("padded", "shared prefix"))]
    layouts = [re.fullmatch(r"(.*?)\s{2,}([\d,]+)\s+(\S+)\s+(\S+)", line).groups() for line in lines]
    assert [name for name, *_ in layouts] == ["padded", "shared prefix, mask", "shared prefix, segments"]
    computed, losses, differences = (
        [float(layout[column].replace(",", "")) for layout in layouts] for column in (1, 2, 3)
    )
    rows = [encode(demo_tokenizer, record)[0][0, :-1].tolist() for record in records]
    common = next(index for index, tokens in enumerate(zip(*rows, strict=False)) if len({*tokens}) > 1)
    assert computed[0] == len(rows) * max(map(len, rows))
    assert computed[1] == computed[2] <= sum(map(len, rows)) - (len(rows) - 1) * common
    [expected] = first_losses(demo_model, demo_tokenizer, records, learning_rate=0, count=1)
    assert losses == pytest.approx([expected] * 3, abs=1e-5)
    assert differences[0] == 0 and max(differences) < 1e-4


def test_a_template_of_ones_own(cache):
    done = run("examples/custom_template.py", cache=cache)
    first = "Q: What is the plural of the word?\nloaf\nA:\n"
    assert f"the first record as text: {first + 'The plural of loaf is loaves.<|endoftext|>'!r}\n" in done.stdout
    assert f"what is learned of it:    {'The plural of loaf is loaves.<|endoftext|>'!r}\n" in done.stdout
    assert f"\n{first}The plural of loaf is loaves.\n" in done.stdout
    [right] = numbers_shown(r"^(\d+) of 16 learned records answered word for word", done.stdout)
    assert right >= 15
    saved = AutoTokenizer.from_pretrained(ROOT / "outputs" / "custom_template")
    assert saved.chat_template == (EXAMPLES / "question.jinja").read_text(encoding="utf-8")


def test_a_score_of_ones_own(cache):
    done = run("examples/custom_metric.py", cache=cache)
    rows = [json.loads(line) for line in (EXAMPLES / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]

    def numbers(text: str) -> list[str]:
        words = (word.strip(".,?!") for word in text.split())
        return [word for word in words if word.replace(".", "", 1).isdigit()]

    numbered = [row for row in rows if numbers(row["output"])]
    right = np.array(
        [[numbers(row[label]["text"]) == numbers(row["output"]) for row in numbered] for label in ("baseline", "tuned")]
    )
    assert f"{len(numbered)} of {len(rows)} records have a number" in done.stdout
    base, tuned = right.mean(axis=1)
    assert f"numbers right: base {base:.4f}, tuned {tuned:.4f}\n" in done.stdout
    gains = right[1].astype(float) - right[0]
    drawn = np.random.default_rng(7).integers(0, len(gains), size=(20_000, len(gains)))
    low, high = np.quantile(gains[drawn].mean(axis=1), [0.025, 0.975])
    [shown] = re.findall(r"^difference (\S+), 95 % interval (\S+) to (\S+)", done.stdout, flags=re.MULTILINE)
    assert [float(number) for number in shown] == pytest.approx([gains.mean(), low, high], abs=0.025)
    by_evaluate = {
        label: ast.literal_eval(scores)
        for label, scores in re.findall(r"^(\w+) by evaluate: (.*)", done.stdout, flags=re.MULTILINE)
    }
    assert by_evaluate["tuned"]["numbers_right"] == pytest.approx(tuned)
    assert by_evaluate["baseline"]["numbers_right"] == pytest.approx(base)
    exact = np.mean([row["tuned"]["text"] == row["output"] for row in rows])
    assert by_evaluate["tuned"]["exact_match"] == pytest.approx(exact)
