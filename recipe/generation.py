"""Answers of a model to prompts: batched, left-padded, KV-cached, greedy or sampled with a seed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from recipe.memory import halve_if_out_of_memory
from recipe.model import context_length


@dataclass(frozen=True)
class Response:
    """What a model answered to one prompt.

    `stop_reason` is `eos` (the model stopped by itself), `length` (cut at `max_new_tokens`) or `context` (the model has
    no more positions); `token_ids` are without the end-of-text token; `seconds` is this response's share of the time
    its batch took.
    """

    text: str
    token_ids: list[int]
    stop_reason: str
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Decoding:
    """How responses are decoded: greedily at `temperature` 0, else by nucleus sampling (Holtzman et al. 2020).

    Sampling draws from `seed` and the prompt alone, so that a response depends neither on its batch nor on what was
    generated before it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 123


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    description: str | None = None,
) -> list[Response]:
    """The model's greedy response to each prompt, in the order of the prompts.

    Args:
        prompts: whole prompts, as `Template.prompt` makes them.
        max_new_tokens: cap on each response, in tokens.
        batch_size: prompts generated together; does not change the responses.
        description: label of a progress bar; None for no bar.

    Example::

        template = load_template("alpaca")
        [response] = generate_responses(model, tokenizer, [template.prompt({"instruction": "Name a colour."})])
        response.text, response.stop_reason  # 'Blue.', 'eos'
    """
    responses: dict[int, Response] = {}
    for indices, batch in iter_responses(model, tokenizer, prompts, Decoding(max_new_tokens), batch_size, description):
        responses.update(zip(indices, batch, strict=True))
    return [responses[index] for index in range(len(prompts))]


@torch.inference_mode()
def iter_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding,
    batch_size: int = 16,
    description: str | None = None,
) -> Iterator[tuple[list[int], list[Response]]]:
    """The responses batch by batch, as they are finished: indices into `prompts`, and the response to each.

    Prompts are sorted by length and padded on the left, where padding cannot come between prompt and response; the
    tokenizer's own padding settings are neither used nor changed. A prompt that leaves no position for a response gets
    an empty one with the stop reason `context`. A batch that does not fit in memory is halved, and so are those after
    it.

    Raises:
        UserError: not even one prompt fits in memory.
    """
    if not prompts:
        return
    prompt_ids = tokenizer(list(prompts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    was_training, saved_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # what it holds would fill in whatever is not said below
    positions = context_length(model.config)
    batches = _batches([len(ids) for ids in prompt_ids], decoding.max_new_tokens, batch_size, positions)

    def answer(indices: list[int]) -> list[Response]:
        batch, start = [prompt_ids[index] for index in indices], time.perf_counter()
        room = decoding.max_new_tokens if positions is None else positions - max(map(len, batch))
        cap, hit_cap = min((decoding.max_new_tokens, "length"), (room, "context"))
        generated = _generate_batch(model, tokenizer, batch, cap, decoding) if cap > 0 else [[] for _ in batch]
        seconds = (time.perf_counter() - start) / len(batch)
        return [_as_response(token_ids, tokenizer, hit_cap, seconds) for token_ids in generated]

    # smoothing=0: batches differ in length, so the mean over all of them foretells the end better than the last one
    progress = tqdm(total=len(prompts), desc=description, unit="prompt", disable=description is None, smoothing=0)
    try:
        for indices, responses in halve_if_out_of_memory(batches, answer):
            yield indices, responses
            progress.update(len(indices))
    finally:
        progress.close()
        model.train(was_training)
        model.generation_config = saved_config


def _batches(lengths: list[int], max_new_tokens: int, batch_size: int, positions: int | None) -> Iterator[list[int]]:
    """Indices of prompts to generate together, longest first.

    Prompts near the end of the context go one by one: in a batch, the longest would shorten the room of the others.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    tight = [index for index in order if positions and lengths[index] + max_new_tokens > positions]
    roomy = order[len(tight) :]
    yield from ([index] for index in tight)
    yield from (roomy[start : start + batch_size] for start in range(0, len(roomy), batch_size))


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[list[int]],
    max_new_tokens: int,
    decoding: Decoding,
) -> list[list[int]]:
    width = max(map(len, batch))
    pad_token_id = tokenizer.eos_token_id
    input_ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in batch], device=model.device)
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
    sampling = LogitsProcessorList()
    if decoding.temperature > 0:
        sampling += [TemperatureLogitsWarper(decoding.temperature), TopPLogitsWarper(decoding.top_p)]
        sampling += [SeededGumbelNoise(batch, decoding.seed, model.device)]
    output = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=attention_mask,
        logits_processor=sampling,
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_token_id,
            use_cache=True,
        ),
    )
    return output[:, width:].tolist()


class SeededGumbelNoise(LogitsProcessor):
    """Turns the argmax of greedy decoding into a sample from the softmax, each row with a generator of its own.

    The Gumbel-max trick: argmax(logits + Gumbel noise) is distributed as softmax(logits) (Maddison et al. 2014,
    arXiv:1411.0030). `generate(do_sample=True)` draws from one generator for all rows, which makes a response depend
    on its batch.
    """

    def __init__(self, prompt_ids: Sequence[Sequence[int]], seed: int, device: torch.device) -> None:
        self.generators = []
        for row in prompt_ids:
            digest = hashlib.sha256(repr((seed, list(row))).encode()).digest()
            generator = torch.Generator(device)
            self.generators.append(generator.manual_seed(int.from_bytes(digest[:8]) >> 1))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.empty_like(scores, dtype=torch.float32)  # (batch, vocab)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()  # type: ignore[return-value]


def _as_response(token_ids: list[int], tokenizer: PreTrainedTokenizerBase, hit_cap: str, seconds: float) -> Response:
    """Cut at the first end-of-text token; the ones behind it are padding."""
    stop_reason = hit_cap
    if tokenizer.eos_token_id in token_ids:
        token_ids = token_ids[: token_ids.index(tokenizer.eos_token_id)]
        stop_reason = "eos"
    return Response(str(tokenizer.decode(token_ids, skip_special_tokens=True)), token_ids, stop_reason, seconds)
