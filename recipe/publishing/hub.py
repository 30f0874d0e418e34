"""Push a training run to the Hub: which files go, which never go, and what happens when the Hub refuses or fails.

files = files_to_push(Path("outputs/demo"), evaluation=Path("outputs/demo-eval"))
repo_id = open_repository("someone/demo", private=True)
print(push_files(files, repo_id, message="Publish", tag="v1").url)
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from threading import Thread
from traceback import extract_tb
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from recipe.config import UserError
from recipe.files import read_json, refuse_no_file
from recipe.keys import checked_key
from recipe.publishing.public_paths import public_files
from recipe.publishing.secret_check import refuse_secrets
from recipe.redaction import redact
from recipe.shapes import check_shape

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
NAMES_OF_MODELS = {  # file to its field that may name a folder of this machine
    "adapter_config.json": "base_model_name_or_path",
    "config.json": "_name_or_path",
    "tokenizer_config.json": "name_or_path",
}
# what git refuses in the name of a branch or a tag, see `git help check-ref-format`
NO_REFERENCE = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/]|[/.]$|(^|/)\.|\.lock(/|$)|^$|^HEAD$")

WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt, unless the Hub names another time
SILENCE = 120  # seconds without a byte, after which a request has failed
LONGEST, SLOWEST = 600, 100_000  # seconds that all attempts may take together, and more for so many bytes a second
# statuses after which another attempt may succeed; 409 and 412: somebody else commits at the same time
TEMPORARY = {408, 409, 412, 429, 500, 502, 503, 504}
ADVICE = {
    401: "no token, or a wrong one (401); run `hf auth login`, or set HF_TOKEN to a token with write access",
    403: "the token may not write there (403); use one with write access to it",
    404: "not found, or not for this token (404); check owner, name and revision",
    413: "larger than the Hub takes (413); save the model in smaller files, see --max_shard_size of save_pretrained",
}

NO_HUB = "an answer that is none of the Hub, as of a proxy or a login page; check the network and HF_ENDPOINT"
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
    if not files.keys() & {"config.json", "adapter_config.json"}:  # they are written after the weights
        raise UserError(f"{folder}: no config.json, so the model's save was cut short; resume its run, then push")
    if "model.safetensors.index.json" in files:
        shards = set(_read(files["model.safetensors.index.json"], {"weight_map": {str: str}})["weight_map"].values())
        if missing := shards - files.keys():
            raise UserError(f"{folder}: shards of the weights are missing: {', '.join(sorted(missing))}; save it again")
    if evaluation is not None:
        files |= {f"evaluation/{name}": path for name, path in matching_files(evaluation, EVALUATION).items()}
    return files


def matching_files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Name to path of each file in a folder whose name matches one of the patterns.

    Raises:
        UserError: there is no such folder, or what has such a name is not a file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the --output_dir of scripts/train.py or scripts/eval.py")
    paths = sorted(path for path in folder.iterdir() if matches(path.name, patterns))
    for path in paths:
        refuse_no_file(path)
    return {path.name: path for path in paths}


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def refuse_local_folders(files: Mapping[str, Path]) -> None:
    """Refuse files that say the model was made from a folder of this machine.

    Raises:
        UserError: with the file, the field and the folder.
    """
    for path, file in files.items():
        field = NAMES_OF_MODELS.get(path)
        name = _read(file, {}).get(field) if field else None
        if isinstance(name, str) and name and is_local(name):
            way_out = "set it to the model's id on the Hub, such as openai-community/gpt2"
            if path == "adapter_config.json":
                way_out = "name that model's id on the Hub: scripts/publish.py --base HUB_ID; or push what "
                way_out += "scripts/merge.py makes of the adapter"
            raise UserError(
                f"{file}: {field!r} is {name!r}, a folder of this machine, which nobody else has and which may name "
                f"its user; {way_out}"
            )


def _read(path: Path, shape: Any) -> dict[str, Any]:
    content = read_json(path)
    check_shape(content, shape, str(path), "save the model again, or restore the file")
    return content


def is_local(name: str) -> bool:
    """Whether the name of a model is that of a folder, and no id of the Hub.

    >>> [is_local(name) for name in ("/home/me/base", "../base", "runs/a/base", "C:\\\\base", "someone/base")]
    [True, True, True, True, False]
    """
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).is_dir()


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        UserError: with the reason and the way out.
    """
    try:
        validate_repo_id(repo_id)
        reason = (
            "" if repo_id.isascii() else "it holds other characters than letters of ASCII, digits, '-', '_' and '.'"
        )
    except HFValidationError as error:
        reason = " ".join(str(error).split())
    if reason:
        raise UserError(
            f"{repo_id!r} is no name of a repository: write owner/name, such as someone/my-model ({reason})"
        )


def check_reference(name: str | None, flag: str) -> None:
    """Refuse what git takes for no name of a branch or a tag.

    Raises:
        UserError: with the flag.
    """
    if name is not None and NO_REFERENCE.search(name):
        raise UserError(f"{flag} {name!r}: git refuses this name; use letters, digits, '-', '_' and '.', such as v1.0")


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
    check_repo_id(repo_id)
    check_reference(revision, "the branch")
    api = hub()

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


def hub() -> HfApi:
    """The Hub with the token of this process, if there is one, without what came along with copying.

    Raises:
        UserError: the token is none, see `recipe.keys.checked_key`.
    """
    return HfApi(token=checked_key("HF_TOKEN", get_token() or ""))


def push_files(
    files: Mapping[str, Path],
    repo_id: str,
    *,
    message: str,
    revision: str | None = None,
    tag: str | None = None,
    allowed: Collection[str] = (),
) -> Push:
    """Push the files that have changed in one commit, whole or not at all; without changes there is no commit.

    Args:
        files: path in the repository to file, see `files_to_push`.
        tag: for the commit; it may exist if it is on that commit already.
        allowed: places that only look like a secret, see `refuse_secrets`.

    Raises:
        UserError: the Hub refuses or cannot be reached; the tag is on another commit, or has the name of a branch;
            there are secrets or folders of this machine in the files.
    """
    check_reference(tag, "the tag")
    refuse_local_folders(files)
    refuse_secrets(files, allowed=allowed)
    contents = public_files(files)
    api = hub()

    def attempt() -> Push:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        commit, remote = info.sha or "", {file.rfilename: file for file in info.siblings or []}
        additions = [CommitOperationAdd(path, content) for path, content in contents.items()]
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

    size = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in contents.values())
    return with_retries(attempt, repo_id, size)


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


def with_retries(attempt: Callable[[], Result], repo_id: str, size: int = 0) -> Result:
    """What `attempt` returns, after at most `len(WAITS)` temporary faults, and within a time that is bounded.

    `huggingface_hub` repeats uploads and reading by itself, but not commits, and it waits for an answer without end.
    Each attempt looks at the Hub anew, so that a commit whose answer was lost is not made twice.

    Args:
        size: of what is sent, in bytes.

    Raises:
        UserError: the fault in one line, with the way out.
    """
    longest = LONGEST + size / SLOWEST
    end = time.monotonic() + longest
    for tried, wait in enumerate((*WAITS, None), start=1):
        try:
            return _within(end - time.monotonic(), attempt)
        except _NotInTimeError as error:
            said = f"the Hub has not answered within {longest:,.0f} s, and what is on its way may still arrive"
            raise UserError(f"{repo_id}: {said}; push again to make sure") from error
        # the fault of an upload is the cause of a RuntimeError; a refused README.md or name is a ValueError
        except (HTTPError, ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            fault = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
            wait = _wait_before_next(fault, wait)
            if wait is None or not is_temporary(fault) or time.monotonic() + wait > end:
                raise UserError(f"{repo_id}: {explained(fault, tried)}") from error
            time.sleep(wait)
        except (LookupError, TypeError, AttributeError) as error:  # of the library, which trusts an answer's shape
            if "huggingface_hub" not in extract_tb(error.__traceback__)[-1].filename:
                raise
            raise UserError(f"{repo_id}: {NO_HUB} ({error!r})") from error
    raise AssertionError("the last attempt returns or raises")


class _NotInTimeError(Exception):
    """The time for all attempts is over."""


def _within(seconds: float, attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns or raises, from a thread that is left behind when the time is over."""
    get_session().timeout = SILENCE  # the library sets none
    outcome: Future[Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(attempt())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=work, daemon=True).start()
    if not wait_for([outcome], max(0, seconds)).done:
        raise _NotInTimeError
    return outcome.result()


def _wait_before_next(fault: BaseException | None, wait: float | None) -> float | None:
    """Seconds until the next attempt: as many as the Hub asks for, if it does."""
    asked = fault.response.headers.get("Retry-After", "") if isinstance(fault, HfHubHTTPError) else ""
    return wait if wait is None or not asked.isdecimal() else max(wait, float(asked))


def is_temporary(fault: BaseException) -> bool:
    if isinstance(fault, HfHubHTTPError):
        return fault.response.status_code in TEMPORARY
    # an answer that was cut is no JSON; what is neither of the others is a fault of the connection
    return isinstance(fault, json.JSONDecodeError) or not isinstance(fault, ValueError | OfflineModeIsEnabled)


def explained(fault: BaseException, tried: int) -> str:
    details = " ".join(redact(str(fault) or repr(fault)).split())[:300]
    details = f"{NO_HUB} ({details})" if isinstance(fault, json.JSONDecodeError) else details
    if isinstance(fault, HfHubHTTPError) and fault.response.status_code in ADVICE:
        return f"{ADVICE[fault.response.status_code]} ({details})"
    if is_temporary(fault):
        times = "once" if tried == 1 else f"{tried} times, the last time"
        return f"the Hub failed {times} with: {details}; push again to go on from there"
    return f"refused: {details}"
