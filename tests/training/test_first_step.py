"""What is tried before the first step changes no number of the run, and nothing that it leaves."""

import json
import runpy

import pytest
import torch
from conftest import DEMO, ROOT
from datasets import Dataset
from transformers import AutoModelForCausalLM

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import DataArguments, InstructionTrainingArguments, ModelArguments
from recipe.evaluation.measures import MEASURES
from recipe.precision import is_native
from recipe.templates import load_template
from recipe.trainer import InstructionTrainer
from recipe.training.checks import OF_ANSWERS, OF_TIME, OF_TOKENS
from recipe.training.errors import Settings
from recipe.training.first_step import FirstStep

NATIVE = "bf16" if is_native(torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu") else "no"


def make_trainer(folder, tokenizer, **settings):
    """With dropout, so that every random number that is drawn shows in the weights."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1)
    args = InstructionTrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no", logging_steps=1, **settings,
    )  # fmt: skip
    texts = [f"Sentence {n} is here." for n in range(20)]
    rows = [{"input_ids": ids, "labels": ids, "length": len(ids)} for ids in tokenizer(texts)["input_ids"]]
    data = Dataset.from_list(rows)
    trainer = InstructionTrainer(
        model, args, data_collator=DataCollatorForInstructionTuning(tokenizer.eos_token_id), processing_class=tokenizer,
        train_dataset=data, eval_dataset=data if args.eval_strategy != "no" else None,
    )  # fmt: skip
    return trainer, args


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eval_strategy": "steps", "eval_steps": 2, "bf16": True},
        {"dataloader_num_workers": 1, "train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
        {"eval_strategy": "epoch", "neftune_noise_alpha": 5.0, "eval_on_start": True},
    ],
    ids=str,
)
def test_weights_and_log_are_the_same_bits_with_and_without(tmp_path, demo_tokenizer, settings):
    results = []
    for watched in (False, True):
        trainer, args = make_trainer(tmp_path / str(watched), demo_tokenizer, **settings)
        first_step = FirstStep(Settings(ModelArguments(), DataArguments(), args), None, [])
        if watched:
            first_step.watch(trainer, ["Name a colour."])
        with first_step.errors_explained():
            trainer.train()
        assert first_step.taken == first_step.tried == watched
        log = [
            (entry.get("loss"), entry.get("grad_norm"), entry.get("eval_loss")) for entry in trainer.state.log_history
        ]
        results.append((trainer.model.state_dict(), log, trainer.state.num_input_tokens_seen, torch.get_rng_state()))
    (weights, log, seen, state), (watched_weights, watched_log, watched_seen, watched_state) = results
    assert all(torch.equal(weights[name], watched_weights[name]) for name in weights)
    assert log == watched_log and seen == watched_seen and torch.equal(state, watched_state)
    assert not list((tmp_path / "True").glob(".trial-*"))


def test_errors_after_the_first_step_stay_what_they_are(tmp_path, demo_tokenizer):
    trainer, args = make_trainer(tmp_path, demo_tokenizer)
    first_step = FirstStep(Settings(ModelArguments(), DataArguments(), args), None, [])
    first_step.watch(trainer, [])
    log = trainer.log

    def fail(*values, **kwargs):
        log(*values, **kwargs)
        raise KeyError("later")

    trainer.log = fail
    with pytest.raises(KeyError, match="later"), first_step.errors_explained():
        trainer.train()


def test_evaluations_have_the_metrics_that_are_allowed(tmp_path, demo_tokenizer):
    """`metric_for_best_model` is checked against a list; here it meets a real evaluation."""
    trainer, _ = make_trainer(tmp_path, demo_tokenizer, eval_strategy="epoch")
    assert metrics_of(trainer) == {*OF_TOKENS, *OF_TIME}
    trainer._generation_prompts = load_template("alpaca").prompts([{"instruction": "Name it.", "input": ""}])
    trainer._generation_references, trainer._max_new_tokens = ["It is a b c d."], 8
    answers = {name for name, measure in MEASURES.items() if set(measure.features) <= OF_ANSWERS}
    assert metrics_of(trainer) == {*OF_TOKENS, *OF_TIME, *answers}


def metrics_of(trainer) -> set[str]:
    return {name.removeprefix("eval_") for name in trainer.evaluate()} - {"epoch", "model_preparation_time"}


@pytest.mark.parametrize(
    ("environment", "flags", "asked", "ran"),
    [
        ({}, [], None, {"mixed_precision": NATIVE, "compiler": "no", "optimizer": "AdamW", "attention": "sdpa"}),
        ({}, ["--bf16", "false"], False, {"mixed_precision": "no"}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["--optim", "sgd"], False,
         {"mixed_precision": "bf16", "optimizer": "SGD"}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["--fp16", "true"], False, {"mixed_precision": "fp16"}),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, ["--attn_implementation", "eager", "--data_seed", "7"], None,
         {"compiler": "eager", "attention": "eager", "data_seed": 7}),
        ({}, ["--bf16", "true", "--dtype", "bfloat16"], True, {"mixed_precision": "bf16", "weights": "bfloat16"}),
    ],
)  # fmt: skip
def test_run_and_card_tell_what_ran_wherever_it_was_set(tmp_path, monkeypatch, environment, flags, asked, ran):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    rows = (DEMO / "records" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    (tmp_path / "records.jsonl").write_text("\n".join(rows), encoding="utf-8")
    main = runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"]
    main([
        "--model_type", "gpt2", "--tokenizer_name", str(DEMO / "base"), "--config_overrides",
        "n_layer=1,n_embd=16,n_head=2", "--data", str(tmp_path / "records.jsonl"), "--max_steps", "1",
        "--output_dir", str(tmp_path / "run"), "--save_strategy", "no", "--report_to", "none", *flags,
    ])  # fmt: skip
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["ran"] | ran == run["ran"]
    assert run["config"]["training"]["bf16"] is asked  # by a flag; None: the device was to choose
    mixed = "" if run["ran"]["mixed_precision"] == "no" else f", mixed {run['ran']['mixed_precision']}"
    expected = f"| precision | weights in {ran.get('weights', 'float32')}{mixed} |"
    assert expected in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
