"""Flags and YAML: what is shipped loads, and what is wrong is named."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from recipe.config import (
    DataArguments,
    InstructionTrainingArguments,
    ModelArguments,
    UserError,
    parse_arguments,
)

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
        ("- a\n- b\n", "expected `key: value` lines, found list"),
        ("a: [1\n", "cannot be read as YAML"),
        ("validation_ratio: 1.5\n", "--validation_ratio 1.5, --test_ratio 0.1: give shares"),
        ("max_length: 1\n", "--max_length 1: a record needs at least 2 tokens"),
        ("hub_token: secret\n", "--hub_token would be saved in training_args.bin"),
        ("label_smoothing_factor: 0.1\n", "use 0"),
        ("warmup_steps: -5\n", "warmup_steps"),
        ("seed: 1\nseed: 2\n", "line 2: the key 'seed' is repeated"),
        ("data:\n  test: a.jsonl\n  train: [b.jsonl]\n  test: c.jsonl\n", "line 4: the key 'test' is repeated"),
        ("mask_prompt: null\n", "'mask_prompt' is null; give a value, or leave the key out for True"),
        ("per_device_train_batch_size: 0\n", "--per_device_train_batch_size 0: give at least 1"),
        ("learning_rate: -1\n", "--learning_rate -1.0: give a number from 0 up"),
    ],
)
def test_wrong_values(config, text, message):
    assert message in refuse(config(text))


def test_missing_config_file_and_stray_words():
    assert refuse("no/such.yaml") == "no/such.yaml: no such config file"
    assert "unexpected 'more'" in refuse(str(CONFIGS[0]), "more")


def test_a_token_is_never_kept(config):
    assert "secret" not in refuse(config("hub_token: secret\n"))
