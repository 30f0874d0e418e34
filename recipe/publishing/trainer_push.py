"""Push checkpoints while a run trains, and the finished run at the end."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from recipe.config import UserError
from recipe.publishing.hub import SETTINGS, WEIGHTS, Push, files_to_push, matching_files, open_repository, push_files

MODEL = (*WEIGHTS, *SETTINGS)
# What resuming needs beside the model. Pickles, all but the last; transformers loads them with `weights_only=True`.
RESUMING = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_*.pth", "trainer_state.json")
STAGE = ".push"  # under the output folder: links to the files of the checkpoints that are being pushed


class PushToHub(TrainerCallback):
    """Pushes checkpoints in the background while training goes on, and the finished run at the end.

    It replaces the push of the stock Trainer, which uploads everything in the output folder, `training_args.bin` with
    the token among it. A push that fails, and a save that is skipped because an earlier one is still being pushed, are
    reported in a line. Used as a context manager around training, it begins no further push when training fails.

    Args:
        repo_id: `owner/name`, see `recipe.publishing.hub.open_repository`.
        strategy: as in `transformers.TrainingArguments.hub_strategy`: end (the finished run only), every_save (and the
            model at every save), checkpoint or all_checkpoints (and what resuming needs, in `last-checkpoint/` or in
            `checkpoint-N/`).
        always: do not skip saves; they are pushed one after the other.

    Example::

        push = PushToHub(open_repository("someone/demo"), strategy="checkpoint")
        trainer = Trainer(model, args, callbacks=[push], ...)
        with push:
            trainer.train()
            trainer.save_model()
        push.finish(Path(args.output_dir))
    """

    def __init__(
        self,
        repo_id: str,
        strategy: str = "every_save",
        *,
        revision: str | None = None,
        always: bool = False,
        api: HfApi | None = None,
    ) -> None:
        self.repo_id = repo_id
        self.strategy = strategy
        self.with_checkpoints = strategy in ("checkpoint", "all_checkpoints")
        self.revision = revision
        self.always = always
        self.api = api or HfApi()
        self._saved: list[Path] = []  # checkpoints of this run
        self._pushed: set[str] = set()  # the names of those that are on the Hub
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
        shutil.rmtree(self._saved[0].parent / STAGE, ignore_errors=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            shutil.rmtree(Path(args.output_dir) / STAGE, ignore_errors=True)  # of a run that was killed
            self._bars = not are_progress_bars_disabled()
            disable_progress_bars()  # those of uploads would break the Trainer's own

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to push the checkpoint that was just saved."""
        if self.with_checkpoints:
            PartialState().wait_for_everyone()  # each process writes its own random state
        if not state.is_world_process_zero or self.strategy == "end":
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._saved.append(checkpoint)
        if not self.always and any(not job.done() for job in self._jobs):
            tqdm.write(f"  {checkpoint.name}: not pushed, an earlier push is still running")
            return
        stage = Path(args.output_dir) / STAGE / checkpoint.name
        try:
            link_files(matching_files(checkpoint, (*MODEL, *RESUMING)), stage)
        except OSError as error:  # for example a full disk; training goes on
            tqdm.write(f"  {checkpoint.name}: not pushed: {error}")
            return
        self._jobs.append(self.api.run_as_future(self._push_checkpoint, stage, with_model=True))

    def finish(self, output_dir: Path) -> Push:
        """Wait for the pushes that are running, push checkpoints that are missing on the Hub, then the finished run.

        Raises:
            UserError: the push failed or was interrupted; it names the command that pushes later.
        """
        try:
            wait(self._jobs)
            if self._bars:
                enable_progress_bars()
            shutil.rmtree(output_dir / STAGE, ignore_errors=True)
            if self.with_checkpoints:
                for checkpoint in self._saved[-1:] if self.strategy == "checkpoint" else self._saved:
                    if checkpoint.name not in self._pushed:
                        self._push_checkpoint(checkpoint)
            return self._push(files_to_push(output_dir), "End of training")
        except (UserError, KeyboardInterrupt) as error:
            for job in self._jobs:
                job.cancel()
            reason = "the push was interrupted" if isinstance(error, KeyboardInterrupt) else error
            command = ["python", "scripts/publish.py", str(output_dir), "--repo_id", self.repo_id]
            command += ["--revision", self.revision] if self.revision else []
            raise UserError(
                f"{reason}\nthe run is complete in {output_dir}/; this pushes it later: {shlex.join(command)}"
            ) from error

    def _push_checkpoint(self, folder: Path, with_model: bool = False) -> None:
        """Push the model, then what resuming needs if the strategy says so; say in a line how it went."""
        message = f"Training in progress, step {folder.name.removeprefix('checkpoint-')}"
        try:
            if with_model:
                self._push(matching_files(folder, MODEL), message)
            if self.with_checkpoints:  # a second commit: the weights are on the Hub now, and are not uploaded again
                path = "last-checkpoint" if self.strategy == "checkpoint" else folder.name
                files = matching_files(folder, (*MODEL, *RESUMING))
                self._push({f"{path}/{name}": file for name, file in files.items()}, f"{message}, checkpoint")
        except Exception as error:  # whatever it is, training goes on
            tqdm.write(f"  {folder.name}: not pushed: {' '.join(str(error).split()) or repr(error)}")
        else:
            self._pushed.add(folder.name)
            tqdm.write(f"  {folder.name}: pushed to {self.repo_id}")
        if with_model:
            shutil.rmtree(folder, ignore_errors=True)  # the links

    def _push(self, files: Mapping[str, Path], message: str) -> Push:
        return push_files(files, self.repo_id, message=message, revision=self.revision, api=self.api)


def replace_trainer_push(args: TrainingArguments) -> PushToHub:
    """The callback that pushes as `args` say, once it is checked that it may; the stock Trainer then does not push.

    Raises:
        UserError: see `recipe.publishing.hub.open_repository`.
    """
    args.push_to_hub = False
    api = HfApi(token=args.hub_token)
    repo_id = args.hub_model_id or Path(args.output_dir or "").absolute().name
    if args.process_index == 0:
        repo_id = open_repository(repo_id, private=args.hub_private_repo, revision=args.hub_revision, api=api)
    strategy = HubStrategy(args.hub_strategy).value
    return PushToHub(repo_id, strategy, revision=args.hub_revision, always=args.hub_always_push, api=api)


def link_files(files: Mapping[str, Path], folder: Path) -> None:
    """Link files into a folder, so that they stay when `--save_total_limit` removes their checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        try:
            os.link(file, folder / name)
        except OSError:  # a file system without links
            shutil.copy2(file, folder / name)
