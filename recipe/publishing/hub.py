"""Push a training run to the Hub: which files go, which never go, and what happens when the Hub refuses or fails.

files = files_to_push(Path("outputs/demo"), evaluation=Path("outputs/demo-eval"))
repo_id = open_repository("someone/demo", private=True)
print(push_files(files, repo_id, message="Publish", tag="v1").url)
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from recipe.config import UserError
from recipe.files import read_json
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
EVALUATION = ("metrics.json", "report.html", "predictions.jsonl", "*.png")
NOT_TEXT = {".safetensors", ".png", ".model"}

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


class Push(NamedTuple):
    """What the Hub has after a push."""

    url: str
    commit: str
    sent: bool  # False if it had everything already
    removed: list[str]  # files of an earlier push


def files_to_push(folder: Path, evaluation: Path | None = None) -> dict[str, Path]:
    """The files of a saved model's folder, and of its evaluation's, that go to the Hub: path in the repository to file.

    >>> files_to_push(Path("recipe/demo/base"))["model.safetensors"].as_posix()
    'recipe/demo/base/model.safetensors'

    Raises:
        UserError: a folder is missing, or holds no weights in safetensors or not all of them.
    """
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
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the --output_dir of scripts/train.py or scripts/eval.py")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and matches(path.name, patterns))
    return {path.name: path for path in paths}


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def refuse_secrets(files: Mapping[str, Path], card: str = "") -> None:
    """Look for secrets in all text files: tokens of the Hub, credentials in addresses, and the values of this process's
    own secret environment variables (`HF_TOKEN`, `WANDB_API_KEY`, ...).

    Args:
        files: path in the repository to file.
        card: the text of a new README.md, which is not written yet.

    Raises:
        UserError: there are some; it names each file and line, and does not repeat the secret.
    """
    variables = {name: value for name, value in os.environ.items() if SECRET_VARIABLE.fullmatch(name)}
    variables["HF_TOKEN"] = get_token() or ""
    secrets = {name: re.escape(value) for name, value in variables.items() if len(value) >= SHORTEST_SECRET}
    patterns = SECRETS | {f"the value of {name}": re.compile(value) for name, value in secrets.items()}
    texts = {
        str(path): path.read_text(encoding="utf-8", errors="replace")
        for path in files.values()
        if path.suffix not in NOT_TEXT
    }
    texts["the new README.md"] = card
    problems = []
    for source, text in texts.items():
        for number, line in enumerate(text.split("\n"), start=1):
            kinds = [kind for kind, pattern in patterns.items() if pattern.search(line)]
            problems += [f"{source} line {number}: holds {kinds[0]}"] if kinds else []
    if problems:
        raise UserError(
            "\n".join([*problems, "nothing was pushed: take it out of the file, or the file out of the folder"])
        )


def open_repository(repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
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
    api = HfApi()

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
    files: Mapping[str, Path], repo_id: str, *, message: str, revision: str | None = None, tag: str | None = None
) -> Push:
    """Push the files that have changed in one commit, whole or not at all; without changes there is no commit.

    Args:
        files: path in the repository to file, see `files_to_push`.
        tag: for the commit; it may exist if it is on that commit already.

    Raises:
        UserError: the Hub refuses or cannot be reached; the tag is on another commit, or has the name of a branch;
            there are secrets in the files.
    """
    api = HfApi()
    refuse_secrets(files)

    def attempt() -> Push:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        commit, remote = info.sha or "", {file.rfilename: file for file in info.siblings or []}
        additions = [CommitOperationAdd(path, file) for path, file in files.items()]
        changed = [addition for addition in additions if not is_same(addition, remote.get(addition.path_in_repo))]
        stale = stale_files(files, [addition.path_in_repo for addition in changed], remote)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*changed, *map(CommitOperationDelete, stale)]
        if tag:
            refuse_taken_tag(repo_id, tag, None if operations else commit, api)
        if operations:  # the Hub answers 412 if somebody else has committed since we looked
            done = api.create_commit(
                repo_id, operations, commit_message=message, revision=revision, parent_commit=commit
            )
            commit = done.oid
        if tag:
            api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)
        url = f"{api.endpoint}/{repo_id}/tree/{tag or revision or 'main'}"
        return Push(url, commit, sent=bool(operations), removed=stale)

    return with_retries(attempt, repo_id)


def is_same(addition: CommitOperationAdd, remote: RepoSibling | None) -> bool:
    """Whether the Hub has this content: it shows the SHA-256 of large files (LFS), and the hash by git of others.

    `create_commit` compares too, but a taken tag and stale files must be known before it.
    """
    if remote is None:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as file:
        return remote.blob_id == git_hash(file.read())


def stale_files(files: Iterable[str], changed: Iterable[str], remote: Iterable[str]) -> list[str]:
    """What an earlier push left on the Hub and a push with weights makes wrong, as paths to remove.

    That is other weights, which could be loaded instead of the new ones; and, when the weights change, files of an
    evaluation of the old ones.
    """
    if not any(path.endswith(".safetensors") for path in files):
        return []
    others = [PurePosixPath(path) for path in remote if path not in files]
    stale = [path for path in others if path.parent.name == "" and matches(path.name, WEIGHTS)]
    if stale or any(path.endswith(".safetensors") for path in changed):
        stale += [path for path in others if str(path.parent) == "evaluation" and matches(path.name, EVALUATION)]
    return list(map(str, stale))


def refuse_taken_tag(repo_id: str, tag: str, commit: str | None, api: HfApi) -> None:
    """A tag is never moved: it may exist on `commit` only. One with the name of a branch would be ambiguous."""
    refs = api.list_repo_refs(repo_id)
    taken = [ref.name for ref in refs.branches] + [ref.name for ref in refs.tags if ref.target_commit != commit]
    if tag in taken:
        raise UserError(
            f"--tag {tag}: {repo_id} has this tag on another commit, or a branch of this name; choose another name"
        )


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
        # the fault of an upload is the cause of a RuntimeError; a refused README.md or name is a ValueError
        except (HTTPError, ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            fault = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
            if wait is None or not is_temporary(fault):
                raise UserError(f"{repo_id}: {explained(fault)}") from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def is_temporary(fault: BaseException) -> bool:
    if isinstance(fault, HfHubHTTPError):
        return fault.response.status_code in TEMPORARY
    # an answer that was cut is no JSON; what is neither of the others is a fault of the connection
    return isinstance(fault, json.JSONDecodeError) or not isinstance(fault, ValueError | OfflineModeIsEnabled)


def explained(fault: BaseException) -> str:
    details = " ".join(str(fault).split())[:300] or repr(fault)
    if isinstance(fault, HfHubHTTPError) and fault.response.status_code in ADVICE:
        return f"{ADVICE[fault.response.status_code]} ({details})"
    if is_temporary(fault):
        return f"the Hub failed {len(WAITS) + 1} times, the last time with: {details}; push again to go on from there"
    return f"refused: {details}"
