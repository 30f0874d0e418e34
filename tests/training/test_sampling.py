"""Which records form a batch: each once an epoch, by seed and epoch alone, and training with them is exact."""

import doctest
import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from conftest import DEMO
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import recipe.training.sampling
from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.trainer import InstructionTrainer
from recipe.training.sampling import (
    CollateShare,
    DealtBatches,
    TokenBudgetBatches,
    common_start,
    example_lengths,
    plan_batches,
    record_lengths,
)

Batches = DealtBatches | TokenBudgetBatches


def make_lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).gamma(3, 20, count), 2, 400).astype(np.int64)


def plan(
    lengths: np.ndarray, order: str, batch_size: int, processes: int = 1, accumulated: int = 1, seed: int = 3, **changes
) -> Batches:
    """The batches that a run with these settings would plan on so many processes."""
    settings = {
        "world_size": processes, "gradient_accumulation_steps": accumulated, "train_sampling_strategy": order,
        "seed": seed, "data_seed": None, "length_column_name": "length", "dataloader_drop_last": False,
    }  # fmt: skip
    dataset = Dataset.from_dict({"length": lengths})
    stock = (RandomSampler if order == "random" else SequentialSampler)(range(len(lengths)))
    return plan_batches(dataset, SimpleNamespace(**settings | changes), batch_size, lambda: stock)


def epoch_of(sampler: Batches, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def records_of(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def steps_of(batches: list[list[int]], per_step: int) -> list[list[int]]:
    """The records of each optimizer step, which takes `per_step` batches, of all processes and micro-batches."""
    return [sorted(records_of(batches[start : start + per_step])) for start in range(0, len(batches), per_step)]


def padded_cost(lengths: np.ndarray, batch: list[int]) -> int:
    """Tokens the model computes: the last token of a record is a target only."""
    return len(batch) * (max(lengths[index] for index in batch) - 1)


def test_docstring():
    assert doctest.testmod(recipe.training.sampling) == (0, 6)


# --- plan -----------------------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))  # batch, processes, accumulated
ORDERS = st.sampled_from(["random", "sequential", "group_by_length"])


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 70), SIZES, ORDERS, st.integers(0, 3), st.booleans())
def test_every_epoch_holds_each_record_once_in_the_steps_of_one_process(count, sizes, order, epoch, drop_last):
    batch_size, processes, accumulated = sizes
    lengths, at_once = make_lengths(count), batch_size * processes
    if drop_last and count < at_once:
        with pytest.raises(ValueError, match=f"{count} records fill no batch of {batch_size} on {processes} process"):
            plan(lengths, order, *sizes, dataloader_drop_last=True)
        return
    sampler = plan(lengths, order, *sizes, dataloader_drop_last=drop_last)
    batches = epoch_of(sampler, epoch)
    records = records_of(batches)
    assert len(records) == len(set(records)) == (count - count % at_once if drop_last else count)
    assert set(records) <= set(range(count))
    assert len(batches) == len(sampler) and len(batches) % processes == 0
    whole, last = batches[:-processes], [len(batch) for batch in batches[-processes:]]
    assert all(len(batch) == batch_size for batch in whole) and max(last) <= batch_size
    assert (max(last) - min(last) <= 1 and min(last) == batch_size) or not drop_last
    one = plan(lengths, order, at_once, accumulated=accumulated, dataloader_drop_last=drop_last)
    steps = steps_of(batches, processes * accumulated)
    assert steps == steps_of(epoch_of(one, epoch), accumulated)
    if not drop_last:  # nor does it matter how a step is cut into micro-batches
        assert steps == steps_of(epoch_of(plan(lengths, order, at_once * accumulated), epoch), 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70), st.sampled_from([1, 2, 3, 5, 8]), st.integers(400, 2000), st.integers(0, 3))
def test_every_epoch_of_a_token_budget_holds_each_record_once_within_the_budget(count, processes, budget, epoch):
    lengths = make_lengths(count)
    sampler = TokenBudgetBatches(lengths, budget, num_processes=processes)
    batches = epoch_of(sampler, epoch)
    assert sorted(records_of(batches)) == list(range(count))
    assert len(batches) == len(sampler) and len(batches) % processes == 0
    assert max(padded_cost(lengths, batch) for batch in batches if batch) <= budget
    assert batches.count([]) < processes and (all(batches) or max(map(len, batches)) == 1)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_one_process_in_random_order_takes_the_batches_of_the_stock_trainer(tmp_path, accumulated):
    rows = Dataset.from_dict({"labels": list(range(23))})
    for data_seed in (None, 11):
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, seed=7, data_seed=data_seed, per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulated, remove_unused_columns=False,
        )  # fmt: skip
        stock = Trainer(torch.nn.Linear(1, 1), args, train_dataset=rows, data_collator=list).get_train_dataloader()
        sampler = plan(np.full(23, 9), "random", 4, accumulated=accumulated, seed=7, data_seed=data_seed)
        for epoch in range(3):
            stock.set_epoch(epoch)
            assert epoch_of(sampler, epoch) == [[feature["labels"] for feature in batch] for batch in stock]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 11, 24])
def test_accelerate_gives_each_process_its_share_and_skips_into_the_right_epoch(count, processes):
    """Its own loaders, prepared and told the epoch as the Trainer does it."""
    for order in ("random", "sequential", "group_by_length", "budget"):
        changes = {"max_tokens_per_batch": 400} if order == "budget" else {}
        expected = epoch_of(plan(make_lengths(count), order, 2, processes, **changes), 1)
        for process in range(processes):
            sampler = plan(make_lengths(count), order, 2, processes, **changes)
            loader = prepare_data_loader(
                DataLoader(range(count), batch_sampler=sampler, collate_fn=list),
                num_processes=processes, process_index=process, use_seedable_sampler=True,
            )  # fmt: skip
            loader.set_sampler(sampler)
            assert len(loader) * processes == len(sampler)
            for skipped in range(min(4, len(loader))):
                each = skip_first_batches(loader, skipped) if skipped else loader
                each.set_epoch(1)
                assert list(each) == expected[process::processes][skipped:]


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_an_empty_share_becomes_a_batch_that_weighs_nothing(layout):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "row": 12}, {"input_ids": [5, 6], "row": 13}]
    collate = {"padded": DataCollatorForInstructionTuning, "shared_prefix": DataCollatorWithSharedPrefix}[layout](0)
    share = CollateShare(collate, rows)
    whole, nothing = share(rows), share([])
    assert {name: str(value) for name, value in whole.items()} == {k: str(v) for k, v in collate(rows).items()}
    assert nothing["input_ids"].tolist() == [[5, 6, 7]] and "row" not in nothing
    assert (nothing["labels"] == -100).all() and (nothing["shift_labels"] == -100).all()
    assert nothing["lengths"].sum() == 0 and whole["lengths"].tolist() == [3, 1]


def test_batches_hold_records_of_like_length_and_fill_the_budget():
    lengths, budget = make_lengths(20_000), 4096
    batches = list(TokenBudgetBatches(lengths, budget))
    computed, real = sum(padded_cost(lengths, batch) for batch in batches), (lengths - 1).sum()
    random_order = np.random.default_rng(0).permutation(20_000).reshape(-1, 40)
    random_cost = sum(padded_cost(lengths, batch) for batch in random_order)
    assert 1 - real / computed < 0.07 < 0.5 < 1 - real / random_cost
    assert np.mean([padded_cost(lengths, batch) for batch in batches]) > 0.9 * budget
    rounded = {(len(batch), -(-(lengths[batch].max() - 1) // 8) * 8) for batch in batches}
    assert len(rounded) <= len(np.unique(-(-(lengths - 1) // 8))) + 1  # shapes repeat
    grouped = sum(padded_cost(lengths, batch) for batch in plan(lengths, "group_by_length", 40))
    assert 1 - real / grouped < 0.1


def test_batches_depend_on_seed_and_epoch_and_on_nothing_else():
    lengths = make_lengths(5000)
    ways = [{"order": "random"}, {"order": "group_by_length"}, {"order": "budget", "max_tokens_per_batch": 1000}]
    for way in ways:
        again = plan(lengths, batch_size=16, **way)
        expected = epoch_of(plan(lengths, batch_size=16, **way), 2)
        torch.manual_seed(99)
        np.random.seed(99)  # noqa: NPY002 - the global state it must not read
        epoch_of(again, 7)
        assert epoch_of(again, 2) == epoch_of(again, 2) == expected
        again_together = {frozenset(batch) for batch in expected} & {frozenset(batch) for batch in epoch_of(again, 3)}
        assert len(again_together) < 0.05 * len(again)  # the longest, which have no others of their width
        assert epoch_of(plan(lengths, batch_size=16, **way, seed=4), 2) != expected


def test_the_batches_of_a_step_cost_alike_on_all_processes():
    lengths = make_lengths(5000)
    for changes in ({}, {"max_tokens_per_batch": 1024}):
        batches = list(plan(lengths, "group_by_length", 8, processes=4, **changes))
        costs = np.array([padded_cost(lengths, batch) for batch in batches]).reshape(-1, 4)  # (steps, processes)
        assert np.mean(costs.max(axis=1) / costs.mean(axis=1)) < 1.06


@pytest.mark.parametrize("order", ["random", "group_by_length", "budget"])
def test_half_a_million_records_are_planned_in_a_second(order):
    lengths = Dataset.from_dict({"length": make_lengths(500_000)})
    start = time.perf_counter()
    changes = {"max_tokens_per_batch": 4096} if order == "budget" else {}
    batches = list(plan(record_lengths(lengths), order, 32, **changes))
    assert time.perf_counter() - start < 1.5 and len(batches) > 5000


def test_drop_last_leaves_out_other_records_in_each_epoch():
    for order in ("random", "group_by_length"):
        sampler = plan(make_lengths(30), order, 4, processes=2, dataloader_drop_last=True)
        epochs = [epoch_of(sampler, epoch) for epoch in range(4)]
        for batches in epochs:
            assert [len(batch) for batch in batches] == [4] * 6 and len(set(records_of(batches))) == 24
        assert len({frozenset(records_of(batches)) for batches in epochs}) > 1


def test_a_record_that_no_batch_may_hold_is_named():
    lengths = np.array([5, 102, 7])
    assert [1] in list(TokenBudgetBatches(lengths, 101))  # rounded up to 104, but it is 101
    with pytest.raises(ValueError, match="record 1 alone has 101 input tokens, and max_tokens_per_batch is 100"):
        TokenBudgetBatches(lengths, 100)


def test_lengths_come_from_their_column_in_the_order_of_the_rows():
    lengths = make_lengths(50)
    dataset = Dataset.from_dict({"length": lengths, "input_ids": [[1]] * 50})
    assert record_lengths(dataset).tolist() == lengths.tolist()
    assert record_lengths(dataset.select([3, 1])).tolist() == lengths[[3, 1]].tolist()
    with pytest.raises(ValueError, match="no column 'size' in the training data"):
        record_lengths(dataset, "size")
    for without in ([{"input_ids": [1, 2], "length": 2}], dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match="no column 'length'"):
            record_lengths(without)


# --- what a token budget counts --------------------------------------------------------------------------------------


def branching_rows(count: int, seed: int, start: int = 3) -> list[dict]:
    """Rows of one to four examples, which begin with the same `start` tokens and often go on alike."""
    draw, rows = np.random.default_rng(seed), []
    for number in range(count):
        examples = [
            [1] * start + draw.integers(2, 4, draw.integers(2, 30)).tolist() for _ in range(draw.choice([1, 1, 2, 4]))
        ]
        ids = records_of(examples)
        ends = np.cumsum([len(each) for each in examples]).tolist()
        starts = {tuple(each[: end + 1]) for each in examples for end in range(len(each) - 1)}  # each input once
        rows.append({"input_ids": ids, "labels": ids, "length": len(ids), "row": number, "inputs": len(starts),
                     "ends": ends if len(ends) > 1 else None})  # fmt: skip
    return rows


def examples_of(row: dict) -> list[list[int]]:
    ends = row["ends"] or [row["length"]]
    return [row["input_ids"][a:b] for a, b in itertools.pairwise([0, *ends])]


@pytest.mark.parametrize("multiple", [None, 32])
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("layout", [DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix])
def test_no_batch_of_conversations_is_over_the_budget_in_its_layout(layout, processes, multiple):
    """By the batches that the collators make; and a batch could not hold the next record of its kind too."""
    for seed in range(4):
        rows = branching_rows(80, seed)
        collate = layout(0, pad_to_multiple_of=multiple)
        settings = SimpleNamespace(
            world_size=processes, seed=seed, data_seed=None, max_tokens_per_batch=300, length_column_name="length"
        )
        sampler = plan_batches(Dataset.from_list(rows), settings, 8, lambda: None, collate)
        for epoch in range(3):
            batches = epoch_of(sampler, epoch)
            assert sorted(records_of(batches)) == list(range(80)) and len(batches) == len(sampler)
            assert len(batches) % processes == 0
            sizes = [collate([rows[index] for index in batch])["input_ids"].numel() for batch in batches if batch]
            assert max(sizes) <= 300
            assert np.median(sizes) > (150 if multiple else 200)  # and it is used


def test_the_costs_of_records_are_those_of_their_examples():
    rows = branching_rows(50, seed=1)
    longest, in_a_row, counts = example_lengths(Dataset.from_list(rows))
    assert longest.tolist() == [max(map(len, examples_of(row))) for row in rows]
    assert counts.tolist() == [len(examples_of(row)) for row in rows]
    assert in_a_row.tolist() == [row["inputs"] + 1 for row in rows]
    for row, length in zip(rows, in_a_row.tolist(), strict=True):
        assert DataCollatorWithSharedPrefix(0, "segments")([row])["input_ids"].numel() == length - 1
    without = Dataset.from_list(rows).remove_columns("inputs")  # of others: nothing is known to be shared
    assert example_lengths(without)[1].tolist() == [row["length"] - len(examples_of(row)) + 1 for row in rows]
    plain = Dataset.from_list(rows).remove_columns(["inputs", "ends"])
    assert [each.tolist() for each in example_lengths(plain)] == [[row["length"] for row in rows]] * 2 + [[1] * 50]


@pytest.mark.parametrize("start", [0, 3])
def test_what_all_records_begin_with_is_counted_once(start):
    rows = branching_rows(60, seed=2, start=start)
    firsts = [examples_of(row)[0][:-1] for row in rows]
    same = [len(set(tokens)) == 1 for tokens in zip(*firsts, strict=False)]
    common = same.index(False) if False in same else len(same)
    assert common_start(Dataset.from_list(rows)) == common >= start
    plain = Dataset.from_list(rows).remove_columns("ends")
    assert common_start(plain) == common and common_start(plain.select([7])) == rows[7]["length"] - 1


def test_a_conversation_that_no_batch_may_hold_is_named_with_its_examples():
    lengths, examples = np.array([5, 31, 7]), np.array([1, 4, 9])
    TokenBudgetBatches(lengths, 120, examples=examples)
    with pytest.raises(ValueError, match="record 1 alone has 120 input tokens, and max_tokens"):
        TokenBudgetBatches(lengths, 119, examples=examples)
    assert len(TokenBudgetBatches(lengths, 30, examples=examples, shared=0)) == 2
    with pytest.raises(ValueError, match="record 1 alone has 64 input tokens, and max_tokens_per_batch is 63; give at"):
        TokenBudgetBatches(np.array([5, 41, 7]), 63, shared=0, multiple=32)  # the collator would round its row up


# --- data and samplers of other projects ----------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Rows that are made when they are asked for."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"input_ids": [index, 9, 9], "labels": [-100, 9, 9], "unknown": "text"}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([Rows()[index] for index in range(7)])


def loader_for(dataset, tmp_path, trainer_class=InstructionTrainer, **changes):
    args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=3, max_steps=9, **changes)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base")
    return trainer_class(
        model, args, data_collator=DataCollatorForInstructionTuning(0), train_dataset=dataset
    ).get_train_dataloader()


def first_tokens(loader) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in loader]


def test_other_datasets_and_samplers_are_dealt_too_and_streams_keep_the_stock_loader(tmp_path):
    class Backwards(InstructionTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return range(len(self.train_dataset))[::-1]

    sequential = {"train_sampling_strategy": "sequential"}
    assert first_tokens(loader_for(Rows(), tmp_path, **sequential)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert sorted(records_of(first_tokens(loader_for(Rows(), tmp_path, dataloader_num_workers=1)))) == list(range(7))
    assert first_tokens(loader_for(Rows(), tmp_path, Backwards)) == [[6, 5, 4], [3, 2, 1], [0]]
    assert first_tokens(loader_for(Stream(), tmp_path)) == [[0, 1, 2], [3, 4, 5], [6]]
    removed = loader_for(Dataset.from_list(list(Stream())), tmp_path, remove_unused_columns=True)
    assert removed.dataset.column_names == ["input_ids", "labels"]


@pytest.mark.parametrize(
    "changes",
    [{"dispatch_batches": True}, {"split_batches": True}, {"even_batches": False}, {"use_seedable_sampler": False}],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_share_out_records_in_another_way_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=f"accelerator_config: {next(iter(changes))} .*; leave it out"):
        loader_for(Rows(), tmp_path, accelerator_config=changes)


def test_a_strategy_that_repeats_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_rebalance repeats records"):
        loader_for(Rows(), tmp_path, train_sampling_strategy="batch_rebalance")
