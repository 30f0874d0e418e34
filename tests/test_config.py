"""Flags and YAML: what is shipped loads, and what is wrong is named."""

import doctest
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import recipe.config_file
import recipe.setting_checks
import recipe.training.errors
from recipe.config import (
    LOWER_IS_BETTER,
    DataArguments,
    InstructionTrainingArguments,
    ModelArguments,
    UserError,
    parse_arguments,
)
from recipe.evaluation.measures import MEASURES
from recipe.setting_checks import REPLACED

TYPES = [ModelArguments, DataArguments, InstructionTrainingArguments]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def parse(*argv: str):
    return parse_arguments(TYPES, list(argv), "")


def refuse(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse(*argv)
    return str(error.value)


@pytest.fixture
def config(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_names_what_changes_results(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"mask_prompt", "batching", "template", "output_dir", "seed"} <= content.keys()
    model, data, training = parse(str(path))
    assert data.mask_prompt is content["mask_prompt"]
    assert training.learning_rate == content["learning_rate"]
    assert model.model_name_or_path == content["model_name_or_path"]


def test_the_authors_setting_is_the_books():
    model, data, training = parse(str(ROOT / "configs" / "gpt2_medium_book.yaml"))
    assert model.model_name_or_path == "openai-community/gpt2-medium"
    assert set(model.config_overrides.split(",")) == {"resid_pdrop=0.0", "embd_pdrop=0.0", "attn_pdrop=0.0"}
    assert (data.mask_prompt, training.per_device_train_batch_size, training.num_train_epochs) == (False, 8, 2)
    assert (training.learning_rate, training.weight_decay, training.lr_scheduler_type) == (5e-5, 0.1, "constant")


def test_flags_win_over_the_file_and_the_file_over_defaults(config):
    path = config("data: a.json\nmax_length: 64\nmask_prompt: false\nlearning_rate: 1e-3\n")
    _, data, training = parse(path, "--max_length", "32", "--bf16", "false")
    assert (data.data, data.max_length, data.mask_prompt, training.learning_rate) == ("a.json", 32, False, 1e-3)
    assert (data.overflow, training.logging_nan_inf_filter, training.remove_unused_columns) == (
        "truncate",
        False,
        False,
    )


def test_mappings_and_lists_in_yaml(config):
    path = config(
        "data:\n  train: a.json\n  test: [b.json, c.json]\nlr_scheduler_kwargs: {num_cycles: 0.5}\n"
        "include_for_metrics: []\noptim_target_modules: [c_attn, c_fc]\n"
    )
    _, data, training = parse(path)
    assert training.optim_target_modules == ["c_attn", "c_fc"] and training.include_for_metrics == []
    assert parse(path, "--data", "d.json")[1].data == "d.json"
    assert data.data == {"train": "a.json", "test": ["b.json", "c.json"]}
    assert training.lr_scheduler_kwargs == {"num_cycles": 0.5}


def test_model_type_flag_wins_over_the_files_model(config):
    path = config("model_name_or_path: openai-community/gpt2\n")
    model, _, _ = parse(path, "--model_type", "gpt2")
    assert (model.model_type, model.model_name_or_path, model.tokenizer_name) == ("gpt2", None, "openai-community/gpt2")
    model, _, _ = parse(path, "--model_type=gpt2", "--tokenizer_name", "x")
    assert model.tokenizer_name == "x"
    model, _, _ = parse(config("model_type: gpt2\ntokenizer_name: z\n"), "--model_name_or_path", "y")
    assert (model.model_type, model.model_name_or_path, model.tokenizer_name) == (None, "y", None)


def test_unknown_keys_and_flags_name_the_near_ones(config):
    path = config("learning_rat: 1\nmask_promt: true\nzzz: 1\n")
    assert refuse(path).splitlines() == [
        f"{path}: unknown key 'learning_rat'; did you mean 'learning_rate'?",
        f"{path}: unknown key 'mask_promt'; did you mean 'mask_prompt'?",
        f"{path}: unknown key 'zzz'; see --help for all names",
    ]
    assert refuse("--max_lenght", "5") == "command line: unknown flag --max_lenght; did you mean 'max_length'?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_length: many\n", "argument --max_length/--max-length: invalid int value: 'many'"),
        ("overflow: cut\n", "argument --overflow: invalid choice: 'cut' (choose from"),
        ("mask_prompt: perhaps\n", "Truthy value expected"),
        ("- a\n- b\n", "expected `key: value` lines, found a list"),
        ("a: [1\n", "cannot be read as YAML"),
        ("validation_ratio: 1.5\n", "--validation_ratio 1.5, --test_ratio 0.1: give shares"),
        ("max_length: 1\n", "--max_length 1: a record needs at least 2 tokens"),
        ("hub_token: secret\n", "--hub_token would be in the list of processes and in the history of the shell"),
        ("label_smoothing_factor: 0.1\n", "use 0"),
        ("warmup_steps: -5\n", "warmup_steps"),
        ("seed: 1\nseed: 2\n", "line 2: the key 'seed' is repeated"),
        ("data:\n  test: a.jsonl\n  train: [b.jsonl]\n  test: c.jsonl\n", "line 4: the key 'test' is repeated"),
        ("mask_prompt: null\n", "'mask_prompt' is null; give a value, or leave the key out for True"),
        ("per_device_train_batch_size: 0\n", "--per_device_train_batch_size 0: give at least 1"),
        ("max_length: [1]\n", "max_length: [1] is a list of int; give one whole number or null"),
        ("learning_rate: {a: 1}\n", 'learning_rate: {"a": 1} is a mapping; give one number'),
        ("overflow: [drop]\n", """overflow: ["drop"] is a list of str; give 'truncate' or 'drop' or 'error'"""),
        ("report_to: [1]\n", "report_to: [1] is a list of int; give null or one text or a list, each one text"),
        ("include_for_metrics: {}\n", "include_for_metrics: {} is a mapping; give a list, each one text"),
        (
            "lr_scheduler_kwargs: [a]\n",
            'lr_scheduler_kwargs: ["a"] is a list of str; give a mapping or one text or null',
        ),
        ("bf16: [true]\n", "bf16: [true] is a list of bool; give true or false"),
        ("lr_scheduler_kwargs: abc\n", "--lr_scheduler_kwargs abc: not valid JSON"),
        ("num_proc: -2\n", "--num_proc -2: give at least 1"),
        ("dataloader_num_workers: 2147483648\n", "workers 2147483648: give at least 0, at most 1024"),
        ("dataloader_prefetch_factor: 2147483648\n", "factor 2147483648: give at least 1, at most 1024"),
        ("num_sample_generations: 12345678901234567890\n", "give at least 0, at most 1000000"),
        ("adam_beta1: 1.5\n", "--adam_beta1 1.5: give at least 0, at most 1"),
        ("max_grad_norm: .nan\n", "--max_grad_norm nan: give a finite number"),
        ("eval_strategy: steps\neval_steps: -3\n", "--eval_steps -3.0: give a number above 0"),
        ("learning_rate: -1\n", "--learning_rate -1.0: give at least 0"),
    ],
)
def test_wrong_values(config, text, message):
    assert message in refuse(config(text))


def test_settings_that_take_any_value_or_do_not_count():
    assert parse("--max_grad_norm", "inf")[2].max_grad_norm == float("inf")  # measured, not clipped
    assert parse("--logging_strategy", "epoch", "--logging_steps", "0")[2].logging_steps == 0
    assert parse("--max_steps", "-1")[2].max_steps == -1  # transformers' own "not given"


def test_old_names_are_told_the_new_ones():
    known = {field.name for kind in TYPES for field in fields(kind)}
    for old, new in REPLACED.items():
        assert old not in known
        assert refuse(f"--{old}", "1") == f"command line: unknown flag --{old}; use {new}"
    words = {re.split(r"[:;, ]", new)[0] for new in REPLACED.values()}
    assert words - {"the", "nothing"} <= known


def test_what_is_better_is_known_of_every_metric():
    """transformers knows it only of names that end in "loss"."""
    lower = {name for name, measure in MEASURES.items() if measure.better == "lower"} - {
        "reference_loss",
        "bits_per_byte",
    }
    assert set(LOWER_IS_BETTER) == lower | {"loss", "perplexity"}
    best = ("--load_best_model_at_end", "true", "--eval_strategy", "epoch", "--save_strategy", "epoch")
    for name in (*LOWER_IS_BETTER, "next_token_accuracy", "chrf", "eval_perplexity"):
        training = parse(*best, "--metric_for_best_model", name)[2]
        assert training.greater_is_better is (name.removeprefix("eval_") not in LOWER_IS_BETTER)


def test_the_compiler_of_accelerates_file_counts_as_ours(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    training = parse()[2]
    assert (training.torch_compile, training.torch_compile_backend) == (True, "eager")


def test_the_examples_in_the_docstrings():
    modules = (recipe.config_file, recipe.setting_checks, recipe.training.errors)
    assert [doctest.testmod(module).failed for module in modules] == [0, 0, 0]


def test_defaults_of_another_version_are_named_by_their_source():
    """As evaluation takes them from the run.json of the model."""
    for defaults, said in (
        ({"dataa": "a.json"}, "run.json: unknown key 'dataa'; did you mean 'data'?"),
        ({"max_length": [64]}, "run.json: max_length: [64] is a list of int; give one whole number or null"),
        ({"overflow": "cut"}, "run.json: argument --overflow: invalid choice: 'cut'"),
    ):
        with pytest.raises(UserError) as error:
            parse_arguments(TYPES, [], "", defaults, "run.json")
        assert str(error.value).startswith(said)


def test_missing_config_file_and_stray_words():
    assert refuse("no/such.yaml") == "no/such.yaml: no such config file"
    assert "unexpected 'more'" in refuse(str(CONFIGS[0]), "more")


def test_a_token_is_never_kept(config):
    assert "secret" not in refuse(config("hub_token: secret\n"))
