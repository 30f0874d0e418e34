"""What a value of a setting may be, and what to say about one that is not, or about a name that is not known."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

INFINITY = float("inf")
# The lowest value of settings that have one. Libraries would take a lower one without a word, or fail in the middle.
LOWEST: dict[str, float] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                     "generation_max_new_tokens", "max_tokens_per_batch", "eval_accumulation_steps",
                     "torch_empty_cache_steps", "save_total_limit", "dataloader_prefetch_factor", "ddp_bucket_cap_mb",
                     "ddp_timeout", "num_proc", "lora_r", "lora_alpha", "shuffle_buffer"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm",
                     "warmup_steps", "eval_delay", "num_sample_generations", "dataloader_num_workers",
                     "neftune_noise_alpha", "seed", "data_seed", "lora_dropout", "max_bad_records"), 0),
}  # fmt: skip
# below 1 the last three are shares; without an epsilon, Adam divides 0 by 0 where a gradient is 0
ABOVE_ZERO = ("num_train_epochs", "adam_epsilon", "logging_steps", "eval_steps", "save_steps")
# seeds as numpy takes them; more processes, or batches for each, would be started until the machine is full
HIGHEST = {"adam_beta1": 1, "adam_beta2": 1, "seed": 2**32 - 1, "data_seed": 2**32 - 1, "num_sample_generations": 10**6,
           "lora_dropout": 1,
           **dict.fromkeys(("dataloader_num_workers", "dataloader_prefetch_factor", "num_proc"), 1024)}  # fmt: skip
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


def range_problem(name: str, value: Any, settings: Any) -> str | None:
    """What is wrong with a number: outside its range, NaN or infinite; steps count under the strategy "steps" alone."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if value != value or (value in (INFINITY, -INFINITY) and name != "max_grad_norm"):
        return "give a finite number"
    if value < LOWEST.get(name, -INFINITY) or value > HIGHEST.get(name, INFINITY):
        return f"give at least {LOWEST[name]}" + (f", at most {HIGHEST[name]}" if name in HIGHEST else "")
    is_step = name.endswith("_steps")
    counts = not is_step or getattr(settings, name.replace("_steps", "_strategy"), None) == "steps"
    return "give a number above 0" if name in ABOVE_ZERO and counts and value <= 0 else None


# Mappings, on the command line as JSON; the last three can also name a file.
JSON_SETTINGS = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs",
                 "accelerator_config", "fsdp_config", "deepspeed")  # fmt: skip


def json_problem(name: str, value: Any) -> str | None:
    """What is wrong with a text in the place of a mapping: it is neither JSON nor, where that is allowed, a file."""
    may_be_file = name in JSON_SETTINGS[-3:]
    if name not in JSON_SETTINGS or not isinstance(value, str) or (may_be_file and os.path.isfile(value)):
        return None
    try:
        problem = None if isinstance(json.loads(value), dict) else "not a mapping"
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON ({error})"
    or_file = " or the path of a file" if may_be_file else ""
    return problem and f"{problem}; give a mapping such as '{{\"name\": 1}}'{or_file}"


def type_problem(name: str, value: Any, hint: Any) -> str | None:
    """What is wrong with a list or a mapping of a YAML file.

    >>> type_problem("max_length", [64], int | None)
    'max_length: [64] is a list of int; give one whole number or null'
    """
    if _fits(value, hint):
        return None
    return f"{name}: {json.dumps(value, default=str)} is {_kind(value)}; give {_wanted(hint)}"


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


def what_instead(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown setting: what took its place, or the nearest known name."""
    return f"; use {REPLACED[name]}" if name in REPLACED else did_you_mean(name, known)


def did_you_mean(name: str, known: Collection[str], otherwise: str = "; see --help for all names") -> str:
    """The end of a message about an unknown name: the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else otherwise
