"""Measure this recipe against its peers on the same work: training steps, preprocessing, generation, start-up.

python benchmarks/benchmark.py --data my_records.json --tokenizer_name openai-community/gpt2
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peers
import report
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from recipe.config import DataArguments, ModelArguments, UserError, parse_arguments
from recipe.data import encode_records, load_records
from recipe.data.split import data_hash
from recipe.files import read_json, write_whole
from recipe.model import context_length, load_config, load_tokenizer
from recipe.provenance import command_line, versions
from recipe.templates import load_template

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipe" / "demo"
PROMPTS = 110  # generated for
FEW_PROMPTS = 8  # of them are generated without a cache; the time is scaled to all
MEASURED = (  # modules of recipe
    "attention", "collator", "config", "data/encode", "generation", "model", "templates", "training/loss",
    "training/sampling", "training/trainer",
)  # fmt: skip
TUNING = ("OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "MALLOC_", "THP_", "PYTORCH_", "TOKENIZERS_")
SEED = 123

Results = dict[str, Any]
Key = dict[str, Any]  # kind, part, contender, precision, compile, round: what tells measurements apart


@dataclass(frozen=True)
class Part:
    """Training steps on one kind of data. Parts of one `sweep` are points of a curve, measured in one round."""

    name: str
    batch_size: int
    steps: int
    response_tokens: int | None = None  # mean, made by joining responses; None: as in the data
    prefix_tokens: int | None = None  # of a system prompt in place of the template's preamble
    sweep: str | None = None


PARTS = [
    Part("batch_8", batch_size=8, steps=16),
    Part("batch_32", batch_size=32, steps=8),
    Part("long_responses", batch_size=8, steps=8, response_tokens=200),
    Part("system_prompt", batch_size=8, steps=4, prefix_tokens=512),
]
SWEEPS = [
    *(Part(f"batch_size={n}", n, 3, sweep="batch_size") for n in (1, 2, 4, 8, 16, 32)),
    *(Part(f"response_length={n}", 8, 3, response_tokens=n, sweep="response_length") for n in (25, 50, 100, 200, 400)),
    *(Part(f"prefix_length={n}", 8, 3, prefix_tokens=n, sweep="prefix_length") for n in (32, 64, 128, 256, 512)),
]
SWEPT = ("recipe_shared_prefix", "recipe_padded", "trainer_by_length", "trl_by_length", "plain_loop")
COMPILED = ("recipe_shared_prefix", "recipe_padded", "trainer_padded", "trl_by_length", "plain_loop")  # on a GPU
GPU_STEPS = 4  # times as many steps, and in the batch-size sweep times as many records
NAMES = [*(p.name for p in PARTS), "startup", "preprocessing", "generation", *dict.fromkeys(p.sweep for p in SWEEPS)]


@dataclass
class BenchmarkArguments:
    """What is measured, how often, and where the results go."""

    data: str = field(default="", metadata={"help": "Records, as in training; default: the embedded demo records."})
    template: str = field(default="alpaca", metadata={"help": "alpaca, phi3 or the path of a Jinja chat template."})
    output: str = field(
        default="outputs/benchmark/results.json",
        metadata={"help": "Results file, written after each measurement; what stands in it is not measured again."},
    )
    report_dir: str | None = field(
        default=None, metadata={"help": "Folder of the table and the plots; default: the one of the results file."}
    )
    only: list[str] = field(
        default_factory=list, metadata={"help": f"Parts to measure; default: all of {' '.join(map(str, NAMES))}."}
    )
    contenders: list[str] = field(
        default_factory=list,
        metadata={"help": f"Who trains; default: all of {' '.join(peers.CONTENDERS)}."},
    )
    rounds: int = field(default=3, metadata={"help": "How often all but the sweeps is measured, in turns."})
    steps: int | None = field(default=None, metadata={"help": "Timed optimizer steps; default: as each part has it."})
    warmup: int | None = field(
        default=None, metadata={"help": "Untimed steps before them; default: 2, on a GPU 5, compiled 20."}
    )
    precision: Literal["auto", "fp32", "bf16"] = field(
        default="auto",
        metadata={"help": "auto: on a GPU bf16; on a CPU first both, then for each contender the faster one."},
    )
    records: int = field(
        default=50_000, metadata={"help": "Records to preprocess: so many, a 5th, a 50th and (ours) ten times as many."}
    )
    new_tokens: int = field(default=64, metadata={"help": "Cap on each generated response."})
    generation_model: str | None = field(
        default=None, metadata={"help": "Folder of a tuned model that generates; default: the weights of the training."}
    )
    minutes: float | None = field(
        default=None, metadata={"help": "Begin no measurement after this time; the same command goes on later."}
    )
    timeout: float = field(default=40, metadata={"help": "Minutes after which one measurement is given up."})
    again: bool = field(default=False, metadata={"help": "Measure again what is asked for and stands in --output."})
    plot: str | None = field(
        default=None, metadata={"help": "Measure nothing: draw the plots and the table of this results file."}
    )

    def __post_init__(self) -> None:
        for name, known in (("only", NAMES), ("contenders", list(peers.CONTENDERS))):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise UserError(f"--{name} {' '.join(unknown)}: unknown; give some of {' '.join(map(str, known))}")
        for name, least in (("rounds", 1), ("steps", 1), ("warmup", 1), ("records", 100), ("new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} {value}: give at least {least}")


@dataclass(frozen=True)
class Setting:
    """What all measurements share."""

    args: BenchmarkArguments
    tokenizer: PreTrainedTokenizerBase
    records: list[dict[str, str]]  # instruction, input, output of the train split, shuffled
    prompts: list[str]  # of the test split
    positions: int  # of the model: the longest row, in tokens
    job: dict[str, Any]  # the model, for every job
    work: Path
    cuda: bool


def main(argv: list[str]) -> None:
    args, model_args = parse(argv)
    if args.plot:
        if not Path(args.plot).is_file():
            raise UserError(f"--plot {args.plot}: no such file; give a results file of an earlier run")
        conclude(read_json(Path(args.plot)), Path(args.plot), args)
        return
    disable_progress_bars()
    output = Path(args.output)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        setting, settings = prepare(args, model_args, Path(work))
        results = open_results(output, settings)
        left = measure_all(setting, results, output)
    conclude(results, output, args)
    if left:
        print(
            f"\n--minutes {args.minutes:g} are over with {left} measurements left: the same command goes on with them"
        )


def parse(argv: list[str]) -> tuple[BenchmarkArguments, ModelArguments]:
    description = (__doc__ or "").split("\n")[0]
    args, model_args = parse_arguments([BenchmarkArguments, ModelArguments], argv, description)
    if model_args.model_name_or_path is None and model_args.model_type is None:
        model_args.model_type = "gpt2"  # 124M
    if model_args.model_name_or_path is None and model_args.tokenizer_name is None:
        model_args.tokenizer_name = str(DEMO / "base")
    return args, model_args


# --- what is measured -----------------------------------------------------------------------------------------------


def prepare(args: BenchmarkArguments, model_args: ModelArguments, work: Path) -> tuple[Setting, dict[str, Any]]:
    """Read the records and lay model and tokenizer ready for the processes that measure.

    Returns:
        the setting, and what of it goes into the results: a file holds measurements of one setting only.
    """
    tokenizer = load_tokenizer(model_args)
    config = without_dropout(load_config(model_args, tokenizer))
    if model_args.model_type and "vocab_size" not in (model_args.config_overrides or ""):
        config.vocab_size = max(config.vocab_size, type(config)().vocab_size)  # the head as large as in the real model
    positions = min(context_length(config) or 1024, 1024)
    demo = {"train": str(DEMO / "records" / "train.jsonl"), "test": str(DEMO / "records" / "test.jsonl")}
    splits, _ = load_records(DataArguments(data=args.data or demo, template=args.template, validation_ratio=0))
    if "train" not in splits or "test" not in splits:
        raise UserError(f"data {args.data}: needs a train and a test split, found {', '.join(splits)}")
    template = load_template(args.template, tokenizer)
    records = splits["train"].shuffle(seed=SEED).select_columns(["instruction", "input", "output"]).to_list()
    tested = splits["test"].select(range(min(PROMPTS, len(splits["test"])))).to_list()

    config.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "tokenizer")
    name = model_args.model_name_or_path
    cuda = torch.cuda.is_available()
    job = {
        "model": str(work / "model"),
        "weights": str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        "tokenizer": str(work / "tokenizer"),
        "attention": model_args.attn_implementation,
        "template": str(Path(args.template).resolve()) if Path(args.template).is_file() else args.template,
        "max_length": positions,
        "scratch": str(work / "scratch"),
    }
    settings = {
        "model": name or model_args.model_type,
        "config_overrides": model_args.config_overrides,
        "parameters": count_parameters(config),
        "tokenizer": Path(model_args.tokenizer_name or name or "").name,
        "data": Path(args.data).name if args.data else "recipe/demo",
        "data_hash": data_hash(DatasetDict(splits)),
        "template": args.template,
        "steps": args.steps,
        "warmup": args.warmup,
        "new_tokens": args.new_tokens,
        "device": torch.cuda.get_device_name() if cuda else f"{peers.processor_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(TUNING)},
        "versions": versions() | ({"trl": importlib.metadata.version("trl")} if installed("trl") else {}),
    }
    setting = Setting(args, tokenizer, records, template.prompts(tested), positions, job, work, cuda)
    return setting, settings


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    for name, value in config.to_dict().items():
        if name.endswith(("pdrop", "dropout")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def count_parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def planned(setting: Setting, results: Results) -> Iterator[Key]:
    """All measurements in order, what is known to be needed most first.

    Rounds take turns over all parts, and every other round goes through the contenders backwards, so that a drift of
    the machine does not fall on one of them.
    """
    args = setting.args

    def wanted(name: str | None) -> bool:
        return name in args.only or not args.only

    for number in range(args.rounds):
        for part in PARTS:
            if wanted(part.name):
                yield from training_keys(setting, results, part, list(peers.CONTENDERS), number)
        if wanted("startup") and number == 0:
            yield from (key("startup", "startup", name) for name in peers.STARTS)
        if wanted("preprocessing"):
            names, part_name = turned(preparations(), number), f"records={args.records}"
            yield from (key("preprocessing", part_name, name, number=number) for name in names)
        if wanted("generation"):
            for name, precision in turned([("recipe", "fp32"), ("recipe", "bf16"), ("seed", "fp32")], number):
                yield key("generation", "generation", name, precision, number=number)
    for part in SWEEPS:
        if wanted(part.sweep):
            yield from training_keys(setting, results, part, list(SWEPT), 0)
    if wanted("preprocessing"):
        for records in (args.records // 50, args.records // 5):
            yield from (key("preprocessing", f"records={records}", name) for name in preparations())
        yield key("preprocessing", f"records={10 * args.records}", "recipe")


def training_keys(setting: Setting, results: Results, part: Part, names: list[str], number: int) -> Iterator[Key]:
    chosen = [name for name in names if name in setting.args.contenders or not setting.args.contenders]
    for name in turned(chosen, number):
        if not installed(peers.CONTENDERS[name].package):
            continue
        for precision in precisions(setting, results, name):
            yield key("training", part.name, name, precision, number=number)
            if setting.cuda and name in COMPILED and part.sweep is None:
                yield key("training", part.name, name, precision, compile=True, number=number)


def precisions(setting: Setting, results: Results, name: str) -> list[str]:
    """The precision that was faster for a contender, or both while that is not known."""
    if setting.args.precision != "auto":
        return [setting.args.precision]
    if setting.cuda:
        return ["bf16"]
    seconds: dict[str, dict[str, float]] = {}  # of the first part in which both were measured
    for m in results["measurements"]:
        if m["kind"] == "training" and m["contender"] == name and "error" not in m:
            of_part = seconds.setdefault(m["part"], {})
            of_part.setdefault(m["precision"], report.seconds_per_step(m))
            if len(of_part) == 2:
                return [min(of_part, key=of_part.__getitem__)]
    return ["fp32", "bf16"]


def key(
    kind: str, part: str, contender: str, precision: str | None = None, compile: bool = False, number: int = 0
) -> Key:
    return {
        "kind": kind, "part": part, "contender": contender, "precision": precision, "compile": compile, "round": number,
    }  # fmt: skip


def identity(measurement: Key) -> tuple:
    return tuple(measurement[name] for name in ("kind", "part", "contender", "precision", "compile", "round"))


def turned(names: list, number: int) -> list:
    return names[::-1] if number % 2 else names


def preparations() -> list[str]:
    return [name for name in peers.PREPARATIONS if installed("trl" if name == "trl" else None)]


def installed(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


# --- the work -------------------------------------------------------------------------------------------------------


def job_of(key: Key, setting: Setting, results: Results) -> dict[str, Any]:
    """What the measuring process needs to know. Data is laid ready on the way, once for all contenders."""
    args, job = setting.args, {**key, **setting.job}
    if key["kind"] == "training":
        part = scaled(next(part for part in [*PARTS, *SWEEPS] if part.name == key["part"]), setting)
        warmup = args.warmup or (20 if key["compile"] else 5 if setting.cuda else 2)
        path = setting.work / f"{part.name}.json"
        if not path.is_file():
            rows = training_rows(part, setting)
            path.write_text(json.dumps(rows), encoding="utf-8")
            results["parts"][part.name] = description(part, rows["timed"], setting)
        return {**job, "rows": str(path), "batch_size": part.batch_size, "warmup": warmup}
    if key["kind"] == "preprocessing":
        return {**job, "dataset": str(numbered_records(int(key["part"].split("=")[1]), setting))}
    if key["kind"] == "generation":
        path = setting.work / "prompts.json"
        path.write_text(json.dumps(setting.prompts), encoding="utf-8")
        job |= {"prompts": str(path), "new_tokens": args.new_tokens, "few": FEW_PROMPTS}
        if args.generation_model:
            job |= dict.fromkeys(("model", "weights", "tokenizer"), str(Path(args.generation_model).resolve()))
        return job
    if key["kind"] == "machine":
        sizes, copied = ((4096, 8192), 2**31) if setting.cuda else ((1024, 2048), 2**28)
        return {**job, "matmul_sizes": sizes, "copy_bytes": copied}
    return {**job, "runs": 5}


def scaled(part: Part, setting: Setting) -> Part:
    """The part with the steps that were asked for, and with more work on a GPU."""
    factor = GPU_STEPS if setting.cuda else 1
    batch_size = part.batch_size * (factor if part.sweep == "batch_size" else 1)
    return replace(part, batch_size=batch_size, steps=setting.args.steps or factor * part.steps)


def training_rows(part: Part, setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """Encoded rows of a part: those of the timed steps, and others for the steps before.

    Left out are rows that do not fit into the model, and those whose prompt and response give other tokens together
    than apart, for the peers do not agree on what they are.

    Raises:
        UserError: too few rows are left.
    """
    timed, warmup = part.batch_size * part.steps, 2 * part.batch_size
    candidates = list(itertools.islice(itertools.cycle(setting.records), 2 * (timed + warmup)))
    if part.response_tokens is not None:
        responses = token_ids([record["output"] for record in candidates], setting)
        mean = sum(len(ids) + 1 for ids in responses) / len(responses)  # with the end-of-text token
        candidates = lengthened(candidates, part.response_tokens / mean)
    name = setting.args.template
    if part.prefix_tokens is not None:
        name = str(template_with_system_prompt(part.prefix_tokens, setting))
    prompts = load_template(name, setting.tokenizer).prompts(candidates)
    dataset = Dataset.from_list([{**record, "row": row} for row, record in enumerate(candidates)])
    arguments = DataArguments(template=name, max_length=setting.positions, overflow="drop")
    encoded = encode_records({"train": dataset}, setting.tokenizer, arguments)["train"]
    together = token_ids([p + r["output"] for p, r in zip(prompts, candidates, strict=True)], setting)
    alone = token_ids(prompts, setting)
    rows = []
    for row in encoded.select_columns(["input_ids", "labels", "length", "row"]).to_list():
        index = row["row"]
        whole = row["input_ids"][:-1]
        if whole == together[index] and whole[: len(alone[index])] == alone[index]:
            rows.append({**row, "prompt": prompts[index], "completion": candidates[index]["output"]})
    if len(rows) < timed + warmup:
        raise UserError(
            f"{part.name}: only {len(rows)} of {len(candidates)} rows fit into {setting.positions} positions, "
            f"{timed + warmup} are needed; choose other parts with --only"
        )
    return {"timed": rows[:timed], "warmup": rows[timed : timed + warmup]}


def token_ids(texts: list[str], setting: Setting) -> list[list[int]]:
    tokenizer: Any = setting.tokenizer
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def lengthened(records: list[dict[str, str]], factor: float) -> list[dict[str, str]]:
    """Each response `factor` times as long, in words: its own words and those of the responses after it.

    >>> [r["output"] for r in lengthened([{"output": "a b"}, {"output": "c"}, {"output": "d e f"}], 2)]
    ['a b c d', 'c d', 'd e f a b c']
    """
    words = [record["output"].split() for record in records]
    start, longer = 0, []
    for record, response in zip(records, words, strict=True):
        end = start + max(1, round(factor * len(response)))
        joined = itertools.islice(itertools.cycle(itertools.chain.from_iterable(words)), start, end)
        longer.append({**record, "output": " ".join(joined)})
        start += len(response)
    return longer


def template_with_system_prompt(tokens: int, setting: Setting) -> Path:
    """The template with a system message of so many tokens, made of the data's words."""
    words = re.findall(r"[A-Za-z]+", " ".join(record["output"] for record in setting.records[:5000]))
    text = " ".join(itertools.islice(itertools.cycle(words), tokens))
    [ids] = token_ids([text], setting)
    text = str(setting.tokenizer.decode(ids[:tokens]))
    built_in = ROOT / "recipe" / "chat_templates" / f"{setting.args.template}.jinja"
    source = (built_in if built_in.is_file() else Path(setting.args.template)).read_text(encoding="utf-8")
    path = setting.work / f"system_prompt_{tokens}.jinja"
    path.write_text(
        "{%- set messages = [{'role': 'system', 'content': '" + text + "'}] + messages -%}" + source, encoding="utf-8"
    )
    if text not in load_template(str(path), setting.tokenizer).prompt(setting.records[0]):
        raise UserError(f"template {setting.args.template}: has no place for a system message; leave out system_prompt")
    return path


def description(part: Part, rows: list[dict[str, Any]], setting: Setting) -> dict[str, Any]:
    lengths = np.array([row["length"] for row in rows])
    targets = sum(label != peers.IGNORE_INDEX for row in rows for label in row["labels"])
    return {
        "batch_size": part.batch_size,
        "steps": part.steps,
        "tokens_per_record": round(float(lengths.mean()), 1),
        "longest": int(lengths.max()),
        "targets_per_record": round(targets / len(rows), 1),
        "system_prompt_tokens": part.prefix_tokens,
        "distinct_records": len(setting.records),
    }


def numbered_records(count: int, setting: Setting) -> Path:
    """So many records on disk, the data's over and over, numbered so that no two are alike."""
    path = setting.work / f"records_{count}"
    if not path.is_dir():
        records: list[dict[str, Any]] = [
            {**record, "input": record["input"] or "", "instruction": f"{record['instruction']} ({row})", "row": row}
            for row, record in enumerate(itertools.islice(itertools.cycle(setting.records), count))
        ]
        prompts = load_template(setting.args.template, setting.tokenizer).prompts(records)
        columns: dict[str, list] = {name: [record[name] for record in records] for name in records[0]}
        columns |= {"prompt": prompts, "completion": columns["output"]}
        Dataset.from_dict(columns).save_to_disk(path)
    return path


# --- the run --------------------------------------------------------------------------------------------------------


def open_results(path: Path, settings: dict[str, Any]) -> Results:
    """What was measured before, if it was measured on the same setting.

    Raises:
        UserError: the file holds measurements of another setting.
    """
    results: Results = {"settings": settings, "commands": [], "parts": {}, "measurements": []}
    if path.is_file():
        results = read_json(path)
        different = [name for name in settings if results["settings"].get(name) != settings[name]]
        if different:
            found = "; ".join(f"{name}: {results['settings'].get(name)}, now {settings[name]}" for name in different)
            raise UserError(f"{path} holds measurements of another setting ({found}); give another --output")
    if command_line() not in results["commands"]:
        results["commands"].append(command_line())
    return results


def measure_all(setting: Setting, results: Results, output: Path) -> int:
    """Run what is planned and not yet measured, saving after each; returns how many are left for lack of time."""
    start, left, tried = time.monotonic(), 0, set()
    if "machine" not in results:
        print("the machine: matrix products and memory", flush=True)
        found = run_job(job_of(key("machine", "machine", "machine"), setting, results), setting)
        if "error" in found:
            raise UserError(f"the machine cannot be measured: {found['error']}")
        results["machine"] = found
    if not installed("trl"):
        print("trl is not installed, so its rows are left out: pip install -c constraints.txt -e '.[bench]'")
    again = setting.args.again
    asked = {identity(one) for one in planned(setting, results)}
    there = set() if again else {identity(m) for m in results["measurements"] if "error" not in m}
    print(f"{len(asked - there)} measurements to take, fewer once the faster precision is known", flush=True)
    for one in planned(setting, results):  # looks at the results again and again
        measured = {identity(m) for m in results["measurements"] if "error" not in m}
        if identity(one) in tried or (identity(one) in measured and not again):
            continue
        tried.add(identity(one))
        minutes = (time.monotonic() - start) / 60
        if setting.args.minutes is not None and minutes > setting.args.minutes:
            left += 1
            continue
        load = os.getloadavg()[0]
        try:
            found = run_job(job_of(one, setting, results), setting)
        except UserError as error:  # this part does not go with this model or template
            found = {"error": str(error)}
        measurement = {
            **one,
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
            "code": code_hash(),
            "load_before": round(load, 2),  # of the machine: near 0 if nothing else ran
            **found,
        }
        results["measurements"] = [m for m in results["measurements"] if identity(m) != identity(one)] + [measurement]
        write_results(output, results)
        print(f"{minutes:5.1f} min  {report.progress(measurement)}", flush=True)
    return left


def code_hash() -> str:
    """What tells apart the states of the code whose speed is measured."""
    files = [*(ROOT / "recipe" / f"{name}.py" for name in MEASURED), ROOT / "benchmarks" / "peers.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


def run_job(job: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """Measure in a fresh process; what goes wrong there becomes `error`, in words."""
    job_path, result_path, log_path = (setting.work / name for name in ("job.json", "result.json", "log.txt"))
    job_path.write_text(json.dumps(job), encoding="utf-8")
    result_path.unlink(missing_ok=True)
    environment = os.environ | {"TMPDIR": str(setting.work), "HF_DATASETS_CACHE": str(setting.work / "datasets")}
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), str(job_path), str(result_path)]
    limit = 60 * setting.args.timeout
    with open(log_path, "w", encoding="utf-8") as log:
        try:
            process = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not ended after {setting.args.timeout:g} minutes"}
    for scratch in setting.work.glob("tmp*"):  # what datasets wrote
        shutil.rmtree(scratch, ignore_errors=True)
    if process.returncode < 0:
        return {"error": f"ended by {signal.Signals(-process.returncode).name}; SIGKILL tells of too little memory"}
    if process.returncode:
        lines = [line for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        print("\n".join(lines[-12:]), file=sys.stderr)
        return {"error": lines[-1][:300] if lines else f"exit status {process.returncode}"}
    return json.loads(result_path.read_text(encoding="utf-8"))


def write_results(path: Path, results: Results) -> None:
    """The results as JSON, one measurement a line."""
    head = json.dumps({name: value for name, value in results.items() if name != "measurements"}, indent=2)
    lines = ",\n".join(f"    {json.dumps(measurement)}" for measurement in results["measurements"])
    write_whole(path, f'{head[:-2]},\n  "measurements": [\n{lines}\n  ]\n}}\n')


def conclude(results: Results, path: Path, args: BenchmarkArguments) -> None:
    """Table and plots."""
    folder = Path(args.report_dir) if args.report_dir else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    table = report.table(results)
    write_whole(folder / f"{path.stem}.md", table)
    pictures = report.plot(results, folder, path.stem)
    print(f"\n{table}\nTable: {folder / path.stem}.md   Plots: {', '.join(map(str, pictures)) or 'none'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what was measured is saved, and the same command goes on")
