"""The shared-prefix row against the padded batch: losses, gradients, and no example that sees another."""

import itertools

import numpy as np
import pytest
import torch
from conftest import DEMO
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from recipe import attention
from recipe.collator import (
    IGNORE_INDEX,
    DataCollatorForInstructionTuning,
    DataCollatorWithSharedPrefix,
    depth_first,
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
    "qwen2": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
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
    assert segments == ((0, 4), (2, 1), (0, 3))


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
    assert sum(shared == 0 for shared, _ in batch["segments"]) == 2 < len(batch["segments"])
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


# --- the tree -------------------------------------------------------------------------------------------------------


def grow(generator: np.random.Generator, depth: int, branching: int, before: list[int]) -> list[list[int]]:
    """The examples of a random tree: some end where others go on, and some runs are empty, so that examples repeat."""
    examples = [before] if before and generator.random() < 0.3 else []
    for _ in range(generator.integers(1, branching + 1)):
        ids = before + generator.integers(0, VOCABULARY, generator.integers(0, 9)).tolist()
        examples += grow(generator, depth - 1, branching, ids) if depth and len(ids) < 100 else [ids]
    return examples


@st.composite
def trees(draw) -> list[dict]:
    """Records of one or several examples each, in any order; targets anywhere, also in what is shared."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    examples = grow(generator, draw(st.integers(0, 4)), draw(st.integers(1, 3)), [])
    examples = [ids if ids else [1] for ids in examples[: draw(st.integers(1, 12))]]
    generator.shuffle(examples)
    share, features = draw(st.sampled_from([0.1, 0.5, 1.0])), []
    while examples:
        together, examples = examples[: (count := generator.integers(1, 4))], examples[count:]
        ids = [token for each in together for token in each]
        learned = generator.random(len(ids)) < share
        # some learn another token than the one that stands there: examples may share inputs but not targets
        targets = np.where(generator.random(len(ids)) < 0.1, generator.integers(0, VOCABULARY, len(ids)), ids)
        record = {"input_ids": ids, "labels": np.where(learned, targets, IGNORE_INDEX).tolist(), "row": len(features)}
        ends = np.cumsum([len(each) for each in together]).tolist()
        features.append(record | ({"ends": ends} if len(ends) > 1 or draw(st.booleans()) else {}))
    assume(any(label != IGNORE_INDEX for _, labels in one_by_one(features) for label in labels[1:]))
    return features


def one_by_one(features: list[dict]) -> list[tuple[list[int], list[int]]]:
    found = []
    for feature in features:
        for start, end in itertools.pairwise([0, *feature.get("ends", [len(feature["input_ids"])])]):
            found.append((feature["input_ids"][start:end], feature["labels"][start:end]))
    return found


def loop_over_examples(model: PreTrainedModel, features: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by the stock model, an example at a time, without any collator of ours."""
    model.zero_grad()
    examples = one_by_one(features)
    count = sum(label != IGNORE_INDEX for _, labels in examples for label in labels[1:])
    total = 0.0
    for ids, labels in examples:
        if len(ids) > 1:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum") / count
            loss.backward()
            total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


MODELS = {(architecture, kind): make_model(architecture, kind) for architecture in ARCHITECTURES
          for kind in ("padded", "mask", "segments")}  # fmt: skip


@pytest.mark.parametrize("kind", ["mask", "segments", "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(trees())
def test_random_trees_learn_what_single_examples_do(architecture, kind, features):
    reference, model = MODELS[architecture, "padded"], MODELS[architecture, kind]
    expected_loss, expected = loop_over_examples(reference, features)
    collate = DataCollatorForInstructionTuning(0) if kind == "padded" else DataCollatorWithSharedPrefix(0, kind)
    batch = collate(features)
    lengths, rows = batch.pop("lengths"), batch.pop("row")
    examples = one_by_one(features)
    assert lengths.tolist() == [len(ids) - 1 for ids, _ in examples]
    counts = [len(feature.get("ends", [0])) for feature in features]
    assert rows.tolist() == np.repeat(np.arange(len(features)), counts).tolist()
    assert batch.pop("examples", torch.ones(len(features))).tolist() == counts
    if kind != "padded":
        assert batch["input_ids"].numel() == len({tuple(ids[:n]) for ids, _ in examples for n in range(1, len(ids))})
        learned = [(index, label) for index, (_, labels) in enumerate(examples) for label in labels[1:]]
        targets = zip(batch.pop("example").tolist(), batch["labels"][0].tolist(), strict=True)
        assert [*targets] == [pair for pair in learned if pair[1] != IGNORE_INDEX]
    batch.pop("supervised", None)
    loss, gradients = loss_and_gradients(model, batch)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    rounding = 1e-7 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()  # where one is zero
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + rounding, name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(trees(), st.randoms(use_true_random=False))
def test_the_row_does_not_depend_on_the_order_of_records(features, random):
    collate = DataCollatorWithSharedPrefix(0, "segments")
    batch, again = collate(features), collate(features)
    shuffled = collate(random.sample(features, len(features)))
    for name in ("input_ids", "position_ids", "segments", "logits_to_keep", "labels"):
        assert str(again[name]) == str(batch[name])
    assert batch["segments"] == again["segments"]
    assert sorted(length for _, length in batch["segments"]) == sorted(length for _, length in shuffled["segments"])
    assert batch["input_ids"].numel() == shuffled["input_ids"].numel()


def test_a_conversation_stands_in_one_piece_and_its_branches_come_after():
    """What a template drops of earlier turns (here 90 and 91) makes each turn a branch of the last one's history."""
    turns = [[1, 2, 90, 3], [1, 2, 3, 4, 5, 91, 6], [1, 2, 3, 4, 5, 6, 7, 8]]
    rows = [np.array(row) for row in turns]
    assert depth_first(rows) == [(2, 0), (1, 5), (0, 2)]
    assert depth_first(rows[::-1]) == [(0, 0), (1, 5), (2, 2)]


def test_targets_of_a_shared_position_stand_once_for_each_example():
    features = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [1, 2, 3, 5]}]
    batch = DataCollatorWithSharedPrefix(0, "segments")(features)
    assert batch["segments"] == ((0, 3),) and batch["input_ids"].tolist() == [[1, 2, 3]]
    assert batch["labels"].tolist() == [[2, 3, 4, 2, 3, 5]]
    assert batch["logits_to_keep"].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("kind", ["mask", "segments", "padded"])
def test_records_of_several_examples_train_and_evaluate_as_if_unrolled(kind, tmp_path):
    """Steps, evaluation by record, and counts of tokens, against a dataset with an example in each row."""
    generator = np.random.default_rng(5)
    conversations = []
    for row in range(4):
        ids, ends, history = [], [], generator.integers(1, VOCABULARY, 6).tolist()
        for _ in range(row % 3 + 1):
            said = history + generator.integers(1, VOCABULARY, 5).tolist()
            ids, history = ids + said, said[:-2]
            ends.append(len(ids))
        labels = [IGNORE_INDEX if place % 3 else token for place, token in enumerate(ids)]
        conversations.append({"input_ids": ids, "labels": labels, "ends": ends, "row": row})
    unrolled = [{"input_ids": ids, "labels": labels} for ids, labels in one_by_one(conversations)]
    results = []
    for name, rows in (("together", conversations), ("unrolled", unrolled)):
        rows = [{**feature, "row": row} for row, feature in enumerate(rows)]
        args = InstructionTrainingArguments(
            str(tmp_path / name), max_steps=2, per_device_train_batch_size=len(rows), per_device_eval_batch_size=3,
            use_cpu=True, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, learning_rate=1e-3, train_sampling_strategy="sequential",
        )  # fmt: skip
        collate = DataCollatorForInstructionTuning(0)
        if kind != "padded" and name == "together":
            collate = DataCollatorWithSharedPrefix(0, kind)
        model = make_model("llama", kind if name == "together" else "padded")
        trainer = InstructionTrainer(model, args, data_collator=collate, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        evaluated = trainer.evaluate()
        numbers = [evaluated[f"eval_{each}"] for each in ("loss", "perplexity", "next_token_accuracy")]
        supervised = [each["supervised"] for each in logs]
        seen = trainer.state.num_input_tokens_seen
        results.append([*(each["loss"] for each in logs), *numbers, *supervised, seen])
        if name == "together":
            predicted = trainer.predict(rows)
            assert len(predicted.predictions) == len(rows)
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_wrong_ends_are_refused():
    for collate in (DataCollatorForInstructionTuning(0), DataCollatorWithSharedPrefix(0)):
        for ends in ([2, 2, 3], [2], [2, 4], [3, 2], [0, 3], []):
            with pytest.raises(ValueError, match=r"feature 1: its ends .* must rise to .* 3"):
                collate([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3], "ends": ends}])


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


class GraphsAtEachStep(TrainerCallback):
    """How many graphs the compiler has made when a step ends."""

    def __init__(self):
        self.made = []

    def on_step_end(self, args, state, control, **kwargs):
        from torch._dynamo.utils import counters

        self.made.append(counters["stats"]["unique_graphs"])


def test_compiled_training_makes_few_graphs_and_the_losses_of_padded_batches(tmp_path):
    """Twelve batches of different lengths and an evaluation: graphs of each part for the first and for other shapes."""
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
            torch_compile_backend="aot_eager" if compiled else None, per_device_eval_batch_size=3,
            eval_strategy="steps", eval_steps=12,
            train_sampling_strategy="sequential", remove_unused_columns=False, use_cpu=True, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        trainer = InstructionTrainer(
            make_model("gpt2", "mask"), args, train_dataset=rows, eval_dataset=rows[:20], data_collator=collator
        )
        trainer.add_callback(graphs := GraphsAtEachStep())
        trainer.train()
        logged = trainer.state.log_history
        results[compiled] = [log["loss"] for log in logged if "loss" in log] + [logged[-2]["eval_loss"]]
    assert 1 <= counters["stats"]["unique_graphs"] <= 20 and graphs.made[2] == graphs.made[-1]
    assert len(results[True]) == 13 and results[True] == pytest.approx(results[False], rel=1e-4)


def test_compiled_blocks_leave_the_head_and_the_segments_to_us(tmp_path):
    """Six batches whose runs all differ: the losses are those without the compiler, and few graphs are made."""
    from torch._dynamo.utils import counters

    generator = np.random.default_rng(4)
    features = [feature for _ in range(6) for feature in random_features(generator, mask_prompt=True)][:24]
    rows = [{**feature, "row": row} for row, feature in enumerate(features)]
    results = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        args = InstructionTrainingArguments(
            str(tmp_path / str(compiled)), max_steps=6, per_device_train_batch_size=4, torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None, train_sampling_strategy="sequential",
            remove_unused_columns=False, use_cpu=True, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        model = make_model("gpt2", "segments")
        tokenizer = type("Tokenizer", (), {"eos_token_id": 0})
        collator = make_collator(DataArguments(batching="shared_prefix"), args, model, tokenizer)
        assert collator.attention == "segments"
        trainer = InstructionTrainer(model, args, train_dataset=rows, data_collator=collator)
        trainer.add_callback(graphs := GraphsAtEachStep())
        trainer.train()
        assert trainer._head_makes_logits and trainer.layout_note is None
        results[compiled] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert 1 <= counters["stats"]["unique_graphs"] <= 25 and graphs.made[2] == graphs.made[-1], graphs.made
    assert len(results[True]) == 6 and results[True] == pytest.approx(results[False], rel=1e-5)


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
