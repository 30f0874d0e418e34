"""A `transformers.Trainer` whose loss is the mean over all supervised tokens of a step, whatever the batch layout."""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from recipe.collator import IGNORE_INDEX
from recipe.config import InstructionTrainingArguments
from recipe.evaluation.measures import score_responses
from recipe.generation import generate_responses
from recipe.templates import Template
from recipe.training.loss import linear_cross_entropy, token_losses
from recipe.training.sampling import LengthGroupedBatchSampler, record_lengths

ADVICE = (
    "Training stopped, and nothing was saved of it since; look at the rows, lower --learning_rate, or leave half "
    "precision (--fp16) for --bf16 or float32."
)
NOT_FOR_THE_MODEL = ("labels", "shift_labels", "row", "example", "lengths", "supervised")
UNCHECKED_LIMIT = 1000  # micro-batches whose losses may wait for a look; a look is one host sync


class InstructionTrainer(Trainer):
    """Fine-tunes a causal language model on the batches of `DataCollatorForInstructionTuning`.

    What it does beyond the stock Trainer:

    - Loss: sum of token cross-entropies over the supervised targets, divided by their count over all micro-batches of
      the optimizer step and all processes. 8 x 1 and 1 x 8 accumulated give the same gradients, as do one process and
      two.
    - Evaluation: `eval_loss` (nats per supervised token), `eval_perplexity` and `eval_next_token_accuracy`, weighted by
      tokens, so that none depends on the batch size; no logits are kept, so memory does not grow with the split.
    - Log: `tokens_per_second` (without padding), `padding` (share of the tokens computed that were padding), `shared`
      (share of the tokens that were not computed, because a shared prefix stands once), `supervised` (share of the
      tokens whose prediction is learned) and `num_input_tokens_seen`, summed on the device and fetched when something
      is logged, never in between.
    - Generation: at each evaluation it answers `generation_records`, if given, and adds `eval_exact_match`,
      `eval_token_f1`, `eval_rouge_l`, `eval_chrf`, `eval_bleu`, `eval_stop_rate` and others to the metrics, so that
      `metric_for_best_model` may name one of them.
    - A loss that is NaN or infinite raises `FloatingPointError` at the next log or save, with the step and the rows of
      the first bad batch, and before anything is saved; so do weights or evaluation losses that are not finite.

    Takes the arguments of `transformers.Trainer`, but for `compute_metrics`, which is its own, and three
    more: `generation_records`, mappings with `instruction`, `input` and `output`, the `template` of their prompts, and
    the cap `max_new_tokens` on each response.

    Example::

        trainer = InstructionTrainer(
            model, training_args, data_collator=DataCollatorForInstructionTuning(tokenizer.eos_token_id),
            train_dataset=splits["train"], eval_dataset=splits["validation"], processing_class=tokenizer,
        )
        trainer.train()
    """

    loss_is_scaled_for_ga = True  # for transformers that ask; earlier ones look at model_accepts_loss_kwargs

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
        loading: Any = args.accelerator_config  # transformers has made an AcceleratorConfig of it
        if loading.dispatch_batches:
            raise ValueError(
                "accelerator_config: dispatch_batches cuts every tensor of a batch by rows, and not all of ours have "
                "one entry a row; leave it out"
            )
        loading.dispatch_batches = False  # the default of accelerate for streamed data is to dispatch
        super().__init__(model, args, *further, compute_metrics=token_weighted_metrics, **kwargs)  # type: ignore[misc]
        records = list(generation_records)
        self._generation_prompts = template.prompts(records) if template else []
        self._generation_references = [record["output"] for record in records]
        self._max_new_tokens = max_new_tokens
        self.model_accepts_loss_kwargs = True  # compute_loss normalises by itself, whatever forward() takes
        self._head: nn.Module | None = None  # that was looked at, and whether it may be computed outside of the model
        self._head_is_all = False
        self._unchecked: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []  # step, loss, rows of micro-batches
        self._real_tokens: torch.Tensor | int = 0  # without padding, on the device, since the last fetch
        self._computed_tokens = 0  # with padding
        self._supervised_tokens: torch.Tensor | int = 0  # on the device
        self._window_tokens = [0, 0, 0]  # these three of all processes, fetched, since the last log
        self._window_start: float | None = None

    # --- batches ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """`Trainer.get_train_dataloader`; with a token budget or `group_by_length`, batches of records of like length.

        Raises:
            ValueError: the training data has no column of lengths, or a record is longer than `max_tokens_per_batch`.
        """
        args, budget = self.args, _token_budget(self.args)
        if budget is None and args.train_sampling_strategy != "group_by_length":
            return super().get_train_dataloader()
        sampler = LengthGroupedBatchSampler(
            record_lengths(self.train_dataset, args.length_column_name),
            batch_size=None if budget else self._train_batch_size,
            max_tokens=budget,
            seed=args.seed if args.data_seed is None else args.data_seed,
            num_processes=args.world_size,
            drop_last=args.dataloader_drop_last,
        )
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
        )
        loader = self.accelerator.prepare(loader)
        loader.set_sampler(sampler)  # accelerate tells samplers the epoch, but not batch samplers behind its own
        self._records_per_step = sampler.records / len(sampler) * args.gradient_accumulation_steps * args.world_size
        return loader

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Records of an optimizer step, over all processes; with a token budget their mean, for samples per second."""
        if _token_budget(args) is None:
            return super().get_total_train_batch_size(args)
        return round(self._records_per_step)

    # --- loss -------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """The micro-batches of one optimizer step, and the count of their targets over all processes."""
        if self._window_start is None:
            self._window_start = time.perf_counter()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        count = torch.stack([(_targets(batch) != IGNORE_INDEX).sum() for batch in batches]).sum().to(device)
        self._supervised_tokens = self._supervised_tokens + count
        return batches, self.accelerator.reduce(count, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Cross-entropy in nats, summed over this micro-batch's targets and divided by `num_items_in_batch`.

        The result is multiplied by the number of processes, because data parallelism averages gradients over them.
        Without `num_items_in_batch` it is the mean over this micro-batch alone.
        """
        targets = _targets(inputs)  # (batch, time)
        outputs = None
        with self.accelerator.autocast():  # around both: the loss uses the model's cast of the head
            states = None if return_outputs else self._supervised_states(model, inputs, targets)
            if states is not None:
                hidden, head, supervised = states
                loss = linear_cross_entropy(hidden, head.weight, head.bias, supervised)
        if states is None:
            outputs = model(**_model_inputs(inputs), use_cache=False)
            loss = _cross_entropy(outputs.logits, targets, reduction="sum")
        if num_items_in_batch is None:
            loss = loss / (targets != IGNORE_INDEX).sum()
        else:
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        if model.training:
            self._remember(inputs, loss.detach())
        return (loss, outputs) if return_outputs else loss

    def _supervised_states(
        self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], targets: torch.Tensor
    ) -> tuple[torch.Tensor, nn.Linear, torch.Tensor] | None:
        """Hidden states (targets, hidden size), the head to apply to them, and targets (targets,).

        None where the model's logits are not what its head alone makes of its last hidden states: it may scale or cap
        them, adapt the head (PEFT), or shard it (FSDP, DeepSpeed). So it is where the model is compiled, which could
        not hand out its hidden states in one graph, and in float16, whose small gradients need their scale before.
        """
        causal_model: Any = self.model
        if hasattr(causal_model, "get_base_model"):  # PEFT's
            causal_model = causal_model.get_base_model()
        head = causal_model.get_output_embeddings()
        known = head is self._head
        if not known:
            self._head, self._head_is_all = head, self._may_compute(head, causal_model)
        if not self._head_is_all:
            return None
        # of the hidden states the last, and of the logits those of the last position, to compare with
        arguments = _model_inputs(inputs) | {"logits_to_keep": 1, "output_hidden_states": -1, "use_cache": False}
        outputs = model(**arguments)
        # (batch, time, hidden size), without what prompt tuning puts before a row
        hidden = outputs.hidden_states[-1][:, -inputs["input_ids"].shape[1] :]
        if not known:  # once: a host sync
            with self.accelerator.autocast(), torch.no_grad():
                found = head(hidden[:, -1:]).to(outputs.logits.dtype)
            self._head_is_all = torch.allclose(found, outputs.logits, rtol=0, atol=0, equal_nan=True)
            if not self._head_is_all:
                return None
        if "logits_to_keep" in inputs:
            return hidden[0, inputs["logits_to_keep"]], head, targets[0]
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if "supervised" in inputs:
            hidden, targets = hidden[inputs["supervised"]], targets[inputs["supervised"]]
        return hidden, head, targets

    def _may_compute(self, head: nn.Module, causal_model: nn.Module) -> bool:
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        plain = not (self.args.torch_compile or self.args.fp16)
        takes = inspect.signature(type(causal_model).forward).parameters
        return type(head) is nn.Linear and "logits_to_keep" in takes and whole and plain

    # --- evaluation -------------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Per row instead of logits: (batch, 2) summed cross-entropy and correct predictions, and (batch, 1) targets.

        The stock loop gathers them over processes and leaves out the rows it repeated to fill the last batch.
        """
        inputs = self._prepare_inputs(inputs)
        targets = _targets(inputs)  # (batch, time)
        with torch.no_grad(), self.compute_loss_context_manager():
            states = self._supervised_states(model, inputs, targets)
            if states is not None:
                hidden, head, supervised = states
                with self.accelerator.autocast():
                    losses, correct = token_losses(hidden, head.weight, head.bias, supervised)
            else:
                logits = model(**_model_inputs(inputs), use_cache=False).logits  # (batch, time, vocab)
                losses = _cross_entropy(logits, targets, reduction="none")
                supervised = targets.flatten()
                correct = logits.argmax(-1).flatten() == supervised  # never at -100, which is no token
        sums = torch.stack([losses, correct, supervised != IGNORE_INDEX], dim=1)  # (targets, 3)
        example = inputs.get("example")  # to which each target belongs
        rows = len(targets if example is None else inputs["row"])
        if example is None:
            example = torch.arange(targets.numel(), device=targets.device) // targets.shape[1]
            if states is not None and "supervised" in inputs:
                example = example[inputs["supervised"]]
        sums = sums.new_zeros(rows, 3).index_add(0, example, sums)
        return None, sums[:, :2], sums[:, 2:].long()

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
        if self._window_start is not None:
            self._window_start += time.perf_counter() - start
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """`Trainer.evaluation_loop`, with the scores of generated responses beside the loss."""
        output = super().evaluation_loop(*args, **kwargs)
        if (
            self._generation_prompts
            and output.metrics is not None
            and kwargs.get("metric_key_prefix", "eval") == "eval"
        ):
            output.metrics.update({f"eval_{name}": value for name, value in self._score_generations().items()})
        return output

    def _score_generations(self) -> dict[str, float]:
        """Answer the generation records, each process a share, and score all answers on every process."""
        everything = list(range(len(self._generation_prompts)))
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # generates only if all take part in every prompt
        with PartialState().split_between_processes(everything) as share, self.compute_loss_context_manager():
            mine = everything if sharded else share
            responses = generate_responses(
                self.model,  # type: ignore[arg-type]
                self.processing_class,  # type: ignore[arg-type]
                [self._generation_prompts[index] for index in mine],
                max_new_tokens=self._max_new_tokens,
                batch_size=self.args.per_device_eval_batch_size,
                description="Generating (validation)" if self.is_world_process_zero() else None,
            )
        answers = [(index, r.text, r.stop_reason) for index, r in zip(mine, responses, strict=True)]
        gathered = {index: (text, reason) for index, text, reason in gather_object(answers)}
        texts, reasons = zip(*(gathered[index] for index in everything), strict=True)
        return score_responses(texts, self._generation_references, reasons)

    # --- log --------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`, with throughput and the make-up of the batches beside every training loss."""
        if "loss" in logs and self._window_start is not None:
            self._fetch()
            real, computed, supervised = self._window_tokens
            logs["tokens_per_second"] = round(real / (time.perf_counter() - self._window_start), 1)
            logs["padding"] = round(max(0.0, 1 - real / max(1, computed)), 4)
            logs["shared"] = round(max(0.0, 1 - computed / max(1, real)), 4)
            logs["supervised"] = round(supervised / max(1, real), 4)
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            self._window_tokens, self._window_start = [0, 0, 0], None
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, after making sure that the losses since the last log and the weights are finite."""
        self._fetch()
        assert self.model is not None
        weights = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        bad = torch.stack([~weight.detach().isfinite().all() for weight in weights]).any()
        if self.accelerator.reduce(bad.int(), reduction="sum").item():
            raise FloatingPointError(f"the weights are not finite after step {self.state.global_step}. {ADVICE}")
        super().save_model(output_dir, _internal_call)

    def _remember(self, inputs: dict[str, torch.Tensor | Any], loss: torch.Tensor) -> None:
        """Keep what the next log needs, on the device."""
        computed = inputs["input_ids"].numel()
        self._computed_tokens += computed
        if "lengths" in inputs:
            self._real_tokens += inputs["lengths"].sum()
        else:
            self._real_tokens += inputs["attention_mask"].sum() if "attention_mask" in inputs else computed
        self._unchecked.append((self.state.global_step + 1, loss, inputs.get("row")))
        if len(self._unchecked) >= UNCHECKED_LIMIT:
            self._fetch()

    def _fetch(self) -> None:
        """Fetch the token counts of all processes, and stop if a loss was not finite: one host sync."""
        if not self._unchecked:
            return
        finite = torch.stack([loss for _, loss, _ in self._unchecked]).isfinite()
        counts = [self._real_tokens, self._computed_tokens, self._supervised_tokens, (~finite).sum()]
        summary = torch.stack([torch.as_tensor(count, device=finite.device) for count in counts])
        *tokens, bad = self.accelerator.reduce(summary, reduction="sum").tolist()
        if bad:
            self._stop_on_bad_loss(finite.tolist())
        self._unchecked, self._real_tokens, self._computed_tokens, self._supervised_tokens = [], 0, 0, 0
        self._window_tokens = [before + new for before, new in zip(self._window_tokens, tokens, strict=True)]
        if self.args.include_num_input_tokens_seen == "no":  # else the stock Trainer counts
            self.state.num_input_tokens_seen += tokens[0]

    def _stop_on_bad_loss(self, finite: list[bool]) -> None:
        mine = []
        if not all(finite):
            step, loss, rows = self._unchecked[finite.index(False)]
            mine = [(step, loss.item(), None if rows is None else rows.tolist())]
        step, loss, rows = min(gather_object(mine), key=lambda bad: bad[0])
        where = "" if rows is None else f" in the batch of training rows {', '.join(map(str, rows))}"
        raise FloatingPointError(f"the loss is {loss} at step {step}{where}. {ADVICE}")


def token_weighted_metrics(predictions: EvalPrediction) -> dict[str, float]:
    """Loss (nats per target), perplexity and accuracy from the per-row sums of `InstructionTrainer.prediction_step`."""
    sums: np.ndarray = np.asarray(predictions.predictions, dtype=np.float64).sum(axis=0)
    loss_sum, correct = sums.tolist()
    targets = np.sum(predictions.label_ids)
    loss = loss_sum / targets
    return {
        "loss": float(loss),
        "perplexity": float(np.exp(loss)),
        "next_token_accuracy": float(correct / targets),
    }


def _token_budget(args: TrainingArguments) -> int | None:
    """`max_tokens_per_batch`, which arguments of transformers alone do not have."""
    return getattr(args, "max_tokens_per_batch", None)


def _targets(inputs: dict[str, torch.Tensor | Any]) -> torch.Tensor:
    """What each position should predict, (batch, time): the collator's, or shifted here if it did not shift."""
    if "shift_labels" in inputs:
        return inputs["shift_labels"]
    return functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    """In nats, in float32 at least: half precision loses small probabilities."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(
        precise.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction
    )


def _model_inputs(inputs: dict[str, torch.Tensor | Any]) -> dict[str, torch.Tensor | Any]:
    return {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
