"""The report about data before training: each figure against a count by hand or by another method."""

import itertools
import json
import random

import numpy as np
import pyarrow as pa
import pytest
from chat_template_kinds import FAMILIES
from conftest import DEMO
from datasets import Dataset, DatasetDict

from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import DataArguments
from recipe.data import encode_records, load_records, token_statistics
from recipe.data.encode import cut_lengths
from recipe.data.inspection import (
    batch_costs,
    encode_trained,
    inspect_lengths,
    inspect_records,
    measure_lengths,
    overflow_at,
    preamble_ids,
)
from recipe.data.records import LeftOut
from recipe.templates import load_template

WORDS = (DEMO / "records" / "train.jsonl").read_text(encoding="utf-8").split()


def dataset(rows: list[tuple[str, str | None, str]]) -> Dataset:
    columns = dict(zip(("instruction", "input", "output"), map(list, zip(*rows, strict=True)), strict=True))
    return Dataset.from_dict({**columns, "row": np.arange(len(rows))})


@pytest.fixture(scope="module")
def varied() -> DatasetDict:
    """Long and short prompts with long and short responses."""
    draw = random.Random(5)
    rows = [
        (" ".join(draw.choices(WORDS, k=draw.choice([1, 9, 60]))), "", " ".join(draw.choices(WORDS, k=k)))
        for k in [1, 3, 10, 40, 90] * 6
    ]
    return DatasetDict(train=dataset(rows), test=dataset(rows[:7]))


@pytest.fixture(scope="module")
def alpaca(demo_tokenizer):
    return load_template("alpaca", demo_tokenizer)


def test_lengths_are_those_of_the_tokenizer(demo_tokenizer, alpaca):
    records = dataset([("Make it plural.", "cat", "cats"), ("Say hello.", None, "Hello, hello!")])
    # whatever training would cut, drop or learn
    config = DataArguments(max_length=20, overflow="drop", mask_prompt=False)
    lengths = measure_lengths({"train": records}, demo_tokenizer, config, LeftOut())[1]["train"]
    assert lengths.tolist() == [
        [len(demo_tokenizer.tokenize(alpaca.prompt(record))), len(demo_tokenizer.tokenize(record["output"])) + 1]
        for record in records
    ]


@pytest.mark.parametrize("limit", [20, 47, 48, 64, 100, 128, 400])
def test_what_is_cut_is_what_encoding_cuts(varied, demo_tokenizer, limit):
    lengths = measure_lengths(varied, demo_tokenizer, DataArguments(), LeftOut())[1]["train"]
    cost = overflow_at(lengths, limit)
    cut = encode_records(varied, demo_tokenizer, DataArguments(max_length=limit))["train"]
    response = [sum(label != -100 for label in labels) for labels in cut["labels"]]
    kept = np.stack([np.subtract(cut["length"][:], response), response], axis=1)
    assert cost["too_long"] == sum(cut["truncated"])
    assert [cost["cut_prompt_tokens"], cost["cut_response_tokens"]] == (lengths - kept).sum(axis=0).tolist()
    assert cost["without_end"] == sum(ids[-1] != demo_tokenizer.eos_token_id for ids in cut["input_ids"])
    assert cut_lengths(lengths, limit).tolist() == kept.tolist()


def test_the_limits_above_cut_prompts_and_responses(varied, demo_tokenizer):
    lengths = measure_lengths(varied, demo_tokenizer, DataArguments(), LeftOut())[1]["train"]
    costs = [overflow_at(lengths, limit) for limit in (20, 64, 100, 400)]
    assert costs[0]["too_long"] == len(lengths) and costs[-1]["too_long"] < len(lengths)
    assert all(cost["cut_prompt_tokens"] and cost["cut_response_tokens"] for cost in costs[:3])
    assert 0 < costs[1]["without_end"] < costs[1]["too_long"]  # in some, only the prompt is cut


def laid_out(rows: list[dict], batch_size: int) -> tuple[int, int]:
    """The inputs that the collators make of rows in this order: padded, and shared."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    collators = DataCollatorForInstructionTuning(0), DataCollatorWithSharedPrefix(0, "segments")
    padded, shared = (sum(each(batch)["input_ids"].numel() for batch in batches) for each in collators)
    return padded, shared


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_costs_of_batches_are_those_of_the_collators(demo_tokenizer, alpaca, mask_prompt):
    """Over all orders of five records in batches of two; no two prompts are alike after the preamble."""
    rows = [("Add.", "", "3"), ("Why is that?", "b c d e", "So."), ("Say it.", "", WORDS[9]), ("Go", "", "1 2 3 4 5")]
    splits = DatasetDict(train=dataset([*rows, ("Make it plural, or else.", "a cat", "cats")]))
    config = DataArguments(mask_prompt=mask_prompt)
    encoded = list(encode_records(splits, demo_tokenizer, config)["train"])
    preamble = preamble_ids(alpaca, demo_tokenizer)
    assert len({record["input_ids"][len(preamble)] for record in encoded}) == 5
    costs = batch_costs(encode_trained(splits, demo_tokenizer, config)["train"], 2)
    padded, shared = zip(*(laid_out(order, 2) for order in itertools.permutations(encoded)), strict=True)
    assert costs["inputs"] == sum(record["length"] - 1 for record in encoded)
    assert min(padded) <= costs["padded"] <= max(padded)
    assert costs["padded"] == pytest.approx(np.mean(padded), rel=0.05)
    assert costs["padding"] == pytest.approx(1 - costs["inputs"] / costs["padded"], abs=0.01)
    assert set(shared) == {costs["shared_prefix"]}


def test_shared_prefixes_of_all_depths_are_counted(demo_tokenizer):
    """The figure is one order's; by another, of so many records, it hardly differs."""
    records, _ = load_records(DataArguments(data=str(DEMO / "records" / "validation.jsonl")))
    encoded = list(encode_records(records, demo_tokenizer, DataArguments())["train"])
    costs = batch_costs(encode_trained(records, demo_tokenizer, DataArguments())["train"], 32)
    padded, shared = laid_out(encoded, 32)
    assert costs["shared_prefix"] == pytest.approx(shared, rel=0.02) and shared < costs["padded"] / 1.5
    assert costs["padded"] == pytest.approx(padded, rel=0.05)
    order = np.random.default_rng(0).permutation(len(encoded))
    assert costs["shared_prefix"] == laid_out([encoded[index] for index in order], 32)[1]


@pytest.fixture(scope="module")
def conversations() -> DatasetDict:
    """Of one to three questions, with and without a system message, some with reasoning; the first two begin alike."""
    talks, draw = [], random.Random(3)
    for number in range(5):
        talk = [{"role": "system", "content": "You are brief."}] if number < 3 else []
        for turn in range(1 + number % 3):
            thought = f"<think>\n{' '.join(draw.choices(WORDS, k=4))}\n</think>\n\n" if turn < 2 else ""
            talk += [{"role": "user", "content": f"Name a colour{', please' * number * turn}."},
                     {"role": "assistant", "content": thought + draw.choice(["Blue.", "Red and green."])}]  # fmt: skip
        talks.append(json.dumps(talk))
    rows = {"messages": talks, "row": list(range(5)), **{name: ["x"] * 5 for name in ("instruction", "output")}}
    return DatasetDict(train=Dataset.from_dict(rows | {"input": [""] * 5}))


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("overflow", ["truncate", "drop"])
@pytest.mark.parametrize("family", ["Qwen 3", "Qwen 2.5"])
def test_costs_of_conversations_are_those_of_the_collators(conversations, family, overflow, limited):
    """With several examples in a row where the template leaves reasoning out, and cut or left out by the limit."""
    tokenizer = FAMILIES[family].tokenizer()
    config = DataArguments(max_length=1024, overflow=overflow, template="tokenizer")
    _, lengths, examples = measure_lengths(conversations, tokenizer, config, LeftOut())
    limit = int(np.median(examples["train"].sum(axis=1)))
    config.max_length = limit if limited else 1024
    encoded = list(encode_records(conversations, tokenizer, config)["train"])
    trained = encode_trained(conversations, tokenizer, config)
    assert limited or any(row.get("ends") for row in encoded) == (family == "Qwen 3")
    preamble = preamble_ids(load_template("tokenizer", tokenizer), tokenizer)
    split = inspect_lengths(lengths, examples, trained, [limit], 2, preamble)["train"]
    bounds = [list(itertools.pairwise([0, *(row.get("ends") or [row["length"]])])) for row in encoded]
    parts = [row["input_ids"][a:b] for row, pairs in zip(encoded, bounds, strict=True) for a, b in pairs]
    assert split["batches"]["inputs"] == sum(len(part) - 1 for part in parts)
    padded, shared = zip(*(laid_out(order, 2) for order in itertools.permutations(encoded)), strict=True)
    assert split["batches"]["padded"] == pytest.approx(np.mean(padded), rel=0.05)
    order = np.random.default_rng(0).permutation(len(encoded))
    assert split["batches"]["shared_prefix"] == laid_out([encoded[index] for index in order], 2)[1]
    assert min(shared) <= split["batches"]["shared_prefix"] <= max(shared)
    assert split["tokens"]["response"] == sum(label != -100 for row in encoded for label in row["labels"])
    same = [itertools.takewhile(lambda pair: pair[0] == pair[1], zip(part, preamble, strict=False)) for part in parts]
    assert split["tokens"]["preamble"] == sum(len(list(each)) for each in same) and sum(
        split["tokens"].values()
    ) == sum(map(len, parts))
    assert split["overflow"][0]["too_long"] > 0 and split["trained_records"] == len(encoded)
    assert (len(encoded) < 5 or max(map(len, parts)) == limit) == limited


def test_padding_is_that_of_random_batches():
    """Of the numbers 1 to n, the largest of b drawn ones is b (n + 1) / (b + 1) on average."""
    costs = batch_costs(as_rows(np.array([[length, 1] for length in range(1, 6401)]), 0, 0), 64)
    assert costs["padded"] == pytest.approx(6400 * 64 * 6401 / 65, rel=0.01)


def as_rows(lengths: np.ndarray, preamble: int, header: int) -> pa.Table:
    """Rows with prompts and responses of these lengths, with only the preamble in common, before the header."""
    rows, labels = [], []
    for number, (prompt, response) in enumerate(lengths.tolist()):
        start = min(preamble, prompt - header)
        rows.append([*range(1, start + 1), *[1000 + number] * (prompt - start), *[5] * response])
        labels.append([-100] * prompt + [5] * response)
    columns = {name: pa.array(each, pa.list_(pa.int32())) for name, each in (("input_ids", rows), ("labels", labels))}
    return pa.table(columns | {"length": lengths.sum(axis=1)})


def inspect(lengths: list[list[int]], max_length: int, overflow: str, batch_size: int, overhead: tuple[int, int]):
    """As training would have them: cut to their lengths, or left out."""
    whole = np.array(lengths)
    kept = cut_lengths(whole, max_length) if overflow == "truncate" else whole[whole.sum(axis=1) <= max_length]
    trained = {"train": as_rows(kept, *overhead)}
    every = {"train": whole}
    return inspect_lengths(every, every, trained, [32, 1024], batch_size, list(range(1, overhead[0] + 1)))["train"]


def test_a_cut_prompt_may_lose_tokens_of_its_preamble():
    """At 40 tokens a prompt keeps 20 of its 30 before a long response: 14 of the preamble's 24, and the header."""
    split = inspect([[30, 90], [30, 5]], 40, "truncate", 2, (24, 6))
    assert split["tokens"] == {"preamble": 14 + 24, "prompt": 6 + 6, "response": 20 + 5}
    assert split["batches"]["shared_prefix"] == 39 + 34 - 14


def test_counts_are_those_that_training_prints(varied, demo_tokenizer, alpaca):
    preamble, config = preamble_ids(alpaca, demo_tokenizer), DataArguments(max_length=100)
    _, lengths, examples = measure_lengths(varied, demo_tokenizer, config, LeftOut())
    trained = encode_trained(varied, demo_tokenizer, config)
    report = inspect_lengths(lengths, examples, trained, [100], 4, preamble)
    encoded = encode_records(varied, demo_tokenizer, config)
    for printed in token_statistics(varied, encoded, len(preamble)):
        split, total = report[printed["split"]], printed["tokens"]
        assert split["records"] == printed["rows"] and split["overflow"][0]["too_long"] == printed["truncated"]
        assert sum(split["tokens"].values()) == total
        assert split["tokens"]["preamble"] / total == pytest.approx(printed["preamble"])
        assert split["tokens"]["response"] / total == pytest.approx(printed["supervised"])


def test_lengths_are_summed_up():
    split = inspect([[10, 2], [20, 2], [30, 3], [400, 1000]], 32, "drop", 2, (5, 3))
    assert split["lengths"]["whole"] == {
        "shortest": 12, "median": 22, "mean": 366.75, "p95": 1400, "p99": 1400, "longest": 1400,
    }  # fmt: skip
    assert split["trained_records"] == 2
    assert split["tokens"] == {"preamble": 10, "prompt": 20, "response": 4}
    assert [cost["too_long"] for cost in split["overflow"]] == [2, 1]


def test_an_empty_split_has_no_padding():
    split = inspect([[10, 9]], 12, "drop", 8, (5, 3))
    assert split["batches"]["padding"] is None
    assert split["tokens"] == {"preamble": 0, "prompt": 0, "response": 0}


def test_what_is_odd_is_counted_and_shown():
    train = dataset(
        [
            ("Name one.", "", "A tree."),
            ("Name two.", " ", "A tree."),
            ("Name three.", None, "A tree."),
            ("Name three.", "of these", "A\ufffdtree\u200b, a\ufffd tree."),
            ("Name\x07 four.", "x", "Line\r\nline"),
        ]
    )
    test = dataset([("Name one.", "", "A tree.\n\tA house with its \u200d garden.")])
    lengths = {
        "train": np.array([[5, 3], [5, 3], [5, 3], [9, 90], [7, 1]]),
        "test": np.array([[5, 20]]),
    }
    report = inspect_records(DatasetDict(train=train, test=test), lengths, {}, show=2)
    assert report["empty_input"]["by_split"] == {"train": 3, "test": 1}
    odd = report["odd_characters"]
    assert odd["by_split"] == {"train": 2, "test": 0} and [record["row"] for record in odd["examples"]] == [3, 4]
    assert [(row["tokens"], row["row"]) for row in report["longest"]] == [(99, 3), (25, 0)]
    assert [row["tokens"] for row in report["shortest"]] == [8, 8]
