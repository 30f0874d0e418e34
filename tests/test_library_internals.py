"""Private corners of libraries that the recipe uses, each in one function: a release that changes one fails here."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import InstructionTrainingArguments
from recipe.trainer import InstructionTrainer
from recipe.training.batching import attention_of, takes_boolean_mask
from recipe.training.trainer import LAST_HIDDEN_STATES

# --- recipe.attention -----------------------------------------------------------------------------------------------

# --- recipe.data ----------------------------------------------------------------------------------------------------

# --- recipe.evaluation ----------------------------------------------------------------------------------------------

# --- recipe.generation ----------------------------------------------------------------------------------------------

# --- recipe.model ---------------------------------------------------------------------------------------------------

# --- recipe.templates -----------------------------------------------------------------------------------------------

# --- recipe.training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_last_hidden_states_can_be_had_alone(architecture):
    """transformers' `output_hidden_states=-1`: what the head is applied to, and no other layer's."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 50}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes)).eval()
    outputs = model(input_ids=torch.arange(8)[None], **LAST_HIDDEN_STATES)
    *others, last = outputs.hidden_states
    assert others == [None, None]
    assert torch.equal(model.get_output_embeddings()(last), outputs.logits)


def test_how_a_model_attends_can_be_read():
    """transformers' `config._attn_implementation`, and `_supports_sdpa` of a model's class."""
    for name in ("sdpa", "eager"):
        config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=50)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
        assert attention_of(model) == name and takes_boolean_mask(model)
    config = AutoConfig.for_model(
        "gpt_neo", hidden_size=16, num_heads=2, num_layers=1, attention_types=[[["global"], 1]]
    )
    assert not takes_boolean_mask(AutoModelForCausalLM.from_config(config))


def test_a_batch_size_that_is_lowered_reaches_the_length_sampler(tmp_path):
    """transformers' `Trainer._train_batch_size`, which `auto_find_batch_size` halves when memory is short."""

    class Small(InstructionTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=50)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "length": 3}] * 8
    args = InstructionTrainingArguments(
        str(tmp_path), use_cpu=True, auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=8,
        train_sampling_strategy="group_by_length", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    trainer = Small(model, args, DataCollatorForInstructionTuning(0), train_dataset=Dataset.from_list(rows))
    trainer.train()
    assert trainer.length_sampler().sizes[0] <= 2
