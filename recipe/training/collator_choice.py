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
    """The collator of `--batching`; under `torch.compile` it pads 2 to 5 % more, so that few shapes occur.

    Raises:
        UserError: `--batching shared_prefix` with a model or settings that it does not fit.
    """
    pad_id, compiled = tokenizer.eos_token_id, training_args.torch_compile
    if data_args.batching == "padded":
        fits = (context_length(model.config) or 0) % 8 == 0
        return DataCollatorForInstructionTuning(pad_id, pad_to_multiple_of=8 if compiled and fits else None)
    if reason := _why_not_one_row(model, training_args):
        raise UserError(f"--batching shared_prefix: {reason}; use --batching padded")
    if compiled:  # a row with a mask is one graph for all lengths; segments are Python values and break the graph
        return DataCollatorWithSharedPrefix(pad_id, "mask", pad_to_multiple_of=32)
    return DataCollatorWithSharedPrefix(pad_id, "segments" if attention_of(model) == attention.NAME else "mask")


def _why_not_one_row(model: PreTrainedModel, args: InstructionTrainingArguments) -> str | None:
    """Why the examples of a batch cannot share one row; None if they can."""
    config, kind = model.config, type(model).__name__
    missing = {"logits_to_keep", "position_ids"} - inspect.signature(model.forward).parameters.keys()
    if missing:
        return f"{kind} does not take {' and '.join(sorted(missing))}"
    if not takes_boolean_mask(model):
        return f"{kind} has no attention in which a mask could separate the examples of a row"
    layers = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in (layers or ()) or (layers is None and window is not None):
        return f"{kind} attends to a window of {window} tokens, which a shared row does not respect"
    if args.n_gpu > 1:
        return f"a row cannot be cut into parts for {args.n_gpu} GPUs of one process; start one process for each GPU"
    if attention_of(model) not in ("sdpa", attention.NAME):
        return f"--attn_implementation {attention_of(model)} does not take a boolean mask"
    if args.neftune_noise_alpha:
        return "the noise of --neftune_noise_alpha depends on the length of a row, which would hold many examples"
    return None


def attention_of(model: PreTrainedModel) -> str | None:
    """The attention a model was loaded with; transformers has a public way to set it, but none to read it."""
    return model.config._attn_implementation


def takes_boolean_mask(model: PreTrainedModel) -> bool:
    """Whether the model can compute SDPA attention; transformers keeps it in a private field of the class alone."""
    return model._supports_sdpa
