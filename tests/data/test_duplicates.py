"""Records that appear more than once: each figure against a count by hand or by comparing all pairs."""

import itertools
import json
import random
import sys

import numpy as np
import pytest
from conftest import DEMO
from datasets import Dataset, DatasetDict

from recipe.config import DataArguments, UserError
from recipe.data import load_records
from recipe.data.duplicates import inspect_duplicates, near_duplicates

WORDS = (DEMO / "records" / "train.jsonl").read_text(encoding="utf-8").split()


def dataset(rows: list[tuple[str, str | None, str]]) -> Dataset:
    columns = dict(zip(("instruction", "input", "output"), map(list, zip(*rows, strict=True)), strict=True))
    return Dataset.from_dict({**columns, "row": np.arange(len(rows))})


def rows_of(records) -> list[tuple[str, int]]:
    return [(record["split"], record["row"]) for record in records]


def shingles_of(text: str) -> set[str]:
    plain = " ".join(text.lower().split())
    return {plain[i : i + 5] for i in range(max(1, len(plain) - 4))}


def jaccard(first: str, second: str) -> float:
    return jaccard_of_sets(shingles_of(first), shingles_of(second))


def jaccard_of_sets(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def records_of(texts: list[str]) -> list[dict]:
    return [
        {"split": "train", "row": i, "instruction": text, "input": "", "output": ""} for i, text in enumerate(texts)
    ]


def near_rows(texts: list[str], threshold: float) -> tuple[dict[tuple[int, int], float], bool]:
    """The rows of each pair, the earlier one first, and their similarity."""
    matches, complete = near_duplicates(records_of(texts), threshold)
    return {(match.other["row"], match.record["row"]): match.similarity for match in matches}, complete


def edited_texts(count: int, seed: int) -> list[str]:
    """Texts of which many are edits of others: words replaced, removed or inserted, upper and lower case exchanged."""
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


@pytest.mark.parametrize(("threshold", "seed"), [(0.5, 1), (0.7, 2), (0.8, 3), (0.95, 4), (1.0, 5)])
def test_near_duplicates_are_those_of_comparing_all_pairs(threshold, seed):
    texts = list(dict.fromkeys(edited_texts(240, seed)))
    found, complete = near_rows(texts, threshold)
    shingles = [shingles_of(text) for text in texts]
    every = {(i, j): jaccard_of_sets(shingles[i], shingles[j]) for i, j in itertools.combinations(range(len(texts)), 2)}
    assert complete and all(every[pair] == value >= threshold for pair, value in found.items())
    similar = {pair for pair, value in every.items() if value >= threshold}
    assert {pair for pair in similar if every[pair] >= min(1, threshold + 0.05)} <= found.keys()
    assert len(found) >= 0.97 * len(similar) > 20
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_similarity_in_any_script():
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
        "a" * 8,
    ]
    found, _ = near_rows(texts, 0.5)
    expected = {(i, j): jaccard(texts[i], texts[j]) for i, j in itertools.combinations(range(len(texts)), 2)}
    assert found == {pair: value for pair, value in expected.items() if value >= 0.5} and len(found) == 3


def test_near_duplicates_are_the_same_every_time():
    texts = edited_texts(200, 7)
    first, second = (near_rows(texts, 0.6) for _ in range(2))
    assert first == second and list(first[0]) == list(second[0])


def test_a_crowd_of_near_duplicates_is_found_without_comparing_all_its_pairs():
    texts = [f"{' '.join(WORDS[:60])} and at the very end there is number {i}" for i in range(400)] + ["Alone."]
    found, complete = near_rows(texts, 0.8)
    assert not complete and len(found) <= 400 * 50
    assert set(itertools.chain.from_iterable(found)) == set(range(400))
    pair = next(iter(found))
    assert found[pair] == jaccard(*(texts[i] for i in pair))


def test_no_pair_is_no_error():
    assert near_duplicates(records_of(["One thing.", "Quite another matter."]), 0.8) == ([], True)


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


def test_repeated_records_are_found_within_and_across_splits(repeated_files):
    trained, leaked = load_records(DataArguments(data=repeated_files))
    given = DatasetDict({name: dataset(rows) for name, rows in REPEATED.items()})
    report, pairs = inspect_duplicates(given, trained, 0.8, show=5)
    counts = {
        (found["records_of"], found["found_in"]): tuple(found[key] for key in ("exact", "same_prompt", "near"))
        for found in report["splits"]
    }
    assert leaked.duplicates == 1 and list(counts)[:2] == [("validation", "train"), ("test", "train")]
    assert counts == {
        ("validation", "train"): (0, 1, 0),
        ("test", "train"): (1, 1, 1),
        ("test", "validation"): (0, 0, 0),
        ("train", "train"): (1, 1, 0),
        ("validation", "validation"): (0, 0, 0),
        ("test", "test"): (0, 0, 0),
    }
    _, leak, _, within, *_ = report["splits"]
    assert [rows_of(pair["records"]) for pair in leak["examples"]["exact"]] == [[("test", 0), ("train", 4)]]
    assert [rows_of(pair["records"]) for pair in leak["examples"]["same_prompt"]] == [[("test", 2), ("train", 5)]]
    [near] = leak["examples"]["near"]
    assert rows_of(near["records"]) == [("test", 1), ("train", 3)]
    assert near["similarity"] == jaccard(*("\n".join(REPEATED[name][row]) for name, row in (("test", 1), ("train", 3))))
    assert near["records"][0]["output"] == "The capital of France is Paris!"
    assert [rows_of(pair["records"]) for pair in within["examples"]["exact"]] == [[("train", 1), ("train", 0)]]
    assert [rows_of(pair["records"]) for pair in within["examples"]["same_prompt"]] == [[("train", 2), ("train", 0)]]
    assert pairs == [{"similarity": near["similarity"], "splits": ["test", "train"], "rows": [1, 3]}]


def test_rows_are_those_of_the_source_where_a_split_was_drawn(tmp_path):
    """The test split is taken out of train: a near-duplicate is named by its row in the file."""
    draw = random.Random(3)
    rows = [(f"Question {i}: {' '.join(draw.choices(WORDS, k=9))}?", "", f"{draw.random()}") for i in range(60)]
    rows = [(f"{mark} {instruction}", text, output) for mark in "ab" for instruction, text, output in rows]
    lines = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]
    (tmp_path / "all.json").write_text(json.dumps(lines), encoding="utf-8")
    records, _ = load_records(DataArguments(data=str(tmp_path / "all.json")))
    _, pairs = inspect_duplicates(records, records, 0.8, show=0)
    assert len(pairs) == 60
    assert all(abs(one - other) == 60 for one, other in (pair["rows"] for pair in pairs))
    assert any(pair["splits"] == ["test", "train"] for pair in pairs)


def test_without_datasketch_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match="pip install datasketch, or leave them out with --near_duplicates 0"):
        near_duplicates(records_of(["a", "b"]), 0.8)
    splits = DatasetDict(train=dataset(REPEATED["train"]))
    report, pairs = inspect_duplicates(splits, splits, 0, show=1)
    assert report["threshold"] is None and "near" not in report["splits"][0] and pairs == []
    assert report["splits"][0]["exact"] == 1
