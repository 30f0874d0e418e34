"""The shared-prefix row against the padded batch: losses, gradients, and no example that sees another."""

import itertools

import numpy as np
import pytest
import torch
from conftest import DEMO
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from recipe import attention
from recipe.collator import (
    IGNORE_INDEX,
    DataCollatorForInstructionTuning,
    DataCollatorWithSharedPrefix,
    shared_prefixes,
)
from recipe.config import DataArguments, InstructionTrainingArguments, UserError
from recipe.data import load_splits
from recipe.generation import generate_responses
from recipe.trainer import InstructionTrainer
from recipe.training.collator_choice import make_collator

VOCABULARY = 97
ARCHITECTURES = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0},
    "llama": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 128},
}  # fmt: skip


def make_model(architecture: str, kind: str) -> PreTrainedModel:
    """The same weights for every kind of attention, with gradients large enough to compare."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, **ARCHITECTURES[architecture])
    implementation = attention.NAME if kind == "segments" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def random_features(generator: np.random.Generator, mask_prompt: bool) -> list[dict]:
    """Examples over a few random prefixes, long and short, some alone, some twice, some without a prefix."""
    prefixes = [generator.integers(0, VOCABULARY, size=n).tolist() for n in generator.integers(0, 40, size=3)]
    features = []
    for _ in range(generator.integers(1, 9)):
        prompt = prefixes[generator.integers(3)] + generator.integers(0, VOCABULARY, generator.integers(1, 20)).tolist()
        response = generator.integers(0, VOCABULARY, generator.integers(1, 30)).tolist()
        labels = [IGNORE_INDEX] * len(prompt) + response if mask_prompt else prompt + response
        features.append({"input_ids": prompt + response, "labels": labels})
    return features + features[: generator.integers(0, 2)]


def loss_and_gradients(model: PreTrainedModel, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """By the model's own forward and loss."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(reference, model, features, kind, pad_to_multiple_of=None) -> None:
    """The row gives `model` the loss and gradients that the padded batch gives `reference`."""
    expected_loss, expected = loss_and_gradients(reference, DataCollatorForInstructionTuning(0)(features))
    loss, gradients = loss_and_gradients(model, DataCollatorWithSharedPrefix(0, kind, pad_to_multiple_of)(features))
    assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("kind", ["mask", "segments"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_batches_give_the_losses_and_gradients_of_the_padded_batch(architecture, kind):
    reference, model = make_model(architecture, "padded"), make_model(architecture, kind)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        assert_same(reference, model, random_features(generator, mask_prompt=seed % 3 > 0), kind)


@pytest.mark.parametrize("kind", ["mask", "segments"])
def test_padding_to_a_multiple_changes_neither_losses_nor_gradients(kind):
    reference, model = make_model("llama", "padded"), make_model("llama", kind)
    collate = DataCollatorWithSharedPrefix(0, kind, pad_to_multiple_of=16)
    for seed in range(10):
        features = random_features(np.random.default_rng(seed), mask_prompt=seed % 2 > 0)
        batch = collate(features)
        assert batch["input_ids"].shape[1] % 16 == batch["labels"].shape[1] % 16 == 0
        assert_same(reference, model, features, kind, pad_to_multiple_of=16)


def test_padding_to_a_multiple_by_eye():
    features = [
        {"input_ids": [1, 2, 3, 4, 9], "labels": [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 4, 9], "row": 7},
        {"input_ids": [1, 2, 5, 9], "labels": [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 9], "row": 8},
    ]
    batch = DataCollatorWithSharedPrefix(0, pad_to_multiple_of=4)(features)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    assert batch["labels"].tolist() == [[4, 9, 9, IGNORE_INDEX]] and batch["logits_to_keep"].tolist() == [2, 3, 4, 0]
    assert batch["example"].tolist() == [0, 0, 1, 0] and batch["lengths"].tolist() == [4, 3]
    assert batch["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 1],
    ]
    segments = DataCollatorWithSharedPrefix(0, "segments", pad_to_multiple_of=4)(features)["segments"]
    assert segments == ((2, (2, 1)), (3, ()))


@pytest.mark.parametrize("kind", ["mask", "segments"])
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_real_records_give_the_losses_and_gradients_of_the_padded_batch(gpt2_tokenizer, real_data, kind, mask_prompt):
    data = DataArguments(data={"train": str(real_data)}, validation_ratio=0, test_ratio=0, mask_prompt=mask_prompt)
    rows = load_splits(data, gpt2_tokenizer)["train"].select_columns(["input_ids", "labels"])
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    models = []
    for implementation in ("sdpa", attention.NAME if kind == "segments" else "sdpa"):
        torch.manual_seed(0)
        models.append(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))
    for start in (0, 500):
        assert_same(*models, [rows[index] for index in range(start, start + 16)], kind)


def mixed_features(demo_tokenizer) -> list[dict]:
    """Records of two templates in one batch: two groups."""
    features = []
    for template in ("alpaca", "phi3"):
        data = DataArguments(data={"train": str(DEMO / "records" / "validation.jsonl")}, template=template)
        rows = load_splits(data, demo_tokenizer)["train"].select_columns(["input_ids", "labels"])
        features += [rows[index] for index in range(5)]
    return features[::2] + features[1::2]


@pytest.mark.parametrize("kind", ["mask", "segments"])
def test_templates_mixed_in_a_batch_form_groups(demo_tokenizer, kind):
    features = mixed_features(demo_tokenizer)
    batch = DataCollatorWithSharedPrefix(0, "segments")(features)
    assert sum(prefix > 0 for prefix, _ in batch["segments"]) >= 2
    models = [
        AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32, attn_implementation=implementation)
        for implementation in ("sdpa", attention.NAME if kind == "segments" else "sdpa")
    ]
    assert_same(*models, features, kind)


@pytest.mark.parametrize("kind", ["mask", "segments"])
def test_no_example_influences_another(kind):
    """Change one example's rest: the others' losses stay the same to the last bit."""
    model, collate = make_model("gpt2", kind), DataCollatorWithSharedPrefix(0, kind)
    prefix = list(range(10))
    features = [
        {"input_ids": prefix + rest, "labels": [IGNORE_INDEX] * 11 + rest[1:], "row": row}
        for row, rest in enumerate([[40, 41, 42], [50, 51, 52, 53, 54], [60, 61], [70, 71, 72, 73]])
    ]

    def losses(features: list[dict]) -> list[float]:
        batch = collate(features)
        rows, example = batch.pop("row"), batch.pop("example")
        batch.pop("lengths")
        with torch.no_grad():
            logits = model(**batch).logits[0]
        each = torch.nn.functional.cross_entropy(logits, batch["labels"][0], reduction="none")
        return {int(row): each[example == index].sum().item() for index, row in enumerate(rows)}

    before = losses(features)
    features[1] = {**features[1], "input_ids": [*prefix, 50, 9, 8, 7, 6]}
    after = losses(features)
    assert after[1] != before[1]
    assert {row: after[row] for row in (0, 2, 3)} == {row: before[row] for row in (0, 2, 3)}


def pairs(*rows: list[int]) -> list[np.ndarray]:
    return [np.array([row, row], dtype=np.int32).T for row in rows]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3]], {((0,), 0)}),
        ([[1, 2, 3], [1, 2, 4]], {((0, 1), 2)}),
        ([[1, 2, 3], [9, 2, 4]], {((0,), 0), ((1,), 0)}),
        ([[1, 2, 3], [1, 2, 3]], {((0, 1), 3)}),
        ([[1, 2], [1, 2, 3]], {((0, 1), 2)}),
        # one token shared by four saves 3; three tokens shared by two pairs save 6
        ([[1, 2, 3, 4], [1, 2, 3, 5], [1, 6, 7, 8], [1, 6, 7, 9]], {((0, 1), 3), ((2, 3), 3)}),
        # a third example with a short common run stays outside if the others lose more
        ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 9]], {((0, 1), 5), ((2,), 0)}),
    ],
)
def test_groups_make_the_row_shortest(rows, expected):
    groups = {(tuple(sorted(group.examples)), group.prefix) for group in shared_prefixes(pairs(*rows))}
    assert groups == expected


def test_groups_are_the_best_cut_into_runs():
    """Against every cut of the sorted rows, of small random batches."""

    def saved(part: list[list[int]]) -> int:
        common = 0
        while all(len(row) > common and row[common] == part[0][common] for row in part):
            common += 1
        return (len(part) - 1) * common

    generator = np.random.default_rng(0)
    for _ in range(60):
        rows = [generator.integers(0, 2, size=generator.integers(1, 6)).tolist() for _ in range(6)]
        ranked = sorted(rows)
        cuts = itertools.product([False, True], repeat=5)
        bounds = ([0, *(i for i, cut in enumerate(choice, start=1) if cut), 6] for choice in cuts)
        best = max(sum(saved(ranked[a:b]) for a, b in itertools.pairwise(bound)) for bound in bounds)
        groups = shared_prefixes(pairs(*rows))
        assert sorted(example for group in groups for example in group.examples) == list(range(6))
        assert sum((len(group.examples) - 1) * group.prefix for group in groups) == best


def test_the_prefix_ends_where_targets_differ():
    """With the prompt supervised, targets of a prefix are equal up to its last token, whose next token differs."""
    features = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [1, 2, 3, 5]}]
    batch = DataCollatorWithSharedPrefix(0, "segments")(features)
    assert batch["segments"] == ((2, (1, 1)),)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 3]]
    assert batch["labels"].tolist() == [[2, 3, 2, 3, 4, 5]]  # a prefix target once for each example
    assert batch["logits_to_keep"].tolist() == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["mask", "segments"])
@pytest.mark.parametrize("copies", [1, 3])
def test_one_example_and_copies_of_it(kind, copies):
    features = [{"input_ids": [5, 6, 7, 8], "labels": [IGNORE_INDEX, IGNORE_INDEX, 7, 8]}] * copies
    batch = DataCollatorWithSharedPrefix(0, kind)(features)
    assert batch["input_ids"].shape == (1, 3) and batch["labels"].shape == (1, 2 * copies)
    reference, model = make_model("gpt2", "padded"), make_model("gpt2", kind)
    with torch.inference_mode():
        model(**batch)
    assert_same(reference, model, features, kind)


def test_batches_without_targets_and_bad_arguments_are_refused():
    collate = DataCollatorWithSharedPrefix(0)
    with pytest.raises(ValueError, match="nothing to learn"):
        collate([{"input_ids": [1, 2], "labels": [IGNORE_INDEX, IGNORE_INDEX]}])
    with pytest.raises(ValueError, match="at least one feature"):
        collate([])
    with pytest.raises(ValueError, match="feature 1: 2 input_ids but 1 labels"):
        collate([{"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match="give 'mask' or 'segments'"):
        DataCollatorWithSharedPrefix(0, attention="flex")


def test_gradient_checkpointing_and_lora_change_nothing():
    peft = pytest.importorskip("peft", reason="make setup installs it")
    features = random_features(np.random.default_rng(1), mask_prompt=True)
    for kind in ("mask", "segments"):
        models = []
        for each in ("padded", kind):
            torch.manual_seed(1)
            lora = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
            models.append(peft.get_peft_model(make_model("gpt2", each), lora))
        batches = DataCollatorForInstructionTuning(0)(features), DataCollatorWithSharedPrefix(0, kind)(features)
        models[1].gradient_checkpointing_enable({"use_reentrant": False})
        models[1].train()
        results = []
        for model, batch in zip(models, batches, strict=True):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
        assert results[1][1].keys() == results[0][1].keys() and results[0][1]
        for name, gradient in results[0][1].items():
            assert (results[1][1][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_stock_trainer_trains_on_rows_with_a_mask(tmp_path):
    """Stock Trainer, stock SDPA model, our collator: the losses of the padded batches, accumulated as well."""
    generator = np.random.default_rng(3)
    features = [feature for _ in range(8) for feature in random_features(generator, mask_prompt=True)][:16]
    logged = {}
    for name, collate in (("padded", DataCollatorForInstructionTuning(0)), ("mask", DataCollatorWithSharedPrefix(0))):
        args = TrainingArguments(
            str(tmp_path / name), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            use_cpu=True, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        trainer = Trainer(make_model("gpt2", name), args, train_dataset=features, data_collator=collate)
        trainer.train()
        logged[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged["mask"]) == 4
    assert logged["mask"] == pytest.approx(logged["padded"], rel=1e-4)


def test_generation_with_the_registered_attention_equals_sdpa(demo_tokenizer):
    prompts = ["Below is an instruction.", "Below", "Write the plural of the word. " * 4]
    responses = []
    for name in ("sdpa", attention.NAME):
        model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32, attn_implementation=name)
        responses.append(generate_responses(model, demo_tokenizer, prompts, max_new_tokens=12, batch_size=3))
    assert responses[0] == responses[1]


def test_compiled_training_makes_few_graphs_and_the_losses_of_padded_batches(tmp_path):
    """Twelve batches of different lengths and an evaluation: one graph each for the first shape and for all others."""
    from torch._dynamo.utils import counters

    generator = np.random.default_rng(4)
    features = [feature for _ in range(12) for feature in random_features(generator, mask_prompt=True)][:48]
    rows = [{**feature, "row": row} for row, feature in enumerate(features)]
    collate = DataCollatorWithSharedPrefix(0, pad_to_multiple_of=32)
    shapes = {(len(b["input_ids"][0]), len(b["labels"][0])) for b in map(collate, np.array(rows).reshape(12, 4))}
    assert len(shapes) >= 6
    results = {}
    for compiled, collator in ((False, DataCollatorForInstructionTuning(0)), (True, collate)):
        torch._dynamo.reset()
        counters.clear()
        args = InstructionTrainingArguments(
            str(tmp_path / str(compiled)), max_steps=12, per_device_train_batch_size=4, torch_compile=compiled,
            per_device_eval_batch_size=3, eval_strategy="steps", eval_steps=12, train_sampling_strategy="sequential",
            remove_unused_columns=False, use_cpu=True, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        trainer = InstructionTrainer(
            make_model("gpt2", "mask"), args, train_dataset=rows, eval_dataset=rows[:20], data_collator=collator
        )
        trainer.train()
        logged = trainer.state.log_history
        results[compiled] = [log["loss"] for log in logged if "loss" in log] + [logged[-2]["eval_loss"]]
    assert 1 <= counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    assert len(results[True]) == 13 and results[True] == pytest.approx(results[False], rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "changes", "arguments", "message"),
    [
        ("mistral", {"sliding_window": 16}, {}, "MistralForCausalLM attends to a window of 16 tokens"),
        ("gemma3_text", {"head_dim": 12}, {}, "Gemma3ForCausalLM attends to a window of 4096 tokens"),
        ("trocr", {"decoder_layers": 1}, {}, "TrOCRForCausalLM does not take logits_to_keep and position_ids"),
        ("mamba", {"num_hidden_layers": 1}, {}, "MambaForCausalLM does not take position_ids"),
        ("bloom", {"n_layer": 1}, {}, "BloomForCausalLM does not take position_ids"),
        (
            "gpt_neo",
            {"hidden_size": 48, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]},
            {},
            "GPTNeoForCausalLM has no attention in which a mask",
        ),
        ("llama", {"attn_implementation": "eager"}, {}, "--attn_implementation eager does not take a boolean mask"),
        ("llama", {}, {"n_gpu": 2}, "a row cannot be cut into parts for 2 GPUs of one process"),
        ("llama", {}, {}, None),
    ],
)
def test_models_and_settings_that_a_row_does_not_fit_are_refused(architecture, changes, arguments, message, tmp_path):
    options = ARCHITECTURES["llama"] if architecture in ("llama", "mistral", "gemma3_text") else {}
    implementation = changes.pop("attn_implementation", None)
    config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, **options | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    data, training = DataArguments(batching="shared_prefix"), InstructionTrainingArguments(str(tmp_path))
    for name, value in arguments.items():
        setattr(training, f"_{name}", value)
    tokenizer = type("Tokenizer", (), {"eos_token_id": 0})
    if message is None:
        assert make_collator(data, training, model, tokenizer).attention == "mask"
    else:
        with pytest.raises(UserError, match=message):
            make_collator(data, training, model, tokenizer)
