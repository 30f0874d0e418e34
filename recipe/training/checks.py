"""What can be known before the first step, checked before it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState

from recipe.config import DataArguments, InstructionTrainingArguments, ModelArguments, UserError

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_trackers(args: InstructionTrainingArguments) -> None:
    """Have W&B look for its key now, as it would at the first step: a missing one must not end a run that has begun."""
    if "wandb" not in args.report_to or args.process_index != 0:
        return
    try:
        import wandb
    except ImportError:  # the Trainer says how to install it
        return
    try:
        wandb.login()
    except wandb.Error as error:
        raise UserError(
            f"--report_to wandb: {error}; run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
        ) from error


def check_splits(splits: DatasetDict, data_args: DataArguments, training_args: InstructionTrainingArguments) -> None:
    if "train" not in splits:
        raise UserError(f"data {data_args.data}: no train split, only {', '.join(splits)}; name one")
    if "validation" not in splits and training_args.eval_strategy != "no":
        raise UserError(
            f"nothing to evaluate on: --eval_strategy {training_args.eval_strategy.value} needs a validation split; "
            "give --validation_ratio 0.05, a validation file, or --eval_strategy no"
        )
    if training_args.eval_generate and training_args.eval_strategy == "no":
        raise UserError("--eval_generate answers at each evaluation: add --eval_strategy epoch or steps")
    budget, column = training_args.max_tokens_per_batch, training_args.length_column_name
    if budget is None and training_args.train_sampling_strategy != "group_by_length":
        return
    from recipe.training.sampling import record_lengths  # here: numpy and datasets wait until a run needs them

    try:
        longest = int(record_lengths(splits["train"], column).max()) - 1
    except ValueError as error:
        raise UserError(f"--length_column_name {column}: {error}") from error
    if budget is not None and longest > budget:
        raise UserError(
            f"--max_tokens_per_batch {budget}: the longest training record alone has {longest} input tokens; "
            f"give at least {longest}, or a smaller --max_length"
        )


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


def say_model(origin: str, model: PreTrainedModel, args: InstructionTrainingArguments) -> None:
    say = PartialState().print
    say(f"Model: {origin}, {model.num_parameters():,} parameters; {args.world_size} process(es) on {args.device}")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if args.device.type == "cpu" and threads * args.world_size < cores:
        wanted = cores // args.world_size
        say(f"Only {threads} thread(s) a process on {cores} cores: set OMP_NUM_THREADS={wanted} for more")
    if args.device.type == "cpu" and args.bf16 and not bfloat16_is_fast():
        say("This CPU has no instructions for bfloat16: --bf16 false is faster")


def bfloat16_is_fast() -> bool:
    """Whether the CPU multiplies in bfloat16 by itself; True where torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    instructions = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
    return not capabilities or any(capabilities.get(name) for name in instructions)
