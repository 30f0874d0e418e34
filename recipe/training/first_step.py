"""From the trainer to its first step: what can fail is tried, told in one line, and costs no earlier run.

docs/api.md, "Mistakes that cost nothing", lists what is found out before the first step.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import logging

from recipe.data.streaming import RecordStream
from recipe.files import write_json_lines
from recipe.generation import generate_responses
from recipe.memory import is_out_of_memory
from recipe.training.checks import check_evaluations, check_schedule
from recipe.training.errors import Settings, explain_error, out_of_memory
from recipe.training.output_dir import check_disk, clear_output_dir

ENOUGH_TOKENS = 2  # of a tried answer: the second is computed from the cache


class FirstStep(TrainerCallback):
    """Tries what comes after training when it begins, and removes an earlier run when the first gradients are there.

    Until then the model was loaded and wrapped, optimizer, scheduler and trackers were built, a checkpoint was read and
    a batch went through the model and back, all by the Trainer itself: nothing is built twice, and nothing is left that
    could be known before the weights change.

    Example::

        first_step = FirstStep(settings, checkpoint, bad_records)
        with first_step.errors_explained():
            trainer = Trainer(...)
            first_step.watch(trainer, prompts)
            trainer.train(resume_from_checkpoint=checkpoint)
    """

    def __init__(self, settings: Settings, checkpoint: str | None, bad_records: list[dict[str, Any]]) -> None:
        self.settings, self.checkpoint, self.bad_records = settings, checkpoint, bad_records
        self.tried = self.taken = False

    def watch(self, trainer: Trainer, prompts: list[list[int]]) -> None:
        """Become the first of the trainer's callbacks, before those that write.

        Args:
            prompts: some of those that evaluations will answer.
        """
        self.trainer, self.prompts = trainer, prompts
        trainer.callback_handler.callbacks.insert(0, self)

    @contextmanager
    def errors_explained(self) -> Iterator[None]:
        """Errors before the first step become one line for the user; later ones stay, unless the memory is full.

        Raises:
            UserError: something failed before the first step, or memory was full later.
        """
        try:
            yield
        except Exception as error:
            if not self.taken:
                raise explain_error(error, self.settings) from error
            if is_out_of_memory(error):
                raise out_of_memory(error, f"what followed step {self.trainer.state.global_step:,}") from error
            raise

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.tried:  # auto_find_batch_size begins again with a smaller batch
            return
        check_evaluations(args, state)
        check_schedule(self.trainer)
        with torch.random.fork_rng(devices=[]):  # the run's random numbers stay the same
            try_evaluation(self.trainer)
            try_answer(self.trainer, self.prompts)
        try_save(self.trainer, self.checkpoint)
        self.tried = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take()  # before the others write their samples, if the run begins with an evaluation

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take()

    def _take(self) -> None:
        if not self.taken:
            self.trainer.accelerator.wait_for_everyone()  # an error of another process comes first
            clear_output_dir(self.settings.training, self.checkpoint)
            if self.bad_records and self.settings.training.should_save:
                output_dir = Path(self.settings.training.output_dir or "")
                write_json_lines(output_dir / "bad_records.jsonl", self.bad_records)
            self.taken = True


def try_evaluation(trainer: Trainer) -> None:
    """Evaluate one record on each process, as each evaluation will."""
    dataset: Any = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    count = trainer.args.world_size
    few = dataset.first(count) if isinstance(dataset, RecordStream) else dataset.select(range(min(len(dataset), count)))
    handler = trainer.callback_handler
    callbacks, handler.callbacks = handler.callbacks, []  # it shows no bar and is no evaluation to anyone
    try:
        trainer.evaluation_loop(trainer.get_eval_dataloader(few), "Trial", metric_key_prefix="trial")
    finally:
        handler.callbacks = callbacks


def try_answer(trainer: Trainer, prompts: list[list[int]]) -> None:
    """Generate two tokens, on all processes: a sharded model needs them all."""
    if prompts:
        with trainer.compute_loss_context_manager():
            generate_responses(trainer.model, trainer.processing_class, prompts[:1], ENOUGH_TOKENS)  # type: ignore


def try_save(trainer: Trainer, checkpoint: str | None) -> None:
    """Save the run with weights of one number each into a folder that is removed at once.

    Tokenizer and configs may be refused when they are saved, as may weights that share memory.

    Raises:
        UserError: the disk has no room for the real weights.
    """
    args, model = trainer.args, cast(Any, trainer.model)
    if not args.should_save or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    Path(args.output_dir or "").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".trial-") as folder, _no_progress_bars():
        trainer.processing_class.save_pretrained(folder)  # type: ignore
        torch.save(args, io.BytesIO())
        if isinstance(model, PreTrainedModel):
            small = _one_number_each(model.state_dict())
            model.save_pretrained(folder, state_dict=small, save_original_format=False)
        elif hasattr(model, "peft_config"):  # small
            model.save_pretrained(folder)
    check_disk(args, model, checkpoint)  # type: ignore


def _one_number_each(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tensor of one number for each of a model's; names of the same memory keep sharing one."""
    small: dict[tuple, torch.Tensor] = {}
    views = {name: (tensor.data_ptr(), tensor.shape, tensor.stride()) for name, tensor in state_dict.items()}
    return {name: small.setdefault(view, torch.zeros(1)) for name, view in views.items()}


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
