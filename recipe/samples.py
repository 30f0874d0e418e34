"""Answers to a few validation prompts while a model trains, to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from recipe.console import one_line
from recipe.generation import generate_responses
from recipe.provenance import read_json_lines, write_json_lines
from recipe.templates import Template


class SampleGenerations(TrainerCallback):
    """At each evaluation, answers a few prompts, shows the answers and appends them to `output_dir/samples.jsonl`.

    Args:
        records: what to answer: `instruction`, `input`, `output` (the reference) of each.
        template: the prompt's template.
        max_new_tokens: cap on each answer.
    """

    def __init__(self, records: list[dict[str, Any]], template: Template, max_new_tokens: int = 64) -> None:
        self.records = records
        self.prompts = template.prompts(records)
        self.max_new_tokens = max_new_tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the samples of steps that a resumed run takes again."""
        path = Path(args.output_dir) / "samples.jsonl"
        if state.is_world_process_zero and path.is_file():
            kept = [sample for sample in read_json_lines(path) if sample["step"] <= state.global_step]
            write_json_lines(path, kept)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # on every process, because a sharded model generates only if all take part
        responses = generate_responses(kwargs["model"], kwargs["processing_class"], self.prompts, self.max_new_tokens)
        if not state.is_world_process_zero:
            return
        with open(Path(args.output_dir) / "samples.jsonl", "a", encoding="utf-8") as file:
            for record, response in zip(self.records, responses, strict=True):
                asked = {name: record[name] for name in ("instruction", "input", "output")}
                line = {
                    "step": state.global_step,
                    **asked,
                    "response": response.text,
                    "stop_reason": response.stop_reason,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                question = " | ".join(text for text in (record["instruction"], record["input"]) if text)
                tqdm.write(
                    f"  step {state.global_step}  {one_line(question)}\n"
                    f"    reference  {one_line(record['output'])}\n    response   {one_line(response.text)}"
                )
