"""Which key goes to which endpoint: one that belongs to its host, over https or inside of this machine, or none.

OPENAI_API_KEY belongs to api.openai.com, to the address in OPENAI_BASE_URL, and to servers on this machine. The key of
any other server is in a variable that a flag names: `--endpoint_key_env`, `--judge_key_env`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from recipe.config import UserError
from recipe.evaluation.connection import DEFAULT_PORTS, is_address, is_loopback, origin_of, without_credentials
from recipe.keys import read_key

DEFAULT = "OPENAI_API_KEY"
OPENAI = ("https", "api.openai.com", 443)
FLAGS = "--endpoint_key_env or --judge_key_env"


def host_of(url: str) -> str:
    """The host of an address, with its port if that is not the usual one.

    >>> host_of("https://LLM.example.org:8443/v1"), host_of("https://llm.example.org:443/v1")
    ('llm.example.org:8443', 'llm.example.org')
    """
    scheme, host, port = origin_of(url)
    host = f"[{host}]" if ":" in host else host
    return host if port in (None, DEFAULT_PORTS.get(scheme)) else f"{host}:{port}"


def is_openais(url: str) -> bool:
    """Whether what OPENAI_* variables hold belongs to an address without being named for it: not on this machine."""
    return origin_of(url) in (OPENAI, _origin_of_base_url())


def variable_for(url: str, named: Sequence[str], urls: Sequence[str], flag: str) -> str | None:
    """The environment variable with the key of an endpoint, as a flag says: `NAME`, or `HOST=NAME` for several hosts.

    Example::

        urls = ["https://a.org/v1", "https://b.org:8000/v1"]
        variable_for(urls[0], ["a.org=A_KEY", "b.org:8000=B_KEY"], urls, "--endpoint_key_env")  # "A_KEY"

    Args:
        named: the words of the flag.
        urls: all endpoints that the flag is about.

    Raises:
        UserError: a word is not the name of a variable that is set, or it is not clear to which host its key belongs.
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
        if equals and not any(_names(host, each) for each in [url, *urls]):
            raise UserError(
                f"{flag} HOST={name}: no endpoint is on the host that was given, which is not shown, as it may be a "
                f"key; there are {' and '.join(hosts)}"
            )
        if not equals or _names(host, url):
            found = name
    return found


def endpoint_key(url: str, variable: str | None = None) -> str | None:
    """The key that is sent to an endpoint; None for none.

    Args:
        variable: that holds it, if a flag names one; default: OPENAI_API_KEY, where it belongs.

    Raises:
        UserError: it is not a key, see `read_key`, or would go over the network in clear; or whether the key of OpenAI
            belongs there cannot be told, because OPENAI_BASE_URL is not an address.
    """
    belongs = variable or is_openais(url) or is_loopback(url)
    if not belongs and os.environ.get(DEFAULT) and _origin_of_base_url() == ():
        raise UserError(
            f"OPENAI_BASE_URL={without_credentials(os.environ['OPENAI_BASE_URL'])}: not an address, so that it is not "
            f"clear whether {DEFAULT} belongs to {host_of(url)}; correct it or unset it"
        )
    key = read_key(variable or DEFAULT) if belongs else None
    if key and origin_of(url)[0] != "https" and not is_loopback(url):
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


def _origin_of_base_url() -> tuple[()] | tuple[str, str, int | None] | None:
    """Where OPENAI_BASE_URL leads; None if it is not set, and () if it cannot be read: then it leads nowhere."""
    own = os.environ.get("OPENAI_BASE_URL")
    try:
        return origin_of(own) if own else None
    except ValueError:
        return ()


def _names(host: str, url: str) -> bool:
    """Whether `HOST` or `HOST:PORT` is that of an address."""
    scheme, _, _ = origin_of(url)
    is_bare_ip = host.count(":") > 1 and not host.startswith("[")
    address = f"{scheme}://[{host}]" if is_bare_ip else f"{scheme}://{host}"
    return "/" not in host and is_address(address) and origin_of(address) == origin_of(url)
