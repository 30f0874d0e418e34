"""Both collators on the same records: the same loss and gradients, fewer tokens to compute.

    python examples/both_collators.py
    python examples/both_collators.py --data my_records.json --model openai-community/gpt2

`DataCollatorForInstructionTuning` pads. `DataCollatorWithSharedPrefix` lays the batch out as one row that holds the
common start of the prompts once: with a mask, for any model with SDPA attention, or as segments, for models loaded
with the attention that `recipe.attention` registers.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe import attention
from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import DataArguments
from recipe.data import load_splits


def loss_and_gradients(model: torch.nn.Module, batch: dict) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss  # nats, the mean over the supervised tokens
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="recipe/demo/records/train.jsonl", help="a file, a folder or a Hub id")
    parser.add_argument("--model", default="recipe/demo/base", help="a folder or a Hub id")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    splits = load_splits(DataArguments(data=options.data), tokenizer)
    records = list(splits["train"].select(range(32)).select_columns(["input_ids", "labels"]))
    pad = tokenizer.eos_token_id
    layouts = {
        "padded": (DataCollatorForInstructionTuning(pad), "sdpa"),
        "shared prefix, mask": (DataCollatorWithSharedPrefix(pad, attention="mask"), "sdpa"),
        "shared prefix, segments": (DataCollatorWithSharedPrefix(pad, attention="segments"), attention.NAME),
    }
    print(f"{'layout':<25}{'tokens computed':>15}{'loss':>12}   largest difference of a gradient")
    padded: list[torch.Tensor] = []
    for name, (collate, kind) in layouts.items():
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.float32, attn_implementation=kind, trust_remote_code=False
        )
        batch = collate(records)
        loss, gradients = loss_and_gradients(model, batch)
        padded = padded or gradients
        pairs = zip(gradients, padded, strict=True)  # for each weight tensor, relative to its largest gradient
        difference = max(((new - old).abs().max() / old.abs().max()).item() for new, old in pairs)
        print(f"{name:<25}{batch['input_ids'].numel():>15,}{loss:>12.6f}   {difference:.1e}")


if __name__ == "__main__":
    main()
