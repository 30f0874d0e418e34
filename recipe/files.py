"""Files: written whole or not at all, and read with a clear message if they are damaged."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipe.config import UserError
from recipe.redaction import redact


def check_place(output_dir: str | Path | None) -> None:
    """Refuse a folder that cannot be made or written to, before anything is computed.

    Raises:
        UserError: none is named, it is or would be in a file, or the system refuses.
    """
    if not str(output_dir or ""):
        raise UserError("say where the results go: --output_dir FOLDER")
    path = Path(str(output_dir)).absolute()
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        raise UserError(f"--output_dir {output_dir}: {nearest} is a file; name a folder")
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".recipe-"):
            pass
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir}: {nearest} cannot be written to ({error.strerror}); name another folder"
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, even if the process dies or the disk is full; text in UTF-8, without secrets.

    Half a character, which UTF-8 cannot hold, becomes its escape (`\\ud83d`).

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    try:
        if isinstance(content, str):
            content = redact(content).encode("utf-8", "backslashreplace")
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_whole` for JSON; NaN is refused, because JSON has none."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """`write_whole` for JSON lines, one a row."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours.

    Raises:
        UserError: it is not JSON.
    """
    return _parse(path.read_bytes(), str(path))


def read_json_lines(path: Path) -> list[Any]:
    """The rows of a JSON lines file of ours; only a newline ends a row.

    Raises:
        UserError: a line is not JSON.
    """
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return [_parse(line, f"{path} line {number}") for number, line in lines if line.strip()]


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(
            f"{where}: not JSON ({error}); fix it, or remove the file and run again what writes it"
        ) from error


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file: 16 hexadecimal digits."""
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
