"""The folder of a training run: what may go on in it, what a new run removes from it, and a disk that is full."""

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
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint and args.resume_from_checkpoint.lower() != "false":
        checkpoint: str | None = args.resume_from_checkpoint
        if checkpoint.lower() in ("true", "last"):
            checkpoint = last_whole_checkpoint(output_dir)
        if checkpoint is not None and output_dir.resolve() not in Path(checkpoint).resolve().parents:
            _refuse_used(output_dir, args)
        if checkpoint is None or not (Path(checkpoint) / "trainer_state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {args.resume_from_checkpoint}: no checkpoint there; name a checkpoint-N "
                "folder, or leave the flag out to start a new run"
            )
        return checkpoint
    _refuse_used(output_dir, args)
    return None


def last_whole_checkpoint(output_dir: Path) -> str | None:
    """The last checkpoint that was written to its end: the Trainer writes `trainer_state.json` after all else."""
    folders = [folder for folder in output_dir.glob("checkpoint-*") if (folder / "trainer_state.json").is_file()]
    return str(max(folders, key=lambda folder: int(folder.name.split("-")[-1]))) if folders else None


def _refuse_used(output_dir: Path, args: InstructionTrainingArguments) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file; name a folder")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} already holds another run or other files; add --resume_from_checkpoint true to "
            "go on, --overwrite_output_dir to start over, or name another folder"
        )


def clear_output_dir(args: InstructionTrainingArguments, checkpoint: str | None) -> None:
    """Remove what a new run would mix with in the folder of an earlier one, after everything else was checked."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if checkpoint is None and args.overwrite_output_dir and args.should_save:
        for folder in output_dir.glob("checkpoint-*"):
            shutil.rmtree(folder)
        written = ("model*.safetensors*", "samples.jsonl", "run.json", "trainer_state.json", "loss.png", "README.md")
        for pattern in written:
            for path in output_dir.glob(pattern):
                path.unlink()


@contextmanager
def naming_a_full_disk(output_dir: Path, model: PreTrainedModel) -> Iterator[None]:
    """Say that the disk is full where torch and safetensors say something else."""
    try:
        yield
    except (RuntimeError, SafetensorError, OSError) as error:
        free = shutil.disk_usage(output_dir).free
        if free > model.get_memory_footprint():
            raise
        whole = last_whole_checkpoint(output_dir)
        way_out = (
            f"{whole} is whole: free some space, or keep fewer with --save_total_limit, and add "
            "--resume_from_checkpoint true"
            if whole
            else "nothing was saved before it: free some space, and start again with --overwrite_output_dir"
        )
        raise UserError(
            f"the disk of {output_dir} is full ({free / 1e6:.1f} MB free) and a save was cut short; {way_out}"
        ) from error
