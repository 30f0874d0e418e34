"""The settings of a run: dataclasses, filled from one YAML file and the command line (flags win).

Every field of transformers' `TrainingArguments` is a YAML key and a flag too.
"""

from __future__ import annotations

import json
import os
import re
from argparse import ArgumentError, Namespace
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Literal, get_args, get_type_hints

import torch
from transformers import HfArgumentParser, TrainingArguments

from recipe.config_file import ConfigFileError, read_config
from recipe.peers import meeting_others
from recipe.precision import is_native
from recipe.setting_checks import json_problem, range_problem, type_problem, what_instead


class UserError(Exception):
    """An error the user can fix: scripts print its text alone, without a traceback, and exit with 1."""


def setting(default: Any, help: str) -> Any:
    """A dataclass field: its default, or a function that makes it, and its text in `--help`."""
    return field(**{"default_factory" if callable(default) else "default": default}, metadata={"help": help})


RUN_CODE = "Run the code that a model's folder or repository brings along; look at it before."
LOWER_IS_BETTER = ("loss", "perplexity", "repeated_4grams", "empty_rate")  # of the metrics of an evaluation


def check_values(settings: Any) -> None:
    """Refuse values that no setting of this name can have.

    Raises:
        UserError: names the flag, its value and what is allowed.
    """
    for name, value in vars(settings).items():
        if problem := range_problem(name, value, settings) or json_problem(name, value):
            raise UserError(f"--{name} {value}: {problem}")


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
    trust_remote_code: bool = setting(False, RUN_CODE)


@dataclass
class LoraArguments:
    """An adapter beside frozen weights, in place of full fine-tuning; the words are those of `peft.LoraConfig`."""

    lora_r: int | None = setting(None, "Rank of a LoRA adapter; unset: all weights of the model are trained.")
    lora_alpha: int = setting(32, "The adapter counts lora_alpha / lora_r times, with use_rslora / sqrt(lora_r).")
    lora_dropout: float = setting(0.0, "Share of an adapter's inputs that training leaves out.")
    lora_target_modules: list[str] | None = setting(
        None, "Names of the layers to adapt, or all-linear (all but the head); default: PEFT's for the architecture."
    )
    use_rslora: bool = setting(False, "Scale the adapter by the root of its rank (rsLoRA).")
    use_dora: bool = setting(False, "Learn the length of each output's weights too (DoRA); slower.")
    load_in_4bit: bool = setting(False, "Keep the frozen weights in 4 bits (QLoRA); needs a CUDA GPU and bitsandbytes.")

    def __post_init__(self) -> None:
        check_values(self)
        asked = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if asked and self.lora_r is None:
            raise UserError(f"--{', --'.join(asked)}: for adapters alone; add --lora_r 16, or leave it out")


@dataclass
class DataArguments:
    """Which records, how they are split, and how a record becomes tokens."""

    data: dict | str | list | None = setting(
        None,
        "Records: a file (json, jsonl, csv, parquet), a glob, a folder or a Hub dataset id; or a mapping "
        'from split to files, {"train": "a.jsonl", "test": "b.jsonl"}; or a mixture, '
        '[{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl", "weight": 1}].',
    )
    instruction_column: str = setting("instruction", "Column of the instruction.")
    input_column: str = setting("input", "Column of the optional input.")
    output_column: str = setting("output", "Column of the response to learn.")
    messages_column: str | None = setting(
        None,
        "Column of the turns of conversations; default: messages or conversations, where records have no instruction "
        "and output.",
    )
    learn: Literal["all", "last"] = setting("all", "Which of a conversation's assistant turns to learn.")
    validation_ratio: float = setting(0.05, "Share of the training records for validation if the data names no split.")
    test_ratio: float = setting(0.10, "Share of the training records for testing if the data names no split.")
    split_seed: int = setting(123, "Seed of the split, apart from the seed of training.")
    template: str = setting(
        "alpaca", "alpaca, phi3, chatml, tokenizer (the one it brings), or the path of a Jinja chat template."
    )
    mask_prompt: bool = setting(True, "Learn from the response only, not from the prompt.")
    max_length: int | None = setting(None, "Longest record in tokens; default: what tokenizer and model allow.")
    overflow: Literal["truncate", "drop", "error"] = setting("truncate", "What to do with records over max_length.")
    batching: Literal["padded", "shared_prefix"] = setting(
        "padded",
        "Layout of a batch: rows padded to the longest, or one row in which a shared beginning of prompts is stored "
        "once (same losses and gradients, faster).",
    )
    bad_records: Literal["error", "drop"] = setting(
        "error", "Refuse data with bad records, or leave these out, count them, and write them to bad_records.jsonl."
    )
    num_proc: int | None = setting(None, "Processes that tokenize; default: this one.")
    streaming: bool = setting(False, "Read records while training, for data beyond memory and disk; needs max_steps.")
    shuffle_buffer: int = setting(
        10_000, "With streaming: records among which the next one is drawn; 1 keeps the order."
    )
    max_bad_records: int | None = setting(
        None, "With streaming and bad_records drop: stop when more records than this are bad; default: never."
    )

    def __post_init__(self) -> None:
        if isinstance(self.data, str) and self.data.lstrip()[:1] in ("{", "["):
            try:
                self.data = json.loads(self.data)
            except (ValueError, RecursionError) as error:  # also an integer of 5,000 digits
                raise UserError(f"--data {self.data}: not valid JSON ({error})") from error
        check_values(self)
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
    bf16: bool | None = setting(  # type: ignore[assignment]
        False,
        "Mixed precision in bfloat16. Unset in file and flags, it is on where the device has instructions for bfloat16 "
        "and nothing else asks for a precision; in Python that is None, and False is the default.",
    )
    # The Trainer's own default searches the graph at each step for parameters that a causal model does not have.
    ddp_find_unused_parameters: bool | None = setting(False, "For models in which the loss leaves parameters unused.")
    max_tokens_per_batch: int | None = setting(
        None,
        "Token budget: each batch of a process takes as many records of similar length as the model computes in this "
        "many input tokens, as batching lays them out. Bounds memory, and replaces per_device_train_batch_size.",
    )
    overwrite_output_dir: bool = setting(False, "Start over in an output_dir that holds another run, replacing it.")
    allow_changed: list[str] | None = setting(
        None, "With --resume_from_checkpoint: names of settings that may differ from the run's, and data."
    )
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
                "--hub_token would be in the list of processes and in the history of the shell; set the environment "
                "variable HF_TOKEN or run `hf auth login` instead"
            )
        if self.label_smoothing_factor:
            raise UserError(f"--label_smoothing_factor {self.label_smoothing_factor}: it shifts labels again; use 0")
        check_values(self)
        if self.allow_changed and (self.resume_from_checkpoint or "false").lower() == "false":
            raise UserError("--allow_changed is for --resume_from_checkpoint; a new run takes any settings")
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
        chosen = self.bf16 is None and self._may_choose_precision()
        if self.bf16 is None:
            self.bf16 = chosen and is_native(torch.bfloat16, "cpu" if self.use_cpu else _accelerator())
        if torch.cuda.is_available() and self.dataloader_pin_memory and self.accelerator_config is None:
            # a blocking copy would wait for the step before it; now the host prepares the next batch meanwhile
            self.accelerator_config = {"non_blocking": True}
        with meeting_others():
            super().__post_init__()
        if chosen:
            self.bf16 = None  # what was asked; `mixed_precision` is what came of it

    def _may_choose_precision(self) -> bool:
        """Whether neither a flag, nor accelerate's file, nor one of DeepSpeed asks for a precision.

        "no" in accelerate's file asks for none: it is what `accelerate launch` sets where nothing is said.
        """
        by_deepspeed = self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
        return not (self.fp16 or by_deepspeed) and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no"


def _accelerator() -> str:
    device = torch.accelerator.current_accelerator()
    return "cpu" if device is None else device.type


def parse_arguments(
    dataclass_types: list[type], argv: list[str], description: str, defaults: dict[str, Any] | None = None,
    defaults_from: str = "defaults",
) -> tuple:  # fmt: skip
    """Fill `dataclass_types` from `[CONFIG.yaml] --flag value …`: `defaults`, over them the YAML file, then the flags.

    A default of None reaches the dataclass, also where its own default is another.

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
    known |= {name: None for name, value in settings.items() if value is None and name in known}
    _check_keys(settings, known, defaults_from)
    _check_types(settings, dataclass_types, defaults_from)
    if config_path:
        try:
            content, written = read_config(config_path)
        except ConfigFileError as error:
            raise UserError(str(error)) from error
        _check_keys(content, known, config_path)
        _check_types(content, dataclass_types, config_path)
        content = _as_asked(content, written, dataclass_types)
        _drop_replaced_model(content, flags)
        settings = {**settings, **content}

    # Lists and mappings are checked here; everything else goes through the type checks of the flags.
    kept = {name: value for name, value in settings.items() if value is None or isinstance(value, list | dict)}
    values = Namespace(**kept)
    as_flags = [f"--{name}={value}" for name, value in settings.items() if name not in values]
    for source, words in ((config_path or defaults_from, as_flags), ("command line", flags)):
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
        said = " ".join(str(error).split())
        raise UserError(f"{_source_of(said, known, config_path, flags)}: {said}") from error


def _source_of(said: str, known: Collection[str], config_path: str | None, flags: list[str]) -> str:
    """Where the settings stand that an error names: in flags, in the config file, or in both."""
    # a class such as AcceleratorConfig is named in the place of its setting
    words = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower() for word in re.findall(r"\w+", said)}
    of_flags = words & set(known) & {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags}
    if config_path is None or not of_flags:
        return config_path or "command line"
    return f"command line: {', '.join(f'--{name}' for name in sorted(of_flags))}"


def _check_flags(rest: list[str], known: Collection[str]) -> None:
    """Refuse what the parser has left of the command line; without values, which may be secrets."""
    unknown = [word.split("=")[0] for word in rest if word.startswith("--")]
    problems = [f"unknown flag {flag}{what_instead(flag.strip('-').replace('-', '_'), known)}" for flag in unknown]
    if rest:
        problems = problems or [f"unexpected {rest[0]!r}; write --flag value"]
        raise UserError("\n".join(f"command line: {problem}" for problem in problems))


def _check_keys(content: dict[str, Any], known: dict[str, Any], path: str) -> None:
    """Refuse unknown keys, and null for a setting that has a value by default; `known` holds the defaults."""
    problems = []
    for key, value in content.items():
        if key not in known:
            problems.append(f"{path}: unknown key {key!r}{what_instead(str(key), known)}")
        elif value is None and known[key] is not None:
            problems.append(f"{path}: {key!r} is null; give a value, or leave the key out for {known[key]!r}")
    if problems:
        raise UserError("\n".join(problems))


def _check_types(content: dict[str, Any], dataclass_types: list[type], path: str) -> None:
    """Refuse lists and mappings where a setting takes none; scalars are checked as flags are."""
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    values = {key: value for key, value in content.items() if isinstance(value, list | dict)}
    problems = [
        f"{path}: {problem}" for key, value in values.items() if (problem := type_problem(key, value, hints[key]))
    ]
    if problems:
        raise UserError("\n".join(problems))


def _as_asked(content: dict[str, Any], written: dict[str, str], dataclass_types: list[type]) -> dict[str, Any]:
    """Truth values and numbers where a setting takes some; else what is written: a folder `no`, a revision `0123`."""
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    asked = {}
    for key, value in content.items():
        takes = {*get_args(hints[key]), hints[key]}
        is_asked = bool in takes if isinstance(value, bool) else isinstance(value, int | float) and takes & {int, float}
        if value is False and any(isinstance(kind, type) and issubclass(kind, Enum) for kind in takes):
            asked[key] = "no"  # of several choices, also where it is written as `off`
        else:
            asked[key] = value if value is None or is_asked else written.get(key, value)
    return asked


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
