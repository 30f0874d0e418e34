"""Each model is asked as it was made to be asked: its own template, its begin of text, its end tokens, its tags.

The expected answers are transformers' own: `apply_chat_template` of the content, and `generate` as the folder says.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recipe.config import UserError
from recipe.templates import saved_template
from recipe.tokens import prompt_ids

RECORDS = [
    {"instruction": "Make it plural.", "input": "cat", "output": "cats"},
    {"instruction": "Name a colour of the sky.", "input": "", "output": "Blue."},
    {"instruction": "Translate the word.", "input": "le chien\nnoir", "output": "the black dog"},
]
# as these families write their turns: markers, system messages and begin of text are the point
FAMILIES = {
    "ChatML": (
        ["<|im_start|>", "<|im_end|>"],
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "ChatML with a system message": (
        ["<|im_start|>", "<|im_end|>"],
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "Llama 3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "Llama 2": (
        ["<s>", "</s>"],
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    ),
    "Mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    ),
    "Gemma": (
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    "Phi 3": (
        ["<|user|>", "<|assistant|>", "<|end|>"],
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    ),
    "Zephyr": (
        [],
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    ),
    "one that thinks": (
        ["<|im_start|>", "<|im_end|>"],
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    ),
}
BEGINS = ("Llama 3", "Llama 2", "Mistral", "Gemma")  # their tokenizers, too, begin a text with this token


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "few.json"
    path.write_text(json.dumps(RECORDS), encoding="utf-8")
    return json.dumps({"test": str(path)})


def make_folder(path: Path, family: str | None, seed: int = 0, **changes) -> Path:
    """A model with random weights that answers differently to each prompt; `changes` are of its generation_config."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    special, template = FAMILIES[family] if family else ([], None)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, "<answer>", "</answer>"]})
    if family in BEGINS:
        tokenizer.bos_token = special[0]
        post = TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = post
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**{"eos_token_id": tokenizer.eos_token_id} | changes)
    model.save_pretrained(path)
    return path


def content(record: dict) -> str:
    return record["instruction"] + (f"\n\n### Input:\n{record['input']}" if record["input"] else "")


def asked_by_transformers(folder: Path, record: dict, template: str | None = None) -> tuple[list[int], list[int]]:
    """The prompt's tokens by `apply_chat_template`, and the tokens of `generate` with the folder's own settings."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    message = {"role": "user", "content": content(record)}
    prompt = tokenizer.apply_chat_template(
        [message], chat_template=template, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return prompt["input_ids"][0].tolist(), output[0, prompt["input_ids"].shape[1] :].tolist()


def text_of(folder: Path, tokens: list[int]) -> str:
    """A response without begin and end of text, but with any other special token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.decode([t for t in tokens if t not in {tokenizer.bos_token_id, tokenizer.eos_token_id}])


def answers_of(output_dir: Path, label: str = "tuned") -> list[dict]:
    lines = (output_dir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[label] for line in lines]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_asked_in_its_own_template_and_stops_where_generate_stops(family, evaluate, data, tmp_path):
    folder = make_folder(tmp_path / "model", family)
    # what the model says in its answers is now an end of its turn: transformers stops there
    tokens = [asked_by_transformers(folder, record)[1] for record in RECORDS]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = [tokenizer.eos_token_id, tokens[0][5], tokens[1][9]]
    make_folder(folder, family, eos_token_id=ends)
    evaluate("--model", folder, "--data", data, "--output_dir", tmp_path / "out", "--max_new_tokens", 24)
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["models"]["tuned"]["template_name"] == "its own template"
    answers = answers_of(tmp_path / "out")
    for answer, record in zip(answers, RECORDS, strict=True):
        prompt, expected = asked_by_transformers(folder, record)
        assert prompt.count(tokenizer.bos_token_id) == (family in BEGINS) or tokenizer.bos_token_id == ends[0]
        stopped = expected[-1] in ends
        kept = expected[:-1] if stopped else expected
        assert answer["tokens"] == len(kept) and answer["stop_reason"] == ("eos" if stopped else "length")
        text = text_of(folder, kept)
        assert answer["text"] + (answer.get("reasoning") or "") == text or answer.get("reasoning") in text
    assert sum(answer["stop_reason"] == "eos" for answer in answers) >= 2
    if family == "one that thinks":  # its prompt opens the reasoning, and no answer closes it
        assert all(answer["text"] == "" and answer["reasoning"] for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_those_of_apply_chat_template(family, tmp_path):
    folder = make_folder(tmp_path / "model", family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = saved_template(tokenizer)
    for record, ours in zip(RECORDS, prompt_ids(template, tokenizer, RECORDS), strict=True):
        [message] = template.messages(record)
        theirs = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
        assert ours == theirs and message["content"] == content(record)


def test_the_default_of_several_templates_is_the_one(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_folder(tmp_path / "model", "ChatML"))
    own = tokenizer.chat_template
    tokenizer.chat_template = {"tool_use": "{{ raise_exception('no tools') }}", "default": own}
    assert saved_template(tokenizer).chat_template == own
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(UserError, match="template of model 'x': the prompt loses the record's instruction"):
        saved_template(tokenizer, "model 'x'")
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    with pytest.raises(UserError, match="template of model 'x': only tools"):
        saved_template(tokenizer, "model 'x'")


def test_a_template_inside_the_tokenizers_config_is_used(evaluate, data, tmp_path):
    folder = make_folder(tmp_path / "model", "Phi 3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    assert not (folder / "chat_template.jinja").exists()
    evaluate("--model", folder, "--data", data, "--output_dir", tmp_path / "out", "--max_new_tokens", 8)
    for answer, record in zip(answers_of(tmp_path / "out"), RECORDS, strict=True):
        assert answer["text"] == tokenizer.decode(asked_by_transformers(folder, record)[1][:8])


def test_each_of_several_models_is_asked_in_its_own_template(evaluate, data, tmp_path):
    first, second = make_folder(tmp_path / "first", "ChatML"), make_folder(tmp_path / "second", "Gemma", seed=1)
    plain, instruct = make_folder(tmp_path / "plain", None, seed=2), make_folder(tmp_path / "instruct", "Mistral")
    flags = ("--data", data, "--max_new_tokens", 24, "--output_dir")
    evaluate("--model", first, second, "--baseline", plain, *flags, tmp_path / "one")
    evaluate("--model", second, first, "--baseline", instruct, *flags, tmp_path / "other")
    evaluate("--model", first, second, "--baseline", instruct, *flags, tmp_path / "given", "--template", "phi3")

    def texts(out: str, label: str) -> list[str]:
        return [answer["text"] for answer in answers_of(tmp_path / out, label)]

    def alone(folder: Path, template: str | None = None) -> list[str]:
        return [text_of(folder, asked_by_transformers(folder, record, template)[1]) for record in RECORDS]

    assert texts("one", "tuned") == texts("other", "first") == alone(first)
    assert texts("one", "second") == texts("other", "tuned") == alone(second)
    assert texts("one", "baseline") == alone(plain, FAMILIES["ChatML"][1]) != alone(plain, FAMILIES["Gemma"][1])
    assert texts("other", "baseline") == alone(instruct)
    assert texts("given", "tuned") != texts("one", "tuned")
    models = {out: json.loads((tmp_path / out / "evaluation.json").read_text())["models"] for out in ("one", "given")}
    names = {label: model["template_name"] for label, model in models["one"].items()}
    assert names == {"baseline": "the tuned model's template", **dict.fromkeys(("tuned", "second"), "its own template")}
    assert models["one"]["second"]["template"] == FAMILIES["Gemma"][1]
    assert {model["template_name"] for model in models["given"].values()} == {"the template phi3"}
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert "asked in the tuned model&#39;s template" in page and page.count("asked in its own template") == 2
    with pytest.raises(UserError, match="another model 'baseline', template of 'baseline', template of 'tuned'"):
        evaluate("--model", first, second, "--baseline", instruct, *flags, tmp_path / "one", "--template", "phi3")


def test_stop_strings_of_the_folder_end_an_answer(evaluate, data, tmp_path):
    folder = make_folder(tmp_path / "model", "ChatML")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(asked_by_transformers(folder, record)[1]) for record in RECORDS]
    stops = [texts[0][8:12], texts[1][20:23]]
    make_folder(folder, "ChatML", stop_strings=stops)
    evaluate("--model", folder, "--data", data, "--output_dir", tmp_path / "out", "--max_new_tokens", 24)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = 0
    for answer, record, text in zip(answers_of(tmp_path / "out"), RECORDS, texts, strict=True):
        prompt = torch.tensor([asked_by_transformers(make_folder(tmp_path / "no stops", "ChatML"), record)[0]])
        output = model.generate(prompt, tokenizer=tokenizer, max_new_tokens=24, do_sample=False)
        assert answer["tokens"] == output.shape[1] - prompt.shape[1]
        first = min((text.find(stop) for stop in stops if stop in text), default=len(text))
        assert answer["text"] == text[:first]
        found += answer["stop_reason"] == "eos"
    assert found >= 2


def overfit(folder: Path, outputs: list[str]) -> None:
    """Teach a model these responses to the records, by plain PyTorch."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = []
    for record, output in zip(RECORDS, outputs, strict=True):
        prompt = asked_by_transformers(folder, record)[0]
        rows.append((prompt, [*tokenizer.encode(output, add_special_tokens=False), tokenizer.eos_token_id]))
    for _ in range(60):
        losses = []
        for prompt, response in rows:
            labels = torch.tensor([[-100] * len(prompt) + response])
            losses.append(model(torch.tensor([prompt + response]), labels=labels).loss)
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.mark.parametrize("before", ["", "<thinking>A cat?\nTwo.</thinking>\n\n", "Let me see.</think>"])
def test_tags_of_an_answer_stay_and_its_reasoning_is_kept_apart(before, evaluate, tmp_path):
    """With tags that are special tokens of the tokenizer."""
    folder = make_folder(tmp_path / "model", "ChatML")
    records = [{**record, "output": f"<answer>{record['output']}</answer>"} for record in RECORDS]
    overfit(folder, [before + record["output"] for record in records])
    (tmp_path / "few.json").write_text(json.dumps(records), encoding="utf-8")
    data = json.dumps({"test": str(tmp_path / "few.json")})
    evaluate("--model", folder, "--data", data, "--output_dir", tmp_path / "out", "--max_new_tokens", 32)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["metrics"]["exact_match"]["tuned"] == 1 and metrics["behaviour"]["stop_rate"]["tuned"] == 1
    for answer, record in zip(answers_of(tmp_path / "out"), records, strict=True):
        assert answer["text"] == record["output"]
        assert bool(answer.get("reasoning")) == bool(before) and (answer.get("reasoning") or "") in before
