"""Takes secrets out of every text that leaves the process: messages, files, and what a push sends.

A secret is the value of an environment variable whose name says so (`OPENAI_API_KEY`, `db_password`), of a flag or a
line of the config file whose name says so (`--hub_token`), a token of the Hub wherever it stands in flags or config
file, or that `hf auth login` has stored, or a secret part of an address in a variable, a flag or the config file: its
password (`https://me:password@host`, also with a slash in it), or a parameter such as `?token=` or `&X-Amz-Signature=`.
In the terminal and in logs, no address shows such a part, whosever it is, see `redact_message`. In which spellings each
is found says `recipe.spellings`.

A key that the run uses, or that was given in place of its variable (`--judge_key_env sk-...`), is found from 8
characters on, whatever it looks like. Of all others, not found are values of fewer than 12 characters (8, if the name
says API key, password or secret, and letters and digits are mixed), and what a file may well hold for other reasons:
numbers, single words, words joined by `_`, `-` or `.` (unless the name says secret, password or API key), paths, and
special tokens (`EOS_TOKEN=<|endoftext|>`). Of an address, what is too short or too plain to be found alone is found
together with what stands around it (`?token=abcdef`), from 6 characters on; and a password that begins as a port does
(`me:8000/...`) is taken for one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from recipe.spellings import TOKEN_START, Secret, spellings_of

HUB_TOKEN = re.compile(TOKEN_START + r"(?:hf_(?:jwt_|oauth_)?|api_org_)[A-Za-z0-9]{20,}")
SECRET_FLAG = re.compile(r"--[\w-]*(token|key|password|secret)", re.IGNORECASE)
SECRET_LINE = re.compile(
    r"^[^\S\n]*[\"']?([\w-]*(?:token|key|password|secret))[\"']?\s*:\s*(\S.*)$", re.IGNORECASE | re.MULTILINE
)
# a setting that takes the names of variables, and may be given the keys themselves; a flag may be shortened
KEY_ENV_FLAG = re.compile(r"--[\w-]*key[_-]e(?:nv?)?")
KEY_ENV_LINE = re.compile(  # 3: its words, also in the lines of a list
    r"^([ \t]*)[\"']?([\w-]*key[_-]env)[\"']?[ \t]*:(.*(?:\n(?:[ \t]*(?=\n)|\1(?:[ \t]+\S|-[ \t]|[\]#]).*))*)",
    re.MULTILINE,
)
SECRET_VARIABLE = re.compile(
    r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|(?<![A-Z])PASS|(?<![A-Z])CREDENTIAL)S?(?![A-Z])", re.IGNORECASE
)
NO_SECRET_VARIABLE = re.compile(
    r"_(PATH|FILE|DIR|FOLDER|HOME|SOCK|NAME|URL|URI|HOST|PORT|ENDPOINT|TYPE)$", re.IGNORECASE
)
SURE_VARIABLE = re.compile(r"PASS|SECRET|CREDENTIAL|API_?KEY|HF_TOKEN", re.IGNORECASE)  # whatever its value looks like
SHORTEST_SECRET = 12  # characters; shorter values may be words
SHORTEST_SURE = 8  # of letters and digits, where the name leaves no doubt, and of keys that are used
SHORTEST_IN_ADDRESS = 6  # where it is looked for with what stands around it
ORDINARY = re.compile(
    r"[A-Za-z]{1,24}|[\d.,:+e-]*\d"  # a word, a number
    r"|(~|\.\.?)/.*|/(home|Users|root|etc|var|usr|opt|tmp|mnt|media|run|srv|data|work|private|dev|proc)/.*|[A-Za-z]:\\.*"
    r"|<.*>|\[.*\]|\{.*\}|\$\w+|\$\{.*\}",  # special tokens, placeholders
    re.DOTALL,
)
JOINED_WORDS = re.compile(r"[A-Za-z]+([ _.,;-]+[A-Za-z]+)*")
ADDRESS = re.compile(r"://[^\s\"'<>\\]*")  # in a text, without its scheme; several, if no blank is between them
# what follows `://`, if that is a host without user and password, alone or in a list: `http://host:8000,mail:me@there`
HOST = re.compile(r"(?:[\w.-]*|\[[\da-fA-F:.]*\])(?::\d{0,5})?(?:[/?#,;|)\]}]|\Z)")
AUTHORITY = re.compile(r"[^/?#]*")
# as people write a password, with a slash, a question mark or a number sign in it; it ends before the next address
LOOSE_AUTHORITY = re.compile(r"(?:(?![,;|][A-Za-z][\w+.-]*://).)*", re.DOTALL)
BEFORE_HOST = re.compile(r"[^@]*(?:@[^@,;|]*)*(?=@)")  # an "@" may be of the password, but none behind a comma
PARAMETER = re.compile(r"(?<=[?&;#])([\w.-]+)=([^&;#\s\"'<>\\]+)")
SECRET_PARAMETER = re.compile("token|key|secret|password|passwd|sig|credential|auth", re.IGNORECASE)
QUOTES = "\"'`´‘’‚‛“”„‟«»‹›＂＇"  # as a .env file, a chat or a word processor puts them around a key
UNSEEN = "\x00-\x20\x7f-\xa0\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff"
EDGE = re.compile(rf"[\s{UNSEEN}{QUOTES}]*")


def redact(text: str) -> str:
    """The text with `***` for each secret that it holds.

    >>> os.environ["EXAMPLE_TOKEN"] = "a/b/c/d/1234567"
    >>> redact('{"error": "a\\\\/b\\\\/c\\\\/d\\\\/1234567 is no key", "basic": "YS9iL2MvZC8xMjM0NTY3"}')
    '{"error": "*** is no key", "basic": "***"}'
    """
    for spelling in spellings_of(secrets()):
        if spelling.part in text:
            text = spelling.pattern.sub("***", text)
    return text


def find_secrets(text: str, more: Iterable[tuple[str, str]] = ()) -> Iterator[tuple[int, str]]:
    """Where a text holds a secret, in characters from its start, and what that is the value of.

    Args:
        more: other secrets: what a value is called, and the value.
    """
    others = {Secret(name, value) for name, raw in more for value in _values(name, raw)}
    for spelling in spellings_of(secrets() | others):
        if spelling.part in text:
            yield from ((match.start(), spelling.name) for match in spelling.pattern.finditer(text))


def strip_key(value: str) -> str:
    """A key without the white space, quotes and invisible characters around it, which come with copying.

    >>> strip_key('\\ufeff“sk-0123456789” \\r\\n')
    'sk-0123456789'
    """
    begun = value[EDGE.match(value).end() :]  # type: ignore[union-attr] # fits all
    return begun[: len(begun) - EDGE.match(begun[::-1]).end()]  # type: ignore[union-attr] # no search: it is slow


def secrets() -> frozenset[Secret]:
    """The secrets that this process knows."""
    named = [(name, raw) for name, raw in os.environ.items() if is_secret_variable(name)]
    named += [*_flags(), *_stored_tokens(), *_config_secrets]
    named += [("a flag", token) for word in sys.argv[1:] for token in HUB_TOKEN.findall(word)]
    found = {Secret(name, value) for name, raw in named for value in _values(name, raw)}
    for name, raw in [*os.environ.items(), *(("a flag", word) for word in sys.argv), *_config_addresses]:
        found |= {Secret(name, *value) for value in _of_addresses(raw)} if "://" in raw else set()
    return frozenset(found | _learned_keys | set(_keys_of_flags()) | set(_of_proxies()))


class Credentials(NamedTuple):
    """User and password of an address, and where they stand in the text: before the `@` at `end`."""

    start: int
    end: int
    user: str
    password: str


def _credentials_in(text: str) -> Iterator[Credentials]:
    """The users and passwords of the addresses in a text, in a time that grows as the text does."""
    for address in ADDRESS.finditer(text):
        position, end = address.start() if "@" in address[0] else -1, address.end()
        while position >= 0:
            start = position + len("://")
            at, seen = _end_of_credentials(text, start, end)
            if at is not None:
                user, _, password = text[start:at].partition(":")
                yield Credentials(start, at, user, password)
            position = text.find("://", seen, end)


def _end_of_credentials(text: str, start: int, end: int) -> tuple[int | None, int]:
    """Of what follows `://`: where the `@` behind the password is, None without one, and how far it was looked for."""
    if HOST.match(text, start, end):
        return None, start
    seen = AUTHORITY.match(text, start, end).end()  # type: ignore[union-attr] # fits all
    if text.find("@", start, seen) < 0 <= text.find(":", start, seen):
        seen = LOOSE_AUTHORITY.match(text, start, end).end()  # type: ignore[union-attr] # fits all
    before = BEFORE_HOST.match(text, start, seen)
    return (before.end(), before.end()) if before else (None, seen)


def _of_proxies() -> Iterator[Secret]:
    """User and password of the proxies that the environment names, which need no scheme, or may be a key alone.

    A password of 6 characters or more is looked for, alone unless it is a word or a number.
    """
    for name, raw in os.environ.items():
        if not re.fullmatch(r"(?!no_)\w+_proxy", name, re.IGNORECASE):
            continue
        address = re.sub(r"^(?:[A-Za-z][\w+.-]*:/+|(?:https?|socks\w*):(?=.*@))", "", unquote(unquote(raw)))
        at, _ = _end_of_credentials(address, 0, len(address))
        # a password whose host was forgotten stands where the port should
        credentials = address[:at] if at is not None else re.split(r"[/?#]", address)[0].rpartition("]")[2]
        user, colon, password = credentials.partition(":")
        secret = password if colon or at is None else user
        if len(secret) >= SHORTEST_IN_ADDRESS:
            yield from [Secret(name, f"{user}:{secret}")] if user and colon else []
            yield from [Secret(name, secret)] if not ORDINARY.fullmatch(secret) else []


def _of_addresses(text: str) -> Iterator[tuple[str, bool]]:
    """The secrets of the addresses in a text, and whether they must stand apart.

    Short and plain ones come with what stands around them, so that no word of another text is one.
    """
    for _, _, user, password in _credentials_in(text):
        if len(password) >= SHORTEST_IN_ADDRESS:
            yield f"{user}:{password}" + ("" if re.search("[/?#]", password) else "@"), True
        elif password and not password.isalpha():
            yield f"//{user}:{password}@", True
        for value in _values("PASSWORD", password) if password else _values("a user", user):
            yield value, False
    for parameter in PARAMETER.finditer(text):
        name, value = parameter.groups()
        if not SECRET_PARAMETER.search(name):
            continue
        is_words = JOINED_WORDS.fullmatch(value) is not None and not SURE_VARIABLE.search(name)
        for part in [] if is_words else _values("PASSWORD", value):
            yield part, False
        if len(value) >= SHORTEST_IN_ADDRESS:
            is_plain = is_words or ORDINARY.fullmatch(value) is not None
            yield f"{text[parameter.start() - 1] if is_plain else ''}{name}={value}", True


def redact_message(text: str) -> str:
    """`redact` for the terminal and for logs, where the secret parts of any address are hidden, whosever it is.

    >>> redact_message("cannot open ftp://me:pa/ss@host/a and https://host/b?sig=abc&c=1 and https://host/@me")
    'cannot open ftp://***@host/a and https://host/b?sig=***&c=1 and https://host/@me'
    """
    return hide_in_addresses(redact(text))


def hide_in_addresses(text: str, instead: str = "***@", every_user: bool = False) -> str:
    """A text without the passwords, and the secret parameters, of the addresses in it.

    >>> hide_in_addresses("https://me:password@host/a.json?token=abc", instead="")
    'https://host/a.json?token=***'

    Args:
        instead: of user, password and `@`.
        every_user: also of a user without a password, who may be known; else only of one who looks like a key.
    """
    if "://" not in text:
        return text
    parts, position = [], 0
    for start, end, user, password in _credentials_in(text):
        if password or every_user or any(_values("a user", user)):
            parts += [text[position:start], instead]
            position = end + 1
    text = "".join([*parts, text[position:]])
    return PARAMETER.sub(lambda found: f"{found[1]}=***" if SECRET_PARAMETER.search(found[1]) else found[0], text)


def learn_secret(name: str, value: str) -> None:
    """Remember the value of a variable that is used as a key, whatever its name says and it looks like."""
    _learned_keys.update(_as_keys(name, value))


def learn_from_config(text: str) -> None:
    """Remember the secrets of a config file, before anything is said about it: it may be no valid YAML."""
    _config_secrets.update((name, value) for name, value in SECRET_LINE.findall(text))
    _config_secrets.update(("the config file", token) for token in HUB_TOKEN.findall(text))
    _config_addresses.update(("the config file", line) for line in text.splitlines() if "://" in line)
    for _, name, value in KEY_ENV_LINE.findall(text):
        words = re.split(r"[\s,\[\]{}\"']+", re.sub(r"(^|\s)#.*", "", value, flags=re.MULTILINE))
        _learned_keys.update(_instead_of_variables(name, words))


_learned_keys: set[Secret] = set()  # of variables that are used as keys, and keys that stand in place of one
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
        if SECRET_FLAG.fullmatch(name):
            yield name, value if equals else "".join(words[index + 1 : index + 2])


def _keys_of_flags() -> Iterator[Secret]:
    """The keys that flags such as `--judge_key_env` were given instead of the names of variables."""
    flag = None
    for word in sys.argv[1:]:
        name, _, value = word.partition("=")
        if word.startswith("--"):
            flag = name if KEY_ENV_FLAG.fullmatch(name) else None
            word = value
        if flag:
            yield from _instead_of_variables(flag, [word])


def _instead_of_variables(setting: str, words: Iterable[str]) -> Iterator[Secret]:
    """The keys among words that should be `NAME` or `HOST=NAME`, with the name of a variable."""
    for word in words:
        after = word.partition("=")[2]
        key = strip_key(after if after.strip("=") else word)  # one in base64 may end in "="
        if key in os.environ or word.rpartition("=")[2] in os.environ:
            continue
        if key.isidentifier():  # perhaps the name of a variable that is not set
            yield from (Secret(setting, value) for value in _values(setting, key))
        else:
            yield from _as_keys(setting, key)


def _as_keys(name: str, raw: str) -> Iterator[Secret]:
    """A key, and what it is made of, if it is long enough; for sure a secret, whatever it looks like."""
    for value in {strip_key(raw), *_values(name, raw)}:
        if len(value) >= SHORTEST_SURE:
            yield Secret(name, value)


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
        is_mixed = bool(re.search("[A-Za-z]", part) and re.search(r"\d", part) and SURE_VARIABLE.search(name))
        shortest = SHORTEST_SURE if is_mixed else SHORTEST_SECRET
        if len(part) >= shortest and not is_words and not ORDINARY.fullmatch(part) and not _is_path(part):
            yield part


def _is_path(value: str) -> bool:
    try:
        return "/" in value and Path(value).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False
