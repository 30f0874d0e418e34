"""Which models a batch layout trains on another loss, found by config and by trying, without a trace in the model."""

import re
import sys

import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from recipe import attention, attention_products
from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import DataArguments, InstructionTrainingArguments, UserError
from recipe.trainer import InstructionTrainer
from recipe.training import layout_check
from recipe.training.collator_choice import default_attention, make_collator
from recipe.training.layout_check import why_logits_differ, why_never_one_row, why_not

sys.path.insert(0, str(ROOT / "benchmarks"))
import architectures

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
         "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}  # fmt: skip
# by kind: exact in all layouts; with a mask alone; padded alone. The values are the verdicts on mask and segments.
QUICK = {
    **dict.fromkeys(
        ["llama", "gpt2", "qwen2", "phi3", "olmo2", "mixtral", "qwen2_moe", "gpt_neox"], ("exact", "exact")
    ),
    "stablelm": ("exact", "StableLmForCausalLM does not keep the examples of a row apart"),
    "nemotron": ("exact", "NemotronForCausalLM does not keep the examples of a row apart"),
    "llama4_text": ("layers of the type chunked_attention",) * 2,
    "qwen3_next": ("layers of the type linear_attention",) * 2,
    "bamba": ("layers of the type linear_attention",) * 2,
    "granitemoehybrid": ("layers of the type linear_attention",) * 2,
    "gemma3_text": ("attends to a window of 8 tokens",) * 2,
    "jetmoe": ("exact", "exact"),  # views what attention returns
    "mllama": ("exact", "exact"),  # embeds tokens that its head does not know
    "bloom": ("does not load it with this attention", "BloomForCausalLM does not take position_ids"),
}


def small_model(architecture: str = "llama", kind: str = "sdpa", dtype: torch.dtype = torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SMALL | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=kind, dtype=dtype)


def collator_for(model, batching: str, tmp_path):
    tokenizer = type("Tokenizer", (), {"eos_token_id": 0})
    return make_collator(
        DataArguments(batching=batching), InstructionTrainingArguments(str(tmp_path), use_cpu=True), model, tokenizer
    )


@pytest.mark.parametrize("model_type", QUICK)
def test_each_layout_is_exact_or_refused(model_type):
    config_class = type(AutoConfig.for_model(model_type))
    result = architectures.examine(config_class)
    assert result["padded"] == "exact"
    for layout, expected in zip(("mask", "segments"), QUICK[model_type], strict=True):
        assert expected in result[layout] and result[layout].startswith(("exact", "refused: ")), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initializer_range", [0.02, 0.3])
@pytest.mark.parametrize(
    ("architecture", "kept_apart"), [("llama", True), ("olmo", True), ("stablelm", False), ("nemotron", False)]
)
def test_rounding_is_told_from_a_leak(architecture, kept_apart, initializer_range, dtype):
    for seed in range(3):
        model = small_model(architecture, attention.NAME, dtype, initializer_range=initializer_range)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += initializer_range * torch.randn_like(parameter)
        assert why_logits_differ(model, "padded") is None and why_logits_differ(model, "mask") is None
        reason = why_logits_differ(model, "segments")
        assert (reason is None) == kept_apart, reason


def test_a_window_longer_than_any_example_is_found_in_the_config():
    for architecture, name in (("mistral", "sliding_window"), ("llama4_text", "attention_chunk_size")):
        model = small_model(architecture, **{name: 100_000, "head_dim": 8})
        assert why_logits_differ(model, "mask") is None  # by trying, it is not seen
        assert why_never_one_row(model) is not None


def trainer_for(model, layout, tmp_path) -> InstructionTrainer:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 2)
    return InstructionTrainer(
        model, arguments, data_collator=DataCollatorWithSharedPrefix(0, layout), train_dataset=rows
    )


@pytest.mark.parametrize("architecture", ["stablelm", "nemotron"])
def test_a_model_that_drops_segments_trains_with_a_mask_and_the_run_says_so(architecture, tmp_path, capsys):
    model = small_model(architecture, attention.NAME)
    assert collator_for(model, "shared_prefix", tmp_path).attention == "segments"
    trainer = trainer_for(model, "segments", tmp_path)
    assert trainer.data_collator.attention == "mask"
    assert capsys.readouterr().out == trainer.layout_note + "\n"
    assert trainer.layout_note.startswith("The batches of this run are one row with a mask, because ")
    trainer = trainer_for(small_model("llama", attention.NAME), "segments", tmp_path)
    assert trainer.data_collator.attention == "segments" and trainer.layout_note is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("wrong", ["raises", "forward", "backward"])
def test_a_kernel_that_is_wrong_on_this_device_gives_way(wrong, adapter, tmp_path, monkeypatch, capsys):
    """As a GPU's might be; here the one of the CPU is spoiled. Of a new adapter, one half has no gradient at all."""

    class Spoiled(attention.ProductAttention):
        @staticmethod
        def forward(*args):
            if wrong == "raises":
                raise RuntimeError("no kernel image is available")
            return attention_products.ProductAttention.forward(*args) * (1.1 if wrong == "forward" else 1)

        @staticmethod
        def backward(*args):
            of_query, *others = attention_products.ProductAttention.backward(*args)
            return of_query * (1.1 if wrong == "backward" else 1), *others

    monkeypatch.setattr(attention, "ProductAttention", Spoiled)
    model = small_model("llama", attention.NAME)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapter else model
    trainer = trainer_for(model, "segments", tmp_path)
    assert trainer.data_collator.attention == "mask"
    expected = {"raises": "no kernel image", "forward": "logits are off", "backward": "gradients are off"}[wrong]
    assert expected in capsys.readouterr().out and expected in trainer.layout_note
    trainer.train()


def test_a_mask_that_is_not_kept_gives_way_to_padding(tmp_path, monkeypatch, capsys):
    tried = {"mask": "it does not see it", "padded": None}
    monkeypatch.setattr(layout_check, "why_logits_differ", lambda model, layout: tried[layout])
    trainer = trainer_for(small_model(), "mask", tmp_path)
    assert type(trainer.data_collator) is DataCollatorForInstructionTuning
    assert capsys.readouterr().out == "The batches of this run are padded batches, because it does not see it\n"
    trainer.train()


@pytest.mark.parametrize(("architecture", "kind"), [("falcon", None), ("gptj", None), ("llama", attention.NAME)])
def test_a_model_that_does_not_take_attentions_by_name_keeps_its_own(architecture, kind, tmp_path):
    config = AutoConfig.for_model(architecture, **SMALL, rotary_dim=4, alibi=False)
    assert default_attention(config) == kind
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kind)
    if architecture == "gptj":
        with pytest.raises(UserError, match="GPTJForCausalLM has no attention in which a mask could separate"):
            collator_for(model, "shared_prefix", tmp_path)
    else:
        assert collator_for(model, "shared_prefix", tmp_path).attention == ("mask" if kind is None else "segments")


@pytest.mark.parametrize("architecture", ["bert", "electra"])
def test_a_model_that_sees_the_tokens_it_is_to_predict_is_refused(architecture, tmp_path):
    with pytest.raises(UserError, match="depend on later tokens"):
        collator_for(small_model(architecture), "padded", tmp_path)
    collator_for(small_model(architecture, is_decoder=True), "padded", tmp_path)


def test_a_trainer_refuses_a_collator_that_does_not_fit_its_model(tmp_path):
    for config in (PromptTuningConfig, PrefixTuningConfig):
        virtual = get_peft_model(small_model(), config(num_virtual_tokens=4, task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match="prompt and prefix tuning put virtual tokens before each row"):
            trainer_for(virtual, "mask", tmp_path)
    trainer_for(get_peft_model(small_model(), LoraConfig(target_modules=["q_proj"])), "mask", tmp_path).train()


def test_trying_leaves_no_trace():
    model = small_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    random_state, weights = torch.get_rng_state(), {name: p.clone() for name, p in model.named_parameters()}
    assert why_not(model, "mask") is None and why_not(model, "padded") is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]) and parameter.grad is None and parameter.requires_grad


def test_the_page_of_the_docs_has_no_layout_that_is_silently_different():
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 180 and sum("| exact |" in " | ".join(row) for row in rows) >= 150
    for row in rows:
        cells = [cell.strip("| ") for cell in row[2:]]
        assert cells[0].startswith("not built: ") or all(re.match("exact$|refused: ", cell) for cell in cells), row


def test_tokens_that_are_embedded_and_never_predicted_are_not_tried():
    """Else the check itself would fail, and a model that sees later tokens would pass it, as CPM-Ant did."""
    model = small_model()
    model.set_input_embeddings(torch.nn.Embedding(200, 32))
    assert max(token for each in layout_check.example_features(model) for token in each["input_ids"]) < 97
    assert [why_logits_differ(model, layout) for layout in ("padded", "mask")] == [None, None]
    assert "depend on later tokens" in architectures.examine(type(AutoConfig.for_model("cpmant")))["padded"]
