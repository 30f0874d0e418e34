"""A `transformers.Trainer` whose loss is the mean over all supervised tokens of a step, whatever the batch layout."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from recipe.collator import IGNORE_INDEX, DataCollatorWithSharedPrefix
from recipe.config import InstructionTrainingArguments
from recipe.data.origin import rows_in_words
from recipe.data.streaming import RecordStream
from recipe.evaluation.measures import score_responses
from recipe.generation import generate_responses
from recipe.manifest import about
from recipe.model import base_model
from recipe.reasoning import opened_by, split_scored
from recipe.templates import Template
from recipe.tokens import prompt_ids, without_end
from recipe.training.changes import apply_changed
from recipe.training.counts import NO_TOTALS, Counts
from recipe.training.gradients import clip_where_needed, embedding_rows_only
from recipe.training.layout_check import compiles_blocks, fitting_collator, model_inputs
from recipe.training.loss import (
    cross_entropy,
    linear_cross_entropy,
    rows_of_records,
    sums_of_records,
    targets_of,
    token_losses,
    token_weighted_metrics,
)
from recipe.training.sampling import Batches, check_accelerator_config, deal, loader_of, plan_batches
from recipe.training.saving import WholeSaves, weights_are_finite
from recipe.training.stopping import shield_workers
from recipe.training.streaming import Quarantine, stream_loader

Batch = dict[str, Any]  # what a collator returns: tensors, and the `segments` of a shared row

# Keeps the last hidden states alone. transformers documents only true and false: 5.23 also takes the index of a layer,
# 5.17 reads it as true and keeps the hidden states of all layers.
LAST_HIDDEN_STATES = {"output_hidden_states": -1}
ADVICE = (
    "Training stopped; nothing has been saved since the last checkpoint. Look at the rows, lower --learning_rate, or "
    "use --bf16 or float32 in place of --fp16."
)


class InstructionTrainer(WholeSaves):
    """Fine-tunes a causal language model on the batches of `DataCollatorForInstructionTuning`.

    It differs from the stock `transformers.Trainer` in this:

    - Loss: the mean cross-entropy over the supervised targets of all micro-batches and processes of an optimizer step.
      So 8 x 1 and 1 x 8 accumulated give the same gradients, as do one process and two.
    - Batches: each record once an epoch. One process and several take the same steps if their steps hold equally many
      records, also the last of an epoch (`recipe.training.sampling`); streamed data keeps the stock loader.
    - Evaluation: `eval_loss` (nats per supervised token), `eval_perplexity` and `eval_next_token_accuracy`, weighted by
      tokens: none depends on the batch size, and no logits are kept. Of a mixture also `eval_loss_SOURCE`.
    - Log: `tokens_per_second`, `padding`, `shared`, `supervised` and `num_input_tokens_seen` (docs/trackers.md), summed
      on the device and fetched when something is logged, never in between.
    - Generation: each evaluation answers `generation_records` and adds `eval_exact_match`, `eval_chrf` and others,
      which `metric_for_best_model` may name.
    - It stops with `FloatingPointError`, before anything is saved, if a loss or a weight is NaN or infinite. A bad
      training loss is reported at the next log or save, with its step and its rows.

    Takes the arguments of `transformers.Trainer` except `compute_metrics`, and three more: `generation_records` with
    `instruction`, `input` and `output`; the `template` of their prompts; and `max_new_tokens`, the longest response.

    Example::

        trainer = InstructionTrainer(
            model, training_args, data_collator=DataCollatorForInstructionTuning(tokenizer.eos_token_id),
            train_dataset=splits["train"], eval_dataset=splits["validation"], processing_class=tokenizer,
        )
        trainer.train()
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *further: Any,
        generation_records: Iterable[dict[str, Any]] = (),
        template: Template | None = None,
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> None:
        args = args or InstructionTrainingArguments("tmp_trainer")
        check_accelerator_config(args.accelerator_config)
        args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]  # the default dispatches streams
        super().__init__(model, args, *further, compute_metrics=token_weighted_metrics, **kwargs)  # type: ignore[misc]
        if compiles_blocks(args):
            self.accelerator.state.dynamo_plugin.use_regional_compilation = True
        self.layout_note: str | None = None  # why batches have another layout than was asked for
        if isinstance(self.data_collator, DataCollatorWithSharedPrefix):
            with self.accelerator.autocast():
                self.data_collator, self.layout_note = fitting_collator(self.model, self.data_collator)  # type: ignore
        records = list(generation_records)
        tokenizer: Any = self.processing_class
        self._generation_prompts = prompt_ids(template, tokenizer, records) if template else []
        self._generation_references = [without_end(record["output"], tokenizer.eos_token) for record in records]
        self._max_new_tokens = max_new_tokens
        self._max_tokens_per_batch = getattr(args, "max_tokens_per_batch", None)  # stock arguments do not have it
        self.model_accepts_loss_kwargs = True  # whatever the model's forward takes: compute_loss takes the step's count
        self._head: nn.Module | None = None  # the examined head, and whether the logits are its output as it is
        self._head_makes_logits = False
        stream = self.train_dataset if isinstance(self.train_dataset, RecordStream) else None
        self.quarantine = Quarantine(stream, args.output_dir) if stream else None
        self._records_per_step = 0.0  # not known of a stream
        self.counts = Counts(self.accelerator)
        self.add_callback(self.counts)

    # --- batches ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """`Trainer.get_train_dataloader`, with the batches of `train_batches`."""
        if isinstance(self.train_dataset, RecordStream):
            loader = stream_loader(self.train_dataset, self.args, self._train_batch_size, self.data_collator)
            return shield_workers(loader, self.args.ddp_timeout)
        args, batches = self.args, self.train_batches()
        loader = super().get_train_dataloader()
        if batches is None:
            return shield_workers(loader, self.args.ddp_timeout)
        loader = self.accelerator.prepare_data_loader(loader_of(batches, loader))
        loader.set_sampler(batches)  # accelerate passes the epoch to samplers, but not to a batch sampler that it wraps
        batches_per_step = args.gradient_accumulation_steps * args.world_size
        self._records_per_step = batches.records_per_epoch / len(batches) * batches_per_step
        return shield_workers(loader, self.args.ddp_timeout)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """`Trainer.get_eval_dataloader`, with all records of the dataset it is asked for.

        `dataloader_drop_last` is for training. With `dataloader_persistent_workers`, transformers would keep the loader
        of the first dataset for all others, and a resumed run would draw the workers' seed at another evaluation.
        """
        kept = self.args.dataloader_drop_last, self.args.dataloader_persistent_workers
        self.args.dataloader_drop_last = self.args.dataloader_persistent_workers = False
        try:
            return shield_workers(super().get_eval_dataloader(*args, **kwargs), self.args.ddp_timeout)
        finally:
            self.args.dataloader_drop_last, self.args.dataloader_persistent_workers = kept

    def train_batches(self) -> Batches | None:
        """The batches of an epoch, with each record in one; None for streamed data, which keeps the stock loader.

        Raises:
            ValueError: see `recipe.training.sampling.plan_batches`.
        """
        # private in transformers: the batch size after auto_find_batch_size has lowered it, and the order of records
        parts = self.args, self._train_batch_size, self._get_train_sampler
        return plan_batches(self.train_dataset, *parts, collate=self.data_collator)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Records of an optimizer step over all processes; with a token budget, their mean, for the log."""
        if self._max_tokens_per_batch is None:
            return super().get_total_train_batch_size(args)
        return round(self._records_per_step)

    # --- loss -------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        """The micro-batches of one optimizer step, and the count of their targets over all processes."""
        if self.state.global_step >= self.state.max_steps:  # resumed at its end, where the stock loop takes a step
            return [], None
        self.counts.window_start = self.counts.window_start or time.perf_counter()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if self.quarantine is not None:
            batches = list(map(self.quarantine.take, batches))
        if not batches:
            return batches, None
        count = torch.stack([(targets_of(batch) != IGNORE_INDEX).sum() for batch in batches]).sum().to(device)
        self.counts.supervised = self.counts.supervised + count
        return batches, self.accelerator.reduce(count, reduction="sum")

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Cross-entropy in nats, summed over this micro-batch's targets and divided by `num_items_in_batch`.

        The result is multiplied by the number of processes, because data parallelism averages gradients over them.
        Without `num_items_in_batch` it is the mean over this micro-batch alone.
        """
        targets, outputs = targets_of(inputs), None  # (batch, time)
        with self.accelerator.autocast():  # one block, so that the head is cast only once
            states = None if return_outputs else self._supervised_states(model, inputs, targets)
            if states is not None:
                hidden, head, supervised = states
                loss = linear_cross_entropy(hidden, head.weight, head.bias, supervised)
        if states is None:
            outputs = model(**model_inputs(inputs), use_cache=False)
            loss = cross_entropy(outputs.logits, targets, reduction="sum")
        if num_items_in_batch is None:
            loss = loss / (targets != IGNORE_INDEX).sum()
        else:
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        if model.training and self.counts.add(self.state.global_step + 1, loss.detach(), inputs):
            self._fetch_counts()
        return (loss, outputs) if return_outputs else loss

    def _supervised_states(
        self, model: nn.Module, inputs: Batch, targets: torch.Tensor
    ) -> tuple[torch.Tensor, nn.Linear, torch.Tensor] | None:
        """Hidden states (targets, hidden size), the head to apply to them, and targets (targets,).

        None if `head(hidden)` is not the model's logits: see `_head_is_plain`, or the model changes the logits after
        its head.
        """
        causal_model: Any = base_model(self.model)  # type: ignore[arg-type]
        head = causal_model.get_output_embeddings()
        examined = head is self._head
        if not examined:
            self._head, self._head_makes_logits = head, self._head_is_plain(head, causal_model)
        if not self._head_makes_logits:
            return None
        # logits only at the last position, for the comparison below
        outputs = model(**model_inputs(inputs) | {"logits_to_keep": 1, "use_cache": False} | LAST_HIDDEN_STATES)
        if not outputs.hidden_states or outputs.hidden_states[-1] is None:  # mllama and blenderbot do not return them
            self._head_makes_logits = False
            return None
        # (batch, time, hidden size), without what prompt tuning puts before a row
        hidden = outputs.hidden_states[-1][:, -inputs["input_ids"].shape[1] :]
        if not examined:  # once: a host sync
            with self.accelerator.autocast(), torch.no_grad():
                logits = head(hidden[:, -1:]).to(outputs.logits.dtype)
            self._head_makes_logits = torch.allclose(logits, outputs.logits, rtol=0, atol=0, equal_nan=True)
            if not self._head_makes_logits:
                return None
        if "logits_to_keep" in inputs:
            return hidden[0, inputs["logits_to_keep"]], head, targets[0]
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if "supervised" in inputs:
            hidden, targets = hidden[inputs["supervised"]], targets[inputs["supervised"]]
        return hidden, head, targets

    def _head_is_plain(self, head: nn.Module, causal_model: nn.Module) -> bool:
        """Whether we can apply the head: not if adapted, sharded, compiled whole or float16 (which scales the loss)."""
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        plain = not self._compiled_whole() and self.accelerator.mixed_precision != "fp16"  # wherever it was set
        parameters = inspect.signature(type(causal_model).forward).parameters
        return type(head) is nn.Linear and "logits_to_keep" in parameters and whole and plain

    # --- evaluation -------------------------------------------------------------------------------------------------

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Of each record its summed loss and correct predictions (batch, 2), its targets and row (batch, 2); no logits.

        The stock loop gathers them over processes and leaves out the rows it repeated to fill the last batch.
        """
        inputs = send_to_device(inputs, self.args.device)
        targets = targets_of(inputs)  # (batch, time)
        with torch.no_grad(), self.compute_loss_context_manager():
            states = self._supervised_states(model, inputs, targets)
            if states is not None:
                hidden, head, supervised = states
                with self.accelerator.autocast():
                    losses, correct = token_losses(hidden, head.weight, head.bias, supervised)
            else:
                logits = model(**model_inputs(inputs), use_cache=False).logits  # (batch, time, vocab)
                losses = cross_entropy(logits, targets, reduction="none")
                supervised = targets.flatten()
                correct = logits.argmax(-1).flatten() == supervised  # never at -100, which is no token
        sums = torch.stack([losses, correct, supervised != IGNORE_INDEX], dim=1)  # (targets, 3)
        sums = sums_of_records(sums, inputs, targets.shape)
        return None, sums[:, :2], torch.stack([sums[:, 2].long(), rows_of_records(inputs, len(sums))], dim=1)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`Trainer.evaluate`; its time does not count in the training log's tokens per second.

        Raises:
            FloatingPointError: the loss, or the perplexity, is not finite.
        """
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        for name, value in metrics.items():
            if name.endswith(("_loss", "_perplexity")) and not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} after step {self.state.global_step}. {ADVICE}")
        if self.counts.window_start is not None:
            self.counts.window_start += time.perf_counter() - start
        return metrics

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """`Trainer.evaluation_loop`, with the scores of generated responses beside the loss.

        Each process answers a share of the generation records, and scores the answers of all.
        """
        self.compute_metrics = functools.partial(token_weighted_metrics, dataset=dataloader.dataset)
        output, prompts = super().evaluation_loop(dataloader, *args, **kwargs), self._generation_prompts
        if not prompts or output.metrics is None or kwargs.get("metric_key_prefix") != "eval":
            return output
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # then all processes must answer every prompt
        share = deal(prompts, self.args.world_size)[self.args.process_index]
        with self.compute_loss_context_manager():
            responses = generate_responses(
                self.model,  # type: ignore[arg-type]
                self.processing_class,  # type: ignore[arg-type]
                prompts if sharded else share,
                max_new_tokens=self._max_new_tokens,
                batch_size=self.args.per_device_eval_batch_size,
                description="Generating (validation)" if self.is_world_process_zero() else None,
            )
        answers = [(response.text, response.stop_reason) for response in responses]
        texts, reasons = zip(*(answers if sharded else gather_object(answers)), strict=True)
        references, opened = self._generation_references, [opened_by(self.processing_class, p) for p in prompts]
        scored = [split_scored(*parts)[0] for parts in zip(texts, references, opened, strict=True)]
        scores = score_responses(scored, references, reasons)
        output.metrics.update({f"eval_{name}": value for name, value in scores.items()})
        return output

    # --- log --------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`, with throughput and shares of the tokens in every entry that has a training loss."""
        counts = self.counts
        if "loss" in logs and counts.window_start is not None:
            self._fetch_counts()
            logs.update(counts.end_window(), num_input_tokens_seen=self.state.num_input_tokens_seen)
        if "train_loss" in logs and counts.loss_sum is not None:  # the stock one forgets what was before a checkpoint
            self._fetch_counts()
            logs["train_loss"] = counts.loss_sum / max(1, self.state.global_step)
        super().log(logs, start_time)

    # --- saving -----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """`Trainer.train`, which then checks and counts what was not logged: later, processes may be on their own."""
        with embedding_rows_only(self.model if self._alone_on_cpu() and not self._compiled_whole() else None):
            output = super().train(*args, **kwargs)
        self._fetch_counts()
        return output

    def _compiled_whole(self) -> bool:
        return bool(self.args.torch_compile) and not compiles_blocks(self.args)

    def _alone_on_cpu(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.NO and self.args.device.type == "cpu"

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """The stock one (private in transformers); on a CPU, gradients that are short enough are not touched."""
        if self._alone_on_cpu() and self.accelerator.scaler is None:
            return clip_where_needed(model.parameters(), self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The stock one; with the totals of the run, and the settings that may change."""
        optimizer: Any = self.optimizer
        given = [dict(group) for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        self.counts.before = about(Path(checkpoint)).get("totals", {}) if checkpoint else NO_TOTALS
        if checkpoint:
            apply_changed(self, given, getattr(self.args, "allow_changed", None) or ())

    def _save_checkpoint(self, *args: Any) -> None:
        self._fetch_counts()
        self.about_run["totals"] = self.counts.totals
        super()._save_checkpoint(*args)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer.save_model`, whole or not at all, after a check that the weights are finite.

        Only a sharded model needs all processes: its weights are gathered.
        """
        if not weights_are_finite(self):
            raise FloatingPointError(f"the weights are not finite after step {self.state.global_step}. {ADVICE}")
        super().save_model(*args, **kwargs)

    def _fetch_counts(self) -> None:
        """Fetch the token counts of all processes, and stop if a loss was not finite: one host sync."""
        if (fetched := self.counts.fetch()) is None:
            return
        tokens, finite = fetched
        if finite:
            self._stop_on_bad_loss(finite)
        self.state.num_input_tokens_seen += tokens[self.args.include_num_input_tokens_seen == "all"]  # with padding

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Nothing: the stock Trainer would count a shared row by its mask, and wait for the device at each batch."""

    def _stop_on_bad_loss(self, finite: list[bool]) -> None:
        step, loss, rows = min(gather_object(self.counts.first_bad(finite)), key=lambda bad: bad[0])
        where = "" if rows is None else f" in the batch of {rows_in_words(self.train_dataset, rows)}"
        raise FloatingPointError(f"the loss is {loss} at step {step}{where}. {ADVICE}")
