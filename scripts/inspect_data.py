"""Look at instruction records before training on them: lengths, what would be cut, duplicates, leaks, odd records.

python scripts/inspect_data.py configs/demo.yaml --output_dir outputs/data
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipe.config import (
    DataArguments,
    InstructionTrainingArguments,
    ModelArguments,
    UserError,
    parse_arguments,
    setting,
)
from recipe.console import run_script
from recipe.files import check_place


@dataclass
class InspectionArguments(InstructionTrainingArguments):
    """The arguments of training, so that its YAML files and flags work here, and three more."""

    limits: list[int] = setting(
        lambda: [128, 256, 512, 1024], "Values of max_length to try, in tokens, beside the one that training would use."
    )
    near_duplicates: float = setting(0.8, "Lowest similarity of near-duplicates, from 0.5 to 1; 0 looks for none.")
    show: int = setting(5, "How many examples to show of each finding.")

    def __post_init__(self) -> None:
        # skips the checks of training, so that a laptop without a GPU can inspect the data of a run on a GPU
        if self.near_duplicates and not 0.5 <= self.near_duplicates <= 1:
            raise UserError(f"--near_duplicates {self.near_duplicates}: give a similarity from 0.5 to 1, or 0 for none")
        for name, lowest in (("per_device_train_batch_size", 1), ("show", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"--{name} {getattr(self, name)}: give a number from {lowest} up")
        if min(self.limits, default=2) < 2:
            raise UserError(f"--limits {' '.join(map(str, self.limits))}: a record needs at least 2 tokens")


def main(argv: list[str]) -> None:
    model_args, data_args, args = parse_arguments(
        [ModelArguments, DataArguments, InspectionArguments], argv, description=(__doc__ or "").split("\n")[0]
    )
    output_dir = results_folder(argv, args)

    # here, because --help and a mistake in the arguments need none of it: models, datasets, matplotlib take seconds
    from recipe.data import inspection
    from recipe.data.duplicates import inspect_duplicates
    from recipe.data.encode import resolve_max_length
    from recipe.data.inspection_tables import print_report
    from recipe.data.records import read_records
    from recipe.data.special_text import find_special_text
    from recipe.data.split import data_hash, drop_cross_split_duplicates, split_by_content
    from recipe.files import write_json, write_json_lines
    from recipe.model import load_tokenizer
    from recipe.provenance import command_line, versions
    from recipe.templates import load_template
    from recipe.training.checks import fit_max_length

    # data
    tokenizer = load_tokenizer(model_args)
    if model_args.model_name_or_path or model_args.model_type:  # a tokenizer is enough to inspect data
        fit_max_length(data_args, model_args, tokenizer)
    data_args.max_length = resolve_max_length(data_args, tokenizer)
    read, left_out = read_records(data_args)
    given = split_by_content(read, data_args)
    loaded, dropped = drop_cross_split_duplicates(given)

    # inspect
    records, lengths, examples = inspection.measure_lengths(loaded, tokenizer, data_args, left_out)
    repetition, pairs = inspect_duplicates(given, records, args.near_duplicates, args.show)
    limits = sorted({*args.limits, data_args.max_length})
    trained = inspection.encode_trained(records, tokenizer, data_args)
    preamble = inspection.preamble_ids(load_template(data_args.template, tokenizer), tokenizer)
    settings = ("data", "template", "learn", "mask_prompt", "max_length", "overflow")
    report = {
        "command": command_line(),
        "versions": versions(),
        "data_hash": data_hash(loaded),
        "settings": {
            "tokenizer": tokenizer.name_or_path,
            **{name: getattr(data_args, name) for name in settings},
            "batch_size": (batch_size := args.per_device_train_batch_size),
        },
        "left_out_of_train_as_duplicates": dropped,
        "bad_records": left_out.reasons,
        "splits": inspection.inspect_lengths(lengths, examples, trained, limits, batch_size, preamble),
        "repetition": repetition,
        **inspection.inspect_records(records, lengths, find_special_text(records, tokenizer), args.show),
    }

    # show
    print_report(report, left_out.notes)
    write_json(output_dir / "inspection.json", report)
    if left_out.bad:
        write_json_lines(output_dir / "bad_records.jsonl", left_out.bad)
    write_json_lines(output_dir / "near_duplicates.jsonl", pairs)
    inspection.plot_lengths(lengths, data_args.max_length, output_dir / "lengths.png")
    print(f"\nAll figures: {output_dir / 'inspection.json'}   Lengths drawn: {output_dir / 'lengths.png'}")


def results_folder(argv: list[str], args: InspectionArguments) -> Path:
    """`--output_dir` of the command line; for outputs/demo of a YAML file, outputs/demo-data beside it.

    Raises:
        UserError: neither is given, or it cannot be written to.
    """
    if args.output_dir is None:
        raise UserError("name a folder for the results with --output_dir")
    is_flag = any(word.startswith(("--output_dir", "--output-dir")) for word in argv)
    output_dir = Path(args.output_dir if is_flag else f"{Path(args.output_dir)}-data")
    check_place(output_dir)
    return output_dir


if __name__ == "__main__":
    run_script(main, interrupted="nothing was changed; run it again")
