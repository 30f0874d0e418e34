"""How a judge's reply is read: its verdict stands at the very end, or there is none.

A judge quotes the answer, weighs numbers and thinks aloud, so that a number in the middle of a reply may mean anything.
What counts is a whole JSON object at the end, a labelled last line ("Score: 85"), or a reply that is nothing but the
verdict. What stands in reasoning, quotation marks, a block quote or code never counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipe.evaluation.failures import BROKEN_OFF, CUT_OFF, stop_reason
from recipe.reasoning import final_part

MOST_STARTS = 20  # lines from which an object that ends the reply is looked for: hostile replies have thousands
WHOLE = re.compile(r"(-?[0-9]{1,9})(?:\.0+)?(?: ?(?:/|out of) ?([0-9]{1,9})| ?(%)| points?)?", re.IGNORECASE)
WINNER = re.compile(r"(?:the )?(?:(?:response|answer) )?\[{0,2}(?:a (?=tie))?(A|B|tie)\]{0,2}", re.IGNORECASE)
_BEFORE = r"(?:(?:my|the|your) )?(?:(?:overall|final|total) ){0,2}"
_BEHIND = r"(?: (?:is|of))?(?: ?\((-?[0-9]{1,9}) ?(?:-|–|to) ?([0-9]{1,9})\))? ?[:=]? ?"
SCORE_LABEL = re.compile(rf"{_BEFORE}(?:score|rating|grade){_BEHIND}", re.IGNORECASE)
WINNER_LABEL = re.compile(
    rf"{_BEFORE}(?:winner|verdict|(?:better|best|winning|preferred) (?:response|answer|one)){_BEHIND}", re.IGNORECASE
)
EMPHASIS = re.compile(r"\*{1,3}|_{1,3}(?![A-Za-z0-9])|(?<![A-Za-z0-9])_{1,3}|^#{1,6} ")
FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
OPEN_FENCE = re.compile(r"(?:^|\n)[ ]{0,3}```[ ]*\w*\s*\Z")


@dataclass(frozen=True)
class Verdict:
    """What a reply says: `scored` with a score or a winner ("A", "B", "tie"), or `unparsable`, `out_of_range`,
    `cut_off`, `broken_off` or `content_filter` without one."""

    status: str
    value: int | str | None = None
    reason: str | None = None


def read_verdict(
    text: str, finish_reason: str | None, scale: tuple[int, int] | None, shown: Sequence[str] = ()
) -> Verdict:
    """The verdict at the end of a reply; a guess is never made.

    >>> [read_verdict(text, "stop", (0, 100)).value for text in ('{"score": 85}', "Fine.\\nScore: **85**/100", "85")]
    [85, 85, 85]
    >>> [read_verdict(text, "stop", (0, 100)).value for text in ("Its answer:\\n85", "<think>85", '"Score: 85"')]
    [None, None, None]

    Args:
        scale: the lowest and the highest score; None for a comparison of two responses.
        shown: texts that the judge was given. What stands in one of them too is no verdict, unless it is all there is.
    """
    finish = (finish_reason or "").lower()
    if stop_reason(finish) == "refused":
        return Verdict("content_filter")
    if finish in BROKEN_OFF:
        return Verdict("broken_off")
    found = _final_object(text.strip(), must_be_whole=True)  # a reason may hold a mark of reasoning
    rest = text if found else final_part(text)
    missing = Verdict("cut_off" if rest is None or finish in CUT_OFF else "unparsable")
    if rest is None:
        return missing
    rest = rest.strip()
    found = found or _final_object(rest, must_be_whole=finish in CUT_OFF, shown=shown)
    reason = None
    if found:
        value, reason = _value_of_object(found, scale)
    elif finish in CUT_OFF:  # the last line may be incomplete: "10" could have become "100"
        return missing
    else:
        value = _whole_value(rest, scale)
        if value is None:
            value = _labelled_value(_own_last_line(rest, shown), scale)
    if value is None:
        return missing
    if scale and not scale[0] <= int(value) <= scale[1]:
        return Verdict("out_of_range", reason=reason)
    return Verdict("scored", value, reason)


def _final_object(text: str, must_be_whole: bool, shown: Sequence[str] = ()) -> list[tuple[str, Any]] | None:
    """Keys and values of the JSON object that ends a text, also within a fence.

    It begins a line, and no brace is open before it: else it may be a part of something larger, or a quotation.
    """
    is_fenced = text.endswith("```")
    text = text[:-3].rstrip() if is_fenced else text
    if not text.endswith("}"):
        return None
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_Pairs)
    starts = [match.end() - 1 for match in re.finditer(r"^[ \t]{0,3}\{", text, re.MULTILINE)]
    for start in starts[-MOST_STARTS:]:
        try:
            parsed, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if end < len(text):
            continue
        fence = OPEN_FENCE.search(text[:start])
        before = text[: fence.start()] if fence else text[:start]
        is_own = not before.strip() or not any(_squeezed(text[start:]) in _squeezed(other) for other in shown)
        is_open = before.count("{") > before.count("}") or _is_within_quotation(before) or _has_open_fence(before)
        if is_own and not is_open and not (is_fenced and not fence) and not (must_be_whole and before.strip()):
            return parsed.pairs
    return None


def _value_of_object(
    pairs: list[tuple[str, Any]], scale: tuple[int, int] | None
) -> tuple[int | str | None, str | None]:
    """The verdict and the reason of a JSON object; a key that comes twice means nothing."""
    key = "winner" if scale is None else "score"
    contents = [content for name, content in pairs if name.lower() == key]
    tops = [content for name, content in pairs if name.lower() in ("max_score", "out_of", "scale", "max", "maximum")]
    if scale and any(isinstance(top, int | float) and top != scale[1] for top in tops):  # a score on another scale
        return None, None
    reasons = [content for name, content in pairs if name.lower() == "reason" and isinstance(content, str)]
    content, value = contents[0] if len(contents) == 1 else None, None
    if isinstance(content, str):
        value = _whole_value(content.replace("_", " "), scale)
    elif isinstance(content, int | float) and not isinstance(content, bool) and content % 1 == 0 and scale:
        value = int(content)
    return value, next(iter(reasons), None)


class _Pairs:
    """A JSON object as its pairs: a key may come twice, and then means nothing."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _whole_value(text: str, scale: tuple[int, int] | None) -> int | str | None:
    """The verdict of a text that is nothing else: with or without a label, in a fence or not."""
    lines = text.strip().splitlines()
    if len(lines) == 3 and re.fullmatch(r"```\w*", lines[0].strip()) and lines[2].strip() == "```":
        lines = lines[1:2]
    if len(lines) != 1:
        return None
    line = lines[0].strip()
    line = line[1:-1] if len(line) > 2 and line[0] == line[-1] == "`" else line
    value = _value(_plain(line), scale)
    return _labelled_value(line, scale) if value is None else value


def _labelled_value(line: str | None, scale: tuple[int, int] | None) -> int | str | None:
    """The verdict of a line with its label, such as "Final rating: **85**/100" or "Winner: Response A"."""
    if line is None:
        return None
    plain = re.sub(r"^[-+•] ", "", _plain(line))  # of a list
    label = (WINNER_LABEL if scale is None else SCORE_LABEL).match(plain)
    if label is None or (label[1] and (scale is None or (int(label[1]), int(label[2])) != scale)):
        return None
    return _value(plain[label.end() :], scale)


def _value(text: str, scale: tuple[int, int] | None) -> int | str | None:
    """The score or winner that a text is, without a label: on this scale, if it names one."""
    text = text.strip()
    if scale is None:
        winner = WINNER.fullmatch(text.rstrip(".!"))
        return {"a": "A", "b": "B", "tie": "tie"}[winner[1].lower()] if winner else None
    text = text.rstrip(".!")
    text = text.strip("[]") if re.fullmatch(r"\[{1,2}[^\[\]]*\]{1,2}", text) else text
    score = WHOLE.fullmatch(text)
    if score is None or (score[2] and int(score[2]) != scale[1]) or (score[3] and scale != (0, 100)):
        return None
    return int(score[1])


def _plain(line: str) -> str:
    """A line without emphasis, the sign of a heading or of a list, and runs of white space."""
    if len(line) > 1000:  # no verdict is that long
        return ""
    return " ".join(EMPHASIS.sub("", " ".join(line.split())).split())


def _own_last_line(text: str, shown: Sequence[str]) -> str | None:
    """The last line of a text, None if it is a quotation or code, as far as Markdown, quotation marks and what the
    judge was given tell."""
    before, _, line = text.rpartition("\n")
    previous = before.rpartition("\n")[2]
    is_code = line.startswith(("    ", "\t")) or FENCE.match(line) is not None or _has_open_fence(before)
    is_block_quote = line.lstrip().startswith(">") or previous.lstrip().startswith(">")
    plain = _plain(line).lower()
    quoted = re.compile(rf"(?<!\w){re.escape(plain)}(?!\w)")
    is_shown = any(
        quoted.search(" ".join(EMPHASIS.sub("", " ".join(other.split())).lower().split())) for other in shown
    )
    return None if is_code or is_block_quote or is_shown or _is_within_quotation(before) else line


def _has_open_fence(text: str) -> bool:
    return len(FENCE.findall(text)) % 2 == 1


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _is_within_quotation(text: str) -> bool:
    """Whether a quotation that began in the text may go on behind it."""
    pairs = (("“", "”"), ("«", "»"))
    return text.count('"') % 2 == 1 or any(text.count(first) > text.count(last) for first, last in pairs)
