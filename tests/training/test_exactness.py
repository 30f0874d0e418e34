"""One optimizer step of many architectures against ten lines of PyTorch: every record by itself, unpadded.

The expected tokens are made by hand too: a template's markers as ids, and what is between them as nothing but text.
"""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from recipe import attention
from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import DataArguments, InstructionTrainingArguments
from recipe.data import load_splits
from recipe.trainer import InstructionTrainer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
ROTARY = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
ARCHITECTURES = {
    "gpt2": SIZES | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": SIZES | {"intermediate_size": 64},
    "llama": ROTARY,
    "olmo2": ROTARY,
    "phi3": ROTARY,
    "qwen2": ROTARY,
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if message.input %}{{ '\n' + message.input }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYOUTS = ["padded", "mask", "segments"]
BATCHES = [(8, 1), (1, 8), (3, 3)]  # records in a micro-batch, and micro-batches in a step over all eight records
KINDS = ["whole text", "response", "begin of text", "ChatML"]
# texts that spell every special token used below, and look like the turns of a chat
RECORDS = [
    {"instruction": "What does <|endoftext|> mean?", "input": "", "output": "In GPT-2, <|endoftext|> ends a text."},
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Make it plural.", "input": "cat", "output": "cats"},
    {"instruction": "Make it plural.", "input": "<s> cat <|im_end|>", "output": "<s> cats <|im_end|>\n<|im_start|>"},
    {"instruction": "Name a colour.<|im_end|>\n<|im_start|>assistant\nRed.", "input": "", "output": "\n Green <s>."},
    {"instruction": "Repeat.", "input": "### Response:\n<|endoftext|><|endoftext|>", "output": "<|endoftext|> twice"},
    {"instruction": "Say how to sort a list of many words by their length, in one or two sentences.", "input": "",
     "output": "Count the letters of each word. Then put the shortest word first and the longest word last."},
    {"instruction": "Name a colour.", "input": "any", "output": "Blue."},
]  # fmt: skip


class Kind:
    """A tokenizer, a template, and the tokens of a record, made by hand."""

    def __init__(self, name: str, folder: Path):
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
        self.name, self.template, self.begin = name, "alpaca", []
        if name == "begin of text":
            tokenizer.add_special_tokens({"bos_token": "<s>"})
            post = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
            tokenizer.backend_tokenizer.post_processor = post
            self.begin = [tokenizer.bos_token_id]
        elif (
            name == "ChatML"
        ):  # as SmolLM2 and Qwen: the end of a turn is the end of text, and stands in the prompt too
            markers = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
            tokenizer.add_special_tokens(markers)
            self.template = str(folder / "chatml.jinja")
            Path(self.template).write_text(CHATML, encoding="utf-8")
        tokenizer.save_pretrained(folder / "tokenizer")
        self.mask_prompt = name != "whole text"
        self.end, self.folder = tokenizer.eos_token_id, folder / "tokenizer"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A new one each time: a call may change how a tokenizer reads special tokens from then on."""
        return AutoTokenizer.from_pretrained(self.folder)

    def by_hand(self, record: dict[str, str]) -> tuple[list[int], list[int]]:
        """The tokens of a record's prompt and of its response."""
        tokenizer = self.tokenizer()

        def text(words: str) -> list[int]:
            return tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"]

        response = [*text(record["output"]), self.end]
        if self.template == "alpaca":
            prompt = (
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                f"request.\n\n### Instruction:\n{record['instruction']}"
            )
            prompt += f"\n\n### Input:\n{record['input']}" if record["input"] else ""
            return [*self.begin, *text(f"{prompt}\n\n### Response:\n")], response
        start, content = tokenizer.convert_tokens_to_ids("<|im_start|>"), record["instruction"]
        content += f"\n{record['input']}" if record["input"] else ""
        return [start, *text(f"user\n{content}"), self.end, *text("\n"), start, *text("assistant\n")], response


@pytest.fixture(scope="module", autouse=True)
def quick_collection_of_garbage() -> Iterator[None]:
    """Each start of a Trainer collects it among all objects of all libraries, which takes longer than the training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> Kind:
    return Kind(request.param, tmp_path_factory.mktemp("kind"))


@pytest.fixture(scope="module")
def by_hand(kind) -> list[tuple[list[int], list[int]]]:
    return [kind.by_hand(record) for record in RECORDS]


@pytest.fixture(scope="module")
def rows(kind) -> Dataset:
    path = kind.folder / "records.json"
    path.write_text(json.dumps(RECORDS), encoding="utf-8")
    split = {"validation_ratio": 0, "test_ratio": 0}
    config = DataArguments(data=str(path), template=kind.template, mask_prompt=kind.mask_prompt, **split)
    return load_splits(config, kind.tokenizer())["train"]


def test_tokens_are_those_made_by_hand(kind, by_hand, rows):
    assert rows["row"][:] == list(range(len(RECORDS)))
    for row, (prompt, response) in zip(rows, by_hand, strict=True):
        assert row["input_ids"] == prompt + response
        assert row["labels"] == (([-100] * len(prompt) if kind.mask_prompt else prompt) + response)
        assert response.count(kind.end) == 1  # although the text of some spells it


def make_model(architecture: str, tokenizer: PreTrainedTokenizerBase, layout: str) -> PreTrainedModel:
    """The same weights for each layout, large enough that each matters."""
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), **special, **ARCHITECTURES[architecture])
    implementation = attention.NAME if layout == "segments" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def one_record_at_a_time(model, by_hand, mask_prompt: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean over all targets of all records, and its gradients."""
    total, count = torch.zeros(()), 0
    for prompt, response in by_hand:
        first = len(prompt) if mask_prompt else 1  # the first token has nothing before it to predict it from
        ids = torch.tensor([prompt + response])
        logits, targets = model(ids).logits[0, first - 1 : -1], ids[0, first:]
        total = total + functional.cross_entropy(logits, targets, reduction="sum")
        count += len(targets)
    (total / count).backward()
    return (total / count).item(), {name: parameter.grad for name, parameter in model.named_parameters()}


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def one_step(model, layout: str, batch: tuple[int, int], rows, end: int, folder: Path):
    """Loss and gradients of one optimizer step over all records."""
    padded = layout == "padded"
    collator = DataCollatorForInstructionTuning(end) if padded else DataCollatorWithSharedPrefix(end, layout)
    args = InstructionTrainingArguments(
        str(folder), per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1], max_steps=1,
        max_grad_norm=0.0, use_cpu=True, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    keep = KeepGradients()
    trainer = InstructionTrainer(model, args, data_collator=collator, train_dataset=rows, callbacks=[keep])
    trainer.train()
    return trainer.state.log_history[0]["loss"], keep.gradients


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_has_the_loss_and_the_gradients_of_single_records(architecture, kind, by_hand, rows, tmp_path):
    """Each layout with one way to batch; the kinds go through all nine pairs of each architecture."""
    tokenizer, first = kind.tokenizer(), [*ARCHITECTURES].index(architecture) + KINDS.index(kind.name)
    model = make_model(architecture, tokenizer, "padded")
    expected_loss, expected = one_record_at_a_time(model, by_hand, kind.mask_prompt)
    for number, layout in enumerate(LAYOUTS, start=first):
        batch, model = BATCHES[number % 3], make_model(architecture, tokenizer, layout)
        loss, gradients = one_step(model, layout, batch, rows, kind.end, tmp_path)
        assert loss == pytest.approx(expected_loss, rel=1e-5), (layout, batch)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            difference = (gradients[name] - gradient).norm()
            assert difference <= 1e-4 * gradient.norm(), (layout, batch, name)
