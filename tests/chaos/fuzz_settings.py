"""Configs and flags that users may hand to training: every setting with every kind of wrong value, damaged YAML, ..."""

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fuzzing import ROOT, Case, MisreadError, stop_at_first_step, train_script

from recipe.config import DataArguments, InstructionTrainingArguments, ModelArguments, parse_arguments

TYPES = [ModelArguments, DataArguments, InstructionTrainingArguments]
HINTS = {name: hint for kind in TYPES for name, hint in get_type_hints(kind).items()}
NAMES = [field.name for kind in TYPES for field in fields(kind) if field.init]
RECORDS = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}!"} for word in "abcdefgh"]
BASE = {
    "model_type": "gpt2", "tokenizer_name": str(ROOT / "recipe" / "demo" / "base"), "data": "records.jsonl",
    "config_overrides": "n_layer=1,n_embd=8,n_head=2,n_positions=128", "validation_ratio": "0.25", "test_ratio": "0",
    "max_length": "96", "max_steps": "2", "report_to": "none", "use_cpu": "true", "num_sample_generations": "1",
    "output_dir": "out", "disable_tqdm": "true", "per_device_train_batch_size": "2", "eval_strategy": "steps",
    "eval_steps": "1", "logging_steps": "1", "save_strategy": "steps", "save_steps": "1",
}  # fmt: skip
PLAIN = [
    "", "~", "null", "true", "false", "yes", "no", "on", "off", "True", "NO", "0", "-1", "1", "2", "3", "-0.0", "0.5",
    "1.5", "1e-3", "1.0e-3", "1e400", "-1e400", "1e-400", ".inf", "-.inf", ".nan", "inf", "nan", "010", "0o10", "0x10",
    "0b11", "1_000", "1:30", "1:30.5", "-5", "007", "+3", "2147483648", "9223372036854775808", "12345678901234567890",
    "9" * 400, "9" * 5000, "1." + "0" * 400, "2024-01-01", "2024-01-01 10:00:00", "2024-13-45",
    "2001-12-14t21:59:43.10-05:00", "abc", "é", "=", "a,b", "a=b", "a b", "None", "{}x", "%s", "~/x", "-", "--seed",
]  # fmt: skip
OTHERS = [
    "''", "' '", "'1'", "'true'", "'abc'", '"\\0"', '"\\ud800"', '"\\e[31mred"', '"a\\nb"', '"\\u202e"', '"\\uFEFF"',
    "'{}'", "'[]'", "'{\"a\": 1}'", "'" + "[" * 5000 + "'", "'" + '{"a":' * 5000 + "'", "{}", "[]", "[1]", "[abc]",
    "[null]", "[[1]]", "{a: 1}", "{1: a}", "{a: {b: {c: 1}}}", "{null: 1}", "{true: x}", "{[1]: 2}", "{a: .nan}",
    "[2024-01-01]", "!!binary aGk=", "!!binary x", "!!float x", "!!float 1", "!!int 3.5", "!!int x", "!!int ''",
    "!!bool maybe", "!!timestamp x", "!!timestamp 2024-01-01", "!!timestamp 2024-13-45", "!!set {a, b}",
    "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 5", "!!null x", "!!seq x", "!!map x", "!!python/none x",
    "!!python/object/apply:os.getcwd []", "!custom x", "&a [*a]", "&a {b: *a}", "*nowhere", "|\n  text\n  more",
    ">-\n  folded\n  text", "<<", "? x", "[" * 3000, "[" * 500 + "]" * 500, "a" * 100_000, "[" + "1," * 10_000 + "]",
    "{<<: 5}", "{<<: {a: 1}, a: 2}", "@x", "`x", "%x", "'unclosed", "x: y", "- 1",
]  # fmt: skip
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# what transformers makes of a value, by design
OTHERWISE = {"report_to", "eval_steps", "log_level", "log_level_replica", "logging_steps", "debug", "use_cpu", "fsdp",
             "warmup_steps", "disable_tqdm", "do_eval", "include_num_input_tokens_seen", "gradient_checkpointing",
             "activation_checkpointing"}  # fmt: skip


def prepare() -> Callable[[list[str]], None]:
    """In the process that others are forked from: import all that training needs."""
    import recipe.evaluation.measures
    import recipe.trainer
    import recipe.training.record  # noqa: F401

    stop_at_first_step()
    return train_script().main


def text_of(settings: dict[str, str]) -> str:
    return "".join(f"{name}: {value}\n" for name, value in settings.items())


def attempt(
    main: Callable, content: bytes, flags: list[str], written: dict[str, str], before: Callable, folder: Path
) -> None:
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / "run.yaml").write_bytes(content)
    before(folder)
    argv = ["run.yaml", *flags]
    parts = parse_arguments(TYPES, argv, "")
    for name, text in written.items():
        value = next(getattr(part, name) for part in parts if hasattr(part, name))
        if not as_written(name, text, value):
            raise MisreadError(f"{name}: {text[:99]} was read as {value!r:.99}")
    main(argv)


def as_written(name: str, text: str, value: Any) -> bool:
    """Whether a setting that was accepted has the value that stands there, by a reading of our own."""
    if name in OTHERWISE or text not in PLAIN:
        return True
    value = value.value if isinstance(value, Enum) else value
    arms = {get_origin(arm) or arm for arm in (get_args(HINTS[name]) or (HINTS[name],))}
    if text in ("", "~", "null"):
        return value is None or type(None) not in arms
    if isinstance(value, bool):
        return text.lower() in (("true", "yes", "on", "1") if value else ("false", "no", "off", "0"))
    if isinstance(value, int | float):
        number = text.replace("_", "").lstrip(".")
        if text.startswith("0x"):
            return value == int(text, 16)
        plain = NUMBER.fullmatch(number) or number.lstrip("-.") in ("inf", "nan")
        same = bool(plain) and (value == float(number.replace("-.inf", "-inf")) or math.isnan(value))
        return same or (bool(plain) and isinstance(value, int) and value == int(number))
    if isinstance(value, str) and Literal not in arms:
        return value == text
    return True


def case(main: Callable, kind: str, content: bytes, flags: list[str] = (), written=None, **more) -> Case:
    before = more.pop("before", lambda folder: None)
    shown = json.dumps([content.decode("utf-8", "replace"), list(flags)]).encode()
    return Case(kind, shown, partial(attempt, main, content, list(flags), written or {}, before), **more)


def single(main: Callable, name: str, value: str) -> Case:
    """One setting of a config that trains, with another value."""
    plain = {name: value} if value in PLAIN else {}
    return case(main, "one value", text_of(BASE | {name: value}).encode(), written=plain)


def flag(main: Callable, name: str, value: str, joined: bool) -> Case:
    flags = [f"--{name}={value}"] if joined else [f"--{name}", value]
    return case(main, "one flag", text_of(BASE).encode(), flags)


def all_singles(main: Callable) -> Iterator[Case]:
    for name in NAMES:
        for value in [*PLAIN, *OTHERS]:
            yield single(main, name, value)
