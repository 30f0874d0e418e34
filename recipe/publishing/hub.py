"""Push a training run to the Hub: which files go, which never go, and what happens when the Hub refuses or fails.

files = files_to_push(Path("outputs/demo"), evaluation=Path("outputs/demo-eval"))
repo_id = open_repository("someone/demo", private=True)
print(push_files(files, repo_id, message="Publish", tag="v1").url)
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from recipe.config import UserError
from recipe.files import file_hash, read_json
from recipe.provenance import HUB_TOKEN

# The only files that may leave this machine, by name. training_args.bin is not among them: it is a pickle in which the
# Trainer keeps --hub_token in clear, and the Trainer's own push uploads it.
WEIGHTS = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
    "adapter_config.json",
)  # fmt: skip
SETTINGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
RECORDS = ("README.md", "run.json", "trainer_state.json", "loss.png", "samples.jsonl")
EVALUATION = ("metrics.json", "model-index.yml", "report.html", "predictions.jsonl", "*.png")
NOT_TEXT = {".safetensors", ".pt", ".pth", ".png", ".model"}

SECRETS = {
    "a token of the Hub": HUB_TOKEN,
    "credentials in an address": re.compile(
        r"https?://[^\s/?#@\"'<>\\]+@|[a-z][a-z0-9+.-]*://[^\s/?#:@\"'<>\\]*:[^\s/?#@\"'<>\\]+@"
    ),
}
SECRET_VARIABLE = re.compile(r".*(TOKEN|KEY|SECRET|PASSWORD)")
SHORTEST_SECRET = 12  # characters of a variable's value; shorter ones may be words

WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt
# statuses after which another attempt may succeed; 409 and 412: somebody else commits at the same time
TEMPORARY = {408, 409, 412, 429, 500, 502, 503, 504}
ADVICE = {
    401: "no token, or a wrong one (401); run `hf auth login`, or set HF_TOKEN to a token with write access",
    403: "the token may not write there (403); use one with write access to it",
    404: "not found, or not for this token (404); check owner, name and revision",
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Push:
    """The address and the commit of what the Hub has now, whether this push changed it, and the files it removed."""

    url: str
    commit: str
    sent: bool
    removed: list[str]


def files_to_push(folder: Path, evaluation: Path | None = None) -> dict[str, Path]:
    """The files of a saved model's folder, and of its evaluation's, that go to the Hub: path in the repository to file.

    Whether the evaluation is of this model is checked elsewhere: see `recipe.publishing.card.read_evaluation`.

    >>> files_to_push(Path("recipe/demo/base"))["model.safetensors"].as_posix()
    'recipe/demo/base/model.safetensors'

    Raises:
        UserError: a folder is missing, or holds no weights in safetensors or not all of them.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the output folder of a training run")
    if evaluation is not None and not evaluation.is_dir():
        raise UserError(f"--evaluation {evaluation}: no such folder; name the --output_dir of scripts/eval.py")
    files = matching_files(folder, (*WEIGHTS, *SETTINGS, *RECORDS))
    if not any(path.suffix == ".safetensors" for path in files.values()):
        raise UserError(f"{folder}: no model.safetensors to push; name a finished run's folder")
    if "model.safetensors.index.json" in files:
        shards = set(read_json(files["model.safetensors.index.json"])["weight_map"].values())
        if missing := shards - files.keys():
            raise UserError(f"{folder}: shards of the weights are missing: {', '.join(sorted(missing))}; save it again")
    if evaluation is not None:
        files |= {f"evaluation/{name}": path for name, path in matching_files(evaluation, EVALUATION).items()}
    return files


def matching_files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Name to path of each file in a folder whose name matches one of the patterns."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and matches(path.name, patterns))
    return {path.name: path for path in paths}


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def refuse_secrets(files: Mapping[str, Path], drafts: Mapping[str, str] | None = None) -> None:
    """Look for secrets in all text files: tokens of the Hub, credentials in addresses, and the values of this process's
    own secret environment variables (`HF_TOKEN`, `WANDB_API_KEY`, ...).

    Args:
        files: path in the repository to file.
        drafts: path in the repository to a text that will replace the file there.

    Raises:
        UserError: there are some; it names each file and line, and does not repeat the secret.
    """
    drafts = drafts or {}
    variables = {name: value for name, value in os.environ.items() if SECRET_VARIABLE.fullmatch(name)}
    variables["HF_TOKEN"] = get_token() or ""
    values = {name: value for name, value in variables.items() if len(value) >= SHORTEST_SECRET}
    texts = {
        str(path): path.read_text(encoding="utf-8", errors="replace")
        for name, path in files.items()
        if path.suffix not in NOT_TEXT and name not in drafts
    }
    texts |= {f"the new {name}": text for name, text in drafts.items()}
    problems = []
    for source, text in texts.items():
        for number, line in enumerate(text.split("\n"), start=1):
            kinds = [kind for kind, pattern in SECRETS.items() if pattern.search(line)]
            kinds += [f"the value of {name}" for name, value in values.items() if value in line]
            problems += [f"{source} line {number}: holds {kinds[0]}"] if kinds else []
    if problems:
        raise UserError(
            "\n".join([*problems, "nothing was pushed: take it out of the file, or the file out of the folder"])
        )


def open_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, api: HfApi | None = None
) -> str:
    """Create the model repository and the branch `revision` where they are missing, and check that we may write there.

    Args:
        repo_id: `owner/name`; without an owner, the token's.
        private: whether a repository that is created here is private; None for the owner's default.

    Returns:
        The whole `owner/name`.

    Raises:
        UserError: the token is missing, wrong or may not write; the repository is public and should be private; the Hub
            cannot be reached.
    """
    api = api or HfApi()

    def attempt() -> str:
        whole_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(whole_id, write=True)  # create_repo is content with a repository that it may only read
        if private and not api.model_info(whole_id).private:
            raise UserError(
                f"{whole_id} exists and is public; make it private in its settings on the Hub, or name another one"
            )
        if revision is not None:
            api.create_branch(whole_id, branch=revision, exist_ok=True)
        return whole_id

    return with_retries(attempt, repo_id)


def push_files(
    files: Mapping[str, Path],
    repo_id: str,
    *,
    message: str,
    revision: str | None = None,
    tag: str | None = None,
    api: HfApi | None = None,
) -> Push:
    """Push files in one commit, whole or not at all; `huggingface_hub` leaves out those that have not changed.

    Args:
        files: path in the repository to file, see `files_to_push`.
        tag: a new tag for the commit.

    Raises:
        UserError: the Hub refuses or cannot be reached; the tag exists already; there are secrets in the files.
    """
    api = api or HfApi()
    refuse_secrets(files)
    if tag:
        with_retries(lambda: refuse_known_tag(repo_id, tag, api), repo_id)
    before = with_retries(lambda: api.model_info(repo_id, revision=revision).sha, repo_id)
    commit, removed = with_retries(lambda: commit_files(files, repo_id, message, revision, api), repo_id)
    if tag:
        with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True), repo_id)
    url = f"{api.endpoint}/{repo_id}/tree/{tag or revision or 'main'}"
    return Push(url, commit, sent=commit != before, removed=removed)


def refuse_known_tag(repo_id: str, tag: str, api: HfApi) -> None:
    """A tag is never moved, and one with the name of a branch would be ambiguous."""
    refs = api.list_repo_refs(repo_id)
    if tag in {ref.name for ref in (*refs.branches, *refs.tags)}:
        raise UserError(f"--tag {tag}: {repo_id} has a tag or branch of this name already; choose a new name")


def commit_files(
    files: Mapping[str, Path], repo_id: str, message: str, revision: str | None, api: HfApi
) -> tuple[str, list[str]]:
    """Make one commit on top of the present one; if somebody else commits in between, the Hub answers 412.

    Returns:
        The commit (the old one if nothing has changed), and the paths that it removes.
    """
    parent = api.model_info(repo_id, revision=revision).sha
    tree = api.list_repo_tree(repo_id, recursive=True, revision=parent)
    stale = stale_files(files, {entry.path: entry for entry in tree if isinstance(entry, RepoFile)})
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(path, file) for path, file in files.items()),
        *(CommitOperationDelete(path) for path in stale),
    ]
    done = api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=parent)
    return done.oid, stale


def stale_files(files: Mapping[str, Path], remote: Mapping[str, RepoFile]) -> list[str]:
    """What an earlier push left on the Hub and these files make wrong, as paths to remove.

    That is other weights in the same folder, which could be loaded instead of the new ones; and, when the weights at
    the top change, files of an evaluation of the old ones.
    """
    others = [PurePosixPath(path) for path in remote if path not in files]
    folders = {file.parent for file in map(PurePosixPath, files) if matches(file.name, WEIGHTS)}
    stale = [file for file in others if matches(file.name, WEIGHTS) and file.parent in folders]
    weights = [path for path in files if "/" not in path and path.endswith(".safetensors")]
    same = all(is_same(files[path], remote.get(path)) for path in weights)
    if not same or PurePosixPath() in {file.parent for file in stale}:
        stale += [file for file in others if str(file.parent) == "evaluation" and matches(file.name, EVALUATION)]
    return list(map(str, stale))


def is_same(file: Path, remote: RepoFile | None) -> bool:
    """Whether the Hub has this large file (LFS) already."""
    lfs = remote.lfs if remote is not None else None
    return lfs is not None and f"sha256:{lfs.sha256}".startswith(file_hash(file))


def with_retries(attempt: Callable[[], Result], repo_id: str) -> Result:
    """What `attempt` returns, after at most `len(WAITS)` temporary faults.

    `huggingface_hub` repeats uploads and reading by itself, but not commits. Each attempt looks at the Hub anew, so
    that a commit whose answer was lost is not made twice.

    Raises:
        UserError: the fault in one line, with the way out.
    """
    for wait in (*WAITS, None):
        try:
            return attempt()
        # an upload's fault is the cause of a RuntimeError; a refused README.md or name is a ValueError
        except (HTTPError, ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            fault = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
            if wait is None or not is_temporary(fault):
                raise UserError(f"{repo_id}: {explained(fault)}") from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def is_temporary(fault: BaseException) -> bool:
    if isinstance(fault, HfHubHTTPError):
        return fault.response.status_code in TEMPORARY
    return not isinstance(fault, ValueError | OfflineModeIsEnabled)  # else it is a fault of the connection


def explained(fault: BaseException) -> str:
    details = " ".join(str(fault).split())[:300] or repr(fault)
    if isinstance(fault, OfflineModeIsEnabled):
        return "the Hub is not asked while HF_HUB_OFFLINE is set; unset it to push"
    if isinstance(fault, HFValidationError):
        return f"this is no name of a repository; write owner/name ({details})"
    if isinstance(fault, HfHubHTTPError) and fault.response.status_code in ADVICE:
        return f"{ADVICE[fault.response.status_code]} ({details})"
    if is_temporary(fault):
        return f"the Hub failed {len(WAITS) + 1} times, the last time with: {details}; push again to go on from there"
    return f"the Hub refused the push: {details}"
