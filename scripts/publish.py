"""Push a training run to the Hub: the model, how it was made, and its evaluation. What is there already is left alone.

python scripts/publish.py outputs/demo --repo_id someone/demo --evaluation outputs/demo-eval --tag v1
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recipe.config import UserError, parse_arguments
from recipe.console import print_table
from recipe.files import write_whole
from recipe.provenance import read_run
from recipe.publishing.card import make_model_card, read_evaluation, read_scores
from recipe.publishing.hub import Change, files_to_push, open_repository, push_files, refuse_secrets


@dataclass
class PublishArguments:
    """What goes where."""

    model: str | None = field(
        default=None, metadata={"help": "Output folder of a training run; may stand without the flag."}
    )
    repo_id: str | None = field(default=None, metadata={"help": "owner/name on the Hub; made if it is missing."})
    evaluation: str | None = field(
        default=None, metadata={"help": "Output folder of scripts/eval.py: its scores go on the card, its files along."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; made if it is missing."})
    tag: str | None = field(default=None, metadata={"help": "A tag for the commit, such as v1; never moved."})
    private: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private; default: what its owner has set."}
    )
    message: str = field(default="Publish", metadata={"help": "Of the commit."})
    card: bool = field(
        default=True, metadata={"help": "Write README.md anew; false pushes the one that is there, edited by hand."}
    )
    license: str | None = field(default=None, metadata={"help": "On the card: apache-2.0, mit, other, ..."})
    language: list[str] = field(default_factory=list, metadata={"help": "On the card, as ISO 639 codes: en de"})
    dry_run: bool = field(default=False, metadata={"help": "List what would go, and write, ask and send nothing."})


def main(argv: list[str]) -> None:
    args = parse(argv)
    folder, evaluation = Path(args.model or ""), Path(args.evaluation) if args.evaluation else None
    files = files_to_push(folder, evaluation)
    card = card_maker(args, folder, evaluation)
    drafts = {"README.md": card(args.repo_id)} if card else {}
    refuse_secrets(files, drafts)
    if args.dry_run:
        print_files(files, drafts, args.repo_id or "")
        return
    repo_id = open_repository(args.repo_id or "", private=args.private, revision=args.revision)
    if card:  # not before it is known that it can be pushed
        write_whole(folder / "README.md", drafts["README.md"] if repo_id == args.repo_id else card(repo_id))
        files = files_to_push(folder, evaluation)
    pushed = push_files(
        files, repo_id, message=args.message, revision=args.revision, tag=args.tag,
        show=lambda changes: print_changes(changes, repo_id, args.revision),
    )  # fmt: skip
    print(f"{'Pushed' if pushed.sent else 'Nothing changed'}: {pushed.url} (commit {pushed.commit[:8]})")


def card_maker(args: PublishArguments, folder: Path, evaluation: Path | None) -> Callable[[str | None], str] | None:
    """What makes the text of README.md for a repository; None where the one that is there goes as it is.

    Raises:
        UserError: the evaluation is of another model, the folder is a checkpoint, or flags would have no effect.
    """
    if args.card and folder.resolve().name.startswith("checkpoint-"):
        raise UserError(
            f"{folder}: steps, time and loss of a checkpoint are nowhere written down, so that no card can be made; "
            "add --card false to push it without one, or with a README.md of yours"
        )
    run = read_run(folder) if args.card else None
    if run is None:
        if args.license or args.language:
            why = f"{folder} has no run.json to write it from" if args.card else "--card false writes none"
            raise UserError(f"--license and --language stand on a card that is written anew, and {why}; leave them out")
        if evaluation is not None:
            read_scores(evaluation, folder)
        return None
    scores = read_evaluation(evaluation, folder) if evaluation is not None else None
    return lambda repo_id: make_model_card(
        folder, run, scores, repo_id=repo_id, license=args.license, language=args.language
    )


def parse(argv: list[str]) -> PublishArguments:
    if argv and not argv[0].startswith("-") and not Path(argv[0]).is_file():  # where other scripts take a YAML file
        argv = ["--model", *argv]
    [args] = parse_arguments([PublishArguments], argv, (__doc__ or "").split("\n")[0])
    if args.model is None:
        raise UserError("which run? python scripts/publish.py OUTPUT_DIR --repo_id owner/name")
    if args.repo_id is None and not args.dry_run:
        raise UserError("where to? add --repo_id owner/name, or --dry_run to see what would go")
    return args


def print_files(files: Mapping[str, Path], drafts: Mapping[str, str], repo_id: str) -> None:
    sizes = {path: file.stat().st_size for path, file in files.items()}
    sizes |= {path: len(text.encode()) for path, text in drafts.items()}
    rows = [[path, readable(size)] for path, size in sizes.items()]
    print_table(f"What would go to {repo_id or 'the Hub'}", ["file", "size"], rows)
    for path in drafts:
        replaced = f" in place of the {path} that is there; --card false keeps that" if path in files else ""
        print(f"{path} would be written anew{replaced}")
    print(f"{len(sizes)} files, {readable(sum(sizes.values()))}; nothing was written, asked or sent")


def print_changes(changes: list[Change], repo_id: str, revision: str | None) -> None:
    going = [change for change in changes if change.state in ("new", "changed")]
    print_table(
        f"{repo_id}, {revision or 'main'}", ["file", "on the Hub", "size"],
        [[change.path, change.state, readable(change.size)] for change in changes], text_columns=2,
        caption=f"{len(going)} of {len(changes)} files to push, {readable(sum(change.size for change in going))}",
    )  # fmt: skip


def readable(size: int) -> str:
    """A number of bytes for people: 8304056 is 8.3 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.1f} GB"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the Hub has the commit whole or not at all; the same command goes on")
