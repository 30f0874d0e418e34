"""Look at instruction records before training on them: lengths, what would be cut, duplicates, leaks, odd records.

python scripts/inspect_data.py configs/demo.yaml --output_dir outputs/data
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

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
    from recipe.data import load_records, template_overhead
    from recipe.data.inspection import (
        inspect_lengths,
        inspect_records,
        inspect_repetition,
        measure_lengths,
        plot_lengths,
    )
    from recipe.data.inspection_tables import print_report
    from recipe.data.records import read_records
    from recipe.data.split import data_hash, split_by_content
    from recipe.files import write_json, write_json_lines
    from recipe.model import load_tokenizer
    from recipe.provenance import command_line, versions
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
    from recipe.data.encode import resolve_max_length  # see main
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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was changed; run it again")
