"""Prompts: exactly the seed's text, and the same from the saved tokenizer."""

import json

import pytest
from conftest import DEMO
from transformers import AutoTokenizer

from recipe.config import DataArguments, ModelArguments, UserError
from recipe.data import load_splits
from recipe.model import load_model, prepare_for_chat
from recipe.templates import load_template, to_messages

WITH_INPUT = {"instruction": "Make it plural.", "input": "cat", "output": "cats"}
WITHOUT = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def test_alpaca_is_the_seeds_text():
    template = load_template("alpaca")
    assert template.prompts([WITH_INPUT, WITHOUT]) == [
        f"{PREAMBLE}\n\n### Instruction:\nMake it plural.\n\n### Input:\ncat\n\n### Response:\n",
        f"{PREAMBLE}\n\n### Instruction:\nName a colour.\n\n### Response:\n",
    ]


def test_phi3():
    template = load_template("phi3")
    assert template.prompts([WITH_INPUT, WITHOUT]) == [
        "<|user|>\nMake it plural.\ncat\n<|assistant|>\n",
        "<|user|>\nName a colour.\n<|assistant|>\n",
    ]


@pytest.mark.parametrize("name", ["alpaca", "phi3"])
def test_saved_tokenizer_gives_the_training_tokens(name, tmp_path, demo_tokenizer):
    """Prompt and whole conversation by `apply_chat_template` of a saved folder, token for token as in training."""
    data = {"train": str(DEMO / "records" / "validation.jsonl")}
    encoded = load_splits(DataArguments(data=data, test_ratio=0, template=name), demo_tokenizer)["train"]
    model, _ = load_model(ModelArguments(model_name_or_path=str(DEMO / "base")), demo_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    prepare_for_chat(model, tokenizer, load_template(name))
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)

    records = [json.loads(line) for line in (DEMO / "records" / "validation.jsonl").read_text("utf-8").splitlines()]
    for row in encoded:
        record = records[row["row"]]
        prompt_length = row["labels"].index(next(label for label in row["labels"] if label != -100))
        options = {"tokenize": True, "return_dict": False}
        prompt = saved.apply_chat_template(to_messages(record), add_generation_prompt=True, **options)
        assert prompt == row["input_ids"][:prompt_length]
        conversation = [*to_messages(record), {"role": "assistant", "content": record["output"]}]
        assert saved.apply_chat_template(conversation, **options) == row["input_ids"]


def test_an_input_written_into_the_content_gives_the_same_prompt(demo_tokenizer):
    """For servers that pass on only role and content."""
    template = load_template("alpaca")
    plain = {"instruction": "Make it plural.\n\n### Input:\ncat", "input": ""}
    assert template.prompt(plain) == template.prompt(WITH_INPUT)


def test_own_template(tmp_path, demo_tokenizer):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}Q: {{ message.content }}"
        "{{ ' (' + message.input + ')' if message.input }}\n"
        "{% else %}A: {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{{ 'A: ' if add_generation_prompt }}"
    )
    template = load_template(str(path), demo_tokenizer)
    assert template.prompt(WITH_INPUT) == "<|endoftext|>Q: Make it plural. (cat)\nA: "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages[0].content }", "line 1"),
        ("{% if messages %}", "line 1"),
        ("{{ messages[0].content }}: {{ messages[1].content if messages|length > 1 }}", "loses the record's input"),
        ("{{ messages[0].input }}", "loses the record's instruction"),
        ("{{ messages[0].content + messages[0].input }}", "must begin with the prompt and the response"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_templates_that_cannot_work_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_template(str(path))
    assert "bad.jinja" in str(error.value)


def test_an_unknown_template_names_those_there_are():
    with pytest.raises(UserError, match=r"unknown template 'alpacca': give one of alpaca, phi3 or the path"):
        load_template("alpacca")
