"""A model's responses to prompts: batched, left-padded, KV-cached, greedy or sampled with a seed.

Three optimizations change a response by rounding at most: the tokens that all prompts start with (the preamble of a
template, a system prompt) are computed once, the cache grows in blocks, and rows that have ended leave their batch.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    Cache,
    DynamicCache,
    DynamicLayer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from recipe.memory import halve_if_out_of_memory
from recipe.model import base_model, context_length, virtual_tokens
from recipe.templates import common_prefix
from recipe.tokens import as_ids

CACHE_BLOCK = 64  # tokens that a full cache grows by
STEPS = 16  # tokens to generate before rows that have ended are taken out


@dataclass(frozen=True)
class Response:
    """What a model answered to one prompt.

    `text` is without begin-of-text, end-of-text and padding tokens, but with any other special token, such as the tags
    of an answer. `token_ids` exclude the end token. `stop_reason` is `eos` (the model ended the response), `length`
    (cut at `max_new_tokens`) or `context` (no position is left). `seconds` is the batch's time divided by its
    responses.
    """

    text: str
    token_ids: list[int]
    stop_reason: str
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Decoding:
    """How responses are decoded: greedily at `temperature` 0, else by nucleus sampling (Holtzman et al. 2020).

    A sampled response depends on `seed` and its prompt alone, not on its batch or on earlier responses.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 123


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    max_new_tokens: int = 256,
    batch_size: int = 64,
    description: str | None = None,
) -> list[Response]:
    """The model's greedy response to each prompt, in the order of the prompts.

    Args:
        prompts: whole prompts as token ids, as `recipe.tokens.prompt_ids` makes them; or as texts, in which special
            tokens are read.
        max_new_tokens: the longest response, in tokens.
        batch_size: prompts per batch; does not change the responses.
        description: label of a progress bar; None for no bar.

    Example::

        prompts = prompt_ids(load_template("alpaca"), tokenizer, [{"instruction": "Name a colour."}])
        [response] = generate_responses(model, tokenizer, prompts)
        response.text, response.stop_reason  # 'Blue.', 'eos'
    """
    responses: dict[int, Response] = {}
    for indices, batch in iter_responses(model, tokenizer, prompts, Decoding(max_new_tokens), batch_size, description):
        responses.update(zip(indices, batch, strict=True))
    return [responses[index] for index in range(len(prompts))]


@dataclass(frozen=True)
class Ends:
    """What ends a response: tokens, the tokenizer's own end-of-text token first, and strings in its text."""

    tokenizer: PreTrainedTokenizerBase
    token_ids: list[int]
    strings: list[str]

    def cut(self, token_ids: list[int]) -> tuple[list[int], bool]:
        """The tokens before the first end token, or up to the one that completes a stop string; whether it ended."""
        first = min((token_ids.index(end) for end in self.token_ids if end in token_ids), default=len(token_ids))
        ended, token_ids = first < len(token_ids), token_ids[:first]
        if not self._stops(token_ids):
            return token_ids, ended
        count = next(count for count in range(1, len(token_ids) + 1) if self._stops(token_ids[:count]))
        return token_ids[:count], True

    def text(self, token_ids: list[int]) -> str:
        """The text of a response, with the special tokens that are part of an answer."""
        tokenizer = self.tokenizer
        hidden = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *self.token_ids}
        return str(tokenizer.decode([token for token in token_ids if token not in hidden]))

    def _stops(self, token_ids: list[int]) -> bool:
        text = self.text(token_ids) if self.strings else ""
        return any(stop in text for stop in self.strings)


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Ends:
    """The end-of-text token of the tokenizer, and what the model's own `generation_config` stops at."""
    config = model.generation_config
    named = config.eos_token_id if config is not None else None
    further = named if isinstance(named, list) else [named]
    token_ids = dict.fromkeys([tokenizer.eos_token_id, *further])
    stops = (config.stop_strings if config is not None else None) or []
    strings = [stops] if isinstance(stops, str) else [*stops]
    return Ends(tokenizer, [token for token in token_ids if token is not None], strings)


@torch.inference_mode()
def iter_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    decoding: Decoding,
    batch_size: int = 64,
    description: str | None = None,
) -> Iterator[tuple[list[int], list[Response]]]:
    """Each batch as soon as it is finished: indices into `prompts`, and their responses.

    A response ends at the tokenizer's end-of-text token, and at the end tokens and stop strings that the model's
    `generation_config` names. Prompts are sorted by length, longest first, and padded on the left, whatever the
    tokenizer's padding settings. A prompt that leaves no position for a response gets an empty one with the stop reason
    `context`. A batch that does not fit in memory is halved, and so are later ones.

    Raises:
        UserError: not even one prompt fits in memory.
    """
    if not prompts:
        return
    if not virtual_tokens(model):  # PEFT's wrapper would hide that the model has a cache
        model = base_model(model)
    token_ids, ends = as_ids(tokenizer, prompts), ends_of(model, tokenizer)
    positions = (context_length(model.config) or sys.maxsize) - virtual_tokens(model)
    was_training, saved_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # `generate` takes from it whatever is not given below
    lengths, alike = [len(ids) for ids in token_ids], bool(virtual_tokens(model))
    batches = _batches(lengths, decoding.max_new_tokens, batch_size, positions, alike)
    prefix = common_prefix([ids for ids in token_ids if len(ids) < positions])

    @functools.cache  # computed in the first batch, where an out-of-memory error is handled
    def prefix_cache() -> list[BlockwiseLayer] | None:
        return compute_cache(model, prefix)

    def answer(indices: list[int]) -> list[Response]:
        batch, start = [token_ids[index] for index in indices], time.perf_counter()
        room = positions - max(map(len, batch))
        limit, reason = min((decoding.max_new_tokens, "length"), (room, "context"))
        generated: list[list[int]] = [[] for _ in batch]
        if limit > 0:
            generated = _generate_batch(model, ends, batch, limit, decoding, prefix_cache())
        seconds = (time.perf_counter() - start) / len(batch)
        return [_as_response(ids, ends, reason, seconds) for ids in generated]

    # smoothing=0: batches differ in length, so their mean speed predicts the end better than the latest speed
    progress = tqdm(total=len(prompts), desc=description, unit="prompt", disable=description is None, smoothing=0)
    try:
        for indices, responses in halve_if_out_of_memory(batches, answer):
            yield indices, responses
            progress.update(len(indices))
    finally:
        progress.close()
        model.train(was_training)
        model.generation_config = saved_config


def _batches(
    lengths: list[int], max_new_tokens: int, batch_size: int, positions: int, alike: bool
) -> Iterator[list[int]]:
    """Indices of prompts to generate together, longest first, and with `alike` only prompts of one length.

    Prompts near the end of the context go one by one: in a batch, the longest would leave the others less room. PEFT
    puts its virtual tokens before the padding of a batch, so that they would be farther from a short prompt.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    tight = [index for index in order if lengths[index] + max_new_tokens > positions]
    roomy = order[len(tight) :]
    yield from ([index] for index in tight)
    groups = [list(group) for _, group in itertools.groupby(roomy, lengths.__getitem__)] if alike else [roomy]
    for group in groups:
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


def _generate_batch(
    model: PreTrainedModel,
    ends: Ends,
    batch: list[list[int]],
    max_new_tokens: int,
    decoding: Decoding,
    prefix_cache: list[BlockwiseLayer] | None,
) -> list[list[int]]:
    """The tokens of each response, (batch,) lists; after an end there may be padding, or more of a finished row."""
    width, pad = max(map(len, batch)), ends.token_ids[0]
    padding = torch.tensor([width - len(row) for row in batch])
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=model.device)
    attention_mask = (torch.arange(width) >= padding[:, None]).long().to(model.device)  # (batch, width)
    sampling, noise = LogitsProcessorList(), SeededGumbelNoise(batch, decoding.seed, model.device)
    if decoding.temperature > 0:
        sampling += [TemperatureLogitsWarper(decoding.temperature), TopPLogitsWarper(decoding.top_p), noise]
    cache = None if prefix_cache is None else expand_cache(prefix_cache, padding, width - 1)
    steps = max_new_tokens if cache is None else STEPS
    responses: list[list[int]] = [[] for _ in batch]
    rows = list(range(len(batch)))  # still being generated
    for done in range(0, max_new_tokens, steps):
        input_ids = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            logits_processor=sampling,
            max_new_tokens=min(steps, max_new_tokens - done),
            do_sample=False,
            eos_token_id=ends.token_ids,
            pad_token_id=pad,
            use_cache=True,
        )
        for row, token_ids in zip(rows, input_ids[:, width + done :].tolist(), strict=True):
            responses[row] += token_ids
        unfinished = [index for index, row in enumerate(rows) if not ends.cut(responses[row])[1]]
        if not unfinished or done + steps >= max_new_tokens or cache is None:
            break
        attention_mask = torch.nn.functional.pad(attention_mask, (0, steps), value=1)
        if len(unfinished) < len(rows):
            rows = [rows[index] for index in unfinished]
            noise.generators = [noise.generators[index] for index in unfinished]
            input_ids, attention_mask = input_ids[unfinished], attention_mask[unfinished]
            cache.batch_select_indices(torch.tensor(unfinished, device=model.device))
    return responses


class BlockwiseLayer(DynamicLayer):
    """Keys and values of a layer, (batch, heads, time, head size), with spare room: no copy of all for each token."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new, start = (key_states, value_states), self.get_seq_length()
        end = start + key_states.shape[-2]
        if start == 0:
            self.lazy_initialization(key_states, value_states)
            self.blocks = [states[:, :, :0] for states in new]
        if self.blocks[0].shape[-2] < end:
            full = self.blocks
            self.blocks = [states.new_empty(*states.shape[:2], end + CACHE_BLOCK, states.shape[-1]) for states in new]
            for block, states in zip(self.blocks, full, strict=True):
                block[:, :, :start] = states[:, :, :start]
        for block, states in zip(self.blocks, new, strict=True):
            block[:, :, start:end] = states
        return self._use_first(end)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        length = self.get_seq_length()
        self.blocks = [block[indices.to(block.device)] for block in self.blocks]
        self._use_first(length)

    def _use_first(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = keys, values = [block[:, :, :length] for block in self.blocks]
        return keys, values


def compute_cache(model: PreTrainedModel, token_ids: list[int]) -> list[BlockwiseLayer] | None:
    """Keys and values of one row of tokens, layer by layer; None for a model that caches something else.

    Mamba keeps a state instead, a sliding window drops tokens, and PEFT puts virtual tokens in front. The row may be
    empty.
    """
    if virtual_tokens(model):
        return None
    layers = DynamicCache(config=model.config).layers
    if "past_key_values" not in inspect.signature(model.forward).parameters or {*map(type, layers)} != {DynamicLayer}:
        return None
    cache = [BlockwiseLayer() for _ in layers]
    if token_ids:  # the base model skips the vocabulary head
        input_ids = torch.tensor([token_ids], device=model.device)
        model.base_model(input_ids, past_key_values=Cache(layers=[*cache]), use_cache=True)
    return cache


def expand_cache(prefix: list[BlockwiseLayer], padding: torch.Tensor, limit: int) -> Cache:
    """The first columns, at most `limit`, of a left-padded batch whose rows all start with `prefix`.

    Row i has `padding[i]` columns of padding, hidden by the attention mask, and then as much of the prefix as fits
    into the cached columns. A padded row computes the rest of its prefix again. Example, with the prefix a b c d::

        columns     0  1  2  3 | 4  5        cached | to be computed
        padding 0   a  b  c  d | e  f
        padding 2   .  .  a  b | c  d
    """
    expanded = [BlockwiseLayer() for _ in prefix]
    width = min(prefix[0].get_seq_length(), limit)
    if width > 0:
        columns = (torch.arange(width) - padding[:, None]).clamp(min=0)  # (batch, width) positions in the prefix
        for layer, source in zip(expanded, prefix, strict=True):
            key_states, value_states = (
                block[0][:, columns.to(block.device)].transpose(0, 1) for block in source.blocks
            )
            layer.update(key_states, value_states)
    return Cache(layers=[*expanded])


class SeededGumbelNoise(LogitsProcessor):
    """Turns the argmax of greedy decoding into a sample from the softmax, with one generator per row.

    The Gumbel-max trick: argmax(logits + Gumbel noise) is distributed as softmax(logits) (Maddison et al. 2014,
    arXiv:1411.0030). `generate(do_sample=True)` has one generator for all rows, so a response depends on its batch.
    """

    def __init__(self, prompt_ids: Sequence[Sequence[int]], seed: int, device: torch.device) -> None:
        digests = [hashlib.sha256(repr((seed, list(row))).encode()).digest() for row in prompt_ids]
        seeds = [int.from_bytes(digest[:8]) >> 1 for digest in digests]
        self.generators = [torch.Generator(device).manual_seed(each) for each in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.empty_like(scores, dtype=torch.float32)  # (batch, vocab)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()  # type: ignore[return-value]


def _as_response(token_ids: list[int], ends: Ends, reason: str, seconds: float) -> Response:
    """The response up to its first end; tokens after it are padding."""
    token_ids, ended = ends.cut(token_ids)
    text = ends.text(token_ids)
    for stop in ends.strings:
        text = text.partition(stop)[0]
    return Response(text, token_ids, "eos" if ended else reason, seconds)
