"""Proxies and certificates that the environment names: used, or refused in one line with the variable's name."""

import os

import pytest
from stub_endpoint import Say, serve_stub

from recipe.config import UserError
from recipe.evaluation.connection import is_loopback
from recipe.evaluation.endpoints import ask, parse_endpoint, preflight

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    monkeypatch.setattr("recipe.evaluation.endpoints.MAX_RETRIES", 0)
    for name in [name for name in os.environ if name.lower() in VARIABLES]:
        monkeypatch.delenv(name)


def answer_of(url: str) -> str:
    endpoint, request = parse_endpoint(f"{url}#m"), {"messages": [{"role": "user", "content": "Hello."}]}
    [reply] = ask(endpoint, [preflight(endpoint, request, timeout=20).fit(request)])
    return reply.text


@pytest.mark.parametrize(
    "variable, value",
    [
        ("ALL_PROXY", "socks5h://127.0.0.1:9"),
        ("all_proxy", "socks4://127.0.0.1:9"),
        ("http_proxy", "http://127.0.0.1:9"),
        ("HTTPS_PROXY", "nonsense://x"),
    ],
)
def test_a_server_on_this_machine_is_asked_directly(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with serve_stub({"": [Say("85")]}) as stub:
        assert answer_of(stub.url) == "85"


@pytest.mark.parametrize(
    "variable, value, words",
    [
        ("ALL_PROXY", "socks5://me:secret@127.0.0.1:9", "the proxy of ALL_PROXY=socks5://***@127.0.0.1:9 cannot be"),
        ("all_proxy", "socks://127.0.0.1:9", "the proxy of all_proxy=socks://127.0.0.1:9 cannot be used"),
        ("https_proxy", "nonsense://127.0.0.1:9", "the proxy of https_proxy=nonsense://127.0.0.1:9 cannot be used"),
        ("http_proxy", "http://127.0.0.1:9", "it is asked through the proxy of http_proxy, http://127.0.0.1:9"),
        ("ALL_PROXY", "http://127.0.0.1:9", "it is asked through the proxy of ALL_PROXY, http://127.0.0.1:9"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "SSL_CERT_FILE names /nowhere/ca.pem, which is not there"),
        ("SSL_CERT_DIR", "/nowhere/certs", "SSL_CERT_DIR names /nowhere/certs, which is not there"),
        ("SSL_CERT_FILE", os.path.abspath(__file__), "which holds no certificates"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_in_one_line(variable, value, words, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as refused:
        answer_of("http://judge.invalid/v1")
    line = str(refused.value)
    assert words in line and variable in line and "\n" not in line
    assert "secret" not in line and "is the path right" not in line


def test_a_proxy_that_works_is_used(monkeypatch):
    with serve_stub({"": [Say("through the proxy")]}) as stub:
        monkeypatch.setenv("http_proxy", stub.url.removesuffix("/v1"))
        assert answer_of("http://judge.invalid/v1") == "through the proxy"
        assert len(stub.bodies) == 2


def test_which_addresses_are_of_this_machine():
    mine = [
        "http://localhost:80/v1",
        "http://127.9.9.9/v1",
        "https://[::1]:8/v1",
        "http://a.localhost/v1",
        "http://0.0.0.0",
    ]
    others = [
        "http://example.org/v1",
        "http://10.0.0.1/v1",
        "http://localhost.example.org/v1",
        "http://127.0.0.1.org/v1",
    ]
    assert all(map(is_loopback, mine)) and not any(map(is_loopback, others))
