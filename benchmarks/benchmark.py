"""Measure how fast this recipe and its peers train on the same work.

python benchmarks/benchmark.py --data my_records.json --tokenizer_name openai-community/gpt2
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import report
import torch
from datasets import disable_progress_bars
from peers import TRAINERS
from workloads import PARTS, Inputs, training_rows

from recipe.config import DataArguments, ModelArguments, UserError, parse_arguments, setting
from recipe.console import run_script
from recipe.data import load_records
from recipe.data.split import data_hash
from recipe.files import read_json, write_whole
from recipe.model import context_length, load_model, load_tokenizer
from recipe.precision import is_native
from recipe.provenance import command_line, hardware, versions

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipe" / "demo"
MOST_SAMPLES = 64  # of a micro-batch; contenders that take conversations apart accumulate gradients beyond it
HAS_TRL = importlib.util.find_spec("trl") is not None


@dataclass
class BenchmarkArguments:
    """What is measured, how often, and where the results go."""

    data: str = setting("", "Records, as in training; default: the embedded demo records.")
    template: str = setting("alpaca", "alpaca, phi3, chatml or the path of a Jinja chat template.")
    output: str = setting("outputs/benchmark/results.json", "Results file; what it has is not measured again.")
    only: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": "Parts to measure; default: all.", "choices": PARTS}
    )
    contenders: list[str] = field(
        default_factory=lambda: list(TRAINERS), metadata={"help": "Who trains; default: all.", "choices": TRAINERS}
    )
    rounds: int = setting(3, "How often everything is measured.")
    steps: int = setting(8, "Timed optimizer steps.")
    warmup: int = setting(2, "Untimed optimizer steps before them; more on a GPU.")
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "auto: bf16 where the machine has it, else fp32.")

    def __post_init__(self) -> None:
        if self.precision == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.precision = "bf16" if is_native(torch.bfloat16, device) else "fp32"


def main(argv: list[str]) -> None:
    args, model_args = parse_arguments([BenchmarkArguments, ModelArguments], argv, (__doc__ or "").split("\n")[0])
    disable_progress_bars()
    if not HAS_TRL:
        print("trl is not installed, so it is not measured: pip install -c constraints.txt -e '.[bench]'")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        inputs, settings = prepare(args, model_args, Path(folder))
        results = open_results(Path(args.output), settings)
        measure_all(args, inputs, model_args.attn_implementation, results)
    report.write(Path(args.output))


def prepare(args: BenchmarkArguments, model_args: ModelArguments, folder: Path) -> tuple[Inputs, dict[str, Any]]:
    """Read the records, and save model and tokenizer in `folder`, for the processes that measure.

    The model has no dropout. Random weights have GPT-2's vocabulary, unless a tokenizer is named.

    Returns:
        the inputs of all parts, and the settings that go into the results.
    """
    name = model_args.model_name_or_path
    if name is None:
        model_args.model_type = model_args.model_type or "gpt2"  # 124M
        if model_args.tokenizer_name is None:
            model_args.tokenizer_name = str(DEMO / "base")
            model_args.config_overrides = ",".join(filter(None, ["vocab_size=50257", model_args.config_overrides]))
    tokenizer = load_tokenizer(model_args)
    torch.manual_seed(1)  # of random weights
    model, _ = load_model(model_args, tokenizer)
    for key, value in model.config.to_dict().items():
        if key.endswith(("pdrop", "dropout")) and isinstance(value, float):
            setattr(model.config, key, 0.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = args.data or str(DEMO / "records" / "train.jsonl")
    splits, _ = load_records(DataArguments(data=data, validation_ratio=0))
    if "train" not in splits:
        raise UserError(f"data {data}: no train split, only {', '.join(splits)}; name one")
    records = splits["train"].shuffle(seed=123).select_columns(["instruction", "input", "output"]).to_list()
    inputs = Inputs(records, tokenizer, args.template, min(context_length(model.config) or 1024, 1024), folder)
    settings = {
        "model": name or model_args.model_type,
        "config_overrides": model_args.config_overrides,
        "parameters": model.num_parameters(),
        "tokenizer": Path(model_args.tokenizer_name or name or "").name,
        "data": Path(args.data).name if args.data else "recipe/demo",
        "data_hash": data_hash(splits),
        "template": args.template,
        "steps": args.steps,
        "warmup": args.warmup,
        "device": f"{hardware()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": versions() | ({"trl": importlib.metadata.version("trl")} if HAS_TRL else {}),
    }
    return inputs, settings


def open_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results in the file, or new ones if there is no file.

    Raises:
        UserError: the file was measured with other settings.
    """
    results: dict[str, Any] = {"settings": settings, "commands": [], "measurements": []}
    if path.is_file():
        results = read_json(path)
        old = results["settings"]
        changes = [f"{name}: {old.get(name)}, now {new}" for name, new in settings.items() if old.get(name) != new]
        if changes:
            raise UserError(f"{path} was measured with other settings ({'; '.join(changes)}); give another --output")
    if command_line() not in results["commands"]:
        results["commands"].append(command_line())
    return results


def plan(args: BenchmarkArguments) -> list[dict[str, Any]]:
    """What identifies each measurement, in order. Every other round goes backwards, so that drift affects all alike."""
    keys: list[dict[str, Any]] = [
        {"part": part, "contender": name, "precision": args.precision}
        for part in args.only
        for name in args.contenders
        if HAS_TRL or not name.startswith("trl")
        if PARTS[part].turns or name != "trl_conversations"
    ]
    rounds = [keys[::-1] if number % 2 else keys for number in range(args.rounds)]
    return [{**key, "round": number} for number, keys in enumerate(rounds) for key in keys]


def measure_all(args: BenchmarkArguments, inputs: Inputs, attention: str | None, results: dict[str, Any]) -> None:
    """Take the measurements that the results do not have, and save each."""
    done = [m for m in results["measurements"] if "error" not in m]
    keys = [key for key in plan(args) if not any(key.items() <= m.items() for m in done)]
    print(f"{len(keys)} measurements to take", flush=True)
    parts = dict.fromkeys(key["part"] for key in keys)
    rows = {part: training_rows(PARTS[part], args.warmup, args.steps, inputs) for part in parts}
    for key in keys:
        measurement = {**key, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "code": code_hash()}
        measurement["load_before"] = round(os.getloadavg()[0], 2)
        job = {**key, "folder": str(inputs.folder), "attention": attention, "warmup": args.warmup}
        job |= {"batch_size": PARTS[key["part"]].batch_size, "most_samples": MOST_SAMPLES}
        measurement |= run_job(job | rows[key["part"]])
        others = [m for m in results["measurements"] if not key.items() <= m.items()]
        results["measurements"] = [*others, measurement]
        write_results(Path(args.output), results)
        print(report.in_one_line(measurement), flush=True)


def code_hash() -> str:
    """Changes with the code that is measured."""
    files = [ROOT / "benchmarks" / "peers.py", *sorted((ROOT / "recipe").rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Measure in a new process; its failure becomes `error`, in words."""
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py")]
    process = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    print(process.stderr[-2000:], file=sys.stderr)
    return {"error": f"exit status {process.returncode}: {process.stderr.strip()[-300:]}"}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Save the results as JSON, one measurement a line."""
    head = json.dumps({name: value for name, value in results.items() if name != "measurements"}, indent=2)
    lines = ",\n".join(f"    {json.dumps(measurement)}" for measurement in results["measurements"])
    write_whole(path, f'{head[:-2]},\n  "measurements": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    run_script(main, interrupted="what was measured is saved, and the same command measures the rest")
