"""Which collator lays out the batches of a run."""

from __future__ import annotations

import inspect

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipe import attention
from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import DataArguments, InstructionTrainingArguments, UserError
from recipe.model import context_length


def make_collator(
    data_args: DataArguments,
    training_args: InstructionTrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> DataCollatorForInstructionTuning | DataCollatorWithSharedPrefix:
    """The collator of `--batching`; for `torch.compile` one whose shapes repeat, with 2 to 5 % more tokens for it."""
    compiled = training_args.torch_compile
    if data_args.batching == "padded":
        fits = (context_length(model.config) or 0) % 8 == 0
        return DataCollatorForInstructionTuning(
            tokenizer.eos_token_id, pad_to_multiple_of=8 if compiled and fits else None
        )
    if reason := _why_not_one_row(model, training_args):
        raise UserError(f"--batching shared_prefix: {reason}; use --batching padded")
    if compiled:  # a row with a mask is one graph for all lengths; segments are Python, and break it into many
        return DataCollatorWithSharedPrefix(tokenizer.eos_token_id, "mask", pad_to_multiple_of=32)
    kind = "segments" if model.config._attn_implementation == attention.NAME else "mask"
    return DataCollatorWithSharedPrefix(tokenizer.eos_token_id, kind)


def _why_not_one_row(model: PreTrainedModel, args: InstructionTrainingArguments) -> str | None:
    """What keeps all examples of a batch from standing in one row."""
    config, kind = model.config, type(model).__name__
    missing = {"logits_to_keep", "position_ids"} - inspect.signature(model.forward).parameters.keys()
    if missing:
        return f"{kind} does not take {' and '.join(sorted(missing))}"
    if not model._supports_sdpa:
        return f"{kind} has no attention that a mask could keep apart"
    layers = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in (layers or ()) or (layers is None and window is not None):
        return f"{kind} attends to a window of {window} tokens, which this layout does not keep to"
    if args.n_gpu > 1:
        return f"a row cannot be cut into parts for {args.n_gpu} GPUs of one process; start one process for each GPU"
    if config._attn_implementation not in ("sdpa", attention.NAME):
        return f"--attn_implementation {config._attn_implementation} knows no mask of true and false"
    return None
