"""Takes secrets out of every text that leaves the process: messages, files, and what a push sends.

A secret is the value of an environment variable whose name says so (`OPENAI_API_KEY`, `db_password`), of a flag or a
line of the config file whose name says so (`--hub_token`), a token of the Hub wherever it stands in flags or config
file, or that `hf auth login` has stored, or a secret part of an address in a variable, a flag or the config file: its
password (`https://me:password@host`, also with a slash in it), or a parameter such as `?token=` or `&X-Amz-Signature=`.
In the terminal and in logs, no address shows such a part, whosever it is, see `redact_message`. Each secret is found in
these spellings, mixed ones and parts of longer words too:

- as it is, and without the white space, quotes and invisible characters around it, see `strip_key`;
- `repr` of text and of bytes, JSON, with escapes such as `\\/`, `\\u00e9`, `\\xe9`, `\\351`, also escaped twice;
- in an address: `%2F`, `%2f`, `+` for a blank, also escaped twice (`%252F`), and decoded, if it holds such escapes;
- HTML: `&amp;`, `&#x2f;`, `&#47;`; CSV and YAML: `""`, `''`; a shell: `'"'"'`, `'\\''`, backslashes;
- UTF-8 that was read as Latin-1;
- base64, also for addresses, and as a part of a longer text, as in `Authorization: Basic` (`user:key`);
- every character as `%73`, `\\x73`, `\\u0073`, `&#x73;` or `&#115;`, and all bytes in hexadecimal digits.

Not found are values of fewer than 12 characters (8, if the name says API key, password or secret), and what a file may
well hold for other reasons: numbers, single words, words joined by `_`, `-` or `.` (unless the name says secret,
password or API key), paths, and special tokens (`EOS_TOKEN=<|endoftext|>`).
"""

from __future__ import annotations

import base64
import html.entities
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

# no letter or digit before it, unless they belong to an escape: "\\nhf_", "%3Dhf_", "\\u003dhf_"
TOKEN_START = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=%[0-9A-Fa-f]{2})|(?<=\\u[0-9A-Fa-f]{4}))"
HUB_TOKEN = re.compile(TOKEN_START + r"(?:hf_(?:jwt_|oauth_)?|api_org_)[A-Za-z0-9]{20,}")
SECRET_FLAG = re.compile(r"--[\w-]*(token|key|password|secret)", re.IGNORECASE)
SECRET_LINE = re.compile(
    r"^\s*[\"']?(\w*(?:token|key|password|secret))[\"']?\s*:\s*(\S.*)$", re.IGNORECASE | re.MULTILINE
)
SECRET_VARIABLE = re.compile(
    r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|(?<![A-Z])PASS|(?<![A-Z])CREDENTIAL)S?(?![A-Z])", re.IGNORECASE
)
NO_SECRET_VARIABLE = re.compile(
    r"_(PATH|FILE|DIR|FOLDER|HOME|SOCK|NAME|URL|URI|HOST|PORT|ENDPOINT|TYPE)$", re.IGNORECASE
)
SURE_VARIABLE = re.compile(r"PASS|SECRET|CREDENTIAL|API_?KEY|HF_TOKEN", re.IGNORECASE)  # whatever its value looks like
SHORTEST_SECRET = 12  # characters; shorter values may be words
SHORTEST_SURE = 8  # of letters and digits, where the name leaves no doubt
ORDINARY = re.compile(
    r"[A-Za-z]{1,24}|[\d.,:+e-]*\d"  # a word, a number
    r"|(~|\.\.?)/.*|/(home|Users|root|etc|var|usr|opt|tmp|mnt|media|run|srv|data|work|private|dev|proc)/.*|[A-Za-z]:\\.*"
    r"|<.*>|\[.*\]|\{.*\}|\$\w+|\$\{.*\}",  # special tokens, placeholders
    re.DOTALL,
)
JOINED_WORDS = re.compile(r"[A-Za-z]+([ _.,;-]+[A-Za-z]+)*")
CREDENTIALS = re.compile(r"://([^\s/?#:@\"'<>\\]*:([^\s/?#@\"'<>\\]+)@)")  # of an address: user and password, password
# the same with a slash, a question mark or a number sign in the password, as people write it; no port and no path
LOOSE_CREDENTIALS = re.compile(r"://([^\s/?#:@\"'<>\\]+:(?!\d{1,5}(?:[/?#]|$))[^\s\"'<>\\]+)@")
USER_ALONE = re.compile(r"://([^\s/?#:@\"'<>\\]+)@")  # of an address; it may be a token
PARAMETER = re.compile(
    r"(?<=[?&;#])([\w.-]*(?:token|key|secret|password|passwd|signature|sig|credential|auth)[\w-]*=)([^&;#\s\"'<>\\]+)",
    re.IGNORECASE,
)
QUOTES = "\"'`´‘’‚‛“”„‟«»‹›＂＇"  # as a .env file, a chat or a word processor puts them around a key
UNSEEN = "\x00-\x20\x7f-\xa0\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff"
EDGES = re.compile(rf"^[\s{UNSEEN}{QUOTES}]+|[\s{UNSEEN}{QUOTES}]+$")


def redact(text: str) -> str:
    """The text with `***` for each secret that it holds.

    >>> os.environ["EXAMPLE_TOKEN"] = "a/b/c/d/1234567"
    >>> redact('{"error": "a\\\\/b\\\\/c\\\\/d\\\\/1234567 is no key", "basic": "YS9iL2MvZC8xMjM0NTY3"}')
    '{"error": "*** is no key", "basic": "***"}'
    """
    for spelling in _spellings(secrets()):
        if spelling.part in text:
            text = spelling.pattern.sub("***", text)
    return text


def find_secrets(text: str, more: Iterable[tuple[str, str]] = ()) -> Iterator[tuple[int, str]]:
    """Where a text holds a secret, in characters from its start, and what that is the value of.

    Args:
        more: other secrets: what a value is called, and the value.
    """
    for spelling in _spellings(secrets() | {(name, value) for name, raw in more for value in _values(name, raw)}):
        if spelling.part in text:
            yield from ((match.start(), spelling.name) for match in spelling.pattern.finditer(text))


def strip_key(value: str) -> str:
    """A key without the white space, quotes and invisible characters around it, which come with copying.

    >>> strip_key('\\ufeff“sk-0123456789” \\r\\n')
    'sk-0123456789'
    """
    return EDGES.sub("", value)


def secrets() -> frozenset[tuple[str, str]]:
    """The secrets that this process knows: the name of a variable, a flag or a file, and the value."""
    named = [(name, raw) for name, raw in os.environ.items() if is_secret_variable(name)]
    named += [*_flags(), *_stored_tokens(), *_config_secrets]
    named += [("a flag", token) for word in sys.argv[1:] for token in HUB_TOKEN.findall(word)]
    found = {(name, value) for name, raw in named for value in _values(name, raw)}
    for name, raw in [*os.environ.items(), *(("a flag", word) for word in sys.argv), *_config_addresses]:
        found |= {(name, value) for value in _of_addresses(raw)} if "://" in raw else set()
    return frozenset(found | set(_proxy_credentials()))


def _proxy_credentials() -> Iterator[tuple[str, str]]:
    """User and password of the proxies that the environment names, which need no scheme, or may be a key alone.

    A password of 6 characters or more is looked for, alone unless it is a word or a number.
    """
    for name, raw in os.environ.items():
        if not re.fullmatch(r"(?!no_)\w+_proxy", name, re.IGNORECASE):
            continue
        address = re.sub(r"^(?:[A-Za-z][\w+.-]*:/+|(?:https?|socks\w*):(?=.*@))", "", unquote(unquote(raw)))
        before, is_before, _ = address.rpartition("@")
        # a password whose host was forgotten stands where the port should
        credentials = before if is_before else re.split(r"[/?#]", address)[0].rpartition("]")[2]
        user, colon, password = credentials.partition(":")
        secret = password if colon or not is_before else user
        if len(secret) >= SHORTEST_SECRET // 2:
            yield from [(name, f"{user}:{secret}")] if user and colon else []
            yield from [(name, secret)] if not ORDINARY.fullmatch(secret) else []


def _of_addresses(text: str) -> Iterator[str]:
    """The secrets of the addresses in a text; short ones with what stands around them, so that no word is one."""
    for user_and_password, password in CREDENTIALS.findall(text):
        if len(password) >= SHORTEST_SECRET // 2:
            yield user_and_password
        elif not password.isalpha():
            yield f"//{user_and_password}"
        yield from _values("PASSWORD", password)
    for both in LOOSE_CREDENTIALS.findall(text):
        if not CREDENTIALS.match(f"://{both}@"):
            yield both
        yield from _values("PASSWORD", both.partition(":")[2])
    for user in USER_ALONE.findall(text):
        yield from _values("a user", user)
    for name, value in PARAMETER.findall(text):
        yield name + value
        yield from _values("PASSWORD", value)


def redact_message(text: str) -> str:
    """`redact` for the terminal and for logs, where the secret parts of any address are hidden, whosever it is.

    >>> redact_message("cannot open ftp://me:pa/ss@host/a and https://host/b?sig=abc&c=1 and https://host/@me")
    'cannot open ftp://***@host/a and https://host/b?sig=***&c=1 and https://host/@me'
    """
    text = redact(text)
    if "://" in text:
        for pattern in (CREDENTIALS, LOOSE_CREDENTIALS):
            text = pattern.sub("://***@", text)
        text = USER_ALONE.sub(lambda user: "://***@" if [*_values("a user", user[1])] else user[0], text)
        text = PARAMETER.sub(r"\1***", text)
    return text


def learn_secret(name: str, value: str) -> None:
    """Remember the value of a variable that is used as a key, whatever its name says."""
    _config_secrets.add((name, value))


def learn_from_config(text: str) -> None:
    """Remember the secrets of a config file, before anything is said about it: it may be no valid YAML."""
    _config_secrets.update((name, value) for name, value in SECRET_LINE.findall(text))
    _config_secrets.update(("the config file", token) for token in HUB_TOKEN.findall(text))
    _config_addresses.update(("the config file", line) for line in text.splitlines() if "://" in line)


_config_secrets: set[tuple[str, str]] = set()  # the name of a setting, and the text of its value
_config_addresses: set[tuple[str, str]] = set()  # with a password


def is_secret_variable(name: str) -> bool:
    """Whether the name of an environment variable says that its value is a secret.

    >>> [is_secret_variable(name) for name in ("HF_TOKEN", "api_keys", "TOKENIZERS_PARALLELISM", "KEY_PATH")]
    [True, True, False, False]
    """
    return SECRET_VARIABLE.search(name) is not None and NO_SECRET_VARIABLE.search(name) is None


def _flags() -> Iterator[tuple[str, str]]:
    """The flags of the command line whose names say that they hold a secret, and their values."""
    words = sys.argv[1:]
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        value = value if equals else "".join(words[index + 1 : index + 2])
        if SECRET_FLAG.fullmatch(name) or (name.endswith("_key_env") and value.rpartition("=")[2] not in os.environ):
            yield name, value  # a flag that takes the name of a variable may be given the key itself


def _stored_tokens() -> list[tuple[str, str]]:
    """The tokens that `hf auth login` keeps in files."""
    from huggingface_hub import constants  # here: not all that write a file need the library

    found = []
    for path in (constants.HF_TOKEN_PATH, constants.HF_STORED_TOKENS_PATH):
        try:
            words = re.split(r"[\s=]+", Path(path).read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        found += [("the stored token of the Hub", word) for word in words]
    return found


def _values(name: str, raw: str) -> Iterator[str]:
    """The secrets in a variable's value: the whole, and the parts of a list."""
    value = strip_key(raw)
    parts = [strip_key(part) for part in re.split(r"[,;\s]+", value)]
    for part in {value, *parts}:
        is_words = JOINED_WORDS.fullmatch(part) is not None and not SURE_VARIABLE.search(name)
        is_mixed = re.search(r"[A-Za-z].*\d|\d.*[A-Za-z]", part) is not None and SURE_VARIABLE.search(name) is not None
        shortest = SHORTEST_SURE if is_mixed else SHORTEST_SECRET
        if len(part) >= shortest and not is_words and not ORDINARY.fullmatch(part) and not _is_path(part):
            yield part


def _is_path(value: str) -> bool:
    try:
        return "/" in value and Path(value).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


class Spelling(NamedTuple):
    """How a secret may be written: `part` is in every text that `pattern` finds, and is quickly looked for."""

    name: str
    part: str
    pattern: re.Pattern[str]


@lru_cache(maxsize=8)
def _spellings(secrets: frozenset[tuple[str, str]]) -> list[Spelling]:
    """All spellings of all secrets, those of long ones first, because they may hold a shorter one."""
    found: dict[str, Spelling] = {}
    for name, value in sorted(secrets, key=lambda secret: (-len(secret[1]), secret)):
        texts = dict.fromkeys([value, unquote(value)])
        for text in texts:
            found.setdefault(text, Spelling(name, _longest_run(text), _pattern(text)))
        for text in _as_base64(value):
            urlsafe = re.sub(
                r"[+/]", lambda sign: {"+": f"(?:-|{_sign('+')})", "/": f"(?:_|{_sign('/')})"}[sign[0]], text
            )
            found.setdefault(text, Spelling(name, _longest_run(text), re.compile(urlsafe)))
        for text in _every_character_escaped(value):
            found.setdefault(text, Spelling(name, text, re.compile(re.escape(text))))
    return list(found.values())


def _longest_run(text: str) -> str:
    """The longest part of letters and digits, which most spellings leave as they are."""
    return max(re.findall(r"[A-Za-z0-9]*", text), key=len)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("".join(char if char.isascii() and char.isalnum() else _sign(char) for char in text))


@lru_cache(maxsize=1000)
def _sign(char: str) -> str:
    """A pattern for a character that is neither a letter of ASCII nor a digit, in all its spellings."""
    alternatives = [re.escape(char), _escapes(ord(char))]
    alternatives += [f"&(?:amp;){{0,3}}{name}" for name, text in html.entities.html5.items() if text == char]
    if not char.isascii():
        utf8 = char.encode("utf-8", "surrogatepass")
        alternatives.append("".join(rf"(?:{re.escape(chr(byte))}|{_escapes(byte)})" for byte in utf8))
        utf16 = char.encode("utf-16-be", "surrogatepass")
        alternatives.append("".join(rf"\\{{1,8}}u(?i:{utf16[i : i + 2].hex()})" for i in range(0, len(utf16), 2)))
    alternatives += {
        "\n": [r"\\{1,8}n"], "\r": [r"\\{1,8}r"], "\t": [r"\\{1,8}t"],
        "'": [r"'\"'\"'", r"'\\''", "''"], '"': ['""'], " ": [r"\s+", r"\+"], "+": [" "], "\\": [r"\\{2,16}"],
    }.get(char, [])  # fmt: skip
    return rf"\\{{0,8}}(?:{'|'.join(alternatives)})"


def _escapes(code: int) -> str:
    """A pattern for the escapes of a character, or of a byte of it, up to three times one upon the other."""
    digits = f"{code:x}"
    alternatives = [rf"\\{{1,8}}u\{{?0*{digits}\}}?", rf"&(?:amp;){{0,3}}#(?:x0*{digits}|0*{code});"]
    if code < 256:
        alternatives += [rf"\\{{1,8}}(?:x{code:02x}|{code:03o})", rf"%(?:25){{0,3}}{code:02x}"]
    return f"(?i:{'|'.join(alternatives)})"


def _as_base64(value: str) -> list[str]:
    """What base64 makes of a value wherever it stands in a text: the digits that depend on nothing else."""
    found = []
    for before in range(3):  # bytes before it, as base64 takes three at a time
        content = bytes(before) + value.encode("utf-8", "surrogatepass")
        digits = base64.b64encode(content).decode().rstrip("=")
        found.append(digits[(0, 2, 3)[before] : len(digits) - (len(content) % 3 > 0)])
    return found


def _every_character_escaped(value: str) -> list[str]:
    codes, utf8 = [ord(char) for char in value], value.encode("utf-8", "surrogatepass")
    utf16 = re.findall("....", value.encode("utf-16-be", "surrogatepass").hex())
    percent, unicode = "".join(f"%{byte:02x}" for byte in utf8), "".join(rf"\u{digits}" for digits in utf16)
    return [
        utf8.hex(), utf8.hex().upper(), percent, percent.upper(), "".join(rf"\x{byte:02x}" for byte in utf8),
        unicode, unicode.upper().replace("U", "u"), "".join(f"&#x{code:x};" for code in codes),
        "".join(f"&#{code};" for code in codes),
    ]  # fmt: skip
