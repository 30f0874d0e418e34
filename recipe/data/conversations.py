"""Conversations in one form, whatever shape they come in, and what is wrong with those that are none.

The form is a list of messages `{"role": "system" | "user" | "assistant", "content": text}` that ends with the last turn
to be learned. An assistant turn that is not to be learned has `"weight": 0`, as in OpenAI's format.

Messages count from 0 in what is said of them, as `messages[i]` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from recipe.console import shorten
from recipe.data.columns import KEYS, TEXTS, Columns, is_chat, shape_of
from recipe.data.values import Problem, half_character, kind_and_words

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
}
OF_TOOLS = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
# what a message may hold beside its content, and this recipe cannot learn from
NOT_TEXT = {
    **dict.fromkeys(("tool_calls", "function_call"), "calls of tools are not learned; remove the row"),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "write it into the content, between <think> marks, or remove the row",
    ),
    **dict.fromkeys(("images", "image", "audio", "video"), "only text is learned; remove the row"),
}
FIX = "; fix it or remove the row"

Message = dict[str, Any]


def read_conversation(columns: Sequence[str], row: Mapping[str, Any]) -> tuple[list[Message], int] | list[Problem]:
    """The messages of a row, and how many turns at its end are left out, as no learned turn follows; or what is wrong.

    Of a prompt and a completion, only turns of the completion are learned.
    """
    messages: list[Message] = []
    problems: list[Problem] = []
    for place, column in enumerate(columns):
        is_prompt = len(columns) > 1 and place == 0
        value = row.get(column)
        turns = _turns(column, value, "" if len(columns) == 1 else ("user", "assistant")[place])
        if isinstance(turns, Problem):
            problems.append(turns)
            continue
        for index, turn in enumerate(turns):
            message = _message(turn, f"{column}[{index}]")
            if isinstance(message, Problem):
                problems.append(message)
            else:
                messages.append(message | ({"weight": 0} if is_prompt and message["role"] == "assistant" else {}))
    if problems:
        return problems
    roles = [message["role"] for message in messages]
    learned = [i for i, message in enumerate(messages) if roles[i] == "assistant" and message.get("weight") != 0]
    name = " and ".join(map(repr, columns))
    if not learned:
        reason = "no assistant turn" + (" that is learned" if "assistant" in roles else "")
        problems.append(Problem(reason, f"{name}: {reason}; add one or remove the row"))
    elif "user" not in roles[: roles.index("assistant")]:
        reason = "an assistant turn before any user turn"
        problems.append(Problem(reason, f"{name}[{roles.index('assistant')}] is {reason}{FIX}"))
    return problems or (messages[: learned[-1] + 1], len(messages) - learned[-1] - 1)


def _turns(column: str, value: Any, role: str) -> list[Any] | Problem:
    """The turns of a column: a list, JSON of one, or with a `role` the text of its one turn."""
    if value is None:
        return Problem(f"{column!r} is null or missing", f"{column!r} is null or missing; write it or remove the row")
    if isinstance(value, str) and (not role or is_chat(value)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            hint = "; it looks like Python's own notation: write it with json.dumps" if value[:2] == "[{" else ""
            text = f"{column!r} is {shorten(repr(value))}, not JSON of a list of messages{hint or FIX}"
            return Problem(f"{column!r} is not JSON", text)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list | tuple) or not value:
        kind, shown = kind_and_words(value)
        reason = f"{column!r} is not a list of messages" if value else f"{column!r} is empty"
        return Problem(reason, f"{reason} ({kind} {shorten(shown)}){FIX}")
    return [*value]


def _message(turn: Any, where: str) -> Message | Problem:
    """A turn in the one form, or what is wrong with it."""
    if not isinstance(turn, Mapping):
        kind, shown = kind_and_words(turn)
        said = f"{where} is {shorten(shown)} ({kind}), not an object with role and content{FIX}"
        return Problem("a message is not an object", said)
    named, content = (
        next((turn[k] for k in keys if turn.get(k) is not None), None) for keys in zip(*KEYS, strict=True)
    )
    role = ROLES.get(named.strip().casefold()) if isinstance(named, str) else None
    if role is None:
        shown = shorten(kind_and_words(named)[1])
        if isinstance(named, str) and named.strip().casefold() in OF_TOOLS:
            said = f"{where} has the role {shown}: calls of tools and their results are not learned; remove the row"
            return Problem("a message of a tool", said)
        known = "system, user (human), assistant (gpt)"
        return Problem("an unknown role", f"{where} has the role {shown}; give one of {known}, or remove the row")
    for key, advice in NOT_TEXT.items():
        if turn.get(key) not in (None, "", []):
            return Problem(f"a message with {key!r}", f"{where} ({role}) has {key!r}: {advice}")
    text = _text(content, f"{where} ({role})")
    if isinstance(text, Problem):
        return text
    weight = turn.get("weight", turn.get("train"))
    if role == "assistant" and weight is not None and weight not in (0, 1):
        return Problem("a weight that is not 0 or 1", f"{where} ({role}) has the weight {weight}; give 0 or 1")
    return {"role": role, "content": text} | ({"weight": 0} if role == "assistant" and weight == 0 else {})


def _text(content: Any, where: str) -> str | Problem:
    """The content of a turn as text; parts that are all text become lines, as servers join them."""
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        other = next((part for part in content if part.get("type") != "text"), None)
        if other is not None:
            kind = other.get("type")
            return Problem("content that is not text", f"{where} has a part of type {kind!r}, not text; remove the row")
        content = "\n".join(str(part.get("text") or "") for part in content)
    if content is None or (isinstance(content, str) and not content.strip()):
        return Problem(
            "an empty message", f"{where} is {'null' if content is None else 'empty'}; write it or remove the row"
        )
    if not isinstance(content, str):
        kind, shown = kind_and_words(content)
        return Problem("content that is not text", f"{where} is {shorten(shown)} ({kind}), not text{FIX}")
    if half := half_character(content):
        return Problem(f"a message {half[0]}", f"{where} {half[0]}{half[1]}")
    return content


def another_shape(columns: Columns, row: Mapping[str, Any]) -> Problem | None:
    """What is said of a row that lacks the columns of its file's shape and has those of another; None for others."""
    own = columns.turns or (columns.fields["instruction"], columns.fields["output"])
    if not columns.turns and all(isinstance(row.get(name), str) for name in own):
        return None
    if columns.turns and all(row.get(name) is not None for name in own):
        place = row.get(columns.fields["input"]) if len(own) == 2 else None
        if not isinstance(place, str) or not place.strip():
            return None
        reason = "an input beside messages"
        said = (
            f"has the input {shorten(repr(place))} beside {own[0]!r}, which holds messages in the file's first record"
        )
        return Problem(reason, f"{said}; put it into the messages, or remove it")
    loose = columns._replace(turns=None, fields={**columns.fields, "instruction": "instruction", "output": "output"})
    found = shape_of(row, loose)
    if found is None or found == own:
        return None
    others, mine = (" and ".join(map(repr, names)) for names in (found, own))
    text = f"has {others} where the file's first record has {mine}; put records of each shape into a file of their own"
    return Problem("of another shape than the file's first record", text, {name: row[name] for name in found})


def fields_of(messages: Sequence[Message]) -> dict[str, str]:
    """A conversation as the fields of a record: its last question and the answer to it, for those who look at it."""
    questions = [message["content"] for message in messages if message["role"] == "user"]
    text = json.dumps(messages, ensure_ascii=False)
    return {"instruction": questions[-1], "input": "", "output": messages[-1]["content"], "messages": text}


def texts_of(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a record says, as texts to be compared: its instruction or history, its input, its output."""
    if record.get("messages"):
        *history, _ = json.loads(record["messages"])
        return json.dumps(history), "", record["output"]
    return record["instruction"] or "", record["input"] or "", record["output"] or ""


def beginning_of(record: Mapping[str, Any], answers: int) -> tuple[Sequence, Sequence]:
    """What a conversation says up to so many answers, and the message that follows, if one does; of others, all."""
    if not record.get("messages"):
        return texts_of(record), ()
    said = [(message["role"], message["content"]) for message in json.loads(record["messages"])]
    end = [place for place, (role, _) in enumerate(said, start=1) if role == "assistant"][:answers][-1]
    return said[:end], said[end : end + 1]


def text_of(record: Mapping[str, Any]) -> str:
    """All that a record says as one text, its output last."""
    if record.get("messages"):
        return "\n".join(message["content"] for message in json.loads(record["messages"]))
    return "\n".join(texts_of(record))


def select_texts(dataset: Dataset, *others: str) -> Dataset:
    """The columns of the texts of records, of which those made elsewhere may have no `messages`, and others."""
    return dataset.select_columns([*others, *(name for name in TEXTS if name in dataset.column_names)])
