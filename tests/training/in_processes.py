"""Trains and evaluates as each of a list of scenarios says, in every process of a group: started by test_processes.py.

accelerate launch in_processes.py SCENARIOS.json OUTPUT.pt
"""

import json
import os
import sys
import tempfile

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from recipe import attention
from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import InstructionTrainingArguments
from recipe.trainer import InstructionTrainer

END = 3  # of text: ends each response, pads, and stands inside of some


def make_rows(count: int, start: int = 0) -> list[dict]:
    """Prompts with a beginning of text in common, responses of different lengths; the end of text is inside of some."""
    rows = []
    for row in range(start, start + count):
        draw = torch.Generator().manual_seed(row)
        prompt = [1, 10, 11, 12, *torch.randint(4, 40, (row % 4,), generator=draw).tolist()]
        response = torch.randint(2, 40, (1 + row * 7 % 11,), generator=draw).tolist() + [END] * (1 + (row % 5 == 0))
        labels = [-100] * len(prompt) + response
        rows.append({"input_ids": prompt + response, "labels": labels, "row": row, "length": len(labels)})
    return rows


def make_conversations(count: int, start: int = 0) -> list[dict]:
    """Rows of one to four examples, which begin with those before them up to a turn that is then told otherwise."""
    rows = []
    for row in range(start, start + count):
        draw = torch.Generator().manual_seed(row)
        history, ids, labels, ends = [1, 10, 11, 12], [], [], []
        for turn in range(1 + row % 4):
            question = torch.randint(4, 40, (1 + (row + turn) % 3,), generator=draw).tolist()
            answer = [*torch.randint(4, 40, (2 + (row * 5 + turn) % 7,), generator=draw).tolist(), END]
            ids += history + question + answer
            labels += [-100] * len(history + question) + answer
            ends.append(len(ids))
            history = history + question + answer[len(answer) // 2 :]  # its reasoning is left out
        several = ends if len(ends) > 1 else None
        rows.append({"input_ids": ids, "labels": labels, "ends": several, "row": row, "length": len(ids)})
    return rows


ROWS = {"instructions": make_rows, "conversations": make_conversations}


def make_model(architecture: str, layout: str = "padded") -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 40}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if architecture == "gpt2" else {}
    config = AutoConfig.for_model(architecture, **sizes, **dropout, bos_token_id=1, eos_token_id=END)
    implementation = attention.NAME if layout == "shared_prefix" else "sdpa"
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double()


class SeenRecords(InstructionTrainer):
    """Notes the records that each process learns from, step by step."""

    def get_batch_samples(self, *args, **kwargs):
        batches, count = super().get_batch_samples(*args, **kwargs)
        rows = [dict.fromkeys(batch["row"].tolist()) for batch in batches if "row" in batch]  # of each example
        self.seen.append([row for each in rows for row in each])
        return batches, count


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def run(architecture, layout, records, batch_size, accumulated, validation, stop_at=None, of="instructions", **changes):
    """Two epochs, or to `stop_at` and then resumed by another trainer, and the evaluation of each validation set."""
    folder = [tempfile.mkdtemp() if PartialState().is_main_process else None]
    broadcast_object_list(folder)
    options = {
        "output_dir": folder[0], "use_cpu": True, "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulated, "num_train_epochs": 2, "learning_rate": 1e-2, "weight_decay": 0.0,
        "adam_epsilon": 1e-4, "lr_scheduler_type": "linear", "max_grad_norm": 0.0, "seed": 5, "logging_steps": 1,
        "per_device_eval_batch_size": 2, "save_strategy": "no", "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    if stop_at:
        options |= {"save_strategy": "steps", "save_steps": stop_at}

    def trainer() -> SeenRecords:
        collators = {
            "padded": DataCollatorForInstructionTuning(END),
            "shared_prefix": DataCollatorWithSharedPrefix(END, "segments"),
        }
        made = SeenRecords(
            make_model(architecture, layout),
            InstructionTrainingArguments(**options | changes),
            data_collator=collators[layout],
            train_dataset=Dataset.from_list(ROWS[of](records)),
        )
        made.seen = []
        return made

    first = last = trainer()
    if stop_at:
        first.add_callback(StopAt(stop_at))
        first.train()
        last = trainer()
        last.seen = first.seen
        last.train(resume_from_checkpoint=f"{folder[0]}/checkpoint-{stop_at}")
    else:
        first.train()
    seen = gather_object([last.seen])
    losses = {}
    for count in validation:
        losses[count] = last.evaluate(Dataset.from_list(ROWS[of](count, start=100)))["eval_loss"]
    return {
        "log": [entry for entry in last.state.log_history if "loss" in entry],
        "steps": [sorted(row for part in parts for row in part) for parts in zip(*seen, strict=True)],
        "weights": last.accelerator.get_state_dict(last.model_wrapped),
        "evaluated": losses,
        "processes": PartialState().num_processes,
    }


def run_all(scenarios: list[dict], output: str) -> None:
    torch.set_num_threads(1)
    results = [run(**scenario) for scenario in scenarios]
    if PartialState().is_main_process:
        torch.save(results, output)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def be_process(rank: int, processes: int, port: int, scenarios: list[dict], output: str) -> None:
    """What a process that `torchrun` has started does, in one that was forked and need not import everything."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()}, LOCAL_WORLD_SIZE=str(processes))
    run_all(scenarios, output)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        run_all(json.load(file), sys.argv[2])
