"""One measurement of one contender, in its own process: reads a job in JSON; the last line it prints is the result.

Each contender imports its libraries itself, so that none pays for another's. To add a contender, add an entry to
`TRAINERS`, and a function if none here does its work.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

IGNORE_INDEX = -100
LEARNING_RATE = 5e-5  # constant and without weight decay for all, so that their losses can be compared

Job = dict[str, Any]
# input_ids, labels (aligned, not shifted), length, row, ends, prompt, completion, messages
Rows = list[dict[str, Any]]
# who takes conversations as they are; the others take each learned turn with its history as a sample of its own
TAKE_CONVERSATIONS = ("recipe_shared_prefix", "recipe_padded", "trainer_shared_mask", "trl_conversations")


def make_model(job: Job, attention: str | None = None) -> Any:
    """The same weights for every contender, in float32."""
    options = {"dtype": torch.float32, "attn_implementation": attention or job["attention"]}
    return AutoModelForCausalLM.from_pretrained(job["folder"], **options, trust_remote_code=False)


def load_tokenizer(job: Job) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], padding_side="right", trust_remote_code=False)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def peak_memory() -> int:
    """The most memory used so far, in bytes: of the GPU, or resident memory of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(job: Job) -> dict[str, Any]:
    """Optimizer steps of one contender on the rows of one part: the warm-up steps, then the timed ones."""
    rows, size = job["rows"], job["batch_size"]
    # what the step is worth, the same for all, however often a contender computes a history
    work = [
        {"records": size, "tokens": sum(len(row["input_ids"]) for row in rows[start : start + size])}
        for start in range(0, len(rows), size)
    ]
    if "samples" in job and job["contender"] not in TAKE_CONVERSATIONS:
        each = len(job["samples"]) // len(rows)
        most = max(each, job["most_samples"])
        accumulate = next(n for n in range(1, size + 1) if size % n == 0 and each * size <= most * n)
        rows, size = job["samples"], each * size
        job = job | {"batch_size": size, "accumulate": accumulate}
    first_timed = job["warmup"] * size
    if job["contender"].endswith("by_length"):
        rows[first_timed:] = sorted(rows[first_timed:], key=lambda row: -len(row["input_ids"]))
    meter = Meter(warmup=job["warmup"], steps=len(rows) // size, accumulate=job.get("accumulate", 1))
    TRAINERS[job["contender"]](job, rows, meter)
    batches = [
        {name: sum(batch[name] for batch in of_step) for name in of_step[0]} for of_step in meter.by_step(meter.batches)
    ]
    if "samples" in job:
        batches = [batch | of_step for batch, of_step in zip(batches, work, strict=True)]
    losses = [sum(of_step) for of_step in meter.by_step(torch.stack(meter.losses).tolist())]
    return {
        "seconds": [round(end - start, 5) for start, end in itertools.pairwise(meter.ticks)],
        "losses": [round(loss, 6) for loss in losses],
        "warmup": meter.warmup,
        **{name: [batch[name] for batch in batches] for name in batches[0]},
    }


@dataclass
class Meter(TrainerCallback):
    """Records the time of each optimizer step, and the loss and the content of each micro-batch."""

    warmup: int  # steps before the timed ones
    steps: int  # all of them
    accumulate: int = 1  # micro-batches of a step
    ticks: list[float] = field(default_factory=list)  # the start of the first step, then the end of each
    losses: list[torch.Tensor] = field(default_factory=list)  # nats, over the targets of the step
    batches: list[dict[str, int]] = field(default_factory=list)

    def by_step(self, values: list[Any]) -> list[list[Any]]:
        """Those of each step together, without what a loader has fetched beyond the last."""
        return [values[n * self.accumulate : (n + 1) * self.accumulate] for n in range(self.steps)]

    def tick(self) -> None:
        """Record a step's end. Waits for the GPU only before and after all timed steps, so the host can run ahead."""
        if torch.cuda.is_available() and len(self.ticks) in (self.warmup, self.steps):
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.tick()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.tick()

    def counting(self, collate: Callable[[Rows], Any]) -> Callable[[Rows], Any]:
        """The same collator, which also counts what is in each batch."""

        def collate_and_count(features: Rows) -> Any:
            batch = collate(features)
            counts = {
                "records": len(features),
                "tokens": sum(len(feature["input_ids"]) for feature in features),  # without padding
                "targets": int((batch["labels"] != IGNORE_INDEX).sum()),
                "positions": batch["input_ids"].numel(),  # what the model computes
            }
            self.batches.append(counts)
            return batch

        return collate_and_count

    def run(self, trainer: Any) -> None:
        """Train with any kind of `transformers.Trainer`.

        The losses are taken from `training_step`, because a callback sees none until it is logged, and logging each
        step would make the host wait for the GPU.
        """
        training_step = trainer.training_step

        def step_and_record(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = training_step(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

        trainer.training_step = step_and_record
        trainer.data_collator = self.counting(trainer.data_collator)
        trainer.add_callback(self)
        trainer.train()


def trainer_arguments(job: Job, rows: Rows) -> dict[str, Any]:
    """The arguments of all Trainers; everything else keeps its default."""
    return {
        "output_dir": f"{job['folder']}/trainer",  # nothing is saved there
        "per_device_train_batch_size": job["batch_size"] // job.get("accumulate", 1),
        "gradient_accumulation_steps": job.get("accumulate", 1),
        "max_steps": len(rows) // job["batch_size"],
        "train_sampling_strategy": "sequential",  # the rows are already in order
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": job["precision"] == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def train_recipe(job: Job, rows: Rows, meter: Meter, batching: Literal["padded", "shared_prefix"]) -> None:
    """As `scripts/train.py` does it."""
    from recipe import attention
    from recipe.config import DataArguments, InstructionTrainingArguments
    from recipe.model import fuse_activations
    from recipe.trainer import InstructionTrainer
    from recipe.training.collator_choice import make_collator

    tokenizer = load_tokenizer(job)
    model = make_model(job, attention.NAME if batching == "shared_prefix" else None)
    fuse_activations(model)
    arguments = InstructionTrainingArguments(**trainer_arguments(job, rows))
    collator = make_collator(DataArguments(batching=batching), arguments, model, tokenizer)
    columns = [name for name in ("input_ids", "labels", "length", "row", "ends") if name in rows[0]]
    dataset = Dataset.from_list(rows).select_columns(columns)
    meter.run(InstructionTrainer(model, arguments, collator, dataset, processing_class=tokenizer))


def train_stock(job: Job, rows: Rows, meter: Meter, our_collator: bool = False) -> None:
    """`transformers.Trainer`, with the usual collator of transformers or with ours."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = load_tokenizer(job)
    collator: Any = DataCollatorForSeq2Seq(tokenizer)
    columns = ["input_ids", "labels"]
    if our_collator:
        from recipe.collator import DataCollatorWithSharedPrefix

        collator = DataCollatorWithSharedPrefix(tokenizer.eos_token_id, attention="mask")
        columns += ["ends"] if "ends" in rows[0] else []
    dataset = Dataset.from_list(rows).select_columns(columns)
    arguments = TrainingArguments(**trainer_arguments(job, rows), remove_unused_columns=False)
    meter.run(Trainer(make_model(job), arguments, collator, dataset))


def train_trl(job: Job, rows: Rows, meter: Meter, **options: Any) -> None:
    """TRL's `SFTTrainer` on prompts and completions: it tokenizes them and trains on the completions only."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**trainer_arguments(job, rows), **options)
    dataset = Dataset.from_list(rows).select_columns(["prompt", "completion"])
    meter.run(SFTTrainer(make_model(job), arguments, train_dataset=dataset, processing_class=load_tokenizer(job)))


def train_trl_on_conversations(job: Job, rows: Rows, meter: Meter) -> None:
    """TRL's `SFTTrainer` on whole conversations, of which it trains on what the assistant says.

    A turn is learned behind what the template renders of the whole conversation. Where a template drops something from
    a history (reasoning, a system message), that is not what inference shows, and the loss is that of other work.
    """
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(job)
    tokenizer.chat_template = job["chat_template"]
    options = {"gradient_checkpointing": False, "assistant_only_loss": True}
    arguments = SFTConfig(**trainer_arguments(job, rows), **options)
    dataset = Dataset.from_list(rows).select_columns(["messages"])
    meter.run(SFTTrainer(make_model(job), arguments, train_dataset=dataset, processing_class=tokenizer))


def train_plain(job: Job, rows: Rows, meter: Meter) -> None:
    """A loop as in chapter 7 of *Build a Large Language Model From Scratch*, on a model of transformers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pad_token_id = load_tokenizer(job).eos_token_id

    def collate(features: Rows) -> dict[str, torch.Tensor]:
        inputs = [torch.tensor(row["input_ids"][:-1]) for row in features]
        targets = [torch.tensor(row["labels"][1:]) for row in features]
        return {
            "input_ids": pad_sequence(inputs, True, pad_token_id),
            "labels": pad_sequence(targets, True, IGNORE_INDEX),
        }

    model = make_model(job).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    loader: Any = torch.utils.data.DataLoader(
        rows, job["batch_size"] // meter.accumulate, collate_fn=meter.counting(collate)
    )  # type: ignore[arg-type]
    batches = iter(loader)
    meter.tick()
    while step := list(itertools.islice(batches, meter.accumulate)):
        optimizer.zero_grad()
        targets = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in step)
        for batch in step:
            with torch.autocast(device, torch.bfloat16, enabled=job["precision"] == "bf16"):
                logits = model(batch["input_ids"].to(device), use_cache=False).logits  # (batch, time, vocab)
                labels = batch["labels"].flatten().to(device)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / targets
            loss.backward()
            meter.losses.append(loss.detach())
        optimizer.step()
        meter.tick()


lean_trl = partial(train_trl, gradient_checkpointing=False)
# "trl" at the start of a name: left out where TRL is not installed. "by_length" at its end: gets the timed rows sorted
# by length, longest first, which is what train_sampling_strategy="group_by_length" makes of a few hundred rows.
TRAINERS: dict[str, Callable[[Job, Rows, Meter], None]] = {
    "recipe_shared_prefix": partial(train_recipe, batching="shared_prefix"),
    "recipe_padded": partial(train_recipe, batching="padded"),
    "trainer_shared_mask": partial(train_stock, our_collator=True),
    "trainer_padded": train_stock,
    "trainer_by_length": train_stock,
    "trl_default": train_trl,
    "trl_by_length": lean_trl,
    "trl_padding_free": partial(lean_trl, padding_free=True, max_length=None),
    "trl_conversations": train_trl_on_conversations,
    "plain_loop": train_plain,
}


if __name__ == "__main__":
    result = measure(json.load(sys.stdin))
    print(f"\n{json.dumps(result | {'peak_memory': peak_memory()})}")
