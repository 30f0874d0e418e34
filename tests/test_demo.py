"""The embedded default: records that are built as committed, and a base that continues text."""

import json
from collections import Counter

import pytest
import torch
from conftest import DEMO

from recipe.demo.build_records import build_records
from recipe.generation import generate_responses

SPLITS = ("train", "validation", "test", "test_unseen")


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict[str, str]]]:
    return {
        split: [json.loads(line) for line in (DEMO / "records" / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in SPLITS
    }


def test_committed_records_are_what_the_builder_builds(records):
    assert build_records() == records


def test_another_seed_gives_other_records(records):
    assert build_records(seed=1)["train"] != records["train"]


def test_every_family_stands_in_every_split(records):
    families = {record["family"] for record in records["train"]}
    assert len(families) == 14
    for split in SPLITS:
        counts = Counter(record["family"] for record in records[split])
        assert counts.keys() == families
        assert max(counts.values()) - min(counts.values()) <= 1
    assert sum(len(split) for split in records.values()) == 4000


def test_no_prompt_stands_twice(records):
    prompts = [(r["instruction"].lower(), r["input"].lower()) for split in records.values() for r in split]
    assert len(prompts) == len(set(prompts))


def test_test_unseen_has_phrasings_and_words_that_training_never_saw(records):
    assert not {r["instruction"] for r in records["test_unseen"]} & {r["instruction"] for r in records["train"]}
    seen = {word.strip('.,?:"').lower() for r in records["train"] for word in " ".join(r.values()).split()}
    for record in records["test_unseen"]:
        words = {word.strip('.,?:"').lower() for word in f"{record['instruction']} {record['input']}".split()}
        assert words - seen, record
    known = {word.strip('.,?:"').lower() for r in records["test"] for word in " ".join(r.values()).split()}
    assert known <= seen


def test_base_is_small_and_its_end_of_text_token_is_the_last(demo_model, demo_tokenizer):
    assert sum(file.stat().st_size for file in (DEMO / "base").iterdir()) <= 5_000_000
    assert 1_500_000 <= demo_model.num_parameters() <= 2_500_000
    assert demo_tokenizer.eos_token == "<|endoftext|>"
    assert demo_tokenizer.eos_token_id == len(demo_tokenizer) - 1 == demo_model.config.vocab_size - 1
    assert not list((DEMO / "base").glob("*.bin"))


def test_base_continues_a_text(demo_model, demo_tokenizer):
    """It knows its few words: a sentence goes on as one, and far likelier than with its words shuffled."""
    [response] = generate_responses(demo_model, demo_tokenizer, ["The teacher walks to the"], max_new_tokens=6)
    assert "." in response.text

    def loss(text: str) -> float:
        ids = torch.tensor([demo_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return demo_model(input_ids=ids, labels=ids).loss.item()

    assert loss("Anna walked to the park in the morning.") + 1 < loss("park Anna the in walked morning. the to")
