"""Gradients that a step leaves as they are, beside those of PyTorch's own ways."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from recipe.training.gradients import clip_where_needed, embedding_rows_only

SMALL = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
LLAMA = {**SMALL, "intermediate_size": 24, "pad_token_id": 3}
MODELS = {
    "tied": lambda: GPT2LMHeadModel(GPT2Config(**SMALL)),
    "untied, with a padding row": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "tied, with a padding row": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
}


def gradients(model, batches, context) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with context(model):
        for ids in batches:
            model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(40, (3, 2, 9), generator=generator)
    ids[:, :, :3] = 3  # the same token several times
    return list(ids)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bf16", [False, True])
def test_rows_that_are_added_in_place_give_the_gradients_of_pytorch(name, bf16, batches):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = gradients(model, batches, lambda model: embedding_rows_only(None))
        expected = {key: value.clone() for key, value in expected.items()}
        found = gradients(model, batches, embedding_rows_only)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7, msg=key)
    again = gradients(model, batches, lambda model: embedding_rows_only(None))  # the hook is gone, also in float32
    if not bf16:
        assert all(torch.equal(gradient, expected[key]) for key, gradient in again.items())


def test_no_gradient_as_large_as_the_embedding_is_made(batches):
    """The looked-up rows go into the gradient that the head has left: it stays the same memory."""
    model = GPT2LMHeadModel(GPT2Config(**SMALL))
    weight = model.get_input_embeddings().weight
    gradients(model, batches[:1], embedding_rows_only)
    before, tensor = weight.grad.data_ptr(), weight.grad
    with embedding_rows_only(model):
        model(input_ids=batches[1], labels=batches[1]).loss.backward()
    assert weight.grad is tensor and weight.grad.data_ptr() == before


def test_a_frozen_embedding_gets_no_gradient(batches):
    """Also where its output has one, as `enable_input_require_grads` makes it for adapters."""
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.get_input_embeddings().weight.requires_grad_(False)
    model.enable_input_require_grads()
    assert "model.embed_tokens.weight" not in gradients(model, batches, embedding_rows_only)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, float("nan")])
def test_clipping_is_that_of_pytorch(scale, batches):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SMALL)).eval()
    model.transformer.wpe.weight.requires_grad_(False)  # a parameter without a gradient
    gradients(model, batches, embedding_rows_only)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= scale
    stock = copy.deepcopy(model)
    for parameter, other in zip(model.parameters(), stock.parameters(), strict=True):
        other.grad = None if parameter.grad is None else parameter.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
    norm = clip_where_needed(model.parameters(), 1.0)
    torch.testing.assert_close(norm, expected, rtol=0, atol=0, equal_nan=True)
    for parameter, other in zip(model.parameters(), stock.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_gradients_that_are_short_enough_are_not_touched(batches):
    model = GPT2LMHeadModel(GPT2Config(**SMALL))
    gradients(model, batches, embedding_rows_only)
    versions = [parameter.grad._version for parameter in model.parameters()]
    clip_where_needed(model.parameters(), 1e6)
    assert [parameter.grad._version for parameter in model.parameters()] == versions
