"""Measure this recipe beside its peers on the same work: training, preprocessing, generation.

python benchmarks/benchmark.py --data my_records.json --tokenizer_name openai-community/gpt2
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import peers
import report
import torch
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from workloads import PARTS, Inputs, save_numbered_records, training_rows

from recipe.config import DataArguments, ModelArguments, UserError, parse_arguments
from recipe.data import load_records
from recipe.data.split import data_hash
from recipe.files import read_json, write_whole
from recipe.model import context_length, load_config, load_tokenizer
from recipe.provenance import command_line, hardware, versions
from recipe.training.checks import has_bfloat16_instructions

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipe" / "demo"
PROMPTS = 110  # of the test split at most
NAMES = [*PARTS, "preprocessing", "generation"]
CONTENDERS = list(peers.TRAINERS)
HAS_TRL = importlib.util.find_spec("trl") is not None

Results = dict[str, Any]


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class BenchmarkArguments:
    """What is measured, how often, and where the results go."""

    data: str = option("", "Records, as in training; default: the embedded demo records.")
    template: str = option("alpaca", "alpaca, phi3 or the path of a Jinja chat template.")
    output: str = option("outputs/benchmark/results.json", "Results file; what it has is not measured again.")
    only: list[str] = field(
        default_factory=lambda: NAMES, metadata={"help": "Parts to measure; default: all.", "choices": NAMES}
    )
    contenders: list[str] = field(
        default_factory=lambda: CONTENDERS, metadata={"help": "Who trains; default: all.", "choices": CONTENDERS}
    )
    rounds: int = option(3, "How often everything is measured.")
    steps: int | None = option(None, "Timed optimizer steps; default: depends on the part.")
    warmup: int = option(2, "Untimed optimizer steps before them; more on a GPU.")
    precision: Literal["auto", "fp32", "bf16"] = option("auto", "auto: bf16 where the machine has it, else fp32.")
    records: int = option(50_000, "Records to preprocess.")
    minutes: float = option(float("inf"), "Start no measurement after this time; run the same command for the rest.")
    again: bool = option(False, "Measure again what the results file has already.")

    def __post_init__(self) -> None:
        if self.precision == "auto":
            native = has_bfloat16_instructions()
            if torch.cuda.is_available():
                native = torch.cuda.is_bf16_supported(including_emulation=False)
            self.precision = "bf16" if native else "fp32"


def main(argv: list[str]) -> None:
    args, model_args = parse_arguments([BenchmarkArguments, ModelArguments], argv, (__doc__ or "").split("\n")[0])
    disable_progress_bars()
    if not HAS_TRL:
        print("trl is not installed, so it is not measured: pip install -c constraints.txt -e '.[bench]'")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        inputs, job, settings = prepare(args, model_args, Path(folder))
        results = open_results(Path(args.output), settings)
        measure_all(args, inputs, job, results)
    report.write(Path(args.output))


# --- before the measurements ----------------------------------------------------------------------------------------


def prepare(
    args: BenchmarkArguments, model_args: ModelArguments, folder: Path
) -> tuple[Inputs, dict[str, Any], dict[str, Any]]:
    """Read the records, and save config and tokenizer in `folder`, for the processes that measure.

    Returns:
        the inputs of all parts; what is the same in all jobs; the settings that go into the results.
    """
    name = model_args.model_name_or_path
    if name is None:
        model_args.model_type = model_args.model_type or "gpt2"  # 124M
        model_args.tokenizer_name = model_args.tokenizer_name or str(DEMO / "base")
    tokenizer = load_tokenizer(model_args)
    config = make_config(model_args, tokenizer)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    demo = {name: str(DEMO / "records" / f"{name}.jsonl") for name in ("train", "test")}
    splits, _ = load_records(DataArguments(data=args.data or demo, validation_ratio=0))
    if not {"train", "test"} <= splits.keys():
        raise UserError(f"data {args.data}: needs a train and a test split, found {', '.join(splits)}")
    records = splits["train"].shuffle(seed=123).select_columns(["instruction", "input", "output"]).to_list()
    inputs = Inputs(records, tokenizer, args.template, min(context_length(config) or 1024, 1024), folder)
    job = {
        "folder": str(folder),
        "weights": name,  # None: random ones
        "attention": model_args.attn_implementation,
        "template": args.template,
        "max_length": inputs.max_length,
        "warmup": args.warmup,
        "prompts": inputs.prompts(splits["test"].to_list()[:PROMPTS], args.template),
    }
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    settings = {
        "model": name or model_args.model_type,
        "config_overrides": model_args.config_overrides,
        "parameters": parameters,
        "tokenizer": Path(model_args.tokenizer_name or name or "").name,
        "data": Path(args.data).name if args.data else "recipe/demo",
        "data_hash": data_hash(splits),
        "template": args.template,
        "steps": args.steps,
        "warmup": args.warmup,
        "records": args.records,
        "device": f"{hardware()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": versions() | ({"trl": importlib.metadata.version("trl")} if HAS_TRL else {}),
    }
    return inputs, job, settings


def make_config(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The model's config without dropout; with random weights the vocabulary is as large as the real model's."""
    config = load_config(model_args, tokenizer)
    if model_args.model_type and "vocab_size" not in (model_args.config_overrides or ""):
        config.vocab_size = max(config.vocab_size, type(config)().vocab_size)
    for name, value in config.to_dict().items():
        if name.endswith(("pdrop", "dropout")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def open_results(path: Path, settings: dict[str, Any]) -> Results:
    """The results in the file, or new ones if there is no file.

    Raises:
        UserError: the file was measured with other settings.
    """
    results: Results = {"settings": settings, "commands": [], "measurements": []}
    if path.is_file():
        results = read_json(path)
        old = results["settings"]
        changes = [f"{name}: {old.get(name)}, now {new}" for name, new in settings.items() if old.get(name) != new]
        if changes:
            raise UserError(f"{path} was measured with other settings ({'; '.join(changes)}); give another --output")
    if command_line() not in results["commands"]:
        results["commands"].append(command_line())
    return results


# --- the measurements -----------------------------------------------------------------------------------------------


def plan(args: BenchmarkArguments) -> list[dict[str, Any]]:
    """What identifies each measurement, in order. Every other round goes backwards, so that drift affects all alike."""
    other_parts = {"preprocessing": peers.PREPARATIONS, "generation": peers.GENERATORS}
    keys: list[dict[str, Any]] = [
        {"part": part, "contender": name, "precision": None if part == "preprocessing" else args.precision}
        for part in args.only
        for name in other_parts.get(part, args.contenders)
        if HAS_TRL or not name.startswith("trl")
    ]
    rounds = [keys[::-1] if number % 2 else keys for number in range(args.rounds)]
    return [{**key, "round": number} for number, keys in enumerate(rounds) for key in keys]


def measure_all(args: BenchmarkArguments, inputs: Inputs, job: dict[str, Any], results: Results) -> None:
    """Take the measurements that the results do not have, and save each."""
    done = [m for m in results["measurements"] if "error" not in m and not args.again]
    keys = [key for key in plan(args) if not any(key.items() <= m.items() for m in done)]
    print(f"{len(keys)} measurements to take", flush=True)
    work = functools.cache(functools.partial(work_of, args=args, inputs=inputs))  # the same for all contenders
    start = time.monotonic()
    for index, key in enumerate(keys):
        minutes = (time.monotonic() - start) / 60
        if minutes > args.minutes:
            print(f"the time is over, {len(keys) - index} measurements are left: run the same command again")
            return
        measurement = {**key, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "code": code_hash()}
        measurement["load_before"] = round(os.getloadavg()[0], 2)
        try:
            measurement |= run_job({**key, **job, **work(key["part"])}, inputs.folder)
        except UserError as error:  # the part cannot be made with this model or template
            measurement["error"] = str(error)
        others = [m for m in results["measurements"] if not key.items() <= m.items()]
        results["measurements"] = [*others, measurement]
        write_results(Path(args.output), results)
        print(f"{minutes:5.1f} min  {report.in_one_line(measurement)}", flush=True)


def code_hash() -> str:
    """Changes with the code that is measured."""
    files = [ROOT / "benchmarks" / "peers.py", *sorted((ROOT / "recipe").rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


def work_of(name: str, args: BenchmarkArguments, inputs: Inputs) -> dict[str, Any]:
    """What the jobs of a part need in addition to `prepare`'s job."""
    if name == "preprocessing":
        return {"dataset": save_numbered_records(args.records, inputs)}
    if name == "generation":
        return {}
    part = PARTS[name]
    rows = training_rows(part, args.warmup, args.steps or part.steps, inputs)
    return {"rows": rows, "batch_size": part.batch_size}


def run_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure in a new process; its failure becomes `error`, in words."""
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py")]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        text = json.dumps(job | {"scratch": scratch})
        environment = os.environ | {"TMPDIR": scratch, "HF_DATASETS_CACHE": scratch}
        try:
            process = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, timeout=2400)
        except subprocess.TimeoutExpired:
            return {"error": "not finished after 40 minutes"}
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    print(process.stderr[-2000:], file=sys.stderr)
    return {"error": f"exit status {process.returncode}: {process.stderr.strip()[-300:]}"}


def write_results(path: Path, results: Results) -> None:
    """Save the results as JSON, one measurement a line."""
    head = json.dumps({name: value for name, value in results.items() if name != "measurements"}, indent=2)
    lines = ",\n".join(f"    {json.dumps(measurement)}" for measurement in results["measurements"])
    write_whole(path, f'{head[:-2]},\n  "measurements": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what was measured is saved, and the same command measures the rest")
