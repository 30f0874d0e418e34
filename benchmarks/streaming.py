"""Memory and speed of streamed data beside the same data read whole: generated records, one pass over them.

python benchmarks/streaming.py --records 1000000 --output docs/results/streaming.json

Each way is a run of scripts/train.py in a process of its own, whose memory is read twice a second, that of its workers
with it. `resident` counts pages of mapped files, which the system takes back when it needs them; `own` does not.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from recipe.config import parse_arguments, setting
from recipe.console import run_script
from recipe.files import write_json
from recipe.provenance import versions

ROOT = Path(__file__).parent.parent
WAYS: dict[str, list[str]] = {
    "whole": [],
    "streaming": ["--streaming", "true"],
    "streaming, 1 worker": ["--streaming", "true", "--dataloader_num_workers", "1"],
}
WORDS = ("the", "a", "of", "red", "small", "house", "river", "king", "green", "old", "song", "paper", "winter", "stone")
EVERY = 0.5  # seconds between two looks at the memory


@dataclass
class Arguments:
    """What is measured."""

    output: str = setting("outputs/benchmark/streaming.json", "Results.")
    records: int = setting(100_000, "Records of one pass.")
    ways: list[str] = setting(lambda: list(WAYS), "Which of them: " + "; ".join(WAYS))
    batch_size: int = setting(32, "Records of a step.")
    config_overrides: str = setting(
        "n_layer=1,n_embd=64,n_head=2", "Changes to GPT-2, from random weights; empty for the demo's base model."
    )


def main(argv: list[str]) -> None:
    [args] = parse_arguments([Arguments], argv, description=__doc__.partition("\n")[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder / "records", args.records)
        results = {way: measure(way, args, folder) for way in args.ways}
    write_json(Path(args.output), {"records": args.records, "versions": versions(), "ways": results})


def write_records(folder: Path, count: int, files: int = 8) -> None:
    """Records of some 20 to 60 tokens, no two alike, in JSON Lines files of equal size."""
    folder.mkdir()
    draw = random.Random(0)
    for number in range(files):
        with (folder / f"train-{number:05}-of-{files:05}.jsonl").open("w", encoding="utf-8") as file:
            for index in range(number * count // files, (number + 1) * count // files):
                texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 14))) for _ in range(2)]
                record = {"instruction": f"Write {index}: {texts[0]}.", "input": "", "output": f"{texts[1]}."}
                file.write(json.dumps(record) + "\n")


def measure(way: str, args: Arguments, folder: Path) -> dict[str, Any]:
    """Seconds, tokens per second and memory of a run."""
    output = folder / "run"
    model = ["--model_type", "gpt2", "--config_overrides", args.config_overrides] if args.config_overrides else []
    command = [
        sys.executable, "scripts/train.py", "configs/demo.yaml", *model, "--data", str(folder / "records"),
        "--max_steps", str(args.records // args.batch_size), "--per_device_train_batch_size", str(args.batch_size),
        "--validation_ratio", "0", "--test_ratio", "0", "--eval_strategy", "no", "--num_sample_generations", "0",
        "--save_strategy", "no", "--logging_steps", "200", "--disable_tqdm", "true", "--output_dir", str(output),
        *WAYS[way],
    ]  # fmt: skip
    begun = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        seen = []
        while process.poll() is None:
            seen.append(memory_of(process.pid))
            time.sleep(EVERY)
    if process.returncode:
        raise RuntimeError((folder / "log.txt").read_text()[-2000:])
    seconds = time.monotonic() - begun
    run = json.loads((output / "run.json").read_text())
    shutil.rmtree(output)
    last = seen[len(seen) // 2 :]  # training, of which the first half may still read
    train = run["result"]["train_seconds"]
    found = {
        "seconds": round(seconds, 1),
        "training_seconds": round(train, 1),
        "records_per_second": round(args.records / train, 1),
        "tokens_seen": run["result"]["tokens_seen"],
        "peak_resident_mb": max(one["resident"] for one in seen),
        "peak_own_mb": max(one["own"] for one in seen),
        "own_mb_in_the_second_half": [min(one["own"] for one in last), max(one["own"] for one in last)],
    }
    print(way, found, flush=True)
    return found


def memory_of(pid: int) -> dict[str, int]:
    """Memory in MB of a process and those that it has started, on Linux: all that is resident, and its own."""
    found = {"resident": 0, "own": 0}
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:  # it has ended
        return found
    found = {
        name: int(lines.get(key, "0 kB").split()[0]) // 1024
        for name, key in (("resident", "VmRSS"), ("own", "RssAnon"))
    }
    for child in children:
        found = {name: found[name] + more for name, more in memory_of(int(child)).items()}
    return found


if __name__ == "__main__":
    run_script(main, interrupted="nothing was written; run it again")
