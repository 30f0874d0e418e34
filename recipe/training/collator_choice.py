"""Which collator lays out the batches of a run."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipe import attention
from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import DataArguments, InstructionTrainingArguments, UserError
from recipe.model import context_length
from recipe.training.layout_check import compiles_blocks, why_never_one_row, why_not


def default_attention(config: PreTrainedConfig) -> str | None:
    """Our attention for shared prefixes where the model's class takes attentions by name; else None, for its own."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), PreTrainedModel)
    return attention.NAME if model_class._supports_attention_backend else None


def make_collator(
    data_args: DataArguments,
    training_args: InstructionTrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> DataCollatorForInstructionTuning | DataCollatorWithSharedPrefix:
    """The collator of `--batching`; under `torch.compile` rows and masks are padded more, so that few shapes occur.

    A shared row is not tried here, but by the trainer, where the model trains: see `fitting_collator`.

    Raises:
        UserError: a model or settings that do not fit `--batching`: see `why_not`.
    """
    pad_id, compiled = tokenizer.eos_token_id, training_args.torch_compile
    if data_args.batching == "padded":
        if reason := why_not(model, "padded"):
            raise UserError(f"{reason}; give another model or another --attn_implementation")
        fits = (context_length(model.config) or 0) % 8 == 0
        return DataCollatorForInstructionTuning(pad_id, pad_to_multiple_of=8 if compiled and fits else None)
    if reason := why_never_one_row(model) or _why_not_these_settings(model, training_args):
        raise UserError(f"--batching shared_prefix: {reason}; use --batching padded")
    # where the whole model is compiled, a row with a mask is one graph for all lengths; segments would break it
    segments = attention_of(model) == attention.NAME and (not compiled or compiles_blocks(training_args))
    if segments:  # no graph depends on the runs, and each takes any length from the second one on
        return DataCollatorWithSharedPrefix(pad_id, "segments")
    return DataCollatorWithSharedPrefix(pad_id, "mask", 32 if compiled else None)


def _why_not_these_settings(model: PreTrainedModel, args: InstructionTrainingArguments) -> str | None:
    """Why the run's settings do not allow a shared row; None if they do."""
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
