"""The folder of a training run: which checkpoint to resume from, what a new run removes, and a full disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from recipe.config import InstructionTrainingArguments, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_checkpoint(args: InstructionTrainingArguments) -> str | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:
        UserError: the folder holds another run and neither resuming nor overwriting was asked for; nothing to resume.
    """
    output_dir, checkpoint = Path(args.output_dir or ""), args.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file; name a folder")
    resume = (checkpoint or "false").lower()
    if resume == "false":
        checkpoint = None
    elif resume in ("true", "last"):
        checkpoint = last_whole_checkpoint(output_dir)
    if resume != "false" and (checkpoint is None or not (Path(checkpoint) / "trainer_state.json").is_file()):
        raise UserError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint}: no checkpoint there; name a checkpoint-N "
            "folder, or leave the flag out to start a new run"
        )
    resumes_this_run = checkpoint is not None and output_dir.resolve() in Path(checkpoint).resolve().parents
    if not (resumes_this_run or args.overwrite_output_dir) and output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(
            f"--output_dir {output_dir} already holds another run or other files; add --resume_from_checkpoint true to "
            "resume it, --overwrite_output_dir to start over, or name another folder"
        )
    return checkpoint


def last_whole_checkpoint(output_dir: Path) -> str | None:
    """The last checkpoint that was written to its end: the Trainer writes `trainer_state.json` after all else."""
    folders = [folder for folder in output_dir.glob("checkpoint-*") if (folder / "trainer_state.json").is_file()]
    return str(max(folders, key=lambda folder: int(folder.name.split("-")[-1]))) if folders else None


def clear_output_dir(args: InstructionTrainingArguments, checkpoint: str | None) -> None:
    """Make the folder; where a new run replaces an earlier one, remove what that one wrote."""
    output_dir = Path(args.output_dir or "")
    output_dir.mkdir(parents=True, exist_ok=True)
    if checkpoint is None and args.overwrite_output_dir and args.should_save:
        for folder in output_dir.glob("checkpoint-*"):
            shutil.rmtree(folder)
        weights = output_dir.glob("model*.safetensors*")
        reports = ("samples.jsonl", "bad_records.jsonl", "run.json", "trainer_state.json", "loss.png", "README.md")
        for path in (*weights, *(output_dir / name for name in reports)):
            path.unlink(missing_ok=True)


@contextmanager
def explain_full_disk(output_dir: Path, model: PreTrainedModel) -> Iterator[None]:
    """Report a full disk where torch and safetensors report another error.

    Raises:
        UserError: a save failed, and the disk has less space left than the model takes.
    """
    try:
        yield
    except (RuntimeError, SafetensorError, OSError) as error:
        free = shutil.disk_usage(output_dir).free
        if free > model.get_memory_footprint():
            raise
        whole = last_whole_checkpoint(output_dir)
        way_out = "--resume_from_checkpoint true" if whole else "--overwrite_output_dir"
        raise UserError(
            f"the disk of {output_dir} is full ({free / 1e6:.1f} MB free), and a save failed; last whole checkpoint: "
            f"{whole or 'none'}; free some space, or keep fewer with --save_total_limit, and start again with {way_out}"
        ) from error
