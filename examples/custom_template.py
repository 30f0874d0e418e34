"""A prompt template of your own, `question.jinja`, through data, training, the saved folder and generation.

    python examples/custom_template.py
    python examples/custom_template.py --template my_template.jinja --data my_records.json

The Jinja chat template alone defines the prompt: training encodes records with it, and it is saved with the tokenizer,
so `apply_chat_template`, `pipeline` and servers render the same prompt. It is checked first: a template that loses the
instruction, the input or the response is refused.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import DataArguments, InstructionTrainingArguments
from recipe.data import encode_records, load_records
from recipe.generation import generate_responses
from recipe.model import prepare_for_chat
from recipe.templates import load_template, to_messages
from recipe.trainer import InstructionTrainer

OUTPUT_DIR = "outputs/custom_template"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", default="examples/question.jinja", help="a .jinja file, alpaca or phi3")
    parser.add_argument("--data", default="recipe/demo/records/train.jsonl", help="a file, a folder or a Hub id")
    parser.add_argument("--model", default="recipe/demo/base", help="a folder or a Hub id")
    options = parser.parse_args()

    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
    template = load_template(options.template, tokenizer)
    prepare_for_chat(model, tokenizer, template)  # so that the saved folder answers with this template

    data = DataArguments(data=options.data, template=options.template)
    records = load_records(data)[0]["train"].select(range(16))  # a few, to be done in seconds
    encoded = encode_records({"train": records}, tokenizer, data)["train"]
    first = encoded[0]
    learned = [token for token, label in zip(first["input_ids"], first["labels"], strict=True) if label != -100]
    print(f"the first record as text: {tokenizer.decode(first['input_ids'])!r}")
    print(f"what is learned of it:    {tokenizer.decode(learned)!r}")

    arguments = InstructionTrainingArguments(
        OUTPUT_DIR,
        per_device_train_batch_size=16,
        max_steps=30,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    collator = DataCollatorForInstructionTuning(pad_token_id=tokenizer.eos_token_id)
    trainer = InstructionTrainer(
        model, arguments, data_collator=collator, train_dataset=encoded, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()

    saved = AutoTokenizer.from_pretrained(OUTPUT_DIR, trust_remote_code=False)
    prompts = [
        saved.apply_chat_template(to_messages(record), tokenize=False, add_generation_prompt=True) for record in records
    ]
    answers = generate_responses(
        AutoModelForCausalLM.from_pretrained(OUTPUT_DIR, trust_remote_code=False), saved, prompts, max_new_tokens=48
    )
    for prompt, answer in list(zip(prompts, answers, strict=True))[:3]:
        print(f"\n{prompt}{answer.text}")
    right = sum(answer.text == record["output"] for answer, record in zip(answers, records, strict=True))
    print(f"\n{right} of {len(records)} learned records answered word for word")


if __name__ == "__main__":
    main()
