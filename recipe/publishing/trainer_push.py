"""Push the model at every save while a run trains, and the finished run at the end."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from recipe.config import UserError
from recipe.publishing.hub import SETTINGS, WEIGHTS, Push, files_to_push, matching_files, open_repository, push_files

MODEL = (*WEIGHTS, *SETTINGS)


@dataclass(eq=False)
class PushToHub(TrainerCallback):
    """Pushes the model at every save, in the background while training goes on, and the finished run at the end.

    It replaces the push of the stock Trainer, which uploads everything in the output folder, `training_args.bin` with
    the token among it. A push that fails, and a save that is skipped because an earlier one is still being pushed, are
    reported in a line. Used as a context manager around training, it begins no further push when training fails.

    Example::

        push = PushToHub(open_repository("someone/demo"), Path(args.output_dir))
        trainer = Trainer(model, args, callbacks=[push], ...)
        with push:
            trainer.train()
            trainer.save_model()
        push.finish()
    """

    repo_id: str
    output_dir: Path
    every_save: bool = True  # else the finished run only
    always: bool = False  # do not skip saves; they are pushed one after the other
    revision: str | None = None
    api: HfApi = field(default_factory=HfApi)

    def __post_init__(self) -> None:
        self._links = self.output_dir / ".push"  # links to the files that are being pushed
        self._jobs: list[Future] = []  # huggingface_hub runs them one after the other
        self._bars = False  # whether bars were shown before training

    def __enter__(self) -> PushToHub:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not self._jobs:
            return
        running = [job for job in self._jobs if not job.cancel() and not job.done()]
        if running:
            tqdm.write(f"waiting for the push to {self.repo_id} that is still running")
            wait(running)
        shutil.rmtree(self._links, ignore_errors=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            shutil.rmtree(self._links, ignore_errors=True)  # of a run that was killed
            self._bars = not are_progress_bars_disabled()
            disable_progress_bars()  # those of uploads would break the Trainer's own

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to push the model of the checkpoint that was just saved."""
        if not state.is_world_process_zero or not self.every_save:
            return
        name = f"checkpoint-{state.global_step}"
        if not self.always and not all(job.done() for job in self._jobs):
            tqdm.write(f"  {name}: not pushed, an earlier push is still running")
            return
        try:
            link_files(matching_files(self.output_dir / name, MODEL), self._links / name)
        except OSError as error:  # for example a full disk; training goes on
            tqdm.write(f"  {name}: not pushed: {error}")
            return
        self._jobs.append(self.api.run_as_future(self._push_checkpoint, self._links / name))

    def finish(self) -> Push:
        """Wait for the pushes that are running, then push the finished run.

        Raises:
            UserError: the push failed or was interrupted; it names the command that pushes later.
        """
        try:
            wait(self._jobs)
            if self._bars:
                enable_progress_bars()
            shutil.rmtree(self._links, ignore_errors=True)
            return self._push(files_to_push(self.output_dir), "End of training")
        except (UserError, KeyboardInterrupt) as error:
            for job in self._jobs:
                job.cancel()
            reason = "the push was interrupted" if isinstance(error, KeyboardInterrupt) else error
            command = ["python", "scripts/publish.py", str(self.output_dir), "--repo_id", self.repo_id]
            command += ["--revision", self.revision] if self.revision else []
            raise UserError(
                f"{reason}\nthe run is complete in {self.output_dir}/; this pushes it later: {shlex.join(command)}"
            ) from error

    def _push_checkpoint(self, folder: Path) -> None:
        """Push the model and report the result in a line."""
        try:
            self._push(matching_files(folder, MODEL), f"Training in progress, step {folder.name.split('-')[1]}")
            tqdm.write(f"  {folder.name}: pushed to {self.repo_id}")
        except Exception as error:  # whatever it is, training goes on
            tqdm.write(f"  {folder.name}: not pushed: {' '.join(str(error).split()) or repr(error)}")
        shutil.rmtree(folder, ignore_errors=True)

    def _push(self, files: Mapping[str, Path], message: str) -> Push:
        return push_files(files, self.repo_id, message=message, revision=self.revision, api=self.api)


def replace_trainer_push(args: TrainingArguments) -> PushToHub:
    """Check that we may push, and return the callback that pushes as `args` say; the stock Trainer then does not push.

    Raises:
        UserError: the strategy would push pickles; or see `recipe.publishing.hub.open_repository`.
    """
    strategy = HubStrategy(args.hub_strategy)
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise UserError(
            f"--hub_strategy {strategy.value} would push pickles (optimizer.pt, rng_state.pth), and only safetensors, "
            "text and pictures leave this machine; use every_save or end, and copy checkpoint folders by other means"
        )
    args.push_to_hub = False
    output_dir = Path(args.output_dir or "")
    api = HfApi(token=args.hub_token)
    repo_id = args.hub_model_id or output_dir.absolute().name
    if args.process_index == 0:
        repo_id = open_repository(repo_id, private=args.hub_private_repo, revision=args.hub_revision, api=api)
    every_save = strategy == HubStrategy.EVERY_SAVE
    return PushToHub(
        repo_id, output_dir, every_save=every_save, always=args.hub_always_push, revision=args.hub_revision, api=api
    )


def link_files(files: Mapping[str, Path], folder: Path) -> None:
    """Link files into a folder, so that they stay when `--save_total_limit` removes their checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        try:
            os.link(file, folder / name)
        except OSError:  # a file system without links
            shutil.copy2(file, folder / name)
