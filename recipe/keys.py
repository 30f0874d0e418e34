"""Keys are read here: without what came along with copying, and refused before anything is sent if they are none."""

from __future__ import annotations

import os
import sys
import unicodedata
from functools import cache

from recipe.config import UserError
from recipe.redaction import QUOTES, learn_secret, strip_key

COPY_AGAIN = "copy the key again, alone, without quotes"


def read_key(variable: str) -> str | None:
    """The key in an environment variable, see `checked_key`; None if there is none.

    Raises:
        UserError: it is no key; the message does not show it.
    """
    value = os.environ.get(variable, "")
    learn_secret(variable, value)
    return checked_key(variable, value)


def clean_hub_token() -> None:
    """Take what came with copying off the Hub's token, which the Hub's library itself reads and puts into requests."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        value = os.environ.get(variable, "")
        if strip_key(value) != value:
            os.environ[variable] = strip_key(value)
            print(f"{variable}: left out {_around(value)} around it", file=sys.stderr)


@cache  # so that it is said once
def checked_key(name: str, value: str) -> str | None:
    """A key without the white space, quotes and invisible characters around it; says so in a line if there are some.

    >>> checked_key("OPENAI_API_KEY", "sk-0123456789")
    'sk-0123456789'

    Args:
        name: of what holds the key, for messages.

    Raises:
        UserError: what is left holds characters that a key has not, or the header of a request cannot hold.
    """
    key = strip_key(value)
    if key and key != value:
        print(f"{name}: left out {_around(value)} around it", file=sys.stderr)
    if key.startswith(f"{name}="):
        raise UserError(f"{name} begins with its own name; {COPY_AGAIN}")
    for position, char in enumerate(key, start=1):
        if not "!" <= char <= "~":
            raise UserError(f"{name}: its character {position} of {len(key)} is {_kind(char)}; {COPY_AGAIN}")
    return key or None


def _around(value: str) -> str:
    before, _, behind = value.partition(strip_key(value))
    return " and ".join(sorted(set(map(_kind, before + behind))))


def _kind(char: str) -> str:
    """What a character is, in words that do not show it."""
    if char in "\r\n\x85\u2028\u2029":
        return "a line break"
    if char.isspace():
        return "white space"
    if unicodedata.category(char).startswith("C"):
        return "an invisible character"
    return "a quotation mark" if char in QUOTES else "none of ASCII"
