"""What it costs that a checkpoint is flushed to the disk and has a manifest: saves of GPT-2 with random weights.

python benchmarks/saves.py --output docs/results/saves.json --rounds 7

In turns, in one process: the stock Trainer's save, which leaves its files to the system's memory; the same with each
file flushed afterwards, which a safe save cannot do without; and ours. Then training steps with nothing beside them,
and those that run while a save is hashed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import InstructionTrainingArguments, parse_arguments, setting
from recipe.console import run_script
from recipe.files import flush, write_json
from recipe.provenance import versions
from recipe.trainer import InstructionTrainer

LENGTH, BATCH = 128, 4  # tokens of a row, rows of a step


@dataclass
class Arguments:
    """What is measured."""

    output: str = setting("outputs/benchmark/saves.json", "Results.")
    rounds: int = setting(7, "Saves of each kind.")
    steps: int = setting(8, "Training steps of each kind.")
    model_type: str = setting("gpt2", "With random weights.")
    config_overrides: str = setting("", "As n_layer=2,n_embd=128.")


def main(argv: list[str]) -> None:
    transformers.utils.logging.disable_progress_bar()
    [args] = parse_arguments([Arguments], argv, description=__doc__.partition("\n")[0])
    with tempfile.TemporaryDirectory(dir=Path(args.output).absolute().parent.parent) as folder:
        trainer = trained_for_a_step(Path(folder), args)
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for number in range(args.rounds):
            for name in list(WAYS)[:: 1 if number % 2 else -1]:
                seconds[name].append(timed_save(trainer, WAYS[name]))
                print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
        size = saved_bytes(trainer)
        alone, beside = steps_alone_and_beside_hashing(trainer, args.steps)
    results = {
        "command": f"python benchmarks/saves.py {' '.join(argv)}".strip(), "versions": versions(),
        "checkpoint_bytes": size, "save_seconds": seconds,
        "median_save_seconds": {name: median(each) for name, each in seconds.items()},
        "step_seconds": {"alone": alone, "while a save is hashed": beside},
    }  # fmt: skip
    write_json(Path(args.output), results)
    print(json.dumps({name: results[name] for name in ("checkpoint_bytes", "median_save_seconds")}, indent=2))
    print(f"step: {median(alone):.3f} s alone, {median(beside):.3f} s while a save is hashed")


def trained_for_a_step(folder: Path, args: Arguments) -> InstructionTrainer:
    """A trainer whose optimizer has its state, so that a checkpoint is as large as that of a run."""
    config = AutoConfig.for_model(args.model_type)
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (64, LENGTH), generator=draw).tolist()
    training = InstructionTrainingArguments(
        str(folder / "run"), per_device_train_batch_size=BATCH, max_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, logging_strategy="no", save_total_limit=1,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": row, "labels": row, "length": LENGTH} for row in rows])
    collator = DataCollatorForInstructionTuning(pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    trainer = InstructionTrainer(model, training, collator, train_dataset=data)
    trainer.train()
    return trainer


def stock(trainer: InstructionTrainer) -> None:
    Trainer._save_checkpoint(trainer, trainer.model, None)


def stock_and_flush(trainer: InstructionTrainer) -> None:
    stock(trainer)
    for path in (Path(trainer.args.output_dir) / "checkpoint-1").rglob("*"):
        flush(path)


def ours(trainer: InstructionTrainer) -> None:
    trainer._save_checkpoint(trainer.model, None)


WAYS = {"stock": stock, "stock, then flushed": stock_and_flush, "ours": ours}


def timed_save(trainer: InstructionTrainer, save: Any) -> float:
    """Seconds until training could go on; what was written is removed, and the disk is idle again."""
    shutil.rmtree(Path(trainer.args.output_dir) / "checkpoint-1", ignore_errors=True)
    os.sync()
    begun = time.perf_counter()
    save(trainer)
    seconds = time.perf_counter() - begun
    trainer._wait_for_hashes()
    return seconds


def saved_bytes(trainer: InstructionTrainer) -> int:
    return sum(path.stat().st_size for path in Path(trainer.args.output_dir).rglob("*") if path.is_file())


def steps_alone_and_beside_hashing(trainer: InstructionTrainer, count: int) -> tuple[list[float], list[float]]:
    """Seconds of steps, in turns; a save is hashed in about the time of the first of them."""
    batch = next(iter(trainer.get_train_dataloader()))
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * count):
        if number % 2:
            ours(trainer)
        begun = time.perf_counter()
        trainer.training_step(trainer.model, dict(batch), None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        times[number % 2].append(time.perf_counter() - begun)
        trainer._wait_for_hashes()
    return times


if __name__ == "__main__":
    run_script(main, interrupted="nothing was saved; run it again")
