"""Checkpoints that are whole or absent: written aside, flushed, listed in a manifest, then renamed; checked when read.

In an output folder, `_unfinished/` holds what is being written or removed. The stock Trainer's push leaves out what
begins with an underscore. All else there is whole, see `recipe.training.resuming`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.files import flush, flush_place, make_folder
from recipe.manifest import MANIFEST, Seal, add_hashes, write_manifest

if TYPE_CHECKING:
    from transformers import Trainer

ASIDE = "_unfinished"
STATE = "trainer_state.json"
PICKLED_ARGUMENTS = "training_args.bin"  # the Trainer's; nothing reads it, and it may hold a token
LAST = ("config.json", "adapter_config.json", MANIFEST)  # a folder without its config is no model to anyone
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors", INDEX, "adapter_model.safetensors")


@contextmanager
def whole_checkpoint(trainer: Trainer, run_dir: Path, about: Mapping[str, Any]) -> Iterator[Seal]:
    """Let the Trainer write a checkpoint to `run_dir / ASIDE`, and put it in its place when all processes have.

    Older checkpoints beyond `save_total_limit` go when the new one is on the disk. Every process calls it.

    Args:
        about: what the manifest tells beside step and number of processes, as hashes of settings and data; no secrets.

    Raises:
        OSError: the disk is full, or fails; what was there before is still there.
    """
    args, state, wait = trainer.args, trainer.state, trainer.accelerator.wait_for_everyone
    final = run_dir / f"checkpoint-{state.global_step}"
    draft = run_dir / ASIDE / final.name
    if args.should_save:
        make_folder(run_dir)
        shutil.rmtree(draft, ignore_errors=True)
    wait()
    seal = Seal(draft)
    try:
        yield seal
        best = run_dir / f"checkpoint-{state.best_global_step}"
        moved = bool(state.best_global_step) and (best == final or best.is_dir())
        if moved:
            state.best_model_checkpoint = str(best)  # not where it is written now
        wait()  # each process has written its files
        if args.should_save:
            if moved:
                state.save_to_json(str(draft / STATE))
            (draft / PICKLED_ARGUMENTS).unlink(missing_ok=True)
            seal.close({"step": state.global_step, "world_size": args.world_size, **about})
            _put_in_place(draft, final)
            remove_older(final, args.save_total_limit, state.best_model_checkpoint)
            seal.complete(final)
    finally:
        seal.abandon()
        if args.should_save:
            clear_aside(run_dir)
    wait()  # nobody reads it, or goes on, before


def _put_in_place(draft: Path, final: Path) -> None:
    """Rename a finished folder; one that is there goes aside first, and comes back if that fails."""
    earlier = draft.with_name(f"replaced-{final.name}")
    if final.is_dir():
        final.rename(earlier)
    elif final.exists():  # somebody else's file
        final.rename(kept := final.with_name(f"{final.name}.kept"))
        print(f"  {final} was a file; it is now {kept}")
    try:
        draft.rename(final)
    except OSError:
        put_back(final.parent)
        raise
    flush_place(final.parent)


def put_back(run_dir: Path) -> None:
    """Put a checkpoint back that went aside for another, which then did not come because the process was killed."""
    for earlier in (run_dir / ASIDE).glob("replaced-checkpoint-*"):
        final = run_dir / earlier.name.removeprefix("replaced-")
        if not final.exists():
            earlier.rename(final)
            flush(run_dir)


def clear_aside(run_dir: Path) -> None:
    """Remove what is unfinished, after a checkpoint that went aside for another is back in its place."""
    put_back(run_dir)
    shutil.rmtree(run_dir / ASIDE, ignore_errors=True)


def remove_older(new: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints: the new one, the best one, and of the others those of the last steps before it."""
    if not limit or limit < 0:
        return
    step, here = step_of(new), numbered(new.parent)
    keep = {new, Path(best or new)} & {new, *here}
    spare = [folder for folder in here if folder not in keep]
    spare.sort(key=lambda folder: (step_of(folder) < step, step_of(folder)), reverse=True)  # of an earlier run: first
    for folder in spare[max(0, limit - len(keep)) :]:
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that it is there whole, or not at all."""
    if folder.is_symlink():
        folder.unlink()
        return
    gone = folder.parent / ASIDE / f"removed-{folder.name}"
    gone.parent.mkdir(exist_ok=True)
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)  # a file that somebody reads may stay, on some network file systems
    with suppress(OSError):
        gone.parent.rmdir()


@contextmanager
def whole_model(folder: Path, writes: bool) -> Iterator[Path]:
    """A folder to save a model to, whose files then take their place in `folder`, its config and the manifest last.

    A model is finished when its config is there; that goes before its weights do, and comes after them.

    Args:
        writes: whether this process is the one that saves.

    Raises:
        OSError: the disk is full, or fails.
    """
    draft = folder / ASIDE / "model"
    if writes:
        make_folder(folder)
        shutil.rmtree(draft, ignore_errors=True)
    seal = Seal(draft)
    try:
        yield draft
        if writes and draft.is_dir():  # FSDP may keep its shards in checkpoints alone
            (draft / PICKLED_ARGUMENTS).unlink(missing_ok=True)
            seal.close({})
            add_hashes(draft, seal.content)
            write_manifest(draft, seal.content)
            _replace_model(folder, draft)
    finally:
        seal.abandon()
        if writes:
            clear_aside(folder)


def _replace_model(folder: Path, draft: Path) -> None:
    remove_model(folder)
    for path in sorted(draft.iterdir(), key=lambda path: LAST.index(path.name) + 1 if path.name in LAST else 0):
        if path.name in LAST:
            flush(folder)  # what comes before
        place = folder / path.name
        if place.is_dir() and path.is_dir():  # of an adapter
            shutil.rmtree(place)
        path.replace(place)
    flush_place(folder)


def remove_model(folder: Path) -> None:
    """Remove an earlier model's config, then its weights, so that no config stands beside weights of another run."""
    for name in reversed(LAST):
        (folder / name).unlink(missing_ok=True)
    flush(folder)
    for path in [path for pattern in WEIGHTS for path in folder.glob(pattern)]:
        path.unlink()
    (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)


def numbered(run_dir: Path) -> list[Path]:
    """The folders `checkpoint-N`, of the last step first; no other names, as `checkpoint-best`, and no files."""
    folders = [path for path in run_dir.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(folders, key=lambda path: (step_of(path), path.name), reverse=True)


def step_of(folder: Path) -> int:
    """The N of `checkpoint-N`, -1 for another name.

    >>> step_of(Path("run/checkpoint-500")), step_of(Path("run/checkpoint-best"))
    (500, -1)
    """
    found = re.fullmatch(r"checkpoint-([0-9]{1,18})", folder.name)
    return int(found[1]) if found else -1
