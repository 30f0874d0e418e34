"""Answers to a few validation prompts while a model trains, to look at."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from recipe.console import one_line, visible
from recipe.files import is_there, naming, read_file, read_json_lines, write_json_lines, write_whole
from recipe.generation import generate_responses
from recipe.redaction import redact
from recipe.shapes import check_shape
from recipe.templates import Template, transcript
from recipe.tokens import prompt_ids

COLUMNS = ("instruction", "input", "output", "response", "stop_reason")  # `output` is the reference
MARKUP = re.compile(r"[\\`*_\[\]<>&|]")  # of Markdown and HTML, inside a line


class SampleGenerations(TrainerCallback):
    """At each evaluation, answers a few prompts, shows the answers and appends them to `output_dir/samples.jsonl`.

    Args:
        records: what to answer: `instruction`, `input`, `output` (the reference) of each; of a conversation, whose
            prompt is its `messages` but the last, the samples have all of these as the instruction.
        template: of the prompts.
        max_new_tokens: longest answer, in tokens.
        trackers: the trainer's callbacks; those of TensorBoard, W&B and trackio among them get the samples too, as the
            table `eval/samples` beside the numbers of that evaluation.

    Example::

        trainer.add_callback(SampleGenerations(records[:3], template, trackers=trainer.callback_handler.callbacks))
    """

    def __init__(
        self,
        records: list[dict[str, Any]],
        template: Template,
        max_new_tokens: int = 64,
        trackers: Iterable[TrainerCallback] = (),
    ) -> None:
        self.records = records
        self.template = template
        self.max_new_tokens = max_new_tokens
        kinds = (TensorBoardCallback, TrackioCallback, WandbCallback)
        self.trackers = [callback for callback in trackers if isinstance(callback, kinds)]
        self.resumed = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resume(
            args, state
        )  # not when training begins: what fails before the first step leaves the file as it was

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resume(args, state)
        # on every process, because a sharded model needs all of them to generate
        tokenizer = kwargs["processing_class"]
        prompts = prompt_ids(self.template, tokenizer, self.records)
        responses = generate_responses(kwargs["model"], tokenizer, prompts, self.max_new_tokens)
        if not state.is_world_process_zero:
            return
        rows = [
            (
                redact(transcript(record) or record["instruction"]),
                *map(redact, (record["input"], record["output"], response.text)),
                response.stop_reason,
            )
            for record, response in zip(self.records, responses, strict=True)
        ]
        path = Path(args.output_dir) / "samples.jsonl"
        with naming(path), open(path, "a", encoding="utf-8") as file:
            for row in rows:
                sample = {"step": state.global_step, **dict(zip(COLUMNS, row, strict=True))}
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        for instruction, input_text, reference, response, _ in rows:
            question = " | ".join(filter(None, (instruction, input_text)))
            tqdm.write(f"  step {state.global_step}  {one_line(question)}")
            tqdm.write(f"    reference  {one_line(reference)}\n    response   {one_line(response)}")
        for tracker in self.trackers:
            # through its own callback, which holds the run, knows its step and turns the name into "eval/samples"
            tracker.on_log(args, state, control, logs={"eval_samples": _table(tracker, rows)}, model=kwargs["model"])

    def _resume(self, args: Any, state: Any) -> None:
        """Once: drop the samples of steps that a resumed run repeats, and a last line that was cut short."""
        path, first = Path(args.output_dir) / "samples.jsonl", not self.resumed
        self.resumed = True
        if first and state.is_world_process_zero and is_there(path):
            content = read_file(path)
            write_whole(path, content[: content.rfind(b"\n") + 1])
            rows = read_json_lines(path)
            for number, row in enumerate(rows):
                check_shape(row, {"step": int}, f"{path} row {number}", "fix or remove it")
            write_json_lines(path, (row for row in rows if row["step"] <= state.global_step))


def _table(tracker: TrainerCallback, rows: Sequence[Sequence[str]]) -> Any:
    """The rows as a tracker takes a table: Markdown for TensorBoard, the library's `Table` for W&B and trackio."""
    if not isinstance(tracker, TensorBoardCallback):  # both libraries are optional, and take the same arguments
        library = importlib.import_module("wandb" if isinstance(tracker, WandbCallback) else "trackio")
        return library.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_markdown_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(text: str) -> str:
    """A text that Markdown shows as it is: markup becomes character references, a newline a line break."""
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", visible(text)).replace("\n", "<br>")
