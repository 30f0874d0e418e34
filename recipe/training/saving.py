"""A `transformers.Trainer` that saves as `recipe.training.checkpoints` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, Trainer
from transformers.trainer_utils import TrainOutput

from recipe.files import draft_of
from recipe.manifest import Seal
from recipe.training.checkpoints import numbered, remove, whole_checkpoint, whole_model


class WholeSaves(Trainer):
    """A `transformers.Trainer` whose checkpoints and final model are whole or absent, without pickled arguments.

    Attributes:
        about_run: what the manifest of each checkpoint tells beside the step, as hashes of settings and data.
        stopped: whether training ends before its last step; then that step is saved, and no best model is loaded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.about_run: dict[str, Any] = {}
        self.stopped = False
        self._saved: tuple[int, int] | None = None  # step, and entries of the log, of the last checkpoint
        self._seal: Seal | None = None  # while a checkpoint is written
        self._last_seal: Seal | None = None  # which may still be hashed

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """`Trainer.train`, to the last hash of its last checkpoint."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._wait_for_hashes()

    def _wait_for_hashes(self) -> None:
        if self._last_seal is not None:
            self._last_seal.wait()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """`Trainer._save_checkpoint`, to a folder aside that gets its name when it is whole and on the disk."""
        self._wait_for_hashes()
        try:
            with whole_checkpoint(self, Path(self._get_output_dir(trial)), self.about_run) as self._seal:
                super()._save_checkpoint(model, trial)
        finally:
            self._seal, self._last_seal = None, self._seal
        self._saved = self.state.global_step, len(self.state.log_history)

    def _finalize_training(self, trial: Any, *further: Any) -> TrainOutput:
        """The stock end of training, which would remove checkpoints half, and that of a run that was stopped, too."""
        args, run_dir = self.args, Path(self._get_output_dir(trial))
        limit, loads_best = args.save_total_limit, args.load_best_model_at_end
        if self.stopped and self._saved != (self.state.global_step, len(self.state.log_history)):
            self._save_checkpoint(self.model_wrapped, trial)
            self.control = self.callback_handler.on_save(args, self.state, self.control)
        args.save_total_limit, args.load_best_model_at_end = None, loads_best and not self.stopped
        try:
            output = super()._finalize_training(trial, *further)
        finally:
            args.save_total_limit, args.load_best_model_at_end = limit, loads_best
        best = self.state.best_model_checkpoint
        if args.should_save and limit == 1 and best is not None and not self.stopped:
            for folder in numbered(run_dir):
                if folder != Path(best):
                    remove(folder)
        return output

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return run_dir if self._seal is None else str(self._seal.folder.parent)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, whole or not at all; only a sharded model needs all processes, to gather it."""
        if self._seal is not None:  # of a checkpoint, which is whole when all of it is
            super().save_model(output_dir, _internal_call)
            return
        with whole_model(Path(output_dir or self.args.output_dir or ""), self.args.should_save) as draft:
            super().save_model(str(draft), _internal_call=True)
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The stock one (private in transformers); beside an adapter what ends an answer, and not the card by PEFT."""
        super()._save(output_dir, state_dict)
        adapted: Any = self.model
        if hasattr(adapted, "peft_config") and self.args.should_save and output_dir is not None:
            (adapted.generation_config or GenerationConfig()).save_pretrained(output_dir)
            (Path(output_dir) / "README.md").unlink(missing_ok=True)

    def save_state(self) -> None:
        """`Trainer.save_state`, whole or not at all."""
        if self.is_world_process_zero():
            with draft_of(Path(self.args.output_dir or "") / "trainer_state.json") as draft:
                self.state.save_to_json(str(draft))


def weights_are_finite(trainer: Any) -> bool:
    """Whether no weight is NaN or infinite, of all processes where each has some of them."""
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in trainer.model.parameters()]
    bad = torch.stack([~weight.detach().isfinite().all() for weight in weights]).any().int()
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # else they are the same everywhere
        bad = trainer.accelerator.reduce(bad, reduction="sum")
    return not bad.item()
