"""Private corners of libraries that the recipe uses, each in one function: a release that changes one fails here."""

import json

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from conftest import DEMO
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AutoConfig, AutoTokenizer, Cache, DynamicCache, DynamicLayer

from recipe.generation import BlockwiseLayer
from recipe.model import pad_left
from recipe.templates import load_template, to_messages

# --- recipe.attention -----------------------------------------------------------------------------------------------


def test_torch_tells_whether_flash_attention_runs():
    """`SDPAParams` is public, but torch documents neither its arguments nor their order."""
    query, key = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    params = SDPAParams(query, key, key, None, 0.0, False, True)
    assert (params.query.shape, params.key.shape) == (query.shape, key.shape)
    assert (params.attn_mask, params.dropout, params.is_causal, params.enable_gqa) == (None, 0.0, False, True)
    assert can_use_flash_attention(params) is False  # on a CPU


# --- recipe.data ----------------------------------------------------------------------------------------------------

# --- recipe.evaluation ----------------------------------------------------------------------------------------------

# --- recipe.generation ----------------------------------------------------------------------------------------------


def test_layers_of_transformers_caches():
    """Which layers a model caches, and a subclass of `DynamicLayer` in a `Cache`."""

    def layers(architecture: str, **options) -> set[type]:
        config = AutoConfig.for_model(architecture, num_hidden_layers=2, **options)
        return {type(layer) for layer in DynamicCache(config=config).layers}

    assert layers("gpt2") == layers("llama") == {DynamicLayer}
    assert DynamicLayer not in layers("mistral", sliding_window=8) | layers("mamba")
    cache, states = Cache(layers=[BlockwiseLayer()]), torch.randn(2, 3, 5, 4)
    assert cache.get_seq_length() == 0
    assert all(torch.equal(states, kept) for kept in cache.update(states, states, 0))
    assert cache.get_seq_length() == 5 and cache.get_mask_sizes(1, 0) == (6, 0)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[0].keys.shape == (1, 3, 5, 4)


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 20.00 MiB.", "MPS backend out of memory"])
def test_accelerate_knows_when_memory_ran_out(text):
    assert should_reduce_batch_size(RuntimeError(text)) and not should_reduce_batch_size(RuntimeError("a shape"))


# --- recipe.model ---------------------------------------------------------------------------------------------------


def test_a_tokenizer_saves_the_settings_that_init_kwargs_names(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "padding_side" not in saved, "transformers saves it now: `pad_left` needs no init_kwargs any more"
    pad_left(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"


# --- recipe.templates -----------------------------------------------------------------------------------------------


def test_apply_chat_template_renders_as_templates_do(demo_tokenizer):
    template = load_template("alpaca", demo_tokenizer)
    records = [{"instruction": "Make it plural.", "input": "cat"}, {"instruction": "Name a colour.", "input": ""}]
    rendered = demo_tokenizer.apply_chat_template(
        [to_messages(record) for record in records], chat_template=template.chat_template, tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    assert rendered == template.prompts(records)


# --- recipe.training ------------------------------------------------------------------------------------------------
