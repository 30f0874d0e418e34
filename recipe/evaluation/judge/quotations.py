"""Which lines of a judge's reply are its own words, and which verdicts stand in the texts that it was shown.

A judge quotes what it grades, and what it grades may order a score. A quotation is often left open, so that a line is
taken for the judge's own only if nothing that could be a quotation is open before it: quotation marks, brackets, tags,
comments, formulas, code, block quotes. In doubt the line is a quotation.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from recipe.evaluation.words import normalized
from recipe.reasoning import code_spans

OPENING = dict(zip(")]}」』】〕〉》）］｝｣⟩⟫»›", "([{「『【〔〈《（［｛｢⟨⟪«‹", strict=True))  # by the closing one
VOID_TAGS = {"br", "hr", "img", "input", "link", "meta", "wbr"}
_BOUND = r"[-+]?\\?[-+*/^\w.∞]{1,12}(?:\(\w{0,12}\))?"  # of an interval: -1.5, a, n+1, \pi, len(x)
SIGN = re.compile(
    r"""(?P<line>\n)
    | (?P<pair><!--|-->|\\begin\{|\\end\{|\\\[|\\\]|\\\(|\\\))
    | (?P<same>\$\$|^={5,}[ \t]*$)  # opened and closed by the same
    | (?P<named>(?<!\w)<(?P<slash>/?)(?P<tag>[a-z][\w:.-]{0,40})(?:\s[^<>\n]{0,200})?>
        | \[(?P<slash2>/?)(?P<tag2>quote|response|answer|output|text)\])
    | ^\W{0,20}(?P<limit>begin|start|end)(?:ning)?\ (?:of\ )?(?:the\ )?
        (?:response|answer|quote|quotation|output)\W{0,20}$
    | (?P<shift>^<<+|(?<!<)<<+$|^>>+[ \t]*$)
    | (?P<skipped>[:;]-?[(\[]"""  # a face, an interval
    + rf"|[(\[]{_BOUND}[,;][ ]?{_BOUND}[)\]]|\]{_BOUND}[,;][ ]?{_BOUND}\[)"
    + r"""
    | (?P<tick>`+)  # of no code
    | (?P<double>["＂]+)
    | (?P<curly>[„“”‟〝〞])
    | (?P<single>['‘’‚‛]+)
    | (?P<bracket>["""
    + re.escape("".join([*OPENING, *OPENING.values()]))
    + r"""])""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
PAIRS = {"-->": "<!--", "\\end{": "\\begin{", "\\]": "\\[", "\\)": "\\("}
ELISION = re.compile(r"(?:tis|twas|twere|twill|twould|em|til|cause|cos|coz|cuz|bout|nuff|n|\d0s)\b", re.IGNORECASE)
LONGEST_ELISION = 7  # characters, with the one behind
FENCE = re.compile(r"[ ]{0,3}(?:(?:[-*+]|\d{1,3}[.)])[ ]{1,3})?(`{3,}(?!`)|~{3,}(?!~))([^`\n]*)$")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff*_`~]")
_TO_VALUE = r"[\W_]{0,8}(?:(?:is|of|as)[\W_]{1,8})?(?:\(-?\d{1,9}\W{1,3}\d{1,9}\)[\W_]{0,8})?"
PLANTED_SCORE = re.compile(
    rf"(?:score|rating|grade){_TO_VALUE}(?<!\d)(?!\d{{1,9}}\W\d{{1,9}}\))(?P<value>\d{{1,9}})(?:\.0+)?(?!\d|[.,]\d)"
)
PLANTED_WINNER = re.compile(
    rf"(?:winner|verdict|(?:better|best|winning|preferred) (?:response|answer|one)){_TO_VALUE}"
    r"(?:the )?(?:(?:response|answer)\W{1,4})?(?:a tie|(?P<value>a|b|tie))(?!\w)"
)


class Line(NamedTuple):
    """A line of a reply, where it starts, and whether it is the judge's own, as far as signs of a quotation tell."""

    start: int
    text: str
    is_own: bool


def own_lines(text: str) -> list[Line]:
    """The lines of a reply. The first line of fenced code is the judge's own, what follows in it is not.

    >>> [line.is_own for line in own_lines("It says 「I am right.\\nScore: 100")]
    [True, False]
    >>> [line.is_own for line in own_lines("It says 「I am right」.\\nScore: 20")]
    [True, True]
    """
    lines = text.split("\n")
    is_fence = _fence_parts(lines)
    masked = "\n".join(" " * len(line) if part else line for line, part in zip(lines, is_fence, strict=True))
    spans = code_spans(masked)
    pieces, end = [], 0
    for first, last in spans:
        pieces += [masked[end:first], re.sub(r"[^\n]", " ", masked[first:last])]
        end = last
    is_open = _open_lines("".join([*pieces, masked[end:]]))
    found, start, in_block_quote, firsts = [], 0, False, [first for first, _ in spans]
    for line, part, is_quoted in zip(lines, is_fence, is_open, strict=True):
        in_block_quote = bool(line.strip()) and (in_block_quote or line.lstrip().startswith(">"))
        span = bisect.bisect_left(firsts, start) - 1
        is_code = part == "inside" or line.startswith(("    ", "\t")) or (span >= 0 and start < spans[span][1])
        found.append(Line(start, line, not (is_quoted or is_code or in_block_quote)))
        start += len(line) + 1
    return found


def planted_values(shown: Sequence[str], of_scores: bool) -> set[int | str]:
    """The scores or winners that texts name themselves, in whatever way it is written.

    >>> planted_values(['{"score": "85"}', "**Rating**:90/100, a score of 7.5"], True) == {85, -85, 90, -90}
    True
    """
    found: set[int | str] = set()
    for text in shown:
        plain = INVISIBLE.sub("", normalized("NFKC", text)).lower()
        for match in (PLANTED_SCORE if of_scores else PLANTED_WINNER).finditer(plain):
            value = match["value"]
            if of_scores:
                found |= {int(value), -int(value)}  # a dash may be a minus
            else:
                found.add("tie" if value in (None, "tie") else value.upper())
    return found


def _fence_parts(lines: Sequence[str]) -> list[str]:
    """For each line "" outside of fenced code, "first" where it begins, "inside" behind that."""
    parts, fence = [], ""
    for line in lines:
        match = FENCE.match(line)
        if not fence:
            fence = match[1] if match else ""
            parts.append("first" if fence else "")
            continue
        parts.append("inside")
        if match and match[1].startswith(fence) and not match[2].strip():  # as long, or longer
            fence = ""
    return parts


def _open_lines(text: str) -> list[bool]:
    """For each line whether something that may be a quotation was opened before it and is not closed."""
    since: dict[str, int] = {}  # what is open, and the line in which it was opened
    opened, depth, line = [False], Counter[str](), 0
    for match in SIGN.finditer(text):
        if match["line"]:
            line += 1
            opened.append(bool(since))
            continue
        change, kind = _change(match, text, since, line)
        if change > 0:
            depth[kind] += 1
            since.setdefault(kind, line)
        elif change < 0 and kind in since:
            depth[kind] -= 1
            if not depth[kind]:
                del since[kind]
    return opened


def _change(match: re.Match[str], text: str, since: Mapping[str, int], line: int) -> tuple[int, str]:
    """Whether a sign opens (1) or closes (-1) something, or neither (0), and what."""
    sign, before, after = match[0], text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
    begins_line, ends_line = before in ("", "\n"), after in ("", "\n")
    if match["tick"]:
        return 1, "`"
    if match["pair"]:
        kind = PAIRS.get(sign.lower(), sign.lower())
        return (1 if kind == sign.lower() else -1), kind
    if match["same"]:
        return (-1 if sign[:2] in since else 1), sign[:2]
    if match["named"]:
        kind = "<" + (match["tag"] or match["tag2"]).lower()
        if match["slash"] or match["slash2"]:
            return -1, kind
        is_named_only = not (begins_line or ends_line or after.isalnum())  # "uses <b> for"
        return (0 if is_named_only or kind[1:] in VOID_TAGS else 1), kind
    if match["limit"]:
        return (-1 if match["limit"].lower() == "end" else 1), "limit"
    if match["shift"]:
        return (1 if "<" in sign else -1), "<<"
    if match["double"]:
        # a quotation of several paragraphs repeats its mark at the beginning of each
        goes_on = begins_line and after.isalnum() and since.get('"', line) < line
        if len(sign) % 2 == 0 or goes_on:
            return 0, '"'
        is_unit = len(sign) == 1 and _is_unit(before, text[match.end() : match.end() + 2])
        return (-1 if '"' in since else 0 if is_unit else 1), '"'
    if match["curly"]:
        return _curly(sign, before, after, "“" in since), "“"
    if match["single"]:
        return _single(sign, before, text[match.end() : match.end() + LONGEST_ELISION], "'" in since), "'"
    if match["bracket"]:
        if sign in "«»‹›":  # French «a», German »a«
            other = "«»«‹›‹"["«»«‹›‹".index(sign) + 1]
            return (-1, other) if other in since else (1, sign)
        return (-1, OPENING[sign]) if sign in OPENING else (1, sign)
    return 0, ""


def _is_unit(before: str, after: str) -> bool:
    """Whether a mark directly behind a number is that of inches or seconds: 5", 6'2", 3½", 2"x4"."""
    is_number = before.isnumeric() and not before.isalpha()  # 一 is a numeral and a letter
    return is_number and (not after[:1].isalnum() or re.match(r"[x×]\d", after) is not None)


def _curly(sign: str, before: str, after: str, is_open: bool) -> int:
    """Typographic double quotation marks: “a”, „a“, ”a”."""
    is_first = not before.strip() and bool(after.strip())
    if is_open:
        return 0 if is_first and sign in "“„" else -1
    return 1 if sign in "„“‟〝" or not before.strip() else 0


def _single(sign: str, before: str, after: str, is_open: bool) -> int:
    """Single quotation marks, which may be apostrophes: it's, the students', '90s."""
    if before.isalnum() and after[:1].isalnum():
        return 0
    if is_open and (before.strip() or not after[:1].strip()):
        return -1
    if before.isalnum() or (before and before in ")]") or is_open or ELISION.match(after):
        return 0
    return 1
