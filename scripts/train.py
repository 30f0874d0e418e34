"""Fine-tune a causal language model on instruction records.

accelerate launch --config_file accelerate_config.yaml scripts/train.py configs/demo.yaml --flag value
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import DataArguments, InstructionTrainingArguments, ModelArguments, UserError, parse_arguments
from recipe.data import encode_records, load_records, resolve_max_length, template_overhead, token_statistics
from recipe.hub import write_model_card
from recipe.model import context_length, load_model, load_tokenizer, prepare_for_chat
from recipe.provenance import command_line, data_hash, versions, write_json
from recipe.report import plot_loss, print_token_statistics
from recipe.templates import load_template
from recipe.trainer import InstructionTrainer, SampleGenerations


def main(argv: list[str]) -> None:
    model_args, data_args, training_args = parse_arguments(
        [ModelArguments, DataArguments, InstructionTrainingArguments], argv, description=__doc__.split("\n")[0]
    )
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)
    say = PartialState().print

    # data
    tokenizer = load_tokenizer(model_args)
    template = load_template(data_args.template)
    with training_args.main_process_first(desc="data"):  # the others read its cache
        records, leaked = load_records(data_args)
        splits = encode_records(records, tokenizer, data_args)
    if "train" not in splits:
        raise UserError(f"data {data_args.data}: no train split, only {', '.join(splits)}; name one")
    preamble, _ = template_overhead(template, tokenizer)
    statistics = token_statistics(records, splits, preamble)
    if training_args.should_log:
        print_token_statistics(statistics, leaked)

    # model
    model, origin = load_model(model_args, tokenizer)
    check_context(data_args, model, tokenizer)
    prepare_for_chat(model, tokenizer, template)
    say(
        f"Model: {origin}, {model.num_parameters():,} parameters; "
        f"{training_args.world_size} process(es) on {training_args.device}"
    )
    cores = os.cpu_count() or 1
    if training_args.device.type == "cpu" and torch.get_num_threads() * training_args.world_size < cores:
        say(
            f"Only {torch.get_num_threads()} thread(s) of {cores} cores a process: set OMP_NUM_THREADS={cores} for more"
        )

    # trainer
    validation = splits.get("validation")
    trainer = InstructionTrainer(
        model,
        training_args,
        data_collator=DataCollatorForInstructionTuning(pad_token_id=tokenizer.eos_token_id),
        train_dataset=splits["train"],
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    if validation is not None and training_args.num_sample_generations:
        samples = records["validation"].select(
            range(min(training_args.num_sample_generations, len(records["validation"])))
        )
        trainer.add_callback(SampleGenerations(list(samples), template))

    # train
    clear_output_dir(training_args, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)

    # save
    model.config.use_cache = True  # the Trainer turned it off for training
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        output_dir = Path(training_args.output_dir)
        run = run_record(model_args, data_args, training_args, origin, records, statistics, leaked, trainer)
        write_json(output_dir / "run.json", run)
        plot_loss(trainer.state.log_history, output_dir / "loss.png")
        write_model_card(output_dir, run)
        say(f"\nDone: the model is in {output_dir}/; look at loss.png, samples.jsonl and run.json there")


def find_checkpoint(args: InstructionTrainingArguments) -> str | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:
        UserError: the folder holds another run and neither resuming nor overwriting was asked for; nothing to resume.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint and args.resume_from_checkpoint.lower() != "false":
        checkpoint: str | None = args.resume_from_checkpoint
        if checkpoint.lower() in ("true", "last"):
            checkpoint = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
        if checkpoint is None or not (Path(checkpoint) / "trainer_state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {args.resume_from_checkpoint}: no checkpoint there; name a checkpoint-N "
                "folder, or leave the flag out to start a new run"
            )
        return checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file; name a folder")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} already holds another run or other files; add --resume_from_checkpoint true to "
            "go on, --overwrite_output_dir to start over, or name another folder"
        )
    return None


def check_context(data_args: DataArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    max_length, positions = resolve_max_length(data_args, tokenizer), context_length(model)
    if max_length > positions:
        raise UserError(
            f"--max_length {max_length} is more than the {positions} positions of the model; give at most {positions}"
        )


def clear_output_dir(args: InstructionTrainingArguments, checkpoint: str | None) -> None:
    """Remove what a new run would mix with in the folder of an earlier one, after everything else was checked."""
    if checkpoint is None and args.overwrite_output_dir and args.should_save:
        for folder in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(folder)
        for name in ("samples.jsonl", "run.json"):
            (Path(args.output_dir) / name).unlink(missing_ok=True)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)


def run_record(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: InstructionTrainingArguments,
    origin: str,
    records: DatasetDict,
    statistics: list[dict],
    leaked: int,
    trainer: InstructionTrainer,
) -> dict:
    """What `run.json` holds: enough to repeat the run and to find its test split again."""
    final = trainer.state.log_history[-1]
    return {
        "command": command_line(),
        "versions": versions(),
        "seed": training_args.seed,
        "weights_from": origin,
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
            "train_seconds": final.get("train_runtime"),
            "train_loss": final.get("train_loss"),
            "eval": next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None),
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
    except (UserError, FloatingPointError) as error:
        # one process speaks; the launcher ends the others
        sys.exit(f"error: {error}" if PartialState().is_main_process else 1)
