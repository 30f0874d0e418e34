"""Training runs that are killed at random moments until they are through, beside one that was left alone.

`survive` runs one configuration. As a script, this is the long form, `make chaos`:

    python tests/chaos/kills.py --kills 1000 --output outputs/chaos/kills.json
"""

import argparse
import hashlib
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import processes  # noqa: E402

from recipe.console import BUG  # noqa: E402
from recipe.provenance import versions  # noqa: E402
from recipe.training.output_dir import last_whole_checkpoint  # noqa: E402
from recipe.training.stopping import STOPPED  # noqa: E402

DEMO = ROOT / "recipe" / "demo"
DROPOUT = "resid_pdrop=0.1,attn_pdrop=0.1,embd_pdrop=0.1"
COMMON = {
    "model_name_or_path": DEMO / "base", "validation_ratio": 0.2, "test_ratio": 0, "max_steps": 18,
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 3,
    "eval_strategy": "steps", "eval_steps": 6, "logging_steps": 4, "report_to": "none", "disable_tqdm": True,
    "num_sample_generations": 1, "max_length": 96, "bf16": False,
}  # fmt: skip
CONFIGURATIONS = {  # beside COMMON
    "padded": {},
    "shared prefixes": {"batching": "shared_prefix"},
    "dropout": {"config_overrides": DROPOUT},
    "dropout, workers": {"config_overrides": DROPOUT, "dataloader_num_workers": 1},
    "dropout, persistent workers": {
        "config_overrides": DROPOUT, "dataloader_num_workers": 1, "dataloader_persistent_workers": True,
    },
    "accumulation": {"gradient_accumulation_steps": 3, "config_overrides": DROPOUT},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "token budget": {"max_tokens_per_batch": 300},
    "whole text": {"mask_prompt": False},
    "bfloat16": {"bf16": True, "config_overrides": DROPOUT},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 6, "save_strategy": "epoch"},
    "answers": {"eval_generate": True, "generation_max_new_tokens": 8},
    "best model": {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_steps": 6},
    "one checkpoint": {"save_total_limit": 1},
    "noise": {"neftune_noise_alpha": 5},
    "recomputed activations": {"gradient_checkpointing": True, "config_overrides": DROPOUT},
    "adafactor": {"optim": "adafactor"},
    "cosine, warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 4},
    "streaming": {"streaming": True, "shuffle_buffer": 16},
    "streaming, token budget, workers, dropout": {
        "streaming": True, "max_tokens_per_batch": 300, "dataloader_num_workers": 2, "config_overrides": DROPOUT,
    },
    "streaming, two processes": {"streaming": True, "processes": 2, "per_device_train_batch_size": 2},
    "two processes": {"processes": 2, "per_device_train_batch_size": 2},
    "two processes, shared prefixes, dropout": {
        "processes": 2, "per_device_train_batch_size": 2, "batching": "shared_prefix", "config_overrides": DROPOUT,
    },
}  # fmt: skip
LONGEST = 120  # seconds of one start


@dataclass
class Survival:
    """What became of a configuration."""

    kills: dict[str, int] = field(default_factory=dict)  # by what was under way
    stopped: int = 0
    problems: list[str] = field(default_factory=list)


def command(folder: Path, data: Path, settings: dict, *flags: str) -> list[str]:
    settings = COMMON | settings | {"output_dir": folder, "data": data}
    words = [word for name, value in settings.items() if name != "processes" for word in (f"--{name}", str(value))]
    return [*words, *flags]


def start(folder: Path, data: Path, settings: dict, log: Path, *flags: str) -> list[subprocess.Popen]:
    with open(log, "ab") as output:
        return processes.start_ranks(
            ROOT / "scripts" / "train.py", settings.get("processes", 1), *command(folder, data, settings, *flags),
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def end_all(started: list[subprocess.Popen], number: int) -> None:
    for process in started:
        if process.poll() is None:
            processes.kill_group(process, number)
    for process in started:
        process.wait(timeout=LONGEST)


def results(folder: Path) -> dict:
    """What must be equal: the weights' SHA-256, the run's loss and its tokens."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return {"weights": weights, **{name: run["result"][name] for name in ("steps", "train_loss", "tokens_seen")}}


def wait_for(moment: str, folder: Path, started: list[subprocess.Popen], draw: random.Random, seconds: float) -> None:
    """Until something is under way, or the processes have ended; then a little more."""
    begun, last = time.monotonic(), draw.uniform(0, seconds)
    while all(process.poll() is None for process in started) and time.monotonic() - begun < LONGEST:
        if moment == "any" and time.monotonic() - begun > last:
            return
        if moment == "save" and (folder / "_unfinished").is_dir():
            time.sleep(draw.choice((0, 0, draw.uniform(0, 0.05))))
            return
        if moment == "final save" and (folder / "_unfinished" / "model").is_dir():
            time.sleep(draw.choice((0, draw.uniform(0, 0.05))))
            return
        if moment == "reports" and (folder / "model.safetensors").is_file():
            time.sleep(draw.uniform(0, 0.2))
            return
        time.sleep(0.001)


def ended_well(codes: set[int], number: int, said: str) -> bool:
    """Whether processes that were told to stop have stopped and saved, or ended as usual, or before their first step.

    Before that a process is interrupted, or gone while it imports; of two, one may see only that the other has gone.
    """
    before_the_first = "'loss'" not in said and not any(word in said for word in ("Traceback", BUG))
    return codes in ({0}, {STOPPED}) or (codes <= {1, -number} and before_the_first)


def survive(name: str, data: Path, folder: Path, kills: int, seed: int, number: int = signal.SIGKILL) -> Survival:
    """Kill a run `kills` times, then let it end; compare it with one that was left alone."""
    draw, survival, settings = random.Random(f"{name} {seed}"), Survival(), CONFIGURATIONS[name]
    log, alone, killed = folder / "log.txt", folder / "alone", folder / "killed"
    begun = time.monotonic()
    started = start(alone, data, settings, log)
    end = [process.wait(timeout=LONGEST) for process in started]
    seconds = time.monotonic() - begun
    if any(end):
        survival.problems.append(f"the run that was left alone ended with {end}: {log.read_text()[-500:]}")
        return survival
    expected = results(alone)
    while True:
        rest = kills - sum(survival.kills.values())
        flags = ["--overwrite_output_dir", "true"]
        if killed.exists() and last_whole_checkpoint(killed):
            flags = ["--resume_from_checkpoint", "true"]
        said = log.stat().st_size
        started = start(killed, data, settings, log, *flags)
        moment = draw.choice(["any", "any", "save", "save", "final save", "reports"]) if rest else "end"
        wait_for(moment, killed, started, draw, seconds)
        ends = [process.poll() for process in started]
        if None in ends and rest:
            end_all(started, number)
            survival.kills[moment] = survival.kills.get(moment, 0) + 1
            codes = {process.returncode for process in started}
            survival.stopped += codes == {STOPPED}
            if number != signal.SIGKILL and not ended_well(
                codes, number, log.read_bytes()[said:].decode(errors="replace")
            ):
                survival.problems.append(f"told, it ended with {codes}: {log.read_text(errors='replace')[-900:]}")
                return survival
            continue
        ends = [process.wait(timeout=LONGEST) for process in started]
        if any(ends):
            survival.problems.append(f"{flags} ended with {ends}: {log.read_text(errors='replace')[-900:]}")
            return survival
        found = results(killed)
        if found != expected:
            survival.problems.append(f"after {survival.kills}: {found}, not {expected}")
            return survival
        if not rest:
            return survival
        shutil.rmtree(killed)  # it came through before its time; again


def records(path: Path) -> Path:
    lines = (DEMO / "records" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument(
        "--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="CONFIGURATION"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    each, found, begun = -(-arguments.kills // len(arguments.only)), {}, time.monotonic()
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            data = records(Path(folder) / "records.jsonl")
            survival = survive(name, data, Path(folder), each, arguments.seed, getattr(signal, arguments.signal))
        found[name] = {"kills": survival.kills, "stopped": survival.stopped, "problems": survival.problems}
        print(name, found[name], flush=True)
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            total = sum(sum(each["kills"].values()) for each in found.values())
            content = {
                "command": shlex.join(["python", "tests/chaos/kills.py", *sys.argv[1:]]), "versions": versions(),
                "seconds": round(time.monotonic() - begun), "kills": total,
                "problems": sum(len(each["problems"]) for each in found.values()), "configurations": found,
            }  # fmt: skip
            arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(each["problems"] for each in found.values()))


if __name__ == "__main__":
    main()
