"""How likely a model finds the reference responses: their cross-entropy given the prompts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipe.collator import IGNORE_INDEX, DataCollatorForInstructionTuning
from recipe.memory import halve_if_out_of_memory
from recipe.model import context_length, virtual_tokens
from recipe.tokens import as_ids, response_ids


@torch.inference_mode()
def reference_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    references: Sequence[str],
    batch_size: int = 16,
    description: str | None = None,
) -> list[tuple[float, int] | None]:
    """The summed cross-entropy in nats of each reference's tokens and its end-of-text token, and how many these are.

    They are the targets of training with `mask_prompt`, so the sum of nats divided by the sum of targets is the
    `eval_loss` of `recipe.trainer.InstructionTrainer`. The cross-entropy is computed in float32 at least. A batch that
    does not fit in memory is halved.

    Args:
        prompts: whole prompts as token ids, as `recipe.tokens.prompt_ids` makes them; or as texts, in which special
            tokens are read.
        references: the response to each; an end-of-text token written at its end is taken for the one that is added.
        batch_size: pairs computed together; changes the result by rounding only.
        description: label of a progress bar; None for no bar.

    Returns:
        a pair (nats, targets) for each prompt, in their order; None if prompt and reference have more tokens than the
        model has positions. The nats are NaN or infinite where the model's outputs are.

    Example::

        prompts = prompt_ids(load_template("alpaca"), tokenizer, [{"instruction": "Name a colour."}])
        [(nats, targets)] = reference_losses(model, tokenizer, prompts, ["Blue."])
        nats / targets  # 1.7, the loss per token
    """
    losses: list[tuple[float, int] | None] = [None] * len(prompts)
    if not prompts:
        return losses
    features = _encode(tokenizer, prompts, references)
    positions = (context_length(model.config) or math.inf) - virtual_tokens(model)
    lengths = [len(feature["input_ids"]) - 1 for feature in features]  # nothing is predicted from the last token
    fitting = [index for index, length in enumerate(lengths) if length <= positions]
    fitting.sort(key=lambda index: -lengths[index])  # the largest batch first: it shows at once what fits in memory
    batches = (fitting[start : start + batch_size] for start in range(0, len(fitting), batch_size))
    collate = DataCollatorForInstructionTuning(tokenizer.eos_token_id)

    def compute(indices: list[int]) -> list[tuple[float, int]]:
        return _batch_losses(model, collate([features[index] for index in indices]))

    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(fitting), desc=description, unit="reference", disable=description is None) as progress:
            for indices, computed in halve_if_out_of_memory(batches, compute):
                for index, loss in zip(indices, computed, strict=True):
                    losses[index] = loss
                progress.update(len(indices))
    finally:
        model.train(was_training)
    return losses


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


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | Sequence[list[int]], references: Sequence[str]
) -> list[dict[str, list[int]]]:
    """As in training: prompt and reference tokenized apart, then one end-of-text token."""
    features = []
    for prompt, targets in zip(as_ids(tokenizer, prompts), response_ids(tokenizer, references), strict=True):
        features.append({"input_ids": prompt + targets, "labels": [IGNORE_INDEX] * len(prompt) + targets})
    return features


def _batch_losses(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[tuple[float, int]]:
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
        functional.cross_entropy(row[kept].to(precision), target[kept], reduction="sum")
        for row, target, kept in zip(
            logits, targets[:, first:].to(model.device), supervised[:, first:].to(model.device), strict=True
        )
    ]
    return list(zip(torch.stack(sums).tolist(), supervised.sum(1).tolist(), strict=True))
