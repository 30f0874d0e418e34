"""A model's reasoning kept apart from its answer.

Reasoning stands between marks: `<think>`, `<thinking>`, `<thought>`, `<reasoning>`, `<analysis>`, `<reflection>`,
`<scratchpad>`, `<seed:think>`, `[THINK]`, `<|begin_of_thought|>`, `◁think▷`, or in the channels of the harmony format
(gpt-oss): `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>`.
Chat templates such as DeepSeek-R1's write the opening mark themselves, so that a reply has the closing one alone.
All of it takes a time linear in the length of the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

MARK = re.compile(
    r"<(/?)((?:\w{1,20}[:_])?think(?:ing)?|thoughts?|reasoning|analysis|reflection|scratchpad)(?:\s[^<>/]{0,80})?>"
    r"|(?P<bracket>[\[◁])(/?)think[\]▷]"
    r"|<\|(begin|start|end)_(?:of_)?(thought|thinking)\|>",
    re.IGNORECASE,
)
QUOTES = "`'\"“”‘’«»"
TOKEN = re.compile(r"<\|(start|channel|message|end|return|call)\|>", re.IGNORECASE)
BEGINS_CHANNEL = re.compile(r"\s*(?:<\|start\|>\s*assistant\s*)?<\|channel\|>", re.IGNORECASE)
# the same format after its special tokens were dropped: "analysisThe user asks ...assistantfinalBlue."
BARE_START = re.compile(r"\s*(?:assistant)?(?:analysis|commentary)(?=[^\W_])")
BARE_CHANNEL = re.compile(r"assistant(analysis|commentary|final)(?![a-z])")
BARE_OPEN = re.compile(r"\s*analysis(?=[A-Z])")  # no word: the name of the channel, and how its text begins
BARE_MAYBE_OPEN = re.compile(r"\s*(?:analysis(?![ :])|(?i:analysis)(?=\w))")
SPACE = re.compile(r"[\s\ufeff]*")


class Mark(NamedTuple):
    """An opening or closing mark, with what opening and closing marks of a kind have in common."""

    kind: str
    is_closing: bool
    start: int
    end: int


def split_answer(text: str) -> tuple[str, str | None]:
    """An answer, and the reasoning before it, None where there is none.

    Only what the text begins with is reasoning, or all before the first mark if that is a closing one. Marks elsewhere
    are text: an answer may be about them. If the reasoning has no end, the answer is empty.

    >>> split_answer("<think>The sky?</think>\\n\\nBlue.")
    ('Blue.', 'The sky?')
    >>> split_answer("The sky?</think>Blue.")
    ('Blue.', 'The sky?')
    >>> split_answer("The tag <think> is closed by </think>.")
    ('The tag <think> is closed by </think>.', None)
    """
    if BEGINS_CHANNEL.match(text):
        messages = list(_messages(text))
        final = [body for channel, body in messages if channel == "final"]
        final = final or [body for channel, body in messages if not channel]
        thoughts = [body for channel, body in messages if channel not in ("final", "")]
        return "".join(final).strip(), _joined(thoughts)
    if start := BARE_START.match(text):
        final_mark = next((mark for mark in BARE_CHANNEL.finditer(text) if mark[1].lower() == "final"), None)
        if final_mark:
            return text[final_mark.end() :].strip(), _joined([text[start.end() : final_mark.start()]])
        if BARE_OPEN.match(text):
            return "", _joined([text[start.end() :]])
    return _split_blocks(text, list(_marks(text)))


def split_scored(text: str, reference: str) -> tuple[str, str | None]:
    """`split_answer`, except where the reference begins with reasoning, too: then this is what is to be learned.

    >>> split_scored("<think>1 + 1</think>2", "2"), split_scored("<think>1 + 1</think>2", "<think>Easy.</think>2")
    (('2', '1 + 1'), ('<think>1 + 1</think>2', None))
    """
    answer, reasoning = split_answer(text)
    if reasoning is None or split_answer(reference)[1] is not None:
        return text, None
    return answer, reasoning


def open_mark(prompt: str) -> str:
    """The opening mark that a prompt ends with, so that the answer begins inside of reasoning; "" if there is none.

    >>> open_mark("<|Assistant|><think>\\n"), open_mark("<think>\\n\\n</think>\\n\\n")
    ('<think>', '')
    """
    last = next((mark for mark in reversed(list(_marks(prompt)))), None)
    is_open = last is not None and not last.is_closing and not prompt[last.end :].strip()
    return prompt[last.start : last.end] if last is not None and is_open else ""


def final_part(text: str) -> str | None:
    """What follows all reasoning, wherever in the text it stands; None if the text ends inside of reasoning.

    For replies from which a verdict is read: in doubt it is reasoning.

    >>> final_part("Let me see. <think>4?</think> Well. <thinking>5?</thinking>Score: 3")
    'Score: 3'
    >>> final_part("<think>Is it 4?") is None
    True
    """
    if "<|channel|>" in text.lower():
        messages = [(channel, body) for channel, body in _messages(text) if channel or body.strip()]
        if not messages or messages[-1][0] not in ("final", ""):
            return None
        text = messages[-1][1]
    elif BARE_START.match(text):
        channels = list(BARE_CHANNEL.finditer(text))
        if channels and channels[-1][1].lower() != "final":
            return None
        if not channels and BARE_MAYBE_OPEN.match(text):
            return None
        text = text[channels[-1].end() :] if channels else text
    open_kinds: list[str] = []
    counts: Counter[str] = Counter()
    position = 0
    for mark in _marks(text):
        if not mark.is_closing:
            open_kinds.append(mark.kind)
            counts[mark.kind] += 1
            continue
        position, is_open = mark.end, counts[mark.kind] > 0
        while is_open:  # what was opened inside of this block was text
            kind = open_kinds.pop()
            counts[kind] -= 1
            is_open = kind != mark.kind
    return None if open_kinds else text[position:]


def _split_blocks(text: str, marks: list[Mark]) -> tuple[str, str | None]:
    """An answer and the blocks of reasoning before it; the n-th mark is looked at a constant number of times."""
    by_start, closing_of = {mark.start: n for n, mark in enumerate(marks)}, _closing_marks(marks)
    position, thoughts = _skip_space(text, 0), []
    first = next((mark for mark in marks if not _is_quoted(text, mark)), None)
    if first and first.is_closing:
        thoughts, position = [text[: first.start]], _skip_space(text, first.end)
    while (n := by_start.get(position)) is not None and not marks[n].is_closing:
        if n not in closing_of:
            return "", _joined([*thoughts, text[marks[n].end :]])
        closing = marks[closing_of[n]]
        thoughts.append(text[marks[n].end : closing.start])
        position = _skip_space(text, closing.end)
    return (text[position:], _joined(thoughts)) if thoughts else (text, None)


def _closing_marks(marks: list[Mark]) -> dict[int, int]:
    """By the number of an opening mark that of its closing one: blocks may be nested.

    An opening mark without a closing one of its own ends at the next, as reasoning may mention an opening mark.
    """
    closing_of: dict[int, int] = {}
    waiting: dict[str, list[int]] = {}
    for n, mark in enumerate(marks):
        if not mark.is_closing:
            waiting.setdefault(mark.kind, []).append(n)
        elif waiting.get(mark.kind):
            closing_of[waiting[mark.kind].pop()] = n
    following: dict[str, int] = {}
    for n in reversed(range(len(marks))):
        if marks[n].is_closing:
            following[marks[n].kind] = n
        elif n not in closing_of and marks[n].kind in following:
            closing_of[n] = following[marks[n].kind]
    return closing_of


def _marks(text: str) -> Iterator[Mark]:
    for found in MARK.finditer(text):
        if found[2]:
            kind, is_closing = found[2].lower(), bool(found[1])
        elif found["bracket"]:
            kind, is_closing = found["bracket"], bool(found[4])
        else:
            kind, is_closing = f"|{found[6].lower()}|", found[5].lower() == "end"
        yield Mark(kind, is_closing, found.start(), found.end())


def _messages(text: str) -> Iterator[tuple[str, str]]:
    """The messages of a text in the harmony format: channel ("" outside of all) and body.

    A channel whose message does not begin has no body.
    """
    channel, part, position = "", "body", 0
    for token in TOKEN.finditer(text):
        name, content = token[1].lower(), text[position : token.start()]
        if part == "channel":
            words = content.split()
            channel = words[0].lower() if words else "unnamed"
        elif part == "body" and name != "message":
            yield channel, content
        if name != "message":
            channel = ""
        part = {"start": "role", "channel": "channel"}.get(name, "body")
        position = token.end()
    yield ("unfinished", "") if part != "body" else (channel, text[position:])


def _is_quoted(text: str, mark: Mark) -> bool:
    before, after = text[mark.start - 1 : mark.start], text[mark.end : mark.end + 1]
    return bool(before and after) and before in QUOTES and after in QUOTES


def _skip_space(text: str, position: int) -> int:
    found = SPACE.match(text, position)
    return found.end() if found else position


def _joined(thoughts: list[str]) -> str:
    return "\n\n".join(stripped for thought in thoughts if (stripped := thought.strip()))
