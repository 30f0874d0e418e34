"""One measurement of one contender, in its own process: reads a job in JSON; the last line it prints is the result.

Each contender imports its libraries itself, so that none pays for another's. To add a contender, add an entry to
`TRAINERS`, `PREPARATIONS` or `GENERATORS`, and a function if none here does its work.
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
from datasets import Dataset, disable_caching, disable_progress_bars, load_from_disk
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

IGNORE_INDEX = -100
LEARNING_RATE = 5e-5  # constant and without weight decay for all, so that their losses can be compared
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEED = 1  # of the random weights
NEW_TOKENS = 64  # at most in each answer
TIMED_PROMPTS = 8  # that the plain loop answers; its time is scaled to all prompts

Job = dict[str, Any]
Rows = list[dict[str, Any]]  # input_ids, labels (aligned, not shifted), length, row, prompt, completion


def make_model(job: Job, attention: str | None = None) -> Any:
    """The same weights for every contender, in float32: random ones from a seed, or those of a folder or Hub id."""
    options = {"dtype": torch.float32, "attn_implementation": attention or job["attention"]}
    config = AutoConfig.from_pretrained(job["folder"])
    if job["weights"] is not None:
        return AutoModelForCausalLM.from_pretrained(job["weights"], config=config, **options)
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config, **options)


def load_tokenizer(job: Job) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def peak_memory() -> int:
    """The most memory used so far, in bytes: of the GPU, or resident memory of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- training -------------------------------------------------------------------------------------------------------


def measure_training(job: Job) -> dict[str, Any]:
    """Optimizer steps of one contender on the rows of one part: the warm-up steps, then the timed ones."""
    rows, first_timed = job["rows"], job["warmup"] * job["batch_size"]
    if job["contender"].endswith("by_length"):
        rows[first_timed:] = sorted(rows[first_timed:], key=lambda row: -len(row["input_ids"]))
    meter = Meter(warmup=job["warmup"], steps=len(rows) // job["batch_size"])
    TRAINERS[job["contender"]](job, rows, meter)
    batches = meter.batches[: meter.steps]  # a loader may fetch one more
    return {
        "seconds": [round(end - start, 5) for start, end in itertools.pairwise(meter.ticks)],
        "losses": [round(loss, 6) for loss in torch.stack(meter.losses).tolist()],
        "warmup": meter.warmup,
        **{name: [batch[name] for batch in batches] for name in batches[0]},
    }


@dataclass
class Meter(TrainerCallback):
    """Records the time, the loss and the batch of each optimizer step."""

    warmup: int  # steps before the timed ones
    steps: int  # all of them
    ticks: list[float] = field(default_factory=list)  # the start of the first step, then the end of each
    losses: list[torch.Tensor] = field(default_factory=list)  # nats per target
    batches: list[dict[str, int]] = field(default_factory=list)

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
        "output_dir": job["scratch"],
        "per_device_train_batch_size": job["batch_size"],
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
    from recipe.training.batching import make_collator

    tokenizer = load_tokenizer(job)
    model = make_model(job, attention.NAME if batching == "shared_prefix" else None)
    fuse_activations(model)
    arguments = InstructionTrainingArguments(**trainer_arguments(job, rows))
    collator = make_collator(DataArguments(batching=batching), arguments, model, tokenizer)
    dataset = Dataset.from_list(rows).select_columns(["input_ids", "labels", "length", "row"])
    meter.run(InstructionTrainer(model, arguments, collator, dataset, processing_class=tokenizer))


def train_stock(job: Job, rows: Rows, meter: Meter, our_collator: bool = False) -> None:
    """`transformers.Trainer`, with the usual collator of transformers or with ours."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = load_tokenizer(job)
    collator: Any = DataCollatorForSeq2Seq(tokenizer)
    if our_collator:
        from recipe.collator import DataCollatorWithSharedPrefix

        collator = DataCollatorWithSharedPrefix(tokenizer.eos_token_id, attention="mask")
    dataset = Dataset.from_list(rows).select_columns(["input_ids", "labels"])
    meter.run(Trainer(make_model(job), TrainingArguments(**trainer_arguments(job, rows)), collator, dataset))


def train_trl(job: Job, rows: Rows, meter: Meter, **options: Any) -> None:
    """TRL's `SFTTrainer` on prompts and completions: it tokenizes them and trains on the completions only."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**trainer_arguments(job, rows), **options)
    dataset = Dataset.from_list(rows).select_columns(["prompt", "completion"])
    meter.run(SFTTrainer(make_model(job), arguments, train_dataset=dataset, processing_class=load_tokenizer(job)))


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
    loader: Any = torch.utils.data.DataLoader(rows, job["batch_size"], collate_fn=meter.counting(collate))  # type: ignore[arg-type]
    meter.tick()
    for batch in loader:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=job["precision"] == "bf16"):
            logits = model(batch["input_ids"].to(device), use_cache=False).logits  # (batch, time, vocab)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten().to(device))
        loss.backward()
        optimizer.step()
        meter.losses.append(loss.detach())
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
    "plain_loop": train_plain,
}


# --- preprocessing --------------------------------------------------------------------------------------------------


def measure_preprocessing(job: Job) -> dict[str, Any]:
    """From records on disk to token ids on disk; nothing is taken from a cache."""
    disable_caching()
    disable_progress_bars()
    dataset = load_from_disk(job["dataset"])
    tokenizer, prepare = load_tokenizer(job), PREPARATIONS[job["contender"]]
    prepare(job, tokenizer, dataset.select(range(2)))  # warm up
    start = time.perf_counter()
    prepare(job, tokenizer, dataset)
    return {"seconds": [round(time.perf_counter() - start, 4)], "records": len(dataset)}


def prepare_with_recipe(job: Job, tokenizer: Any, dataset: Dataset) -> None:
    from recipe.config import DataArguments
    from recipe.data import encode_records

    arguments = DataArguments(template=job["template"], max_length=job["max_length"])
    records = dataset.select_columns(["instruction", "input", "output", "row"])
    encode_records({"train": records}, tokenizer, arguments)


def prepare_with_tokenizers(job: Job, tokenizer: Any, dataset: Dataset) -> None:
    """Tokenize rendered prompts and responses, a thousand records a call, and keep nothing."""
    for batch in dataset.select_columns(["prompt", "completion"]).iter(batch_size=1000):
        for texts in batch.values():
            tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)


def prepare_with_trl(job: Job, tokenizer: Any, dataset: Dataset) -> None:
    """`SFTTrainer` tokenizes rendered prompts and completions when it is made; here it gets a tiny model."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_embd=8, n_head=1))
    arguments = SFTConfig(job["scratch"], use_cpu=True, report_to="none", max_length=job["max_length"])
    records = dataset.select_columns(["prompt", "completion"])
    SFTTrainer(model, arguments, train_dataset=records, processing_class=tokenizer)


PREPARATIONS = {"recipe": prepare_with_recipe, "tokenizers_alone": prepare_with_tokenizers, "trl": prepare_with_trl}


# --- generation -----------------------------------------------------------------------------------------------------


def measure_generation(job: Job) -> dict[str, Any]:
    """Answers to all prompts; the plain loop answers a few, evenly spaced by length, and its time is scaled to all."""
    tokenizer, model = load_tokenizer(job), make_model(job).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", PRECISIONS[job["precision"]])
    prompts = sorted(job["prompts"], key=len)
    asked = prompts
    if job["contender"] == "plain_loop":
        asked = prompts[:: max(1, len(prompts) // TIMED_PROMPTS)][:TIMED_PROMPTS]
    answer = GENERATORS[job["contender"]]
    answer(model, tokenizer, prompts[:1], 2)  # warm up
    start = time.perf_counter()
    answers = answer(model, tokenizer, asked, NEW_TOKENS)
    seconds = time.perf_counter() - start
    return {
        "seconds": [round(seconds * len(prompts) / len(asked), 4)],
        "prompts": len(prompts),
        "measured_prompts": len(asked),
        "new_tokens": sum(map(len, answers)),
    }


def answer_with_recipe(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[list[int]]:
    from recipe.generation import generate_responses

    return [response.token_ids for response in generate_responses(model, tokenizer, prompts, new_tokens)]


@torch.no_grad()
def answer_one_by_one(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[list[int]]:
    """The book's way: greedy, one prompt after the other, without a cache, so each token computes everything again."""
    answers, context = [], model.config.max_position_embeddings
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        prompt_length = ids.shape[1]
        for _ in range(new_tokens):
            logits = model(ids[:, -context:], use_cache=False).logits[:, -1]  # (1, vocab)
            next_id = logits.argmax(-1, keepdim=True)
            if next_id.item() == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, next_id], dim=1)
        answers.append(ids[0, prompt_length:].tolist())
    return answers


GENERATORS = {"recipe": answer_with_recipe, "plain_loop": answer_one_by_one}


if __name__ == "__main__":
    job = json.load(sys.stdin)
    other_parts = {"preprocessing": measure_preprocessing, "generation": measure_generation}
    measure = other_parts.get(job["part"], measure_training)
    result = measure(job)
    print(f"\n{json.dumps(result | {'peak_memory': peak_memory()})}")
