"""Push a training run to the Hub: what of its folder goes, what never goes, and how a push gets past faults.

files = files_to_push(Path("outputs/demo"), evaluation=Path("outputs/demo-eval"))
repo_id = open_repository("someone/demo", private=True)
print(push_files(files, repo_id, message="Publish", tag="v1").url)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from accelerate import PartialState
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from recipe.config import UserError
from recipe.files import read_json
from recipe.provenance import HUB_TOKEN

# What may leave this machine, by name. Whatever is not named here stays: training_args.bin above all, a pickle in which
# the Trainer keeps --hub_token in clear, and which its own push uploads.
WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
)
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
RECORDS = ("README.md", "run.json", "trainer_state.json", "loss.png", "samples.jsonl")
EVALUATION = ("metrics.json", "model-index.yml", "report.html", "predictions.jsonl", "*.png")
# Pickles, all but the last; transformers loads them with `weights_only=True`. Only `--hub_strategy checkpoint` and
# `all_checkpoints` push them, because without them there is no resuming.
RESUMING = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_*.pth", "trainer_state.json")
NOT_TEXT = {".safetensors", ".pt", ".pth", ".png", ".model"}

SECRETS = {
    "a token of the Hub": HUB_TOKEN,
    "credentials in an address": re.compile(
        r"https?://[^\s/?#@\"'<>\\]+@|[a-z][a-z0-9+.-]*://[^\s/?#:@\"'<>\\]*:[^\s/?#@\"'<>\\]+@"
    ),
}
SECRET_VARIABLE = re.compile(r".*(TOKEN|KEY|SECRET|PASSWORD)")
SHORTEST_SECRET = 12  # characters of a variable's value; shorter ones may be words

WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt of a push
PASSING = {408, 409, 412, 429, 500, 502, 503, 504}  # HTTP states that another attempt may get past
STAGE = ".push"  # under the output folder: links to what is being uploaded

Result = TypeVar("Result")


@dataclass(frozen=True)
class Change:
    """A file beside what the Hub has of it. `state`: new, changed, unchanged, or removed (of an earlier push).

    `size` is in bytes.
    """

    path: str
    size: int
    state: str


@dataclass(frozen=True)
class Push:
    """What a push came to: the commit, its address, and every file. Without a new commit it is the one before."""

    url: str
    commit: str
    changes: list[Change]

    @property
    def sent(self) -> list[Change]:
        return [change for change in self.changes if change.state != "unchanged"]


# --- what goes ------------------------------------------------------------------------------------------------------


def files_to_push(folder: Path, evaluation: Path | None = None) -> dict[str, Path]:
    """What of a saved model's folder, and of its evaluation's, goes to the Hub: path in the repository to file.

    Whether the evaluation is of this model is not looked at here: see `recipe.publishing.card.read_scores`.

    >>> files_to_push(Path("recipe/demo/base"))["model.safetensors"].as_posix()
    'recipe/demo/base/model.safetensors'

    Raises:
        UserError: a folder is missing, or holds no weights in safetensors or not all of them.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the output folder of a training run")
    if evaluation is not None and not evaluation.is_dir():
        raise UserError(f"--evaluation {evaluation}: no such folder; name the --output_dir of scripts/eval.py")
    files = _matching(folder, (*WEIGHTS, *SETTINGS, *RECORDS))
    if not any(path.suffix == ".safetensors" for path in files.values()):
        raise UserError(
            f"{folder}: no weights in safetensors (model.safetensors) to push; name a finished run's folder"
        )
    if "model.safetensors.index.json" in files:
        shards = set(read_json(files["model.safetensors.index.json"])["weight_map"].values())
        if missing := shards - files.keys():
            raise UserError(
                f"{folder}: the weights are not whole, {', '.join(sorted(missing))} missing; save them again"
            )
    if evaluation is not None:
        files |= {f"evaluation/{name}": path for name, path in _matching(evaluation, EVALUATION).items()}
    return files


def files_to_resume(checkpoint: Path, path_in_repo: str) -> dict[str, Path]:
    """All of a `checkpoint-N` folder that resuming needs, to be pushed below `path_in_repo`."""
    files = _matching(checkpoint, (*WEIGHTS, *SETTINGS, *RESUMING))
    return {f"{path_in_repo}/{name}": path for name, path in files.items()}


def _matching(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: path for path in paths if any(fnmatchcase(path.name, pattern) for pattern in patterns)}


def refuse_secrets(files: Mapping[str, Path], drafts: Mapping[str, str] | None = None) -> None:
    """Look for secrets in all files that are text: tokens of the Hub, credentials in addresses, and the values of this
    process's own secret variables (`HF_TOKEN`, `WANDB_API_KEY`, ...).

    Args:
        files: path in the repository to file.
        drafts: texts that will stand at such a path, in place of the file that may be there now.

    Raises:
        UserError: there are some; it names each file and line, and does not repeat the secret.
    """
    values = {name: value for name, value in os.environ.items() if SECRET_VARIABLE.fullmatch(name)}
    values["HF_TOKEN"] = get_token() or ""
    values = {name: value for name, value in values.items() if len(value) >= SHORTEST_SECRET}
    drafts = drafts or {}
    texts = {
        str(path): path.read_text(encoding="utf-8", errors="replace")
        for name, path in files.items()
        if path.suffix not in NOT_TEXT and name not in drafts
    }
    texts |= {f"the new {name}": text for name, text in drafts.items()}
    problems = []
    for where, text in texts.items():
        for number, line in enumerate(text.split("\n"), start=1):
            found = [what for what, pattern in SECRETS.items() if pattern.search(line)]
            found += [f"the value of {name}" for name, value in values.items() if value in line]
            problems += [f"{where} line {number}: holds {found[0]}"] if found else []
    if problems:
        raise UserError(
            "\n".join([*problems, "nothing was pushed: take it out of the file, or the file out of the folder"])
        )


# --- how it goes ----------------------------------------------------------------------------------------------------


def open_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, api: HfApi | None = None
) -> str:
    """Make the model repository and the branch `revision` where they are missing, and check that we may write there.

    Args:
        repo_id: `owner/name`; without an owner, the token's.
        private: whether a repository that is made here is private; None for what is the owner's default.

    Returns:
        The whole `owner/name`.

    Raises:
        UserError: the token is missing, wrong or may not write; the repository is public and should be private; the Hub
            cannot be reached.
    """
    api = api or HfApi()

    def attempt() -> str:
        whole_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(whole_id, write=True)  # for a repository that exists, create_repo is content if it can be read
        if private and not api.model_info(whole_id).private:
            raise UserError(
                f"{whole_id} exists and is public; make it private in its settings on the Hub, or name another one"
            )
        if revision is not None:
            api.create_branch(whole_id, branch=revision, exist_ok=True)
        return whole_id

    return _persistently(attempt, repo_id, api)


def push_files(
    files: Mapping[str, Path],
    repo_id: str,
    *,
    message: str,
    revision: str | None = None,
    tag: str | None = None,
    api: HfApi | None = None,
    show: Callable[[list[Change]], None] = lambda _: None,
) -> Push:
    """Push what differs from the Hub in one commit, whole or not at all; without a difference, none is made.

    Files are compared by what git keeps of them: the SHA-256 of large ones (LFS), the SHA-1 of others as git blobs.
    Weights that an earlier push left in the same folder, and that would be loaded instead or beside, are removed; where
    the weights at the top change, so are files in `evaluation/` that are not part of this push: they are of old ones.
    Faults that may pass are tried again (`WAITS`), each time from a new look at the Hub, so that nothing goes twice;
    `huggingface_hub` itself repeats uploads (5 times) and reading, but no commit.

    Args:
        files: path in the repository to file, see `files_to_push`.
        tag: a tag on the commit; one that is there already is left where it is.
        show: called with the changes before anything is sent.

    Raises:
        UserError: the Hub refuses or cannot be reached; the tag is at another commit, or the name of a
            branch; there are secrets in the files.
    """
    api = api or HfApi()
    refuse_secrets(files)
    shown = False

    def attempt() -> Push:
        nonlocal shown
        changes = compare_with_hub(files, repo_id, revision, api)
        if not shown:
            show(changes)
            shown = True
        changed = [change for change in changes if change.state != "unchanged"]
        tagged = _commit_of_tag(repo_id, tag, api) if tag else None
        commit = api.model_info(repo_id, revision=revision).sha
        if tagged is not None and (changed or tagged != commit):
            raise UserError(f"--tag {tag} is at another commit of {repo_id} already ({tagged[:8]}); choose a new name")
        if changed:
            operations = [
                CommitOperationDelete(change.path)
                if change.state == "removed"
                else CommitOperationAdd(change.path, files[change.path])
                for change in changed
            ]
            commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision).oid
        assert commit is not None
        if tag and tagged is None:
            api.create_tag(repo_id, tag=tag, revision=commit)
        return Push(f"{api.endpoint}/{repo_id}/tree/{tag or revision or 'main'}", commit, changes)

    return _persistently(attempt, repo_id, api)


def compare_with_hub(files: Mapping[str, Path], repo_id: str, revision: str | None, api: HfApi) -> list[Change]:
    """Each file beside what the Hub has at its path, in order; then what is there of an earlier push and has to go."""
    found = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    remote = {entry.path: entry for entry in found if isinstance(entry, RepoFile)}
    changes = [Change(path, file.stat().st_size, _state(file, remote.get(path))) for path, file in files.items()]
    folders = {_folder(path) for path in files if _is_weights(path)}
    stale = [path for path in remote if path not in files and _is_weights(path) and _folder(path) in folders]
    changed = [*stale, *(change.path for change in changes if change.state != "unchanged")]
    if any(_is_weights(path) and _folder(path) == "." for path in changed):  # scores of other weights
        stale += [path for path in remote if path not in files and _is_evaluation(path)]
    return [*changes, *(Change(path, remote[path].size, "removed") for path in stale)]


def _folder(path: str) -> str:
    return str(PurePosixPath(path).parent)


def _is_weights(path: str) -> bool:
    return any(fnmatchcase(PurePosixPath(path).name, pattern) for pattern in WEIGHTS)


def _is_evaluation(path: str) -> bool:
    name = PurePosixPath(path).name
    return _folder(path) == "evaluation" and any(fnmatchcase(name, pattern) for pattern in EVALUATION)


def _state(file: Path, remote: RepoFile | None) -> str:
    if remote is None:
        return "new"
    if file.stat().st_size != remote.size:
        return "changed"
    with open(file, "rb") as content:
        if remote.lfs is not None:
            same = hashlib.file_digest(content, "sha256").hexdigest() == remote.lfs.sha256
        else:
            blob = b"blob %d\0" % remote.size + content.read()
            same = hashlib.sha1(blob, usedforsecurity=False).hexdigest() == remote.blob_id
    return "unchanged" if same else "changed"


def _commit_of_tag(repo_id: str, tag: str, api: HfApi) -> str | None:
    refs = api.list_repo_refs(repo_id)
    if tag in {branch.name for branch in refs.branches}:
        raise UserError(f"--tag {tag} is the name of a branch of {repo_id}; choose another name, such as v1")
    return next((known.target_commit for known in refs.tags if known.name == tag), None)


# --- faults ---------------------------------------------------------------------------------------------------------


def _persistently(attempt: Callable[[], Result], repo_id: str, api: HfApi) -> Result:
    """What `attempt` returns, at the latest after `len(WAITS)` faults that may pass."""
    for wait in (*WAITS, None):
        try:
            return attempt()
        # an upload's fault comes as the cause of a RuntimeError; a refused README.md or name as a ValueError
        except (HTTPError, ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            fault = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
            if wait is None or not _may_pass(fault):
                raise _explained(fault, repo_id, api) from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _may_pass(fault: BaseException) -> bool:
    if isinstance(fault, HfHubHTTPError):
        return fault.response.status_code in PASSING
    if isinstance(fault, OfflineModeIsEnabled):
        return False
    # a connection that was cut, timed out or not made, or an answer that was cut
    return isinstance(fault, HTTPError | ConnectionError | TimeoutError | RuntimeError | json.JSONDecodeError)


def _explained(fault: BaseException, repo_id: str, api: HfApi) -> UserError:
    """A fault in one line, with the way out."""
    said = " ".join(str(fault).split())[:300]
    status = fault.response.status_code if isinstance(fault, HfHubHTTPError) else None
    if isinstance(fault, OfflineModeIsEnabled):
        return UserError(f"{repo_id}: the Hub is not asked while HF_HUB_OFFLINE is set; unset it to push")
    if isinstance(fault, HFValidationError):
        return UserError(f"{repo_id!r} is no name of a repository; write owner/name ({said})")
    if status == 401:
        token = "the token was refused" if api.token or get_token() else "no token is set"
        return UserError(f"{repo_id}: {token} (401); run `hf auth login`, or set HF_TOKEN to one with write access")
    if status == 403:
        return UserError(f"{repo_id}: the token may not write there (403); use one with write access to it ({said})")
    if isinstance(fault, RevisionNotFoundError):
        return UserError(f"{repo_id}: no such revision ({said})")
    if status == 404 or isinstance(fault, RepositoryNotFoundError):
        return UserError(f"{repo_id}: not found, or not for this token (404); check owner and name ({said})")
    if _may_pass(fault):
        return UserError(
            f"{repo_id}: the Hub failed {len(WAITS) + 1} times, at last with: {said or repr(fault)}; what was uploaded "
            "stays there, and the same push goes on from it"
        )
    return UserError(f"{repo_id}: the Hub refused the push: {said or repr(fault)}")


# --- while training -------------------------------------------------------------------------------------------------


class PushToHub(TrainerCallback):
    """Pushes checkpoints in the background while training goes on, and the finished run at the end.

    Takes the place of the stock Trainer's push, which uploads everything in the output folder, `training_args.bin` with
    the token among it, and replaces the model card. Each save pushes the model; with the strategies `checkpoint` and
    `all_checkpoints` also what resuming needs, below `last-checkpoint/` or `checkpoint-N/`. What is uploaded is linked
    under `output_dir/.push/` first, so that `--save_total_limit` can remove a checkpoint meanwhile. A push that fails
    or is skipped is reported in a line and does not stop training; `finish` pushes what is missing then.

    As a context it ends with training: when that fails or is interrupted, saves that still wait are not pushed, and the
    push that is under way is waited for.

    Args:
        repo_id: `owner/name`, see `open_repository`.
        strategy: end, every_save, checkpoint or all_checkpoints, as in `transformers.TrainingArguments.hub_strategy`.
        always: push every save, in their order, also while the one before is still being uploaded; else such a save is
            skipped.

    Example::

        push = PushToHub(open_repository("someone/demo"), strategy="checkpoint")
        trainer = Trainer(model, args, callbacks=[push], ...)
        with push:
            trainer.train()
            trainer.save_model()
        push.finish(Path(args.output_dir))
    """

    def __init__(
        self,
        repo_id: str,
        strategy: str = "every_save",
        *,
        revision: str | None = None,
        always: bool = False,
        api: HfApi | None = None,
    ) -> None:
        self.repo_id = repo_id
        self.strategy = strategy
        self.with_checkpoints = strategy in ("checkpoint", "all_checkpoints")
        self.revision = revision
        self.always = always
        self.api = api or HfApi()
        # Threads that wait for one another, so that commits come one after the other. Daemons, and so no executor's:
        # Python ends without them when somebody does not want to wait.
        self._last: threading.Thread | None = None
        self._stopped = threading.Event()
        self._saved: list[int] = []  # steps
        self._pushed: set[int] = set()
        self._bars = not are_progress_bars_disabled()

    def __enter__(self) -> PushToHub:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        self._stopped.set()
        if self._last is not None and self._last.is_alive():
            tqdm.write(
                f"waiting for the push to {self.repo_id} that is under way; Ctrl-C ends it, and the Hub keeps the "
                "commit before"
            )
            self._last.join()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            shutil.rmtree(Path(args.output_dir) / STAGE, ignore_errors=True)  # of a run that was killed
            if self._bars:
                disable_progress_bars()  # those of uploads would break the Trainer's own

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the checkpoint that was just saved to the background."""
        if self.with_checkpoints:
            PartialState().wait_for_everyone()  # each process writes its own random state
        if not state.is_world_process_zero or self.strategy == "end":
            return
        step = state.global_step
        self._saved.append(step)
        if self._last is not None and self._last.is_alive() and not self.always:
            tqdm.write(f"  step {step}: not pushed, an earlier push is still under way")
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
        stage = Path(args.output_dir) / STAGE / checkpoint.name
        try:
            _link_files(_matching(checkpoint, (*WEIGHTS, *SETTINGS, *RESUMING)).values(), stage)
        except OSError as error:  # a full disk, where files cannot be linked: training goes on
            shutil.rmtree(stage, ignore_errors=True)
            tqdm.write(f"  step {step}: not pushed: {error}")
            return
        self._last = threading.Thread(target=self._push_save, args=(stage, step, self._last), daemon=True)
        self._last.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._bars:
            enable_progress_bars()

    def finish(self, output_dir: Path) -> Push:
        """Wait for what is still being uploaded, push checkpoints that are missing, then the finished run.

        A checkpoint that cannot be pushed is told in a line.

        Raises:
            UserError: the push failed or was interrupted; it names the command that pushes later.
        """
        try:
            if self._last is not None:
                self._last.join()
            shutil.rmtree(output_dir / STAGE, ignore_errors=True)
            self._push_missing_checkpoints(output_dir)
            files = files_to_push(output_dir)
            return push_files(files, self.repo_id, message="End of training", revision=self.revision, api=self.api)
        except (UserError, KeyboardInterrupt) as error:
            self._stopped.set()
            said = "the push was interrupted" if isinstance(error, KeyboardInterrupt) else error
            command = ["python", "scripts/publish.py", str(output_dir), "--repo_id", self.repo_id]
            command += ["--revision", self.revision] if self.revision else []
            raise UserError(
                f"{said}\nthe run itself is whole in {output_dir}/; this pushes it later: {shlex.join(command)}"
            ) from error

    def _push_save(self, stage: Path, step: int, before: threading.Thread | None) -> None:
        message = f"Training in progress, step {step}"
        try:
            if before is not None:
                before.join()
            if self._stopped.is_set():
                return
            model = _matching(stage, (*WEIGHTS, *SETTINGS, *RECORDS))
            push_files(model, self.repo_id, message=message, revision=self.revision, api=self.api)
            if self.with_checkpoints:
                # in a second commit: the weights are on the Hub by now, and are not uploaded again
                self._push_checkpoint(stage, step)
        except Exception as error:  # whatever it is, training goes on
            said = str(error) if isinstance(error, UserError) else repr(error)
            tqdm.write(f"  step {step}: not pushed: {' '.join(said.split())}")
        else:
            tqdm.write(f"  step {step}: pushed to {self.repo_id}")
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _push_checkpoint(self, checkpoint: Path, step: int) -> None:
        folder = "last-checkpoint" if self.strategy == "checkpoint" else f"checkpoint-{step}"
        files = files_to_resume(checkpoint, folder)
        message = f"Training in progress, step {step}, checkpoint"
        push_files(files, self.repo_id, message=message, revision=self.revision, api=self.api)
        self._pushed.add(step)

    def _push_missing_checkpoints(self, output_dir: Path) -> None:
        """Push what resuming needs where that was skipped or failed; of `last-checkpoint/` only the last matters."""
        if not self.with_checkpoints:
            return
        for step in self._saved[-1:] if self.strategy == "checkpoint" else self._saved:
            checkpoint = output_dir / f"checkpoint-{step}"
            try:
                if step not in self._pushed and not checkpoint.is_dir():
                    raise UserError(f"{checkpoint} was removed before it was pushed")
                if step not in self._pushed:
                    self._push_checkpoint(checkpoint, step)
            except UserError as error:
                tqdm.write(f"  step {step}: what resuming needs is not on the Hub: {' '.join(str(error).split())}")


def take_over_push(args: TrainingArguments) -> PushToHub:
    """The callback that pushes as `args` wish, after a check that it may; the stock Trainer then does not push.

    Raises:
        UserError: see `open_repository`.
    """
    args.push_to_hub = False
    api = HfApi(token=args.hub_token)
    repo_id = args.hub_model_id or Path(args.output_dir or "").absolute().name
    if args.process_index == 0:
        repo_id = open_repository(repo_id, private=args.hub_private_repo, revision=args.hub_revision, api=api)
    strategy = HubStrategy(args.hub_strategy).value
    return PushToHub(repo_id, strategy, revision=args.hub_revision, always=args.hub_always_push, api=api)


def _link_files(paths: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        try:
            os.link(path, folder / path.name)
        except OSError:  # a file system without links
            shutil.copy2(path, folder / path.name)
