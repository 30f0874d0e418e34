"""The chunked loss against `cross_entropy` over all logits, and the trainer that takes it against each model's own."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import InstructionTrainingArguments
from recipe.trainer import InstructionTrainer
from recipe.training import loss as module
from recipe.training.loss import linear_cross_entropy, token_losses


def example(rows: int, dtype: torch.dtype = torch.float32, bias: bool = False, hidden: int = 16, vocab: int = 301):
    generator = torch.Generator().manual_seed(rows)
    head = nn.Linear(hidden, vocab, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    states = torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::3] = -100
    return states, head, targets


def gradients(loss: torch.Tensor, states: torch.Tensor, head: nn.Linear) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in (states, *head.parameters()) if p.requires_grad]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_are_those_of_cross_entropy_over_all_logits(rows, dtype, bias, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)  # so that few rows make several chunks, and several slices of each
    monkeypatch.setitem(module.SLICE, "cpu", 301 * 20)
    states, head, targets = example(rows, dtype, bias)
    expected = functional.cross_entropy(head(states), targets, reduction="sum")
    found = linear_cross_entropy(states, head.weight, head.bias, targets)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    pairs = zip(gradients(found * 0.25, states, head), gradients(expected * 0.25, states, head), strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=10 * tolerance, atol=tolerance)


def test_under_autocast_the_loss_is_as_exact_as_that_of_the_rounded_logits():
    states, head, targets = example(500)
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.cross_entropy(head(states).float(), targets, reduction="sum")
        found = linear_cross_entropy(states, head.weight, None, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for mine, theirs in zip(gradients(found, states, head), gradients(expected, states, head), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.01 * theirs.norm()


def test_a_frozen_head_gets_no_gradient_and_frozen_states_neither():
    states, head, targets = example(20)
    head.weight.requires_grad_(False)
    linear_cross_entropy(states, head.weight, None, targets).backward()
    assert states.grad is not None and head.weight.grad is None
    states, head, targets = example(20)
    linear_cross_entropy(states.detach(), head.weight, None, targets).backward()
    assert head.weight.grad is not None


def test_nothing_to_learn_is_a_loss_of_zero():
    states, head, targets = example(5)
    loss = linear_cross_entropy(states, head.weight, None, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0 and not states.grad.any()


def test_losses_and_hits_of_each_target(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 32)
    states, head, targets = example(100, bias=True)
    logits = head(states)
    targets[1:30:3] = logits[1:30:3].argmax(-1)
    losses, correct = token_losses(states, head.weight, head.bias, targets)
    expected = functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert correct.tolist() == (logits.argmax(-1) == targets).tolist() and correct.sum() >= 10


TINY = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32},
    "gemma2": {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32},
    "granite": {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32},
    "cohere": {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32},
}
FURTHER = {
    "llama": {"intermediate_size": 64, "tie_word_embeddings": False},  # a head with weights of its own
    "gemma2": {"intermediate_size": 64, "head_dim": 16, "final_logit_softcapping": 3.0, "initializer_range": 0.5},
    "granite": {"intermediate_size": 64, "logits_scaling": 8.0},
    "cohere": {"intermediate_size": 64, "logit_scale": 0.25},
}
ROWS = Dataset.from_list(
    [
        {"input_ids": [*range(3, 3 + size)], "labels": [-100] * 4 + [*range(7, 3 + size)], "length": size, "row": row}
        for row, size in enumerate([9, 14, 6, 12])
    ]
)  # fmt: skip


def tiny_model(architecture: str) -> nn.Module:
    torch.manual_seed(3)
    config = AutoConfig.for_model(architecture, vocab_size=200, **TINY[architecture] | FURTHER.get(architecture, {}))
    return AutoModelForCausalLM.from_config(config)


def trainer_for(model: nn.Module, tmp_path, **changes) -> InstructionTrainer:
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True} | changes
    return InstructionTrainer(
        model, InstructionTrainingArguments(**arguments), DataCollatorForInstructionTuning(0), train_dataset=ROWS
    )


def head_positions(model: nn.Module) -> list[int]:
    """At how many positions the model's own head is computed, call by call."""
    seen: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize(
    ("architecture", "own_head"),
    [("gpt2", False), ("llama", False), ("gemma2", True), ("granite", True), ("cohere", True)],
)
def test_loss_gradients_and_evaluation_are_those_of_the_models_own_logits(architecture, own_head, tmp_path):
    """Models that scale or cap their logits are found out, and keep their own head."""
    model = tiny_model(architecture)
    trainer = trainer_for(model, tmp_path)
    batch = trainer.data_collator(list(ROWS))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    theirs = torch.autograd.grad(expected, list(model.parameters()))

    seen = head_positions(model)
    found = [trainer.compute_loss(model, batch) for _ in range(2)]
    mine = torch.autograd.grad(found[-1], list(model.parameters()))
    assert seen[-1] == (batch["input_ids"].numel() if own_head else len(ROWS))
    for loss in found:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    hits = (logits.argmax(-1) == batch["labels"]).sum().item() / len(batch["supervised"])
    metrics = trainer.evaluate(ROWS)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["eval_next_token_accuracy"] == pytest.approx(hits)


@pytest.mark.parametrize(
    ("targets", "saved"), [(["c_attn"], None), (["c_attn", "lm_head"], None), (["c_attn"], ["lm_head"])]
)
def test_lora_with_and_without_the_head(targets, saved, tmp_path):
    """An adapted head is more than its weight, and one that is trained beside the adapter is a copy of it."""
    lora = LoraConfig(target_modules=targets, modules_to_save=saved, init_lora_weights=False)
    model = get_peft_model(tiny_model("gpt2"), lora)
    trainer = trainer_for(model, tmp_path)
    batch = trainer.data_collator(list(ROWS))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    learned = [p for p in model.parameters() if p.requires_grad]
    theirs = torch.autograd.grad(expected, learned)
    found = trainer.compute_loss(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for one, other in zip(torch.autograd.grad(found, learned), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_tokens_that_prompt_tuning_puts_before_a_row_have_no_targets(tmp_path):
    model = get_peft_model(tiny_model("gpt2"), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    trainer = trainer_for(model, tmp_path)
    batch = trainer.data_collator(list(ROWS))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 5:]
    expected = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected, rtol=1e-5, atol=0)


def test_a_new_model_is_looked_at_anew(tmp_path):
    """`model_init` makes one at each `train()`: the head, and the verdict on it, must not be the old one's."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
    kinds = iter(["gpt2", "llama", "granite"])
    trainer = InstructionTrainer(
        args=arguments, model_init=lambda: tiny_model(next(kinds)), data_collator=DataCollatorForInstructionTuning(0),
        train_dataset=ROWS.remove_columns("row"),
    )  # fmt: skip
    for own_head in (False, True):
        before = trainer.model
        trainer.train()
        assert trainer.model is not before
        batch = trainer.data_collator(list(ROWS))
        trainer.model.eval()
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        seen = head_positions(trainer.model)
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-5, atol=0)
        assert (seen[-1] > len(ROWS)) == own_head


def test_arguments_of_transformers_alone_and_none_at_all_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    collator = DataCollatorForInstructionTuning(0)
    for arguments in (None, TrainingArguments("stock", use_cpu=True)):
        trainer = InstructionTrainer(tiny_model("gpt2"), arguments, collator, train_dataset=ROWS)
        assert len(trainer.get_train_dataloader()) == 1 and trainer.get_total_train_batch_size(trainer.args) == 8


def test_batches_that_would_be_cut_by_rows_are_refused_and_streams_are_not_cut(tmp_path):
    with pytest.raises(ValueError, match="dispatch_batches splits tensors by their first dimension"):
        trainer_for(tiny_model("gpt2"), tmp_path, accelerator_config={"dispatch_batches": True})
    losses = []
    for rows in (ROWS, ROWS.to_iterable_dataset()):
        trainer = trainer_for(tiny_model("gpt2"), tmp_path, max_steps=1, logging_steps=1, save_strategy="no", seed=1)
        trainer.train_dataset = rows
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_training_on_the_whole_text_keeps_the_logits_of_a_chunk_only(tmp_path, monkeypatch):
    """The largest tensor that a step makes, of all operators, is a chunk's logits and not the batch's."""
    monkeypatch.setattr(module, "CHUNK", 34)
    model = tiny_model("gpt2")
    trainer = trainer_for(model, tmp_path)
    trainer.compute_loss(model, trainer.data_collator(list(ROWS)))  # looks once at the model's own head
    rows = [{**row, "labels": row["input_ids"]} for row in ROWS]
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (200,):
                largest = max(largest, result.shape[:-1].numel())
            return result

    batch = trainer.data_collator(rows)
    with Largest():
        trainer.compute_loss(model, batch).backward()
    assert len(batch["supervised"]) == 37 and largest == 34
