"""Prompts: exactly the seed's text, and the same from the saved tokenizer."""

import json

import pytest
from conftest import DEMO
from tokenizer_kinds import KINDS, byte_level, unigram
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils.chat_template_utils import Chat

from recipe.config import DataArguments, ModelArguments, UserError
from recipe.data import load_splits
from recipe.model import load_model, prepare_for_chat
from recipe.templates import load_template, to_messages
from recipe.tokens import prompt_ids

WITH_INPUT = {"instruction": "Make it plural.", "input": "cat", "output": "cats"}
WITHOUT = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
BARE = "{% for m in messages %}{{ m.content }}{{ m.input }}{% if m.role == 'user' %}\nA: {% endif %}{% endfor %}"
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
        (
            "{{ messages[0].content[:20] }}: {{ messages[1].content if messages|length > 1 }}",
            "loses the record's input",
        ),
        ("{{ messages[0].input }}", "loses the record's instruction"),
        ("{{ messages[0].content + messages[0].input }}", "must begin with the prompt and the response"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_templates_that_cannot_work_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_template(str(path))
    assert "bad.jinja" in str(error.value)


@pytest.mark.parametrize("shown", ["message.content", "message['content']|trim"])
def test_a_template_that_reads_content_alone_has_the_input_in_it(tmp_path, shown):
    path = tmp_path / "own.jinja"
    path.write_text(f"{{% for message in messages %}}[{{{{ message.role }}}}] {{{{ {shown} }}}}\n{{% endfor %}}"
                    "{% if add_generation_prompt %}[assistant] {% endif %}")  # fmt: skip
    template = load_template(str(path))
    assert template.prompt({"instruction": "Make it plural.", "input": "cat"}) == (
        "[user] Make it plural.\n\n### Input:\ncat\n[assistant] "
    )
    assert template.prompt({"instruction": "Name a colour.", "input": None}) == "[user] Name a colour.\n[assistant] "
    assert "### Input" not in load_template("phi3").prompt({"instruction": "Make it plural.", "input": "cat"})


def test_the_tokenizers_own_template_can_be_trained_with():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    with pytest.raises(UserError, match=r"the tokenizer .* has no chat template of its own; give alpaca"):
        load_template("tokenizer", tokenizer)
    tokenizer.chat_template = load_template("phi3").chat_template
    assert load_template("tokenizer", tokenizer).prompts([WITH_INPUT, WITHOUT]) == load_template("phi3").prompts(
        [WITH_INPUT, WITHOUT]
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}: {% endfor %}<think>"
    with pytest.raises(
        UserError, match=r"template of the tokenizer .*: a whole conversation must begin with the prompt"
    ):
        load_template("tokenizer", tokenizer)


def test_an_unknown_template_names_those_there_are():
    with pytest.raises(UserError, match=r"unknown template 'alpacca': give one of alpaca, chatml, phi3, tokenizer"):
        load_template("alpacca")


BEGINNING = {name: KINDS[name] for name in ("Llama 3", "Phi 3", "Llama 2", "Llama 2, legacy")}


@pytest.mark.parametrize("kind", BEGINNING)
@pytest.mark.parametrize("name", ["alpaca", "phi3"])
def test_a_tokenizer_that_begins_with_its_token_gets_it_once_also_from_the_saved_template(kind, name, tmp_path):
    tokenizer = BEGINNING[kind]()
    template = load_template(name, tokenizer)
    without = load_template(name)
    assert template.prompts([WITH_INPUT, WITHOUT]) == [f"<s>{text}" for text in without.prompts([WITH_INPUT, WITHOUT])]
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config)
    prepare_for_chat(model, tokenizer, without)  # whichever of the two is given
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)

    (tmp_path / "a.json").write_text(json.dumps([WITH_INPUT, WITHOUT]))
    for source in (name, str(tmp_path / "chat_template.jinja")):  # the saved one is loaded again by an evaluation
        data = DataArguments(data=str(tmp_path / "a.json"), template=source, validation_ratio=0, test_ratio=0)
        for row, record in zip(load_splits(data, tokenizer)["train"], [WITH_INPUT, WITHOUT], strict=True):
            prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
            assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id
            options = {"tokenize": True, "return_dict": False, "add_generation_prompt": True}
            assert saved.apply_chat_template(to_messages(record), **options) == prompt
            assert prompt_ids(load_template(source), saved, [record]) == [prompt]
    chat = pipeline("text-generation", model=str(tmp_path), tokenizer=saved, device="cpu")
    assert (
        chat.preprocess(Chat(to_messages(WITH_INPUT)))["input_ids"][0].tolist()
        == prompt_ids(without, saved, [WITH_INPUT])[0]
    )


@pytest.mark.parametrize(
    "begin", ["{{ bos_token }}", "{{- bos_token -}}", "\n{{ bos_token }}", "{% if true %}{{ bos_token }}{% endif %}"]
)
def test_a_template_that_has_the_token_already_gets_no_second(begin, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(begin + BARE)
    assert load_template(str(path), byte_level(begins=True)).prompt(WITH_INPUT).count("<s>") == 1


@pytest.mark.parametrize(
    "begin", ["", "\n", "  ", "  {% if true %}", "\n  {%- if true %}", "{#- a remark #}\n", "  {# a #}x"]
)
def test_the_token_in_front_changes_nothing_else(begin, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(begin + BARE + ("{% endif %}" if "{%" in begin else ""))
    expected = load_template(str(path)).prompt(WITH_INPUT)
    assert load_template(str(path), byte_level()).prompt(WITH_INPUT) == expected
    begun = load_template(str(path), byte_level(begins=True))
    assert begun.prompt(WITH_INPUT) == f"<s>{expected}"
    assert begun.for_tokenizer(byte_level()).prompt(WITH_INPUT) == expected


def test_a_tokenizer_that_ends_each_text_does_not_end_a_prompt():
    tokenizer = unigram()
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    [ids] = prompt_ids(load_template("phi3"), tokenizer, [WITHOUT])
    assert tokenizer.eos_token_id not in ids and tokenizer.bos_token_id not in ids


@pytest.mark.parametrize(
    "content", [f"\ufeffQ\n{BARE}".encode(), f"\ufeffQ\r\n{BARE}".encode(), f"Q\r\n{BARE}".encode()]
)
def test_what_a_windows_editor_adds_is_in_no_prompt(content, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_bytes(content)
    assert load_template(str(path)).prompt(WITH_INPUT) == "Q\nMake it plural.catA: "


@pytest.mark.parametrize("content", [BARE.encode("utf-16"), b"\xff" + BARE.encode(), "é".encode("latin-1")])
def test_a_template_in_another_encoding_is_refused_in_words(content, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"own\.jinja: it is not UTF-8 text .*; save it as UTF-8"):
        load_template(str(path))
