"""Weights and tokenizers: from the Hub, from a folder, or random from a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation

from recipe.config import ModelArguments, UserError
from recipe.templates import Template


def load_tokenizer(config: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, or `tokenizer_name`.

    Raises:
        UserError: none named, not found, or without an end-of-text token.
    """
    name = config.tokenizer_name or config.model_name_or_path
    if name is None:
        raise UserError("no tokenizer: give --tokenizer_name beside --model_type, or --model_name_or_path")
    check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=config.model_revision)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {name!r}: {_reason(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"tokenizer {name!r} is empty: the tokenizer's files are missing; give --tokenizer_name")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {name!r} has no end-of-text token (eos_token), so a model could not learn to stop; "
            "set one and save the tokenizer, or give another --tokenizer_name"
        )
    return tokenizer


def load_model(config: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, str]:
    """The model in `config.dtype`, and where its weights come from, in words: "random weights (gpt2)".

    Raises:
        UserError: neither or both of `model_name_or_path` and `model_type`, a model that is not found or does not fit
            its overrides, or fewer embeddings than the tokenizer has tokens.
    """
    name, model_type = config.model_name_or_path, config.model_type
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
    }
    model_config = load_config(config, tokenizer)
    try:
        if name is None:
            model, origin = AutoModelForCausalLM.from_config(model_config, **options), f"random weights ({model_type})"
        else:
            options |= {"revision": config.model_revision, "use_safetensors": True, "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, config=model_config, **options)
            (model, loading), origin = loaded, name
            if loading["missing_keys"]:
                raise UserError(
                    f"model {name!r} has no weights for {', '.join(sorted(loading['missing_keys'])[:3])}, ...; they "
                    "would be random: take back what --config_overrides changed of the shape, or use --model_type"
                )
    except KeyError as error:  # older models keep a table of their own
        raise UserError(
            f"model {name or model_type!r} does not know the attention {error}; give another --attn_implementation"
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"model {name or model_type!r}: {_reason(error)}") from error
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, {origin} only {embeddings} embeddings; use its own tokenizer"
        )
    fuse_activations(model)
    return model, origin


def fuse_activations(model: nn.Module) -> None:
    """Compute GPT-2's activation, `gelu_new`, in one operator instead of eight; the config that is saved keeps it.

    Both are 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016, arXiv:1606.08415). The eight
    write, and keep for the backward pass, a tensor each.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))


def check_folder(name: str) -> None:
    """Refuse a path that is not there before transformers takes it for a Hub id, and adapters alone."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise UserError(
            f"{name!r}: no such folder; give a folder with a model, or a Hub id such as openai-community/gpt2"
        )
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"{name!r} is a PEFT adapter without its model; merge them first: "
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(MERGED)"
        )


def load_config(config: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The model's configuration with its overrides, before any weight is read.

    Raises:
        UserError: an architecture or a model that is not known, or overrides it does not have.
    """
    if (config.model_name_or_path is None) == (config.model_type is None):
        raise UserError(
            "name the model: either --model_name_or_path (trained weights) or --model_type (random weights)"
        )
    if config.model_type is not None and config.model_type not in CONFIG_MAPPING:
        raise UserError(f"unknown --model_type {config.model_type!r}; for example gpt2, llama, qwen2")
    try:
        if config.model_type is not None:
            model_config = AutoConfig.for_model(
                config.model_type,
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        else:
            model_config = AutoConfig.from_pretrained(str(config.model_name_or_path), revision=config.model_revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model {config.model_name_or_path!r}: {_reason(error)}") from error
    if config.config_overrides:
        try:
            model_config.update_from_string(config.config_overrides)
        except ValueError as error:
            raise UserError(
                f"--config_overrides {config.config_overrides!r}: {error}; write key=value,key=value"
            ) from error
    return model_config


def prepare_for_chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Let the saved folder answer as it was trained: template, padding, greedy decoding, end-of-text token."""
    tokenizer.chat_template = template.chat_template
    tokenizer.padding_side = "left"  # for batched generation; the collator pads by itself
    tokenizer.init_kwargs["padding_side"] = "left"  # save_pretrained writes only what init_kwargs names
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=min(256, (context_length(model.config) or 512) // 2),
    )


def context_length(config: PreTrainedConfig) -> int | None:
    """Positions the model has, in tokens: prompt and response together. None where it has no limit (ALiBi, Mamba)."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _reason(error: Exception) -> str:
    """An error of transformers in one line, without its general advice."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
