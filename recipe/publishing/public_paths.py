"""Paths in what a push sends: one outside of the working folder may name a user; only its last part is sent.

The last part is left out too if it is the folder of a user itself (`/home/me`). The files here keep their paths, by
which an evaluation or a resumed run finds its data again.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from recipe.files import SEAL, own_hash, parse_json, sealed
from recipe.publishing.secret_check import read_text

# what is written by a run or an evaluation, and by libraries beside a model; records and answers stay as they are
DESCRIBING = (
    "README.md", "run.json", "trainer_state.json", "metrics.json", "evaluation.json", "report.html", "config.json",
    "generation_config.json", "adapter_config.json", "tokenizer_config.json", "model.safetensors.index.json",
)  # fmt: skip
_PART = r"[^/\\\s\"'`<>|,;:()\[\]{}=&?*]"
_ROOT = rf"(?:~[\w.-]*[/\\]|\.\.[/\\]|/?[A-Za-z]:[/\\]{{1,2}}|/(?={_PART}+/)|\\\\)"
_BEFORE = r"(?<![^\s\"'`=:,;()\[\]{}>|@])"  # no part of a longer path, and no host of an address
_FILE = r"(?<=file://)|(?<=file://localhost)"
PATH = re.compile(rf"(?:{_BEFORE}|{_FILE}){_ROOT}(?:{_PART}+[/\\]+)*{_PART}*")  # in a text
QUOTED_PATH = re.compile(rf"(['\"])(?:--?[\w-]+=)?({_ROOT}[^'\"\n]*)\1")  # in it, also with blanks and other signs
WHOLE_PATH = re.compile(rf"{_ROOT}[^\n\"]*|~[A-Za-z][\w.-]*")  # as a value of its own
MORE = re.compile(rf"\s-|://|[\s,;]{_ROOT}")  # which says that a text goes on behind a path: a flag, an address, a path
# the folder of a user itself; deeper in a path, what has an ending is a file, as in `/data/users/records.json`
OF_USER = re.compile(
    r"(?:(?:/+|/?[A-Za-z]:[/\\]+)(?:home|users)[/\\]+[^/\\]+|.*[/\\](?:home|users)[/\\]+[^/\\.]+|~[^/\\]*)[/\\]*",
    re.IGNORECASE,
)


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
    short = {path: _sealed_again(_shortened(text, found), text) for path, text in texts.items()}
    return {path: short[path].encode() if short.get(path, "") != texts.get(path, "") else files[path] for path in files}


def _sealed_again(text: str, before: str) -> str:
    """A text whose own hash, if it is JSON that holds one, is that of what is sent."""
    if text == before or f'"{SEAL}"' not in text:
        return text
    try:
        content = parse_json(text)
    except ValueError:
        return text
    is_whole = isinstance(content, dict) and SEAL in content and own_hash(parse_json(before)) == content[SEAL]
    return json.dumps(sealed(content), indent=2, ensure_ascii=False) + "\n" if is_whole else text


def shorten_paths(text: str) -> str:
    """A text, or a path alone, with each path outside of the working folder shortened.

    >>> shorten_paths("python train.py --data /home/me/a.jsonl --model_name_or_path recipe/demo/base")
    'python train.py --data …/a.jsonl --model_name_or_path recipe/demo/base'
    """
    return _shortened(text, _paths_in(text))


def _paths_in(text: str) -> dict[str, str]:
    """The paths in a text, and what is sent of each."""
    if WHOLE_PATH.fullmatch(text) and not MORE.search(text):
        return {text: _public(text)}
    paths = [match[2] for match in QUOTED_PATH.finditer(text)] + [match[0] for match in PATH.finditer(text)]
    return {path: _public(path) for path in paths}


def _public(path: str) -> str:
    """What is sent of a path: its last part, unless that is the name of a user."""
    parts = [part for part in re.split(r"[/\\]+", path) if part]
    return "…/" if OF_USER.fullmatch(path) or not parts else f"…/{parts[-1]}"


def _paths_of_json(text: str) -> dict[str, str]:
    try:
        content = parse_json(text)
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
            if spelling in text:
                text = _place(spelling, found[path]).sub(found[path].replace("\\", r"\\"), text)
    return text


def _place(spelling: str, public: str) -> re.Pattern[str]:
    """Where a path may be shortened: not within a longer one or an address, and no slash is doubled or lost."""
    core = spelling.rstrip("/\\")
    slashes = re.escape(spelling[len(core) :])
    if public.endswith("/"):  # of a user, whose name may begin as that of another one does
        behind = rf"(?!\.?[\w-])(?:{slashes}|/?)" if slashes else r"(?!\.?[\w-])/?"
    else:
        behind = rf"(?:{slashes}(?![\w.-]))?" if slashes else ""
    return re.compile(rf"(?:{_BEFORE}|{_FILE}|(?<=\\[nrt])){re.escape(core)}{behind}")
