"""The stock `transformers.Trainer` with this recipe's collator, on a Llama architecture.

    python examples/stock_trainer_llama.py
    python examples/stock_trainer_llama.py --data my_records.json --model meta-llama/Llama-3.2-1B

No subclass is needed: `labels` and `shift_labels` of a batch are the same, already shifted tensor, which transformers
does not shift again. The loss of a step is the mean over the supervised tokens of all its micro-batches.
"""

import argparse

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import DataArguments
from recipe.data import load_splits


def make_llama(vocabulary: int) -> LlamaForCausalLM:
    set_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped-query attention, as in Llama 3
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="recipe/demo/records/train.jsonl", help="a file, a folder or a Hub id")
    parser.add_argument("--model", help="a folder or a Hub id; default: a small Llama with random weights")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model or "recipe/demo/base", trust_remote_code=False)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
    else:
        model = make_llama(len(tokenizer))
    splits = load_splits(DataArguments(data=options.data), tokenizer)
    records = splits["train"].select(range(32))  # a few, to be done in seconds; without `select`, all

    arguments = TrainingArguments(
        "outputs/stock_trainer_llama",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        max_steps=5,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    collator = DataCollatorForInstructionTuning(pad_token_id=tokenizer.eos_token_id)
    trainer = Trainer(model, arguments, train_dataset=records, data_collator=collator)
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"\n{type(model).__name__}, {model.num_parameters():,} parameters, 8 records x 4 micro-batches a step")
    print("loss of each step, nats per supervised token:", *(f"{loss:.4f}" for loss in losses))


if __name__ == "__main__":
    main()
