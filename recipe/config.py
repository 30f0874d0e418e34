"""The settings of a run: dataclasses, filled from one YAML file and the command line (flags win).

Every field of transformers' `TrainingArguments` is a YAML key and a flag too.
"""

from __future__ import annotations

import difflib
import json
import os
from argparse import ArgumentError, Namespace
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

INFINITY = float("inf")


class UserError(Exception):
    """An error the user can fix: scripts print its text alone, without a traceback, and exit with 1."""


def setting(default: Any, help: str) -> Any:
    """A dataclass field: its default, or a function that makes it, and its text in `--help`."""
    return field(**{"default_factory" if callable(default) else "default": default}, metadata={"help": help})


# The lowest value of settings that have one. Libraries would take a lower one without a word, or fail in the middle.
LOWEST: dict[str, float] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                     "generation_max_new_tokens", "max_tokens_per_batch", "eval_accumulation_steps",
                     "torch_empty_cache_steps", "save_total_limit", "dataloader_prefetch_factor", "ddp_bucket_cap_mb",
                     "ddp_timeout", "num_proc"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
                     "warmup_steps", "eval_delay", "num_sample_generations", "dataloader_num_workers",
                     "neftune_noise_alpha", "seed", "data_seed"), 0),
}  # fmt: skip
ABOVE_ZERO = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")  # below 1 the last three are shares
HIGHEST = {"adam_beta1": 1, "adam_beta2": 1, "seed": 2**32 - 1, "data_seed": 2**32 - 1}  # as numpy takes seeds
# What took the place of settings that transformers 4 had, or that other trainers have.
REPLACED = {
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "warmup_ratio": "warmup_steps; a number below 1 is a share of all steps",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "no_cuda": "use_cpu",
    "use_mps_device": "nothing: an accelerator is used if there is one",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "adafactor": "optim: adafactor",
    "half_precision_backend": "bf16 or fp16 alone",
    "fp16_backend": "bf16 or fp16 alone",
    "fp16_opt_level": "bf16 or fp16 alone",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_organization": "hub_model_id: owner/name",
    "push_to_hub_token": "the environment variable HF_TOKEN",
    "torchdynamo": "torch_compile_backend",
    "save_safetensors": "nothing: weights are always saved as safetensors",
    "include_inputs_for_metrics": "include_for_metrics",
    "include_tokens_per_second": "nothing: tokens_per_second is always logged",
    "dispatch_batches": "accelerator_config",
    "split_batches": "accelerator_config",
    "fsdp_min_num_params": "fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_config",
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "model_max_length": "max_length",
    "dataset_name": "data",
    "train_file": "data",
}
LOWER_IS_BETTER = ("loss", "perplexity", "repeated_4grams", "empty_rate")  # of the metrics of an evaluation


def check_ranges(settings: Any) -> None:
    """Refuse numbers outside their range, NaN, and infinity, among the fields of a dataclass.

    Raises:
        UserError: names the flag, its value and what is allowed.
    """
    for setting_field in fields(settings):
        name, value = setting_field.name, getattr(settings, setting_field.name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if value != value or (value in (INFINITY, -INFINITY) and name != "max_grad_norm"):
            raise UserError(f"--{name} {value}: give a finite number")
        if value < LOWEST.get(name, -INFINITY) or value > HIGHEST.get(name, INFINITY):
            highest = f", at most {HIGHEST[name]}" if name in HIGHEST else ""
            raise UserError(f"--{name} {value}: give at least {LOWEST[name]}{highest}")
        counts = getattr(settings, name.replace("_steps", "_strategy"), None) == "steps" or name == "num_train_epochs"
        if name in ABOVE_ZERO and counts and value <= 0:
            raise UserError(f"--{name} {value}: give a number above 0")


# Mappings, on the command line as JSON; the last three can also name a file.
JSON_SETTINGS = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs",
                 "accelerator_config", "fsdp_config", "deepspeed")  # fmt: skip


def _check_json(name: str, value: Any) -> None:
    """Refuse a text that is neither a mapping in JSON nor, where that is allowed, a file."""
    if not isinstance(value, str) or (name in JSON_SETTINGS[-3:] and Path(value).is_file()):
        return
    try:
        content, problem = json.loads(value), "not a mapping"
    except ValueError as error:
        content, problem = None, f"not valid JSON ({error})"
    if not isinstance(content, dict):
        or_file = " or the path of a file" if name in JSON_SETTINGS[-3:] else ""
        raise UserError(f"--{name} {value}: {problem}; give a mapping such as '{{\"name\": 1}}'{or_file}")


@dataclass
class ModelArguments:
    """Which weights and which tokenizer."""

    model_name_or_path: str | None = setting(None, "Hub id or folder of a model, e.g. openai-community/gpt2.")
    model_revision: str = setting("main", "Branch, tag or commit of a Hub model.")
    tokenizer_name: str | None = setting(None, "Hub id or folder of the tokenizer; default: the model's own.")
    model_type: str | None = setting(None, "Start from random weights of this architecture (gpt2, llama, ...) instead.")
    config_overrides: str | None = setting(None, "Changes to the model's config: n_layer=2,resid_pdrop=0.0")
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "Type of the weights in memory; --bf16 true adds mixed precision."
    )
    attn_implementation: str | None = setting(
        None, "sdpa, eager, flash_attention_2, ...; default: as --batching needs."
    )


@dataclass
class DataArguments:
    """Which records, how they are split, and how a record becomes tokens."""

    data: dict | str | list | None = setting(
        None,
        "Records: a file (json, jsonl, csv, parquet), a glob, a folder or a Hub dataset id; or a mapping "
        'from split to files, {"train": "a.jsonl", "test": "b.jsonl"}.',
    )
    instruction_column: str = setting("instruction", "Column of the instruction.")
    input_column: str = setting("input", "Column of the optional input.")
    output_column: str = setting("output", "Column of the response to learn.")
    validation_ratio: float = setting(0.05, "Share of the training records for validation if the data names no split.")
    test_ratio: float = setting(0.10, "Share of the training records for testing if the data names no split.")
    split_seed: int = setting(123, "Seed of the split, apart from the seed of training.")
    template: str = setting("alpaca", "alpaca, phi3 or the path of a Jinja chat template.")
    mask_prompt: bool = setting(True, "Learn from the response only, not from the prompt.")
    max_length: int | None = setting(None, "Longest record in tokens; default: what tokenizer and model allow.")
    overflow: Literal["truncate", "drop", "error"] = setting("truncate", "What to do with records over max_length.")
    batching: Literal["padded", "shared_prefix"] = setting(
        "padded",
        "Layout of a batch: rows padded to the longest, or one row in which a shared beginning of prompts is stored "
        "once (same losses and gradients, faster).",
    )
    num_proc: int | None = setting(None, "Processes that tokenize; default: this one.")

    def __post_init__(self) -> None:
        if isinstance(self.data, str) and self.data.lstrip()[:1] in ("{", "["):
            try:
                self.data = json.loads(self.data)
            except json.JSONDecodeError as error:
                raise UserError(f"--data {self.data}: not valid JSON ({error})") from error
        check_ranges(self)
        validation, test = self.validation_ratio, self.test_ratio
        if min(validation, test) < 0 or validation + test >= 1:
            raise UserError(
                f"--validation_ratio {validation}, --test_ratio {test}: give shares from 0 up, below 1 together"
            )
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"--max_length {self.max_length}: a record needs at least 2 tokens")


@dataclass
class InstructionTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults instruction tuning needs, and a few fields more."""

    # The data step hands over only columns that are needed; `row` must reach the trainer to name a bad batch.
    remove_unused_columns: bool = setting(False, "Drop columns the model does not take.")
    # The stock filter hides NaN and costs a device sync per step; InstructionTrainer stops on NaN instead.
    logging_nan_inf_filter: bool = setting(False, "Hide NaN and Inf losses in the log.")
    # Kept in the saved config, so that the model generates fast; InstructionTrainer itself trains without a cache.
    use_cache: bool = setting(True, "Whether the saved model generates with a KV cache.")
    # The Trainer's own default searches the graph at each step for parameters that a causal model does not have.
    ddp_find_unused_parameters: bool | None = setting(False, "For models in which the loss leaves parameters unused.")
    max_tokens_per_batch: int | None = setting(
        None,
        "Token budget: each batch of a process takes as many records of similar length as fit into this many input "
        "tokens, padding included. Bounds memory, and replaces per_device_train_batch_size.",
    )
    overwrite_output_dir: bool = setting(False, "Start over in an output_dir that holds another run, replacing it.")
    num_sample_generations: int = setting(3, "Validation prompts whose answers each evaluation shows; 0 for none.")
    eval_generate: bool = setting(
        False,
        "Answer the validation prompts at each evaluation and score the answers; metric_for_best_model may then be "
        "exact_match, token_f1, rouge_l, chrf, ...",
    )
    generation_max_new_tokens: int = setting(128, "Longest response of eval_generate, in tokens.")

    def __post_init__(self) -> None:
        if self.hub_token is not None:
            raise UserError(
                "--hub_token would be saved in training_args.bin; set the environment variable HF_TOKEN or run "
                "`hf auth login` instead"
            )
        if self.label_smoothing_factor:
            raise UserError(f"--label_smoothing_factor {self.label_smoothing_factor}: it shifts labels again; use 0")
        check_ranges(self)
        for name in JSON_SETTINGS:
            _check_json(name, getattr(self, name))
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"--max_steps {self.max_steps}: give at least 1, or leave it out for --num_train_epochs")
        if (
            self.greater_is_better is None
            and (self.metric_for_best_model or "").removeprefix("eval_") in LOWER_IS_BETTER
        ):
            self.greater_is_better = False  # transformers would know it of names that end in "loss" alone
        if self.max_tokens_per_batch is not None:
            clashing = [name for name in ("dataloader_drop_last", "auto_find_batch_size") if getattr(self, name)]
            if self.train_sampling_strategy in ("sequential", "batch_rebalance"):
                clashing.append(f"train_sampling_strategy {self.train_sampling_strategy}")
            if clashing:
                raise UserError(
                    f"--max_tokens_per_batch decides what forms a batch: leave out --{', --'.join(clashing)}"
                )
        compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()  # of the accelerate file
        if compiler != "no" and not self.torch_compile:  # so that all that asks whether we compile is told
            self.torch_compile, self.torch_compile_backend = True, compiler
        # without an accelerator the CPU is meant, also for several processes (DDP over gloo)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if torch.cuda.is_available() and self.dataloader_pin_memory and self.accelerator_config is None:
            # a blocking copy would wait for the step before it; now the host prepares the next batch meanwhile
            self.accelerator_config = {"non_blocking": True}
        super().__post_init__()


def parse_arguments(
    dataclass_types: list[type], argv: list[str], description: str, defaults: dict[str, Any] | None = None
) -> tuple:
    """Fill `dataclass_types` from `[CONFIG.yaml] --flag value …`: `defaults`, over them the YAML file, then the flags.

    >>> model, data = parse_arguments([ModelArguments, DataArguments], ["--data", "a.json", "--max_length", "64"], "")
    >>> data.data, data.max_length, data.template
    ('a.json', 64, 'alpaca')

    Raises:
        UserError: a file that cannot be read, unknown keys or flags (each with its nearest known name), a wrong type.
    """
    usage = "%(prog)s [CONFIG.yaml] [--flag value ...]"
    options: Any = {"description": description, "usage": usage, "allow_abbrev": False, "exit_on_error": False}
    parser = HfArgumentParser(dataclass_types, **options)  # type: ignore[arg-type]
    known = {f.name: f.default for dataclass_type in dataclass_types for f in fields(dataclass_type) if f.init}
    config_path = argv[0] if argv and not argv[0].startswith("-") else None
    flags = argv[1:] if config_path else argv
    settings = defaults or {}
    if config_path:
        content = _read_yaml(config_path)
        _check_keys(content, known, config_path)
        _check_types(content, dataclass_types, config_path)
        _drop_replaced_model(content, flags)
        settings = {**settings, **content}

    # Lists and mappings are checked here; everything else goes through the type checks of the flags.
    values = Namespace(**{name: value for name, value in settings.items() if isinstance(value, list | dict)})
    as_flags = [f"--{name}={value}" for name, value in settings.items() if name not in values and value is not None]
    for source, words in ((config_path or "defaults", as_flags), ("command line", flags)):
        try:
            values, rest = parser.parse_known_args(words, values)
        except ArgumentError as error:
            raise UserError(f"{source}: {error}") from error
        _check_flags(rest, known)
    try:
        return parser.parse_dict(vars(values))
    except UserError:
        raise
    except Exception as error:  # TrainingArguments checks that its fields go together, and starts the device
        raise UserError(f"{config_path or 'command line'}: {' '.join(str(error).split())}") from error


def _check_flags(rest: list[str], known: Collection[str]) -> None:
    """Refuse what the parser has left of the command line; without values, which may be secrets."""
    unknown = [word.split("=")[0] for word in rest if word.startswith("--")]
    problems = [f"unknown flag {flag}{_what_instead(flag.strip('-').replace('-', '_'), known)}" for flag in unknown]
    if rest:
        problems = problems or [f"unexpected {rest[0]!r}; write --flag value"]
        raise UserError("\n".join(f"command line: {problem}" for problem in problems))


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        content: Any = yaml.safe_load(text)
        node: Any = yaml.compose(text)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(content).__name__}")
    if (repeated := _repeated_key(node)) is not None:
        raise UserError(f"{path} line {repeated.start_mark.line + 1}: the key {repeated.value!r} is repeated; keep one")
    return content


def _repeated_key(node: yaml.Node) -> yaml.Node | None:
    """The first key that is twice in a mapping, at any depth; of a repeated key, PyYAML keeps the last value."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    names = [key.value for key, _ in pairs]
    again = [key for index, (key, _) in enumerate(pairs) if key.value in names[:index]]
    inner = [value for _, value in pairs] or (node.value if isinstance(node, yaml.SequenceNode) else [])
    return next(iter([*again, *filter(None, map(_repeated_key, inner))]), None)


def _check_keys(content: dict[str, Any], known: dict[str, Any], path: str) -> None:
    """Refuse unknown keys, and null for a setting that has a value by default; `known` holds the defaults."""
    problems = []
    for key, value in content.items():
        if key not in known:
            problems.append(f"{path}: unknown key {key!r}{_what_instead(str(key), known)}")
        elif value is None and known[key] is not None:
            problems.append(f"{path}: {key!r} is null; give a value, or leave the key out for {known[key]!r}")
    if problems:
        raise UserError("\n".join(problems))


def _check_types(content: dict[str, Any], dataclass_types: list[type], path: str) -> None:
    """Refuse lists and mappings where a setting takes none; scalars are checked as flags are."""
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    problems = [
        f"{path}: {key}: {json.dumps(value, default=str)} is {_kind(value)}; give {_wanted(hints[key])}"
        for key, value in content.items()
        if isinstance(value, list | dict) and not _fits(value, hints[key])
    ]
    if problems:
        raise UserError("\n".join(problems))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file is what a type hint says, with the values of a list, but not of a mapping.

    >>> _fits([1], int | None), _fits([1, 2], list[int]), _fits(["a"], list[int] | None), _fits({"a": 1}, dict | str)
    (False, True, False, True)
    """
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, arm) for arm in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(element, get_args(hint)[0]) for element in value)
    plain = get_origin(hint) or hint
    if plain in (int, float):
        return isinstance(value, plain | int) and not isinstance(value, bool)
    return plain is Any or (isinstance(plain, type) and isinstance(value, plain))


def _kind(value: Any) -> str:
    names = {type(element).__name__ for element in value} if isinstance(value, list) else ()
    return f"a list of {' and '.join(sorted(names)) or 'nothing'}" if isinstance(value, list) else "a mapping"


def _wanted(hint: Any) -> str:
    """A type hint in words: `int | None` is "one whole number or null"."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_wanted, get_args(hint))))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list, each {_wanted(get_args(hint)[0])}"
    words = {int: "one whole number", float: "one number", bool: "true or false", str: "one text", dict: "a mapping",
             list: "a list", NoneType: "null"}  # fmt: skip
    plain = get_origin(hint) or hint
    return words.get(plain, "one text")


def _what_instead(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown setting: what took its place, or the nearest known name."""
    return f"; use {REPLACED[name]}" if name in REPLACED else did_you_mean(name, known)


def did_you_mean(name: str, known: Collection[str], otherwise: str = "; see --help for all names") -> str:
    """The end of a message about an unknown name: the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else otherwise


def _drop_replaced_model(content: dict[str, Any], flags: list[str]) -> None:
    """Remove from the file's settings the model that a flag replaces.

    `--model_type` keeps the tokenizer of the file's model; `--model_name_or_path` brings its own.
    """
    named = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
    if "model_type" in named and "model_name_or_path" not in named:
        content.setdefault("tokenizer_name", content.pop("model_name_or_path", None))
    elif "model_name_or_path" in named and "model_type" not in named:
        content.pop("model_type", None)
        content.pop("tokenizer_name", None)
