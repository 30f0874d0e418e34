"""Why a request to an endpoint has no answer, in the server's own words.

Servers say so with an HTTP status, or with status 200 and an error in words of their own, or with a completion that
holds no answer. What they refuse for what one prompt says is told apart from what is wrong with every request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recipe.console import quoted
from recipe.evaluation.negotiation import speaks_of_field

CUT_OFF = ("length", "max_tokens", "model_length")  # finish reasons; Mistral calls the end of the context model_length
FILTERED = re.compile(r"filter|safety|prohibited|blocked|blocklist|recitation|sensitive|refus|moderat|guardrail|spii")
BROKEN_OFF = ("error", "abort", "aborted", "cancelled", "failed", "insufficient_system_resource")
ENDED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
# faults that may be gone when the same is asked again; an HTTP status of 5xx is one, if it says nothing of the request
PASSING = ("timeout", "connection", "rate_limited", "broken_off", "http_408", "http_409", "http_5", "not_asked")
LASTING = ("http_501", "http_505")
# statuses of a request that the server will refuse again, because of what it asks
OF_PROMPT = ("context", "cut_off", "content_filter")
# and of one that may be such a refusal, in other words
MAY_BE_OF_PROMPT = ("http_400", "http_403", "http_422", "error_reply", "no_answer")
OF_ADDRESS = (404, 405, 410, 414, 415)  # HTTP statuses that say nothing of what a prompt says, whatever their words
CUT_OFF_WORDS = re.compile(r"max_tokens or model output limit was reached|could not finish the message", re.IGNORECASE)
CONTEXT_WORDS = re.compile(
    r"context.{0,20}(length|window|size)|max_model_len|max_new_tokens. must be|(prompt|input) (is|are) too long|"
    r"input tokens exceed",
    re.IGNORECASE,
)
# of a server that is busy or broken: the next attempt may succeed
BUSY_WORDS = re.compile(r"rate.?limit|quota|overload|capacity|queue|per (second|minute|hour|day)", re.IGNORECASE)
BROKEN_WORDS = re.compile(
    r"unavailable|time.?out|timed out|try again|internal|upstream|temporar|loading", re.IGNORECASE
)
# of a filter, whatever else they speak of
FILTER_WORDS = re.compile(
    r"content.?(filter|management.?policy|policy|moderation|violation|exists.?risk|risk)|ResponsibleAI|"
    r"moderation(?!-(latest|stable|\d))|safety.{0,3}(system|filter|setting|polic|check|reason|guideline)|"
    r"(usage|acceptable.use|content).{0,3}(polic|guideline)|block_?reason|prohibited.?content|data_?inspection|"
    r"[\"']filtered[\"']: true|"
    # Chinese for: sensitive, against the rules, unsafe, risk, review
    "\u654f\u611f|\u8fdd\u89c4|\u4e0d\u5b89\u5168|\u98ce\u9669|\u5ba1\u6838",
    re.IGNORECASE,
)
# of a filter, if they speak of no field
MAY_BE_FILTER_WORDS = re.compile(
    r"flagged|guardrail|high.risk|inappropriate|harmful|unsafe|"
    r"(?<![a-z]-)(?<!case )(?<!case_)(?<!case)(?<!in)sensitive.{0,10}(content|word|information|material|topic|data)|"
    r"(prompt|content|input|output|text|message).{0,20}(?<![a-z]-)(?<!case )(?<!case_)(?<!case)(?<!in)sensitive|"
    r"(prompt|content(?!.(type|encoding|length))|input|output|text|message|request(?!.(method|header|path|url|origin)))"
    r".{0,30}(blocked|prohibited|disallowed|violat(?!.{0,30}(schema|constraint|format|type|minim|maxim|limit)))",
    re.IGNORECASE | re.DOTALL,
)
# of the account, its key or its place: they hold for every prompt
ACCOUNT_WORDS = re.compile(
    r"(account|api.?key|organi[sz]ation|project|subscription|ip.address)\b.{0,40}"
    r"(flagged|block|suspend|banned|disabled|deactivat|restrict|violat|expired|not allowed)|"
    r"(flagged|blocked|suspended|banned|disabled|expired) (account|key)|"
    r"billing|balance|insufficient|payment|credit|authenticat|unauthori[sz]ed|"
    r"not (have|available|authori).{0,30}(access|permission|region|country)|"
    r"(region|country|territory).{0,20}not (supported|available)",
    re.IGNORECASE | re.DOTALL,
)
WORD_KEY = re.compile(
    r"(?<!finish_)(message|msg|errors?|details?|description|reason|title|faultstring)$", re.IGNORECASE
)
CODE_KEY = re.compile(r"(code|errno)$|^(status|type|param)$", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """Why there is no reply.

    `status` is `timeout`, `connection` (refused or lost), `rate_limited`, `http_NNN`, `content_filter` (refused for
    what the request says), `context` (longer than the server's), `cut_off` (too few tokens for an answer),
    `broken_off` (an answer that an error ended), `error_reply` (an error without a code, sent as if it were an
    answer), `no_answer` (a completion without one), `malformed` (not a chat completion) or `not_asked` (too many
    requests before had failed).
    """

    status: str
    error: str

    def __str__(self) -> str:
        return f"{self.status}: {self.error}"


def may_pass(status: str) -> bool:
    """Whether the same request may succeed at another time, with nothing changed."""
    return status.startswith(PASSING) and status not in LASTING


def may_be_of_prompt(failure: Failure) -> bool:
    """Whether what the prompt says may be why it was refused, although the server does not say so."""
    words = (BUSY_WORDS, BROKEN_WORDS, ACCOUNT_WORDS)
    return failure.status in MAY_BE_OF_PROMPT and not any(pattern.search(failure.error) for pattern in words)


def stop_reason(finish_reason: str | None) -> str | None:
    """Why a response ended, `eos`, `length` or `refused`, from a server's word for it; None if that is another.

    >>> [stop_reason(word) for word in ("stop", "MAX_TOKENS", "content_filter: PROHIBITED_CONTENT", "tool_calls")]
    ['eos', 'length', 'refused', None]
    """
    word = (finish_reason or "").lower()
    if word in ENDED:
        return "eos"
    return "length" if word in CUT_OFF else "refused" if FILTERED.search(word) else None


def error_in(completion: Any) -> Failure | None:
    """Why a body with status 200 holds no answer, in the server's own words and codes; None if it may hold one.

    >>> error_in({"error": {"message": "Slow down.", "code": 429}})
    Failure(status='rate_limited', error='Slow down. (code 429)')
    >>> error_in({"choices": [{"message": {"content": None, "refusal": "I cannot help with that."}}]})
    Failure(status='content_filter', error='I cannot help with that.')
    """
    if not isinstance(completion, dict):
        return malformed(json.dumps(completion))
    choices = completion.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message, finish, inner = first.get("message"), first.get("finish_reason"), first.get("error")
    finish = finish if isinstance(finish, str) else None
    if inner or (finish or "").lower() in BROKEN_OFF:
        failure = _error_of(inner or completion, f"finish_reason {finish}")
        is_broken = (finish or "").lower() in BROKEN_OFF and failure.status == "error_reply"
        return Failure("broken_off", failure.error) if is_broken else failure
    if isinstance(message, dict):
        if message.get("content") and not _refusal_in(message):
            return None
        if refusal := _refusal_in(message):
            return Failure("content_filter", quoted(refusal))
        error = completion.get("error")
        return _error_of(error) if any(_words_in(error)) or (isinstance(error, str) and error) else None
    if stop_reason(finish) == "length":  # nothing but reasoning, perhaps
        return None
    if stop_reason(finish) == "refused":
        return _failure(None, f"content filter: {json.dumps(first)}")
    return _error_without_choices(completion, first)


def malformed(body: str) -> Failure:
    """The failure of a body that is no chat completion."""
    return Failure("malformed", f"not the JSON of an OpenAI-compatible endpoint: {quoted(body) or 'nothing'}")


def as_failure(error: Exception) -> Failure:
    """What an error of the client means for a request."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    if isinstance(error, (APITimeoutError, TimeoutError)):
        return Failure("timeout", "no complete answer in time")
    if isinstance(error, APIStatusError):
        return _failure(error.status_code, _unescaped(error.response.text) or error.message)
    if isinstance(error, APIConnectionError):
        return Failure("connection", quoted(str(error.__cause__ or error)))
    return Failure("malformed", quoted(f"not a reply of an OpenAI-compatible endpoint: {error!r}"))


def _error_without_choices(completion: Mapping[str, Any], first: Mapping[str, Any]) -> Failure:
    is_error = completion.get("error") or completion.get("errors") or completion.get("success") is False
    body = json.dumps(completion, ensure_ascii=False)
    if is_error or any(_words_in(completion)) or _number_in(completion):
        return _error_of(completion, body)
    if _speaks_of_filter(body) and "choices" in completion:
        return Failure("content_filter", quoted(body))
    choices = completion.get("choices", "")
    if (choices is None or isinstance(choices, list)) and not {"text", "delta"} & first.keys():
        return Failure("no_answer", f"a completion without an answer: {quoted(body)}")
    return malformed(body)


def _error_of(error: Any, otherwise: str = "") -> Failure:
    """The failure that an error in a body of status 200 is, whatever its form."""
    words = list(_words_in({"error": error})) or [otherwise]
    number, codes = _number_in(error), list(_codes_in(error))
    text = "; ".join(words) + (f" (code {', '.join(codes)})" if codes else "")
    if number is None and re.search(r"rate.?limit|quota|too.?many.?requests|overload", text, re.IGNORECASE):
        number = 429
    return _failure(number, text)


def _words_in(value: Any, key: str = "") -> Iterator[str]:
    """The messages that a body holds at any depth, each once."""
    if isinstance(value, str) and WORD_KEY.search(key):
        if value.strip() and value.strip().lower() not in ("ok", "success", "successful", "none", "null"):
            yield f"{key}: {value}" if key.lower().endswith("reason") else value
    elif isinstance(value, list):
        yield from dict.fromkeys(text for item in value for text in _words_in(item, key))
    elif isinstance(value, dict):
        parts = [(name, part) for name, part in value.items() if name not in ("choices", "usage")]
        yield from dict.fromkeys(text for name, part in parts for text in _words_in(part, str(name)))


def _codes_in(value: Any, key: str = "") -> Iterator[str]:
    """Its codes, the field that it is about among them."""
    if isinstance(value, str | int) and not isinstance(value, bool) and CODE_KEY.search(key):
        if str(value).strip() and str(value).lower() not in ("0", "200", "error", "fail", "failed"):
            yield str(value)
    elif isinstance(value, list):
        yield from dict.fromkeys(code for item in value for code in _codes_in(item))
    elif isinstance(value, dict):
        parts = [(name, part) for name, part in value.items() if name not in ("choices", "usage")]
        yield from dict.fromkeys(code for name, part in parts for code in _codes_in(part, str(name)))


def _number_in(error: Any) -> int | None:
    """The HTTP status that it names."""
    return next((int(code) for code in _codes_in(error) if re.fullmatch("[45][0-9][0-9]", code)), None)


def _refusal_in(message: Mapping[str, Any]) -> str:
    """The words in which a model refuses to answer, apart from its content or as a part of it."""
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    said = [part.get("refusal") for part in parts if part.get("type") == "refusal"]
    has_text = any(part.get("text") for part in parts) or (isinstance(content, str) and content.strip())
    refusals = [text for text in (message.get("refusal"), *said) if isinstance(text, str) and text.strip()]
    return "" if has_text else "; ".join(refusals)


def _failure(code: int | None, text: str) -> Failure:
    """A failure with an HTTP status, or None in an error without one; its words may say more than the status."""
    status = "rate_limited" if code == 429 else "error_reply" if code is None else f"http_{code}"
    if code not in (401, 402, 407, 429, 502, 503, 504):
        is_filter = code == 451 or (code not in OF_ADDRESS and _speaks_of_filter(text))
        if is_filter and not ACCOUNT_WORDS.search(text):
            status = "content_filter"
        elif CUT_OFF_WORDS.search(text):
            status = "cut_off"
        elif code == 413 or (CONTEXT_WORDS.search(text) and not BUSY_WORDS.search(text)):
            status = "context"
    return Failure(status, quoted(text))


def _speaks_of_filter(text: str) -> bool:
    return bool(FILTER_WORDS.search(text) or (MAY_BE_FILTER_WORDS.search(text) and not speaks_of_field(text)))


def _unescaped(body: str) -> str:
    """A body whose JSON holds no escapes, so that words of any script are found and can be read."""
    try:
        return json.dumps(json.loads(body), ensure_ascii=False)
    except (ValueError, RecursionError):
        return body
