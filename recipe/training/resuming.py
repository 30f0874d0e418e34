"""Which checkpoint a run is resumed from: a damaged one is named, and the whole one before it is taken."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import safe_open
from transformers import TrainerState

from recipe.config import InstructionTrainingArguments, UserError
from recipe.training.checkpoints import INDEX, STATE, WEIGHTS, numbered, put_back, step_of
from recipe.training.manifest import MANIFEST, find_damage, is_hashed

# of a checkpoint: the Trainer's, FSDP's and DeepSpeed's
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_*", "pytorch_model_fsdp_*", "global_step*")
SHARDED = ("pytorch_model_fsdp*", "global_step*")  # weights that FSDP and DeepSpeed keep in a format of their own


def find_last_whole(args: InstructionTrainingArguments, output_dir: Path) -> Path | None:
    """The last checkpoint of a folder that is whole; None if there is no checkpoint at all.

    Those that are skipped are named on the terminal, each in a line. A checkpoint without a manifest is taken only if
    none with one is whole.

    Raises:
        UserError: none of them is whole.
    """
    if args.should_save:
        put_back(output_dir)
    here = [(has_manifest(folder), step_of(folder), folder.name) for folder in numbered(output_dir)]
    found = {entry for entries in _from_each_disk(args, here) for entry in entries}
    order = [output_dir / name for _, _, name in sorted(found, reverse=True)]
    problems: dict[Path, str] = {}
    for folder in order:
        if (problem := find_problem_anywhere(args, folder)) is None:
            skipped = [other for other in order if step_of(other) > step_of(folder)]
            for other in sorted(skipped, key=step_of, reverse=True):
                _say(
                    args, f"{other} is not resumed from: {problems.get(other, f'it has no {MANIFEST} to check it by')}"
                )
            _say_if_unchecked(args, folder)
            return folder
        problems[folder] = problem
    if not problems:
        return None
    told = "; ".join(f"{folder.name}: {problem}" for folder, problem in problems.items())
    raise UserError(
        f"--resume_from_checkpoint {args.resume_from_checkpoint}: no checkpoint in {output_dir} is whole ({told}); "
        "restore one, or start over with --overwrite_output_dir true"
    )


def check_whole(args: InstructionTrainingArguments, folder: Path) -> None:
    """Refuse a checkpoint that was named and is damaged.

    Raises:
        UserError: with the file, what is wrong with it, and the whole checkpoint before it, if there is one.
    """
    problem = find_problem_anywhere(args, folder)
    if problem is None:
        _say_if_unchecked(args, folder)
        return
    step = step_of(Path(folder.resolve().name))
    others = [other for other in numbered(folder.parent) if step < 0 or step_of(other) < step]
    [others, *_] = _from_each_disk(args, others)
    whole = next((other for other in others if find_problem_anywhere(args, other) is None), None)
    way_out = f"resume from {whole}" if whole else "no checkpoint before it is whole, so start a new run"
    raise UserError(f"--resume_from_checkpoint {folder} is damaged: {problem}; {way_out}")


def find_problem_anywhere(args: InstructionTrainingArguments, folder: Path) -> str | None:
    """`find_problem` of a checkpoint, and of the best one that it will load at the end; the same on all processes."""
    mine = None
    if args.should_save:  # one process for each disk
        mine = find_problem(folder, 1 if args.save_on_each_node else args.world_size)
        if mine is None and args.load_best_model_at_end and (best := best_of(folder)) not in (None, folder):
            damage = find_damage(best) if has_manifest(best) else None
            mine = damage and f"its best checkpoint, {best.name}, is damaged ({damage})"
    return next(filter(None, _from_each_disk(args, mine)), None)


def _from_each_disk(args: InstructionTrainingArguments, value: Any) -> list[Any]:
    """What the processes found that look at a disk: the main one, or with `save_on_each_node` one of each machine."""
    if args.world_size == 1:
        return [value]
    return [found for looks, found in gather_object([(args.should_save, value)]) if looks]


def _say(args: InstructionTrainingArguments, line: str) -> None:
    if args.process_index == 0:
        print(line)


def _say_if_unchecked(args: InstructionTrainingArguments, folder: Path) -> None:
    if not has_manifest(folder):
        _say(args, f"{folder} has no {MANIFEST}: its files are there and open, but their contents cannot be checked")
    elif not is_hashed(folder):
        _say(
            args,
            f"{folder} is whole; the run ended before its large files were hashed, so their contents are not checked",
        )


def has_manifest(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def is_model_only(folder: Path) -> bool:
    """Whether a checkpoint was saved with `--save_only_model`: nothing that resumes it is there."""
    return not any(file for name in (*OPTIMIZER_FILES, "scheduler.pt", "rng_state*") for file in folder.glob(name))


def best_of(folder: Path) -> Path | None:
    """The checkpoint beside this one that was the best until then, if it is there."""
    step = json.loads((folder / STATE).read_bytes()).get("best_global_step")
    best = folder.parent / f"checkpoint-{step}"
    return best if step and best.is_dir() else None


def find_problem(folder: Path, processes: int, contents: bool = True) -> str | None:
    """Why a checkpoint cannot be resumed from: the file, and what is wrong with it; None if it can.

    A checkpoint without a manifest, which the stock Trainer writes, is looked at as far as its files tell.

    Args:
        processes: of this run, each of which needs its own random state.
        contents: also read every file.
    """
    try:
        if not has_manifest(folder):
            return _find_problem_without_manifest(folder, processes)
        damage = find_damage(folder, contents)
        return damage if damage or not contents or is_hashed(folder) else _find_unreadable(folder)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"


def _find_problem_without_manifest(folder: Path, processes: int) -> str | None:
    try:
        state = TrainerState.load_from_json(str(folder / STATE))
    except FileNotFoundError:
        return f"{STATE} is missing"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{STATE} cannot be read ({type(error).__name__})"
    if not isinstance(state.global_step, int) or not isinstance(state.log_history, list):
        return f"{STATE} is not what a Trainer writes"
    if is_model_only(folder):
        return None
    return _find_missing(folder, processes) or _find_unreadable(folder)


def _find_missing(folder: Path, processes: int) -> str | None:
    if not any(file for name in OPTIMIZER_FILES for file in folder.glob(name)):
        return "optimizer.pt is missing"
    sharded = any(file for name in SHARDED for file in folder.glob(name))
    if not sharded and not any(file for name in WEIGHTS for file in folder.glob(name)):
        return "its weights are missing (no model.safetensors)"
    if any(folder.glob("model-*-of-*.safetensors")) and not (folder / INDEX).is_file():
        return f"{INDEX} is missing"
    ranks = len(list(folder.glob("rng_state_*.pth")))
    random_states = [f"rng_state_{rank}.pth" for rank in range(max(processes, ranks, 2))]
    if (folder / "rng_state.pth").exists() or not ranks:
        random_states = ["rng_state.pth"]
    needed = [*random_states] if any(folder.glob("global_step*")) else ["scheduler.pt", *random_states]
    missing = [name for name in needed if not (folder / name).is_file()]
    return f"{missing[0]} is missing" if missing else None


def _find_unreadable(folder: Path) -> str | None:
    """The first file that cannot be opened; those of torch are zip files with a checksum."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as file:
                    if file.testzip() is not None:
                        return f"{path.name} is damaged"
            elif path == folder / INDEX:
                shards = set(json.loads(path.read_bytes())["weight_map"].values())
                if missing := [name for name in sorted(shards) if not (folder / name).is_file()]:
                    return f"{missing[0]} is missing"
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
        except Exception as error:  # a damaged file raises anything
            return f"{path.name} cannot be read ({type(error).__name__})"
    return None
