"""The connection to an endpoint: which proxy and certificates the environment names, and what is wrong with them."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from recipe.config import UserError
from recipe.console import one_line, quoted

if TYPE_CHECKING:
    from openai import AsyncOpenAI

PROXIES = ("http", "https", "all")  # of which addresses; each has a variable in lower or upper case
CERTIFICATES = {"SSL_CERT_FILE": "a file", "SSL_CERT_DIR": "a folder"}
HIGHEST_PORT = 65535
DEFAULT_PORTS = {"http": 80, "https": 443}
ADDRESS = re.compile(r"https?://([\w.-]+|\[[\w:.]+\])(:\d+)?(/[!->@-~]*)?", re.ASCII | re.IGNORECASE)
LAST_AT = re.compile(r".*(?:@|%(?:25)*40)", re.DOTALL)  # what ends a user and a password, also with escapes
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PORT = re.compile("[0-9]{1,5}")
# an address and a model; an @ in the latter ends no password, as there is nothing before it but a host and a path
WITH_MODEL = re.compile(
    r"((?:https?://)?(?:\[[^\]@/?#%]*\]?(?::[0-9]{1,5})?(?:/[^@?#%]*)?|"
    r"[^:@/?#%\[]*(?::[0-9]{1,5}(?:/[^@?#%]*)?|/[^@?#%]*)))(#[^?]*)",
    re.ASCII | re.IGNORECASE | re.DOTALL,
)


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
        UserError: a variable names certificates that are not there, or a proxy that cannot be used; or `url` is not an
            address.
    """
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    certificates, origin = _certificates(), origin_of(url)

    async def only_what_belongs_there(request: Any) -> None:
        moved = origin_of(str(request.url)) != origin
        for name in list(request.headers):
            is_needed = name.startswith("x-stainless-") or name in HEADERS  # the former are the client's own notes
            if (moved and name == "authorization") or ((moved or not all_headers) and not is_needed):
                del request.headers[name]

    hooks = {"request": [only_what_belongs_there]}
    # every exception is caught: the client raises InvalidURL, which has no base class but Exception
    try:
        client = DefaultAsyncHttpxClient(verify=certificates, event_hooks=hooks, **_way_to(url))
    except Exception as error:
        names = sorted(name for name in os.environ if name.lower() in ("no_proxy", *(f"{s}_proxy" for s in PROXIES)))
        named = ", ".join(f"{name}={without_credentials(os.environ[name])}" for name in names)
        raise UserError(f"{named}: cannot be used ({quoted(str(error))}); correct what is wrong or unset it") from error
    try:
        return AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries, http_client=client)
    except Exception as error:
        raise UserError(
            f"endpoint {one_line(url)}: not an address that can be asked ({quoted(str(error))}); correct it"
        ) from error


def _certificates() -> ssl.SSLContext | bool:
    """The certificates that the environment names, or True: those of the client."""
    advice = "correct the environment variable or unset it"
    if log := os.environ.get("SSLKEYLOGFILE"):  # every context writes its keys there
        try:
            open(log, "ab").close()
        except (OSError, ValueError) as error:
            named = f"SSLKEYLOGFILE names {one_line(log)}, which"
            raise UserError(f"{named} cannot be written ({quoted(str(error))}): {advice}") from error
    for name, kind in CERTIFICATES.items():
        path = os.environ.get(name)
        if not path:
            continue
        is_file, named = name == "SSL_CERT_FILE", f"{name} names {one_line(path)}, which"
        try:
            if not os.path.exists(path):
                raise UserError(f"{named} is not there: {advice}")
            if not (os.path.isfile(path) if is_file else os.path.isdir(path)):
                raise UserError(f"{named} is not {kind}: {advice}")
            if not is_file:
                os.listdir(path)  # it is looked into only when a server is asked: one that cannot be read holds nothing
            return ssl.create_default_context(cafile=path if is_file else None, capath=None if is_file else path)
        except (ssl.SSLError, ValueError) as error:
            raise UserError(f"{named} holds no certificates ({quoted(str(error))}): {advice}") from error
        except OSError as error:
            raise UserError(f"{named} cannot be read ({quoted(str(error))}): {advice}") from error
    return True


def is_address(url: str) -> bool:
    """Whether an address can be asked: `http://host:port/path`, without user, password and query.

    >>> is_address("http://localhost:8000/v1"), is_address("http://localhost:99999/v1"), is_address("http://me@host")
    (True, False, False)
    """
    try:
        parts = urlsplit(url)
        if "[" in parts.netloc:
            ipaddress.IPv6Address(parts.hostname or "")
        return ADDRESS.fullmatch(url) is not None and parts.port != 0  # raises above the highest
    except ValueError:
        return False


def origin_of(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an address, the same for each way to spell them.

    >>> origin_of("HTTPS://API.openai.com./v1") == origin_of("https://api.openai.com:0443") == (
    ...     "https", "api.openai.com", 443)
    True

    Raises:
        ValueError: it is not an address.
    """
    parts = urlsplit(url)
    host, port = (parts.hostname or "").rstrip("."), parts.port
    return parts.scheme, _shortest_ip(host), DEFAULT_PORTS.get(parts.scheme) if port is None else port


def in_one_spelling(url: str) -> str:
    """An address as the client sends it: scheme and host in lower case, no port where it is the usual one.

    >>> in_one_spelling("HTTP://LOCALHOST:08000/V1"), in_one_spelling("https://[0:0::1]:443")
    ('http://localhost:8000/V1', 'https://[::1]')

    Raises:
        ValueError: it is not an address.
    """
    parts = urlsplit(url)
    host, is_usual = _shortest_ip(parts.hostname or ""), parts.port in (None, DEFAULT_PORTS.get(parts.scheme))
    port = "" if is_usual else f":{parts.port}"
    return parts._replace(netloc=f"{f'[{host}]' if ':' in host else host}{port}").geturl()


def _shortest_ip(host: str) -> str:
    """A host, an IPv6 address without the zeros that may be left out."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def is_loopback(url: str) -> bool:
    """Whether an address is of this machine.

    >>> is_loopback("http://127.0.0.1:8000/v1"), is_loopback("http://[::1]/v1"), is_loopback("http://example.org/v1")
    (True, True, False)
    """
    _, host, _ = origin_of(url)
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _is_direct(url: str) -> bool:
    """Whether an address is asked without a proxy: it is of this machine, or NO_PROXY names it.

    NO_PROXY holds hosts, with a port or without, and with a scheme or without.
    """
    scheme, host, port = origin_of(url)
    hosts = [host, f"[{host}]", f"[{host}]:{port}"] if ":" in host else [host, f"{host}:{port}"]
    named = [*hosts, *(f"{scheme}://{each}" for each in hosts)]
    is_for_all = "*" in re.split(r"[\s,]+", urllib.request.getproxies().get("no", ""))
    return is_loopback(url) or is_for_all or any(urllib.request.proxy_bypass(each) for each in named)


def _proxy_of(url: str) -> tuple[str, str] | None:
    """The proxy that an address is asked through: what names it, and its address; None without one."""
    proxies = {} if _is_direct(url) else _proxies()
    return proxies.get(origin_of(url)[0]) or proxies.get("all")


def proxy_advice(url: str) -> str | None:
    """Which variable names the proxy that an address is asked through, and what to do; None without one."""
    if (proxy := _proxy_of(url)) is None:
        return None
    name, address = proxy
    shown = without_credentials(address)
    return f"it is asked through the proxy of {name}, {shown}: is that right? If not, unset it or set NO_PROXY"


def certificate_advice(error: str) -> str | None:
    """The variable that may be the cause of an error about certificates, None if it is about something else."""
    names = [name for name in CERTIFICATES if os.environ.get(name)]
    if "CERTIFICATE_VERIFY_FAILED" not in error or not names:
        return None
    return f"{names[0]} is {one_line(os.environ[names[0]])}: does it hold the certificate of this server?"


def without_credentials(address: str) -> str:
    """An address as a message may show it: without user, password and query, also where it is not a proper one.

    If the text after the colon is not a port number, it may be a password whose host was forgotten.

    >>> [without_credentials(text) for text in ("me:secret@host:80", "socks5h://key@host", "http://me:secret")]
    ['***@host:80', 'socks5h://***@host', 'http://me:***']
    """
    scheme = SCHEME.match(address)
    rest = address[scheme.end() :] if scheme else address
    before = LAST_AT.match(rest)
    rest = rest[before.end() :] if before else rest
    rest = rest.partition("?")[0]
    host, path = re.fullmatch(r"([^/\\#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr] # fits all
    port = _port_in(host)
    if port and not PORT.fullmatch(port):
        host, path = f"{host.removesuffix(port)}***", ""
    return one_line(f"{scheme[0] if scheme else ''}{'***@' if before else ''}{host}{path}")


def endpoint_without_credentials(name: str) -> str:
    """`without_credentials` for an address and a model, `http://host:port/v1#model`; the model may hold an @.

    >>> [endpoint_without_credentials(f"http://{text}/v1#llama@q4") for text in ("host:99999", "me:secret@host")]
    ['http://host:99999/v1#llama@q4', 'http://***@q4']
    """
    parts = WITH_MODEL.fullmatch(name.partition("?")[0])
    return without_credentials(parts[1]) + one_line(parts[2]) if parts else without_credentials(name)


def _port_in(host: str) -> str:
    """The text after the colon of a host; empty if there is none."""
    found = re.search(r":([^:\]]*)\Z", host)
    return found[1] if found else ""


def _proxies() -> dict[str, tuple[str, str]]:
    """The proxies of the environment or the system, by scheme: what names it, and its address."""
    found = urllib.request.getproxies()
    named = {}
    for scheme in PROXIES:
        if found.get(scheme):
            # the variable in lower case comes first, as for the client
            names = sorted((name for name in os.environ if name.lower() == f"{scheme}_proxy"), reverse=True)
            name = next((name for name in names if os.environ[name] == found[scheme]), "the system")
            named[scheme] = name, found[scheme]
    return named


def _way_to(url: str) -> dict[str, Any]:
    """Arguments of a client: that it reads the proxies of the environment, or which of them it uses.

    Raises:
        UserError: the proxy that an address is asked through cannot be used; it is shown without user and password.
    """
    proxy = _proxy_of(url)
    if proxy and (problem := _problem_of_proxy(proxy[1])):
        raise UserError(f"the proxy of {proxy[0]}={without_credentials(proxy[1])} cannot be used {problem}")
    # the client reads all proxies, or none: one that cannot be used is no fault where another scheme's is asked
    if _is_direct(url) or any(_problem_of_proxy(address) for _, address in _proxies().values()):
        return {"trust_env": False, "proxy": _with_scheme(proxy[1]) if proxy else None}
    return {"trust_env": True}


def _problem_of_proxy(address: str) -> str | None:
    """Why a proxy cannot be used, and what to do about it; None if it can be."""
    from openai import DefaultAsyncHttpxClient

    full, advice = _with_scheme(address), "correct it or unset it"
    try:
        parts = urlsplit(full)
        port = _port_in(parts.netloc.rpartition("@")[2])
        if not parts.hostname or re.search(r"\s", parts.hostname):
            problem = "it names no host"
        elif port and not (PORT.fullmatch(port) and 0 < int(port) <= HIGHEST_PORT):
            problem = f"its port is not a number from 1 to {HIGHEST_PORT}"
        else:
            DefaultAsyncHttpxClient(trust_env=False, proxy=full)
            return None
    except ImportError as error:
        problem, advice = quoted(str(error)), "unset it, or install what it needs (httpx[socks])"
    except Exception as error:  # the client's InvalidURL has no other base class
        # the words of an error may quote the password
        problem = "it is not the address of a proxy" if LAST_AT.match(address) else quoted(str(error))
    return f"({problem}): {advice}"


def _with_scheme(proxy: str) -> str:
    return proxy if "://" in proxy else f"http://{proxy}"
