"""Answers of a model to prompts: batched, left-padded, KV-cached, greedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipe.model import context_length


@dataclass(frozen=True)
class Response:
    """What a model answered to one prompt.

    `stop_reason` is `eos` (the model stopped by itself), `length` (cut at `max_new_tokens`) or `context` (the model has
    no more positions); `token_ids` are without the end-of-text token.
    """

    text: str
    token_ids: list[int]
    stop_reason: str


@torch.inference_mode()
def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    description: str | None = None,
) -> list[Response]:
    """The model's greedy response to each prompt, in the order of the prompts.

    Prompts are sorted by length and padded on the left, where padding cannot come between prompt and response; the
    tokenizer's own padding settings are neither used nor changed. A prompt that leaves no position for a response gets
    an empty one with the stop reason `context`.

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
    if not prompts:
        return []
    prompt_ids = tokenizer(list(prompts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    was_training, saved_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # what it holds would fill in whatever is not said below
    responses: list[Response | None] = [None] * len(prompts)
    try:
        with tqdm(total=len(prompts), desc=description, unit="prompt", disable=description is None) as progress:
            for indices, cap in _batches(prompt_ids, max_new_tokens, batch_size, context_length(model.config)):
                batch = [prompt_ids[index] for index in indices]
                generated = _generate_batch(model, tokenizer, batch, cap) if cap > 0 else [[] for _ in batch]
                hit_cap = "length" if cap == max_new_tokens else "context"
                for index, token_ids in zip(indices, generated, strict=True):
                    responses[index] = _as_response(token_ids, tokenizer, hit_cap)
                progress.update(len(indices))
    finally:
        model.train(was_training)
        model.generation_config = saved_config
    return [response for response in responses if response is not None]


def _batches(
    prompt_ids: list[list[int]], max_new_tokens: int, batch_size: int, positions: int | None
) -> Iterator[tuple[list[int], int]]:
    """Indices of prompts to generate together, longest first, each with the room they all have for new tokens.

    Prompts near the end of the context go one by one: in a batch, the longest would shorten the room of the others.
    """
    order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
    tight = [index for index in order if positions and len(prompt_ids[index]) + max_new_tokens > positions]
    roomy = order[len(tight) :]
    for index in tight:
        yield [index], max(0, (positions or 0) - len(prompt_ids[index]))
    for start in range(0, len(roomy), batch_size):
        yield roomy[start : start + batch_size], max_new_tokens


def _generate_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    width = max(map(len, batch))
    pad_token_id = tokenizer.eos_token_id
    input_ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in batch], device=model.device)
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
    output = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_token_id,
            use_cache=True,
        ),
    )
    return output[:, width:].tolist()


def _as_response(token_ids: list[int], tokenizer: PreTrainedTokenizerBase, hit_cap: str) -> Response:
    """Cut at the first end-of-text token; the ones behind it are padding."""
    stop_reason = hit_cap
    if tokenizer.eos_token_id in token_ids:
        token_ids = token_ids[: token_ids.index(tokenizer.eos_token_id)]
        stop_reason = "eos"
    return Response(str(tokenizer.decode(token_ids, skip_special_tokens=True)), token_ids, stop_reason)
