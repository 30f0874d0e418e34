"""Make one whole model of an adapter and the model it belongs to: a folder like that of any other training run.

python scripts/merge.py outputs/adapter --output_dir outputs/merged
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.config import RUN_CODE, ModelArguments, UserError, parse_arguments, setting
from recipe.console import run_script
from recipe.files import check_place, write_sealed, write_whole
from recipe.lock import contents, hold_folder
from recipe.manifest import check_unchanged
from recipe.provenance import command_line, read_run, versions, weights_hash
from recipe.publishing.card import RUN, make_model_card
from recipe.shapes import check_shape
from recipe.training.checkpoints import whole_model

OF_THE_RUN = ("trainer_state.json", "loss.png", "samples.jsonl")  # how the adapter was trained


@dataclass
class MergeArguments:
    """Which adapter, and where the whole model goes."""

    model: str | None = setting(
        None, "Output folder of a run with an adapter, or its Hub id; the flag can be left out."
    )
    output_dir: str = setting("", "A new folder for the whole model.")
    trust_remote_code: bool = setting(False, RUN_CODE)


def main(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-") and not Path(argv[0]).is_file():  # where other scripts take a YAML file
        argv = ["--model", *argv]
    [args] = parse_arguments([MergeArguments], argv, (__doc__ or "").split("\n")[0])
    if args.model is None:
        raise UserError("which adapter? python scripts/merge.py ADAPTER_FOLDER --output_dir FOLDER")
    check_place(args.output_dir)
    output_dir = Path(args.output_dir)
    if contents(output_dir):
        raise UserError(f"--output_dir {output_dir} holds files already, and nothing is replaced; name a new folder")
    with hold_folder(output_dir):
        merge(args.model, output_dir, args.trust_remote_code)
    print(f"The whole model is in {output_dir}/")


def merge(name: str, output_dir: Path, trust_remote_code: bool) -> None:
    """Write the whole model, and how it was made if the adapter's folder tells."""
    from recipe.adapters import base_of, load_adapter, merged
    from recipe.model import SPECIAL_TOKEN_IDS, load_tokenizer

    base, folder = base_of(name), Path(name)
    if base is None:
        raise UserError(f"{name}: no adapter is there (no adapter_config.json without a config.json)")
    check_unchanged(folder)
    run = None if folder.resolve().name.startswith("checkpoint-") else read_run(folder)
    dtype: Any = "float32" if run is None else check_run(run, folder)["config"]["model"]["dtype"]
    model_args = ModelArguments(name, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model_args)
    model = merged(load_adapter(model_args, base, tokenizer)[0], name)
    model.config.update({key: getattr(tokenizer, key) for key in SPECIAL_TOKEN_IDS})  # as at the end of other runs
    with whole_model(output_dir, writes=True) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    if run is None:
        return
    for path in (folder / file for file in OF_THE_RUN):
        if path.is_file():
            shutil.copyfile(path, output_dir / path.name)
    about = {"command": command_line(), "versions": versions(), "adapter_weights": weights_hash(name)}
    write_sealed(output_dir / "run.json", {**run, "merged": about})
    write_whole(output_dir / "README.md", make_model_card(output_dir, run))


def check_run(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    check_shape(run, RUN, str(folder / "run.json"), "train again, or remove it")
    return run


if __name__ == "__main__":
    run_script(main, interrupted="no whole model was written; remove the folder, and run the same command again")
