"""Several sources in one run: shares as asked, no leak, the same by seed; losses of each as computed apart."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import DataArguments, InstructionTrainingArguments, UserError
from recipe.data import encode_records, load_records, load_splits
from recipe.data.mixture import mix
from recipe.data.origin import origin, rows_in_words
from recipe.trainer import InstructionTrainer


def write(path, count, tag, columns=("instruction", "output"), **more):
    rows = [
        {columns[0]: f"Say {tag} {i}.", columns[1]: f"{tag} {i}" + " and so on" * (i % 3)} | more for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(sources, **options) -> DataArguments:
    return DataArguments(data=sources, **{"validation_ratio": 0, "test_ratio": 0, "template": "phi3", **options})


def text_of(tokenizer, record) -> str:
    return tokenizer.decode([token for token in record["labels"] if token != -100], skip_special_tokens=True)


def tags(splits, tokenizer, split="train") -> Counter:
    return Counter(text_of(tokenizer, record).split()[0] for record in splits[split])


@pytest.fixture
def three(tmp_path) -> list[dict]:
    return [
        {"path": write(tmp_path / "a.jsonl", 100, "apple"), "weight": 2},
        {"path": write(tmp_path / "b.jsonl", 40, "berry", ("question", "answer")), "weight": 1,
         "columns": {"instruction": "question", "output": "answer"}},
        {"path": write(tmp_path / "c.jsonl", 700, "cherry"), "weight": 0.5},
    ]  # fmt: skip


def test_shares_are_those_asked_for(three, demo_tokenizer):
    """840 records: 2/3.5, 1/3.5 and 0.5/3.5 of them."""
    found = tags(load_splits(config(three), demo_tokenizer), demo_tokenizer)
    assert found == {"apple": 480, "berry": 240, "cherry": 120}
    weights = {"apple": Fraction(2), "berry": Fraction(1), "cherry": Fraction(1, 2)}
    for tag, weight in weights.items():
        assert abs(found[tag] / 840 - weight / sum(weights.values())) < 0.01


def test_what_repeats_repeats_evenly_and_the_rest_is_drawn_once(three, demo_tokenizer):
    encoded = encode_records(load_records(config(three))[0], demo_tokenizer, config(three))
    mixed, told = mix(encoded, config(three))
    texts = Counter(text_of(demo_tokenizer, record) for record in mixed["train"])
    times = {
        tag: Counter(n for text, n in texts.items() if text.startswith(tag)) for tag in ("apple", "berry", "cherry")
    }
    assert times == {"apple": {4: 20, 5: 80}, "berry": {6: 40}, "cherry": {1: 120}}
    assert [(row["source"], row["records"], row["used"], row["repeated"], row["left_out"]) for row in told] == [
        ("a", 100, 480, 4.8, 0), ("b", 40, 240, 6.0, 0), ("c", 700, 120, 0.1714, 580)
    ]  # fmt: skip
    for row, tag in zip(told, ("apple", "berry", "cherry"), strict=True):
        records = [r for r in mixed["train"] if text_of(demo_tokenizer, r).startswith(tag)]
        assert row["tokens"] == sum(len(r["input_ids"]) for r in records)
        assert row["supervised"] == sum(label != -100 for r in records for label in r["labels"][1:])


def test_the_seed_alone_decides(three, demo_tokenizer):
    one, again, other = (
        load_splits(config(three, split_seed=seed), demo_tokenizer)["train"]["row"] for seed in (1, 1, 2)
    )
    assert one == again and one != other and sorted(set(one)) != sorted(set(other))
    # an order that takes the records as they stand meets all sources throughout
    sources = [sum(row < 100 for row in part) for part in np.array_split(one, 4)]
    assert all(90 < count < 150 for count in sources) and sum(sources) == 480


def test_counts_and_whole_sources(three, demo_tokenizer):
    sources = [{key: value for key, value in source.items() if key != "weight"} for source in three]
    sources[0]["count"], sources[2]["count"] = 250, 30
    found = tags(load_splits(config(sources), demo_tokenizer), demo_tokenizer)
    assert found == {"apple": 250, "berry": 40, "cherry": 30}


def test_another_mix_tokenizes_nothing_again(three, demo_tokenizer):
    ways = [config(three), config([{**source, "weight": 1} for source in three])]
    encoded = [encode_records(load_records(way)[0], demo_tokenizer, way)["train"] for way in ways]
    assert encoded[0].cache_files == encoded[1].cache_files and encoded[0].cache_files
    assert len(mix(DatasetDict(train=encoded[1]), ways[1])[0]["train"]) == 840


def test_each_source_is_split_before_it_is_mixed_and_nothing_leaks(tmp_path, three, demo_tokenizer):
    """Records that two sources share, and one that names its own test split."""
    own = tmp_path / "own"
    own.mkdir()
    write(own / "train.jsonl", 50, "date")
    write(own / "test.jsonl", 7, "elder")
    shared = tmp_path / "shared.jsonl"
    shared.write_text((tmp_path / "a.jsonl").read_text() + (tmp_path / "c.jsonl").read_text())
    sources = [*three, {"path": str(own), "weight": 1}, {"path": str(shared), "weight": 1}]
    way = config(sources, validation_ratio=0.1, test_ratio=0.1)
    records, left_out = load_records(way)
    texts = {name: {record["instruction"] for record in split} for name, split in records.items()}
    assert list(records) == ["train", "validation", "test"] and left_out.duplicates
    assert not texts["train"] & (texts["validation"] | texts["test"]) and not texts["validation"] & texts["test"]
    by_source = Counter(record["family"] for record in records["test"])
    assert by_source == {"a": 10, "b": 4, "c": 70, "own": 7, "shared": 80}
    alone, _ = load_records(config(three[0]["path"], validation_ratio=0.1, test_ratio=0.1))
    assert {r["instruction"] for r in records["test"] if r["family"] == "a"} == set(alone["test"]["instruction"])
    mixed = load_splits(way, demo_tokenizer)
    assert not {text_of(demo_tokenizer, r) for r in mixed["train"]} & {
        text_of(demo_tokenizer, r) for r in mixed["test"]
    }


def test_conversations_and_families_keep_what_they_say(tmp_path, three, demo_tokenizer):
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "fig"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "".join(json.dumps({"messages": [{**chat[0], "content": f"Hi {i}."}, chat[1]]}) + "\n" for i in range(9))
    )
    named = {"path": write(tmp_path / "d.jsonl", 9, "grape", family="fruit"), "name": "extra", "weight": 1}
    sources = [three[0], named, {"path": str(chats), "weight": 1}]
    records, _ = load_records(config(sources, test_ratio=0.2))
    assert set(records["test"]["family"]) == {"a", "fruit", "chats"}
    assert set(tags(load_splits(config(sources), demo_tokenizer), demo_tokenizer)) == {"apple", "grape", "fig"}


def test_bad_records_of_all_sources_are_in_one_report(tmp_path, three):
    (tmp_path / "a.jsonl").open("a").write('{"instruction": "Say.", "output": 3}\n')
    (tmp_path / "c.jsonl").open("a").write('{"instruction": " ", "output": "x"}\n')
    with pytest.raises(UserError) as error:
        load_records(config(three))
    first, one, other = str(error.value).splitlines()
    assert first.startswith("2 problems in the data")
    assert one.startswith(f"{tmp_path / 'a.jsonl'} row 100: 'output' is 3 (int)")
    assert other.startswith(f"{tmp_path / 'c.jsonl'} row 700: 'instruction' is blank")
    records, left_out = load_records(config(three, bad_records="drop", validation_ratio=0.1))
    assert [(bad["file"], bad["row"]) for bad in left_out.bad] == [
        (str(tmp_path / "a.jsonl"), 100), (str(tmp_path / "c.jsonl"), 700)
    ]  # fmt: skip
    for name, split in records.items():  # each record is where its number says
        for record in split.select(range(0, len(split), 7)):
            found = origin(split, record["row"], name)
            lines = Path(found["file"]).read_text(encoding="utf-8").splitlines()
            assert record["instruction"] in json.loads(lines[found["row"]]).values()
    train = records["train"]
    assert rows_in_words(train, [train[0]["row"], train[-1]["row"]]).count(".jsonl row ") == 2


@pytest.mark.parametrize(
    "change, said",
    [
        ({"weight": 0}, "data, source 1: weight 0 is not a number above 0"),
        ({"weight": True}, "data, source 1: weight True is not a number above 0"),
        ({"count": 5}, "data, source 1: it has a weight and a count; give one of them"),
        ({"weight": None, "count": 0.5}, "data, source 1: count 0.5 is not a whole number above 0"),
        ({"weight": None}, "data: 'a', 'c' has a weight and 'b' has none; give all sources a weight"),
        ({"wieght": 2}, "data, source 1: unknown key 'wieght'; a source has path, name, weight, count, columns"),
        ({"columns": {"answer": "output"}}, "data, source 1: columns {'answer': 'output'}; give a mapping from"),
        ({"columns": {"output": 3}}, "data, source 1: a column, and the path, are names"),
        ({"name": "a"}, "data: two sources are called 'a'; give each a name of its own"),
        ({"name": "a b"}, "data, source 1: name 'a b'; give it a name of letters"),
        ({"weight": 1e-9}, "data, source 'b': less than one record, by its weight 1e-09"),
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused(three, demo_tokenizer, change, said):
    three[1] |= change
    with pytest.raises(UserError) as error:
        load_splits(config(three), demo_tokenizer)
    assert str(error.value).startswith(said)


def test_an_entry_that_is_a_file_alone_is_refused(three):
    with pytest.raises(UserError, match=r"data, source 3: 'more\.json' is no source; write"):
        load_records(config([*three, "more.json"]))


@pytest.mark.parametrize("batch_size", [3, 64])
def test_loss_by_source_is_the_loss_of_that_source_apart(tmp_path, three, demo_model, demo_tokenizer, batch_size):
    """Beside an evaluation of each source's validation records alone, and Hugging Face's own loss of each record."""
    splits = load_splits(config(three, validation_ratio=0.1), demo_tokenizer)
    collator = DataCollatorForInstructionTuning(demo_tokenizer.eos_token_id)
    args = InstructionTrainingArguments(str(tmp_path / "run"), per_device_eval_batch_size=batch_size, use_cpu=True,
                                        report_to=[], disable_tqdm=True)  # fmt: skip
    trainer = InstructionTrainer(demo_model, args, data_collator=collator, eval_dataset=splits["validation"])
    metrics = trainer.evaluate()
    for tag, name in (("apple", "a"), ("berry", "b"), ("cherry", "c")):
        rows = [i for i, r in enumerate(splits["validation"]) if text_of(demo_tokenizer, r).startswith(tag)]
        apart = splits["validation"].select(rows)
        losses, targets = 0.0, 0
        for record in apart:
            ids, labels = (torch.tensor([record[key]]) for key in ("input_ids", "labels"))
            count = int((labels[:, 1:] != -100).sum())
            losses += demo_model(input_ids=ids, labels=labels).loss.item() * count
            targets += count
        assert metrics[f"eval_loss_{name}"] == pytest.approx(losses / targets, rel=1e-5)
        assert trainer.evaluate(apart)["eval_loss"] == pytest.approx(metrics[f"eval_loss_{name}"], rel=1e-6)
    assert "eval_loss_a" not in trainer.evaluate(apart)  # which has records of the last source alone
