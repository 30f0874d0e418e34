"""A new virtual environment with the wheel and what it depends on: `pytest -n 0 -s tests/acceptance`.

A minute and 1.6 GB, for as long as the test runs. pip takes the packages from where it is set up to take them.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

TRAIN = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix

torch.manual_seed(1)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0,
                                   embd_pdrop=0.0, attn_pdrop=0.0))
rows = [
    {"input_ids": [5, 6, 7, 8, 9, 0], "labels": [-100, -100, -100, 8, 9, 0]},
    {"input_ids": [5, 6, 7, 10, 0], "labels": [-100, -100, -100, 10, 0]},
    {"input_ids": [5, 6, 11, 0], "labels": [-100, -100, 11, 0]},
]
one_by_one = sum(
    torch.nn.functional.cross_entropy(
        model(torch.tensor([row["input_ids"]])).logits[0, :-1], torch.tensor(row["labels"][1:]), reduction="sum"
    )
    for row in rows
) / 7
print("by hand", one_by_one.item())
for collate in (DataCollatorForInstructionTuning(0), DataCollatorWithSharedPrefix(0)):
    arguments = TrainingArguments(
        "trained", per_device_train_batch_size=3, max_steps=1, learning_rate=0.0, logging_steps=1, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    print(type(collate).__name__, collate(rows)["input_ids"].numel(), trainer.state.log_history[0]["loss"])
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", **environment}
    done = subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The Python of the new environment."""
    folder, start = tmp_path_factory.mktemp("fresh"), time.monotonic()
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run(sys.executable, *pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    [wheel] = folder.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    run(python, *pip, "install", "--constraint", ROOT / "constraints.txt", wheel, cwd=folder)
    print(f"\nmade in {time.monotonic() - start:.0f} s")
    yield python
    import shutil

    shutil.rmtree(folder)


def test_it_holds_the_wheel_and_what_it_depends_on_alone(fresh, tmp_path):
    installed = {
        row["name"].lower() for row in json.loads(run(fresh, "-m", "pip", "list", "--format=json", cwd=tmp_path))
    }
    assert "gpt2-instruction-recipe" in installed
    assert not installed & {"pytest", "ruff", "mypy", "trl", "peft", "playwright", "hatchling"}
    run(fresh, "-m", "pip", "check", cwd=tmp_path)


PUBLIC = """
from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.data import load_splits
from recipe.generation import generate_responses
from recipe.templates import load_template
from recipe.trainer import InstructionTrainer
"""


def test_the_public_paths_stay(fresh, tmp_path):
    run(fresh, "-c", PUBLIC, cwd=tmp_path)
    code = "import sys, recipe.collator; print({'transformers', 'datasets', 'accelerate', 'rich'} & set(sys.modules))"
    assert run(fresh, "-c", code, cwd=tmp_path).strip() == "set()"


def test_both_collators_train_with_the_stock_trainer(fresh, tmp_path):
    lines = run(fresh, "-c", TRAIN, cwd=tmp_path).splitlines()
    shown = {line.split()[0]: line.split()[1:] for line in lines}
    expected = float(shown["by"][1])
    padded, shared = shown["DataCollatorForInstructionTuning"], shown["DataCollatorWithSharedPrefix"]
    assert [int(padded[0]), int(shared[0])] == [15, 7]  # 3 x 5; all have 2 in common, two of them 3
    assert [float(padded[1]), float(shared[1])] == pytest.approx([expected] * 2, rel=1e-5)


def test_it_is_the_wheel_that_is_imported_with_its_files(fresh, tmp_path):
    code = "import recipe, recipe.templates as t, pathlib; folder = pathlib.Path(recipe.__file__).parent; "
    code += "print(folder, (folder / 'py.typed').is_file(), t.load_template('alpaca').prompt({'instruction': 'x'})[:5])"
    folder, typed, text = run(fresh, "-c", code, cwd=tmp_path).split()
    assert Path(folder).is_relative_to(fresh.parent.parent) and typed == "True" and text == "Below"
