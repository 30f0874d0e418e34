"""The folder of a training run: where it may be, what is resumed from it or removed from it, and its disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import nn

from recipe.config import InstructionTrainingArguments, UserError
from recipe.files import check_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# of a checkpoint: the Trainer's, FSDP's and DeepSpeed's
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_*", "pytorch_model_fsdp_*", "global_step*")


def find_checkpoint(args: InstructionTrainingArguments) -> str | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:
        UserError: the folder holds another run and neither resuming nor overwriting was asked for; nothing to resume.
    """
    output_dir, checkpoint = Path(args.output_dir or ""), args.resume_from_checkpoint
    check_place(args.output_dir)
    resume = (checkpoint or "false").lower()
    if resume == "false":
        checkpoint = None
    elif resume in ("true", "last"):
        checkpoint = last_whole_checkpoint(output_dir)
    if resume != "false" and (checkpoint is None or not (Path(checkpoint) / "trainer_state.json").is_file()):
        is_empty = not output_dir.exists() or not any(output_dir.iterdir())
        new = "leave the flag out" if is_empty else "start a new one with --overwrite_output_dir true"
        raise UserError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint}: no checkpoint there, so nothing to resume; name "
            f"a checkpoint-N folder, or {new}"
        )
    if checkpoint is not None and not any(file for name in OPTIMIZER_FILES for file in Path(checkpoint).glob(name)):
        raise UserError(
            f"{checkpoint} holds no optimizer, because it was saved with --save_only_model true: learning rate and "
            f"optimizer would start over; start a new run from its weights with --model_name_or_path {checkpoint} and "
            "another --output_dir"
        )
    resumes_this_run = checkpoint is not None and output_dir.resolve() in Path(checkpoint).resolve().parents
    if not (resumes_this_run or args.overwrite_output_dir) and output_dir.exists() and any(output_dir.iterdir()):
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
    return checkpoint


def _holds_a_run(output_dir: Path) -> bool:
    """Whether a run, finished or not, has written into the folder."""
    names = ("run.json", "trainer_state.json", "config.json", "samples.jsonl")
    return any((output_dir / name).is_file() for name in names) or any(output_dir.glob("checkpoint-*"))


def last_whole_checkpoint(output_dir: Path) -> str | None:
    """The last checkpoint that was written to its end: the Trainer writes `trainer_state.json` after all else."""
    folders = [folder for folder in output_dir.glob("checkpoint-*") if (folder / "trainer_state.json").is_file()]
    return str(max(folders, key=lambda folder: int(folder.name.split("-")[-1]))) if folders else None


def clear_output_dir(args: InstructionTrainingArguments, checkpoint: str | None) -> None:
    """Make the folder; where a new run replaces an earlier one, remove what that one wrote."""
    output_dir = Path(args.output_dir or "")
    output_dir.mkdir(parents=True, exist_ok=True)
    if checkpoint is None and args.overwrite_output_dir and args.should_save:
        for path in earlier_run(output_dir):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def earlier_run(output_dir: Path) -> list[Path]:
    """What a run has written, that a new one would not write over: checkpoints, weights and reports."""
    names = ("samples.jsonl", "bad_records.jsonl", "run.json", "trainer_state.json", "loss.png", "README.md")
    reports = filter(Path.is_file, (output_dir / name for name in names))
    return [*output_dir.glob("checkpoint-*"), *output_dir.glob("model*.safetensors*"), *reports]


def check_disk(args: InstructionTrainingArguments, model: nn.Module, checkpoint: str | None) -> None:
    """Refuse a disk without room for what the run will write at once: its weights, with what resumes them.

    Raises:
        UserError: the free space, and what removing the earlier run frees, is less than that.
    """
    output_dir = Path(args.output_dir or "")
    weights = sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in model.parameters()}.values())
    parts, needed = [f"weights {weights / 1e6:,.0f} MB"], weights
    if args.save_strategy != "no" and not args.save_only_model and args.optim.startswith("adamw_torch"):
        optimizer = 2 * sum(tensor.nbytes for tensor in model.parameters() if tensor.requires_grad)  # Adam's two means
        parts, needed = [*parts, f"optimizer {optimizer / 1e6:,.0f} MB"], needed + optimizer
    free = shutil.disk_usage(output_dir).free
    if checkpoint is None and args.overwrite_output_dir:
        files = [file for path in earlier_run(output_dir) for file in ([path] if path.is_file() else path.rglob("*"))]
        free += sum(file.stat().st_size for file in files if file.is_file())
    if free < needed:
        raise UserError(
            f"--output_dir {output_dir}: its disk has {free / 1e6:,.0f} MB free, and a save needs "
            f"{needed / 1e6:,.0f} MB ({', '.join(parts)}); free some space, name a folder on another disk, "
            "or save less: --save_only_model true"
        )


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
