"""A plain Accelerate loop whose loss is exact: the mean over the supervised tokens of the whole optimizer step.

    python examples/accelerate_loop.py
    accelerate launch --config_file configs/accelerate/two_processes.yaml examples/accelerate_loop.py

The usual loop averages each micro-batch over its own tokens, and then averages the micro-batches. So a token in a short
micro-batch weighs more than one in a long one, and the result depends on how records are batched. Here the targets of a
step are counted first, over all micro-batches and processes, so both commands take the same steps.
"""

import argparse
from contextlib import nullcontext
from itertools import islice

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from recipe.collator import IGNORE_INDEX, DataCollatorForInstructionTuning
from recipe.config import DataArguments
from recipe.data import load_splits

RECORDS_PER_STEP, BATCH_SIZE, EPOCHS = 32, 4, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="recipe/demo/records/train.jsonl", help="a file, a folder or a Hub id")
    parser.add_argument("--model", default="recipe/demo/base", help="a folder or a Hub id")
    options = parser.parse_args()

    # cpu: without it, processes without a GPU do not find each other, and each trains its own model.
    # No gradient_accumulation_steps: accelerate would divide the loss by it again.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
    with accelerator.main_process_first():  # the others read its cache
        splits = load_splits(DataArguments(data=options.data), tokenizer)
    records = splits["train"].select(range(32))  # a few, to be done in seconds; without `select`, all
    loader = DataLoader(
        records.select_columns(["input_ids", "labels"]),  # all that the model takes
        batch_size=BATCH_SIZE,
        shuffle=True,
        collate_fn=DataCollatorForInstructionTuning(pad_token_id=tokenizer.eos_token_id),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    accumulated = RECORDS_PER_STEP // (BATCH_SIZE * accelerator.num_processes)
    accelerator.print(f"{accelerator.num_processes} process(es) x {accumulated} micro-batches x {BATCH_SIZE} records")
    step = 0
    for _ in range(EPOCHS):
        batches = iter(loader)
        while micro_batches := list(islice(batches, accumulated)):
            targets = torch.stack([(batch["shift_labels"] != IGNORE_INDEX).sum() for batch in micro_batches]).sum()
            targets = accelerator.reduce(targets, reduction="sum")
            total = torch.zeros((), device=accelerator.device)
            for batch in micro_batches:
                last = batch is micro_batches[-1]
                with nullcontext() if last else accelerator.no_sync(model):  # gradients are exchanged once a step
                    loss = model(**batch, num_items_in_batch=targets).loss  # the sum over this batch / targets
                    accelerator.backward(loss * accelerator.num_processes)  # DDP takes the mean over processes
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            loss = accelerator.reduce(total, reduction="sum")
            accelerator.print(f"step {step}  targets {targets}  loss {loss:.4f} nats per target")
    # Delete DDP's reducer before the process group. If it owned the group last, it would wait for gloo's threads while
    # holding Python's lock, which one of them may need: pytorch issue 56297.
    accelerator.wait_for_everyone()
    del model
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
