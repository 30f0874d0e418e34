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
from typing import Any, NamedTuple

from recipe.evaluation.failures import BROKEN_OFF, CUT_OFF, stop_reason
from recipe.evaluation.judge.quotations import own_lines, planted_values
from recipe.reasoning import SPACE, final_part

MOST_STARTS = 20  # lines from which an object that ends the reply is looked for: hostile replies have thousands
WHOLE = re.compile(r"(-?[0-9]{1,9})(?:\.0+)?(?: ?(?:/|out of) ?([0-9]{1,9})| ?(%)| points?)?", re.IGNORECASE)
WINNER = re.compile(r"(?:the )?(?:(?:response|answer) )?\[{0,2}(?:a (?=tie))?(A|B|tie)\]{0,2}", re.IGNORECASE)
_BEFORE = r"(?:(?:my|the|your) )?(?:(?:overall|final|total) ){0,2}"
_BEHIND = r"(?: (?:is|of))?(?: ?\((-?[0-9]{1,9}) ?(?:-|–|to) ?([0-9]{1,9})\))? ?[:=]? ?"
SCORE_LABEL = re.compile(rf"{_BEFORE}(?:score|rating|grade){_BEHIND}", re.IGNORECASE)
WINNER_LABEL = re.compile(
    rf"{_BEFORE}(?:winner|verdict|(?:better|best|winning|preferred) (?:response|answer|one)){_BEHIND}", re.IGNORECASE
)
IS_FINAL = re.compile(r"(?:(?:my|the|your) )?(?:overall|final|total)\b", re.IGNORECASE)
FINAL_HEADING = re.compile(
    r"(?:(?:my|the) )?(?:overall|final|total)(?: (?:score|rating|grade|verdict|assessment|evaluation|judgement))? ?:?",
    re.IGNORECASE,
)
EMPHASIS = re.compile(r"\*{1,3}|_{1,3}(?![A-Za-z0-9])|(?<![A-Za-z0-9])_{1,3}|^#{1,6} ")
OPEN_FENCE = re.compile(r"[ ]{0,3}```[ ]*(?:\w+[ \t]*|\t[ \t]*)?")
CLOSING_FENCE = re.compile(r"\s*```\s*")
_Pairs = tuple[tuple[str, Any], ...]  # of a JSON object: a key may come twice, and then means nothing


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
    pairs = _whole_object(text)  # a reason may hold a mark of reasoning
    rest = text if pairs else final_part(text)
    if rest is None:
        return Verdict("cut_off")
    rest = rest.strip()
    pairs = pairs or _whole_object(rest)
    if pairs:
        said = _Said(*_value_of_object(pairs, scale))
    elif finish in CUT_OFF:  # the last line may be incomplete: "10" could have become "100"
        return Verdict("cut_off")
    else:
        alone = _whole_value(rest, scale)
        said = _last_said(rest, scale, shown) if alone is None else _Said(alone)
    if said.value is None:
        return Verdict(
            "cut_off" if finish in CUT_OFF else "unparsable", reason=said.reason if said.is_refused else None
        )
    if scale and not scale[0] <= int(said.value) <= scale[1]:
        return Verdict("out_of_range", reason=said.reason)
    return Verdict("scored", said.value, said.reason)


class _Said(NamedTuple):
    """A verdict in a reply: its value, None if it has none, with the judge's reason, or ours for not taking it."""

    value: int | str | None
    reason: str | None = None
    is_final: bool = False  # "Overall score: 3"
    is_refused: bool = False
    end: int = 0


def _last_said(text: str, scale: tuple[int, int] | None, shown: Sequence[str]) -> _Said:
    """The verdict that ends a reply of several lines, unless another one or a text shown to the judge contradicts."""
    found = _own_verdicts(text, scale)
    if not found or found[-1].end < len(text) or found[-1].value is None:
        return _Said(None)
    last, planted = found[-1], planted_values(shown, scale is not None)
    name = "winners" if scale is None else "scores"
    if last.value in planted:
        return _Said(
            None, f"what the judge was shown names {last.value} itself, so this may be a quotation", False, True
        )
    others = [said.value for said in found if said.is_final or not last.is_final]
    other = next(
        (value for value in others if value is not None and value != last.value and value not in planted), None
    )
    return last if other is None else _Said(None, f"two different {name}, {other} and {last.value}", False, True)


def _own_verdicts(text: str, scale: tuple[int, int] | None) -> list[_Said]:
    """The verdicts that stand in lines of the judge's own, in their order: labelled lines, JSON objects."""
    lines, found, end, heading = own_lines(text), [], 0, ""
    begin_object = [line.start for line in lines if line.is_own and line.text.lstrip().startswith("{")]
    tried = set(begin_object[-MOST_STARTS:])
    for index, line in enumerate(lines):
        if line.start < end or not line.text.strip():
            continue
        if line.is_own:
            fenced = OPEN_FENCE.fullmatch(line.text) is not None and text.endswith("```")
            if line.start in tried or fenced:
                start = lines[index + 1].start if fenced and index + 1 < len(lines) else line.start
                pairs, end = _object_at(text, start, is_fenced=fenced)
                if pairs:
                    found.append(_Said(*_value_of_object(pairs, scale), end=end))
            elif (value := _labelled_value(line.text, scale)) is not None:
                is_final = (
                    IS_FINAL.match(_unlisted(line.text)) is not None
                    or FINAL_HEADING.fullmatch(_plain(heading)) is not None
                )
                found.append(_Said(value, None, is_final, end=line.start + len(line.text)))
        heading = line.text
    return found


def _whole_object(text: str) -> _Pairs | None:
    """Keys and values of the JSON object that a text is, also within a fence."""
    text = text.strip()
    first, _, rest = text.partition("\n")
    is_fenced = OPEN_FENCE.fullmatch(first) is not None and text.endswith("```")
    pairs, end = _object_at(rest if is_fenced else text, 0, is_fenced)
    return pairs if end == len(rest if is_fenced else text) else None


def _object_at(text: str, start: int, is_fenced: bool) -> tuple[_Pairs | None, int]:
    """Keys and values of the JSON object that begins here and ends a line, and where it, or its fence, ends.

    A fenced one ends the text.
    """
    start = SPACE.match(text, start).end()  # type: ignore[union-attr]
    if not text.startswith("{", start):
        return None, 0
    try:
        parsed, end = json.JSONDecoder(strict=False, object_pairs_hook=tuple).raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, 0
    if is_fenced:
        return (parsed, len(text)) if CLOSING_FENCE.fullmatch(text, end) else (None, 0)
    rest = text[end : end + 1000].partition("\n")[0]
    return (None, 0) if rest.strip() else (parsed, end)


def _value_of_object(pairs: _Pairs, scale: tuple[int, int] | None) -> tuple[int | str | None, str | None]:
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


def _labelled_value(line: str, scale: tuple[int, int] | None) -> int | str | None:
    """The verdict of a line with its label, such as "Final rating: **85**/100" or "Winner: Response A"."""
    plain = _unlisted(line)
    label = (WINNER_LABEL if scale is None else SCORE_LABEL).match(plain)
    if label is None or (label[1] and (scale is None or (int(label[1]), int(label[2])) != scale)):
        return None
    if re.sub(r"^\s*\* ", "", line).count("*") % 2:  # emphasis that began before
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


def _unlisted(line: str) -> str:
    return re.sub(r"^[-+•] ", "", _plain(line))


def _plain(line: str) -> str:
    """A line without emphasis, the sign of a heading or of a list, and runs of white space."""
    if len(line) > 1000:  # no verdict is that long
        return ""
    return " ".join(EMPHASIS.sub("", " ".join(line.split())).split())
