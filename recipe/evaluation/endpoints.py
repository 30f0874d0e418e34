"""OpenAI-compatible endpoints (vLLM, Ollama, `transformers serve`, ...): chat completions, each with an outcome.

An endpoint is written `http://host:port/v1#model`; without `#model`, the only model it lists is meant. The key is read
from the environment variable OPENAI_API_KEY and never written.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from recipe.config import UserError

if TYPE_CHECKING:  # elsewhere it is imported where it is used: it takes 0.8 s, and most runs ask no endpoint
    from openai import AsyncOpenAI

    from recipe.generation import Decoding

Result = TypeVar("Result")

GIVE_UP_AFTER = 10  # requests that fail one after another for the endpoint's sake, before the rest is not asked
USAGE = ("prompt_tokens", "completion_tokens")
LONGEST_PAUSE = 120  # seconds; up to this the client does as a Retry-After header says


@dataclass(frozen=True)
class Endpoint:
    """Where to ask which model; `url` and the text form are without credentials.

    >>> str(parse_endpoint("http://me:secret@localhost:8000/v1#llama3"))
    'http://localhost:8000/v1#llama3'
    """

    url: str
    model: str | None
    base_url: str = field(repr=False)

    def __str__(self) -> str:
        return self.url if self.model is None else f"{self.url}#{self.model}"


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

    `status` is `timeout`, `connection` (down, or cut off half-way), `rate_limited`, `http_NNN`, `malformed` (not a
    chat completion) or `not_asked` (the endpoint had failed too often before).
    """

    status: str
    error: str


def is_endpoint(name: str) -> bool:
    """Whether a model's name is the address of an endpoint."""
    return name.startswith(("http://", "https://"))


def parse_endpoint(name: str) -> Endpoint:
    """Read `http://host:port/v1#model`; nothing is asked yet.

    Raises:
        UserError: not such an address.
    """
    try:
        parts = urlsplit(name)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError as error:
        raise UserError(f"endpoint: {error}; write http://host:port/v1#model") from error
    host = parts.hostname or ""
    if not is_endpoint(name) or not re.fullmatch(r"[\w.:-]+", host) or re.search(r"[^!-~]", parts.path):
        raise UserError(f"{_bare(name)!r} is not an endpoint; write http://host:port/v1#model")
    if parts.query:
        raise UserError(f"endpoint {_bare(name)!r}: leave out what follows the '?'; the key goes into OPENAI_API_KEY")
    host = f"[{host}]" if ":" in host else host
    url = f"{parts.scheme}://{host}{port}{parts.path}".rstrip("/")
    credentials = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    return Endpoint(url, parts.fragment or None, url.replace("://", f"://{credentials}", 1))


def resolve_model(endpoint: Endpoint, timeout: float = 60.0, max_retries: int = 3) -> Endpoint:
    """The endpoint with its model: the one named, or the only one it lists.

    Raises:
        UserError: none is named, and the endpoint lists none or several, or does not answer.
    """
    if endpoint.model is not None:
        return endpoint

    async def list_models() -> list[str] | Failure:
        async with _client(endpoint, timeout, max_retries) as client:

            async def read_names() -> list[str]:
                listed = json.loads((await client.models.with_raw_response.list()).content)
                return [str(model["id"]) for model in listed["data"]]

            return await _attempt(read_names, endpoint, timeout)

    names = asyncio.run(list_models())
    if isinstance(names, Failure):
        raise UserError(_unusable(endpoint, names))
    if len(names) != 1:
        shown = ", ".join(names[:20]) or "none"
        raise UserError(f"endpoint {endpoint}: name the model, {endpoint.url}#MODEL; it lists {shown}")
    return replace(endpoint, model=names[0])


def preflight(
    endpoint: Endpoint, requests: Sequence[Mapping[str, Any]], timeout: float = 300.0, max_retries: int = 3
) -> Mapping[str, Any]:
    """Wait until the endpoint answers, as a model that loads may take minutes, and say which request it takes.

    Args:
        requests: forms of one request; the next is tried where the endpoint refuses one as such (HTTP 400 or 422).
        timeout: seconds for each, retries included.

    Raises:
        UserError: the endpoint is down, wants another key, does not know the model, or takes none of the requests.
    """
    for index, request in enumerate(requests):
        options: dict[str, Any] = {"timeout": timeout, "max_retries": max_retries, "patience": timeout}
        [outcome] = ask(endpoint, [request], **options, description=f"Waiting for {endpoint}")
        if isinstance(outcome, Reply):
            return request
        if outcome.status not in ("http_400", "http_422") or index == len(requests) - 1:
            raise UserError(_unusable(endpoint, outcome))
    raise ValueError("no requests to try")


def ask(
    endpoint: Endpoint,
    requests: Sequence[Mapping[str, Any]],
    on_outcome: Callable[[int, Reply | Failure], None] | None = None,
    concurrency: int = 4,
    timeout: float = 60.0,
    max_retries: int = 3,
    patience: float | None = None,
    description: str | None = None,
) -> list[Reply | Failure]:
    """Ask for chat completions, a bounded number at once; the outcomes are in the order of the requests.

    Timeouts, lost connections and the HTTP statuses 408, 409, 429 and 5xx are tried again, after a growing, jittered
    pause or the one the server's Retry-After asks for. After 10 requests in a row that failed in spite of that (twice
    as many as may run at once, if that is more), the rest is not asked.

    Args:
        requests: arguments of a chat completion but for the model: `messages`, `temperature`, ...
        on_outcome: called with the index and the outcome of each request that was asked, as it ends.
        timeout: seconds without a byte from the server after which an attempt ends.
        patience: seconds for one request with its retries; default: what the retries and their pauses may add up to.
        description: label of a progress bar; None for no bar.

    Example::

        endpoint = resolve_model(parse_endpoint("http://localhost:11434/v1#llama3"))
        [reply] = ask(endpoint, [{"messages": [{"role": "user", "content": "Name a colour."}]}])
        reply.text, reply.finish_reason  # 'Blue.', 'stop'
    """
    if not requests:
        return []
    if patience is None:  # the client's timeout starts anew at each byte; a server that drips must end, too
        patience = (max_retries + 1) * timeout + max_retries * LONGEST_PAUSE
    model = endpoint.model or ""
    outcomes: list[Reply | Failure | None] = [None] * len(requests)
    in_a_row: list[Failure] = []

    async def ask_all(progress: tqdm) -> None:
        async with _client(endpoint, timeout, max_retries) as client:
            waiting = iter(range(len(requests)))

            async def work() -> None:
                for index in waiting:
                    if len(in_a_row) >= max(GIVE_UP_AFTER, 2 * concurrency):
                        last = in_a_row[-1]
                        error = f"{len(in_a_row)} requests in a row had failed, the last: {last.status}: {last.error}"
                        outcomes[index] = Failure("not_asked", error)
                        continue

                    async def complete(request: Mapping[str, Any] = requests[index]) -> Reply:
                        raw = await client.chat.completions.with_raw_response.create(**request, model=model)
                        return _read_completion(raw.content, raw.elapsed.total_seconds())

                    outcome = await _attempt(complete, endpoint, patience)
                    if isinstance(outcome, Failure) and _is_the_endpoints(outcome):
                        in_a_row.append(outcome)
                    else:
                        in_a_row.clear()
                    outcomes[index] = outcome
                    if on_outcome is not None:
                        on_outcome(index, outcome)
                    progress.update()

            await asyncio.gather(*(work() for _ in range(min(concurrency, len(requests)))))

    with tqdm(total=len(requests), desc=description, unit="request", disable=description is None) as progress:
        asyncio.run(ask_all(progress))
    return [outcome for outcome in outcomes if outcome is not None]


def generate_from_endpoint(
    endpoint: Endpoint,
    records: Iterable[Mapping[str, Any]],
    decoding: Decoding,
    on_answer: Callable[[int, dict[str, Any] | Failure], None] | None = None,
    concurrency: int = 4,
    timeout: float = 600.0,
    max_retries: int = 3,
    description: str | None = None,
) -> list[dict[str, Any] | Failure]:
    """The served model's answer to each record, by its own chat template, or why there is none.

    The input goes into the message below `### Input:`, since servers drop what a message holds beside its content: the
    Alpaca template then renders the prompt of training. An answer is what `predictions.jsonl` holds: `text`; `tokens`
    as the server counts them, often with the end-of-text token; `stop_reason`: `eos`, `length` or None for another;
    `seconds`.

    Raises:
        UserError: the endpoint does not answer at all.
    """
    sampling = {
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "seed": decoding.seed,
        "max_tokens": decoding.max_new_tokens,
    }
    requests = [{"messages": [_user_message(record)], **sampling} for record in records]
    answers: list[dict[str, Any] | Failure] = []
    if not requests:
        return answers
    warm_up = {**sampling, "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1}
    preflight(endpoint, [warm_up], max(300.0, timeout), max_retries)

    def hand_on(index: int, outcome: Reply | Failure) -> None:
        if on_answer is not None:
            on_answer(index, _as_answer(outcome))

    outcomes = ask(endpoint, requests, hand_on, concurrency, timeout, max_retries, description=description)
    return [_as_answer(outcome) for outcome in outcomes]


def _user_message(record: Mapping[str, Any]) -> dict[str, str]:
    """
    >>> _user_message({"instruction": "Make it plural.", "input": "cat"})
    {'role': 'user', 'content': 'Make it plural.\\n\\n### Input:\\ncat'}
    """
    content = record["instruction"] or ""
    if record.get("input"):
        content += f"\n\n### Input:\n{record['input']}"
    return {"role": "user", "content": writable(content)}


def _as_answer(outcome: Reply | Failure) -> dict[str, Any] | Failure:
    if isinstance(outcome, Failure):
        return outcome
    return {
        "text": outcome.text,
        "tokens": outcome.usage["completion_tokens"] if outcome.usage else None,
        "stop_reason": {"stop": "eos", "length": "length"}.get(outcome.finish_reason or ""),
        "seconds": outcome.seconds,
    }


def _client(endpoint: Endpoint, timeout: float, max_retries: int) -> AsyncOpenAI:
    from openai import AsyncOpenAI

    key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers want none, the client wants one
    return AsyncOpenAI(base_url=endpoint.base_url, api_key=key, timeout=timeout, max_retries=max_retries)


async def _attempt(
    request: Callable[[], Coroutine[Any, Any, Result]], endpoint: Endpoint, patience: float
) -> Result | Failure:
    """Run a request of the client to its end: every error of the network or of the server is a `Failure`."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

    started = time.monotonic()
    try:
        async with asyncio.timeout(patience):
            return await request()
    except (APITimeoutError, TimeoutError):
        status, error = "timeout", f"no whole answer in {time.monotonic() - started:.1f} s"
    except APIStatusError as raised:
        status = "rate_limited" if raised.status_code == 429 else f"http_{raised.status_code}"
        error = raised.response.text or raised.message
    except APIConnectionError as raised:
        status, error = "connection", str(raised.__cause__ or raised)
    except (OpenAIError, ValueError, LookupError, TypeError, RecursionError) as raised:
        status, error = "malformed", f"not the JSON of an OpenAI-compatible endpoint: {raised!r}"
    return Failure(status, _without_secrets(" ".join(error.split()), endpoint)[:300])


def _read_completion(content: bytes, seconds: float) -> Reply:
    """Raises ValueError, LookupError or TypeError on what is no chat completion."""
    completion = json.loads(content)
    choice = completion["choices"][0]
    text = choice["message"]["content"]
    if not isinstance(text, str | None):
        raise TypeError(f"the content is {type(text).__name__}, not text")
    usage = completion.get("usage")
    counts = (
        {name: usage[name] for name in USAGE if isinstance(usage.get(name), int)} if isinstance(usage, dict) else {}
    )
    return Reply(
        writable(text or ""),
        _text_or_none(choice.get("finish_reason")),
        _text_or_none(completion.get("model")),
        counts if len(counts) == len(USAGE) else None,
        seconds,
    )


def _text_or_none(value: Any) -> str | None:
    return writable(value) if isinstance(value, str) else None


def writable(text: str) -> str:
    """Without halves of surrogate pairs, which UTF-8 cannot hold.

    >>> writable("a \\ud83d b")
    'a ? b'
    """
    return text.encode("utf-8", "replace").decode()


def _is_the_endpoints(failure: Failure) -> bool:
    """Whether the next request will likely fail, too; one that is refused, as too long, says nothing of the next."""
    return failure.status in ("timeout", "connection", "rate_limited") or failure.status.startswith("http_5")


def _unusable(endpoint: Endpoint, failure: Failure) -> str:
    ways_out = {
        "connection": "is it running, and is the port right?",
        "timeout": "it may still be loading the model: try again, or give it more time",
        "rate_limited": "wait, or ask with less concurrency",
        "http_401": "set the environment variable OPENAI_API_KEY to its key",
        "http_403": "set the environment variable OPENAI_API_KEY to a key that may use this model",
        "http_404": "is the path right (most end in /v1), and does it know the model?",
        "malformed": "is the path right (most end in /v1)?",
    }
    way_out = ways_out.get(failure.status)
    return f"endpoint {endpoint}: {failure.status}: {failure.error}" + (f"; {way_out}" if way_out else "")


def _bare(name: str) -> str:
    """An address for a message: without what may be credentials."""
    return re.sub(r"//[^/]*@", "//", name.partition("?")[0])


def _without_secrets(text: str, endpoint: Endpoint) -> str:
    parts = urlsplit(endpoint.base_url)
    for secret in (os.environ.get("OPENAI_API_KEY"), parts.password):
        if secret:
            text = text.replace(secret, "***")
    return text
