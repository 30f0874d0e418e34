"""Look for secrets in the texts of a push: this process's own in all spellings, well-known keys, and passwords."""

from __future__ import annotations

import codecs
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from huggingface_hub import get_token

from recipe.config import UserError
from recipe.redaction import find_secrets
from recipe.spellings import TOKEN_START

NOT_TEXT = {".safetensors", ".png", ".model"}
SHOWN = 20  # lines of a message about findings

# what a key is called, how it begins, and what follows
KNOWN_KEYS = [
    ("a token of the Hub", "hf_", r"(?:jwt_|oauth_)?[A-Za-z0-9]{20,}"),
    ("a token of the Hub", "api_org_", r"[A-Za-z0-9]{20,}"),
    ("an API key", "sk-", r"(?=[\w-]{0,200}\d)[\w-]{20,}"),
    *(("an API key", start, r"[\w-]{20,}") for start in ("sk_live_", "rk_live_", "gsk_", "nvapi-")),
    *(("a token of GitHub", start, r"[A-Za-z0-9]{30,}") for start in ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")),
    ("a token of GitHub", "github_pat_", r"\w{22,}"),
    ("a token of GitLab", "glpat-", r"[\w-]{20,}"),
    *(("a key of AWS", start, r"[A-Z0-9]{16}(?![A-Za-z0-9])") for start in ("AKIA", "ASIA")),
    ("a token of Slack", "xox", r"[a-z]-[\w-]{10,}"),
    ("a key of Google", "AIza", r"[\w-]{35}"),
    (
        "a private key",
        "-----BEGIN ",
        r"(?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?!(?:\s|\\[rn])*(?:\.\.|…|<|\[|$|-----|your))",
    ),
]
DIFFERENT_CHARACTERS = 8  # a key of fewer is a placeholder: hf_xxxxxxxxxxxxxxxxxxxx

ADDRESS = re.compile(
    r":\\?/\\?/([^\s/?#:@\"'<>\\]{0,300})(?::([^\s/?#@\"'<>\\]{1,300}))?@(\[[\w:.]+\]|[^\s/?#:\"'<>\\]*)"
)
EXAMPLE_HOST = re.compile(
    r"(?:.*\.)?(?:localhost|example(?:\.(?:com|org|net))?|test|invalid)|host(?:name)?|127\.[\d.]+|0\.0\.0\.0|\[::1?\]",
    re.IGNORECASE,
)
PLACEHOLDER = re.compile(
    r"(?:your|my|the|some)?[-_]?(?:api|access|auth|secret|db)?[-_]?"
    r"(?:user(?:name)?|pass(?:word|wd)?|pwd|secret|token|key)(?:[-_]?here)?"
    r"|x+|\*+|\.+|…|change[-_]?me|redacted|\$\w+|\$?\{.*\}|%\w+%?|\[.*\]",
    re.IGNORECASE,
)


class SecretError(UserError):
    """Files of a push hold secrets, or what looks like one.

    Attributes:
        flags: words of the command line of scripts/publish.py that let pass what only looks like one.
    """

    def __init__(self, message: str, flags: list[str]) -> None:
        super().__init__(message)
        self.flags = flags


def refuse_secrets(files: Mapping[str, Path], card: str = "", allowed: Collection[str] = ()) -> list[str]:
    """Look for secrets in all text files: the values of this process's own (see `recipe.redaction`), well-known keys,
    and passwords in addresses, unless they are placeholders as in `https://user:password@localhost`.

    Args:
        files: path in the repository to file.
        card: the text of a new README.md, which is not written yet.
        allowed: `FILE:LINE` of what only looks like a secret; FILE is a path in the repository.

    Returns:
        What was allowed, a line each.

    Raises:
        SecretError: it names each file and line, and does not repeat the secret.
        UserError: nothing is found at a place that is allowed.
    """
    texts = {path: read_text(file) for path, file in files.items() if file.suffix not in NOT_TEXT}
    sources = {path: str(file) for path, file in files.items()}
    if card:
        texts["README.md"], sources["README.md"] = card, "the new README.md"
    own = {place: names for path, text in texts.items() for place, names in _places(path, text, own_secrets(text))}
    like = {place: names for path, text in texts.items() for place, names in _places(path, text, secret_like(text))}
    if unused := [place for place in allowed if place not in own | like]:
        raise UserError(f"--allow_secret_like {unused[0]}: nothing is found there; give FILE:LINE, or leave it out")
    open_places = [place for place in own | like if place in own or place not in allowed]
    if open_places:
        problems = {place: [*like.get(place, []), *own.get(place, [])] for place in open_places}
        raise _as_error(problems, sources, [place for place in open_places if place not in own])
    return [f"{place} holds {' and '.join(names)}, which was allowed" for place, names in like.items()]


def own_secrets(text: str) -> Iterator[tuple[int, str]]:
    """Where a text holds a secret of this process, and what its value is that of."""
    for start, name in find_secrets(text, more=[("HF_TOKEN", get_token() or "")]):
        yield start, f"the value of {name}"


def secret_like(text: str) -> Iterator[tuple[int, str]]:
    """Where a text holds what looks like a secret, and what it is.

    >>> list(secret_like("see ssh://git@host/a, then https://me:1b4dAcE@db.internal/records"))
    [(32, 'credentials in an address')]
    """
    for name, begin, rest in KNOWN_KEYS:
        # what stands before is looked at after the beginning was found, because a search for a literal is fast
        for match in re.finditer(rf"{begin}(?<={TOKEN_START}{begin}){rest}", text):
            if len(set(match[0])) >= DIFFERENT_CHARACTERS and not match[0].endswith("EXAMPLE"):
                yield match.start(), name
    for match in ADDRESS.finditer(text):
        user, password, host = match.groups()
        scheme = re.search(r"[a-z0-9+.-]+$", text[max(0, match.start() - 20) : match.start()])
        if scheme is None:
            continue
        is_web = scheme[0].endswith(("http", "https"))
        if password is None and not (is_web and user):
            continue  # ssh://git@host
        if not PLACEHOLDER.fullmatch(password or user) and not EXAMPLE_HOST.fullmatch(host):
            yield match.start(), "credentials in an address"


def read_text(path: Path) -> str:
    """The text of a file; UTF-16 too, if it begins as such."""
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8", errors="replace")


def _places(path: str, text: str, found: Iterator[tuple[int, str]]) -> list[tuple[str, list[str]]]:
    """`FILE:LINE`, and what was found in that line."""
    names: dict[int, dict[str, None]] = {}
    line, position = 1, 0
    for start, name in sorted(found):
        line, position = line + text.count("\n", position, start), start
        names.setdefault(line, {})[name] = None
    return [(f"{path}:{line}", list(names)) for line, names in names.items()]


def _as_error(problems: Mapping[str, list[str]], sources: Mapping[str, str], like: list[str]) -> SecretError:
    lines = []
    for place, names in list(problems.items())[:SHOWN]:
        path, _, line = place.rpartition(":")
        lines.append(f"{sources[path]} line {line}: holds {' and '.join(names)}")
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more lines")
    lines.append("nothing was pushed: take it out of the file, or the file out of the folder")
    flags = [word for place in like for word in ("--allow_secret_like", place)]
    if like:
        lines.append(f"what is no secret, scripts/publish.py lets pass with {shlex.join(flags)}")
    return SecretError("\n".join(lines), flags)
