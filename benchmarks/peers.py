"""One measurement of `benchmarks/benchmark.py`, in a process of its own: peers.py JOB.json RESULT.json.

Libraries are imported where they are used, so that no contender pays for another's. Only the recipe's own rows import
the recipe.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IGNORE_INDEX = -100
LEARNING_RATE = 5e-5  # constant, without weight decay, for all: the losses stand beside the times
SEED = 1

Rows = list[dict[str, Any]]  # input_ids, labels (aligned, not shifted), prompt, completion


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    result = KINDS[job["kind"]](job)
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


# --- training steps -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A way to take optimizer steps.

    `order` is the rows' order over the timed steps: shuffled, or sorted by length, longest first, which is what
    `train_sampling_strategy="group_by_length"` makes of a few hundred rows. `head` says at which positions of its
    batches the vocabulary head is computed, for the count of floating-point operations: "all", "supervised", or
    "supervised on a GPU" and all on a CPU.
    """

    label: str
    train: Callable[[dict, Rows, Meter, Contender], None]
    options: dict[str, Any] = field(default_factory=dict)
    order: str = "shuffled"  # or "by length"
    head: str = "all"
    ours: bool = False
    package: str | None = None  # to install, if it is not there


class Meter:
    """What a contender's run leaves: the time of each step, its loss, and what was in its batch."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        self.model: Any = None
        self.losses: list[Any] = []  # nats per target
        self.batches: list[dict[str, int]] = []
        self.ticks: list[Any] = []

    def tick(self) -> None:
        """The end of a step, and the start of the first; on a GPU an event, for which nothing waits."""
        if not self.cuda:
            self.ticks.append(time.perf_counter())
            return
        import torch

        self.ticks.append(torch.cuda.Event(enable_timing=True))
        self.ticks[-1].record()

    def seconds(self) -> list[float]:
        if not self.cuda:
            return [end - start for start, end in zip(self.ticks, self.ticks[1:], strict=False)]
        import torch

        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in zip(self.ticks, self.ticks[1:], strict=False)]

    def counting(self, collate: Callable[[Rows], Any]) -> Callable[[Rows], Any]:
        """The collator, counting what it lays out: tokens without padding, targets, positions computed."""

        def counted(features: Rows) -> Any:
            batch = collate(features)
            self.batches.append(
                {
                    "records": len(features),
                    "tokens": sum(len(feature["input_ids"]) for feature in features),
                    "targets": int((batch["labels"] != IGNORE_INDEX).sum()),
                    "positions": batch["input_ids"].numel(),
                    "pairs": attention_pairs(batch),
                }
            )
            return batch

        return counted

    def run(self, trainer: Any) -> None:
        """Train with a `transformers.Trainer` of any kind."""
        from transformers import TrainerCallback

        meter, training_step = self, trainer.training_step

        class Ticks(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                meter.tick()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                meter.tick()

        def keeping_the_loss(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            meter.losses.append(loss.detach())
            return loss

        trainer.training_step = keeping_the_loss
        trainer.data_collator = self.counting(trainer.data_collator)
        trainer.add_callback(Ticks())
        self.model = trainer.model
        trainer.train()


def attention_pairs(batch: Any) -> int:
    """Query-key pairs that attention lays out for a batch, in each layer."""
    rows, width = batch["input_ids"].shape
    if "segments" in batch:
        return sum(p * p + sum(pairs_of_bundles(sorted(filter(None, rests)), p)) for p, rests in batch["segments"])
    return rows * width * width


def pairs_of_bundles(lengths: list[int], prefix: int) -> Iterator[int]:
    """Those of rests that are padded to the longest of their bundle, behind the prefix."""
    from recipe.attention import bundle_sizes

    ends = itertools.accumulate(bundle_sizes(lengths, prefix), initial=0)
    for start, end in itertools.pairwise(ends):
        yield (end - start) * lengths[end - 1] * (prefix + lengths[end - 1])


def measure_training(job: dict) -> dict:
    import torch

    contender = CONTENDERS[job["contender"]]
    rows = arranged(json.loads(Path(job["rows"]).read_text(encoding="utf-8")), job, contender.order)
    meter = Meter()
    contender.train(job, rows, meter, contender)
    losses = torch.stack(meter.losses).tolist()
    batches = meter.batches[: len(losses)]  # a loader may fetch one more
    supervised_only = contender.head == "supervised" or (contender.head == "supervised on a GPU" and meter.cuda)
    return {
        "seconds": [round(seconds, 5) for seconds in meter.seconds()],
        "losses": [round(loss, 6) for loss in losses],
        "warmup": job["warmup"],
        **{name: [batch[name] for batch in batches] for name in batches[0]},
        "flops": count_flops(meter.model, batches[job["warmup"] :], supervised_only),
        "peak_memory": torch.cuda.max_memory_allocated() if meter.cuda else peak_resident_memory(),
    }


def arranged(rows: dict[str, Rows], job: dict, order: str) -> Rows:
    """The rows of the warm-up steps, then those of the timed steps in the contender's order."""
    wanted = job["warmup"] * job["batch_size"]
    warmup = [rows["warmup"][index % len(rows["warmup"])] for index in range(wanted)]
    timed = rows["timed"]
    if order == "by length":
        timed = sorted(timed, key=lambda row: -len(row["input_ids"]))
    return warmup + timed


def count_flops(model: Any, batches: list[dict[str, int]], supervised_only: bool) -> int:
    """Floating-point operations of the forward and backward passes over `batches`, as they are laid out.

    6 x (weights of the blocks' linear layers x positions + hidden size x vocabulary x positions of the head)
    + 12 x layers x hidden size x query-key pairs. Recomputation and element-wise work are not counted.
    """
    from torch import nn

    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    outside = embeddings | {id(model.get_output_embeddings().weight)}
    linear = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in outside)
    total = 0
    for batch in batches:
        head_positions = batch["targets"] if supervised_only else batch["positions"]
        total += 6 * (linear * batch["positions"] + hidden * vocabulary * head_positions)
        total += 12 * model.config.num_hidden_layers * hidden * batch["pairs"]
    return total


def make_model(job: dict, attention: str | None = None) -> Any:
    """The same weights for every contender, in float32: random ones from a seed, or those of a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": attention or job["attention"]}
    config = AutoConfig.from_pretrained(job["model"])
    if job["weights"] is not None:
        return AutoModelForCausalLM.from_pretrained(job["weights"], config=config, **options)
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config, **options)


def load_tokenizer(job: dict) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"], padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def trainer_arguments(job: dict, rows: Rows) -> dict[str, Any]:
    """What all Trainers are told; everything else stays at their defaults."""
    import torch

    return {
        "output_dir": job["scratch"],
        "per_device_train_batch_size": job["batch_size"],
        "max_steps": len(rows) // job["batch_size"],
        "train_sampling_strategy": "sequential",  # the rows come in the order to take
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": job["precision"] == "bf16",
        "torch_compile": job["compile"],
        "use_cpu": not torch.cuda.is_available(),
        "seed": SEED,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def as_dataset(rows: Rows, columns: Sequence[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns})


def train_recipe(job: dict, rows: Rows, meter: Meter, contender: Contender) -> None:
    """As `scripts/train.py` does it."""
    from recipe import attention
    from recipe.config import DataArguments, InstructionTrainingArguments
    from recipe.model import fuse_activations
    from recipe.trainer import InstructionTrainer
    from recipe.training.batching import make_collator

    batching = contender.options["batching"]
    tokenizer = load_tokenizer(job)
    model = make_model(job, attention.NAME if batching == "shared_prefix" else None)
    fuse_activations(model)
    arguments = InstructionTrainingArguments(**trainer_arguments(job, rows))
    trainer = InstructionTrainer(
        model,
        arguments,
        data_collator=make_collator(DataArguments(batching=batching), arguments, model, tokenizer),
        train_dataset=as_dataset(rows, ["input_ids", "labels", "length", "row"]),
        processing_class=tokenizer,
    )
    meter.run(trainer)


def train_stock(job: dict, rows: Rows, meter: Meter, contender: Contender) -> None:
    """`transformers.Trainer`, with the usual collator of its library or with ours."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = load_tokenizer(job)
    collator: Any = DataCollatorForSeq2Seq(tokenizer)
    if contender.options.get("collator") == "shared_prefix":
        from recipe.collator import DataCollatorWithSharedPrefix

        collator = DataCollatorWithSharedPrefix(tokenizer.eos_token_id, attention="mask")
    arguments = TrainingArguments(**trainer_arguments(job, rows))
    dataset = as_dataset(rows, ["input_ids", "labels"])
    meter.run(Trainer(make_model(job), arguments, data_collator=collator, train_dataset=dataset))


def train_trl(job: dict, rows: Rows, meter: Meter, contender: Contender) -> None:
    """TRL's `SFTTrainer` on prompts and completions; it tokenizes them, and learns from the completions only."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**trainer_arguments(job, rows), **contender.options)
    dataset = as_dataset(rows, ["prompt", "completion"])
    trainer = SFTTrainer(make_model(job), arguments, train_dataset=dataset, processing_class=load_tokenizer(job))
    meter.run(trainer)


def train_plain(job: dict, rows: Rows, meter: Meter, contender: Contender) -> None:
    """A loop as in chapter 7 of *Build a Large Language Model From Scratch*, on a model of transformers."""
    import torch
    from torch.nn import functional

    device = "cuda" if meter.cuda else "cpu"
    pad_token_id = load_tokenizer(job).eos_token_id

    def collate(features: Rows) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in features)
        inputs, targets = [], []
        for row in features:
            missing = longest - len(row["input_ids"])
            inputs.append(torch.tensor((row["input_ids"] + [pad_token_id] * missing)[:-1]))
            targets.append(torch.tensor((row["labels"] + [IGNORE_INDEX] * missing)[1:]))
        return {"input_ids": torch.stack(inputs), "labels": torch.stack(targets)}

    meter.model = make_model(job).to(device).train()
    model = torch.compile(meter.model) if job["compile"] else meter.model
    dataset: Any = rows
    loader: Any = torch.utils.data.DataLoader(dataset, job["batch_size"], collate_fn=meter.counting(collate))
    optimizer = torch.optim.AdamW(meter.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    precision = torch.autocast(device, torch.bfloat16) if job["precision"] == "bf16" else nullcontext()
    meter.tick()
    for batch in loader:
        optimizer.zero_grad()
        with precision:
            logits = model(batch["input_ids"].to(device), use_cache=False).logits  # (batch, time, vocab)
            loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten().to(device))
        loss.backward()
        optimizer.step()
        meter.losses.append(loss.detach())
        meter.tick()


CONTENDERS = {
    "recipe_shared_prefix": Contender(
        "this recipe, shared prefix", train_recipe, {"batching": "shared_prefix"}, head="supervised", ours=True
    ),
    "recipe_padded": Contender(
        "this recipe, padded", train_recipe, {"batching": "padded"}, head="supervised", ours=True
    ),
    "trainer_shared_mask": Contender(
        "stock Trainer with our shared-prefix collator (mask)",
        train_stock,
        {"collator": "shared_prefix"},
        head="supervised",
        ours=True,
    ),
    "trainer_padded": Contender("stock Trainer, padded", train_stock),
    "trainer_by_length": Contender("stock Trainer, padded, by length", train_stock, order="by length"),
    "trl_default": Contender("TRL SFTTrainer, defaults", train_trl, head="supervised on a GPU", package="trl"),
    "trl_by_length": Contender(
        "TRL, no checkpointing, by length",
        train_trl,
        {"gradient_checkpointing": False},
        order="by length",
        head="supervised on a GPU",
        package="trl",
    ),
    "trl_padding_free": Contender(
        "TRL, no checkpointing, padding-free",
        train_trl,
        {"gradient_checkpointing": False, "padding_free": True, "max_length": None},
        head="supervised on a GPU",
        package="trl",
    ),
    "plain_loop": Contender("plain PyTorch loop, padded", train_plain),
}


# --- preprocessing --------------------------------------------------------------------------------------------------


def measure_preprocessing(job: dict) -> dict:
    """From records on disk to token ids on disk; nothing is taken from a cache."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    dataset = datasets.load_from_disk(job["dataset"])
    prepare = PREPARATIONS[job["contender"]][1](job, dataset)
    with peak_private_memory() as peak:
        start = time.perf_counter()
        prepare()
        seconds = time.perf_counter() - start
    return {"seconds": [round(seconds, 4)], "records": len(dataset), "peak_memory": max(peak)}


def prepare_with_recipe(job: dict, dataset: Any, num_proc: int | None = None) -> Callable[[], Any]:
    from recipe.config import DataArguments
    from recipe.data import encode_records

    arguments = DataArguments(template=job["template"], max_length=job["max_length"], num_proc=num_proc)
    records = dataset.select_columns(["instruction", "input", "output", "row"])
    tokenizer = load_tokenizer(job)
    return lambda: encode_records({"train": records}, tokenizer, arguments)


def prepare_with_recipe_processes(job: dict, dataset: Any) -> Callable[[], Any]:
    return prepare_with_recipe(job, dataset, num_proc=os.cpu_count())


def prepare_raw(job: dict, dataset: Any) -> Callable[[], Any]:
    """`tokenizers` alone, on rendered prompts and on responses, a thousand records a call, throwing the ids away."""
    tokenizer = load_tokenizer(job).backend_tokenizer

    def encode() -> None:
        for batch in dataset.select_columns(["prompt", "completion"]).iter(batch_size=1000):
            for texts in batch.values():
                tokenizer.encode_batch(texts, add_special_tokens=False)

    return encode


def prepare_with_trl(job: dict, dataset: Any) -> Callable[[], Any]:
    """`SFTTrainer`'s own preparation of rendered prompts and completions."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(job)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_embd=8, n_head=1))
    arguments = SFTConfig(job["scratch"], use_cpu=True, report_to="none", max_length=job["max_length"])
    dataset = dataset.select_columns(["prompt", "completion"])
    trainer = SFTTrainer(model, arguments, train_dataset=dataset.select(range(2)), processing_class=tokenizer)
    return lambda: trainer._prepare_dataset(dataset, tokenizer, arguments, False, None, "train")


PREPARATIONS = {
    "recipe": ("this recipe", prepare_with_recipe),
    "recipe_processes": ("this recipe, --num_proc of all cores", prepare_with_recipe_processes),
    "raw": ("tokenizers.encode_batch alone", prepare_raw),
    "trl": ("TRL SFTTrainer", prepare_with_trl),
}


@contextmanager
def peak_private_memory() -> Iterator[list[int]]:
    """The most memory, in bytes, of this process and its children at a time, without the pages of files they map."""
    import psutil

    def memory() -> int:
        return sum(map(private_memory, (this, *this.children(recursive=True))))

    def watch() -> None:
        while not done.wait(0.1):
            peak.append(memory())

    this, done = psutil.Process(), threading.Event()
    peak = [memory()]
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def private_memory(process: Any) -> int:
    """Bytes of a process without files; pages that forked processes share count by their shares. Linux; else all."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))
    except (OSError, StopIteration):
        return 0 if sys.platform == "linux" else process.memory_info().rss  # it has just ended


# --- generation -----------------------------------------------------------------------------------------------------


def measure_generation(job: dict) -> dict:
    """Answers to all prompts, or to a few of them, evenly spaced by length, with the time scaled to all."""
    import torch

    tokenizer = load_tokenizer(job)
    model = make_model(job).eval()
    if torch.cuda.is_available():
        model = model.cuda()  # type: ignore[arg-type]
    if job["precision"] == "bf16":
        model = model.bfloat16()
    prompts = json.loads(Path(job["prompts"]).read_text(encoding="utf-8"))
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    few = by_length[:: max(1, len(prompts) // job["few"])][: job["few"]]
    one_by_one = job["contender"] == "seed"
    answer = answer_like_the_seed if one_by_one else answer_with_recipe
    answer(model, tokenizer, prompts[:1], 2)  # warm up
    asked = few if one_by_one else list(range(len(prompts)))
    start = time.perf_counter()
    answers = answer(model, tokenizer, [prompts[index] for index in asked], job["new_tokens"])
    seconds = time.perf_counter() - start
    found = dict(zip(asked, answers, strict=True))
    return {
        "seconds": [round(seconds * len(prompts) / len(asked), 4)],
        "prompts": len(prompts),
        "measured_prompts": len(asked),
        "new_tokens": sum(map(len, answers)),
        "answers": [hashlib.sha256(repr(found[index]).encode()).hexdigest()[:8] for index in few],
        "peak_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_memory(),
    }


def answer_with_recipe(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[list[int]]:
    from recipe.generation import generate_responses

    return [response.token_ids for response in generate_responses(model, tokenizer, prompts, new_tokens)]


def answer_like_the_seed(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[list[int]]:
    """Greedy, one prompt after the other, everything computed again for each token, as chapter 7 does."""
    import torch

    answers, context = [], model.config.max_position_embeddings
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
            begin = ids.shape[1]
            for _ in range(new_tokens):
                logits = model(ids[:, -context:], use_cache=False).logits[:, -1]  # (1, vocab)
                following = logits.argmax(-1, keepdim=True)
                if following.item() == tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, following], dim=1)
            answers.append(ids[0, begin:].tolist())
    return answers


# --- start-up, machine ----------------------------------------------------------------------------------------------


def measure_startup(job: dict) -> dict:
    """Seconds until a command has ended, one run after the other."""
    command = [sys.executable, *STARTS[job["contender"]][1]]
    seconds = []
    for _ in range(job["runs"] + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(round(time.perf_counter() - start, 4))
    return {"seconds": seconds[1:]}  # the first one fills the disk cache


STARTS = {
    "imports": ("import torch, transformers", ["-c", "import torch, transformers"]),
    "arguments": (  # what tells the flags of a Trainer imports more of transformers
        "from transformers import HfArgumentParser, TrainingArguments",
        ["-c", "from transformers import HfArgumentParser, TrainingArguments"],
    ),
    "train_help": ("scripts/train.py --help", ["scripts/train.py", "--help"]),
    "eval_help": ("scripts/eval.py --help", ["scripts/eval.py", "--help"]),
}


def measure_machine(job: dict) -> dict:
    """What the machine is, and how fast it multiplies matrices and copies memory."""
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    best: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for size in job["matmul_sizes"]:
            one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            rate = 2 * size**3 / fastest(lambda one=one, other=other: one @ other)  # type: ignore[misc]
            best[name] = max(best.get(name, 0), round(rate))
    block = torch.ones(job["copy_bytes"] // 4, device=device)
    return {
        "processor": torch.cuda.get_device_name() if cuda else processor_name(),
        "instructions": None if cuda else torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "cuda": torch.version.cuda if cuda else None,
        "matmul_flops_per_second": best,
        "copy_bytes_per_second": round(2 * job["copy_bytes"] / fastest(lambda: block.clone())),  # read and written
    }


def fastest(work: Callable[[], Any], repeats: int = 7) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    import torch

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_resident_memory() -> int:
    """The most memory this process had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


KINDS = {
    "training": measure_training,
    "preprocessing": measure_preprocessing,
    "generation": measure_generation,
    "startup": measure_startup,
    "machine": measure_machine,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
