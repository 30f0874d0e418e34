"""`run.json`: written with the first step, completed at the end; a resumed run adds a leg to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from recipe.config import UserError
from recipe.console import process_rank
from recipe.files import file_hash, is_there, read_sealed, write_sealed
from recipe.provenance import describe_run
from recipe.shapes import COUNT
from recipe.training.changes import refuse_changes, what_decides
from recipe.training.collator_choice import attention_of
from recipe.training.errors import Settings

LEG = {"state": str, "last_step": COUNT}  # see `recipe.shapes`
OF_LEG = ("command", "versions", "hardware", "processes")


def keep_record(
    trainer: Any, settings: Settings, checkpoint: str | None, about: dict[str, Any], pushes: bool
) -> RunRecord:
    """The `RunRecord` of a trainer that is about to begin; its checkpoints will tell what decides their weights.

    Raises:
        UserError: the run is resumed with other settings or data, see `recipe.training.changes.refuse_changes`.
    """
    decides = what_decides(settings, trainer)
    decides["settings"]["base_weights"] = (about.get("adapter") or {}).get("base_weights")
    changed = refuse_changes(decides, checkpoint, settings.training.allow_changed or ()) if checkpoint else []
    trainer.about_run |= decides
    trainer.add_callback(record := RunRecord(trainer, settings, about, checkpoint, changed, pushes))
    return record


class RunRecord(TrainerCallback):
    """Keeps `run.json` in the output folder: `state` (running, stopped, failed or finished), what runs, its `legs`.

    Each start of the run is a leg: its command, versions, hardware, processes and time, its first and last step, how it
    ended (a leg that says nothing was killed), and what it was allowed to change. Totals in `result` are of all legs.

    Args:
        about: further parts of `run.json`.
        checkpoint: what the run is resumed from.
        changed: what it changes of the settings of that checkpoint, in words.
        pushes: whether the run is pushed.

    Example::

        record = keep_record(trainer, settings, checkpoint, {"data_hash": "…"}, pushes=False)
        trainer.train(resume_from_checkpoint=checkpoint)
        run = record.close("finished")
    """

    def __init__(
        self, trainer: Any, settings: Settings, about: dict[str, Any], checkpoint: str | None, changed: list[str],
        pushes: bool,
    ) -> None:  # fmt: skip
        self.trainer, self.settings, self.about, self.changed = trainer, settings, about, changed
        self.pushes = pushes
        self.path = Path(settings.training.output_dir or "") / "run.json"
        self.legs = _earlier_legs(Path(checkpoint).parent / "run.json") if checkpoint else []
        self.run: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = datetime.now().astimezone()
        self.first_step = state.global_step
        if self.first_step > state.max_steps:
            raise UserError(
                f"--resume_from_checkpoint: the checkpoint is of step {self.first_step:,}, and this run would end at "
                f"step {state.max_steps:,}; raise --max_steps or --num_train_epochs"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.run:
            self._begin()
            self._write("running")

    def _begin(self) -> None:
        """Add a leg for this start."""
        trainer = self.trainer
        self.run = describe_run(self.settings.model, self.settings.data, trainer, attention_of(trainer.model))
        if trainer.layout_note:
            self.run["ran"]["batch_layout"] = trainer.layout_note
        self.run["config"]["lora"] = asdict(self.settings.lora)
        self.run["config"]["training"]["push_to_hub"] = self.pushes  # the Trainer's own push is off
        for leg in self.legs:
            if leg["state"] == "running":  # it could not say how it ended
                leg |= {"state": "killed", "last_step": min(leg["last_step"], self.first_step)}
        self.legs.append(
            {name: self.run[name] for name in OF_LEG}
            | {"started": self.begun.isoformat(timespec="seconds"), "first_step": self.first_step}
            | {"last_step": self.first_step, "seconds": None, "state": "running"}
            | ({"changed": self.changed} if self.changed else {})
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write("running")

    def close(self, how: str) -> dict[str, Any]:
        """Complete the record with how the run ended (finished, stopped or failed), and return it."""
        if not self.run:  # resumed at its last step
            self._begin()
        if how == "finished" and (log := self.path.with_name("trainer_state.json")).is_file():
            self.about["log_hash"] = file_hash(log)
        self._write(how)
        return self.run

    @contextmanager
    def failures_told(self) -> Iterator[None]:
        """Let `run.json` say that a run failed, once it has begun."""
        try:
            yield
        except Exception:
            if self.run:
                with suppress(OSError):  # the disk may be what failed
                    self._write("failed")
            raise

    def _write(self, how: str) -> None:
        seconds = (datetime.now().astimezone() - self.begun).total_seconds()
        self.legs[-1] |= {"state": how, "last_step": self.trainer.state.global_step, "seconds": round(seconds, 3)}
        if self.trainer.quarantine is not None:
            self.about["bad_records"] = dict(reasons := self.trainer.quarantine.reasons)
            self.about["rows"]["bad"] = reasons.total()
        self.run |= {"state": how, **self.about, "legs": self.legs, "result": self._result()}
        if self.trainer.is_world_process_zero():
            write_sealed(self.path, self.run)

    def _result(self) -> dict[str, Any]:
        """Steps, tokens, seconds and losses until now; the evaluation is that of the weights that were saved."""
        args, state, totals = self.trainer.args, self.trainer.state, self.trainer.counts.totals
        evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
        if args.load_best_model_at_end:
            evaluations = [entry for entry in evaluations if entry["step"] == state.best_global_step]
        loss_sum, seconds = totals["loss_sum"], totals["seconds"]
        return {
            "steps": state.global_step,
            "tokens_seen": state.num_input_tokens_seen,
            "train_seconds": None if seconds is None else round(seconds, 3),
            "train_loss": None if loss_sum is None else loss_sum / max(1, state.global_step),
            "eval": evaluations[-1] if evaluations else None,
        }


def _earlier_legs(path: Path) -> list[dict[str, Any]]:
    """The legs of the run that is resumed, if its `run.json` is there; an earlier version wrote it at the end."""
    try:
        if is_there(path):
            return read_sealed(path, {"legs": [LEG]}, "leave it")["legs"]
        why = "it is not there"
    except UserError as error:
        why = str(error)
    if process_rank() == "0":
        print(f"{path} has no list of earlier starts; the list begins with this one ({why})")
    return []
