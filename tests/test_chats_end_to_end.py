"""Conversations from a file to a model, its evaluation and its card, in real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from conftest import DEMO, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.evaluation.answers import as_predictions, read_answer_file
from recipe.evaluation.endpoints import chat_request
from recipe.evaluation.judge.prompts import load_judge_prompts
from recipe.generation import Decoding
from recipe.templates import plain_messages


def run(*command: str | Path, cache: Path) -> str:
    done = processes.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
    )  # fmt: skip
    assert isinstance(done, subprocess.CompletedProcess) and done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def chat(number: int) -> list[dict[str, str]]:
    question = [{"role": "user", "content": f"Write the plural of cat {number}."}]
    answer = [{"role": "assistant", "content": f"The plural of cat is cats {number}."}]
    return [*question, *answer, {"role": "user", "content": f"And of dog {number}?"},
            {"role": "assistant", "content": f"The plural of dog is dogs {number}."}]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    rows = [{"messages": chat(n) + (chat(n)[:1] if n == 3 else []), "family": "plural"} for n in range(16)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "--model_name_or_path", DEMO / "base", "--data", folder / "a.jsonl", "--template", "chatml", "--max_steps", 2,
        "--validation_ratio", 0.2, "--test_ratio", 0.2, "--per_device_train_batch_size", 4, "--eval_strategy", "steps",
        "--eval_steps", 2, "--eval_generate", "true", "--generation_max_new_tokens", 4, "--save_strategy", "no",
        "--use_cpu", "true", "--output_dir", folder / "run",
    ]  # fmt: skip
    out = " ".join(run("scripts/train.py", *arguments, cache=folder / "cache").split())
    assert "32 turns of the assistant are learned in conversations" in out
    assert "what follows the last answer is left out (1 conversations)" in out
    arguments = ["--model", folder / "run", "--output_dir", folder / "eval", "--max_new_tokens", 4]
    run("scripts/eval.py", *arguments, cache=folder / "cache")
    return folder


def test_what_a_run_says_of_conversations(trained):
    splits = json.loads((trained / "run" / "run.json").read_text())["splits"]
    assert {name: split["turns"] for name, split in splits.items()} == {"train": 20, "validation": 6, "test": 6}
    samples = [json.loads(line) for line in (trained / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples and all(
        sample["instruction"].startswith("user: Write the plural") and "\n\nassistant: " in sample["instruction"]
        for sample in samples
    )
    card = (trained / "run" / "README.md").read_text()
    assert "all turns of the assistant (20 in 10 records)" in card and "fine-tuned for conversations" in card
    assert "has not learned conversations" not in card


def test_an_evaluation_asks_for_the_last_turn(trained):
    """The reference loss is that of the stock model after the stock template."""
    rows = [json.loads(line) for line in (trained / "eval" / "predictions.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(trained / "run")
    model = AutoModelForCausalLM.from_pretrained(trained / "run").eval()
    assert len(rows) == 3
    for row in rows:
        number = int(row["output"].split()[-1].rstrip("."))
        assert row["messages"] == chat(number) and row["instruction"] == chat(number)[2]["content"]
        options = {"tokenize": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(row["messages"], **options)
        end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
        ids = torch.tensor([whole[:end]])
        assert ids[0, : len(prompt)].tolist() == prompt
        labels = ids.masked_fill(torch.arange(end)[None] < len(prompt), -100)
        count = end - len(prompt)
        loss = model(input_ids=ids, labels=labels).loss.item()
        answer = row["tuned"]
        assert answer["reference_tokens"] == count and answer["reference_loss"] == pytest.approx(loss * count, rel=1e-4)
    page = (trained / "eval" / "report.html").read_text(encoding="utf-8")
    assert "user: Write the plural of cat" in page


def test_the_answers_of_an_evaluation_are_read_again_with_their_messages(trained):
    path = trained / "eval" / "predictions.jsonl"
    _, predictions, answers = read_answer_file(str(path))
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [p["messages"] for p in predictions] == [row["messages"] for row in written]
    assert [answer["text"] for answer in answers] == [row["tuned"]["text"] for row in written]


def test_served_models_and_judges_are_shown_the_whole_history():
    record = {"row": 0, "instruction": chat(1)[2]["content"], "input": "", "output": chat(1)[3]["content"]}
    [prediction] = as_predictions({"test": [{**record, "messages": json.dumps(chat(1))}]})
    assert chat_request(plain_messages(prediction), Decoding())["messages"] == chat(1)[:3]
    for prompt in load_judge_prompts(["score_0_100", "rubric_1_5"]):
        [message] = prompt.messages(prediction, response="x")
        assert (
            "user: Write the plural of cat 1.\n\nassistant: The plural of cat is cats 1.\n\nuser: And of"
            in message["content"]
        )
