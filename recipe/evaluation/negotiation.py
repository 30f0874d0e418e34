"""Which fields of a request a server accepts: each that it refuses is changed or left out.

Servers refuse `max_tokens` for `max_completion_tokens`, do not know `seed`, allow no temperature of 0, or enforce no
JSON schema; and they say so with the statuses 400, 404, 422, 500 or 501, with the field's name or without, or with any
other status, 200 included, and in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_TRIES = 24  # requests to one endpoint
RENAMED, AS_OBJECT, WITHOUT_FORMAT = "max_completion_tokens", "json_object", "no response_format"
# by change: the words of an error that ask for it
WORDS = {
    RENAMED: r"max_tokens|max_completion_tokens",
    "seed": r"seed",
    "temperature": r"temperature",
    "top_p": r"top_?p",
    AS_OBJECT: r"response_?format|json_?schema|structured outputs?",
    WITHOUT_FORMAT: r"response_?format|json_?schema|json_?object|structured outputs?|json mode",
}

PARAMETER_WORDS = re.compile(
    r"(unsupported|unknown|unrecogni[sz]ed|unexpected|invalid|extra|disallowed|not permitted|not supported|"
    r"does not support).{0,30}(parameter|argument|field|propert|inputs)|"
    r"(parameter|argument|field|propert|inputs).{0,40}"
    r"(unsupported|unknown|unrecogni[sz]ed|unexpected|invalid|prohibited|disallowed|forbidden|"
    r"not (permitted|supported|allowed|implemented|known))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Terms:
    """What to change in each request so that an endpoint accepts it: names of `WORDS`, in their order."""

    changes: tuple[str, ...] = ()

    @property
    def left_out(self) -> list[str]:
        """Fields of sampling that are not sent. Without `temperature`, a response may not be the most likely one."""
        return [change for change in self.changes if change in ("seed", "temperature", "top_p")]

    def fit(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request as the endpoint accepts it.

        >>> Terms(("max_completion_tokens", "seed")).fit({"messages": [], "seed": 1, "max_tokens": 9})
        {'messages': [], 'max_completion_tokens': 9}
        """
        fitted = {name: value for name, value in request.items() if name not in self.left_out}
        if RENAMED in self.changes and "max_tokens" in fitted:
            fitted[RENAMED] = fitted.pop("max_tokens")
        if "response_format" in fitted and WITHOUT_FORMAT in self.changes:
            del fitted["response_format"]
        elif "response_format" in fitted and AS_OBJECT in self.changes:
            fitted["response_format"] = {"type": "json_object"}
            # servers want the word in the messages, and without it no model would write an object
            if "json" not in str(fitted["messages"]).lower():
                del fitted["response_format"]
        return fitted

    def with_change(self, *changes: str) -> Terms:
        return Terms(tuple(name for name in WORDS if name in (*self.changes, *changes)))

    def without(self, change: str) -> Terms:
        return Terms(tuple(name for name in self.changes if name != change))


def names_field(request: Mapping[str, Any], error: str) -> bool:
    """Whether an error speaks of a field of the request that can be changed, or of some field that it does not take.

    >>> names_field({"messages": [], "seed": 1}, "Unsupported parameter: seed"), names_field({"messages": []}, "Busy.")
    (True, False)
    """
    return PARAMETER_WORDS.search(error) is not None or _named_change(request, Terms(), error) is not None


def speaks_of_field(error: str) -> bool:
    """`names_field` for any request.

    >>> speaks_of_field("'seed' is not allowed"), speaks_of_field("Your prompt is not allowed.")
    (True, False)
    """
    return PARAMETER_WORDS.search(error) is not None or any(_place(change, error) is not None for change in WORDS)


def negotiate(
    request: Mapping[str, Any], start: Terms, refusal: str, send: Callable[[Mapping[str, Any]], str | None]
) -> Terms | None:
    """The terms on which an endpoint accepts a request, None if it accepts it on none.

    A field that the error names is changed first; else single changes are tried, then all together, of which those
    that are not needed are taken back.

    Args:
        start: terms on which it refused the request.
        refusal: the words of this refusal.
        send: sends a request; returns None if it is accepted, else the words of the refusal.
    """
    tries = 0

    def error_of(terms: Terms) -> str | None:
        nonlocal tries
        tries += 1
        return send(terms.fit(request)) if tries <= MOST_TRIES else refusal

    terms, doubtful = start, set[str]()
    error: str | None = refusal
    while error is not None:
        change = _named_change(request, terms, error)
        if change is None:
            break
        terms, before = terms.with_change(change), error
        error = error_of(terms)
        if error == before:  # it says so whatever is changed
            doubtful.add(change)
    if error is not None:
        found = _search(request, start, terms, error_of)
        if found is None:
            return None
        terms, doubtful = found
    if WITHOUT_FORMAT in terms.changes:
        doubtful.discard(AS_OBJECT)  # has no effect any more
    for change in sorted(doubtful, key=list(WORDS).index) if len(terms.changes) > 1 else ():
        if error_of(terms.without(change)) is None:
            terms = terms.without(change)
    return terms


def _search(
    request: Mapping[str, Any], start: Terms, named: Terms, error_of: Callable[[Terms], str | None]
) -> tuple[Terms, set[str]] | None:
    """Terms that are accepted, and which of their changes may not be needed."""
    for base in dict.fromkeys((start, named)):
        for change in _open_changes(request, base):
            if error_of(base.with_change(change)) is None:
                return base.with_change(change), set(base.changes) - set(start.changes)
    every = start.with_change(*_open_changes(request, start))
    for terms in (every, every.without(RENAMED)):
        if terms != start and error_of(terms) is None:
            weaker = terms.without(WITHOUT_FORMAT)
            if WITHOUT_FORMAT in terms.changes and AS_OBJECT in terms.changes and error_of(weaker) is None:
                terms = weaker
            return terms, set(terms.changes) - set(start.changes)
    return None


def _open_changes(request: Mapping[str, Any], terms: Terms) -> list[str]:
    """The changes that would still change what is sent."""
    sent = terms.fit(request)
    return [change for change in WORDS if terms.with_change(change).fit(request) != sent]


def _named_change(request: Mapping[str, Any], terms: Terms, error: str) -> str | None:
    """The change of the field that an error names first."""
    found = {}
    for change in _open_changes(request, terms):
        place = _place(change, error)
        if place is not None:
            found[change] = place
    return min(found, key=lambda change: found[change]) if found else None


def _place(change: str, error: str) -> int | None:
    """Where an error names the field of a change."""
    match = re.search(rf"(?<![a-z])(?:{WORDS[change]})(?![a-z])", error, re.IGNORECASE)
    return match.start() if match else None
