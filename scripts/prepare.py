"""Tokenize records once and write them as Parquet shards, which train.py reads as they are: --data FOLDER.

python scripts/prepare.py configs/gpt2.yaml --data my_records.json --num_proc 8 --output_dir prepared
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
from recipe.console import print_token_statistics, run_script
from recipe.files import check_place, make_folder, write_json_lines


@dataclass
class PrepareArguments(InstructionTrainingArguments):
    """The arguments of training, so that its YAML files and flags work here, and one more."""

    shard_records: int = setting(100_000, "Records in a shard.")

    def __post_init__(self) -> None:  # without the checks of training: a machine without a GPU can prepare
        if self.shard_records < 1:
            raise UserError(f"--shard_records {self.shard_records}: give at least 1")


def main(argv: list[str]) -> None:
    types = [ModelArguments, DataArguments, PrepareArguments]
    model_args, data_args, args = parse_arguments(types, argv, (__doc__ or "").split("\n")[0])
    if not any(word.startswith(("--output_dir", "--output-dir")) for word in argv):
        raise UserError("name a folder for the shards with --output_dir")
    check_place(args.output_dir)

    from recipe.data.prepared import is_prepared, prepare_records, save_prepared
    from recipe.model import load_tokenizer
    from recipe.training.checks import fit_max_length

    if data_args.streaming or is_prepared(data_args.data):
        raise UserError("--streaming and folders that are prepared already need no preparing; give the records")
    tokenizer = load_tokenizer(model_args)
    if model_args.model_name_or_path or model_args.model_type:
        fit_max_length(data_args, model_args, tokenizer)
    prepared = prepare_records(data_args, tokenizer)
    about = prepared.about
    duplicates = about["rows"]["left_out_of_train_as_duplicates"]
    print_token_statistics([*about["splits"].values()], duplicates, about["bad_records"], prepared.notes)
    folder = Path(args.output_dir)
    make_folder(folder)
    if prepared.bad:
        write_json_lines(folder / "bad_records.jsonl", prepared.bad)
    manifest = save_prepared(prepared, folder, data_args, tokenizer, args.shard_records)
    print(f"\nDone: {manifest['rows']:,} records in {len(manifest['files'])} files; train with --data {folder}")


if __name__ == "__main__":
    run_script(main, interrupted="run it again, and it goes on where it was")
