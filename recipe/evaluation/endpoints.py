"""Models behind an OpenAI-compatible endpoint (vLLM, Ollama, `transformers serve`, ...).

An endpoint is written `http://host:port/v1#model`. The key is read from the environment variable OPENAI_API_KEY and
never written, even if the endpoint sends it back. Each request ends in a `Reply` or in a `Failure`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from recipe.config import UserError
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
ADDRESS = re.compile(r"https?://([\w.-]+|\[[\w:.]+\])(:\d+)?(/[!->@-~]*)?", re.ASCII)
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


@dataclass(frozen=True)
class Endpoint:
    """Where to ask which model."""

    url: str
    model: str

    def __str__(self) -> str:
        return f"{self.url}#{self.model}"


@dataclass(frozen=True)
class Reply:
    """A chat completion: `usage` in tokens as the server counts them, `seconds` of the attempt that succeeded."""

    text: str
    finish_reason: str | None
    model: str | None
    usage: dict[str, int] | None
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Why there is no reply.

    `status` is `timeout`, `connection` (refused or lost), `rate_limited`, `http_NNN`, `malformed` (not a chat
    completion) or `not_asked` (too many requests before had failed).
    """

    status: str
    error: str

    def __str__(self) -> str:
        return f"{self.status}: {self.error}"


def is_endpoint(name: str) -> bool:
    """Whether a model's name is the address of an endpoint."""
    return name.startswith(("http://", "https://"))


def parse_endpoint(name: str) -> Endpoint:
    """Read `http://host:port/v1#model`, and whether its key can be sent; no request is sent yet.

    >>> parse_endpoint("http://localhost:8000/v1/#llama3")
    Endpoint(url='http://localhost:8000/v1', model='llama3')

    Raises:
        UserError: the name is not such an address, or has a user and a password in it; or see `read_key`.
    """
    read_key(KEY_VARIABLE)
    address, _, model = name.partition("#")
    if ADDRESS.fullmatch(address) is None or not model:
        shown = re.sub(r"//.*@", "//", name).partition("?")[0]  # without what may be a secret
        raise UserError(
            f"endpoint {shown!r}: write http://host:port/v1#model, without user or password; the key goes into the "
            "environment variable OPENAI_API_KEY"
        )
    return Endpoint(address.rstrip("/"), model)


def preflight(endpoint: Endpoint, requests: Sequence[Mapping[str, Any]], timeout: float = 300.0) -> Mapping[str, Any]:
    """Wait until the endpoint answers, as loading a model may take minutes, and return the request it accepts.

    Args:
        requests: forms of one request; the next is tried if the endpoint rejects one with HTTP 400 or 422.
        timeout: seconds for each, retries included.

    Raises:
        UserError: the endpoint is down, wants another key, does not know the model, or accepts none of the requests.
    """
    for request in requests:
        [outcome] = ask(endpoint, [request], timeout=timeout, time_limit=timeout, description=f"Waiting for {endpoint}")
        if isinstance(outcome, Reply):
            return request
        failure = outcome
        if failure.status not in ("http_400", "http_422"):
            break
    advice = f"; {ADVICE[failure.status]}" if failure.status in ADVICE else ""
    raise UserError(f"endpoint {endpoint}: {failure}{advice}")


def ask(
    endpoint: Endpoint,
    requests: Sequence[Mapping[str, Any]],
    on_outcome: Callable[[int, Reply | Failure], None] = lambda index, outcome: None,
    concurrency: int = 4,
    timeout: float = 60.0,
    time_limit: float | None = None,
    description: str | None = None,
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

    Example::

        endpoint = parse_endpoint("http://localhost:11434/v1#llama3")
        [reply] = ask(endpoint, [{"messages": [{"role": "user", "content": "Name a colour."}]}])
        reply.text, reply.finish_reason  # 'Blue.', 'stop'
    """
    from openai import AsyncOpenAI

    # the client's timeout starts again at each byte, so that a slow stream of bytes would never end
    limit = time_limit or (MAX_RETRIES + 1) * timeout + MAX_RETRIES * LONGEST_PAUSE
    key = read_key(KEY_VARIABLE) or "none"  # local servers want none, the client wants one
    client = AsyncOpenAI(base_url=endpoint.url, api_key=key, timeout=timeout, max_retries=MAX_RETRIES)
    slots = asyncio.Semaphore(concurrency)
    failed_in_a_row: list[Failure] = []

    async def ask_one(index: int) -> Reply | Failure:
        async with slots:
            count = len(failed_in_a_row)
            if count >= max(GIVE_UP_AFTER, 2 * concurrency):
                return Failure("not_asked", f"{count} requests in a row had failed, the last: {failed_in_a_row[-1]}")
            outcome = await _complete(client, {**requests[index], "model": endpoint.model}, limit)
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
        "top_p": decoding.top_p,
        "seed": decoding.seed,
        "max_tokens": decoding.max_new_tokens,
    }


def message_text(record: Mapping[str, Any]) -> str:
    """A record as the text of one message, because a server reads nothing of a message but its content.

    The Alpaca template renders this text to the prompt of training.

    >>> message_text({"instruction": "Make it plural.", "input": "cat"})
    'Make it plural.\\n\\n### Input:\\ncat'
    """
    return (record["instruction"] or "") + (f"\n\n### Input:\n{record['input']}" if record.get("input") else "")


def as_answer(reply: Reply) -> dict[str, Any]:
    """What predictions.jsonl holds of a reply; the server's count of tokens often includes the end-of-text token."""
    return {
        "text": reply.text,
        "tokens": reply.usage["completion_tokens"] if reply.usage else None,
        "stop_reason": {"stop": "eos", "length": "length"}.get(reply.finish_reason or ""),
        "seconds": reply.seconds,
    }


def writable(text: str) -> str:
    """A text without halves of surrogate pairs, which UTF-8 cannot hold.

    >>> writable("a \\ud83d b")
    'a ? b'
    """
    return text.encode("utf-8", "replace").decode()


async def _complete(client: AsyncOpenAI, request: Mapping[str, Any], time_limit: float) -> Reply | Failure:
    try:
        async with asyncio.timeout(time_limit):
            raw = await client.chat.completions.with_raw_response.create(**request)
        completion = json.loads(raw.content)
        choice, usage = completion["choices"][0], completion.get("usage")
        texts = (choice["message"]["content"] or "", choice.get("finish_reason"), completion.get("model"))
        text, finish_reason, model = (value and redact(writable(value)) for value in texts)
        is_counted = isinstance(usage, dict) and all(isinstance(usage.get(name), int) for name in USAGE)
        counts = {name: usage[name] for name in USAGE} if is_counted else None
        return Reply(text, finish_reason, model, counts, raw.elapsed.total_seconds())
    except Exception as error:  # whatever a server may send, the others are still asked
        return _as_failure(error)


def _as_failure(error: Exception) -> Failure:
    """What an error of the client, or of the reading of its reply, means for a request."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    if isinstance(error, (APITimeoutError, TimeoutError)):
        status, text = "timeout", "no complete answer in time"
    elif isinstance(error, APIStatusError):
        status = "rate_limited" if error.status_code == 429 else f"http_{error.status_code}"
        text = error.response.text or error.message
    elif isinstance(error, APIConnectionError):
        status, text = "connection", str(error.__cause__ or error)
    else:
        status, text = "malformed", f"not the JSON of an OpenAI-compatible endpoint: {error!r}"
    return Failure(status, " ".join(redact(text).split())[:300])  # cut later, so that no part of a key is left
