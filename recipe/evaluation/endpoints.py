"""Models behind an OpenAI-compatible endpoint (vLLM, Ollama, `transformers serve`, ...).

An endpoint is written `http://host:port/v1#model`. The key is read from the environment variable OPENAI_API_KEY and
never written, even if the endpoint sends it back. Each request ends in a `Reply` or in a `Failure`.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from recipe.config import UserError
from recipe.evaluation.connection import certificate_advice, is_address, open_client, proxy_advice, without_credentials
from recipe.evaluation.negotiation import Terms, negotiate
from recipe.keys import read_key
from recipe.redaction import redact

if TYPE_CHECKING:  # elsewhere it is imported where it is used: it takes 0.8 s, and most runs ask no endpoint
    from openai import AsyncOpenAI

    from recipe.generation import Decoding

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_RETRIES = 3  # of a request, after timeouts, lost connections and the HTTP statuses 408, 409, 429 and 5xx
LONGEST_PAUSE = 120  # seconds; the client waits up to this long before a retry if a Retry-After header says so
GIVE_UP_AFTER = 10  # requests in a row that end in one of these faults; any other fault is of the request itself
FAULTS_OF_ENDPOINT = ("timeout", "connection", "rate_limited", "http_5")
NEGOTIABLE = ("http_400", "http_404", "http_422", "http_500", "http_501")  # how servers refuse a field
FROM_PROXY = ("connection", "timeout", "http_403", "http_407", "http_502", "http_503", "http_504")
CUT_OFF = ("length", "max_tokens", "model_length")  # finish reasons; Mistral calls the end of the context model_length
FILTERED = ("content_filter", "safety", "prohibited_content", "blocklist", "recitation", "sensitive")
# words of errors that say what the status does not
CUT_OFF_WORDS = re.compile(r"max_tokens or model output limit was reached|could not finish the message", re.IGNORECASE)
CONTEXT_WORDS = re.compile(
    r"context.{0,20}(length|window|size)|max_model_len|max_new_tokens. must be|(prompt|input) (is|are) too long|"
    r"input tokens exceed",
    re.IGNORECASE,
)
# of a server that is busy: the next attempt may succeed
BUSY_WORDS = re.compile(r"rate.?limit|quota|overload|capacity|queue|per (second|minute|hour|day)", re.IGNORECASE)
FILTER_WORDS = re.compile(r"content.?filter|content.?management.?policy|content.?policy|ResponsibleAI", re.IGNORECASE)
STOP_REASONS = {  # by finish_reason
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "eos"),
    **dict.fromkeys(CUT_OFF, "length"),
    **dict.fromkeys(FILTERED, "refused"),
}
USAGE = ("prompt_tokens", "completion_tokens")
ADVICE = {  # by the status of a failure
    "connection": "is it running, and is the port right?",
    "timeout": "it may still be loading the model: try again, or give it more time",
    "rate_limited": "wait, or send fewer requests at once",
    "http_401": "set the environment variable OPENAI_API_KEY to its key",
    "http_403": "set the environment variable OPENAI_API_KEY to a key that may use this model",
    "http_404": "is the path right (most end in /v1), and does it know the model?",
    "malformed": "is the path right (most end in /v1)?",
}
_TERMS: dict[tuple, Terms] = {}  # what each endpoint was found to accept


@dataclass(frozen=True)
class Endpoint:
    """Where to ask which model."""

    url: str
    model: str

    def __str__(self) -> str:
        return f"{self.url}#{self.model}"


@dataclass(frozen=True)
class Reply:
    """A chat completion: `usage` in tokens as the server counts them, `seconds` of the attempt that succeeded, and the
    `reasoning` that the server keeps apart from the text."""

    text: str
    finish_reason: str | None
    model: str | None
    usage: dict[str, int] | None
    seconds: float
    reasoning: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why there is no reply.

    `status` is `timeout`, `connection` (refused or lost), `rate_limited`, `http_NNN`, `content_filter` (refused for
    what the request says), `context` (longer than the server's), `cut_off` (too few tokens for an answer),
    `error_reply` (an error without a code, sent as if it were an answer), `malformed` (not a chat completion) or
    `not_asked` (too many requests before had failed).
    """

    status: str
    error: str

    def __str__(self) -> str:
        return f"{self.status}: {self.error}"


def is_endpoint(name: str) -> bool:
    """Whether a model's name is the address of an endpoint."""
    return name.lower().startswith(("http://", "https://"))


def parse_endpoint(name: str) -> Endpoint:
    """Read `http://host:port/v1#model`, and whether its key can be sent; no request is sent yet.

    >>> parse_endpoint("http://localhost:8000/v1/#llama3")
    Endpoint(url='http://localhost:8000/v1', model='llama3')

    Raises:
        UserError: the name is not such an address, or has a user and a password in it; or see `read_key`.
    """
    read_key(KEY_VARIABLE)
    address, _, model = name.partition("#")
    if not is_address(address) or not model:
        raise UserError(
            f"endpoint {without_credentials(name)!r}: write http://host:port/v1#model, without user or password; the "
            "key goes into the environment variable OPENAI_API_KEY"
        )
    return Endpoint(address.rstrip("/"), model)


def preflight(endpoint: Endpoint, request: Mapping[str, Any], timeout: float = 300.0) -> Terms:
    """Wait until the endpoint answers, as loading a model may take minutes, and find which fields it accepts.

    What was found is remembered as long as the process lives. What is left out is said once.

    Args:
        request: one such as will be sent; `terms.fit(request)` makes of each what the endpoint accepts.
        timeout: seconds for each attempt, retries included.

    Example::

        terms = preflight(endpoint, chat_request("Hello.", decoding))
        terms.left_out  # ["temperature"]: refused, so that answers may be sampled
        ask(endpoint, [terms.fit(request) for request in requests])

    Raises:
        UserError: the endpoint is down, wants another key, does not know the model, or accepts the request in no form.
    """
    signature = (endpoint, *((name, str(request.get(name))) for name in ("temperature", "top_p")))
    known = _TERMS.get(signature, Terms())
    if "max_tokens" in request:  # some servers take no fewer
        request = {**request, "max_tokens": max(16, request["max_tokens"])}

    def send(fitted: Mapping[str, Any]) -> str | None:
        [outcome] = ask(endpoint, [fitted], timeout=timeout, time_limit=timeout, retries=0)
        return outcome.error if isinstance(outcome, Failure) and outcome.status != "cut_off" else None

    waiting = f"Waiting for {endpoint}"
    [outcome] = ask(endpoint, [known.fit(request)], timeout=timeout, time_limit=timeout, description=waiting)
    if isinstance(outcome, Reply) or outcome.status == "cut_off":  # accepted, although 16 tokens were too few
        return known
    terms = negotiate(request, known, outcome.error, send) if outcome.status in NEGOTIABLE else None
    if terms is None:
        hints = (ADVICE.get(outcome.status), proxy_advice(endpoint.url) if outcome.status in FROM_PROXY else None)
        advice = [hint for hint in (*hints, certificate_advice(outcome.error)) if hint]
        raise UserError("; ".join([f"endpoint {endpoint}: {outcome}", *advice]))
    _TERMS[signature] = terms
    if terms.left_out:
        print(f"{endpoint} does not accept {', '.join(terms.left_out)}: asked without", file=sys.stderr)
    return terms


def ask(
    endpoint: Endpoint,
    requests: Sequence[Mapping[str, Any]],
    on_outcome: Callable[[int, Reply | Failure], None] = lambda index, outcome: None,
    concurrency: int = 4,
    timeout: float = 60.0,
    time_limit: float | None = None,
    description: str | None = None,
    retries: int | None = None,
) -> list[Reply | Failure]:
    """Ask for chat completions, several at once; the outcomes are in the order of the requests.

    After 10 requests in a row that failed in spite of retries (twice `concurrency` if that is more), the others are
    not sent.

    Args:
        requests: arguments of a chat completion without the model: `messages`, `temperature`, ...
        on_outcome: called with the index and the outcome of each request that was sent, as it ends.
        concurrency: requests at once.
        timeout: seconds without a byte from the server after which an attempt ends.
        time_limit: seconds for one request with its retries; default: what `timeout` and the pauses may add up to.
        description: label of a progress bar; None for no bar.
        retries: of a request; default: 3.

    Raises:
        UserError: see `open_client`.

    Example::

        [reply] = ask(endpoint, [{"messages": [{"role": "user", "content": "Name a colour."}]}])
        reply.text, reply.finish_reason  # 'Blue.', 'stop'
    """
    # the client's timeout starts again at each byte: a slow stream of bytes would never end
    limit = time_limit or (MAX_RETRIES + 1) * timeout + MAX_RETRIES * LONGEST_PAUSE
    key = read_key(KEY_VARIABLE) or "none"  # local servers want none, the client wants one
    attempts = MAX_RETRIES if retries is None else retries
    client = open_client(endpoint.url, key, timeout, attempts)
    slots = asyncio.Semaphore(concurrency)
    failed_in_a_row: list[Failure] = []

    async def ask_one(index: int) -> Reply | Failure:
        async with slots:
            count = len(failed_in_a_row)
            if count >= max(GIVE_UP_AFTER, 2 * concurrency):
                return Failure("not_asked", f"{count} requests in a row had failed, the last: {failed_in_a_row[-1]}")
            outcome = await _complete(client, {**requests[index], "model": endpoint.model}, limit, attempts)
            if isinstance(outcome, Failure) and outcome.status.startswith(FAULTS_OF_ENDPOINT):
                failed_in_a_row.append(outcome)
            else:
                failed_in_a_row.clear()
            on_outcome(index, outcome)
            progress.update()
            return outcome

    async def ask_all() -> list[Reply | Failure]:
        async with client:
            return await asyncio.gather(*map(ask_one, range(len(requests))))

    with tqdm(total=len(requests), desc=description, unit="request", disable=description is None) as progress:
        return asyncio.run(ask_all())


def chat_request(text: str, decoding: Decoding) -> dict[str, Any]:
    """The request for the response to one message."""
    return {
        "messages": [{"role": "user", "content": writable(text)}],
        "temperature": decoding.temperature,
        **({"top_p": decoding.top_p} if decoding.top_p < 1 else {}),  # 1 changes nothing, and some servers refuse it
        "seed": decoding.seed,
        "max_tokens": decoding.max_new_tokens,
    }


def as_answer(reply: Reply) -> dict[str, Any]:
    """What predictions.jsonl holds of a reply; the server's count of tokens often includes the end-of-text token."""
    answer = {
        "text": reply.text,
        "tokens": reply.usage["completion_tokens"] if reply.usage else None,
        "stop_reason": STOP_REASONS.get((reply.finish_reason or "").lower()),
        "seconds": reply.seconds,
    }
    return {**answer, "reasoning": reply.reasoning} if reply.reasoning else answer


def writable(text: str) -> str:
    """A text without halves of surrogate pairs, which UTF-8 cannot hold.

    >>> writable("a \\ud83d b")
    'a ? b'
    """
    return text.encode("utf-8", "replace").decode()


async def _complete(
    client: AsyncOpenAI, request: Mapping[str, Any], time_limit: float, retries: int
) -> Reply | Failure:
    try:
        async with asyncio.timeout(time_limit):
            attempt = 0
            while True:
                raw = await client.chat.completions.with_raw_response.create(**request)
                completion = json.loads(raw.content)
                failure = error_in(completion)
                if failure is None:
                    return _as_reply(completion, raw.elapsed.total_seconds())
                if attempt == retries or not failure.status.startswith(FAULTS_OF_ENDPOINT):
                    return failure
                await asyncio.sleep(0.5 * 2**attempt)  # as the client does where the status says it
                attempt += 1
    except Exception as error:  # whatever a server may send, the others are still asked
        return _as_failure(error)


def _as_reply(completion: Mapping[str, Any], seconds: float) -> Reply:
    choice, usage = completion["choices"][0], completion.get("usage")
    message = choice["message"]
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    content = message.get("content") or ""
    if isinstance(content, list):  # parts, each with its type
        parts = [(part.get("type"), _text_of(part)) for part in content]
        content = "".join(text for kind, text in parts if kind == "text")
        thoughts = thoughts or "".join(text for kind, text in parts if kind == "thinking") or None
    text = redact(writable(content))
    finish_reason, model = (
        value and redact(writable(value)) for value in (choice.get("finish_reason"), completion.get("model"))
    )
    reasoning = redact(writable(thoughts)) if isinstance(thoughts, str) else None
    is_counted = isinstance(usage, dict) and all(isinstance(usage.get(name), int) for name in USAGE)
    counts = {name: usage[name] for name in USAGE} if is_counted and usage else None
    return Reply(text, finish_reason, model, counts, seconds, reasoning)


def _text_of(part: Mapping[str, Any]) -> str:
    """The text of a part of a message, which may be a list of parts itself."""
    inner = part.get("text") or part.get("thinking") or ""
    return inner if isinstance(inner, str) else "".join(map(_text_of, inner))


def error_in(completion: Any) -> Failure | None:
    """The error that a server sends with status 200, with its own words and code; None if there is no error.

    >>> error_in({"error": {"message": "Slow down.", "code": 429}})
    Failure(status='rate_limited', error='Slow down. (code 429)')
    """
    if not isinstance(completion, dict):
        return None
    choices = completion.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    inner = first.get("error") if isinstance(first, dict) else None
    if first is not None and not inner:
        return None
    error = inner or completion.get("error") or completion.get("detail") or completion.get("message")
    if not error:
        return None
    details = error if isinstance(error, dict) else completion
    words = details.get("message") or details.get("detail") or error
    codes = [details.get(name) for name in ("code", "status", "status_code", "type")]
    number = next((int(str(code)) for code in codes if re.fullmatch("[45][0-9][0-9]", str(code))), None)
    text = words if isinstance(words, str) else json.dumps(words)
    if number is None and re.search(r"rate.?limit|quota|too.?many", f"{codes} {text}", re.IGNORECASE):
        return _failure(429, text)
    return _failure(
        number, f"{text} (code {number})" if number else f"{text} {' '.join(filter(None, map(_word, codes)))}"
    )


def _word(code: Any) -> str:
    return code if isinstance(code, str) else ""


def _as_failure(error: Exception) -> Failure:
    """What an error of the client, or of the reading of its reply, means for a request."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    if isinstance(error, (APITimeoutError, TimeoutError)):
        status, text = "timeout", "no complete answer in time"
    elif isinstance(error, APIStatusError):
        return _failure(error.status_code, error.response.text or error.message)
    elif isinstance(error, APIConnectionError):
        status, text = "connection", str(error.__cause__ or error)
    else:
        status, text = "malformed", f"not the JSON of an OpenAI-compatible endpoint: {error!r}"
    return Failure(status, _shortened(text))


def _failure(code: int | None, text: str) -> Failure:
    """A failure with an HTTP status, or None in an error without one; its words may say more than the status."""
    status = "rate_limited" if code == 429 else "error_reply" if code is None else f"http_{code}"
    if code not in (401, 429):
        if FILTER_WORDS.search(text):
            status = "content_filter"
        elif CUT_OFF_WORDS.search(text):
            status = "cut_off"
        elif code == 413 or (CONTEXT_WORDS.search(text) and not BUSY_WORDS.search(text)):
            status = "context"
    return Failure(status, _shortened(text))


def _shortened(text: str) -> str:
    return " ".join(redact(text).split())[:300]  # cut later, so that no part of a key is left
