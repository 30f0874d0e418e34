"""Configs and flags that users may hand to training: every setting with every kind of wrong value, damaged YAML, ..."""

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fuzzing import ROOT, Case, MisreadError, damage, stop_at_first_step, train_script

from recipe.config import DataArguments, InstructionTrainingArguments, ModelArguments, parse_arguments

TYPES = [ModelArguments, DataArguments, InstructionTrainingArguments]
HINTS = {name: hint for kind in TYPES for name, hint in get_type_hints(kind).items()}
SLOW = {"torch_compile", "torch_compile_mode", "torch_compile_backend"}  # a compiler takes a minute
NAMES = [field.name for kind in TYPES for field in fields(kind) if field.init and field.name not in SLOW]
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
NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf)|nan", re.IGNORECASE)
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
    if isinstance(value, Enum):
        return value.value in (text, "no" if text.lower() in ("no", "off", "false") else text)
    arms = {get_origin(arm) or arm for arm in (get_args(HINTS[name]) or (HINTS[name],))}
    if text in ("", "~", "null"):
        return value is None or type(None) not in arms
    if isinstance(value, bool):
        return text.lower() in (("true", "yes", "on", "1") if value else ("false", "no", "off", "0"))
    if isinstance(value, int | float):
        number = text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan")
        if text.startswith("0x"):
            return value == int(text, 16)
        if isinstance(value, int):
            return re.fullmatch(r"[+-]?\d+", number) is not None and value == int(number)
        return bool(NUMBER.fullmatch(number)) and (value == float(number) or math.isnan(value))
    if isinstance(value, str) and Literal not in arms:
        return value == text
    return True


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
STRUCTURES = {  # lines of YAML to go with others, and whether they must be refused
    LAUGHS: True, "data: &a [*a]\n": True, "data: &a {train: *a}\n": True, "seed: 1\nseed: 2\n": True,
    "? [1]\n: 2\n": True,
    "1: 2\n": True, "null: 2\n": True, "on: 2\n": True, "2024-01-01: 2\n": True, ".nan: 2\n": True, "'': 2\n": True,
    "? {a: b}\n: 1\n": True, "---\nseed: 1\n---\nseed: 2\n": True, "\tseed: 1\n": True,
    "seed : 1\n  split_seed: 2\n": True,
    "%YAML 3.0\n": True, "%TAG ! tag:x,2000:\n---\nseed: !y 1\n": True, "<<: {seed: 5}\n": False,
    "<<: [{seed: 5}, {seed: 6}]\n": False,
    "<<: 5\n": True, "<<: [1]\n": True, "<<: *x\n": True, "# only a comment\n": False, "seed: 1 # comment\n": False,
    "seed: 1\r\n": False,
    "learning_rate: &rate 1e-3\nweight_decay: *rate\n": False, "config: {}\nlegs: []\n": True,
    "data: {1: a.jsonl}\n": True,
    "data: {on: a.jsonl}\n": True, "data: {train: [records.jsonl]}\n": False, "data: {train: }\n": True,
    "data: []\n": True,
    "data: [records.jsonl, records.jsonl]\n": False, "data: {train: {a: b}}\n": True,
    "data: {'': records.jsonl}\n": True,
    "data: .\n": False, "data: '*.jsonl'\n": False, "data: '[a-'\n": True, "data: '**'\n": None,
    "data: /dev/null\n": True,
    "lr_scheduler_kwargs: 2\n": True, "max_length: [64]\n": True, "template: [alpaca]\n": True, "run_name: [a]\n": True,
    "num_train_epochs: 1e300\nmax_steps: -1\n": None,
    "generation_max_new_tokens: 99999999999\neval_generate: true\n": None,
    "warmup_steps: 1e300\n": None, "max_steps: 99999999999999999999\n": None,
    "gradient_accumulation_steps: 99999999999\n": None,
    "per_device_train_batch_size: 99999999999999999999\n": None, "seed: 4294967296\n": True, "split_seed: -5\n": None,
    "config_overrides: n_layer=99999999\n": None, "config_overrides: n_embd=0\n": None,
    "config_overrides: n_head=0\n": None,
    "config_overrides: 'n_layer=1,'\n": None, "config_overrides: vocab_size=-1\n": None,
    "config_overrides: n_positions=0\n": None,
    "output_dir: /dev/null/x\n": True, "output_dir: /proc/x\n": True, "output_dir: records.jsonl\n": True,
    "output_dir: .\n": True,
    "output_dir: " + "x" * 300 + "\n": True, "output_dir: " + "x/" * 3000 + "\n": True, "\ufeff": None, "\0": True,
    "\x85seed: 1": None,
    "lr_scheduler_kwargs: {a: 1}\n": True, "optim_args: x=y\n": True,
    "dataloader_num_workers: 1\ndataloader_prefetch_factor: 2147483648\n": True,
    "num_proc: 2147483648\n": True,
    "dataloader_num_workers: 2147483648\n": True, "num_sample_generations: 12345678901234567890\n": True,
    "report_to: [none, none]\n": None,
    "report_to: [a, b]\n": True,
}  # fmt: skip
FOLDERS: dict[str, Callable[[Path], Any]] = {  # what an output folder holds already
    "checkpoint-best": lambda out: (out / "checkpoint-best").mkdir(),
    "checkpoint-": lambda out: (out / "checkpoint-").mkdir(),
    "checkpoint-1 without files": lambda out: (out / "checkpoint-1").mkdir(),
    "checkpoint-1 a file": lambda out: (out / "checkpoint-1").write_text("x"),
    "checkpoint-digits": lambda out: (out / ("checkpoint-" + "9" * 100)).mkdir(),
    "checkpoint-exotic digit": lambda out: (out / "checkpoint-\u0663").mkdir(),
    "dangling link": lambda out: (out / "checkpoint-2").symlink_to("nowhere"),
    "link to itself": lambda out: (out / "checkpoint-2").symlink_to("checkpoint-2"),
    "state": lambda out: _checkpoint(out, "trainer_state.json", "[]"),
    "deep state": lambda out: _checkpoint(out, "trainer_state.json", "[" * 99_999),
    "state with a wrong step": lambda out: _checkpoint(out, "trainer_state.json", '{"global_step": "x"}'),
    "manifest": lambda out: _checkpoint(out, "manifest.json", "{}"),
    "manifest of a list": lambda out: _checkpoint(out, "manifest.json", "[1]"),
    "deep manifest": lambda out: _checkpoint(out, "manifest.json", '{"a":' * 99_999),
    "large number": lambda out: _checkpoint(out, "manifest.json", "9" * 5000),
    "manifest with a file": lambda out: _checkpoint(out, "manifest.json", '{"files": {"x": {"size": "y"}}}'),
    "manifest with a list": lambda out: _checkpoint(out, "manifest.json", '{"files": [1], "world_size": {}}'),
    "run.json": lambda out: (out / "run.json").write_text("[" * 99_999),
    "README": lambda out: (out / "README.md").write_text("mine"),
    "lock": lambda out: (out / ".lock").write_text("{}"),
    "lock a folder": lambda out: (out / ".lock").mkdir(),
    "unfinished a file": lambda out: (out / "_unfinished").write_text("x"),
}  # fmt: skip


def _checkpoint(out: Path, name: str, content: str) -> None:
    (out / "checkpoint-1").mkdir()
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "config.json"):
        (out / "checkpoint-1" / file).write_text("x")
    (out / "checkpoint-1" / name).write_text(content)


def _with_folder(what: str, folder: Path) -> None:
    (folder / "out").mkdir()
    FOLDERS[what](folder / "out")


WORDS = ["--", "---", "--=", "-x", "-1", "", " ", "--seed", "--seed=", "--no_such", "--seed=1=2", "--data",
"a.jsonl", "\udcff", "--\udcff=1",
         "--mask-prompt", "--no_mask_prompt", "--mask_prompt", "@file", "--config", "-h_", "--\x1b[31m", "--data={",
         "--data=[1",
         '--data={"train": ' + "9" * 5000 + "}", "--data=" + "[" * 99_999, '--data={"train": null}', "--data=[]",
         "--data={}",
         "--data=\0", "--lr_scheduler_kwargs={", '--lr_scheduler_kwargs={"a": NaN}',
         "--lr_scheduler_kwargs=" + "[" * 99_999,
         "--report_to", "--allow_changed", "--debug", "--resume_from_checkpoint", "--resume_from_checkpoint=out",
         "--resume_from_checkpoint=true", "--resume_from_checkpoint=/", "--overwrite_output_dir"]  # fmt: skip


class Maker:
    """Makes configs and flags, from a seed."""

    def __init__(self, main: Callable, seed: str) -> None:
        self.main, self.draw = main, random.Random(seed)
        self.files = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))] + [
            text_of(BASE).encode()
        ]

    def value(self) -> str:
        return self.draw.choice([*PLAIN, *OTHERS])

    def one_value(self) -> Case:
        name, value = self.draw.choice(NAMES), self.value()
        return self._case("one value", text_of(BASE | {name: value}).encode(), {name: value} if value in PLAIN else {})

    def some_values(self) -> Case:
        changed = {name: self.value() for name in self.draw.sample(NAMES, self.draw.randint(2, 5))}
        return self._case("some values", text_of(BASE | changed).encode())

    def one_flag(self) -> Case:
        name, value = self.draw.choice(NAMES), self.value().strip("'\"")
        flags = [f"--{name}={value}"] if self.draw.random() < 0.5 else [f"--{name}", value]
        return self._case("one flag", text_of(BASE).encode(), flags=flags)

    def words(self) -> Case:
        flags = self.draw.choices(WORDS, k=self.draw.randint(1, 3))
        return self._case("words of the command line", text_of(BASE).encode(), flags=flags)

    def structure(self) -> Case:
        lines, refused = self.draw.choice([*STRUCTURES.items()])
        replaced = set(re.findall(r"^(\w+):", lines, re.MULTILINE))
        rest = text_of({name: value for name, value in BASE.items() if name not in replaced})
        if replaced & {"seed", "learning_rate"} and refused is False:
            rest = text_of(BASE)
        expected = {True: "refused", False: "read", None: ""}[refused]
        return self._case("YAML and settings", (lines + rest).encode(), expected=expected)

    def damaged(self) -> Case:
        content = damage(
            self.draw, self.draw.choice(self.files), self.files, [b"\n" + name.encode() + b": " for name in NAMES]
        )
        flags = [f"--{name}={BASE[name]}" for name in ("output_dir", "use_cpu")]
        return self._case("damaged YAML", content, flags=flags)

    def folder(self) -> Case:
        what = self.draw.choice([*FOLDERS])
        flags = self.draw.choice([[], ["--resume_from_checkpoint=true"], ["--overwrite_output_dir"],
                                  ["--resume_from_checkpoint=out/checkpoint-1"],
                                  ["--save_total_limit=1", "--overwrite_output_dir"]])  # fmt: skip
        return self._case(f"folder: {what}", text_of(BASE).encode(), flags=flags, before=partial(_with_folder, what))

    def _case(
        self, kind: str, content: bytes, written: dict | None = None, flags: Sequence[str] = (), **more: Any
    ) -> Case:
        before = more.pop("before", lambda folder: None)
        shown = json.dumps([content.decode("utf-8", "replace"), list(flags)]).encode()
        return Case(kind, shown, partial(attempt, self.main, content, list(flags), written or {}, before), **more)

    def cases(self, count: int) -> list[Case]:
        kinds = [self.one_value, self.some_values, self.one_flag, self.words, self.structure, self.damaged, self.folder]
        return [make() for make in self.draw.choices(kinds, [30, 10, 15, 8, 15, 15, 7], k=count)]
