"""Models behind an OpenAI-compatible endpoint (vLLM, Ollama, `transformers serve`, ...).

An endpoint is written `http://host:port/v1#model`. Which key it gets is said in `endpoint_keys.py`; a key is never
written, even if the endpoint sends it back. Each request ends in a `Reply` or in a `Failure`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from recipe.config import UserError
from recipe.evaluation.connection import (
    certificate_advice,
    endpoint_without_credentials,
    in_one_spelling,
    is_address,
    open_client,
    proxy_advice,
)
from recipe.evaluation.endpoint_keys import endpoint_key, is_openais, key_advice, variable_for
from recipe.evaluation.failures import Failure, as_failure, error_in, malformed, may_pass, stop_reason
from recipe.evaluation.negotiation import Terms, names_field, negotiate
from recipe.redaction import redact

if TYPE_CHECKING:  # elsewhere it is imported where it is used: it takes 0.8 s, and most runs ask no endpoint
    from openai import AsyncOpenAI

    from recipe.generation import Decoding

MAX_RETRIES = 3  # of a request, after timeouts, lost connections and the HTTP statuses 408, 409, 429 and 5xx
LONGEST_PAUSE = 120  # seconds; the client waits up to this long before a retry if a Retry-After header says so
GIVE_UP_AFTER = 10  # requests in a row that end in a fault that may pass; any other fault is of the request itself
NEGOTIABLE = ("http_400", "http_404", "http_422", "http_500", "http_501")  # how servers refuse a field
# how they do so in words alone: only if these speak of a field
NEGOTIABLE_BY_WORDS = ("http_4", "http_5", "error_reply", "no_answer", "context", "content_filter")
NOT_NEGOTIABLE = ("http_401", "http_402", "http_407")
FROM_PROXY = ("connection", "timeout", "http_403", "http_407", "http_502", "http_503", "http_504")
USAGE = ("prompt_tokens", "completion_tokens")
ADVICE = {  # by the status of a failure
    "connection": "is it running, and is the port right?",
    "timeout": "it may still be loading the model: try again, or give it more time",
    "rate_limited": "wait, or send fewer requests at once",
    "http_404": "is the path right (most end in /v1), and does it know the model?",
    "malformed": "is the path right (most end in /v1)?",
    "no_answer": "is it a model that answers chat messages?",
}
_TERMS: dict[tuple, Terms] = {}  # what each endpoint was found to accept


@dataclass(frozen=True)
class Endpoint:
    """Where to ask which model."""

    url: str
    model: str
    key_variable: str | None = field(default=None, repr=False, compare=False)  # that a flag names for it

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


class EndpointError(UserError):
    """An endpoint that was asked in vain: `may_pass` says whether the same may succeed at another time."""

    def __init__(self, message: str, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


def is_endpoint(name: str) -> bool:
    """Whether a model's name is the address of an endpoint."""
    return name.lower().startswith(("http://", "https://"))


def parse_endpoint(
    name: str, named: str | Sequence[str] = (), urls: Sequence[str] = (), flag: str = "--endpoint_key_env"
) -> Endpoint:
    """Read `http://host:port/v1#model`, and whether its key can be sent; no request is sent yet.

    >>> parse_endpoint("http://localhost:8000/v1/#llama3")
    Endpoint(url='http://localhost:8000/v1', model='llama3')

    Args:
        named: the environment variable with its key, if that is not OPENAI_API_KEY; or all words of the flag, of which
            each may be `HOST=NAME`.
        urls: all endpoints that the flag is about.
        flag: what names the variable.

    Raises:
        UserError: one of the endpoints is not such an address, or has a user and a password in it; or see
            `variable_for` and `endpoint_key`.
    """
    for each in (name, *urls):
        address, _, model = each.partition("#")
        if not is_address(address) or not model:
            raise UserError(
                f"endpoint {endpoint_without_credentials(each)!r}: write http://host:port/v1#model, without user or "
                "password; the key goes into an environment variable, which --endpoint_key_env or --judge_key_env names"
            )
    address, _, model = name.partition("#")
    url = in_one_spelling(address).rstrip("/")
    variable = variable_for(url, [named] if isinstance(named, str) else named, urls, flag)
    endpoint_key(url, variable)
    return Endpoint(url, model, variable)


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
        EndpointError: it is down, wants another key, does not know the model, or accepts the request in no form.
    """
    signature = (endpoint, *((name, str(request.get(name))) for name in ("temperature", "top_p")))
    known = _TERMS.get(signature, Terms())
    request = _long_enough(request)

    def send(fitted: Mapping[str, Any]) -> str | None:
        [outcome] = ask(endpoint, [fitted], timeout=timeout, time_limit=timeout, retries=0)
        return outcome.error if isinstance(outcome, Failure) and outcome.status != "cut_off" else None

    waiting = f"Waiting for {endpoint}"
    [outcome] = ask(endpoint, [known.fit(request)], timeout=timeout, time_limit=timeout, description=waiting)
    if isinstance(outcome, Reply) or outcome.status == "cut_off":  # accepted, although 16 tokens were too few
        return known
    is_negotiable = _is_negotiable(outcome, request)
    terms = negotiate(request, known, outcome.error, send) if is_negotiable else None
    if terms is None:
        advised = ADVICE.get(outcome.status)
        if outcome.status in ("http_401", "http_403"):
            advised = key_advice(endpoint.url, endpoint.key_variable)
        hints = (advised, proxy_advice(endpoint.url) if outcome.status in FROM_PROXY else None)
        advice = [hint for hint in (*hints, certificate_advice(outcome.error)) if hint]
        # where a field may have been refused, it will be refused again
        passes = may_pass(outcome.status) and not is_negotiable
        raise EndpointError("; ".join([f"endpoint {endpoint}: {outcome}", *advice]), passes)
    _TERMS[signature] = terms
    if terms.left_out:
        print(f"{endpoint} does not accept {', '.join(terms.left_out)}: asked without", file=sys.stderr)
    return terms


def still_answers(endpoint: Endpoint, terms: Terms, request: Mapping[str, Any], timeout: float) -> bool:
    """Whether the endpoint answers a request that it accepted in the preflight."""
    [outcome] = ask(endpoint, [terms.fit(_long_enough(request))], timeout=timeout)
    return isinstance(outcome, Reply) or outcome.status == "cut_off"


def _long_enough(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request with at least 16 tokens for the answer: some servers take no fewer."""
    return {**request, "max_tokens": max(16, request["max_tokens"])} if "max_tokens" in request else request


def _is_negotiable(failure: Failure, request: Mapping[str, Any]) -> bool:
    """Whether a failure may be that of a field of the request."""
    by_words = failure.status.startswith(NEGOTIABLE_BY_WORDS) and failure.status not in NOT_NEGOTIABLE
    return failure.status in NEGOTIABLE or (by_words and names_field(request, failure.error))


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
    key = endpoint_key(endpoint.url, endpoint.key_variable) or "none"  # local servers want none, the client wants one
    attempts = MAX_RETRIES if retries is None else retries
    client = open_client(endpoint.url, key, timeout, attempts, all_headers=is_openais(endpoint.url))
    slots = asyncio.Semaphore(concurrency)
    failed_in_a_row: list[Failure] = []

    async def ask_one(index: int) -> Reply | Failure:
        async with slots:
            count = len(failed_in_a_row)
            if count >= max(GIVE_UP_AFTER, 2 * concurrency):
                return Failure("not_asked", f"{count} requests in a row had failed, the last: {failed_in_a_row[-1]}")
            outcome = await _complete(client, {**requests[index], "model": endpoint.model}, limit, attempts)
            if isinstance(outcome, Failure) and may_pass(outcome.status):
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


def chat_request(messages: str | Sequence[Mapping[str, str]], decoding: Decoding) -> dict[str, Any]:
    """The request for the response to messages, or to one message of the user."""
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return {
        "messages": [{**message, "content": writable(message["content"])} for message in messages],
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
        "stop_reason": stop_reason(reply.finish_reason),
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
                outcome = _read(raw.content, raw.elapsed.total_seconds())
                passes = isinstance(outcome, Failure) and may_pass(outcome.status)
                if attempt == retries or not passes:
                    return outcome
                await asyncio.sleep(0.5 * 2**attempt)  # as the client does where the status says it
                attempt += 1
    except Exception as error:  # whatever a server may send, the others are still asked
        return as_failure(error)


def _read(body: bytes, seconds: float) -> Reply | Failure:
    """What a body with status 200 says."""
    try:
        completion = json.loads(body)
        return error_in(completion) or _as_reply(completion, seconds)
    except Exception:  # whatever a server may send
        return malformed(body.decode("utf-8", "replace"))


def _as_reply(completion: Mapping[str, Any], seconds: float) -> Reply:
    choice, usage = completion["choices"][0], completion.get("usage")
    message = choice.get("message") or {}  # none if nothing was written within the limit
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
