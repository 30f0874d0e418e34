"""How a secret may be written: each is found in these spellings, mixed ones and parts of longer words too:

- as it is, and without the white space, quotes and invisible characters around it, see `strip_key`;
- `repr` of text and of bytes, JSON, with escapes such as `\\/`, `\\u00e9`, `\\xe9`, `\\351`, also escaped twice;
- in an address: `%2F`, `%2f`, `+` for a blank, also escaped twice (`%252F`), and decoded, if it holds such escapes;
- HTML: `&amp;`, `&#x2f;`, `&#47;`; CSV and YAML: `""`, `''`; a shell: `'"'"'`, `'\\''`, backslashes;
- UTF-8 that was read as Latin-1;
- base64, also for addresses, and as a part of a longer text, as in `Authorization: Basic` (`user:key`);
- every character as `%73`, `\\x73`, `\\u0073`, `&#x73;` or `&#115;`, and all bytes in hexadecimal digits.

One of more than 5,000 characters is found as it is alone.
"""

from __future__ import annotations

import base64
import html.entities
import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote

# no letter or digit before it, unless they belong to an escape: "\\nhf_", "%3Dhf_", "\\u003dhf_"
TOKEN_START = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=%[0-9A-Fa-f]{2})|(?<=\\u[0-9A-Fa-f]{4}))"

LONGEST = 5_000  # characters; a private key has 3,000, and patterns for a megabyte take minutes


class Secret(NamedTuple):
    """A secret and what it is called: the name of a variable, a flag or a file.

    Attributes:
        apart: whether it counts only where no letter or digit stands before and behind it, as it holds plain words.
    """

    name: str
    value: str
    apart: bool = False


class Spelling(NamedTuple):
    """How a secret may be written: `part` is in every text that `pattern` finds, and is quickly looked for."""

    name: str
    part: str
    pattern: re.Pattern[str]


@lru_cache(maxsize=8)
def spellings_of(secrets: frozenset[Secret]) -> list[Spelling]:
    """All spellings of all secrets, those of long ones first, because they may hold a shorter one."""
    found: dict[str, Spelling] = {}
    for name, value, apart in sorted(secrets, key=lambda secret: (-len(secret.value), secret)):
        if len(value) > LONGEST:
            found.setdefault(value, Spelling(name, value, re.compile(re.escape(value))))
            continue
        for text in dict.fromkeys([value, unquote(value)]):
            found.setdefault(text, Spelling(name, _longest_run(text), _pattern(text, apart)))
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


def _pattern(text: str, apart: bool) -> re.Pattern[str]:
    pattern = "".join(char if char.isascii() and char.isalnum() else _sign(char) for char in text)
    before, behind = TOKEN_START if apart and text[0].isalnum() else "", r"(?![A-Za-z0-9])"
    return re.compile(f"{before}{pattern}{behind if apart and text[-1].isalnum() else ''}")


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
