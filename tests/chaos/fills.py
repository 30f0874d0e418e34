"""Scripts on a disk that fills, at one moment after another, and that go on when there is room again.

As a script, this is the long form, with a mounted disk:

    python tests/chaos/fills.py --moments 20 --output docs/results/full-disk.json
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import kills  # noqa: E402
from loopback_hub import WRITE_TOKEN, LoopbackHub  # noqa: E402
from small_disk import MountedDisk, RefusingDisk, full_disk  # noqa: E402

from recipe.manifest import find_damage  # noqa: E402
from recipe.provenance import versions  # noqa: E402
from recipe.training.checkpoints import numbered  # noqa: E402
from recipe.training.output_dir import last_whole_checkpoint  # noqa: E402
from recipe.training.resuming import find_problem  # noqa: E402

Disk = MountedDisk | RefusingDisk
BASE = ROOT / "recipe" / "demo" / "base"
TINY = {
    "model_type": "gpt2",
    "tokenizer_name": BASE,
    "config_overrides": "n_layer=1,n_embd=16,n_head=2,n_positions=256",
}
SMALL = {"model_name_or_path": BASE}
TRAINING = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "report_to": "none", "disable_tqdm": True,
    "validation_ratio": 0.1, "test_ratio": 0.1, "max_length": 64, "per_device_train_batch_size": 2,
    "eval_strategy": "steps", "eval_steps": 2, "num_sample_generations": 1, "learning_rate": 1e-3,
}  # fmt: skip
SECONDS = re.compile(rb'"seconds": [\d.]+, ')  # of an answer
RESUME, NEW = ("--resume_from_checkpoint", "true"), ("--overwrite_output_dir", "true")


def flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def only_error(done) -> str:
    """The one line of a script that could not write."""
    lines = done.stderr.splitlines()
    told = [line for line in lines if line.startswith(("error:", "process "))]
    assert done.returncode == 1 and len(told) == 1 and lines[-1] == told[0], done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return told[0]


def train(disk: Disk, data: Path, model: dict, *more: str):
    settings = TRAINING | model | {"output_dir": disk.folder / "run", "data": data}
    return disk.run("scripts/train.py", *flags(settings), *more)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def whole_checkpoints(run: Path) -> dict[str, str]:
    """Name to a hash of what resuming reads of it; each that is there must be whole."""
    found = {}
    for folder in numbered(run):
        assert (problem := find_problem(folder, 1)) is None, (folder, problem)
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*")):
            digest.update(path.name.encode() + path.read_bytes() if path.name != "manifest.json" else b"")
        found[folder.name] = digest.hexdigest()
    return found


def check_what_is_left(run: Path, before: dict[str, str], error: str) -> str:
    """Nothing torn, nothing lost, and `run.json` tells of it if the run had begun; returns its state."""
    left = whole_checkpoints(run)
    assert before.items() <= left.items(), "a checkpoint was lost or changed"
    if (run / "config.json").is_file():
        assert find_damage(run) is None
    assert not (run / "_unfinished").exists() and not list(run.glob(".*.draft"))
    assert "MB free" in error and "free some space" in error
    if left and "cannot be written" in error:
        assert "--resume_from_checkpoint true" in error
    state = json.loads((run / "run.json").read_text())["state"] if (run / "run.json").is_file() else "not begun"
    assert state in ("failed", "not begun") or "run.json" in error, state  # of the record itself there is no other
    return state


def moment(disk: Disk, data: Path, model: dict, free: int, enough: int, alone: str) -> str:
    """A new run with so many bytes free, which then goes on; what was told, and the state of its record."""
    run = disk.seen / "run"
    shutil.rmtree(run, ignore_errors=True)
    disk.leave(free)
    done = train(disk, data, model)
    if done.returncode == 0:
        assert weights(run) == alone
        return "had room"
    error = only_error(done)
    state = check_what_is_left(run, {}, error)
    checkpoint = last_whole_checkpoint(run)
    disk.leave(enough)
    done = train(disk, data, model, *(RESUME if checkpoint else NEW))
    assert done.returncode == 0 and weights(run) == alone, done.stderr[-2000:]
    if state == "not begun":
        return "told before the first step; begun again"
    return f"told, run.json {state}; " + ("resumed" if checkpoint else "begun again")


def results_of(done, place: Path) -> dict[str, bytes]:
    """What a script has written, when there was room."""
    assert done.returncode == 0, done.stderr[-2000:]
    return {path.name: SECONDS.sub(b"", path.read_bytes()) for path in sorted(place.iterdir())}


def same_but_time(found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Data that must be equal; other files tell of times and commands."""
    names = ("predictions.jsonl", "near_duplicates.jsonl")
    return found.keys() == expected.keys() and all(found[n] == expected[n] for n in names if n in expected)


def again_after(disk: Disk, script: str, free: int, enough: int, expected: dict, *words: str | Path) -> str:
    """A script whose results do not fit; the same command ends as it should when there is room."""
    place = disk.seen / "results"
    shutil.rmtree(place, ignore_errors=True)
    disk.leave(free)
    done, outcome = disk.run(script, *words), "had room"
    if done.returncode:
        error = only_error(done)
        assert "cannot be written" in error and ("MB free in" in error or "No space left" in error), error
        assert not (place.is_dir() and list(place.glob(".*.draft")))
        outcome = "told in one line"
    disk.leave(enough)
    assert same_but_time(results_of(disk.run(script, *words), place), expected)
    return outcome


def evaluation(disk: Disk, model: Path, data: Path) -> list[str | Path]:
    return [
        "--model", model, "--data", data, "--output_dir", disk.folder / "results", "--max_new_tokens", "4",
        "--split", "all", "--batch_size", "2",
    ]  # fmt: skip


def inspection(disk: Disk, data: Path) -> list[str | Path]:
    return ["--data", data, "--tokenizer_name", BASE, "--output_dir", disk.folder / "results", "--near_duplicates", "0"]


def publication(disk: Disk) -> list[str | Path]:
    return [disk.folder / "run", "--repo_id", "someone/demo", "--license", "mit"]


# --- the long form --------------------------------------------------------------------------------------------------


def sizes(largest: int, moments: int) -> list[int]:
    """Bytes that are free at each moment, from none to nearly enough."""
    return [largest * step // moments for step in range(moments)]


def fill_training(folder: Path, data: Path, model: dict, moments: int, size: int) -> Counter:
    with full_disk(folder, size) as disk:
        alone = train(disk, data, model)
        assert alone.returncode == 0, alone.stderr[-2000:]
        expected, used = weights(disk.seen / "run"), used_by(disk.seen / "run")
        found: Counter = Counter()
        for free in sizes(used, moments):
            outcome = moment(disk, data, model, free, size, expected)
            found[outcome] += 1
            print(f"  {free:,} of {used:,} bytes: {outcome}", flush=True)
    return found


def fill_script(disk: Disk, script: str, words: list[str | Path], moments: int, enough: int) -> Counter:
    shutil.rmtree(disk.seen / "results", ignore_errors=True)
    disk.leave(enough)
    expected, found = results_of(disk.run(script, *words), disk.seen / "results"), Counter()
    used = used_by(disk.seen / "results")
    for free in sizes(used, moments):
        outcome = again_after(disk, script, free, enough, expected, *words)
        found[outcome] += 1
        print(f"  {free:,} of {used:,} bytes: {outcome}", flush=True)
    return found


def fill_publication(disk: Disk, moments: int, enough: int) -> Counter:
    """The card does not fit; the earlier one stays, and nothing is pushed until it does."""
    found: Counter = Counter()
    with LoopbackHub() as hub:
        place = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": WRITE_TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        card = disk.seen / "run" / "README.md"
        before = card.read_bytes()
        for free in sizes(len(before), moments):
            disk.leave(free)
            done = disk.run("scripts/publish.py", *publication(disk), **place)
            error = only_error(done)
            assert f"{disk.folder}/run/README.md cannot be written" in error and card.read_bytes() == before
            assert not hub.sent("POST", "/commit/")
            found["told in one line"] += 1
        disk.leave(enough)
        done = disk.run("scripts/publish.py", *publication(disk), **place)
        assert done.returncode == 0 and card.read_bytes() != before, done.stderr[-2000:]
    return found


def used_by(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=20, help="of each script")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    enough, found = 250 * 2**20, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = kills.records(folder / "records.jsonl")
        for kind, model in (("tiny model", TINY), ("base model of 8 MB", SMALL)):
            print(f"training, {kind}", flush=True)
            outcome = fill_training(folder / kind, data, model, arguments.moments, enough)
            found[f"training, {kind}"] = dict(outcome)
        with full_disk(folder / "disk", enough) as disk:
            done = train(disk, data, TINY)
            assert done.returncode == 0, done.stderr[-2000:]
            model = shutil.copytree(disk.seen / "run", folder / "model")
            for kind, words in (("eval", evaluation(disk, model, data)), ("inspect_data", inspection(disk, data))):
                print(kind, flush=True)
                found[kind] = dict(fill_script(disk, f"scripts/{kind}.py", words, arguments.moments, enough))
            print("publish", flush=True)
            found["publish"] = dict(fill_publication(disk, 3, enough))
            mechanism = type(disk).__name__
    if arguments.output:
        moments = sum(count for each in found.values() for outcome, count in each.items() if outcome != "had room")
        content = {
            "command": f"python tests/chaos/fills.py --moments {arguments.moments}", "disk": mechanism,
            "versions": versions(), "moments": moments, "outcomes": found,
        }  # fmt: skip
        arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
