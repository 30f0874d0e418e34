"""Weights and tokenizers: from the Hub, from a folder, or random from a config."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation

from recipe.config import ModelArguments, UserError
from recipe.files import refuse_no_file
from recipe.templates import Template
from recipe.tokens import end_id, turn_of

# how weights were stored before safetensors, or are elsewhere; and files of a training run that end so too
OTHER_WEIGHTS = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
NO_WEIGHTS = {"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth"}
CONVERSION = (
    "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) and the same with AutoTokenizer (for .gguf with "
    "gguf_file=FILE in both); or give a model or --model_revision of the Hub that has model.safetensors"
)
TRAINED_TO_NAN = "its training has diverged, or the file is damaged; take an earlier checkpoint"
HALF_OVERFLOWS = f"float16 ends at 65,504: try --dtype float32; if that is refused too, {TRAINED_TO_NAN}"
READ = {".json", ".jinja", ".txt", ".model", ".safetensors"}  # files of a folder that libraries open
LEAST_OF_A_LAYER = 10_000  # bytes of its modules alone; its attention has four square matrices of 4-byte numbers
SPECIAL_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_tokenizer(config: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that `tokenizer_name` names, or else the model's.

    Raises:
        UserError: none is named or found, it is empty, or it has no end-of-text token.
    """
    name = config.tokenizer_name or config.model_name_or_path
    if name is None:
        raise UserError("no tokenizer: give --tokenizer_name with --model_type, or --model_name_or_path")
    check_folder(name)
    with library_errors(f"tokenizer {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=config.model_revision, **_code(config))
    if type(tokenizer.model_max_length) not in (int, float):
        raise UserError(f"tokenizer {name!r}: model_max_length is {tokenizer.model_max_length!r}, not a number")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"tokenizer {name!r} is empty: the tokenizer's files are missing; give --tokenizer_name")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {name!r} has no end-of-text token (eos_token), so a model could not learn to stop; "
            "set one and save the tokenizer, or give another --tokenizer_name"
        )
    for role in ("eos_token", "bos_token", "pad_token"):  # one that it lacks, as "", has the id of the unknown token
        token, index = getattr(tokenizer, role), getattr(tokenizer, f"{role}_id")
        if index is not None and tokenizer.convert_ids_to_tokens(index) != str(token):
            raise UserError(f"tokenizer {name!r}: its {role}, {str(token)!r}, is no token of its vocabulary")
    return tokenizer


def load_model(
    config: ModelArguments, tokenizer: PreTrainedTokenizerBase, quantization: BitsAndBytesConfig | None = None
) -> tuple[PreTrainedModel, str]:
    """The model in `config.dtype`, and where its weights come from: "random weights (gpt2)", or its name.

    Raises:
        UserError: neither or both of `model_name_or_path` and `model_type`, a model that is not found or does not fit
            its overrides, an adapter (see `recipe.adapters`), or fewer embeddings than the tokenizer has tokens.
    """
    name, subject = config.model_name_or_path, f"model {config.model_name_or_path or config.model_type!r}"
    origin = f"random weights ({config.model_type})" if name is None else name
    options: dict[str, Any] = {
        "config": load_config(config, tokenizer),
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
    }
    missing: set[str] = set()
    check_weights(name or "")
    with library_errors(", ".join([subject, *_flags(config)])):
        if name is None:
            model = AutoModelForCausalLM.from_config(**options, **_code(config))
        else:
            options |= {"revision": config.model_revision, "use_safetensors": True, "output_loading_info": True}
            options |= {} if quantization is None else {"quantization_config": quantization}
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options, **_code(config))
            model, missing = loaded[0], loaded[1]["missing_keys"]
    if missing:
        raise UserError(
            f"{subject} has no weights for {', '.join(sorted(missing)[:3])}, ...; they would be random: "
            "keep the model's shape in --config_overrides, or use --model_type"
        )
    if name is not None:
        for parameter, values in model.named_parameters():
            advice = HALF_OVERFLOWS if config.dtype == "float16" else TRAINED_TO_NAN
            _refuse_not_finite(f"{name!r}: its weights in {config.dtype}", parameter, values, advice)
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, {origin} only {embeddings} embeddings; use its own tokenizer"
        )
    fuse_activations(model)
    return model, origin


def fuse_activations(model: nn.Module) -> None:
    """Compute GPT-2's activation, `gelu_new`, with one operator instead of eight; the saved config does not change.

    Both are 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016, arXiv:1606.08415), but each
    of the eight operators writes a tensor, which is kept for the backward pass.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))


def check_folder(name: str) -> None:
    """Refuse a missing folder, which transformers would take for a Hub id, and what is no file or lacks its model.

    Libraries wait for ever to read a pipe, and take a link to nothing for a file that is not there.
    """
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise UserError(
            f"{name!r}: no such folder; give a folder with a model, or a Hub id such as openai-community/gpt2"
        )
    for path in sorted(Path(name).glob("*")):
        if path.suffix in READ:
            refuse_no_file(path)


def check_weights(name: str) -> None:
    """Refuse a folder whose weights are not safetensors: other formats can run code when they are loaded."""
    others = sorted(path.name for suffix in OTHER_WEIGHTS for path in Path(name).glob(f"*{suffix}"))
    others = [file for file in others if file not in NO_WEIGHTS]
    if others and not any(Path(name).glob("*.safetensors")):
        raise UserError(
            f"{name!r} has its weights in {others[0]}, and only safetensors are loaded, which cannot run code; "
            f"if you trust the file, save it anew: {CONVERSION}"
        )


def check_finite(name: str) -> None:
    """Refuse a folder with weights that are NaN or infinite: whatever is asked, such a model answers nothing.

    Raises:
        UserError: with the file, the tensor, and what it holds.
    """
    for path in sorted(Path(name).glob("*.safetensors")):
        with library_errors(f"model {name!r}: {path.name}"), safe_open(path, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118 - no mapping: it cannot be iterated
                _refuse_not_finite(f"{name!r}: {path.name}", tensor, file.get_tensor(tensor), TRAINED_TO_NAN)


def _refuse_not_finite(where: str, name: str, tensor: torch.Tensor, advice: str) -> None:
    if not tensor.is_floating_point():
        return
    tensor = tensor.detach()
    values = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit numbers have no isfinite
    finite = values.isfinite()
    if not finite.all():
        what = "nan" if values.isnan().any() else "inf"
        count = int((~finite).sum())
        raise UserError(f"model {where} is not finite: {name} holds {what} ({count:,} of {values.numel():,}); {advice}")


def load_config(config: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The model's configuration with its overrides, before any weight is read.

    Raises:
        UserError: an unknown architecture or model, or overrides that the configuration does not have.
    """
    name, model_type, overrides = config.model_name_or_path, config.model_type, config.config_overrides
    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise UserError(f"unknown --model_type {model_type!r}; for example gpt2, llama, qwen2")
    if (Path(name or "") / "adapter_config.json").is_file() and not (Path(name or "") / "config.json").is_file():
        raise UserError(
            f"{name!r} is an adapter, not a whole model; make one: python scripts/merge.py {name} --output_dir FOLDER"
        )
    with library_errors(f"model {name!r}"):
        if name is not None and model_type is None:
            model_config = AutoConfig.from_pretrained(name, revision=config.model_revision, **_code(config))
        elif model_type is not None and name is None:
            special_tokens = {key: getattr(tokenizer, key) for key in SPECIAL_TOKEN_IDS}
            defaults = {"vocab_size": len(tokenizer), **special_tokens}
            model_config = AutoConfig.for_model(model_type, **defaults)
        else:
            raise UserError(
                "name the model: either --model_name_or_path (trained weights) or --model_type (random weights)"
            )
    if overrides:
        with library_errors(f"--config_overrides {overrides}, to be written as key=value,key=value"):
            model_config.update_from_string(overrides)
            if (
                name is None
            ):  # a new one, so that what follows from others does: one type for each layer, sizes of heads
                given = {key: getattr(model_config, key) for key in re.findall(r"(?:^|,)(\w+)=", overrides)}
                model_config = AutoConfig.for_model(model_config.model_type, **defaults | given)
        _refuse_giant(model_config, f"--config_overrides {overrides}")
    return model_config


def _refuse_giant(model_config: PreTrainedConfig, subject: str) -> None:
    """Refuse more layers than memory can hold: they would be built one by one until the system ends the process."""
    text = model_config.get_text_config()
    layers, width = getattr(text, "num_hidden_layers", 0), getattr(text, "hidden_size", 0)
    if not isinstance(layers, int) or not isinstance(width, int):
        return
    need, there = layers * max(LEAST_OF_A_LAYER, 4 * 4 * width**2), psutil.virtual_memory().total
    if need > there:
        raise UserError(
            f"{subject}: {layers:,} layers of width {width:,} need {need / 1e9:,.0f} GB or more, and this machine has "
            f"{there / 1e9:,.0f} GB; give fewer or smaller ones"
        )


def _code(config: ModelArguments) -> dict[str, bool]:
    """Whether code of the model may be run, said in so many words: if nothing is said, transformers asks on stdin."""
    return {"trust_remote_code": config.trust_remote_code}


def _flags(config: ModelArguments) -> list[str]:
    values = {name: getattr(config, name) for name in ("config_overrides", "attn_implementation")}
    return [f"--{name} {value}" for name, value in values.items() if value is not None]


def prepare_for_chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Set what the saved folder needs to answer as trained: template, left padding, greedy decoding, special tokens."""
    tokenizer.chat_template = template.for_tokenizer(tokenizer).chat_template
    pad_left(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    special_tokens = {key: getattr(tokenizer, key) for key in SPECIAL_TOKEN_IDS}
    ends = _end_tokens(model, tokenizer, template)
    model.config.update(special_tokens)
    longest = min(256, (context_length(model.config) or 512) // 2)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=longest, **special_tokens | {"eos_token_id": ends}
    )


def stop_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Let a model stop where the template ends a turn, too."""
    if model.generation_config is None:
        model.generation_config = GenerationConfig()
    known = model.generation_config.eos_token_id
    ends = [end_id(tokenizer, turn_of(template, tokenizer)), *(known if isinstance(known, list) else [known])]
    model.generation_config.eos_token_id = [end for end in dict.fromkeys(ends) if end is not None]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> int | list[int]:
    """The ends of text and of turn, one of which is learned, and further special tokens at which the model stopped."""
    known = model.generation_config.eos_token_id if model.generation_config is not None else None
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    further = [token for token in (known if isinstance(known, list) else [known]) if token in special]
    ends = list(dict.fromkeys([tokenizer.eos_token_id, end_id(tokenizer, turn_of(template, tokenizer)), *further]))
    return ends if len(ends) > 1 else ends[0]


def pad_left(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad batches of prompts on the left, as generation needs it, after saving and loading too."""
    tokenizer.padding_side = "left"
    # undocumented in transformers: `save_pretrained` writes only the attributes that `init_kwargs` names
    tokenizer.init_kwargs["padding_side"] = "left"


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's, whose layers hold the adapter, or the model itself."""
    causal_model: Any = model
    return causal_model.get_base_model() if hasattr(causal_model, "get_base_model") else causal_model


def virtual_tokens(model: nn.Module) -> int:
    """How many positions PEFT's prompt or prefix tuning takes in front of each text; 0 for any other model."""
    config: Any = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0


def context_length(config: PreTrainedConfig) -> int | None:
    """The model's positions, in tokens: prompt and response together. None where there is no limit (ALiBi, Mamba)."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is None or positions > 0 else None  # XLNet writes -1


@contextmanager
def library_errors(subject: str) -> Iterator[None]:
    """Turn errors of libraries into ours: one line about the subject, without the advice at the end of their text.

    Code of a model raises anything where its config is wrong: a KeyError for the name of an activation or an attention,
    a TypeError, a division by zero.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = textwrap.shorten(str(error), 300, placeholder=" ...")
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") and "connect" in said and "huggingface.co" in said:
            said = "not in the cache, and HF_HUB_OFFLINE is set; unset it, or give the path of a folder"
        elif isinstance(error, UnicodeEncodeError):
            said = f"the address or HF_TOKEN has a character that a request cannot hold ({said})"
        elif isinstance(error, KeyError):
            said = f"it does not know {said}"
        elif "trust_remote_code" in str(error):
            said = (
                "it brings code of its own, which loading it would run on this machine; look at that code, and if you "
                "trust it add --trust_remote_code true, or name a model of an architecture that transformers knows"
            )
        elif isinstance(error, OSError) and "model.safetensors" in said:
            said = f"{said}; only safetensors are loaded: if you trust other weights, save them anew: {CONVERSION}"
        raise UserError(f"{subject}: {said or type(error).__name__}") from error
