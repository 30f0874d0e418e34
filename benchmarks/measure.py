"""One measurement, in a process of its own: a job in JSON goes in, its result is the last line of the output.

Preprocessing and generation are here, training is in `peers.py`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import peers
import torch
from transformers.utils import logging

TIMED_PROMPTS = 8  # answered by the book's loop; its time is scaled to all prompts


# --- preprocessing --------------------------------------------------------------------------------------------------


def measure_preprocessing(job: dict) -> dict[str, Any]:
    """From records on disk to token ids on disk; nothing is taken from a cache."""
    logging.set_verbosity_error()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    dataset = datasets.load_from_disk(job["dataset"])
    prepare = PREPARATIONS[job["contender"]](job)
    prepare(dataset.select(range(2)))  # warm up
    start = time.perf_counter()
    prepare(dataset)
    return {"seconds": [round(time.perf_counter() - start, 4)], "records": len(dataset)}


def prepare_with_recipe(job: dict) -> Callable[[Any], Any]:
    from recipe.config import DataArguments
    from recipe.data import encode_records

    arguments = DataArguments(template=job["template"], max_length=job["max_length"])
    tokenizer = peers.load_tokenizer(job)
    columns = ["instruction", "input", "output", "row"]
    return lambda dataset: encode_records({"train": dataset.select_columns(columns)}, tokenizer, arguments)


def prepare_with_tokenizers(job: dict) -> Callable[[Any], None]:
    """Rendered prompts and responses to ids, a thousand records a call: nothing is rendered, and nothing is kept."""
    tokenizer = peers.load_tokenizer(job).backend_tokenizer

    def encode(dataset: Any) -> None:
        for batch in dataset.select_columns(["prompt", "completion"]).iter(batch_size=1000):
            for texts in batch.values():
                tokenizer.encode_batch(texts, add_special_tokens=False)

    return encode


def prepare_with_trl(job: dict) -> Callable[[Any], Any]:
    """`SFTTrainer` tokenizes rendered prompts and completions when it is made; its model is as small as can be."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    tokenizer = peers.load_tokenizer(job)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_embd=8, n_head=1))
    arguments = SFTConfig(job["scratch"], use_cpu=True, report_to="none", max_length=job["max_length"])
    make = partial(SFTTrainer, model, arguments, processing_class=tokenizer)
    return lambda dataset: make(train_dataset=dataset.select_columns(["prompt", "completion"]))


PREPARATIONS = {"recipe": prepare_with_recipe, "tokenizers_alone": prepare_with_tokenizers, "trl": prepare_with_trl}


# --- generation -----------------------------------------------------------------------------------------------------


def measure_generation(job: dict) -> dict[str, Any]:
    """Answers to all prompts; the book's loop answers a few, evenly spaced by length, and its time is scaled to all."""
    tokenizer, model = peers.load_tokenizer(job), peers.make_model(job).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", peers.PRECISIONS[job["precision"]])
    prompts = sorted(job["prompts"], key=len)
    asked = prompts
    if job["contender"] == "plain_loop":
        asked = prompts[:: max(1, len(prompts) // TIMED_PROMPTS)][:TIMED_PROMPTS]
    answer = GENERATORS[job["contender"]]
    answer(model, tokenizer, prompts[:1], 2)  # warm up
    start = time.perf_counter()
    answers = answer(model, tokenizer, asked, job["new_tokens"])
    seconds = time.perf_counter() - start
    return {
        "seconds": [round(seconds * len(prompts) / len(asked), 4)],
        "prompts": len(prompts),
        "measured_prompts": len(asked),
        "new_tokens": sum(map(len, answers)),
        "peak_memory": peers.peak_memory(),
    }


def answer_with_recipe(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[list[int]]:
    from recipe.generation import generate_responses

    return [response.token_ids for response in generate_responses(model, tokenizer, prompts, new_tokens)]


@torch.no_grad()
def answer_one_by_one(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[list[int]]:
    """Greedy, one prompt after the other, everything computed again for each token, as in chapter 7 of the book."""
    answers, context = [], model.config.max_position_embeddings
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        begin = ids.shape[1]
        for _ in range(new_tokens):
            logits = model(ids[:, -context:], use_cache=False).logits[:, -1]  # (1, vocab)
            next_id = logits.argmax(-1, keepdim=True)
            if next_id.item() == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, next_id], dim=1)
        answers.append(ids[0, begin:].tolist())
    return answers


GENERATORS = {"recipe": answer_with_recipe, "plain_loop": answer_one_by_one}


KINDS = {
    "training": peers.measure_training,
    "preprocessing": measure_preprocessing,
    "generation": measure_generation,
}

if __name__ == "__main__":
    job = json.load(sys.stdin)
    print(f"\n{json.dumps(KINDS[job['kind']](job))}")
