"""Score a fine-tuned model beside the one it came from, on records it has not seen.

python scripts/eval.py --model outputs/demo --baseline recipe/demo/base --output_dir outputs/demo-eval
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import DatasetDict

from recipe.config import DataArguments, ModelArguments, UserError, parse_arguments
from recipe.console import print_examples, print_scores
from recipe.data import load_records
from recipe.generation import generate_responses
from recipe.metrics import summarize
from recipe.model import check_folder, load_model, load_tokenizer
from recipe.provenance import command_line, data_hash, read_run, versions, write_json, write_json_lines
from recipe.records import read_records
from recipe.templates import load_template


@dataclass
class EvalArguments:
    """Which models answer which records."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of the fine-tuned model."})
    baseline: str | None = field(default=None, metadata={"help": "Folder or Hub id of the model to compare it with."})
    split: list[str] = field(
        default_factory=lambda: ["test"], metadata={"help": "Splits to score, each apart; or `all` records as one."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where predictions.jsonl and metrics.json go."})
    predictions: str | None = field(
        default=None,
        metadata={
            "help": "Score this file instead of generating: a predictions.jsonl, or records with a `model_response`."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Cap on each response, in tokens."})
    batch_size: int = field(default=32, metadata={"help": "Prompts generated together on each process."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})


def main(argv: list[str]) -> None:
    state = PartialState(cpu=not torch.accelerator.is_available())
    transformers.logging.set_verbosity_error()  # it warns of end-of-text tokens behind finished answers
    args, data_args, run = parse(argv)
    output_dir = Path(args.output_dir)

    # generate
    if args.predictions is None:
        with state.main_process_first():  # the others read its cache
            records = select_splits(data_args, args.split, run)
        output_dir.mkdir(parents=True, exist_ok=True)  # now, not after an hour of answers
        predictions = ask_models(args, data_args, records, state)
        if state.is_main_process:
            write_json_lines(output_dir / "predictions.jsonl", predictions)
    else:
        predictions = read_predictions(args.predictions)

    # score
    if state.is_main_process:
        splits = {name: summarize([p for p in predictions if p["split"] == name]) for name in names_of(predictions)}
        headline = next(iter(splits.values()))
        provenance = {"command": command_line(), "versions": versions(), "model": args.model, "baseline": args.baseline}
        write_json(output_dir / "metrics.json", {**headline, "judge": None, "splits": splits, "provenance": provenance})

        # report
        print_scores(splits)
        print_examples([p for p in predictions if p["split"] == names_of(predictions)[0]])
        answers = args.predictions or output_dir / "predictions.jsonl"
        print(f"\nEvery answer: {answers}   Scores: {output_dir / 'metrics.json'}")


def parse(argv: list[str]) -> tuple[EvalArguments, DataArguments, dict[str, Any] | None]:
    """The arguments, with the data settings of the model's own training run wherever no flag says otherwise."""
    types: list[type] = [EvalArguments, DataArguments]
    description = (__doc__ or "").split("\n")[0]
    args, _ = parse_arguments(types, argv, description)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give at least 1")
    if args.output_dir is None:
        raise UserError("say where the results go: --output_dir")
    if args.predictions is None and args.model is None:
        raise UserError("say what to score: --model, or --predictions with answers that exist already")
    for name in (args.model, args.baseline):
        if name is not None:
            check_folder(name)
    run = read_run(args.model) if args.model else None
    defaults = dict(run["config"]["data"]) if run else {}
    saved_template = Path(args.model or "") / "chat_template.jinja"
    if args.model and saved_template.is_file():  # the very one of training, wherever that came from
        defaults["template"] = str(saved_template)
    args, data_args = parse_arguments(types, argv, description, defaults)
    if args.split == ["all"] and not run:  # nothing was held out: every record counts
        data_args.validation_ratio = data_args.test_ratio = 0.0
    return args, data_args, run


def select_splits(data_args: DataArguments, names: list[str], run: dict[str, Any] | None) -> DatasetDict:
    """The records of the named splits; a warning if they are no longer those the model was trained beside."""
    records, _ = load_records(data_args)
    if run and run["config"]["data"]["data"] == data_args.data and run["data_hash"] != data_hash(records):
        print(
            "warning: the data or its split changed since this model was trained; it may have seen these records",
            file=sys.stderr,
        )
    if names == ["all"]:
        return records
    unknown = [name for name in names if name not in records]
    if unknown:
        raise UserError(f"--split {' '.join(unknown)}: the data has {', '.join(records)}; name one of them, or all")
    return DatasetDict({name: records[name] for name in names})


def ask_models(
    args: EvalArguments, data_args: DataArguments, records: DatasetDict, state: PartialState
) -> list[dict[str, Any]]:
    """One prediction a record: what `summarize` takes, with an id that is unique over splits."""
    merged = args.split == ["all"]
    predictions = [
        {"id": f"{name}/{record['row']}", "split": "all" if merged else name, **kept(record)}
        for name, split in records.items()
        for record in split
    ]
    for label, path in (("baseline", args.baseline), ("tuned", args.model)):
        if path is None:
            continue
        model_args = ModelArguments(model_name_or_path=path, dtype=args.dtype)
        tokenizer = load_tokenizer(model_args)
        model, _ = load_model(model_args, tokenizer)
        template = load_template(data_args.template, tokenizer)
        with state.split_between_processes(list(range(len(predictions)))) as mine:
            responses = generate_responses(
                model.to(state.device),
                tokenizer,
                template.prompts([predictions[index] for index in mine]),
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
                description=f"Generating ({label})" if state.is_main_process else None,
            )
        answers = [(index, r.text, len(r.token_ids), r.stop_reason) for index, r in zip(mine, responses, strict=True)]
        for index, text, tokens, stop_reason in gather_object(answers):
            predictions[index][label] = {"text": text, "tokens": tokens, "stop_reason": stop_reason}
    return predictions


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record that go into its prediction."""
    fields = ("instruction", "input", "output", "family")
    return {name: record[name] or "" for name in fields if name in record}


def names_of(predictions: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(prediction["split"] for prediction in predictions))


def read_predictions(path: str) -> list[dict[str, Any]]:
    """Predictions of an earlier run, or records that carry a response in `model_response`."""
    splits = read_records(DataArguments(data=path))
    if len(splits) != 1:
        raise UserError(f"--predictions {path}: {len(splits)} splits; name one file")
    [dataset] = splits.values()
    columns = [name for name in ("tuned", "baseline", "model_response") if name in dataset.column_names]
    if "tuned" not in columns and "model_response" not in columns:
        raise UserError(
            f"--predictions {path}: neither a 'tuned' nor a 'model_response' column; found {dataset.column_names}"
        )
    predictions = []
    for row in dataset:
        answers = {"tuned": {"text": row["model_response"]}} if "tuned" not in columns else {}
        answers |= {name: row[name] for name in columns if name != "model_response"}
        bad = [name for name, answer in answers.items() if not isinstance((answer or {}).get("text"), str)]
        if bad:
            raise UserError(
                f"{path} row {row['row']}: the answer of {', '.join(bad)} is not text; answer it or remove the row"
            )
        answers = {name: {**answer, "stop_reason": answer.get("stop_reason")} for name, answer in answers.items()}
        predictions.append({"split": row.get("split") or "all", **kept(row), **answers})
    return predictions


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}" if PartialState().is_main_process else 1)
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was scored")
