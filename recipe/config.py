"""What a run can be told: dataclasses, filled from one YAML file and the command line (flags win).

`TrainingArguments` of transformers goes straight through: every one of its fields is a YAML key and a flag.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments


class UserError(Exception):
    """Something the user can mend; scripts print its text alone, without a traceback, and exit with 1."""


@dataclass
class ModelArguments:
    """Which weights and which tokenizer."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a causal language model, e.g. openai-community/gpt2."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub model."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the tokenizer, if it is not the model's."}
    )
    model_type: str | None = field(
        default=None,
        metadata={
            "help": "Random weights from this architecture's config (gpt2, llama, ...) instead of a trained model."
        },
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the model's config: n_layer=2,resid_pdrop=0.0"}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of the weights in memory. Use --bf16 true for mixed precision on top."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "sdpa, eager, flash_attention_2, ...; default: what transformers picks; with --batching "
            "shared_prefix the recipe's own, or sdpa."
        },
    )


@dataclass
class DataArguments:
    """Which records, how they are split, and how a record becomes tokens."""

    data: dict | str | list | None = field(
        default=None,
        metadata={
            "help": "Records: a file (json, jsonl, csv, parquet), a glob, a folder or a Hub dataset id; or a mapping "
            'from split to files, {"train": "a.jsonl", "test": "b.jsonl"}.'
        },
    )
    instruction_column: str = field(default="instruction", metadata={"help": "Column of the instruction."})
    input_column: str = field(default="input", metadata={"help": "Column of the optional input."})
    output_column: str = field(default="output", metadata={"help": "Column of the response to learn."})
    validation_ratio: float = field(
        default=0.05, metadata={"help": "Share of the training records for validation where the data names none."}
    )
    test_ratio: float = field(
        default=0.10, metadata={"help": "Share of the training records for testing where the data names none."}
    )
    split_seed: int = field(default=123, metadata={"help": "Seed of the split, apart from the seed of training."})
    template: str = field(default="alpaca", metadata={"help": "alpaca, phi3 or the path of a Jinja chat template."})
    mask_prompt: bool = field(default=True, metadata={"help": "Learn from the response only, not from the prompt."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest record in tokens; default: the tokenizer's model_max_length."}
    )
    overflow: Literal["truncate", "drop", "error"] = field(
        default="truncate", metadata={"help": "What happens to a record longer than max_length."}
    )
    batching: Literal["padded", "shared_prefix"] = field(
        default="padded",
        metadata={
            "help": "How a batch is laid out: rows padded to the longest, or one row in which what the prompts begin "
            "with stands once (same losses and gradients, faster)."
        },
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize; default: this one."})

    def __post_init__(self) -> None:
        if isinstance(self.data, str) and self.data.lstrip()[:1] in ("{", "["):
            try:
                self.data = json.loads(self.data)
            except json.JSONDecodeError as error:
                raise UserError(f"--data {self.data}: not valid JSON ({error})") from error
        for name in ("validation_ratio", "test_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give a share from 0 up to, but not including, 1")
        if self.validation_ratio + self.test_ratio >= 1:
            raise UserError(
                f"--validation_ratio {self.validation_ratio} and --test_ratio {self.test_ratio} leave no train split"
            )
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"--max_length {self.max_length}: a record needs at least 2 tokens")


@dataclass
class InstructionTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults instruction tuning needs, and a few fields more."""

    # The data step hands over only columns that are needed; `row` must reach the trainer to name a bad batch.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not take."})
    # The stock filter hides NaN and costs a device sync per step; InstructionTrainer stops on NaN instead.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and Inf losses in the log."})
    # Kept in the saved config, so that the model generates fast; InstructionTrainer itself trains without a cache.
    use_cache: bool = field(default=True, metadata={"help": "Whether the saved model generates with a KV cache."})
    # The Trainer's own default searches the graph at each step for parameters that a causal model does not have.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "For models of which some parameters take no part in the loss."}
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Token budget: each batch of a process takes as many records of like length as fit into this many "
            "input tokens, padding included. Bounds memory. Replaces per_device_train_batch_size, which then means "
            "nothing; the loss stays the mean over the supervised tokens of a step."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start over in an output_dir that holds another run, replacing it."}
    )
    num_sample_generations: int = field(
        default=3, metadata={"help": "Validation prompts answered, shown and saved at each evaluation; 0 for none."}
    )

    eval_generate: bool = field(
        default=False,
        metadata={
            "help": "Answer the validation prompts at each evaluation and score the answers; metric_for_best_model may "
            "then be exact_match, token_f1, rouge_l, chrf, ..."
        },
    )
    generation_max_new_tokens: int = field(
        default=128, metadata={"help": "Cap on each response of eval_generate, in tokens."}
    )

    def __post_init__(self) -> None:
        if self.hub_token is not None:
            raise UserError(
                "--hub_token would be written in clear into training_args.bin; "
                "set the environment variable HF_TOKEN or run `hf auth login` instead"
            )
        if self.label_smoothing_factor:
            raise UserError(
                f"--label_smoothing_factor {self.label_smoothing_factor}: the Trainer's label smoothing shifts labels "
                "that are shifted already; leave it at 0"
            )
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "generation_max_new_tokens",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give at least 1")
        if self.max_tokens_per_batch is not None:
            self._check_token_budget(self.max_tokens_per_batch)
        if not 0 <= self.learning_rate < float("inf"):
            raise UserError(f"--learning_rate {self.learning_rate}: give a number from 0 up")
        # without an accelerator the CPU is meant, also for several processes (DDP over gloo)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if torch.cuda.is_available() and self.dataloader_pin_memory and self.accelerator_config is None:
            # a copy that waits would wait for the whole step before; so the host makes the next batch meanwhile
            self.accelerator_config = {"non_blocking": True}
        super().__post_init__()

    def _check_token_budget(self, max_tokens: int) -> None:
        budget = f"--max_tokens_per_batch {max_tokens}"
        if max_tokens < 1:
            raise UserError(f"{budget}: give at least 1")
        if self.train_sampling_strategy in ("sequential", "batch_rebalance"):
            raise UserError(
                f"{budget} makes batches of records of like length, --train_sampling_strategy "
                f"{self.train_sampling_strategy} others: leave out one of the two"
            )
        if self.dataloader_drop_last:
            raise UserError(f"{budget} leaves no record out: set --dataloader_drop_last false, or use a batch size")
        if self.auto_find_batch_size:
            raise UserError(
                f"{budget} makes batches by tokens, --auto_find_batch_size by records: leave out one of the two"
            )


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(message)


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
    parser = _Parser(
        dataclass_types,  # type: ignore[arg-type]
        description=description,
        allow_abbrev=False,
        usage="%(prog)s [CONFIG.yaml] [--flag value ...]",
    )
    known = sorted({f.name for dataclass_type in dataclass_types for f in fields(dataclass_type) if f.init})
    config_path = argv[0] if argv and not argv[0].startswith("-") else None
    flags = argv[1:] if config_path else argv

    settings = dict(defaults or {})
    if config_path:
        content = _read_yaml(config_path)
        _check_keys(content, dataclass_types, config_path)
        _let_flags_choose_the_model(content, flags)
        settings |= content
    # lists and mappings are taken as they are; everything else goes through the flags' type checks
    structured = {name: value for name, value in settings.items() if isinstance(value, list | dict)}
    config_argv = [
        f"--{name}={_as_flag(v)}" for name, v in settings.items() if v is not None and name not in structured
    ]
    _parse(parser, config_argv, known, where=config_path or "defaults")
    _parse(parser, flags, known, where="command line")
    values = vars(parser.parse_args(config_argv + flags))
    values |= {name: value for name, value in structured.items() if name not in _named_flags(flags)}
    try:
        return tuple(
            dataclass_type(**{f.name: values[f.name] for f in fields(dataclass_type) if f.init})
            for dataclass_type in dataclass_types
        )
    except (ValueError, ImportError, OSError) as error:  # TrainingArguments checks that its fields go together
        raise UserError(f"{config_path or 'command line'}: {error}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error and not the last one's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(content).__name__}")
    return content


def _check_keys(content: dict[str, Any], dataclass_types: list[type], path: str) -> None:
    """Refuse unknown keys, and null where a field has a value by default."""
    defaults = {f.name: f.default for dataclass_type in dataclass_types for f in fields(dataclass_type) if f.init}
    problems = [
        f"{path}: unknown key {key!r}{_did_you_mean(str(key), sorted(defaults))}"
        for key in content
        if key not in defaults
    ]
    problems += [
        f"{path}: {key!r} is null; give a value, or leave the key out for {defaults[key]!r}"
        for key, value in content.items()
        if value is None and defaults.get(key) is not None
    ]
    if problems:
        raise UserError("\n".join(problems))


def _named_flags(flags: list[str]) -> set[str]:
    return {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}


def _as_flag(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _let_flags_choose_the_model(content: dict[str, Any], flags: list[str]) -> None:
    """A `--model_type` flag wins over the file's `model_name_or_path` (which still names the tokenizer).

    A `--model_name_or_path` flag wins over the file's `model_type` and its tokenizer.
    """
    named = _named_flags(flags)
    if "model_type" in named and "model_name_or_path" not in named:
        replaced = content.pop("model_name_or_path", None)
        if replaced is not None:
            content.setdefault("tokenizer_name", replaced)
    elif "model_name_or_path" in named and "model_type" not in named:
        content.pop("model_type", None)
        content.pop("tokenizer_name", None)


def _parse(parser: _Parser, argv: list[str], known: list[str], where: str) -> None:
    try:
        _, rest = parser.parse_known_args(argv)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if rest:
        raise UserError(
            "\n".join(
                f"{where}: unknown flag {name}{_did_you_mean(name.lstrip('-').replace('-', '_'), known)}"
                if name.startswith("--")  # without the value, which may be a secret
                else f"{where}: unexpected {word!r}; write --flag value"
                for word in rest
                for name in [word.split("=")[0]]
                if word.startswith("--") or not any(other.startswith("--") for other in rest)
            )
        )


def _did_you_mean(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "; see --help for all names"
