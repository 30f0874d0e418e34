"""A model's reasoning kept apart from its answer.

Reasoning stands between marks: tags whose name says so, such as `<think>`, `<antThinking>`, `<|START_THINKING|>`,
`[THINK]` or `◁think▷` (`_meaning_of` knows the names), Gemma's `<|channel>thought ... <channel|>` and
`<unused94>thought ... <unused95>`, or the channels of the harmony format (gpt-oss):
`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>`.
Chat templates such as DeepSeek-R1's write the opening mark themselves, so that a reply has the closing one alone.
All of it takes a time linear in the length of the text.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

BRACKETS = {"<": ">", "[": "]", "◁": "▷", "【": "】", "＜": "＞", "⟨": "⟩", "〈": "〉"}
_NO_BRACKET = "[^" + re.escape("".join([*BRACKETS, *BRACKETS.values()])) + r"|\n]"
TAG = re.compile(
    r"<\|channel>[ ]{0,3}(?P<channel>\w{1,20})|(?P<channel_end><channel\|>)"  # Gemma
    r"|<unused\d{1,3}>(?P<unused>[ ]{0,3}thought)?"  # MedGemma
    r"|<\|im_start\|>[ ]{0,3}(?P<turn>think|answer)\b"  # s1
    rf"|(?P<first>[{re.escape(''.join(BRACKETS))}])\|?(?P<slash>[ ]?/?)\|?(?P<name>{_NO_BRACKET}{{1,120}})\|?"
    rf"(?P<last>[{re.escape(''.join(BRACKETS.values()))}])",
    re.IGNORECASE,
)
ATTRIBUTES = re.compile(r"\s+[\w:.-]{1,40}\s?=.*", re.DOTALL)
# the words of a tag's name, in lower case, between single spaces
_ANY_WORDS = r"(?:[^\W_]+ )*?"
_WHOSE = (
    r"(?:(?:inner|internal|hidden|private|silent|secret|deep|extended|initial|quick|critical|logical|self|own|my|model|"
    r"assistant|ai|step by step|chain of) ?)*"
)
_PARTS = (
    r"(?: ?(?:process|processes|steps?|content|contents|trace|traces|block|section|text|phase|stage|mode|notes?|log|"
    r"chain|path|summary|budget reflect|space|area|pad|\d+(?!\d)))*"  # whole numbers: parts of one are countless
)
REASONING_NAME = re.compile(
    rf"{_ANY_WORDS}{_WHOSE}(?:think|thinking|thoughts?|reasoning|monologue|scratch ?pad|cot|rationale|deliberations?|"
    rf"brainstorm(?:ing)?|ponder(?:ing)?|contemplations?|introspections?){_PARTS}"
    rf"|{_WHOSE}(?:reason|analysis|reflect|reflections?){_PARTS}|思考|思考过程|推理|推理过程|思维链"
)
ANSWER_NAME = re.compile(r"(?:(?:my|the) )?(?:final )?(?:answer|response|solution|output|reply|result)|final")
DIRECTION = re.compile(r"(?:(start|begin|open|end|close|stop) )(?:of )?(.+)|(.+) (start|begin|open|end|close|stop)")
CLOSING = ("end", "close", "stop")
LONGEST_MARK = 40  # tokens
QUOTES = "`'\"“”‘’«»"
TOKEN = re.compile(r"<\|(start|channel|message|end|return|call)\|>", re.IGNORECASE)
BEGINS_CHANNEL = re.compile(r"\s*(?:<\|start\|>\s*assistant\s*)?<\|channel\|>", re.IGNORECASE)
# the same format after its special tokens were dropped: "analysisThe user asks ...assistantfinalBlue."
BARE_START = re.compile(r"\s*(?:assistant)?(?:analysis|commentary)(?=[^\W_])")
BARE_CHANNEL = re.compile(r"assistant(analysis|commentary|final)(?![a-z])")
BARE_OPEN = re.compile(r"\s*analysis(?=[A-Z])")  # no word: the name of the channel, and how its text begins
BARE_MAYBE_OPEN = re.compile(r"\s*(?:analysis(?![ :])|(?i:analysis)(?=\w))")
SPACE = re.compile(r"[\s\ufeff]*")
SPECIAL = re.compile(r"(?:\s|<\|\w{1,40}\|>)*")
FENCE_RUN = re.compile("`+")


class Mark(NamedTuple):
    """An opening or closing mark, with what opening and closing marks of a kind have in common."""

    kind: str
    is_closing: bool
    start: int
    end: int
    is_special: bool = False  # written like a special token, `<|...|>`


def split_answer(text: str) -> tuple[str, str | None]:
    """An answer, and the reasoning before it, None where there is none.

    Only what the text begins with is reasoning, or all before the first mark if that is a closing one. Marks elsewhere
    are text: an answer may be about them. If the reasoning has no end, the answer is empty.

    >>> split_answer("<think>The sky?</think>\\n\\nBlue.")
    ('Blue.', 'The sky?')
    >>> split_answer("The sky?</think>Blue.")
    ('Blue.', 'The sky?')
    >>> split_answer("<think>The sky?</think><answer>Blue.</answer>")
    ('Blue.', 'The sky?')
    >>> split_answer("The tag <think> is closed by </think>.")
    ('The tag <think> is closed by </think>.', None)
    """
    answer, reasoning = _split(text)
    wrapper = _wrapper(answer, plain=reasoning is not None)
    return (answer, reasoning) if wrapper is None else (_unwrapped(answer, wrapper), reasoning or "")


def _split(text: str) -> tuple[str, str | None]:
    """`split_answer` with the tags that the answer stands in."""
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


def split_scored(text: str, reference: str, opened: str = "") -> tuple[str, str | None]:
    """`split_answer`, except where the reference begins with reasoning, too: then this is what is to be learned.

    So do the tags of an answer stay, `<answer>...</answer>`, if the reference begins with them.

    >>> split_scored("<think>1 + 1</think>2", "2"), split_scored("<think>1 + 1</think>2", "<think>Easy.</think>2")
    (('2', '1 + 1'), ('<think>1 + 1</think>2', None))
    >>> split_scored("1 + 1 is", "2", opened="<think>")
    ('', '1 + 1 is')

    Args:
        opened: the mark that the prompt ends with, so that the text begins inside of reasoning (`opened_by`).
    """
    answer, reasoning = split_answer(opened + text)
    if reasoning is None or _split(reference)[1] is not None:
        return text, None
    if _wrapper(reference, plain=True) is not None:
        answer, reasoning = _split(opened + text)
        return (text, None) if reasoning is None else (answer, reasoning)
    return answer, reasoning


def opened_by(tokenizer: Any, prompt: str | list[int]) -> str:
    """The opening mark that a prompt, a text or token ids, ends with; it is in no answer. "" if there is none."""
    return open_mark(prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt[-LONGEST_MARK:])))


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
        if _is_quoted(text, mark):
            continue
        if not mark.is_closing:
            open_kinds.append(mark.kind)
            counts[mark.kind] += 1
            continue
        position, is_open = mark.end, counts[mark.kind] > 0
        while is_open:  # what was opened inside of this block was text
            kind = open_kinds.pop()
            counts[kind] -= 1
            is_open = kind != mark.kind
    if open_kinds:
        return None
    text = text[position:]
    wrapper = _wrapper(text, plain=position > 0)
    is_own = wrapper is not None and (wrapper.is_special or not wrapper.kind.endswith("response"))
    return _unwrapped(text, wrapper) if wrapper is not None and is_own else text


def _split_blocks(text: str, marks: list[Mark]) -> tuple[str, str | None]:
    """An answer and the blocks of reasoning before it; the n-th mark is looked at a constant number of times."""
    by_start, closing_of = {mark.start: n for n, mark in enumerate(marks)}, _closing_marks(marks)
    position, thoughts = _skip_space(text, 0), []
    code = iter(code_spans(text))
    span = next(code, None)
    first = None
    for mark in marks:
        while span and span[1] <= mark.start:
            span = next(code, None)
        if not (span and span[0] < mark.start) and not _is_quoted(text, mark):
            first = mark
            break
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
    """The marks of reasoning in a text.

    What stands in square brackets may be a heading, "[Analysis]": only with a closing mark is it one of these, unless
    its name is that of a known model's mark, "[THINK]".
    """
    marks = [mark for mark, meaning in _tags(text) if meaning == "reasoning"]
    closed = {mark.kind for mark in marks if mark.is_closing}
    for mark in marks:
        if mark.kind[0] in "<◁" or mark.kind[1:] in ("think", "thinking") or mark.kind in closed:
            yield mark


def _tags(text: str) -> Iterator[tuple[Mark, str]]:
    """Tags with their meaning: "reasoning" or "answer"."""
    is_unused_open = False
    for found in TAG.finditer(text):
        kind, is_closing, meaning = "", False, "reasoning"
        if found["channel"] or found["channel_end"]:
            kind, is_closing = "<channel", not found["channel"]
            if not is_closing and found["channel"].lower() not in ("thought", "thinking", "analysis"):
                continue
        elif found["turn"]:
            kind, is_closing = "<im_start", found["turn"].lower() == "answer"
        elif found["first"]:
            if BRACKETS[found["first"]] != found["last"]:
                continue
            meaning, name, is_end = _meaning_of(found["name"])
            kind, is_closing = found["first"] + name, is_end or "/" in found["slash"]
        elif found["unused"] or is_unused_open:
            kind, is_closing, is_unused_open = "<unused", not found["unused"], bool(found["unused"])
        else:
            continue
        if meaning:
            yield (
                Mark(kind, is_closing, found.start(), found.end(), text[found.start() : found.start() + 2] == "<|"),
                meaning,
            )


@functools.lru_cache(4096)
def _meaning_of(name: str) -> tuple[str, str, bool]:
    """What a tag of this name means, "reasoning", "answer" or "", its words, and whether the name is of a closing one.

    >>> _meaning_of("antThinking"), _meaning_of("end_of_thought"), _meaning_of("thinker")
    (('reasoning', 'ant thinking', False), ('reasoning', 'thought', True), ('', 'thinker', False))
    """
    name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", ATTRIBUTES.sub("", name))
    words = " ".join(re.sub(r"[_\-:.▁\s]+", " ", name).lower().split())
    is_end = False
    if direction := DIRECTION.fullmatch(words):
        words, is_end = direction[2] or direction[3], (direction[1] or direction[4]) in CLOSING
    if REASONING_NAME.fullmatch(words):
        return "reasoning", words, is_end
    return "answer" if ANSWER_NAME.fullmatch(words) else "", words, is_end


def _wrapper(text: str, plain: bool) -> Mark | None:
    """The tag that a whole answer begins with, `<|START_RESPONSE|>` or, if `plain` ones count, `<answer>`."""
    start = _skip_space(text, 0)
    mark, meaning = next(_tags(text[start : start + 200]), (None, ""))
    if mark is None or mark.start or meaning != "answer" or mark.is_closing or not (plain or mark.is_special):
        return None
    return mark._replace(start=start, end=start + mark.end)


def _unwrapped(text: str, wrapper: Mark) -> str:
    """What stands in the tag; the text as it is, if the tag ends and more follows."""
    closing = [tag for tag, _ in _tags(text) if tag.is_closing and tag.kind == wrapper.kind]
    if not closing:
        return text[wrapper.end :].strip()
    rest = SPECIAL.match(text, closing[-1].end)
    is_whole = rest is not None and rest.end() == len(text)
    return text[wrapper.end : closing[-1].start].strip() if is_whole else text


def code_spans(text: str) -> list[tuple[int, int]]:
    """Where code between backticks begins and ends: each run of backticks closes at the next one of its length.

    >>> code_spans("a `b` ``c ` d`` `e")
    [(2, 5), (6, 15)]
    """
    runs = [found.span() for found in FENCE_RUN.finditer(text)]
    following: dict[int, int] = {}
    partner = [0] * len(runs)  # the index of the next run of this length, 0 if there is none
    for index in reversed(range(len(runs))):
        start, end = runs[index]
        partner[index] = following.get(end - start, 0)
        following[end - start] = index
    spans, index = [], 0
    while index < len(runs):
        if partner[index]:
            spans.append((runs[index][0], runs[partner[index]][1]))
        index = (partner[index] or index) + 1
    return spans


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
