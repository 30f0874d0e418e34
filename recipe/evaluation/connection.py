"""The connection to an endpoint: which proxy and certificates the environment names, and what is wrong with them."""

from __future__ import annotations

import ipaddress
import os
import ssl
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from recipe.config import UserError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

PROXIES = ("http_proxy", "https_proxy", "all_proxy")  # in lower or upper case
CERTIFICATES = {"SSL_CERT_FILE": Path.is_file, "SSL_CERT_DIR": Path.is_dir}


# all that a request needs; the client adds what OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS hold
HEADERS = (
    "host", "accept", "accept-encoding", "connection", "content-type", "content-length", "transfer-encoding",
    "user-agent", "authorization", "proxy-authorization",
)  # fmt: skip


def open_client(url: str, key: str, timeout: float, retries: int, all_headers: bool = False) -> AsyncOpenAI:
    """A client for an endpoint; one on this machine is asked directly, as no proxy reaches it.

    What the OPENAI_* variables hold goes along with `all_headers` only. A redirect to another place is followed
    without the key.

    Raises:
        UserError: a variable names certificates that are not there, or a proxy that cannot be used.
    """
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    # the client reads the variables of proxies and of certificates together, or neither
    certificates = _certificates()
    origin = urlsplit(url)[:2]

    async def only_what_belongs_there(request: Any) -> None:
        moved = urlsplit(str(request.url))[:2] != origin
        for name in list(request.headers):
            is_needed = name.startswith("x-stainless-") or name in HEADERS  # the former are the client's own notes
            if (moved and name == "authorization") or ((moved or not all_headers) and not is_needed):
                del request.headers[name]

    try:
        hooks = {"request": [only_what_belongs_there]}
        client = DefaultAsyncHttpxClient(trust_env=not is_loopback(url), verify=certificates, event_hooks=hooks)
    except (ImportError, ValueError) as error:
        raise UserError(_unusable_proxy(error)) from error
    return AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries, http_client=client)


def _certificates() -> ssl.SSLContext | bool:
    """The certificates that the environment names, or True: those of the client."""
    for name, exists in CERTIFICATES.items():
        path = os.environ.get(name)
        if not path:
            continue
        advice = "correct the environment variable or unset it"
        if not exists(Path(path)):
            raise UserError(f"{name} names {path}, which is not there: {advice}")
        try:
            is_file = name == "SSL_CERT_FILE"
            return ssl.create_default_context(cafile=path if is_file else None, capath=None if is_file else path)
        except (ssl.SSLError, OSError) as error:
            raise UserError(f"{name} names {path}, which holds no certificates ({error}): {advice}") from error
    return True


def is_loopback(url: str) -> bool:
    """Whether an address is of this machine.

    >>> is_loopback("http://127.0.0.1:8000/v1"), is_loopback("http://[::1]/v1"), is_loopback("http://example.org/v1")
    (True, True, False)
    """
    host = (urlsplit(url).hostname or "").rstrip(".")
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def proxy_advice(url: str) -> str | None:
    """Which variable names the proxy that an address is asked through, and what to do; None without one."""
    parts = urlsplit(url)
    if is_loopback(url) or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxies = urllib.request.getproxies()
    scheme = parts.scheme if parts.scheme in proxies else "all"
    if scheme not in proxies:
        return None
    names = [name for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY") if os.environ.get(name)]
    name, shown = names[0] if names else "the system", _without_password(proxies[scheme])
    return f"it is asked through the proxy of {name}, {shown}: is that right? If not, unset it or set NO_PROXY"


def _unusable_proxy(error: Exception) -> str:
    """A proxy that the client does not know how to use, with the variable that names it."""
    variables = {name: value for name, value in os.environ.items() if name.lower() in PROXIES and value}
    unusual = {name: value for name, value in variables.items() if not value.startswith(("http://", "https://"))}
    named = ", ".join(f"{name}={_without_password(value)}" for name, value in (unusual or variables).items())
    words = " ".join(str(error).split())
    return f"the proxy of {named} cannot be used ({words}): unset the variable, or install what it needs (httpx[socks])"


def certificate_advice(error: str) -> str | None:
    """The variable that may be the cause of an error about certificates, None if it is about something else."""
    names = [name for name in CERTIFICATES if os.environ.get(name)]
    if "CERTIFICATE_VERIFY_FAILED" not in error or not names:
        return None
    return f"{names[0]} is {os.environ[names[0]]}: does it hold the certificate of this server?"


def _without_password(proxy: str) -> str:
    head, separator, host = proxy.rpartition("@")
    return f"{head.partition('//')[0]}//***@{host}" if separator else proxy
