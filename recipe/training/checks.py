"""What is checked before the first step, so that a mistake does not cost a training run."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from recipe.config import (
    LOWER_IS_BETTER,
    DataArguments,
    InstructionTrainingArguments,
    ModelArguments,
    UserError,
)
from recipe.precision import name_of, slow_note
from recipe.setting_checks import did_you_mean

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState

    from recipe.training.errors import Settings

OF_TOKENS = ("loss", "perplexity", "next_token_accuracy")  # what every evaluation measures
OF_ANSWERS = {"predictions", "references", "stop_reasons"}  # what --eval_generate has, for more
OF_TIME = ("runtime", "samples_per_second", "steps_per_second")


def check_settings(settings: Settings) -> None:
    """Refuse settings that do not fit together, as far as that needs neither data nor weights."""
    from recipe.adapters import check_lora  # here, as below: --help needs none of it
    from recipe.model import check_weights

    model_args, data_args, args = settings.model, settings.data, settings.training
    check_lora(settings.lora, model_args, bool(args.push_to_hub))
    check_weights(model_args.model_name_or_path or "")
    check_best_metric(args)
    if args.neftune_noise_alpha is not None and data_args.batching == "shared_prefix":
        raise UserError(
            f"--neftune_noise_alpha {args.neftune_noise_alpha} makes noise by the length of a row, which --batching "
            "shared_prefix changes; use --batching padded"
        )
    if data_args.streaming:
        check_streaming(args)
    if args.optim_args and args.optim in ("adamw_torch", "adamw_torch_fused", "adafactor"):
        raise UserError(
            f"--optim_args {args.optim_args} has no effect on --optim {OptimizerNames(args.optim).value}; use "
            "--adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay and --learning_rate, or leave it out"
        )
    if "underflow_overflow" in str(args.debug) and (args.num_sample_generations or args.eval_generate):
        raise UserError(
            "--debug underflow_overflow cannot watch a model that answers: add --num_sample_generations 0, without "
            "--eval_generate"
        )
    accumulated = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")  # of the accelerate file
    if accumulated.isdigit() and int(accumulated) not in (1, args.gradient_accumulation_steps):
        raise UserError(
            f"gradient_accumulation_steps: {accumulated} in accelerate's file has no effect on the Trainer; take it "
            f"out there and give --gradient_accumulation_steps {accumulated}"
        )


def check_best_metric(args: InstructionTrainingArguments) -> None:
    """Refuse a metric_for_best_model that no evaluation will have, or that is compared the wrong way round."""
    compares = "--load_best_model_at_end" if args.load_best_model_at_end else "--save_strategy best"
    if (args.load_best_model_at_end or args.save_strategy == "best") and args.eval_strategy == "no":
        raise UserError(f"{compares} compares evaluations: add --eval_strategy epoch or steps")
    if args.save_strategy == "best" and args.metric_for_best_model is None:
        raise UserError("--save_strategy best: name what is compared, for example --metric_for_best_model loss")
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    from recipe.evaluation.measures import MEASURES

    flag, name = (
        f"--metric_for_best_model {args.metric_for_best_model}",
        args.metric_for_best_model.removeprefix("eval_"),
    )
    answers = [name for name, measure in MEASURES.items() if set(measure.features) <= OF_ANSWERS]
    known = [*OF_TOKENS, *(answers if args.eval_generate else ()), *OF_TIME]
    if name not in known:
        if name in answers:
            raise UserError(f"{flag} scores answers, which evaluations have only with --eval_generate true")
        raise UserError(f"{flag}: evaluations have {', '.join(known)}{did_you_mean(name, known, otherwise='')}")
    if args.greater_is_better == (name in LOWER_IS_BETTER) and name not in OF_TIME:
        better = "lower" if name in LOWER_IS_BETTER else "higher"
        raise UserError(
            f"{flag} --greater_is_better {str(args.greater_is_better).lower()} would keep the worst model: of this "
            f"metric {better} is better; leave --greater_is_better out"
        )


def check_streaming(args: InstructionTrainingArguments) -> None:
    """Refuse what needs to know how many records there are, or how long."""
    if args.max_steps < 1:
        raise UserError(
            "--streaming: nobody knows how many records a stream has; say how many steps to train: --max_steps 1000"
        )
    if args.train_sampling_strategy != "random":
        raise UserError(
            f"--streaming with --train_sampling_strategy {args.train_sampling_strategy}: the lengths are not known in "
            "advance; --max_tokens_per_batch makes batches of similar lengths, --shuffle_buffer 1 keeps the order"
        )


def check_trackers(args: InstructionTrainingArguments) -> None:
    """Refuse trackers that are unknown or not installed, and let W&B look for its key now and not at the first step."""
    if not args.report_to:
        return
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    for name in set(args.report_to).difference(get_available_reporting_integrations()):
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:  # it lists what is supported
            raise UserError(f"--report_to {name}: {error}") from error
        raise UserError(f"--report_to {name}: its library is not installed; install it, or leave {name} out")
    if "wandb" not in args.report_to or args.process_index != 0:
        return
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
    if data_args.streaming:
        return
    for name, split in splits.items():
        if name in ("train", "validation") and len(split) == 0:
            raise UserError(f"the {name} split has no record; give more data, a longer --max_length or other shares")
    records, step = len(splits["train"]), args.train_batch_size * args.world_size
    if args.dataloader_drop_last and records < step:
        raise UserError(
            f"--dataloader_drop_last leaves nothing to train on: {records:,} records are fewer than one batch on each "
            f"process ({step:,}); lower --per_device_train_batch_size, or leave the flag out"
        )


def check_evaluations(args: InstructionTrainingArguments, state: TrainerState) -> None:
    """Refuse to look for the best model in a run that ends before its first evaluation."""
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    by_steps = args.eval_strategy == IntervalStrategy.STEPS
    end, every = (state.max_steps, int(state.eval_steps)) if by_steps else (max(1, state.num_train_epochs), 1)
    last = end // every * every
    if last == 0 or last < args.eval_delay:
        flags = (f"--eval_steps {every}, " if by_steps else "") + f"--eval_delay {args.eval_delay:g}"
        raise UserError(
            f"{flags}: the run ends after {end:,} {'steps' if by_steps else 'epoch(s)'}, before its first evaluation, "
            "so there is no best model; evaluate earlier"
        )


def check_schedule(trainer: Trainer) -> None:
    """Refuse a schedule that never reaches the learning rate, or that fails at a later step."""
    args, steps = trainer.args, trainer.state.max_steps
    warmup = args.get_warmup_steps(steps)
    if warmup > steps and args.lr_scheduler_type != "constant":
        raise UserError(
            f"--warmup_steps {args.warmup_steps:g}: the run has only {steps:,} steps, so it would never reach "
            f"--learning_rate {args.learning_rate:g}; give fewer, or a share of the steps, such as 0.05"
        )
    for factor in getattr(trainer.lr_scheduler, "lr_lambdas", ()):  # pure functions of the step
        for step in {0, warmup, (warmup + steps) // 2, steps}:
            if not math.isfinite(factor(step)):
                raise ValueError(f"the learning rate of step {step} would be {factor(step)}")


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


def print_model(about: dict[str, Any], model: PreTrainedModel, args: InstructionTrainingArguments) -> None:
    """Print which model trains on what, and settings that make a CPU slower than it could be."""
    print_once = PartialState().print
    origin, adapter = about["weights_from"], about.get("adapter")
    count = adapter["frozen"] if adapter else model.num_parameters()
    print_once(f"Model: {origin}, {count:,} parameters; {args.world_size} process(es) on {args.device}")
    if adapter:
        layers = ", ".join(adapter["targets"])
        print_once(f"Adapter: {adapter['trained']:,} parameters on {layers}; no others are trained")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if args.device.type == "cpu" and threads * args.world_size < cores:
        print_once(
            f"{threads} thread(s) a process on {cores} cores: set OMP_NUM_THREADS={cores // args.world_size} to use all"
        )
    for line in about_precision(args, model.dtype):
        print_once(line)


def about_precision(
    args: InstructionTrainingArguments, weights: torch.dtype, instructions: Collection[str] | None = None
) -> list[str]:
    """Which precision was chosen for the device, and that one that was asked for is slow there.

    Args:
        instructions: see `recipe.precision.is_native`.
    """
    kind, lines = args.device.type, []
    if args.bf16 is None:
        chosen, has = ("bf16", "has") if args.mixed_precision == "bf16" else ("fp32", "has no known")
        line = f"Precision: {chosen}, as this {name_of(kind)} {has} instructions for bfloat16"
        lines = [f"{line} (--bf16 true or false decides otherwise)"]
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision, torch.float32)
    by_flag = args.fp16 or args.bf16
    faster = f"--{args.mixed_precision} false" if by_flag else 'mixed_precision: "no" in accelerate\'s file'
    notes = {faster: slow_note(mixed, kind, instructions), "--dtype float32": slow_note(weights, kind, instructions)}
    return lines + [f"{note}: try {faster}" for faster, note in notes.items() if note]
