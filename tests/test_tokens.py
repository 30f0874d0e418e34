"""Text of a record stays text, for tokenizers of every kind, beside answers put together by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizer_kinds import KINDS, byte_level, unigram, word_level
from tokenizers import pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from recipe import tokens
from recipe.config import DataArguments, UserError
from recipe.data import load_splits
from recipe.data.special_text import count_special_text, find_special_text, special_text_note
from recipe.data.split import load_records
from recipe.templates import load_template
from recipe.tokens import prompt_ids, response_ids, without_end

SPELLING = [
    {"instruction": "It is </s> in GPT-2.", "input": "", "output": "No: <s> or </s>, it says."},
    {"instruction": "</s><|user|>\n", "input": " a<|assistant|>\nb </s>", "output": "<|user|> is a marker"},
    {"instruction": "<|assis</s>tant|>", "input": "<unk>", "output": "<unk> is not known"},
]
ORDINARY = [
    {"instruction": "Name the colour of the sky.", "input": "", "output": "Blue, please!"},
    {"instruction": " a cat\t\n", "input": "user and < s >", "output": "\n\ncolour  of"},
]


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request) -> PreTrainedTokenizerBase:
    return KINDS[request.param]()


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, first: bool = False) -> list[int]:
    """A piece of text by the tokenizer's own call, `first` in its prompt or after a marker."""
    backend = tokenizer.backend_tokenizer
    own = backend.pre_tokenizer
    if isinstance(own, pre_tokenizers.Metaspace) and not first:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    try:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    finally:
        backend.pre_tokenizer = own or backend.pre_tokenizer


def prompt_by_hand(tokenizer: PreTrainedTokenizerBase, record: dict[str, str], begins: bool) -> list[int]:
    """The prompt of phi3, piece by piece: markers by their ids, and what stands between them as text."""
    text = f"\n{record['instruction']}\n" + (f"{record['input']}\n" if record["input"] else "")
    end = "\n"
    if tokenizer.added_tokens_decoder[tokenizer.convert_tokens_to_ids("<|user|>")].rstrip:
        text, end = text.strip(), ""
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    begin = [tokenizer.bos_token_id] if begins else []
    return [*begin, user, *text_ids(tokenizer, text), assistant, *(text_ids(tokenizer, end) if end else [])]


def test_text_is_text_and_markers_are_markers(tokenizer):
    template, begins = load_template("phi3"), tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    records = [SPELLING[0], ORDINARY[0], *SPELLING[1:], ORDINARY[1]]
    assert prompt_ids(template, tokenizer, records) == [prompt_by_hand(tokenizer, each, begins) for each in records]
    outputs = [record["output"] for record in records]
    expected = [[*text_ids(tokenizer, text, first=True), tokenizer.eos_token_id] for text in outputs]
    assert response_ids(tokenizer, outputs) == expected


def test_ordinary_records_have_the_usual_tokens_on_either_way(tokenizer, monkeypatch):
    template = load_template("phi3", tokenizer)
    usual = tokenizer(template.prompts(ORDINARY), add_special_tokens=False)["input_ids"]
    outputs = [record["output"] for record in ORDINARY]
    ends = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(outputs, add_special_tokens=False)["input_ids"]]
    for _ in range(2):
        assert prompt_ids(template, tokenizer, ORDINARY) == usual
        assert response_ids(tokenizer, outputs) == ends
        monkeypatch.setattr(tokens, "_which_spell", lambda texts, *_: range(len(texts)))  # now by the copy


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_training_generation_and_likelihood_have_the_same_tokens(tokenizer, tmp_path, mask_prompt, overflow):
    long = {"instruction": "It is </s>. " * 30, "input": "", "output": "Yes </s>. " * 30 + "End"}
    records = [*SPELLING, *ORDINARY, long]
    (tmp_path / "a.json").write_text(json.dumps(records))
    config = DataArguments(
        data=str(tmp_path / "a.json"), template="phi3", max_length=160, overflow=overflow, mask_prompt=mask_prompt,
        validation_ratio=0, test_ratio=0,
    )  # fmt: skip
    rows = load_splits(config, tokenizer)["train"]
    prompts = prompt_ids(load_template("phi3"), tokenizer, records)
    responses = response_ids(tokenizer, [record["output"] for record in records])
    assert rows["row"][:] == [0, 1, 2, 3, 4, 5][: len(rows)] and len(rows) == (6 if overflow == "truncate" else 5)
    for row, prompt, response in zip(rows, prompts, responses, strict=False):
        assert row["truncated"] == (len(prompt) + len(response) > 160)
        if not row["truncated"]:
            assert row["input_ids"] == prompt + response
            assert row["labels"] == ([-100] * len(prompt) if mask_prompt else prompt) + response
            assert response.count(tokenizer.eos_token_id) == 1
        else:  # begins and ends as the whole prompt does, and has lost its end of text
            length = next(n for n in range(160) if row["input_ids"][n:] == response[: 160 - n])
            cut = row["input_ids"][:length]
            assert cut[:3] == prompt[:3] and prompt[-1] in cut[-1:] and tokenizer.eos_token_id not in row["input_ids"]


@pytest.mark.parametrize("make", [word_level, unigram])
def test_a_spelling_that_is_a_word_of_the_vocabulary_is_refused_by_row(make, tmp_path):
    tokenizer = make()
    records = [ORDINARY[0], {"instruction": "Say </s> twice.", "input": "", "output": "No."}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    config = DataArguments(data=str(tmp_path / "a.json"), template="phi3", validation_ratio=0, test_ratio=0)
    with pytest.raises(UserError, match=r"a\.json row 1: this tokenizer cannot read '</s>' as text"):
        load_splits(config, tokenizer)
    with pytest.raises(UserError, match="row 1: this tokenizer cannot read"):
        response_ids(tokenizer, ["Fine.", "a </s> b"])
    assert len(response_ids(tokenizer, ["a cat </s>"])[0]) > 1  # its own end is no text


def test_a_tokenizer_written_in_python():
    tokenizer = ByT5Tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>"]})
    as_bytes = lambda text: [byte + 3 for byte in text.encode()]  # noqa: E731  # three special tokens come first
    [ids] = prompt_ids(load_template("phi3"), tokenizer, SPELLING[:1])
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert ids == [user, *as_bytes("\nIt is </s> in GPT-2.\n"), assistant, *as_bytes("\n")]
    assert response_ids(tokenizer, ["a </s> b</s>"]) == [[*as_bytes("a </s> b"), tokenizer.eos_token_id]]


def test_private_characters_of_a_record_stay_its_own():
    tokenizer = byte_level()
    record = {"instruction": "\ue000\ue0000;\ue000 </s> \ue001", "input": "", "output": "x"}
    [ids] = prompt_ids(load_template("phi3"), tokenizer, [record])
    assert ids == prompt_by_hand(tokenizer, record, begins=False)


def test_an_end_token_that_is_not_flagged_as_special_is_text_in_a_record():
    """As after `tokenizer.add_tokens("<|im_end|>")` and `tokenizer.eos_token = "<|im_end|>"`."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.eos_token = "<|im_end|>"
    [ids] = response_ids(tokenizer, ["a <|im_end|> b <|im_end|>"])
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert "".join(tokenizer.convert_ids_to_tokens(ids[:-1])) == "aĠ<|im_end|>ĠbĠ"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("cats</s>", "cats"), ("cats </s>\n\n", "cats "), ("cats</s></s> </s>\n", "cats"), ("</s> cats", "</s> cats"),
        ("a</s>b</s>", "a</s>b"), ("cats\n", "cats\n"), ("</s>", ""), (" </s>\n", ""),
    ],
)  # fmt: skip
def test_the_end_that_a_response_brings(response, expected):
    assert without_end(response, "</s>") == expected


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_an_end_of_text_that_the_data_brings_is_learned_once(suffix, tmp_path, gpt2_tokenizer):
    import pandas

    end = gpt2_tokenizer.eos_token
    outputs = ["cats", f"cats{end}", f"cats{end}\n", f"a {end} b{end}", f"a {end} b"]
    frame = pandas.DataFrame([{"instruction": f"Say {n}.", "input": "", "output": o} for n, o in enumerate(outputs)])
    path = tmp_path / f"a{suffix}"
    writers = {".json": lambda: frame.to_json(path, orient="records"), ".csv": lambda: frame.to_csv(path, index=False)}
    writers.get(suffix, lambda: frame.to_parquet(path))()
    config = DataArguments(data=str(path), validation_ratio=0, test_ratio=0)
    responses = [[t for t in row["labels"] if t != -100] for row in load_splits(config, gpt2_tokenizer)["train"]]
    cats = [*gpt2_tokenizer("cats")["input_ids"], gpt2_tokenizer.eos_token_id]
    text = [*gpt2_tokenizer("a <|endoftext|> b", split_special_tokens=True)["input_ids"], gpt2_tokenizer.eos_token_id]
    assert responses == [cats, cats, cats, text, text]
    found = find_special_text(load_records(config)[0], gpt2_tokenizer)
    assert found == {"special_token_text": {"train": [3, 4]}, "own_end_of_text": {"train": [1, 2, 3]}}
    assert count_special_text(found) == {"special_token_text": 2, "own_end_of_text": 3}
    assert special_text_note(found, gpt2_tokenizer) == (
        "2 records spell a special token in their text, which stays text; 3 records end their response with "
        "<|endoftext|>, which is learned once"
    )


def test_a_response_that_is_only_an_end_is_refused(tmp_path, gpt2_tokenizer):
    path = Path(tmp_path / "a.json")
    path.write_text(json.dumps([*ORDINARY, {"instruction": "x", "input": "", "output": " <|endoftext|>\n"}]))
    config = DataArguments(data=str(path), validation_ratio=0, test_ratio=0)
    with pytest.raises(UserError, match=r"a\.json row 2: 'output' is nothing but '<\|endoftext\|>'"):
        load_splits(config, gpt2_tokenizer)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }}{{ m.input }}{% endfor %}",
        "{% for m in messages %}<{{ m.content }}{{ m.input }}s>{% endfor %}",
        "{% for m in messages %}</s>{{ m.content }}{% if m.input %}{{ m.input | trim }}<|user|>{% endif %}{% endfor %}",
    ],
)
def test_a_special_token_that_begins_in_one_field_and_ends_beside_it_is_text(source):
    tokenizer = byte_level()
    template = replace(load_template("phi3", tokenizer), chat_template=source)
    special = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])}
    marks = [[index for index in ids if index in special] for ids in prompt_ids(template, tokenizer, ORDINARY)]
    for first, second in (
        ("Say </", "s> now."),
        ("<|us", "er|>"),
        ("</s", ">"),
        ("x /", ""),
        ("</s>", "</s>"),
        ("", "/"),
    ):
        record = {"instruction": first, "input": second, "output": "x"}
        [ids] = prompt_ids(template, tokenizer, [record])
        plain = replace(template, chat_template=source.replace("</s>", "").replace("<|user|>", "")).prompt(record)
        assert [index for index in ids if index in special] == marks[bool(second)]
        text = "".join(tokenizer.convert_ids_to_tokens([index for index in ids if index not in special]))
        assert text.replace("Ġ", " ") == plain
        assert prompt_ids(template, tokenizer, [*ORDINARY, record])[-1] == ids
