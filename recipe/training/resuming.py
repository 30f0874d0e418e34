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
from recipe.files import is_there, parse_json
from recipe.manifest import MANIFEST, about, find_damage, is_hashed
from recipe.training.checkpoints import INDEX, STATE, WEIGHTS, numbered, step_of

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
    here = [
        (not is_model_only(folder), has_manifest(folder), step_of(folder), folder.name)
        for folder in numbered(output_dir)
    ]
    found = {entry for entries in _from_each_disk(args, here) for entry in entries}
    order = [output_dir / entry[-1] for entry in sorted(found, reverse=True)]
    problems: dict[Path, str] = {}
    for folder in order:
        if (problem := find_problem_anywhere(args, folder)) is None:
            skipped = [other for other in order if step_of(other) > step_of(folder) and args.process_index == 0]
            for other in sorted(skipped, key=step_of, reverse=True):
                lacks = "it holds no optimizer" if is_model_only(other) else f"it has no {MANIFEST} to check it by"
                print(f"{other} is not resumed from: {problems.get(other, lacks)}")
            _say_what_is_uncertain(args, folder)
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
        _say_what_is_uncertain(args, folder)
        return
    step, others = step_of(Path(folder.resolve().name)), [*numbered(folder.parent)]
    others.sort(key=lambda other: (step_of(other) < step, step_of(other)), reverse=True)  # the one before it first
    [others, *_] = _from_each_disk(args, [other for other in others if not is_model_only(other)])
    whole = next((other for other in others if find_problem_anywhere(args, other) is None), None)
    way_out = f"resume from {whole}" if whole else "no other checkpoint is whole, so start a new run"
    raise UserError(f"--resume_from_checkpoint {folder} is damaged: {problem}; {way_out}")


def find_problem_anywhere(args: InstructionTrainingArguments, folder: Path) -> str | None:
    """`find_problem` of a checkpoint, and of the best one that it will load at the end; the same on all processes."""
    mine = None
    if args.should_save:  # one process for each disk
        mine = find_problem(folder, 1 if args.save_on_each_node else args.world_size)
        if mine is None and args.load_best_model_at_end:
            mine = _find_problem_of_best(folder)
    return next(filter(None, _from_each_disk(args, mine)), None)


def _from_each_disk(args: InstructionTrainingArguments, value: Any) -> list[Any]:
    """What the processes found that look at a disk: the main one, or with `save_on_each_node` one of each machine."""
    if args.world_size == 1:
        return [value]
    return [found for looks, found in gather_object([(args.should_save, value)]) if looks]


def _say_what_is_uncertain(args: InstructionTrainingArguments, folder: Path) -> None:
    """Of a checkpoint that is resumed: contents that cannot be checked, and random numbers that cannot go on."""
    lines = []
    if not has_manifest(folder):
        lines += [f"has no {MANIFEST}: its files are there and open, but their contents cannot be checked"]
    elif not is_hashed(folder):
        lines += ["is whole; the run ended before its large files were hashed, so their contents are not checked"]
    if (before := about(folder).get("world_size", args.world_size)) != args.world_size:
        processes = f"was saved by {before} processes and is resumed by {args.world_size}"
        lines += [f"{processes}: random numbers, as of dropout, are others from here on"]
    for line in lines if args.process_index == 0 else ():
        print(f"{folder} {line}")


def has_manifest(folder: Path) -> bool:
    return is_there(folder / MANIFEST)


def is_model_only(folder: Path) -> bool:
    """Whether a checkpoint was saved with `--save_only_model`: nothing that resumes it is there."""
    return not any(file for name in (*OPTIMIZER_FILES, "scheduler.pt", "rng_state*") for file in folder.glob(name))


def _find_problem_of_best(folder: Path) -> str | None:
    """Why the best checkpoint until this one cannot be loaded at the end; None if it can, or none was saved."""
    try:
        saved = parse_json((folder / STATE).read_bytes()).get("best_model_checkpoint")
        best = folder.parent / Path(saved or folder).name  # the run may have been moved
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{STATE} cannot be read ({type(error).__name__})"
    if best == folder:
        return None
    if not best.is_dir():
        return f"its best checkpoint, {best.name}, which --load_best_model_at_end would load, is missing"
    damage = find_damage(best) if has_manifest(best) else None
    return damage and f"its best checkpoint, {best.name}, is damaged ({damage})"


def find_problem(folder: Path, processes: int, contents: bool = True) -> str | None:
    """Why a checkpoint cannot be resumed from: the file, and what is wrong with it; None if it can.

    A checkpoint without a manifest, which the stock Trainer writes, is looked at as far as its files tell.

    Args:
        processes: of this run, each of which needs its own random state.
        contents: also read every file.
    """
    try:
        if not has_manifest(folder):
            return _find_problem_without_manifest(folder, processes, contents)
        damage = find_damage(folder, contents)
        return damage if damage or not contents or is_hashed(folder) else _find_unreadable(folder)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"


def _find_problem_without_manifest(folder: Path, processes: int, contents: bool) -> str | None:
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
    return _find_missing(folder, processes) or (_find_unreadable(folder) if contents else None)


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
