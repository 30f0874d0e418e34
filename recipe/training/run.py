"""run.json, from which a run can be repeated; and the end of a run's processes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from recipe.config import DataArguments, InstructionTrainingArguments, ModelArguments
from recipe.provenance import command_line, hardware, versions

if TYPE_CHECKING:
    from datasets import DatasetDict

    from recipe.training.trainer import InstructionTrainer


def describe_run(
    model_args: ModelArguments, data_args: DataArguments, training_args: InstructionTrainingArguments
) -> dict[str, Any]:
    """How the run was started: command, versions, machine, settings."""
    return {
        "command": command_line(),
        "versions": versions(),
        "hardware": hardware(),
        "seed": training_args.seed,
        "processes": training_args.world_size,
        "config": {"model": asdict(model_args), "data": asdict(data_args), "training": training_args.to_dict()},
    }


def describe_data(records: DatasetDict, statistics: list[dict], duplicates: int) -> dict[str, Any]:
    """The data: counts, and the hash by which its test split is found again.

    `statistics` are those of `recipe.data.token_statistics`; `duplicates` were left out of train.
    """
    from recipe.data.split import data_hash  # here, because datasets takes a second to import

    return {
        "data_hash": data_hash(records),
        "splits": {row["split"]: row for row in statistics},
        "rows": {
            "dropped": sum(row["dropped"] for row in statistics),
            "truncated": sum(row["truncated"] for row in statistics),
            "left_out_of_train_as_duplicates": duplicates,
        },
    }


def describe_result(trainer: InstructionTrainer) -> dict[str, Any]:
    """Steps, tokens, time and losses; the evaluation is the one of the weights that were saved."""
    state, last = trainer.state, trainer.state.log_history[-1]
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    if trainer.args.load_best_model_at_end:
        evaluations = [entry for entry in evaluations if entry["step"] == state.best_global_step]
    return {
        "steps": state.global_step,
        "tokens_seen": state.num_input_tokens_seen,
        "train_seconds": last.get("train_runtime"),
        "train_loss": last.get("train_loss"),
        "eval": evaluations[-1] if evaluations else None,
    }


def shut_down(trainer: InstructionTrainer) -> None:
    """End the trackers and the process group on all processes at once: one that leaves early may abort another.

    The wrapped model goes first. DDP's reducer holds the process group too, and as its last owner it would join gloo's
    threads while it holds Python's lock, for which one of them may wait: pytorch issue 56297, seen with torch 2.13.
    """
    trainer.accelerator.wait_for_everyone()
    assert trainer.model is not None
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
