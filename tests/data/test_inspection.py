"""What is said about data before training: each figure against a count by hand or by another way."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import DEMO, ROOT
from datasets import Dataset, DatasetDict
from PIL import Image

from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import DataArguments, UserError
from recipe.data import encode_records, load_records, template_overhead, token_statistics
from recipe.data.inspection import (
    Lengths,
    bands,
    batch_costs,
    bin_edges,
    draw_histograms,
    expected_longest,
    inspect_lengths,
    inspect_records,
    inspect_repetition,
    kept_lengths,
    measure_lengths,
    near_duplicates,
    overflow_at,
    shingle_sets,
)
from recipe.templates import load_template

WORDS = (DEMO / "records" / "train.jsonl").read_text(encoding="utf-8").split()


def dataset(rows: list[tuple[str, str | None, str]]) -> Dataset:
    columns = dict(zip(("instruction", "input", "output"), map(list, zip(*rows, strict=True)), strict=True))
    return Dataset.from_dict({**columns, "row": np.arange(len(rows))})


def rows_of(records: list[dict]) -> list[tuple[str, int]]:
    return [(record["split"], record["row"]) for record in records]


@pytest.fixture(scope="module")
def varied() -> Dataset:
    """Long and short prompts with long and short responses."""
    draw = random.Random(5)
    return dataset(
        [
            (" ".join(draw.choices(WORDS, k=draw.choice([1, 9, 60]))), "", " ".join(draw.choices(WORDS, k=k)))
            for k in [1, 3, 10, 40, 90] * 6
        ]
    )


@pytest.fixture(scope="module")
def alpaca(demo_tokenizer):
    return load_template("alpaca", demo_tokenizer)


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_tokenizer(demo_tokenizer, alpaca):
    records = dataset([("Make it plural.", "cat", "cats"), ("Say hello.", None, "Hello, hello!")])
    lengths = measure_lengths(records, alpaca, demo_tokenizer)
    for index, record in enumerate(records):
        prompt, response = alpaca.prompt(record), record["output"]
        assert lengths.prompt[index] == len(demo_tokenizer.tokenize(prompt))
        assert lengths.response[index] == len(demo_tokenizer.tokenize(response)) + 1
        assert lengths.whole[index] == lengths.prompt[index] + lengths.response[index]


def test_a_boundary_that_tokens_cross_is_found(demo_tokenizer, tmp_path):
    """A prompt that ends in the middle of a word; what the tokenizer makes of it is asked one record at a time."""
    (tmp_path / "half.jinja").write_text(
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{{ message.input }}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    template = load_template(str(tmp_path / "half.jinja"), demo_tokenizer)
    starts, ends = ["The sent", "The word ", "What is", "Why?\n"], ["ence", "is short.", " plural", "\n", "1"]
    records = dataset([(start, "", end) for start, end in itertools.product(starts, ends)])
    expected = [
        demo_tokenizer.tokenize(start + end) != demo_tokenizer.tokenize(start) + demo_tokenizer.tokenize(end)
        for start, end in itertools.product(starts, ends)
    ]
    assert measure_lengths(records, template, demo_tokenizer).boundary.tolist() == expected
    assert any(expected) and not all(expected)


@pytest.mark.parametrize("limit", [20, 47, 48, 64, 100, 128, 400])
def test_what_is_cut_is_what_encoding_cuts(varied, demo_tokenizer, alpaca, limit):
    lengths = measure_lengths(varied, alpaca, demo_tokenizer)
    [cost] = [overflow_at(lengths, limit)]
    splits = DatasetDict(train=varied)
    cut = encode_records(splits, demo_tokenizer, DataArguments(max_length=limit))["train"]
    whole = encode_records(splits, demo_tokenizer, DataArguments(max_length=100_000))["train"]
    responses = [[sum(label != -100 for label in labels) for labels in of["labels"]] for of in (cut, whole)]
    prompts = [np.subtract(of["length"][:], response) for of, response in zip((cut, whole), responses, strict=True)]
    assert cost["too_long"] == sum(cut["truncated"])
    assert cost["cut_response_tokens"] == sum(responses[1]) - sum(responses[0])
    assert cost["cut_prompt_tokens"] == sum(prompts[1]) - sum(prompts[0])
    assert cost["without_end"] == sum(ids[-1] != demo_tokenizer.eos_token_id for ids in cut["input_ids"])
    prompt, response = kept_lengths(lengths, limit, "truncate")
    assert (prompt.tolist(), response.tolist()) == (prompts[0].tolist(), responses[0])

    prompt, response = kept_lengths(lengths, limit, "drop")
    if not len(prompt):
        assert cost["too_long"] == len(varied)
        return
    left = encode_records(splits, demo_tokenizer, DataArguments(max_length=limit, overflow="drop"))["train"]
    assert (prompt + response).tolist() == left["length"][:]
    assert cost["dropped_tokens"] == sum(whole["length"]) - sum(left["length"])


def test_limits_that_cut_everything_in_turn_were_among_those(varied, demo_tokenizer, alpaca):
    lengths = measure_lengths(varied, alpaca, demo_tokenizer)
    costs = [overflow_at(lengths, limit) for limit in (20, 64, 100, 400)]
    assert costs[0]["too_long"] == len(varied) and costs[-1]["too_long"] < len(varied)
    assert all(cost["cut_prompt_tokens"] and cost["cut_response_tokens"] for cost in costs[:3])
    assert 0 < costs[1]["without_end"] < costs[1]["too_long"]  # in some, the prompt alone gives way


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_the_expected_longest_is_the_mean_over_all_draws(count):
    values = np.array([1, 2, 2, 5, 9, 30, 31])
    draws = [max(draw) for draw in itertools.combinations(values, count)]
    assert expected_longest(values, count) == pytest.approx(np.mean(draws), rel=1e-12)


def test_the_expected_longest_of_many_does_not_overflow():
    values = np.arange(1, 100_001)  # the expectation for 1 to n is known: count (n + 1) / (count + 1)
    assert expected_longest(values, 64) == pytest.approx(64 * 100_001 / 65, rel=1e-9)


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_costs_of_batches_are_those_of_the_collators(demo_tokenizer, alpaca, mask_prompt):
    """Over all orders of five records in batches of two; no two begin alike behind the preamble."""
    rows = [("Add.", "", "3"), ("Why is that?", "b c d e", "So."), ("Say it.", "", WORDS[9]), ("Go", "", "1 2 3 4 5")]
    splits = DatasetDict(train=dataset([*rows, ("Make it plural, or else.", "a cat", "cats")]))
    encoded = list(encode_records(splits, demo_tokenizer, DataArguments(mask_prompt=mask_prompt))["train"])
    preamble, _ = template_overhead(alpaca, demo_tokenizer)
    assert len({record["input_ids"][preamble] for record in encoded}) == 5
    costs = batch_costs(np.array([r["length"] for r in encoded]), 2, preamble - (not mask_prompt))

    collators = DataCollatorForInstructionTuning(0), DataCollatorWithSharedPrefix(0, "segments")
    padded, shared = [], []
    for order in itertools.permutations(encoded):
        batches = [order[:2], order[2:4], order[4:]]
        padded.append(sum(collators[0](batch)["input_ids"].numel() for batch in batches))
        shared.append(sum(collators[1](batch)["input_ids"].numel() for batch in batches))
    assert costs["inputs"] == sum(record["length"] - 1 for record in encoded)
    assert costs["padded"] == pytest.approx(np.mean(padded), rel=1e-12)
    assert costs["padding"] == pytest.approx(1 - costs["inputs"] / np.mean(padded), rel=1e-12)
    assert set(shared) == {costs["shared_prefix"]}


def test_shared_prefixes_save_at_least_what_is_said(demo_tokenizer, alpaca):
    records, _ = load_records(DataArguments(data=str(DEMO / "records" / "validation.jsonl")))
    encoded = list(encode_records(records, demo_tokenizer, DataArguments())["train"])
    costs = batch_costs(np.array([r["length"] for r in encoded]), 32, template_overhead(alpaca, demo_tokenizer)[0])
    collate = DataCollatorWithSharedPrefix(0, "segments")
    inputs = sum(collate(encoded[i : i + 32])["input_ids"].numel() for i in range(0, len(encoded), 32))
    assert inputs <= costs["shared_prefix"] < costs["padded"] / 1.5


def test_a_cut_may_take_of_the_preamble(demo_tokenizer, alpaca):
    """At 40 tokens a prompt keeps 20 of its 30 before a long response: 14 of the preamble's 24, and the ending."""
    of = Lengths(np.array([30, 30]), np.array([90, 5]), np.array([False, False]))
    split = inspect_lengths({"train": of}, [40], 40, "truncate", 2, 24, 6)["splits"]["train"]
    assert split["tokens"] == {"preamble": 14 + 24, "prompt": 6 + 6, "response": 20 + 5}
    assert split["batches"]["shared_prefix"] == 39 + 34 - 14


def test_shares_are_those_that_training_prints(varied, demo_tokenizer, alpaca):
    preamble, ending = template_overhead(alpaca, demo_tokenizer)
    splits = DatasetDict(train=varied, test=varied.select(range(7)))
    lengths = {name: measure_lengths(split, alpaca, demo_tokenizer) for name, split in splits.items()}
    report = inspect_lengths(lengths, [64], 100, "truncate", 4, preamble, ending)["splits"]
    encoded = encode_records(splits, demo_tokenizer, DataArguments(max_length=100))
    for printed in token_statistics(splits, encoded, preamble):
        split = report[printed["split"]]
        assert split["records"] == printed["rows"] and split["too_long"] == printed["truncated"]
        assert sum(split["tokens"].values()) == printed["tokens"]
        assert split["shares"]["preamble"] == pytest.approx(printed["preamble"])
        assert split["shares"]["response"] == pytest.approx(printed["supervised"])
        assert sum(split["shares"].values()) == pytest.approx(1)


def test_lengths_are_summed_up_and_counted_in_bins():
    of = Lengths(np.array([10, 20, 30, 400]), np.array([2, 2, 3, 1000]), np.zeros(4, bool))
    report = inspect_lengths({"train": of}, [32, 1024], 32, "drop", 2, 5, 3)
    split = report["splits"]["train"]
    described = split["lengths"]["whole"]
    assert {key: described[key] for key in ("shortest", "mean", "median", "p95", "longest")} == {
        "shortest": 12, "mean": 366.75, "median": 22, "p95": 1400, "longest": 1400,
    }  # fmt: skip
    assert split["trained_records"] == 2 and split["too_long"] == 2
    assert split["tokens"] == {"preamble": 10, "prompt": 20, "response": 4}
    assert [cost["too_long"] for cost in split["overflow"]] == [2, 1]
    edges = report["bin_edges"]
    assert edges[0] == 2 and edges[-1] == 1401 and edges == sorted(set(edges))
    for part in ("prompt", "response", "whole"):
        for low, high, count in zip(edges[:-1], edges[1:], split["lengths"][part]["histogram"], strict=False):
            assert count == sum(low <= length < high for length in getattr(of, part))


def test_a_split_of_which_nothing_is_left_has_no_shares():
    of = Lengths(np.array([10]), np.array([9]), np.zeros(1, bool))
    split = inspect_lengths({"train": of}, [12], 12, "drop", 8, 5, 3)["splits"]["train"]
    assert set(split["shares"].values()) == {None} and split["batches"]["padding"] is None
    assert split["tokens"] == {"preamble": 0, "prompt": 0, "response": 0}


# --- repetition -------------------------------------------------------------------------------------------------------


def shingles_of(text: str) -> set[str]:
    plain = " ".join(text.lower().split())
    return {plain[i : i + 5] for i in range(max(1, len(plain) - 4))}


def jaccard(one: str, other: str) -> float:
    return of_sets(shingles_of(one), shingles_of(other))


def of_sets(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def edited_texts(count: int, seed: int) -> list[str]:
    """Texts of which many are edits of others: words exchanged, left out or put in, letters in other cases."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 40))) for _ in range(count // 4)]
    while len(texts) < count:
        words = draw.choice(texts).split()
        for _ in range(draw.randint(0, 3)):
            place = draw.randrange(len(words))
            words[place : place + draw.randint(0, 1)] = draw.choices(WORDS, k=draw.randint(0, 2))
            words = words or [draw.choice(WORDS)]
        texts.append(draw.choice([str, str.upper, str.title])("  ".join(words)))
    return texts


def test_shingles_are_the_runs_of_five_characters_in_any_script():
    texts = [
        "Größe",
        "größen",
        "日本語のテキスト。",
        "日本語のテキスト",
        "😀 😀 😀 ok",
        "a",
        "A ",
        "ab",
        "  Ab\n c  d",
        "aaaaaaaa",
        "\0\0",
    ]
    found = shingle_sets(texts)
    for one, other in itertools.product(range(len(texts)), repeat=2):
        a, b = shingles_of(texts[one]), shingles_of(texts[other])
        common = len(np.intersect1d(found[one], found[other]))
        assert (len(found[one]), common) == (len(a), len(a & b)), (texts[one], texts[other])


@pytest.mark.parametrize(("threshold", "seed"), [(0.5, 1), (0.7, 2), (0.8, 3), (0.95, 4), (1.0, 5)])
def test_near_duplicates_are_those_of_comparing_all_pairs(threshold, seed):
    texts = edited_texts(240, seed)
    pairs, similarity, complete = near_duplicates(texts, threshold)
    shingles = [shingles_of(text) for text in texts]
    every = {(i, j): of_sets(shingles[i], shingles[j]) for i, j in itertools.combinations(range(len(texts)), 2)}
    found = dict(zip(map(tuple, pairs.tolist()), similarity.tolist(), strict=True))
    assert complete and len(found) == len(pairs)
    assert all(every[pair] == value >= threshold for pair, value in found.items())
    similar = {pair for pair, value in every.items() if value >= threshold}
    assert {pair for pair in similar if every[pair] >= min(1, threshold + 0.05)} <= found.keys()
    assert len(found) >= 0.97 * len(similar) > 20
    assert similarity.tolist() == sorted(similarity.tolist(), reverse=True)


def test_near_duplicates_are_the_same_every_time():
    texts = edited_texts(200, 7)
    one, other = (near_duplicates(texts, 0.6) for _ in range(2))
    assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


def test_the_chance_to_be_found_is_as_promised_at_every_threshold():
    for threshold in np.linspace(0.5, 1, 51):
        count, rows = bands(threshold)
        assert count * rows <= 128 and 1 - (1 - threshold**rows) ** count >= 0.99


def test_a_crowd_of_near_duplicates_is_found_without_comparing_all_its_pairs(monkeypatch):
    monkeypatch.setattr("recipe.data.inspection.MOST_PAIRS", 10_000)
    texts = [f"{' '.join(WORDS[:60])} and at the very end there is number {i}" for i in range(400)] + ["Alone."]
    pairs, similarity, complete = near_duplicates(texts, 0.8)
    assert not complete and len(pairs) < 400 * 399 / 2
    assert set(np.unique(pairs)) == set(range(400))
    assert similarity[0] == jaccard(*(texts[i] for i in pairs[0]))


def test_no_pair_is_no_error():
    pairs, similarity, complete = near_duplicates(["One thing.", "Quite another matter."], 0.8)
    assert pairs.shape == (0, 2) and similarity.shape == (0,) and complete


REPEATED = {
    "train": [
        ("Name a colour.", "", "Red is a colour of many a flower."),  # 0
        ("Name a colour.", "", "Red is a colour of many a flower."),  # 1: 0 again
        ("Name a colour.", "", "Blue."),  # 2: the prompt of 0
        ("What is the capital of France, please?", "", "The capital of France is Paris."),  # 3
        ("Count the letters of this word.", "tree", "There are four letters."),  # 4: stands in test
        ("Say it in German.", "the house", "das Haus"),  # 5
    ],
    "validation": [("Name a colour.", None, "Green.")],  # the prompt of train 0
    "test": [
        ("Count the letters of this word.", "tree", "There are four letters."),  # 0: train 4
        ("What is the capital of  france, please?", "", "The capital of France is Paris!"),  # 1: nearly train 3
        ("Say it in German.", "the house", "Das ist ein Haus, und was für eines."),  # 2: the prompt of train 5
    ],
}


@pytest.fixture(scope="module")
def repeated_files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("repeated")
    for name, rows in REPEATED.items():
        lines = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in REPEATED}


def test_what_stands_twice_is_found_within_and_across_splits(repeated_files):
    trained, leaked = load_records(DataArguments(data=repeated_files))
    given = DatasetDict({name: dataset(rows) for name, rows in REPEATED.items()})
    report, pairs = inspect_repetition(given, trained, 0.8, show=5)
    counts = {
        (found["records_of"], found["found_in"]): tuple(found[key] for key in ("exact", "same_prompt", "near"))
        for found in report["splits"]
    }
    assert leaked == 1 and next(iter(counts)) == ("test", "train")
    assert counts == {
        ("test", "train"): (1, 1, 1),
        ("validation", "train"): (0, 1, 0),
        ("test", "validation"): (0, 0, 0),
        ("train", "train"): (1, 1, 0),
        ("validation", "validation"): (0, 0, 0),
        ("test", "test"): (0, 0, 0),
    }
    leak, _, _, within, *_ = report["splits"]
    assert [rows_of(pair) for pair in leak["examples"]["exact"]] == [[("test", 0), ("train", 4)]]
    assert [rows_of(pair) for pair in leak["examples"]["same_prompt"]] == [[("test", 2), ("train", 5)]]
    [near] = leak["examples"]["near"]
    assert rows_of(near["records"]) == [("test", 1), ("train", 3)]
    assert near["similarity"] == jaccard(*("\n".join(REPEATED[name][row]) for name, row in (("test", 1), ("train", 3))))
    assert near["records"][0]["output"] == "The capital of France is Paris!"
    assert [rows_of(pair) for pair in within["examples"]["exact"]] == [[("train", 1), ("train", 0)]]
    assert [rows_of(pair) for pair in within["examples"]["same_prompt"]] == [[("train", 2), ("train", 0)]]
    assert list(pairs) == [{"similarity": near["similarity"], "splits": ["test", "train"], "rows": [1, 3]}]


def test_rows_are_those_of_the_source_where_a_split_was_drawn(tmp_path):
    """The test split is drawn out of train: a near-duplicate is named by its row in the file."""
    draw = random.Random(3)
    rows = [(f"Question {i}: {' '.join(draw.choices(WORDS, k=9))}?", "", f"{draw.random()}") for i in range(60)]
    rows = [(f"{mark} {instruction}", text, output) for mark in "ab" for instruction, text, output in rows]
    lines = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]
    (tmp_path / "all.json").write_text(json.dumps(lines), encoding="utf-8")
    records, _ = load_records(DataArguments(data=str(tmp_path / "all.json")))
    _, pairs = inspect_repetition(records, records, 0.8, show=0)
    pairs = list(pairs)
    assert len(pairs) == 60
    assert all(abs(one - other) == 60 for one, other in (pair["rows"] for pair in pairs))
    assert any(pair["splits"] == ["test", "train"] for pair in pairs)


def test_without_datasketch_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match="pip install datasketch, or leave them out with --near_duplicates 0"):
        near_duplicates(["a", "b"], 0.8)
    splits = DatasetDict(train=dataset(REPEATED["train"]))
    report, pairs = inspect_repetition(splits, splits, 0, show=1)
    assert report["threshold"] is None and report["splits"][0]["near"] is None and list(pairs) == []
    assert report["splits"][0]["exact"] == 1


# --- records to look at -----------------------------------------------------------------------------------------------


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
        "train": Lengths(np.array([5, 5, 5, 9, 7]), np.array([3, 3, 3, 90, 1]), np.array([False] * 4 + [True])),
        "test": Lengths(np.array([5]), np.array([20]), np.array([False])),
    }
    report = inspect_records(DatasetDict(train=train, test=test), lengths, show=2)
    findings = report["findings"]
    assert findings["empty_input"]["by_split"] == {"train": 3, "test": 1}
    assert findings["shared_response"]["by_split"] == {"train": 3, "test": 0}
    assert rows_of(findings["shared_response"]["examples"]) == [("train", 0), ("train", 1)]
    assert rows_of(findings["boundary"]["examples"]) == [("train", 4)]
    assert findings["odd_characters"]["records"] == 2
    characters = {of["character"]: (of["name"], of["records"]) for of in findings["odd_characters"]["characters"]}
    assert characters == {
        "U+FFFD": ("REPLACEMENT CHARACTER", 1),
        "U+200B": ("ZERO WIDTH SPACE", 1),
        "U+0007": ("control character", 1),
        "U+000D": ("control character", 1),
    }
    [frequent] = report["frequent_responses"]
    assert frequent == {"response": "A tree.", "records": 3, "share": 0.5, "prompts": 3}
    assert [(row["tokens"], row["row"]) for row in report["longest"]] == [(99, 3), (25, 0)]
    assert [row["tokens"] for row in report["shortest"]] == [8, 8]


# --- the picture and the command --------------------------------------------------------------------------------------


def test_bars_have_areas_like_their_counts():
    of = Lengths(np.array([10, 20, 30, 400]), np.array([2, 2, 3, 1000]), np.zeros(4, bool))
    report = inspect_lengths({"train": of, "test": of}, [32], 32, "drop", 2, 5, 3)
    figure = draw_histograms(report, 32)
    assert len(figure.axes) == 6
    for axes, part in zip(figure.axes, ("prompt", "response", "whole") * 2, strict=True):
        heights, edges, _ = axes.patches[0].get_data()
        assert heights * np.diff(np.log(edges)) == pytest.approx(
            report["splits"]["train"]["lengths"][part]["histogram"]
        )
    assert figure.axes[2].lines[0].get_xdata()[0] == 32
    assert bin_edges([of]).tolist() == report["bin_edges"]


def run(*arguments: str, cache: Path, expect: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "scripts/inspect_data.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == expect, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def test_the_command_looks_at_the_demo_data(tmp_path):
    before = {path: path.read_bytes() for path in (DEMO / "records").iterdir()}
    out = tmp_path / "out"
    done = run("configs/demo.yaml", "--output_dir", str(out), "--limits", "48", "64", "--show", "2", cache=tmp_path)
    assert {path: path.read_bytes() for path in (DEMO / "records").iterdir()} == before

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads((out / "inspection.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert {name: split["records"] for name, split in report["splits"].items()} == {
        "train": 3200, "validation": 200, "test": 400, "test_unseen": 200,
    }  # fmt: skip
    assert report["settings"]["max_length"] == 256 and report["settings"]["batch_size"] == 32
    assert [cost["limit"] for cost in report["splits"]["test"]["overflow"]] == [48, 64, 256]
    assert report["left_out_of_train_as_duplicates"] == 0 and report["repetition"]["complete"]
    pairs = [json.loads(line) for line in (out / "near_duplicates.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(pairs) == sum(found["near_pairs"] for found in report["repetition"]["splits"])
    rows = {name: (DEMO / "records" / f"{name}.jsonl").read_text().splitlines() for name in report["splits"]}
    for pair in pairs:
        one, other = (json.loads(rows[name][row]) for name, row in zip(pair["splits"], pair["rows"], strict=True))
        texts = ["\n".join(record[field] for field in ("instruction", "input", "output")) for record in (one, other)]
        assert pair["similarity"] == jaccard(*texts) >= 0.8

    with Image.open(out / "lengths.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert sorted(path.name for path in out.iterdir()) == ["inspection.json", "lengths.png", "near_duplicates.jsonl"]
    assert done.stdout.index("Records that stand twice") < done.stdout.index("Lengths in tokens")
    assert "Near-duplicates (test in train)" in done.stdout and "max_length" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def script():
    import importlib.util

    spec = importlib.util.spec_from_file_location("inspect_data_script", ROOT / "scripts" / "inspect_data.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def arguments(repeated_files: dict[str, str], *more: str) -> list[str]:
    return ["--model_name_or_path", str(DEMO / "base"), "--data", json.dumps(repeated_files), *more]


def test_leaks_come_first_in_the_terminal(script, repeated_files, tmp_path, capsys):
    script.main(arguments(repeated_files, "--output_dir", str(tmp_path / "out")))
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if line.startswith("│ test"))
    assert [cell.strip() for cell in first.strip("│").split("│")] == ["test", "train", "3", "1", "1", "1", "1"]
    assert "1 records are left out of training" in "\n".join(lines)
    start = lines.index("The same record (test in train)")
    assert lines[start + 1].split("→")[0].split()[:5] == ["test", "row", "0", "Count", "the"]
    assert lines[start + 2].startswith("  train row 4 ")
    report = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert report["left_out_of_train_as_duplicates"] == 1 and report["splits"]["train"]["records"] == 5


def test_two_runs_write_the_same(script, repeated_files, tmp_path, capsys):
    written = []
    for _ in range(2):
        script.main(arguments(repeated_files, "--output_dir", str(tmp_path / "out"), "--near_duplicates", "0.5"))
        written.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
        shutil.rmtree(tmp_path / "out")
    assert written[0] == written[1]


def test_a_training_file_is_taken_and_its_folder_is_left_alone(script, repeated_files, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    text = (ROOT / "configs" / "gpt2_alpaca.yaml").read_text(encoding="utf-8")
    config.write_text(text.replace("outputs/gpt2-alpaca", str(run_dir)), encoding="utf-8")
    flags = arguments(repeated_files, "--max_length", "60", "--overflow", "error", "--near_duplicates", "0")
    script.main([str(config), *flags])
    assert not any(run_dir.iterdir())
    settings = json.loads((tmp_path / "run-data" / "inspection.json").read_text())["settings"]
    assert (settings["max_length"], settings["overflow"], settings["batch_size"]) == (60, "error", 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say where the results go: --output_dir"),
        (["--output_dir", "OUT", "--near_duplicates", "0.3"], "--near_duplicates 0.3: give a similarity from 0.5 to 1"),
        (["--output_dir", "OUT", "--near_duplicates", "nan"], "--near_duplicates nan: give a similarity"),
        (
            ["--output_dir", "OUT", "--per_device_train_batch_size", "0"],
            "--per_device_train_batch_size 0: give at leas",
        ),
        (["--output_dir", "OUT", "--show", "-1"], "--show -1: give a number from 0 up"),
        (["--output_dir", "OUT", "--limits", "10"], "below 14: the template's last line alone has 6 tokens"),
        (["--output_dir", "OUT", "--max_length", "9999"], "the model has only 256 positions; give at most 256"),
        (["--output_dir", "OUT", "--limts", "64"], "unknown flag --limts; did you mean 'limits'?"),
        (["--output_dir", "FILE"], "is a file; name a folder"),
    ],
)
def test_mistakes_are_told(script, repeated_files, tmp_path, flags, message):
    (tmp_path / "file").write_text("")
    places = {"OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "file")}
    with pytest.raises(UserError) as caught:
        script.main(arguments(repeated_files, *(places.get(flag, flag) for flag in flags)))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_records_are_reported_as_training_reports_them(tmp_path):
    (tmp_path / "bad.json").write_text('[{"instruction": "Why?", "output": ""}, {"instruction": "", "output": "x"}]')
    flags = ["--tokenizer_name", str(DEMO / "base"), "--data", str(tmp_path / "bad.json"), "--output_dir", "unused"]
    done = run(*flags, cache=tmp_path, expect=1)
    assert (
        "bad.json row 0: 'output' is empty" in done.stderr and "bad.json row 1: 'instruction' is empty" in done.stderr
    )
    assert "Traceback" not in done.stderr and not (ROOT / "unused").exists()
