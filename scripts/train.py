"""Fine-tune a causal language model on instruction records.

accelerate launch --config_file accelerate_config.yaml scripts/train.py configs/demo.yaml --flag value
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import set_seed

from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import DataArguments, InstructionTrainingArguments, ModelArguments, UserError, parse_arguments

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recipe.trainer import InstructionTrainer


def main(argv: list[str]) -> None:
    model_args, data_args, training_args = parse_arguments(
        [ModelArguments, DataArguments, InstructionTrainingArguments], argv, description=__doc__.split("\n")[0]
    )
    checkpoint = find_checkpoint(training_args)
    check_trackers(training_args)
    push = None
    if training_args.push_to_hub:  # asked for access now: a wrong token must not cost a training run
        from recipe.hub import take_over_push

        push = take_over_push(training_args)

    # here, because --help and a mistake in the arguments need none of it: models, datasets, matplotlib take seconds
    from recipe import attention
    from recipe.console import print_token_statistics
    from recipe.data import encode_records, load_records, template_overhead, token_statistics
    from recipe.figures import plot_loss
    from recipe.model import load_model, load_tokenizer, prepare_for_chat
    from recipe.model_card import hub_sources, write_model_card
    from recipe.provenance import write_json
    from recipe.samples import SampleGenerations
    from recipe.templates import load_template
    from recipe.trainer import InstructionTrainer

    set_seed(training_args.seed)
    say = PartialState().print

    # data
    tokenizer = load_tokenizer(model_args)
    template = load_template(data_args.template, tokenizer)
    fit_max_length(data_args, model_args, tokenizer)
    with training_args.main_process_first(desc="data"):  # the others read its cache
        records, leaked = load_records(data_args)
        splits = encode_records(records, tokenizer, data_args)
    check_splits(splits, data_args, training_args)
    preamble, _ = template_overhead(template, tokenizer)
    statistics = token_statistics(records, splits, preamble)
    if training_args.should_log:
        print_token_statistics(statistics, leaked)

    # model
    if data_args.batching == "shared_prefix" and model_args.attn_implementation is None:
        model_args.attn_implementation = attention.NAME
    model, origin = load_model(model_args, tokenizer)
    hub = hub_sources(model_args.model_name_or_path, data_args.data, model_args.model_revision)
    prepare_for_chat(model, tokenizer, template)
    say_model(origin, model, training_args)

    # trainer
    collator = make_collator(data_args, training_args, model, tokenizer)
    try:
        trainer = InstructionTrainer(
            model,
            training_args,
            data_collator=collator,
            train_dataset=splits["train"],
            eval_dataset=splits.get("validation"),
            processing_class=tokenizer,
            generation_records=records["validation"] if training_args.eval_generate else (),
            template=template,
            max_new_tokens=training_args.generation_max_new_tokens,
        )
    except (ImportError, RuntimeError, ValueError) as error:  # a tracker that is not installed, flags that clash
        raise UserError(str(error)) from error
    if "validation" in splits and training_args.num_sample_generations:
        samples = list(
            records["validation"].take(min(training_args.num_sample_generations, len(records["validation"])))
        )
        trainer.add_callback(SampleGenerations(samples, template, trackers=trainer.callback_handler.callbacks))
    if push is not None:
        if (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and push.with_checkpoints:
            raise UserError(
                f"--hub_strategy {push.strategy}: the state of a sharded optimizer is not pushed; use every_save or end"
            )
        trainer.add_callback(push)

    # train and save; when that fails, pushes that wait do not keep this process
    clear_output_dir(training_args, checkpoint)
    output_dir = Path(training_args.output_dir)
    with push or nullcontext():
        with naming_a_full_disk(output_dir, model):
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
            trainer.save_state()
        if trainer.is_world_process_zero():
            run = run_record(model_args, data_args, training_args, origin, hub, records, statistics, leaked, trainer)
            run["config"]["training"]["push_to_hub"] = push is not None  # as it was asked for
            write_json(output_dir / "run.json", run)
            plot_loss(trainer.state.log_history, output_dir / "loss.png")
            write_model_card(output_dir, run, repo_id=push.repo_id if push is not None else None)
            say(f"\nDone: the model is in {output_dir}/; look at loss.png and run.json there")
        leave(trainer)

    # push, when no other process waits any more
    if push is not None and trainer.is_world_process_zero():
        pushed = push.finish(output_dir)
        say(f"Pushed: {pushed.url}" if pushed.sent else f"Nothing left to push: {pushed.url}")


def leave(trainer: InstructionTrainer) -> None:
    """End the trackers and the process group, together: one that a process leaves early may abort another.

    The wrapped model goes first. DDP's reducer holds the process group too, and as its last owner it would join gloo's
    threads while it keeps Python's lock, for which one of them may wait: pytorch issue 56297, seen with torch 2.13.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def find_checkpoint(args: InstructionTrainingArguments) -> str | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:
        UserError: the folder holds another run and neither resuming nor overwriting was asked for; nothing to resume.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint and args.resume_from_checkpoint.lower() != "false":
        checkpoint: str | None = args.resume_from_checkpoint
        if checkpoint.lower() in ("true", "last"):
            checkpoint = last_whole_checkpoint(output_dir)
        if checkpoint is not None and output_dir.resolve() not in Path(checkpoint).resolve().parents:
            _refuse_used(output_dir, args)
        if checkpoint is None or not (Path(checkpoint) / "trainer_state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {args.resume_from_checkpoint}: no checkpoint there; name a checkpoint-N "
                "folder, or leave the flag out to start a new run"
            )
        return checkpoint
    _refuse_used(output_dir, args)
    return None


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


def last_whole_checkpoint(output_dir: Path) -> str | None:
    """The last checkpoint that was written to its end: the Trainer writes `trainer_state.json` after all else."""
    folders = [folder for folder in output_dir.glob("checkpoint-*") if (folder / "trainer_state.json").is_file()]
    return str(max(folders, key=lambda folder: int(folder.name.split("-")[-1]))) if folders else None


def _refuse_used(output_dir: Path, args: InstructionTrainingArguments) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file; name a folder")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} already holds another run or other files; add --resume_from_checkpoint true to "
            "go on, --overwrite_output_dir to start over, or name another folder"
        )


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
    from recipe.sampling import record_lengths  # see main

    try:
        longest = int(record_lengths(splits["train"], column).max()) - 1
    except ValueError as error:
        raise UserError(f"--length_column_name {column}: {error}") from error
    if budget is not None and longest > budget:
        raise UserError(
            f"--max_tokens_per_batch {budget}: the longest training record alone has {longest} input tokens; "
            f"give at least {longest}, or a smaller --max_length"
        )


def make_collator(
    data_args: DataArguments,
    training_args: InstructionTrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> DataCollatorForInstructionTuning | DataCollatorWithSharedPrefix:
    """The collator of `--batching`; for `torch.compile` one whose shapes repeat, with 2 to 5 % more tokens for it."""
    from recipe import attention  # see main
    from recipe.model import context_length

    compiled = training_args.torch_compile
    if data_args.batching == "padded":
        fits = (context_length(model.config) or 0) % 8 == 0
        return DataCollatorForInstructionTuning(
            tokenizer.eos_token_id, pad_to_multiple_of=8 if compiled and fits else None
        )
    if reason := _why_not_one_row(model, training_args):
        raise UserError(f"--batching shared_prefix: {reason}; use --batching padded")
    if compiled:  # a row with a mask is one graph for all lengths; segments are Python, and break it into many
        return DataCollatorWithSharedPrefix(tokenizer.eos_token_id, "mask", pad_to_multiple_of=32)
    kind = "segments" if model.config._attn_implementation == attention.NAME else "mask"
    return DataCollatorWithSharedPrefix(tokenizer.eos_token_id, kind)


def _why_not_one_row(model: PreTrainedModel, args: InstructionTrainingArguments) -> str | None:
    """What keeps all examples of a batch from standing in one row."""
    from recipe import attention  # see main

    config, kind = model.config, type(model).__name__
    missing = {"logits_to_keep", "position_ids"} - inspect.signature(model.forward).parameters.keys()
    if missing:
        return f"{kind} does not take {' and '.join(sorted(missing))}"
    if not model._supports_sdpa:
        return f"{kind} has no attention that a mask could keep apart"
    layers = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in (layers or ()) or (layers is None and window is not None):
        return f"{kind} attends to a window of {window} tokens, which this layout does not keep to"
    if args.n_gpu > 1:
        return f"a row cannot be cut into parts for {args.n_gpu} GPUs of one process; start one process for each GPU"
    if config._attn_implementation not in ("sdpa", attention.NAME):
        return f"--attn_implementation {config._attn_implementation} knows no mask of true and false"
    return None


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


def fit_max_length(data_args: DataArguments, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set `max_length` to what tokenizer and model both allow, or check the one that was given."""
    from recipe.data import resolve_max_length  # see main
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


def clear_output_dir(args: InstructionTrainingArguments, checkpoint: str | None) -> None:
    """Remove what a new run would mix with in the folder of an earlier one, after everything else was checked."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if checkpoint is None and args.overwrite_output_dir and args.should_save:
        for folder in output_dir.glob("checkpoint-*"):
            shutil.rmtree(folder)
        written = ("model*.safetensors*", "samples.jsonl", "run.json", "trainer_state.json", "loss.png", "README.md")
        for pattern in written:
            for path in output_dir.glob(pattern):
                path.unlink()


@contextmanager
def naming_a_full_disk(output_dir: Path, model: PreTrainedModel) -> Iterator[None]:
    """Say that the disk is full where torch and safetensors say something else."""
    try:
        yield
    except (RuntimeError, SafetensorError, OSError) as error:
        free = shutil.disk_usage(output_dir).free
        if free > model.get_memory_footprint():
            raise
        whole = last_whole_checkpoint(output_dir)
        way_out = (
            f"{whole} is whole: free some space, or keep fewer with --save_total_limit, and add "
            "--resume_from_checkpoint true"
            if whole
            else "nothing was saved before it: free some space, and start again with --overwrite_output_dir"
        )
        raise UserError(
            f"the disk of {output_dir} is full ({free / 1e6:.1f} MB free) and a save was cut short; {way_out}"
        ) from error


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
    from recipe.provenance import command_line, data_hash, hardware, versions  # see main

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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, FloatingPointError, OSError) as error:
        # one process speaks; the launcher ends the others
        sys.exit(f"error: {error}" if PartialState().is_main_process else 1)
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume_from_checkpoint true goes on from the last checkpoint, if one was saved")
