"""Full fine-tuning beside an adapter on the same records: scores with intervals, parameters, memory, time and size.

python benchmarks/adapters.py --model_name_or_path BASE --data records.json --output_dir outputs/adapters
python benchmarks/adapters.py ... --num_train_epochs 2 --lora_learning_rate 1e-3 --lora_target_modules all-linear
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.config import UserError, parse_arguments, setting
from recipe.console import run_script
from recipe.evaluation.comparison import compare
from recipe.evaluation.stored import read_predictions
from recipe.evaluation.tables import score_row
from recipe.files import write_json, write_whole
from recipe.provenance import hardware, versions

SCRIPTS = Path(__file__).parents[1] / "scripts"
SCORES = ("exact_match", "token_f1", "chrf", "reference_loss")


@dataclass
class AdapterArguments:
    """The base model, the records, and the two ways to train on them."""

    model_name_or_path: str = setting("", "Folder or Hub id of the base model.")
    data: str = setting("", "Records; 10 % of them are answered afterwards.")
    output_dir: str = setting("outputs/adapters", "Where both runs, the evaluation and the table go.")
    template: str = setting("alpaca", "As in training.")
    num_train_epochs: float = setting(2.0, "Of both.")
    max_steps: int = setting(-1, "Of both, in place of epochs.")
    per_device_train_batch_size: int = setting(8, "Of both.")
    learning_rate: float = setting(1e-4, "Of full fine-tuning.")
    lora_learning_rate: float = setting(1e-3, "Of the adapter, which wants about ten times as much.")
    lora_r: int = setting(16, "Rank of the adapter.")
    lora_alpha: int = setting(32, "As in training.")
    lora_target_modules: list[str] = setting(lambda: ["all-linear"], "As in training.")
    max_new_tokens: int = setting(64, "Of each answer.")
    bf16: bool = setting(False, "Mixed precision in training.")

    def __post_init__(self) -> None:
        if not self.model_name_or_path or not self.data:
            raise UserError("name the base model and the records: --model_name_or_path BASE --data records.json")


def main(argv: list[str]) -> None:
    [args] = parse_arguments([AdapterArguments], argv, (__doc__ or "").split("\n")[0])
    folder = Path(args.output_dir)
    shared = [
        "--model_name_or_path", args.model_name_or_path, "--data", args.data, "--template", args.template,
        "--num_train_epochs", args.num_train_epochs, "--max_steps", args.max_steps, "--per_device_train_batch_size",
        args.per_device_train_batch_size, "--batching", "shared_prefix", "--lr_scheduler_type", "cosine",
        "--warmup_steps", 0.05, "--save_strategy", "no", "--num_sample_generations", 0, "--report_to", "none",
        "--logging_steps", 5, "--bf16", str(args.bf16).lower(), "--overwrite_output_dir", "true",
    ]  # fmt: skip
    lora = ["--lora_r", args.lora_r, "--lora_alpha", args.lora_alpha, "--lora_target_modules"]
    kinds = {
        "full": ["--learning_rate", args.learning_rate],
        "lora": ["--learning_rate", args.lora_learning_rate, *lora, *args.lora_target_modules],
    }
    measured = {
        kind: measure("train.py", *shared, *flags, "--output_dir", folder / kind) for kind, flags in kinds.items()
    }
    measure(
        "eval.py", "--model", folder / "full", folder / "lora", "--baseline", args.model_name_or_path, "--output_dir",
        folder / "evaluation", "--max_new_tokens", args.max_new_tokens, "--dtype", "float32", "--overwrite_output_dir",
    )  # fmt: skip
    for kind, found in measured.items():
        run = json.loads((folder / kind / "run.json").read_text(encoding="utf-8"))
        about = run.get("adapter") or {}
        weights = sum(path.stat().st_size for path in (folder / kind).glob("*.safetensors"))
        found |= {"trained": about.get("trained"), "saved_mb": weights / 1e6, "steps": run["result"]["steps"]}
        found |= {"train_seconds": run["result"]["train_seconds"], "train_loss": run["result"]["train_loss"]}
    predictions = read_predictions(folder / "evaluation")
    pairs = {
        "full − base": compare(predictions, "tuned", "baseline"),
        "lora − base": compare(predictions, "lora", "baseline"),
        "lora − full": compare(predictions, "lora", "tuned"),
    }
    text = table(measured, pairs)
    about = {"versions": versions(), "hardware": hardware(), "threads": os.environ.get("OMP_NUM_THREADS")}
    write_json(folder / "adapters.json", {"arguments": vars(args), **about, "measured": measured, "scores": pairs})
    write_whole(folder / "adapters.md", text)
    print(text)


def measure(script: str, *flags: Any) -> dict[str, Any]:
    """Run one of the scripts; its seconds and its highest memory, in MB, as the system counts them."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(SCRIPTS / script), *map(str, flags)])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{script} ended with exit code {process.returncode}; its message is above")
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
    return {"seconds": time.perf_counter() - start, "peak_memory_mb": used.ru_maxrss / unit}


def table(measured: dict[str, dict[str, Any]], pairs: dict[str, dict[str, Any]]) -> str:
    """Both runs, and the differences between the three models, in Markdown."""
    lines = ["| | trained parameters | saved weights | peak memory | training | mean loss of training |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for kind, found in measured.items():
        trained = f"{found['trained']:,}" if found["trained"] else "all"
        lines.append(
            f"| {kind} | {trained} | {found['saved_mb']:,.1f} MB | {found['peak_memory_mb']:,.0f} MB | "
            f"{found['train_seconds']:,.0f} s for {found['steps']:,} steps | {found['train_loss']:.4f} |"
        )
    lines += ["", "| score | pair | from | to | change | 95 % interval |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for name in SCORES:
        for pair, scores in pairs.items():
            row = score_row(name, scores["metrics"][name], scores["n"])
            values = " | ".join(str(row[key]) for key in ("baseline", "tuned", "change", "interval"))
            lines.append(f"| {row['title']} | {pair} | {values} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main, interrupted="the run, the evaluation or both are left as they are")
