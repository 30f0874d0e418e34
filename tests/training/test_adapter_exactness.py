"""A step with an adapter, against each record alone in a stock model whose weights hold what the adapter's paper says.

No PEFT computes the answer: LoRA is W + s B A (Hu et al. 2021), rsLoRA the same with s = alpha / sqrt(r) (Kalajdzievski
2023), DoRA is m V / |V| of V = W + s B A, by output, with |V| as a constant to the gradient (Liu et al. 2024, 4.3).
"""

import math

import pytest
import torch
from datasets import Dataset
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from recipe import attention
from recipe.adapters import add_adapter
from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import InstructionTrainingArguments, LoraArguments
from recipe.trainer import InstructionTrainer

RANK, ALPHA = 3, 5
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
KINDS = {
    "gpt2": SIZES | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": False},
}
STARTS = [[5, 6, 7, 8], [5, 6, 7, 8, 30, 31], [5, 6], []]  # what records have in common, at several depths
ROWS = [
    {"input_ids": ids, "labels": [-100] * first + ids[first:], "length": len(ids), "row": row}
    for row, (start, size) in enumerate([(0, 4), (1, 7), (1, 2), (2, 9), (3, 5), (0, 6)])
    for ids in [[*STARTS[start], *range(40 + 9 * row, 40 + 9 * row + size)]]
    for first in [max(1, len(STARTS[start]))]
]


def stock_model(architecture: str, kind: str = "sdpa"):
    torch.manual_seed(1)
    config = AutoConfig.for_model(architecture, vocab_size=120, **KINDS[architecture])
    return AutoModelForCausalLM.from_config(config, attn_implementation=kind)


def adapted_model(architecture: str, lora: LoraArguments, layout: str):
    """As a run builds it, and then as after some steps: no part of the adapter is zero."""
    model, _ = add_adapter(stock_model(architecture, attention.NAME if layout == "segments" else "sdpa"), lora)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def by_hand(architecture: str, lora: LoraArguments, weights: dict[str, torch.Tensor]):
    """Mean loss of all targets, record by record, and its gradients by the adapter's weights."""
    model = stock_model(architecture).requires_grad_(False)
    learned = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    scale = ALPHA / (math.sqrt(RANK) if lora.use_rslora else RANK)
    changed = dict(model.named_parameters(remove_duplicate=False))
    for name in [name for name in learned if "lora_A" in name]:
        place = name.removeprefix("base_model.model.").partition(".lora_A")[0]
        stored = changed[f"{place}.weight"]
        as_stored = (lambda weight: weight.T) if architecture == "gpt2" and "lm_head" not in place else (lambda w: w)
        weight = as_stored(stored) + scale * learned[name.replace("lora_A", "lora_B")] @ learned[name]  # (out, in)
        if lora.use_dora:
            magnitude = learned[name.replace("lora_A", "lora_magnitude_vector")]
            weight = magnitude[:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
        changed[f"{place}.weight"] = as_stored(weight)
    total, count = torch.zeros(()), 0
    for row in ROWS:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = functional_call(model, changed, (ids,), tie_weights=False).logits[0, :-1]
        total = total + functional.cross_entropy(logits, labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    (total / count).backward()
    return (total / count).item(), {name: weight.grad for name, weight in learned.items()}, count


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_step(model, layout: str, folder, **changes):
    """Loss and gradients of an optimizer step over all records, in two micro-batches; and positions of the own head."""
    padded = layout == "padded"
    collator = DataCollatorForInstructionTuning(0) if padded else DataCollatorWithSharedPrefix(0, layout)
    args = InstructionTrainingArguments(
        str(folder), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1, max_grad_norm=0.0,
        use_cpu=True, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **changes,
    )  # fmt: skip
    keep = KeepGradients()
    trainer = InstructionTrainer(model, args, collator, train_dataset=Dataset.from_list(ROWS), callbacks=[keep])
    assert trainer.layout_note is None
    positions: list[int] = []
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: positions.append(inputs[0].shape[:-1].numel()))
    trainer.train()
    return trainer.state.log_history[0]["loss"], keep.gradients, positions


@pytest.mark.parametrize("layout", ["padded", "mask", "segments"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("architecture", KINDS)
def test_a_step_has_the_loss_and_the_gradients_of_single_records(architecture, kind, layout, tmp_path):
    lora = LoraArguments(
        lora_r=RANK, lora_alpha=ALPHA, lora_target_modules=["all-linear"], use_rslora=kind == "rslora",
        use_dora=kind == "dora",
    )  # fmt: skip
    model = adapted_model(architecture, lora, layout)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    per_layer = {"gpt2": 4, "llama": 7}[architecture] * (3 if kind == "dora" else 2)
    assert len(weights) == 2 * per_layer
    expected_loss, expected, _ = by_hand(architecture, lora, weights)
    loss, gradients, positions = one_step(model, layout, tmp_path)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0 and (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    # fast: the model's own head computes the last position of each row alone
    assert max(positions) <= 3 and sum(positions) < 10


@pytest.mark.parametrize("layout", ["padded", "mask", "segments"])
@pytest.mark.parametrize("architecture", KINDS)
def test_an_adapted_head_is_as_exact_and_computed_by_the_model(architecture, layout, tmp_path):
    targets = {"gpt2": ["c_attn", "lm_head"], "llama": ["q_proj", "lm_head"]}[architecture]
    lora = LoraArguments(lora_r=RANK, lora_alpha=ALPHA, lora_target_modules=targets)
    model = adapted_model(architecture, lora, layout)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sum("lm_head" in name for name in weights) == 2
    expected_loss, expected, count = by_hand(architecture, lora, weights)
    loss, gradients, positions = one_step(model, layout, tmp_path)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert sum(positions) >= count  # at every target


def test_checkpointed_activations_change_nothing(tmp_path):
    """Inputs of the first block need no gradient, as the embedding is frozen."""
    lora = LoraArguments(lora_r=RANK, lora_alpha=ALPHA)
    plain = one_step(adapted_model("llama", lora, "segments"), "segments", tmp_path)
    again = one_step(adapted_model("llama", lora, "segments"), "segments", tmp_path, gradient_checkpointing=True)
    assert plain[0] == again[0] and plain[1].keys() == again[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(again[1][name], gradient)
