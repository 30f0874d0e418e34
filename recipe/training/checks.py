"""What is checked before the first step, so that a mistake does not cost a training run."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from transformers.trainer_utils import IntervalStrategy

from recipe.config import DataArguments, InstructionTrainingArguments, ModelArguments, UserError

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_trackers(args: InstructionTrainingArguments) -> None:
    """Let W&B look for its key now and not at the first step."""
    if "wandb" not in (args.report_to or ()) or args.process_index != 0 or find_spec("wandb") is None:
        return  # if it is not installed, the Trainer says how to install it
    import wandb

    try:
        wandb.login()
    except wandb.Error as error:
        raise UserError(
            f"--report_to wandb: {error}; run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
        ) from error


def check_splits(splits: DatasetDict, data_args: DataArguments, args: InstructionTrainingArguments) -> None:
    """Refuse settings that need a split the data does not have."""
    if "train" not in splits:
        raise UserError(f"data {data_args.data}: no train split, only {', '.join(splits)}; name one")
    if "validation" not in splits and args.eval_strategy != "no":
        raise UserError(
            f"nothing to evaluate on: --eval_strategy {IntervalStrategy(args.eval_strategy).value} needs a validation "
            "split; give --validation_ratio 0.05, a validation file, or --eval_strategy no"
        )
    if args.eval_generate and args.eval_strategy == "no":
        raise UserError("--eval_generate answers at each evaluation: add --eval_strategy epoch or steps")


def fit_max_length(data_args: DataArguments, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set `max_length` to what tokenizer and model both allow, or check the one that was given."""
    from recipe.data.encode import resolve_max_length
    from recipe.model import context_length, load_config

    positions = context_length(load_config(model_args, tokenizer))
    if positions is None:
        return
    if data_args.max_length is None:
        data_args.max_length = min(resolve_max_length(data_args, tokenizer), positions)
    elif data_args.max_length > positions:
        raise UserError(
            f"--max_length {data_args.max_length}: the model has only {positions} positions; give at most {positions}"
        )


def print_model(origin: str, model: PreTrainedModel, args: InstructionTrainingArguments) -> None:
    """Print which model trains on what, and settings that make a CPU slower than it could be."""
    print_once = PartialState().print
    print_once(
        f"Model: {origin}, {model.num_parameters():,} parameters; {args.world_size} process(es) on {args.device}"
    )
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if args.device.type == "cpu" and threads * args.world_size < cores:
        print_once(
            f"{threads} thread(s) a process on {cores} cores: set OMP_NUM_THREADS={cores // args.world_size} to use all"
        )
    if args.device.type == "cpu" and args.bf16 and not has_bfloat16_instructions():
        print_once("This CPU has no instructions for bfloat16: --bf16 false is faster")


def has_bfloat16_instructions() -> bool:
    """Whether the CPU has native bfloat16 instructions; True where torch cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):  # not in every torch that is supported
        return True
    capabilities = torch.cpu.get_capabilities()
    return not capabilities or any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
