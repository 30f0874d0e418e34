"""Which key goes to which endpoint: one that belongs to its host, over https or inside of this machine, or none.

OPENAI_API_KEY belongs to api.openai.com, to the address in OPENAI_BASE_URL, and to servers on this machine. The key of
any other server is in a variable that a flag names: `--endpoint_key_env`, `--judge_key_env`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from recipe.config import UserError
from recipe.evaluation.connection import is_loopback
from recipe.keys import read_key

DEFAULT = "OPENAI_API_KEY"
FLAGS = "--endpoint_key_env or --judge_key_env"


def host_of(url: str) -> str:
    """The host of an address, with its port if one is named.

    >>> host_of("https://LLM.example.org:8443/v1")
    'llm.example.org:8443'
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    port = parts.netloc.rpartition("]")[2].rpartition("@")[2].partition(":")[2]  # `parts.port` refuses odd ones
    return f"{host}:{port}" if port else host


def is_openais(url: str) -> bool:
    """Whether what OPENAI_* variables hold belongs to an address without being named for it: not on this machine."""
    own = os.environ.get("OPENAI_BASE_URL", "")
    at_openai = host_of(url) in ("api.openai.com", "api.openai.com:443") and url.startswith("https://")
    return at_openai or (bool(own) and _origin(url) == _origin(own))


def variable_for(
    url: str, named: Sequence[str], urls: Sequence[str] = (), flag: str = "--endpoint_key_env"
) -> str | None:
    """The environment variable with the key of an endpoint, as a flag says: `NAME`, or `HOST=NAME` for several hosts.

    >>> os.environ.update(A_KEY="the key of a.org", B_KEY="the key of b.org")
    >>> urls = ["https://a.org/v1", "https://b.org:8000/v1"]
    >>> variable_for(urls[0], ["a.org=A_KEY", "b.org:8000=B_KEY"], urls)
    'A_KEY'

    Args:
        named: the words of the flag.
        urls: all endpoints that the flag is about.

    Raises:
        UserError: a word is no name of a variable that is set, or it is not clear to which host its key belongs.
    """
    hosts = sorted({host_of(each) for each in [url, *urls]})
    found = None
    for word in named:
        host, equals, name = word.rpartition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name not in os.environ:
            raise UserError(
                f"{flag}: it takes the name of an environment variable that is set, such as JUDGE_API_KEY, and not the "
                "key itself; what was given is not shown, as it may be a key"
            )
        if not equals and len(hosts) > 1:
            raise UserError(
                f"{flag} {name}: there are endpoints on {' and '.join(hosts)}; say to which its key belongs, as in "
                f"{flag} {hosts[0]}={name}"
            )
        if equals and host.lower() not in hosts:
            raise UserError(f"{flag} {host}={name}: no endpoint is on {host}; there are {' and '.join(hosts)}")
        if not equals or host.lower() == host_of(url):
            found = name
    return found


def endpoint_key(url: str, variable: str | None = None) -> str | None:
    """The key that is sent to an endpoint; None for none.

    Args:
        variable: that holds it, if a flag names one; default: OPENAI_API_KEY, where it belongs.

    Raises:
        UserError: it is no key, see `read_key`, or would go over the network in clear.
    """
    key = read_key(variable or DEFAULT) if variable or is_openais(url) or is_loopback(url) else None
    if key and not url.startswith("https://") and not is_loopback(url):
        raise UserError(
            f"endpoint {url}: the key in {variable or DEFAULT} would go over the network unencrypted, for everybody on "
            "the way to read; write https://, or reach the server over an encrypted tunnel to localhost (ssh -L)"
        )
    return key


def key_advice(url: str, variable: str | None) -> str:
    """What to do if an endpoint wants a key, or another one."""
    if variable or is_openais(url) or is_loopback(url):
        return f"set the environment variable {variable or DEFAULT} to a key that may use this model"
    return (
        f"it wants a key: put it into an environment variable and name that with {FLAGS}; {DEFAULT} is not sent to "
        f"{host_of(url)}, as it belongs to api.openai.com"
    )


def _origin(url: str) -> tuple[str, str, str | None]:
    parts = urlsplit(url)
    port = host_of(url).rpartition("]")[2].partition(":")[2] or {"https": "443", "http": "80"}.get(parts.scheme)
    return parts.scheme, parts.hostname or "", port
