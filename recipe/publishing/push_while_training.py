"""Push the model at every save while a run trains, and the finished run at the end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from recipe.config import UserError
from recipe.publishing.hub import (
    SETTINGS,
    WEIGHTS,
    Push,
    check_reference,
    check_repo_id,
    files_to_push,
    matching_files,
    open_repository,
    push_files,
)
from recipe.publishing.secret_check import SecretError
from recipe.redaction import redact


@dataclass(eq=False)
class PushToHub(TrainerCallback):
    """Pushes the model at every save, in the background while training goes on, and the finished run at the end.

    It replaces the push of the stock Trainer, which uploads everything in the output folder, `training_args.bin` with
    the token among it. A push that fails, and a save that is skipped because an earlier one is still being pushed, are
    reported in a line. When the process ends, the push that is running ends with it: the Hub makes no partial commits.

    Example::

        push = PushToHub(open_repository("someone/demo"), Path(args.output_dir))
        trainer = Trainer(model, args, callbacks=[push], ...)
        trainer.train()
        trainer.save_model()
        push.finish()
    """

    repo_id: str
    output_dir: Path
    every_save: bool = True  # else the finished run only
    revision: str | None = None
    thread: Thread | None = field(default=None, init=False)  # of the last push that was begun

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        disable_progress_bars()  # the Hub's bars would break the Trainer's own

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        enable_progress_bars()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to push the model of the checkpoint that was just saved."""
        if not state.is_world_process_zero or not self.every_save:
            return
        checkpoint = self.output_dir / f"checkpoint-{state.global_step}"
        if self.thread is not None and self.thread.is_alive():
            tqdm.write(f"  {checkpoint.name}: not pushed, an earlier push is still running")
            return
        files = matching_files(checkpoint, (*WEIGHTS, *SETTINGS))
        # not HfApi.run_as_future: requests have no time limit, and its thread would keep a failed run alive
        self.thread = Thread(target=self._push_checkpoint, args=(checkpoint, files), daemon=True)
        self.thread.start()

    def finish(self) -> Push:
        """Wait for the push that is running, then push the finished run.

        Raises:
            UserError: the push failed or was interrupted; it names the command that pushes later.
        """
        try:
            if self.thread is not None:
                self.thread.join()
            files = files_to_push(self.output_dir)
            return push_files(files, self.repo_id, message="End of training", revision=self.revision)
        except (UserError, KeyboardInterrupt) as error:
            reason = "the push was interrupted" if isinstance(error, KeyboardInterrupt) else error
            command = ["python", "scripts/publish.py", str(self.output_dir), "--repo_id", self.repo_id]
            command += ["--revision", self.revision] if self.revision else []
            command += error.flags if isinstance(error, SecretError) else []
            raise UserError(
                f"{reason}\nthe run is complete in {self.output_dir}/; this pushes it later: {shlex.join(command)}"
            ) from error

    def _push_checkpoint(self, checkpoint: Path, files: Mapping[str, Path]) -> None:
        """Push the model and report the result in a line."""
        try:
            message = f"Training in progress, step {checkpoint.name.removeprefix('checkpoint-')}"
            push_files(files, self.repo_id, message=message, revision=self.revision)
            tqdm.write(f"  {checkpoint.name}: pushed to {self.repo_id}")
        except Exception as error:  # whatever it is, training goes on
            reason = " ".join(redact(str(error) or repr(error)).split())
            if not all(file.is_file() for file in files.values()):
                reason = "it was removed before it was on the Hub; a larger --save_total_limit keeps it longer"
            tqdm.write(f"  {checkpoint.name}: not pushed: {reason}")


def replace_trainer_push(args: TrainingArguments) -> PushToHub:
    """Check that we may push, and return the callback that pushes as `args` say; the stock Trainer then does not push.

    Raises:
        UserError: flags ask for what is not done here; or see `recipe.publishing.hub.open_repository`.
    """
    strategy = HubStrategy(args.hub_strategy)
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise UserError(
            f"--hub_strategy {strategy.value} would push pickles (optimizer.pt, rng_state.pth), and only safetensors, "
            "text and pictures leave this machine; use every_save or end, and copy checkpoint folders by other means"
        )
    if args.hub_always_push:
        raise UserError(
            "--hub_always_push: a save is always skipped while an earlier one is still being pushed; leave the flag out"
        )
    output_dir = Path(args.output_dir or "")
    repo_id = args.hub_model_id or output_dir.absolute().name
    try:
        check_repo_id(repo_id)
    except UserError as error:
        advice = "" if args.hub_model_id else "; the name is that of the output folder, --hub_model_id gives another"
        raise UserError(f"{error}{advice}") from error
    check_reference(args.hub_revision, "--hub_revision")
    args.push_to_hub = False
    if args.process_index == 0:
        repo_id = open_repository(repo_id, private=args.hub_private_repo, revision=args.hub_revision)
    return PushToHub(repo_id, output_dir, every_save=strategy == HubStrategy.EVERY_SAVE, revision=args.hub_revision)
