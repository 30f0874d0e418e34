"""Push a training run to the Hub: the model, how it was made, and its evaluation. Only what has changed is uploaded.

python scripts/publish.py outputs/demo --repo_id someone/demo --evaluation outputs/demo-eval --tag v1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from recipe.config import UserError, parse_arguments, setting
from recipe.console import print_table, run_script
from recipe.files import read_json, write_json, write_whole
from recipe.manifest import check_unchanged
from recipe.provenance import read_run
from recipe.publishing.card import RUN, make_model_card, read_evaluation
from recipe.publishing.hub import (
    check_reference,
    check_repo_id,
    files_to_push,
    is_local,
    open_repository,
    push_files,
    refuse_local_folders,
)
from recipe.publishing.secret_check import refuse_secrets
from recipe.shapes import check_shape


@dataclass
class PublishArguments:
    """What is pushed, and to where."""

    model: str | None = setting(None, "Output folder of a run; the flag can be left out.")
    repo_id: str | None = setting(None, "owner/name on the Hub; created if it is missing.")
    evaluation: str | None = setting(None, "Output folder of scripts/eval.py, for the card.")
    base: str | None = setting(None, "Hub id of the model that an adapter belongs to, in place of a local folder.")
    revision: str | None = setting(None, "Branch to push to; created if it is missing.")
    tag: str | None = setting(None, "A tag for the commit, such as v1; it is never moved.")
    private: bool | None = setting(None, "Make a new repository private; default: as its owner has set.")
    message: str = setting("Publish", "Message of the commit.")
    card: bool = setting(True, "Write a new README.md; false pushes the one that is there.")
    license: str | None = setting(None, "On the card: apache-2.0, mit, other, ...")
    language: list[str] = setting(list, "On the card, as ISO 639 codes: en de")
    allow_secret_like: list[str] = field(  # may be repeated
        default_factory=list,
        metadata={"help": "FILE:LINE that only looks like a secret, as the message names it.", "action": "extend"},
    )
    dry_run: bool = setting(False, "List the files; write nothing, ask and send nothing.")


def main(argv: list[str]) -> None:
    args = parse(argv)
    folder, evaluation = Path(args.model or ""), Path(args.evaluation) if args.evaluation else None
    files = files_to_push(folder, evaluation)
    check_unchanged(folder)
    with TemporaryDirectory() as drafts:
        if args.base is not None:
            files |= with_base(files, args.base, Path(drafts))
        publish(args, folder, evaluation, files)


def publish(args: PublishArguments, folder: Path, evaluation: Path | None, files: dict[str, Path]) -> None:
    """Look for what must not be sent, then push."""
    card = draft_card(args, folder, evaluation)
    if card:  # written later, when it is known that it can be pushed
        files.pop("README.md", None)
    refuse_local_folders(files)
    for line in refuse_secrets(files, card, args.allow_secret_like):
        print(line)
    print_files(files, card, f"To {args.repo_id or 'the Hub'}, {args.revision or 'main'}")
    if args.dry_run:
        print("A dry run: nothing was written, asked or sent")
        return
    repo_id = open_repository(args.repo_id or "", private=args.private, revision=args.revision)
    if card:
        files["README.md"] = folder / "README.md"
        write_whole(files["README.md"], card)
    pushed = push_files(
        files, repo_id, message=args.message, revision=args.revision, tag=args.tag, allowed=args.allow_secret_like
    )
    if pushed.removed:
        print(f"Removed, because they belong to earlier weights: {', '.join(pushed.removed)}")
    print(f"{'Pushed' if pushed.sent else 'Nothing left to push'}: {pushed.url} (commit {pushed.commit[:8]})")


def parse(argv: list[str]) -> PublishArguments:
    if argv and not argv[0].startswith("-") and not Path(argv[0]).is_file():  # where other scripts take a YAML file
        argv = ["--model", *argv]
    [args] = parse_arguments([PublishArguments], argv, (__doc__ or "").split("\n")[0])
    if args.model is None:
        raise UserError("which run? python scripts/publish.py OUTPUT_DIR --repo_id owner/name")
    if "/" not in (args.repo_id or "") and not (args.dry_run and args.repo_id is None):
        raise UserError("where to? add --repo_id owner/name, or only --dry_run to see which files would go")
    if args.repo_id is not None:
        check_repo_id(args.repo_id)
    check_reference(args.revision, "--revision")
    check_reference(args.tag, "--tag")
    return args


def with_base(files: Mapping[str, Path], base: str, folder: Path) -> dict[str, Path]:
    """The adapter's config as it is pushed, written to a folder: it names the base model on the Hub.

    Raises:
        UserError: there is no adapter, or the name is none of the Hub.
    """
    check_repo_id(base)
    if is_local(base):
        raise UserError(f"--base {base}: this is a folder here; name the model's id on the Hub")
    if "adapter_config.json" not in files:
        raise UserError(
            f"--base {base}: no adapter_config.json is there, and a whole model needs no base; leave it out"
        )
    write_json(
        folder / "adapter_config.json", read_json(files["adapter_config.json"]) | {"base_model_name_or_path": base}
    )
    return {"adapter_config.json": folder / "adapter_config.json"}


def draft_card(args: PublishArguments, folder: Path, evaluation: Path | None) -> str:
    """The new README.md; empty if the one that is there is pushed.

    Raises:
        UserError: the evaluation is of another model, or flags would have no effect.
    """
    scores = read_evaluation(evaluation, folder) if evaluation is not None else None
    is_checkpoint = folder.resolve().name.startswith("checkpoint-")  # its steps and loss are not recorded
    run = read_run(folder) if args.card and not is_checkpoint else None
    if run is not None:
        check_shape(
            run, RUN, str(folder / "run.json"), "train again, or push the README.md that is there: --card false"
        )
        if args.base is not None:
            run["config"]["model"] |= {"model_name_or_path": args.base, "model_revision": "main"}
            run["hub"] |= {"base": True}
        return make_model_card(folder, run, scores, repo_id=args.repo_id, license=args.license, language=args.language)
    reason = "--card false" if not args.card else "a checkpoint" if is_checkpoint else f"no run.json in {folder}"
    if args.license or args.language:
        raise UserError(f"--license and --language need a new card, and none is written ({reason}); leave them out")
    print(f"No card is written ({reason})")
    return ""


def print_files(files: Mapping[str, Path], card: str, title: str) -> None:
    sizes = {path: file.stat().st_size for path, file in files.items()}
    sizes |= {"README.md": len(card.encode())} if card else {}
    rows = [[path, f"{size / 1000:,.1f}"] for path, size in sizes.items()]
    print_table(title, ["file", "size in kB"], rows, caption=f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB")
    if card:
        print("README.md is written anew; --card false keeps the one that is there")


if __name__ == "__main__":
    run_script(main, interrupted="the Hub has the commit whole or not at all; run the same command again")
