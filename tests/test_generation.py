"""Batched generation against one prompt at a time, and against plain argmax without a cache."""

import pytest
import torch
from conftest import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.generation import generate_responses
from recipe.templates import load_template

PROMPTS = load_template("alpaca").prompts(
    [
        {"instruction": "Write the plural of the word.", "input": "cat"},
        {"instruction": "Say it in the past tense. " + "Anna walks to the park and reads a book. " * 3, "input": ""},
        {"instruction": "Name a colour.", "input": ""},
        {"instruction": "Count the words.", "input": "The river is long and the road is short."},
    ]
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "base")


@torch.no_grad()
def argmax_without_cache(model, tokenizer, prompt: str, count: int) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < count:
        token = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return new


def test_batched_equals_one_by_one_equals_argmax(demo_model, tokenizer):
    batched = generate_responses(demo_model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4)
    single = generate_responses(demo_model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=1)
    assert batched == single
    demo_model.eval()
    for prompt, response in zip(PROMPTS, batched, strict=True):
        expected = argmax_without_cache(demo_model, tokenizer, prompt, 12)
        assert response.token_ids == expected
        assert response.text == tokenizer.decode(expected)
        assert response.stop_reason == ("eos" if len(expected) < 12 else "length")


def test_model_and_tokenizer_are_left_as_they_were(demo_model, tokenizer):
    demo_model.train()
    demo_model.generation_config.do_sample = True
    demo_model.generation_config.repetition_penalty = 5.0
    demo_model.generation_config.no_repeat_ngram_size = 1
    saved = demo_model.generation_config
    responses = generate_responses(demo_model, tokenizer, PROMPTS[:1], max_new_tokens=8)
    assert responses[0].token_ids == argmax_without_cache(demo_model.eval(), tokenizer, PROMPTS[0], 8)
    assert demo_model.generation_config is saved
    assert tokenizer.padding_side == "right" and tokenizer.pad_token is None
    demo_model.train()
    generate_responses(demo_model, tokenizer, PROMPTS[:1], max_new_tokens=1)
    assert demo_model.training


def test_stop_reasons_and_padding_are_told_apart(demo_model, tokenizer):
    """A model made to end at once: every weight that leads to the end-of-text token wins."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[tokenizer.eos_token_id])
        model.lm_head.weight[tokenizer.eos_token_id] *= 10
    [response] = generate_responses(model, tokenizer, PROMPTS[:1], max_new_tokens=5)
    assert (response.text, response.token_ids, response.stop_reason) == ("", [], "eos")


def test_the_end_of_the_context(demo_model, tokenizer):
    """256 positions: a prompt of 254 tokens leaves two, one of 300 leaves none; short ones keep their whole room."""
    word = tokenizer(" the")["input_ids"]
    assert len(word) == 1
    prompts = ["the" + " the" * 253, "the" + " the" * 299, PROMPTS[2]]
    full, none, short = generate_responses(demo_model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    assert len(full.token_ids) <= 2 and full.stop_reason in ("context", "eos")
    assert (none.text, none.token_ids, none.stop_reason) == ("", [], "context")
    assert short == generate_responses(demo_model, tokenizer, [PROMPTS[2]], max_new_tokens=6)[0]


def test_no_prompts(demo_model, tokenizer):
    assert generate_responses(demo_model, tokenizer, []) == []
