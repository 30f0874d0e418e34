"""Paths in what a push sends: one outside of the working folder may name a user; only its last part is sent.

The files here keep their paths, by which an evaluation or a resumed run finds its data again.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from recipe.publishing.secret_check import read_text

# what is written by a run or an evaluation, and by libraries beside a model; records and answers stay as they are
DESCRIBING = (
    "README.md", "run.json", "trainer_state.json", "metrics.json", "evaluation.json", "report.html", "config.json",
    "generation_config.json", "adapter_config.json", "tokenizer_config.json", "model.safetensors.index.json",
)  # fmt: skip
_PART = r"[^/\\\s\"'`<>|,;:()\[\]{}=&?*]"
_ROOT = rf"(?:~[\w.-]*[/\\]|\.\.[/\\]|[A-Za-z]:[/\\]{{1,2}}|/(?={_PART}+/)|\\\\)"
# in a text: a root, folders, and 1: the last part
PATH = re.compile(
    rf"(?:(?<![^\s\"'`=:,;()\[\]{{}}>|])|(?<=file://)){_ROOT}(?:{_PART}+[/\\]+)*({_PART}*)(?:--(?=[\w.]+$))?"
)
QUOTED_PATH = re.compile(rf"(['\"]){_ROOT}[^'\"\n]*\1")
WHOLE_PATH = re.compile(rf"{_ROOT}[^\n\"]*")  # as a value of its own; there it may hold blanks and other signs


def public_files(files: Mapping[str, Path]) -> dict[str, Path | bytes]:
    """What is sent of each file: the file, or its text with paths shortened.

    Args:
        files: path in the repository to file.

    Example::

        public_files({"run.json": Path("outputs/demo/run.json")})  # {'run.json': b'{"data": "…/records.jsonl", ...'}
    """
    texts = {path: read_text(file) for path, file in files.items() if PurePosixPath(path).name in DESCRIBING}
    found: dict[str, str] = {}
    for path, text in texts.items():
        found |= _paths_of_json(text) if path.endswith(".json") else _paths_in(text) if path.endswith(".md") else {}
    short = {path: _shortened(text, found) for path, text in texts.items()}
    return {path: short[path].encode() if short.get(path, "") != texts.get(path, "") else files[path] for path in files}


def shorten_paths(text: str) -> str:
    """A text with each path outside of the working folder shortened.

    >>> shorten_paths("python train.py --data /home/me/a.jsonl --model_name_or_path recipe/demo/base")
    'python train.py --data …/a.jsonl --model_name_or_path recipe/demo/base'
    """
    return _shortened(text, _paths_in(text))


def _paths_in(text: str) -> dict[str, str]:
    """The paths in a text, and what is sent of each."""
    if WHOLE_PATH.fullmatch(text) and not re.search(r"\s-", text):
        return {text: f"…/{_last(text)}"}
    found = {match[0][1:-1]: f"…/{_last(match[0][1:-1])}" for match in QUOTED_PATH.finditer(text)}
    return found | {match[0]: f"…/{match[1] or _last(match[0])}" for match in PATH.finditer(text)}


def _last(path: str) -> str:
    """The last part of a path; none if that is the folder of a user itself."""
    parts = [part for part in re.split(r"[/\\]+", path) if part]
    of_user = re.match(r"[/\\]*(home|Users)[/\\]", path) and len(parts) < 3
    return parts[-1] if parts and not of_user else ""


def _paths_of_json(text: str) -> dict[str, str]:
    try:
        content = json.loads(text)
    except ValueError:  # of a file that was damaged; it is sent as a text
        return _paths_in(text)
    found: dict[str, str] = {}
    for value in _strings(content):
        found |= _paths_in(value)
    return found


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from (key, *_strings(value))
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value)


def _shortened(text: str, found: Mapping[str, str]) -> str:
    """A text with these paths shortened, as they are and as JSON and HTML write them; the longest first."""
    for path in sorted(found, key=len, reverse=True):
        if len(path) < 4:
            continue
        in_json, in_ascii = (json.dumps(path, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
        for spelling in dict.fromkeys((path, in_json, in_ascii, html.escape(path), html.escape(in_json))):
            text = text.replace(spelling, found[path])
    return text
