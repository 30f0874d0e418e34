"""Look at instruction records before training on them: lengths, what would be cut, duplicates, leaks, odd records.

python scripts/inspect_data.py configs/demo.yaml --output_dir outputs/data
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.config import DataArguments, InstructionTrainingArguments, ModelArguments, UserError, parse_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class InspectionArguments(InstructionTrainingArguments):
    """Everything training takes, so that its YAML files and flags are taken here, and what is asked of the data."""

    limits: list[int] = field(
        default_factory=lambda: [128, 256, 512, 1024],
        metadata={"help": "Values of max_length to try, in tokens, beside the one that training would use."},
    )
    near_duplicates: float = field(
        default=0.8,
        metadata={"help": "Similarity, from 0.5 to 1, from which two records are near-duplicates; 0 looks for none."},
    )
    show: int = field(default=5, metadata={"help": "Examples of each finding."})

    def __post_init__(self) -> None:
        # not the checks of training: a laptop without a GPU may look at the data of a run for one
        if self.near_duplicates and not 0.5 <= self.near_duplicates <= 1:
            raise UserError(f"--near_duplicates {self.near_duplicates}: give a similarity from 0.5 to 1, or 0 for none")
        if self.per_device_train_batch_size < 1:
            raise UserError(f"--per_device_train_batch_size {self.per_device_train_batch_size}: give at least 1")
        if self.show < 0:
            raise UserError(f"--show {self.show}: give a number from 0 up")


def main(argv: list[str]) -> None:
    types: list[type] = [ModelArguments, DataArguments, InspectionArguments]
    model_args, data_args, args = parse_arguments(types, argv, description=(__doc__ or "").split("\n")[0])
    output_dir = folder(argv, args)

    # here, because --help and a mistake in the arguments need none of it: models, datasets, matplotlib take seconds
    from recipe.data import load_records, split_by_content, template_overhead
    from recipe.inspection import inspect_lengths, inspect_records, inspect_repetition, measure_lengths, plot_lengths
    from recipe.model import load_tokenizer
    from recipe.provenance import command_line, data_hash, versions, write_json, write_json_lines
    from recipe.records import read_records
    from recipe.templates import load_template

    # data
    tokenizer = load_tokenizer(model_args)
    template = load_template(data_args.template, tokenizer)
    preamble, ending = template_overhead(template, tokenizer)
    max_length = training_length(data_args, model_args, tokenizer)
    shortest = 2 * (ending + 1)  # as recipe.data.encode_records has it
    if min([max_length, *args.limits]) < shortest:
        raise UserError(
            f"--max_length or --limits below {shortest}: the template's last line alone has {ending} tokens"
        )
    records, leaked = load_records(data_args)
    given = split_by_content(read_records(data_args), data_args) if leaked else records

    # look
    repetition, pairs = inspect_repetition(given, records, args.near_duplicates, args.show)
    lengths = {name: measure_lengths(split, template, tokenizer, name) for name, split in records.items()}
    in_tokens = inspect_lengths(
        lengths,
        sorted({*args.limits, max_length}),
        max_length,
        data_args.overflow,
        args.per_device_train_batch_size,
        preamble,
        ending,
        data_args.mask_prompt,
    )
    report = {
        "command": command_line(),
        "versions": versions(),
        "data_hash": data_hash(records),
        "settings": {
            "data": data_args.data,
            "tokenizer": tokenizer.name_or_path,
            "template": data_args.template,
            "mask_prompt": data_args.mask_prompt,
            "max_length": max_length,
            "overflow": data_args.overflow,
            "batch_size": args.per_device_train_batch_size,
        },
        "left_out_of_train_as_duplicates": leaked,
        **in_tokens,
        "repetition": repetition,
        **inspect_records(records, lengths, args.show),
    }

    # tell
    print_report(report)
    write_json(output_dir / "inspection.json", report)
    write_json_lines(output_dir / "near_duplicates.jsonl", pairs)
    plot_lengths(in_tokens, max_length, output_dir / "lengths.png")
    print(f"\nAll of it: {output_dir / 'inspection.json'}   Histograms: {output_dir / 'lengths.png'}")


def folder(argv: list[str], args: InspectionArguments) -> Path:
    """`--output_dir`, or beside the output_dir of the YAML file, which is for the training run: outputs/demo-data.

    Raises:
        UserError: neither is there, or it is a file.
    """
    if args.output_dir is None:
        raise UserError("say where the results go: --output_dir")
    is_flag = any(word.split("=")[0] in ("--output_dir", "--output-dir") for word in argv)
    output_dir = Path(args.output_dir)
    output_dir = output_dir if is_flag else output_dir.with_name(f"{output_dir.name}-data")
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file; name a folder")
    return output_dir


def training_length(data_args: DataArguments, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> int:
    """`max_length` as training would set it; a tokenizer may be looked at without a model.

    Raises:
        UserError: the model has fewer positions.
    """
    from recipe.data import resolve_max_length  # see main
    from recipe.model import context_length, load_config

    max_length = resolve_max_length(data_args, tokenizer)
    if model_args.model_name_or_path is None and model_args.model_type is None:
        return max_length
    positions = context_length(load_config(model_args, tokenizer)) or max_length
    if data_args.max_length is not None and max_length > positions:
        raise UserError(
            f"--max_length {max_length}: the model has only {positions} positions; give at most {positions}"
        )
    return min(max_length, positions)


# --- in the terminal --------------------------------------------------------------------------------------------------


def print_report(report: Mapping[str, Any]) -> None:
    """Print the figures as tables, leaks first, and below them the examples."""
    print_repetition(report["repetition"], report["left_out_of_train_as_duplicates"])
    print_lengths(report)
    print_findings(report)


def print_repetition(repetition: Mapping[str, Any], leaked: int) -> None:
    from recipe.console import print_table  # see main

    threshold, splits = repetition["threshold"], repetition["splits"]
    columns = ["records of", "that stand in", "records", "exact", "same prompt, other response"]
    rows = [
        [
            found["records_of"],
            "itself" if found["found_in"] == found["records_of"] else found["found_in"],
            *(f"{found[name]:,}" for name in ("records", "exact", "same_prompt")),
            *([f"{found['near']:,}", f"{found['near_pairs']:,}"] if threshold else []),
        ]
        for found in splits
    ]
    notes = [f"{leaked:,} records are left out of training, because a later split holds them too"] if leaked else []
    if not repetition["complete"]:
        notes.append("some records have so many near-duplicates that not all pairs were compared: there are more")
    near = [f"near (from {threshold:g})", "near pairs"] if threshold else []
    print_table("Records that stand twice", [*columns, *near], rows, text_columns=2, caption="; ".join(notes) or None)
    for found in splits:
        inside = found["found_in"] == found["records_of"]
        where = f" within {found['records_of']}" if inside else f" ({found['records_of']} in {found['found_in']})"
        print_examples(f"The same record{where}", found["examples"]["exact"])
        print_examples(f"The same prompt, another response{where}", found["examples"]["same_prompt"])
        near_examples = found["examples"]["near"]
        notes = [f"{pair['similarity']:.3f} alike" for pair in near_examples]
        print_examples(f"Near-duplicates{where}", [pair["records"] for pair in near_examples], notes)


def print_lengths(report: Mapping[str, Any]) -> None:
    from recipe.console import print_table  # see main

    splits, settings = report["splits"], report["settings"]
    names = {"prompt": "prompt", "response": "response", "whole": "whole record"}
    rows = [
        [
            f"{name} ({split['records']:,})" if part == "prompt" else "",
            names[part],
            *(f"{lengths[key]:,}" for key in ("shortest", "median")),
            f"{lengths['mean']:,.1f}",
            *(f"{lengths[key]:,}" for key in ("p95", "p99", "longest")),
        ]
        for name, split in splits.items()
        for part, lengths in split["lengths"].items()
    ]
    columns = ["split (records)", "part", "shortest", "median", "mean", "95 %", "99 %", "longest"]
    print_table(
        "Lengths in tokens", columns, rows, text_columns=2, caption="a response has its end-of-text token with it"
    )

    rows = []
    for name, split in splits.items():
        costs = split["batches"]
        rows.append(
            [
                name,
                f"{sum(split['tokens'].values()):,}",
                *(percent(split["shares"][part]) for part in ("preamble", "prompt", "response")),
                f"{costs['padded']:,.0f}",
                percent(costs["padding"]),
                f"{costs['shared_prefix']:,}",
            ]
        )
    columns = ["split", "tokens", "% preamble", "% prompt", "% response"]
    print_table(
        f"Tokens that training sees, and inputs of an epoch in random batches of {settings['batch_size']}",
        [*columns, "inputs, padded", "% padding", "inputs, shared prefix"],
        rows,
    )

    at = f"{settings['max_length']:,} (as trained)"
    rows = [
        [
            name,
            at if cost["limit"] == settings["max_length"] else f"{cost['limit']:,}",
            f"{cost['too_long']:,}",
            percent(cost["too_long"] / split["records"]),
            *(f"{cost[key]:,}" for key in ("cut_prompt_tokens", "cut_response_tokens", "without_end")),
            f"{cost['dropped_tokens']:,}",
        ]
        for name, split in splits.items()
        for cost in split["overflow"]
        if cost["too_long"]
    ]
    harmless = [
        f"{limit:,}"
        for index, limit in enumerate(cost["limit"] for cost in next(iter(splits.values()))["overflow"])
        if not any(split["overflow"][index]["too_long"] for split in splits.values())
    ]
    caption = f"nothing is too long at max_length {', '.join(harmless)}" if harmless else None
    columns = ["split", "max_length", "too long", "%", "prompt tokens cut", "response tokens cut", "without end"]
    title = "Records too long: what truncate would cut, and drop leave out"
    if rows:
        print_table(title, [*columns, "tokens dropped"], rows, text_columns=2, caption=caption)
    elif caption:
        print(caption.capitalize())


def print_findings(report: Mapping[str, Any]) -> None:
    from recipe.console import print_table  # see main

    names = {
        "empty_input": "without an input",
        "shared_response": "with the response of another prompt",
        "boundary": "whose tokens change where prompt and response meet",
        "odd_characters": "with control, unseen or replacement characters",
    }
    findings, splits = report["findings"], list(report["splits"])
    rows = [[text, *(f"{findings[name]['by_split'][split]:,}" for split in splits)] for name, text in names.items()]
    print_table("Records", ["", *splits], rows)
    if report["frequent_responses"]:
        rows = [
            [row["response"][:70], f"{row['records']:,}", percent(row["share"]), f"{row['prompts']:,}"]
            for row in report["frequent_responses"]
        ]
        print_table("Most frequent responses", ["response", "records", "% of all", "different prompts"], rows)
    characters = findings["odd_characters"]["characters"]
    if characters:
        rows = [[row["character"], row["name"], f"{row['records']:,}"] for row in characters]
        print_table("Odd characters", ["character", "name", "records"], rows, text_columns=2)
    for name in ("boundary", "odd_characters"):
        print_examples(f"Records {names[name]}", [[record] for record in findings[name]["examples"]])
    for name in ("longest", "shortest"):
        notes = [f"{record['tokens']:,} tokens" for record in report[name]]
        print_examples(f"The {name} records", [[record] for record in report[name]], notes)


def print_examples(title: str, groups: Sequence[Sequence[Mapping[str, Any]]], notes: Sequence[str] = ()) -> None:
    """Print groups of records, each with its split, row and texts, and the note of its group."""
    from rich.console import Console  # see main
    from rich.text import Text

    from recipe.console import one_line

    if not groups:
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(Text(f"\n{one_line(title)}", style="bold"))
    for index, group in enumerate(groups):
        if notes:
            console.print(Text(f"  {notes[index]}"))
        for record in group:
            question = " | ".join(text for text in (record["instruction"], record["input"]) if text)
            where = f"{one_line(record['split'])} row {record['row']}"
            console.print(Text(f"  {where:<20} {one_line(question, 100)} → {one_line(record['output'], 60)}"))


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was changed; run it again")
