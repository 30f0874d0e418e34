"""Files: written whole or not at all, and read with a clear message if they are damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recipe.config import UserError
from recipe.redaction import redact
from recipe.shapes import check_shape, shown

DEEPEST = 100  # values within values; nothing of ours comes near
TOO_DEEP = "nested too deeply"
SEAL = "sha256"  # the name under which a JSON file holds its own hash
# What only a killed process leaves in an output folder, where one process writes at a time: see `sweep`.
PLACE_TRIAL, DRAFT = ".recipe-", ".draft"
LEFTOVERS = (f"{PLACE_TRIAL}*", ".trial-*", f".*{DRAFT}")
# what file systems that cannot flush a folder (some network and FUSE file systems) answer
NO_FOLDER_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS}


def check_place(output_dir: str | Path | None) -> None:
    """Refuse a folder that cannot be made or written to, before anything is computed.

    Raises:
        UserError: none is named, it is or would be in a file, or the system refuses.
    """
    if not str(output_dir or ""):
        raise UserError("say where the results go: --output_dir FOLDER")
    path = Path(str(output_dir)).absolute()
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, or with a character that no name has
        said = getattr(error, "strerror", None) or error
        raise UserError(f"--output_dir {output_dir!r}: {said}; name another folder") from error
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        raise UserError(f"--output_dir {output_dir}: {nearest} is a file; name a folder")
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=PLACE_TRIAL):
            pass
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir}: {nearest} cannot be written to ({error.strerror}); name another folder"
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, even if the process dies, the power fails or the disk is full.

    Text is written in UTF-8, without secrets; half a character, which UTF-8 cannot hold, as its escape (`\\ud83d`).

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    make_folder(path.parent)
    if isinstance(content, str):
        content = redact(content).encode("utf-8", "backslashreplace")
    with draft_of(path) as draft:
        draft.write_bytes(content)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A name of its own beside `path`, to write to; the file there is flushed, then takes the place of `path`.

    Raises:
        OSError: it cannot be written; the error names `path`.

    Example::

        with draft_of(output_dir / "trainer_state.json") as draft:
            trainer.state.save_to_json(str(draft))
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{DRAFT}")
    try:
        with naming(path):
            yield draft
            flush(draft)
            draft.replace(path)
            flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system name a file: those of writing to one that is open do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush(path: Path) -> None:
    """Wait until the disk holds a file's content, or the names in a folder, so that a power failure keeps them."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that a power failure keeps them."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush(folder.parent)


def flush_place(folder: Path) -> None:
    """Let the disk hold the names in a folder, and the folder's own name and those above it, whoever made them."""
    flush(folder)
    for above in folder.absolute().parents:
        with suppress(OSError):  # of another user, where nobody but they can make folders
            flush(above)


def sweep(folder: Path) -> None:
    """Remove what a killed run has left unfinished in its output folder, where nobody else writes now."""
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_whole` for JSON; NaN is refused, because JSON has none."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """`write_whole` for JSON lines, one a row."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def is_there(path: Path) -> bool:
    """Whether something has this name; what is no file is refused when it is read, and not taken for missing."""
    return os.path.lexists(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours.

    Raises:
        UserError: it is not JSON.
    """
    return _parse(read_file(path), str(path))


def read_file(path: Path) -> bytes:
    """The bytes of a file; a pipe, from which reading would wait, is none.

    Raises:
        UserError: it is no file.
    """
    refuse_no_file(path)
    return path.read_bytes()


def refuse_no_file(path: Path) -> None:
    """Refuse what is there and no file, before somebody waits to read it, or takes it for missing.

    Raises:
        UserError: it is a folder, a pipe or a link to nothing.
    """
    if is_there(path) and not path.is_file():
        raise UserError(f"{path}: a folder, a pipe or a link to nothing, not a file; remove it, or put the file back")


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """`write_json` with a hash of the content in it, by which `read_sealed` sees that somebody has changed it."""
    write_json(path, sealed(content))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object, as it will be read back, with a hash of itself.

    >>> sealed({"n": 1}) == sealed(sealed({"n": 1}))
    True
    """
    written = json.loads(redact(json.dumps(content, allow_nan=False)))
    return {**{name: value for name, value in written.items() if name != SEAL}, SEAL: own_hash(written)}


def own_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object but for the hash that it holds."""
    rest = {name: value for name, value in content.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_sealed(path: Path, shape: Any, way_out: str) -> dict[str, Any]:
    """The content of a file that `write_sealed` has written, without its hash.

    One without a hash, as an earlier version wrote it, is taken, and a line on stderr says so.

    Args:
        shape: see `recipe.shapes`.
        way_out: what to do if it was changed.

    Raises:
        UserError: it is not JSON, not what was written, or of another shape.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: it is {shown(content)}, not an object; {way_out}")
    if not _is_finite(content):
        raise UserError(f"{path}: it holds NaN or Infinity, which nothing here writes; {way_out}")
    if SEAL not in content:
        print(f"note: {path} holds no hash of itself, so whether it was changed is not known", file=sys.stderr)
    elif content.pop(SEAL) != own_hash(content):
        raise UserError(
            f"{path} was changed after it was written (its SHA-256 differs): put it back, or {way_out}; to use it as "
            f"it is, take the line {SEAL!r} out of it"
        )
    check_shape(content, shape, str(path), way_out)
    return content


def read_json_lines(path: Path) -> list[Any]:
    """The rows of a JSON lines file of ours; only a newline ends a row.

    Raises:
        UserError: a line is not JSON, or holds NaN or Infinity.
    """
    lines = enumerate(read_file(path).split(b"\n"), start=1)
    rows = {number: _parse(line, f"{path} line {number}") for number, line in lines if line.strip()}
    for number, row in rows.items():
        if not _is_finite(row):
            raise UserError(f"{path} line {number}: it holds NaN or Infinity, which nothing here writes; fix it")
    return [*rows.values()]


def parse_json(content: str | bytes) -> Any:
    """`json.loads`, for which what is nested too deeply is not JSON.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        level = [inner for inner in level if isinstance(inner, dict | list)]
        if not level:
            return value
    raise ValueError(TOO_DEEP)


def _is_finite(value: Any) -> bool:
    """Whether a value can be written again: `json.loads` takes NaN, and reads 1e999 as Infinity."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _parse(content: bytes, where: str) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(
            f"{where}: not JSON ({error}); fix it, or remove the file and run again what writes it"
        ) from error


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file: 16 hexadecimal digits."""
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
