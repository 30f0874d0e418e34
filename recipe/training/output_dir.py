"""The folder of a training run: where it may be, what is resumed from it or removed from it, and its disk."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from recipe.config import InstructionTrainingArguments, UserError
from recipe.disk import disk_error, explain_disk, try_writing
from recipe.files import check_place, make_folder, sweep
from recipe.lock import contents
from recipe.memory import is_out_of_memory
from recipe.training.checkpoints import ASIDE, clear_aside, numbered, put_back, remove, remove_model
from recipe.training.resuming import check_whole, find_last_whole, find_problem, is_model_only

MARGIN = 1.1  # of a checkpoint over its weights and optimizer


def find_checkpoint(args: InstructionTrainingArguments) -> str | None:
    """The checkpoint to resume from, or None for a new run; the same on all processes.

    Raises:
        UserError: the folder holds another run and neither resuming nor overwriting was asked for; nothing to resume,
            or nothing that is whole.
    """
    output_dir, asked = Path(args.output_dir or ""), args.resume_from_checkpoint or "false"
    check_place(args.output_dir)
    checkpoint = None
    if args.should_save:
        put_back(output_dir)
    if asked.lower() in ("true", "last"):
        checkpoint = find_last_whole(args, output_dir)
    elif asked.lower() != "false":
        checkpoint = Path(asked) if Path(asked).is_dir() else None
        if checkpoint is not None:
            check_whole(args, checkpoint)
    if asked.lower() != "false" and checkpoint is None:
        is_empty = not contents(output_dir)
        new = "leave the flag out" if is_empty else "start a new one with --overwrite_output_dir true"
        raise UserError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint}: no checkpoint there, so nothing to resume; name "
            f"a checkpoint-N folder, or {new}"
        )
    if checkpoint is not None and is_model_only(checkpoint) and numbered(checkpoint):
        raise UserError(
            f"--resume_from_checkpoint {asked}: this is the folder of a run; name one of its checkpoints, such as "
            f"{numbered(checkpoint)[0]}, or give --resume_from_checkpoint true"
        )
    if checkpoint is not None and is_model_only(checkpoint):
        raise UserError(
            f"{checkpoint} holds no optimizer, because it was saved with --save_only_model true: learning rate and "
            f"optimizer would start over; start a new run from its weights with --model_name_or_path {checkpoint} and "
            "another --output_dir"
        )
    if not (_is_of(checkpoint, output_dir) or args.overwrite_output_dir) and contents(output_dir):
        resume = "add --resume_from_checkpoint true to resume it, " if last_whole_checkpoint(output_dir) else "add "
        raise UserError(
            f"--output_dir {output_dir} already holds another run or other files; {resume}--overwrite_output_dir true "
            "to start over, or name another folder"
        )
    if args.overwrite_output_dir and (output_dir / "README.md").is_file() and not _holds_a_run(output_dir):
        raise UserError(
            f"--output_dir {output_dir} holds a README.md that is of no run, and the model card would replace it; move "
            "it, or name another folder"
        )
    return None if checkpoint is None else str(checkpoint)


def _is_of(checkpoint: str | Path | None, output_dir: Path) -> bool:
    """Whether a checkpoint that is resumed is one of the run in this folder."""
    return checkpoint is not None and output_dir.resolve() in Path(checkpoint).resolve().parents


def _holds_a_run(output_dir: Path) -> bool:
    """Whether a run, finished or not, has written into the folder."""
    names = ("run.json", "trainer_state.json", "config.json", "samples.jsonl")
    return any((output_dir / name).is_file() for name in names) or bool(numbered(output_dir))


def last_whole_checkpoint(output_dir: Path) -> str | None:
    """The last checkpoint whose files are there in full length; their contents are not read."""
    folders = (folder for folder in numbered(output_dir) if not is_model_only(folder))
    return next((str(folder) for folder in folders if find_problem(folder, 1, contents=False) is None), None)


def clear_output_dir(args: InstructionTrainingArguments, checkpoint: str | None) -> None:
    """Make the folder; remove what a killed run left unfinished and, for a new run, what an earlier one wrote."""
    output_dir = Path(args.output_dir or "")
    make_folder(output_dir)
    if not args.should_save:
        return
    sweep(output_dir)
    clear_aside(output_dir)
    if args.overwrite_output_dir and not _is_of(checkpoint, output_dir):
        remove_model(output_dir)
        for path in earlier_run(output_dir):
            remove(path) if path.is_dir() else path.unlink(missing_ok=True)


def earlier_run(output_dir: Path) -> list[Path]:
    """What a run has written, that a new one would not write over: checkpoints, weights and reports."""
    names = ("samples.jsonl", "bad_records.jsonl", "run.json", "trainer_state.json", "loss.png", "README.md")
    reports = filter(Path.is_file, (output_dir / name for name in names))
    return [*numbered(output_dir), *output_dir.glob("model*.safetensors*"), *reports]


def check_disk(args: InstructionTrainingArguments, model: nn.Module, checkpoint: str | None) -> None:
    """Refuse a disk without room for what the run will write at once: its weights, with what resumes them.

    Raises:
        UserError: the free space, and what removing the earlier run frees, is less than that.
    """
    output_dir = Path(args.output_dir or "")
    parts = _parts_of_a_save(model)
    if args.save_strategy == "no" or args.save_only_model or not args.optim.startswith("adamw_torch"):
        del parts["optimizer"]
    needed = sum(parts.values())
    going = [output_dir / ASIDE]
    if args.overwrite_output_dir and not _is_of(checkpoint, output_dir):
        going += earlier_run(output_dir)
    files = [file for path in going for file in (path, *path.rglob("*")) if file.is_file()]
    free = shutil.disk_usage(output_dir).free + sum(file.stat().st_size for file in files)
    if free < needed:
        listed = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in parts.items())
        raise UserError(
            f"--output_dir {output_dir}: its disk has {free / 1e6:,.1f} MB free, and a save needs "
            f"{needed / 1e6:,.1f} MB ({listed}); free some space, name a folder on another disk, or save less: "
            "--save_only_model true"
        )


def _parts_of_a_save(model: nn.Module) -> dict[str, int]:
    """Bytes of the weights that are saved, each once, and of Adam's two means."""
    adapter = hasattr(model, "peft_config")  # PEFT saves what is trained
    weights = {each.data_ptr(): each.nbytes for each in model.parameters() if each.requires_grad or not adapter}
    trained = sum(tensor.nbytes for tensor in model.parameters() if tensor.requires_grad)
    return {"weights": sum(weights.values()), "optimizer": 2 * trained}


@contextmanager
def explain_full_disk(output_dir: Path, model: nn.Module) -> Iterator[None]:
    """Report a disk that is full or fails in one line, also where torch's writer does not say why a save failed.

    Raises:
        UserError: the disk takes no more, or, when a save has failed, would not take a checkpoint.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        found = disk_error(error)
        saves = {frame.name for frame in traceback.extract_tb(error.__traceback__)} & {"_save_checkpoint", "save_model"}
        if found is None and saves and isinstance(error, RuntimeError | SafetensorError):
            found = try_writing(output_dir, int(MARGIN * sum(_parts_of_a_save(model).values())))
        if found is None:
            raise
        whole = last_whole_checkpoint(output_dir)
        if saves and found.filename is None:
            found.filename = str(output_dir)
        flag = "resume_from_checkpoint" if whole else "overwrite_output_dir"
        then = f"run it again with --{flag} true; last whole checkpoint: {whole or 'none'}"
        raise UserError(explain_disk(found, output_dir, then=then)) from error
