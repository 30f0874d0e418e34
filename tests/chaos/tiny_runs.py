"""A run of a few steps of a tiny model, in this process."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import InstructionTrainingArguments
from recipe.trainer import InstructionTrainer


def arguments(folder: Path, **changes) -> InstructionTrainingArguments:
    options = {
        "per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
        "report_to": "none", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "seed": 3,
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return InstructionTrainingArguments(str(folder), **(options | changes))


def tiny_trainer(folder: Path, **changes) -> InstructionTrainer:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8)
    rows = [{"input_ids": [1, 2, 3 + row], "labels": [1, 2, 3 + row], "length": 3} for row in range(8)]
    return InstructionTrainer(
        AutoModelForCausalLM.from_config(config), arguments(folder, **changes), DataCollatorForInstructionTuning(0),
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:3]),
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Name to content of each file."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
