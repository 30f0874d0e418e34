"""The report about data before training: each figure against a count by hand or by another method."""

import itertools
import random

import numpy as np
import pytest
from conftest import DEMO
from datasets import Dataset, DatasetDict

from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import DataArguments
from recipe.data import encode_records, load_records, template_overhead, token_statistics
from recipe.data.encode import cut_lengths
from recipe.data.inspection import batch_costs, inspect_lengths, inspect_records, measure_lengths, overflow_at
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


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_costs_of_batches_are_those_of_the_collators(demo_tokenizer, alpaca, mask_prompt):
    """Over all orders of five records in batches of two; no two prompts are alike after the preamble."""
    rows = [("Add.", "", "3"), ("Why is that?", "b c d e", "So."), ("Say it.", "", WORDS[9]), ("Go", "", "1 2 3 4 5")]
    splits = DatasetDict(train=dataset([*rows, ("Make it plural, or else.", "a cat", "cats")]))
    encoded = list(encode_records(splits, demo_tokenizer, DataArguments(mask_prompt=mask_prompt))["train"])
    preamble, _ = template_overhead(alpaca, demo_tokenizer)
    assert len({record["input_ids"][preamble] for record in encoded}) == 5
    costs = batch_costs(np.array([r["length"] for r in encoded]), 2, preamble)

    collators = DataCollatorForInstructionTuning(0), DataCollatorWithSharedPrefix(0, "segments")
    padded, shared = [], []
    for order in itertools.permutations(encoded):
        batches = [order[:2], order[2:4], order[4:]]
        padded.append(sum(collators[0](batch)["input_ids"].numel() for batch in batches))
        shared.append(sum(collators[1](batch)["input_ids"].numel() for batch in batches))
    assert costs["inputs"] == sum(record["length"] - 1 for record in encoded)
    assert min(padded) <= costs["padded"] <= max(padded)
    assert costs["padded"] == pytest.approx(np.mean(padded), rel=0.05)
    assert costs["padding"] == pytest.approx(1 - costs["inputs"] / costs["padded"], abs=0.01)
    assert set(shared) == {costs["shared_prefix"]}


def test_shared_prefixes_save_at_least_what_is_reported(demo_tokenizer, alpaca):
    records, _ = load_records(DataArguments(data=str(DEMO / "records" / "validation.jsonl")))
    encoded = list(encode_records(records, demo_tokenizer, DataArguments())["train"])
    costs = batch_costs(np.array([r["length"] for r in encoded]), 32, template_overhead(alpaca, demo_tokenizer)[0])
    collate = DataCollatorWithSharedPrefix(0, "segments")
    inputs = sum(collate(encoded[i : i + 32])["input_ids"].numel() for i in range(0, len(encoded), 32))
    assert inputs <= costs["shared_prefix"] < costs["padded"] / 1.5


def test_padding_is_that_of_random_batches():
    """Of the numbers 1 to n, the largest of b drawn ones is b (n + 1) / (b + 1) on average."""
    costs = batch_costs(np.arange(1, 6401) + 1, 64, shared=0)
    assert costs["padded"] == pytest.approx(6400 * 64 * 6401 / 65, rel=0.01)


def inspect(lengths: list[list[int]], max_length: int, overflow: str, batch_size: int, overhead: tuple[int, int]):
    config = DataArguments(max_length=max_length, overflow=overflow)
    return inspect_lengths({"train": np.array(lengths)}, config, [32, 1024], batch_size, overhead)["train"]


def test_a_cut_prompt_may_lose_tokens_of_its_preamble():
    """At 40 tokens a prompt keeps 20 of its 30 before a long response: 14 of the preamble's 24, and the header."""
    split = inspect([[30, 90], [30, 5]], 40, "truncate", 2, (24, 6))
    assert split["tokens"] == {"preamble": 14 + 24, "prompt": 6 + 6, "response": 20 + 5}
    assert split["batches"]["shared_prefix"] == 39 + 34 - 14


def test_counts_are_those_that_training_prints(varied, demo_tokenizer, alpaca):
    overhead = template_overhead(alpaca, demo_tokenizer)
    config = DataArguments(max_length=100)
    report = inspect_lengths(measure_lengths(varied, demo_tokenizer, config, LeftOut())[1], config, [100], 4, overhead)
    encoded = encode_records(varied, demo_tokenizer, config)
    for printed in token_statistics(varied, encoded, overhead[0]):
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
