"""Fine-tune a causal language model on instruction records.

accelerate launch --config_file accelerate_config.yaml scripts/train.py configs/demo.yaml --flag value

Each step imports what it needs, so that --help and mistakes in the arguments do not wait for the libraries.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # pages of 2 MB on Linux; torch reads it when it is imported

import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from transformers import set_seed

from recipe.config import DataArguments, InstructionTrainingArguments, LoraArguments, ModelArguments, parse_arguments
from recipe.console import process_rank, run_script
from recipe.lock import hold_folder
from recipe.training.checks import check_settings, check_splits, check_trackers, fit_max_length, print_model
from recipe.training.errors import Settings
from recipe.training.output_dir import explain_full_disk, find_checkpoint
from recipe.training.stopping import STOPPED, StopOnSignal, end_with_launcher


def main(argv: list[str]) -> None:
    """Settings, and one run at a time in its folder."""
    end_with_launcher()
    types = [ModelArguments, DataArguments, InstructionTrainingArguments, LoraArguments]
    by_device = {"bf16": None}
    settings = Settings(*parse_arguments(types, argv, __doc__.split("\n")[0], by_device))
    with hold_folder(settings.training.output_dir) if process_rank() == "0" else nullcontext():
        run(settings)


def run(settings: Settings) -> None:
    """Data, model, trainer, train, save, push."""
    model_args, data_args, training_args = settings.model, settings.data, settings.training
    checkpoint = find_checkpoint(training_args)
    check_settings(settings)
    check_trackers(training_args)
    push = None
    if training_args.push_to_hub:  # asks for access now: a wrong token must not cost a training run
        from recipe.publishing.push_while_training import replace_trainer_push

        push = replace_trainer_push(training_args)
    set_seed(training_args.seed)

    tokenizer, template, records, splits, bad_records, about_data = prepare_data(model_args, data_args, training_args)
    model, about_model = prepare_model(settings, tokenizer, template)
    from recipe.training.first_step import FirstStep
    from recipe.training.record import keep_record

    first_step = FirstStep(settings, checkpoint, bad_records)  # until then, nothing of an earlier run is removed
    with first_step.errors_explained():
        trainer = make_trainer(model, tokenizer, template, records, splits, settings, first_step, push)
        record = keep_record(trainer, settings, checkpoint, about_data | about_model, pushes=push is not None)
        if trainer.quarantine is not None:
            trainer.add_callback(trainer.quarantine)
        trainer.add_callback(stop := StopOnSignal(trainer))
        disk = explain_full_disk(Path(training_args.output_dir), model)
        with stop.listening():
            with disk, record.failures_told():
                trainer.train(resume_from_checkpoint=checkpoint)
                if not trainer.stopped:
                    trainer.save_model()
                    trainer.save_state()
                ended = record.close("stopped" if trainer.stopped else "finished")
                if trainer.is_world_process_zero() and not trainer.stopped:
                    save_reports(trainer, ended, push)
            shut_down(trainer)
    if trainer.stopped:
        stop.say_how_to_go_on(trainer.state, training_args)
        sys.exit(STOPPED)
    if push is not None and trainer.is_world_process_zero():  # the other processes have ended
        pushed = push.finish()
        print(f"Pushed: {pushed.url}" if pushed.sent else f"Nothing left to push: {pushed.url}")


def prepare_data(model_args, data_args, training_args):
    """Tokenizer and template; the records of all splits, as text and as tokens; and their part of run.json."""
    from recipe.console import print_sources, print_token_statistics
    from recipe.data.mixture import mix
    from recipe.data.prepared import is_prepared, load_prepared, prepare_records
    from recipe.model import load_tokenizer
    from recipe.templates import load_template

    tokenizer = load_tokenizer(model_args)
    template = load_template(data_args.template, tokenizer)
    fit_max_length(data_args, model_args, tokenizer)
    if data_args.streaming:
        return tokenizer, template, *prepare_stream(data_args, training_args, tokenizer, template)
    with training_args.main_process_first(desc="data"):  # the others read its cache
        ready = (load_prepared if is_prepared(data_args.data) else prepare_records)(data_args, tokenizer)
    splits, sources = mix(ready.splits, data_args)
    check_splits(splits, data_args, training_args)
    about = ready.about | {"sources": sources}
    if training_args.should_log:
        duplicates = about["rows"]["left_out_of_train_as_duplicates"]
        print_token_statistics([*about["splits"].values()], duplicates, about["bad_records"], ready.notes)
        print_sources(sources)
    return tokenizer, template, ready.records, splits, ready.bad, about


def prepare_stream(data_args, training_args, tokenizer, template):
    """As `prepare_data`, for training records that are read while training; the other splits are read now."""
    from recipe.console import print_token_statistics
    from recipe.data import template_overhead, token_statistics
    from recipe.data.encode import encode_good_records
    from recipe.data.streaming import UNKNOWN, files_hash, load_stream

    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    ranks = training_args.process_index, training_args.world_size
    stream, loaded, left_out = load_stream(data_args, tokenizer, seed, *ranks)
    records, splits = encode_good_records(loaded, tokenizer, data_args, left_out)
    check_splits({"train": stream, **splits}, data_args, training_args)
    preamble, _ = template_overhead(template, tokenizer)
    statistics = token_statistics(records, splits, preamble)
    if training_args.should_log:
        print_token_statistics(statistics, left_out.duplicates, left_out.reasons, left_out.notes)
        print(f"Streaming {len(stream.files)} file(s); bad records are counted while training")
    about = {
        "data_hash": files_hash(stream),
        "splits": {"train": UNKNOWN, **{row["split"]: row for row in statistics}},
        "rows": {"dropped": 0, "truncated": 0, "left_out_of_train_as_duplicates": left_out.duplicates, "bad": 0},
        "bad_records": {},
    }
    return records, {"train": stream, **splits}, left_out.bad, about


def prepare_model(settings, tokenizer, template):
    """The model, ready to be saved for chat, and where it comes from, for run.json."""
    from recipe.adapters import add_adapter, quantization
    from recipe.manifest import check_unchanged
    from recipe.model import load_config, load_model, prepare_for_chat
    from recipe.publishing.card import hub_sources
    from recipe.training.collator_choice import default_attention

    model_args, data_args, training_args = settings.model, settings.data, settings.training
    if model_args.model_name_or_path and training_args.should_log:
        check_unchanged(Path(model_args.model_name_or_path))
    if data_args.batching == "shared_prefix" and model_args.attn_implementation is None:
        model_args.attn_implementation = default_attention(load_config(model_args, tokenizer))
    model, origin = load_model(model_args, tokenizer, quantization(settings.lora))
    hub = hub_sources(model_args.model_name_or_path, data_args.data, model_args.model_revision)
    prepare_for_chat(model, tokenizer, template)
    about = {"weights_from": origin, "hub": hub}
    if settings.lora.lora_r:
        model, about["adapter"] = add_adapter(model, settings.lora, hub["base_commit"])
    print_model(about, model, training_args)
    return model, about


def make_trainer(model, tokenizer, template, records, splits, settings, first_step, push):
    """The trainer, with the callbacks that wait for the first step, show sample answers and push."""
    from recipe.tokens import prompt_ids
    from recipe.trainer import InstructionTrainer
    from recipe.training.collator_choice import make_collator
    from recipe.training.samples import SampleGenerations

    data_args, training_args = settings.data, settings.training
    trainer = InstructionTrainer(
        model,
        training_args,
        data_collator=make_collator(data_args, training_args, model, tokenizer),
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        generation_records=records["validation"] if training_args.eval_generate else (),
        template=template,
        max_new_tokens=training_args.generation_max_new_tokens,
    )
    trainer.train_batches()  # names a record longer than max_tokens_per_batch before the folder is touched
    validation = records["validation"] if "validation" in splits else ()
    samples = list(islice(validation, training_args.num_sample_generations))
    answered = samples or list(islice(validation, training_args.eval_generate))
    first_step.watch(trainer, prompt_ids(template, tokenizer, answered))
    if samples:
        trainer.add_callback(SampleGenerations(samples, template, trackers=trainer.callback_handler.callbacks))
    if push is not None:
        trainer.add_callback(push)
    return trainer


def save_reports(trainer, run, push):
    """Write loss.png and the model card beside the model."""
    from recipe.figures import plot_loss
    from recipe.files import write_whole
    from recipe.publishing.card import make_model_card

    output_dir = Path(trainer.args.output_dir)
    plot_loss(trainer.state.log_history, output_dir / "loss.png")
    card = make_model_card(output_dir, run, repo_id=push.repo_id if push is not None else None)
    write_whole(output_dir / "README.md", card)
    print(f"\nDone: the model is in {output_dir}/; look at loss.png and run.json there")


def shut_down(trainer):
    """End the trackers and the process group on all processes at once: one that exits early may abort another.

    The wrapped model is freed first. If DDP's reducer were the last to hold the process group, it would wait for gloo's
    threads while it holds the GIL, which one of them may need: a deadlock (pytorch issue 56297, seen with torch 2.13).
    """
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    resume = "--resume_from_checkpoint true resumes from the last checkpoint, if one was saved"
    run_script(main, interrupted=resume, expected=(FloatingPointError,))
