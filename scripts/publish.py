"""Push a training run to the Hub: the model, how it was made, and its evaluation. What is there already is left alone.

python scripts/publish.py outputs/demo --repo_id someone/demo --evaluation outputs/demo-eval --tag v1
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recipe.config import UserError, parse_arguments
from recipe.console import print_table
from recipe.hub import Change, files_to_push, open_repository, push_files, refuse_secrets
from recipe.model_card import write_model_card
from recipe.provenance import read_run


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
    if args.dry_run:
        refuse_secrets(files)
        print_files(files, args.repo_id or "")
        return
    run = read_run(folder)
    if args.card and run is not None:
        write_model_card(folder, run, evaluation, repo_id=args.repo_id, license=args.license, language=args.language)
        files = files_to_push(folder, evaluation)
    repo_id = open_repository(args.repo_id or "", private=args.private, revision=args.revision)
    pushed = push_files(
        files, repo_id, message=args.message, revision=args.revision, tag=args.tag,
        show=lambda changes: print_changes(changes, repo_id, args.revision),
    )  # fmt: skip
    print(f"{'Pushed' if pushed.sent else 'Nothing changed'}: {pushed.url} (commit {pushed.commit[:8]})")


def parse(argv: list[str]) -> PublishArguments:
    if argv and Path(argv[0]).is_dir():  # where other scripts take a YAML file
        argv = ["--model", *argv]
    [args] = parse_arguments([PublishArguments], argv, (__doc__ or "").split("\n")[0])
    if args.model is None:
        raise UserError("which run? python scripts/publish.py OUTPUT_DIR --repo_id owner/name")
    if args.repo_id is None and not args.dry_run:
        raise UserError("where to? add --repo_id owner/name, or --dry_run to see what would go")
    return args


def print_files(files: Mapping[str, Path], repo_id: str) -> None:
    sizes = {path: file.stat().st_size for path, file in files.items()}
    rows = [[path, readable(size)] for path, size in sizes.items()]
    print_table(f"What would go to {repo_id or 'the Hub'}", ["file", "size"], rows)
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
