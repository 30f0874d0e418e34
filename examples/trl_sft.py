"""TRL's `SFTTrainer` with this recipe's collator.

    pip install trl
    python examples/trl_sft.py
    python examples/trl_sft.py --data my_records.json --model openai-community/gpt2

For the right loss, give it records that `load_splits` has encoded (`skip_prepare_dataset`) and the padded collator,
whose `shift_labels` TRL does not shift again. `DataCollatorWithSharedPrefix` does not work here: TRL computes the
vocabulary head itself, without `logits_to_keep`, and stops with an error about shapes.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import DataArguments
from recipe.data import load_splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="recipe/demo/records/train.jsonl", help="a file, a folder or a Hub id")
    parser.add_argument("--model", default="recipe/demo/base", help="a folder or a Hub id")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
    splits = load_splits(DataArguments(data=options.data), tokenizer)
    records = splits["train"].select(range(32))  # a few, to be done in seconds; without `select`, all

    arguments = SFTConfig(
        "outputs/trl_sft",
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        max_steps=5,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        bf16=False,  # TRL's default is True
        gradient_checkpointing=False,  # TRL's default is True: less memory, more time
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=records,
        data_collator=DataCollatorForInstructionTuning(pad_token_id=tokenizer.eos_token_id),
        processing_class=tokenizer,
    )
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("\nloss of each step, nats per supervised token:", *(f"{loss:.4f}" for loss in losses))


if __name__ == "__main__":
    main()
