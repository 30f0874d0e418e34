"""Reference losses against Hugging Face's own loss and against the trainer's evaluation."""

import math

import pytest
import torch
from conftest import DEMO
from tokenizer_kinds import byte_level
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import DataArguments, InstructionTrainingArguments
from recipe.data import encode_records, load_records
from recipe.evaluation.ask import as_answer
from recipe.evaluation.comparison import is_not_a_number
from recipe.evaluation.likelihood import reference_losses, tokenizer_hash
from recipe.evaluation.metrics import BitsPerByte, Perplexity, ReferenceLoss
from recipe.generation import Response, generate_responses
from recipe.templates import load_template
from recipe.tokens import prompt_ids
from recipe.trainer import InstructionTrainer


@pytest.fixture(scope="module")
def data() -> DataArguments:
    return DataArguments(data={"train": str(DEMO / "records" / "validation.jsonl")}, test_ratio=0, validation_ratio=0)


@pytest.fixture(scope="module")
def pairs(data, demo_tokenizer) -> tuple[list[str], list[str]]:
    records = load_records(data)[0]["train"]
    return load_template(data.template, demo_tokenizer).prompts(records), records["output"]


def first(pairs, count: int) -> tuple[list[str], list[str]]:
    return pairs[0][:count], pairs[1][:count]


def columns(losses: list) -> dict[str, list]:
    return {"loss_sums": [nats for nats, _ in losses], "token_counts": [targets for _, targets in losses]}


@torch.no_grad()
def loss_by_hugging_face(model, tokenizer, prompt: str, reference: str) -> tuple[float, int]:
    prompt_ids = tokenizer(prompt)["input_ids"]
    response_ids = [*tokenizer(reference)["input_ids"], tokenizer.eos_token_id]
    loss = model(
        input_ids=torch.tensor([prompt_ids + response_ids]),
        labels=torch.tensor([[-100] * len(prompt_ids) + response_ids]),
    ).loss
    return loss.item() * len(response_ids), len(response_ids)


def test_losses_are_those_of_hugging_face_one_by_one(demo_model, demo_tokenizer, pairs):
    prompts, references = first(pairs, 24)
    references[3] = ""  # nothing but the end-of-text token
    found = reference_losses(demo_model, demo_tokenizer, prompts, references, batch_size=7)
    demo_model.eval()
    expected = [
        loss_by_hugging_face(demo_model, demo_tokenizer, prompt, reference)
        for prompt, reference in zip(prompts, references, strict=True)
    ]
    assert [targets for _, targets in found] == [targets for _, targets in expected]
    assert found[3][1] == 1
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    total, count = sum(nats for nats, _ in expected), sum(targets for _, targets in expected)
    assert ReferenceLoss().compute(**columns(found))["reference_loss"] == pytest.approx(total / count, rel=1e-6)
    perplexity = torch.tensor(total / count).exp().item()
    assert Perplexity().compute(**columns(found))["perplexity"] == pytest.approx(perplexity, rel=1e-5)


def test_total_is_the_trainers_eval_loss(demo_model, demo_tokenizer, data, pairs, tmp_path):
    rows = encode_records(load_records(data)[0], demo_tokenizer, data)["train"]
    args = InstructionTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=16, disable_tqdm=True, report_to="none"
    )
    trainer = InstructionTrainer(
        demo_model,
        args,
        data_collator=DataCollatorForInstructionTuning(demo_tokenizer.eos_token_id),
        eval_dataset=rows,
        processing_class=demo_tokenizer,
    )
    result = trainer.evaluate()
    found = columns(reference_losses(demo_model, demo_tokenizer, *pairs))
    assert len(rows) == len(found["loss_sums"])
    assert sum(found["token_counts"]) == sum(sum(label != -100 for label in row["labels"]) for row in rows)
    assert ReferenceLoss().compute(**found)["reference_loss"] == pytest.approx(result["eval_loss"], rel=1e-6)
    assert Perplexity().compute(**found)["perplexity"] == pytest.approx(result["eval_perplexity"], rel=1e-5)


def test_batch_size_does_not_matter(demo_model, demo_tokenizer, pairs):
    results = [reference_losses(demo_model, demo_tokenizer, *first(pairs, 20), batch_size=size) for size in (1, 6, 64)]
    for result in results[1:]:
        for (nats, targets), (expected, count) in zip(result, results[0], strict=True):
            assert nats == pytest.approx(expected, rel=1e-5) and targets == count


def test_padding_side_does_not_matter(demo_model, demo_tokenizer, pairs):
    """The same batch by hand, padded on the left with positions that start at each row's first token."""
    prompts, references = first(pairs, 8)
    found = reference_losses(demo_model, demo_tokenizer, prompts, references, batch_size=8)
    encoded = [
        (demo_tokenizer(p)["input_ids"], [*demo_tokenizer(r)["input_ids"], demo_tokenizer.eos_token_id])
        for p, r in zip(prompts, references, strict=True)
    ]
    width = max(len(p) + len(r) for p, r in encoded)
    ids = torch.tensor([[0] * (width - len(p) - len(r)) + p + r for p, r in encoded])
    mask = torch.tensor([[0] * (width - len(p) - len(r)) + [1] * (len(p) + len(r)) for p, r in encoded])
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = demo_model.eval()(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, ((_, response), (nats, targets)) in enumerate(zip(encoded, found, strict=True)):
        kept = logits[row, -len(response) - 1 : -1]
        expected = functional.cross_entropy(kept, torch.tensor(response), reduction="sum").item()
        assert nats == pytest.approx(expected, rel=1e-5) and targets == len(response)


def test_what_exceeds_the_context_is_none_and_the_others_stay(demo_model, demo_tokenizer, pairs):
    """256 positions: prompt and reference of 256 tokens fit, since nothing is predicted from the end-of-text token."""
    assert len(demo_tokenizer(" the" * 10)["input_ids"]) == 10
    prompt, reference = pairs[0][0], pairs[1][0]
    prompts = [" the" * 250, prompt, " the" * 250]
    references = [" the" * 6, reference, " the" * 7]
    fits, other, too_long = reference_losses(demo_model, demo_tokenizer, prompts, references)
    assert fits is not None and fits[1] == 7 and too_long is None
    assert other == pytest.approx(reference_losses(demo_model, demo_tokenizer, [prompt], [reference])[0], rel=1e-5)
    assert reference_losses(demo_model, demo_tokenizer, prompts[2:], references[2:]) == [None]


def test_a_loss_that_is_not_finite_is_told_from_one_that_does_not_fit(demo_model, demo_tokenizer, pairs):
    with torch.no_grad():
        demo_model.transformer.wpe.weight[60:] = float("nan")
    lengths = [
        len(demo_tokenizer(p)["input_ids"]) + len(demo_tokenizer(r)["input_ids"]) for p, r in zip(*pairs, strict=True)
    ]
    found = reference_losses(demo_model, demo_tokenizer, *pairs, batch_size=1)  # padding would take part in the NaN
    assert all(loss is not None and loss[1] > 0 for loss in found)
    broken = [math.isnan(nats) for nats, _ in found]
    assert broken == [length > 60 for length in lengths]
    assert 0 < sum(broken) < len(found)
    told = [as_answer(Response("", [], "eos", 0.0), loss) for loss in found]
    assert [is_not_a_number(answer) for answer in told] == broken
    assert not is_not_a_number(as_answer(Response("", [], "context", 0.0), None))


def test_half_precision_weights_still_give_float32_losses(demo_model, demo_tokenizer, pairs):
    exact = reference_losses(demo_model, demo_tokenizer, *first(pairs, 8))
    half = reference_losses(demo_model.bfloat16(), demo_tokenizer, *first(pairs, 8))
    sums = [sum(nats for nats, _ in losses) for losses in (exact, half)]
    assert sums[1] == pytest.approx(sums[0], rel=0.02)
    assert any(nats != torch.tensor(nats).bfloat16().item() for nats, _ in half)


def test_another_architecture_gives_the_loss_of_hugging_face(demo_tokenizer, pairs):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(demo_tokenizer), num_hidden_layers=2, hidden_size=32, intermediate_size=64,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts, references = first(pairs, 6)
    found = reference_losses(model, demo_tokenizer, prompts, references)
    for prompt, reference, loss in zip(prompts, references, found, strict=True):
        assert loss == pytest.approx(loss_by_hugging_face(model, demo_tokenizer, prompt, reference), rel=1e-5)


def test_the_model_is_left_as_it_was(demo_model, demo_tokenizer, pairs):
    demo_model.train()
    for dropout in (module for module in demo_model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.5
    one, other = (reference_losses(demo_model, demo_tokenizer, *first(pairs, 4)) for _ in range(2))
    assert one == other and demo_model.training
    assert reference_losses(demo_model, demo_tokenizer, [], []) == []
    with pytest.raises(ValueError):
        reference_losses(demo_model, demo_tokenizer, pairs[0][:2], pairs[1][:1])


@pytest.mark.parametrize("begins", [True, False])
def test_loss_of_records_with_special_token_text_is_the_sum_by_hand(begins):
    """Prompt and reference from pieces that the tokenizer reads as text, one end, and a BOS where it is the rule."""
    tokenizer = byte_level(begins=begins)
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=16, n_head=2, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config).eval()
    records = [
        {"instruction": "It is </s> in GPT-2.", "output": "Yes, <s> too.</s>"},
        {"instruction": "Name the colour.", "output": "Blue"},
    ]
    prompts = prompt_ids(load_template("phi3"), tokenizer, records)
    found = reference_losses(model, tokenizer, prompts, [record["output"] for record in records])
    responses = generate_responses(model, tokenizer, prompts, max_new_tokens=3)
    user, assistant, eos = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "</s>"])

    def read(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    for record, loss, response in zip(records, found, responses, strict=True):
        begin = [tokenizer.bos_token_id] if begins else []
        prompt = [*begin, user, *read(f"\n{record['instruction']}\n"), assistant, *read("\n")]
        targets = [*read(record["output"].removesuffix("</s>")), eos]
        with torch.no_grad():
            steps = model(torch.tensor([prompt + targets])).logits[0].log_softmax(-1)
            greedy = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=eos)
        nats = -sum(steps[len(prompt) - 1 + n, target].item() for n, target in enumerate(targets))
        assert loss == pytest.approx((nats, len(targets)), rel=1e-5)
        assert greedy[0, len(prompt) :].tolist()[: len(response.token_ids)] == response.token_ids


# --- between tokenizers ---------------------------------------------------------------------------------------------


def test_bits_per_byte_are_the_log2_probabilities_per_byte_of_text(demo_model, demo_tokenizer, pairs):
    """The sum of -log2 of each target's probability, one by one, the end-of-text token's too; and the text's bytes."""
    prompts, references = first(pairs, 6)
    references[1], references[2] = "Größe: 3 µm", "水"
    found = reference_losses(demo_model, demo_tokenizer, prompts, references)
    bits = 0.0
    for prompt, reference in zip(prompts, references, strict=True):
        ids = demo_tokenizer(prompt)["input_ids"]
        for token in [*demo_tokenizer(reference)["input_ids"], demo_tokenizer.eos_token_id]:
            with torch.no_grad():
                probability = demo_model.eval()(torch.tensor([ids])).logits[0, -1].softmax(-1)[token]
            bits -= math.log2(probability)
            ids.append(token)
    expected = bits / sum(len(reference.encode("utf-8")) for reference in references)
    score = BitsPerByte().compute(loss_sums=[nats for nats, _ in found], references=references)
    assert score["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_reference_loss_and_bits_per_byte_are_lm_evals_on_the_same_requests(demo_model, demo_tokenizer, pairs):
    """lm-eval would score the reference without its end, and with the prompt's last newline: it gets the token ids."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.metrics import bits_per_byte
    from lm_eval.models.huggingface import HFLM

    prompts, references = first(pairs, 8)
    end = demo_tokenizer.eos_token_id
    model = HFLM(pretrained=demo_model.eval(), tokenizer=demo_tokenizer, batch_size=4, device="cpu")
    requests = [
        ((prompt, reference), demo_tokenizer(prompt)["input_ids"], [*demo_tokenizer(reference)["input_ids"], end])
        for prompt, reference in zip(prompts, references, strict=True)
    ]
    theirs = [log_likelihood for log_likelihood, _ in model._loglikelihood_tokens(requests, disable_tqdm=True)]
    found = reference_losses(demo_model, demo_tokenizer, prompts, references)
    assert [nats for nats, _ in found] == pytest.approx([-value for value in theirs], rel=1e-4)
    weighted = [(value, len(reference.encode())) for value, reference in zip(theirs, references, strict=True)]
    score = BitsPerByte().compute(loss_sums=[nats for nats, _ in found], references=references)
    assert score["bits_per_byte"] == pytest.approx(bits_per_byte(weighted), rel=1e-4)


def test_a_tokenizer_is_known_by_how_it_splits_text_and_not_by_its_special_tokens(demo_tokenizer, gpt2_tokenizer):
    again = AutoTokenizer.from_pretrained(DEMO / "base")
    assert tokenizer_hash(again) == tokenizer_hash(demo_tokenizer) != tokenizer_hash(gpt2_tokenizer)
    again.add_special_tokens({"pad_token": "<pad>"})
    again.padding_side, again.chat_template = "left", "{{ messages }}"
    assert tokenizer_hash(again) == tokenizer_hash(demo_tokenizer)
    again.add_tokens(["sheep"])
    assert again.tokenize("sheep") == ["sheep"] != demo_tokenizer.tokenize("sheep")
    assert tokenizer_hash(again) != tokenizer_hash(demo_tokenizer)


@torch.no_grad()
def nats_by_hand(model, prompt: list[int], response: list[int], ends: list[int]) -> float:
    """Each token of the response from the softmax of a row of its own, and the sum of the chances of its ends."""
    nats = 0.0
    for index, token in enumerate(response):
        chances = model(torch.tensor([prompt + response[:index]])).logits[0, -1].double().softmax(-1)
        nats -= chances[token].log().item()
    chances = model(torch.tensor([prompt + response])).logits[0, -1].double().softmax(-1)
    return nats - chances[ends].sum().log().item()


@pytest.mark.parametrize("further", [[], ["<|im_end|>"], ["<|im_end|>", "<|user|>"]])
def test_a_response_may_end_with_any_token_at_which_generation_stops(further):
    """A chat model whose turns end with another token than its tokenizer names is not charged for that."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|user|>"]})
    torch.manual_seed(1)
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=16, n_head=2, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config).eval()
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(further)]
    model.generation_config.eos_token_id = ends[::-1]  # its own need not be the first
    prompts, references = [tokenizer("Name it:")["input_ids"], tokenizer("And?")["input_ids"]], ["Blue", "A red one."]
    found = reference_losses(model, tokenizer, prompts, references)
    for prompt, reference, (nats, count) in zip(prompts, references, found, strict=True):
        response = tokenizer(reference, add_special_tokens=False)["input_ids"]
        assert nats == pytest.approx(nats_by_hand(model, prompt, response, ends), rel=1e-5)
        assert count == len(response) + 1


@pytest.mark.parametrize("learned", ["as tokens", "as text"])
def test_a_reference_with_tags_is_read_as_the_model_writes_them(learned):
    """Tags that are special tokens: one model writes these tokens, another one spells them out, as trained here."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    reference, prompt = "<answer>Blue.</answer>", tokenizer("Name it:")["input_ids"]
    ways = {
        "as tokens": tokenizer(reference, add_special_tokens=False)["input_ids"],
        "as text": tokenizer(reference, add_special_tokens=False, split_special_tokens=True)["input_ids"],
    }
    assert len(ways["as tokens"]) < len(ways["as text"])
    torch.manual_seed(2)
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=32, n_head=2, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config)
    row = torch.tensor([[*prompt, *ways[learned], tokenizer.eos_token_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        model(row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    [(nats, count), (_, plain)] = reference_losses(model, tokenizer, [prompt] * 2, [reference, "Blue."])
    assert nats == pytest.approx(nats_by_hand(model, prompt, ways[learned], [tokenizer.eos_token_id]), rel=1e-4)
    assert nats < 1 and count == len(ways[learned]) + 1 and plain == len(tokenizer("Blue.")["input_ids"]) + 1
