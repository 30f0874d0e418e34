"""The collator against an independent version of the seed's collate function, and against Hugging Face's own shift."""

import numpy as np
import pytest
import torch
from conftest import DEMO

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import DataArguments
from recipe.data import load_splits


def seed_collate(batch: list[list[int]], pad: int = 50256) -> tuple[torch.Tensor, torch.Tensor]:
    """Append and pad with `pad`, shift by one, mask all `pad` targets but the first: for token lists without an EOS."""
    width = max(map(len, batch)) + 1
    inputs, targets = [], []
    for tokens in batch:
        padded = torch.tensor(tokens + [pad] * (width - len(tokens)))
        target = padded[1:].clone()
        positions = (target == pad).nonzero().flatten()
        target[positions[1:]] = -100
        inputs.append(padded[:-1])
        targets.append(target)
    return torch.stack(inputs), torch.stack(targets)


def alpaca_text(record: dict[str, str]) -> str:
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{record['instruction']}"
    )
    text += f"\n\n### Input:\n{record['input']}" if record["input"] else ""
    return text + f"\n\n### Response:\n{record['output']}"


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_all_real_records_equal_the_seeds_five_steps(real_data, real_records, gpt2_tokenizer, mask_prompt):
    config = DataArguments(data=str(real_data), validation_ratio=0, test_ratio=0, mask_prompt=mask_prompt)
    encoded = load_splits(config, gpt2_tokenizer)["train"]
    assert encoded["row"][:] == list(range(1100))
    collate = DataCollatorForInstructionTuning(pad_token_id=50256)
    for start in range(0, 1100, 8):
        batch = collate([encoded[index] for index in range(start, min(start + 8, 1100))])
        records = real_records[start : start + 8]
        inputs, targets = seed_collate([gpt2_tokenizer.encode(alpaca_text(record)) for record in records])
        assert torch.equal(batch["input_ids"], inputs)
        if mask_prompt:  # everything the prompt holds is masked as well
            for row, record in enumerate(records):
                prompt = alpaca_text({**record, "output": ""})
                targets[row, : len(gpt2_tokenizer.encode(prompt)) - 1] = -100
        assert torch.equal(batch["labels"], targets)
        assert torch.equal(batch["shift_labels"], targets)
        ends = (batch["labels"] == 50256).sum(1)
        assert ends.tolist() == [1] * len(records)


def test_demo_records_equal_the_seeds_five_steps(demo_tokenizer):
    config = DataArguments(data={"train": str(DEMO / "records" / "validation.jsonl")}, test_ratio=0, mask_prompt=False)
    encoded = load_splits(config, demo_tokenizer)["train"]
    eos = demo_tokenizer.eos_token_id
    rows = [encoded[index] for index in range(16)]
    batch = DataCollatorForInstructionTuning(pad_token_id=eos)(rows)
    inputs, targets = seed_collate([row["input_ids"][:-1] for row in rows], pad=eos)
    assert torch.equal(batch["input_ids"], inputs)
    assert torch.equal(batch["labels"], targets)


ROWS = [
    {"input_ids": [1, 2, 3, 0], "labels": [-100, 2, 3, 0]},
    {"input_ids": [4, 0], "labels": [4, 0]},
]


def test_by_hand():
    batch = DataCollatorForInstructionTuning(pad_token_id=0)(ROWS)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[2, 3, 0], [0, -100, -100]],
        "shift_labels": [[2, 3, 0], [0, -100, -100]],
    }
    assert batch["shift_labels"].is_contiguous()


def test_without_shift_labels_stay_aligned():
    batch = DataCollatorForInstructionTuning(pad_token_id=0, shift=False)(ROWS)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 0], [4, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[-100, 2, 3, 0], [4, 0, -100, -100]],
    }


def test_an_end_of_text_token_inside_the_text_does_not_take_the_last_ones_place():
    row = {"input_ids": [5, 0, 6, 0], "labels": [5, 0, 6, 0]}
    longer = {"input_ids": [7] * 6, "labels": [7] * 6}
    batch = DataCollatorForInstructionTuning(pad_token_id=0)([row, longer])
    assert batch["labels"][0].tolist() == [0, 6, 0, -100, -100]


@pytest.mark.parametrize(("shift", "width"), [(True, 8), (False, 8)])
def test_width_is_a_multiple(shift, width):
    batch = DataCollatorForInstructionTuning(pad_token_id=0, shift=shift, pad_to_multiple_of=8)(ROWS)
    assert {tensor.shape for tensor in batch.values()} == {(2, width)}
    exact = {"input_ids": list(range(9)), "labels": list(range(9))}
    assert DataCollatorForInstructionTuning(0, shift, 8)([exact])["input_ids"].shape == (1, 8 if shift else 16)


def test_rows_pass_through_and_other_columns_do_not():
    batch = DataCollatorForInstructionTuning(pad_token_id=0)(
        [{**row, "row": 7 + i, "length": 3} for i, row in enumerate(ROWS)]
    )
    assert batch["row"].tolist() == [7, 8]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "shift_labels", "row", "lengths", "supervised"}
    targets = batch["labels"].flatten()
    assert targets[batch["supervised"]].tolist() == [target for target in targets if target != -100]


def test_arrays_and_tensors_are_features_too():
    expected = DataCollatorForInstructionTuning(pad_token_id=0)(ROWS)
    for convert in (np.array, torch.tensor):
        batch = DataCollatorForInstructionTuning(pad_token_id=0)(
            [{name: convert(values) for name, values in row.items()} for row in ROWS]
        )
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_without_labels_all_tokens_are_learned():
    batch = DataCollatorForInstructionTuning(pad_token_id=0)([{"input_ids": [1, 2, 0]}, {"input_ids": [1, 0]}])
    assert batch["labels"].tolist() == [[2, 0], [0, -100]]


def test_misaligned_labels_and_empty_batches_are_refused():
    with pytest.raises(ValueError, match=r"feature 1: 3 input_ids but 2 labels"):
        DataCollatorForInstructionTuning(pad_token_id=0)([ROWS[0], {"input_ids": [1, 2, 3], "labels": [1, 2]}])
    with pytest.raises(ValueError, match="at least one feature"):
        DataCollatorForInstructionTuning(pad_token_id=0)([])
