"""The end of a training run: what run.json says of it, and how its processes part."""

from __future__ import annotations

from dataclasses import asdict

from datasets import DatasetDict

from recipe.config import DataArguments, InstructionTrainingArguments, ModelArguments
from recipe.data.split import data_hash
from recipe.provenance import command_line, hardware, versions
from recipe.training.trainer import InstructionTrainer


def run_record(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: InstructionTrainingArguments,
    origin: str,
    hub: dict,
    records: DatasetDict,
    statistics: list[dict],
    leaked: int,
    trainer: InstructionTrainer,
) -> dict:
    """What `run.json` holds: enough to repeat the run and to find its test split again."""
    history = trainer.state.log_history
    evaluations = [entry for entry in history if "eval_loss" in entry]
    if training_args.load_best_model_at_end:  # the weights that were saved are those of the best step
        evaluations = [entry for entry in evaluations if entry["step"] == trainer.state.best_global_step]
    return {
        "command": command_line(),
        "versions": versions(),
        "hardware": hardware(),
        "seed": training_args.seed,
        "weights_from": origin,
        "hub": hub,
        "processes": training_args.world_size,
        "data_hash": data_hash(records),
        "splits": {row["split"]: row for row in statistics},
        "rows": {
            "dropped": sum(row["dropped"] for row in statistics),
            "truncated": sum(row["truncated"] for row in statistics),
            "left_out_of_train_as_duplicates": leaked,
        },
        "result": {
            "steps": trainer.state.global_step,
            "tokens_seen": trainer.state.num_input_tokens_seen,
            "train_seconds": history[-1].get("train_runtime"),
            "train_loss": history[-1].get("train_loss"),
            "eval": evaluations[-1] if evaluations else None,
        },
        "config": {
            "model": asdict(model_args),
            "data": asdict(data_args),
            "training": training_args.to_dict(),
        },
    }


def leave(trainer: InstructionTrainer) -> None:
    """End the trackers and the process group, together: one that a process leaves early may abort another.

    The wrapped model goes first. DDP's reducer holds the process group too, and as its last owner it would join gloo's
    threads while it keeps Python's lock, for which one of them may wait: pytorch issue 56297, seen with torch 2.13.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
