"""How likely a model finds the reference responses: their cross-entropy given the prompts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipe.collator import IGNORE_INDEX, DataCollatorForInstructionTuning
from recipe.generation import ends_of
from recipe.memory import halve_if_out_of_memory
from recipe.model import context_length, virtual_tokens
from recipe.templates import Template
from recipe.tokens import Turn, any_of, as_ids, end_id, response_ids, special_tokens, turn_of


@torch.inference_mode()
def reference_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    references: Sequence[str],
    batch_size: int = 16,
    description: str | None = None,
    template: Template | None = None,
) -> list[tuple[float, int] | None]:
    """The summed cross-entropy in nats of each reference's tokens and of its end, and how many these are.

    They are the targets of training with `mask_prompt`, so the sum of nats divided by the sum of targets is the
    `eval_loss` of `recipe.trainer.InstructionTrainer`, but for two things that only some models and references have.
    A response ends with any of the tokens at which generation stops, so their probabilities are added up. A reference
    with tags that are special tokens is read in both ways, as text and as those tokens, and the likelier one counts.
    It is computed in float32 at least. A batch that does not fit in memory is halved.

    Args:
        prompts: whole prompts as token ids, as `prompt_ids` makes them; or as texts, in which special tokens are read.
        references: the response to each; an end-of-text token written at its end is taken for the one that is added.
        batch_size: pairs computed together; changes the result by rounding only.
        description: label of a progress bar; None for none.
        template: of the prompts, which ends references; without it the end-of-text token does.

    Returns:
        a pair (nats, targets) for each prompt, in their order; None if prompt and reference have more tokens than the
        model has positions. The nats are NaN or infinite where the model's outputs are.

    Example::

        prompts = prompt_ids(load_template("alpaca"), tokenizer, [{"instruction": "Name a colour."}])
        [(nats, targets)] = reference_losses(model, tokenizer, prompts, ["Blue."])
        nats / targets  # 1.7, the loss per token
    """
    if not prompts:
        return []
    losses: list[tuple[float, int] | None] = [None] * len(prompts)
    ends, features, owners = _as_features(model, tokenizer, prompts, references, template)
    positions = (context_length(model.config) or math.inf) - virtual_tokens(model)
    lengths = [len(feature["input_ids"]) - 1 for feature in features]  # nothing is predicted from the last token
    fitting = [index for index, length in enumerate(lengths) if length <= positions]
    fitting.sort(key=lambda index: -lengths[index])  # the largest batch first: it shows at once what fits in memory
    batches = (fitting[start : start + batch_size] for start in range(0, len(fitting), batch_size))
    collate = DataCollatorForInstructionTuning(tokenizer.eos_token_id)

    def compute(indices: list[int]) -> list[tuple[float, int]]:
        return _batch_losses(model, collate([features[index] for index in indices]), ends)

    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(fitting), desc=description, unit="reference", disable=description is None) as progress:
            for indices, computed in halve_if_out_of_memory(batches, compute):
                for index, loss in zip((owners[index] for index in indices), computed, strict=True):
                    other = losses[index]
                    losses[index] = loss if other is None or loss[0] < other[0] else other
                progress.update(len(indices))
    finally:
        model.train(was_training)
    return losses


def _as_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    references: Sequence[str],
    template: Template | None,
) -> tuple[list[int], list[dict[str, list[int]]], list[int]]:
    """The tokens that end a response, and what `_encode` gives."""
    turn = turn_of(template, tokenizer) if template else Turn(str(tokenizer.eos_token))
    ends, tags = _ends_and_tags(model, tokenizer, turn)
    return ends, *_encode(tokenizer, prompts, references, tags, turn)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies how a tokenizer splits text: losses per token of two models can be compared if it is the same.

    Special tokens do not count: a record's text is never read as one, and adding some is usual in fine-tuning.

    Example::

        tokenizer_hash(AutoTokenizer.from_pretrained("recipe/demo/base"))  # 'sha256:5f0c…'
    """
    parts: dict[str, Any]
    if isinstance(backend := getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        whole = json.loads(backend.to_str())
        parts = {name: whole.get(name) for name in ("normalizer", "pre_tokenizer", "model")}
    else:
        parts = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    added = [token for token in tokenizer.added_tokens_decoder.values() if not token.special]
    parts["added"] = sorted(token.content for token in added)
    content = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _ends_and_tags(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turn: Turn
) -> tuple[list[int], dict[str, bool]]:
    """The ids of the tokens that end a response; and the special tokens, each with whether an answer's text has it."""
    special = special_tokens(tokenizer)
    known = {tokenizer.eos_token_id, *special.values()}  # a config without its tokenizer may name any token as its end
    ends = [
        end for end in dict.fromkeys([end_id(tokenizer, turn), *ends_of(model, tokenizer).token_ids]) if end in known
    ]
    hidden = {tokenizer.bos_token_id, tokenizer.pad_token_id, *ends}  # others are part of an answer, such as <answer>
    return ends, {text: index not in hidden for text, index in special.items()}


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    references: Sequence[str],
    tags: Mapping[str, bool],
    turn: Turn,
) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Features as in training, prompt and reference tokenized apart; and to which reference each belongs.

    One token ends each.

    A reference with tags that are special tokens has a second feature at the end, in which they are these tokens.
    `tags` are the special tokens, each with whether an answer's text has it.
    """
    prompt_ids, targets = as_ids(tokenizer, prompts), response_ids(tokenizer, references, turn)
    pairs, owners = list(zip(prompt_ids, targets, strict=True)), list(range(len(targets)))
    pattern = any_of(tags)
    for index, reference in enumerate(references):
        text = turn.text(reference, str(tokenizer.eos_token))
        found = pattern.findall(text)
        if found and all(tags[token] for token in found):
            [read] = as_ids(tokenizer, [text])
            pairs.append((prompt_ids[index], [*read, end_id(tokenizer, turn)]))
            owners.append(index)
    features = [
        {"input_ids": prompt + target, "labels": [IGNORE_INDEX] * len(prompt) + target} for prompt, target in pairs
    ]
    return features, owners


def _batch_losses(model: PreTrainedModel, batch: dict[str, torch.Tensor], ends: list[int]) -> list[tuple[float, int]]:
    targets = batch["shift_labels"]  # (batch, time)
    supervised = targets != IGNORE_INDEX
    first = int(supervised.any(0).int().argmax())
    logits = model(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        use_cache=False,
        logits_to_keep=targets.shape[1] - first,
    ).logits  # (batch, time - first, vocab)
    precision = torch.promote_types(logits.dtype, torch.float32)
    # row by row, so that only one row's logits are in memory twice
    sums = [
        _nats(row[kept].to(precision), target[kept], ends)
        for row, target, kept in zip(
            logits, targets[:, first:].to(model.device), supervised[:, first:].to(model.device), strict=True
        )
    ]
    return list(zip(torch.stack(sums).tolist(), supervised.sum(1).tolist(), strict=True))


def _nats(logits: torch.Tensor, targets: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """The summed cross-entropy of targets (n,) under logits (n, vocab); any of `ends` will do in place of the last."""
    total = functional.cross_entropy(logits, targets, reduction="sum")
    if len(ends) == 1:
        return total
    return total + logits[-1, targets[-1]] - logits[-1, ends].logsumexp(0)
