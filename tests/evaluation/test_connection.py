"""Proxies and certificates that the environment names: used, or refused in one line with the variable's name."""

import json
import os
import re

import pytest
from stub_endpoint import Say, serve_stub

from recipe.config import UserError
from recipe.evaluation.connection import is_loopback, proxy_advice, without_credentials
from recipe.evaluation.endpoints import ask, parse_endpoint, preflight
from recipe.evaluation.judge.run import JudgeArguments, run_judge
from recipe.redaction import redact

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir", "sslkeylogfile")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, no_retries):
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
        ("http_proxy", "nonsense://127.0.0.1:9", "the proxy of http_proxy=nonsense://127.0.0.1:9 cannot be used"),
        ("http_proxy", "http://127.0.0.1:9", "it is asked through the proxy of http_proxy, http://127.0.0.1:9"),
        ("ALL_PROXY", "http://127.0.0.1:9", "it is asked through the proxy of ALL_PROXY, http://127.0.0.1:9"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "SSL_CERT_FILE names /nowhere/ca.pem, which is not there"),
        ("SSL_CERT_DIR", "/nowhere/certs", "SSL_CERT_DIR names /nowhere/certs, which is not there"),
        ("SSL_CERT_FILE", os.path.abspath(__file__), "which holds no certificates"),
        ("SSL_CERT_FILE", os.path.dirname(__file__), "which is not a file"),
        ("SSL_CERT_FILE", "/nowhere/a\nb", r"SSL_CERT_FILE names /nowhere/a\nb, which is not there"),
        ("http_proxy", "http://a\nb:80", "the proxy of http_proxy"),
        ("SSL_CERT_FILE", os.devnull, "which is not a file"),
        ("SSL_CERT_FILE", "/" + "a" * 5000, "which is not there"),
        ("SSL_CERT_DIR", os.path.abspath(__file__), "which is not a folder"),
        ("SSLKEYLOGFILE", "/nowhere/keys", "SSLKEYLOGFILE names /nowhere/keys, which cannot be written"),
        ("http_proxy", "http://127.0.0.1:notaport", "its port is not a number"),
        ("HTTP_PROXY", "127.0.0.1:99999", "its port is not a number"),
        ("all_proxy", "socks5h://127.0.0.1:-1", "its port is not a number"),
        ("http_proxy", "http://[::1", "the proxy of http_proxy="),
        ("http_proxy", "   ", "it names no host"),
        ("http_proxy", "http://", "it names no host"),
        ("HTTP_PROXY", "://", "the proxy of HTTP_PROXY=:// cannot be used"),
        ("all_proxy", "http://a b:80", "it names no host"),
        ("ALL_PROXY", "http://a\x01b:80", "the proxy of ALL_PROXY="),
        ("http_proxy", "http://" + "a." * 40_000, "the proxy of http_proxy="),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_in_one_line(variable, value, words, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as refused:
        answer_of("http://judge.invalid/v1")
    line = str(refused.value)
    assert line.isprintable() and len(line) < 900
    assert words in line and variable in line and "\n" not in line
    assert "secret" not in line and "is the path right" not in line


PASSWORD = "S3cretPw"
SPELLINGS = {
    "no scheme": f"user:{PASSWORD}@127.0.0.1:9",
    "a key alone": f"http://{PASSWORD}@127.0.0.1:9",
    "a key alone, no scheme": f"{PASSWORD}@127.0.0.1:9",
    "socks5h": f"socks5h://user:{PASSWORD}@127.0.0.1:9",
    "scheme in capitals": f"HTTP://user:{PASSWORD}@127.0.0.1:9",
    "encoded": "http://user:%53%33cret%50w@127.0.0.1:9",
    "encoded signs": f"user%3A{PASSWORD}%40127.0.0.1:9",
    "encoded twice": f"http://user%253A{PASSWORD}%2540127.0.0.1:9",
    "two @": f"http://user:{PASSWORD}@{PASSWORD}@127.0.0.1:9",
    "a slash": f"http://user:{PASSWORD}/{PASSWORD}@127.0.0.1:9",
    "a hash": f"user:{PASSWORD}#{PASSWORD}@127.0.0.1:9",
    "a bad port": f"user:{PASSWORD}@127.0.0.1:none",
    "no slashes": f"http:user:{PASSWORD}@127.0.0.1:9",
    "no host": f"http://user:{PASSWORD}",
    "no host, no scheme": f"user:{PASSWORD}@",
    "in the query": f"http://127.0.0.1:9?password={PASSWORD}",
}


def is_in(text: str) -> bool:
    """Whether a text holds the password; "%53" is "S"."""
    plain = re.sub("%(?:25)*([0-9A-Fa-f]{2})", lambda code: chr(int(code[1], 16)), text)
    return PASSWORD in plain


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_spelling_of_a_password_is_shown(spelling, variable, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, SPELLINGS[spelling])
    assert is_in(SPELLINGS[spelling])
    prediction = {"id": "test/0", "split": "test", "instruction": "Hi.", "input": "", "output": "Hi."}
    args = JudgeArguments(judge="http://judge.invalid/v1#m", judge_warmup_timeout=20)
    result = run_judge([{**prediction, "tuned": {"text": "Ho."}}], args, tmp_path)
    assert variable in result["error"] and "Traceback" not in result["error"]
    assert not is_in(json.dumps(result)) and not is_in((tmp_path / "judge.jsonl").read_text(encoding="utf-8"))


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "in the query"])
def test_a_password_of_a_proxy_is_taken_out_of_every_text(spelling, monkeypatch):
    value = SPELLINGS[spelling]
    monkeypatch.setenv("https_proxy", value)
    alone = [f"Proxy-Authorization: {PASSWORD}", f"user:{PASSWORD}@host"] if value.count(PASSWORD) == 1 else []
    for text in (f"asked {value} in vain", *alone):
        assert not is_in(redact(text))
    assert redact("127.0.0.1:9 is down") == "127.0.0.1:9 is down"


def test_a_proxy_without_a_password_takes_nothing_out(monkeypatch):
    for value in (
        "http://proxy.example.org:3128",
        "[::1]:8080",
        "proxy:8080",
        "socks5h://10.0.0.1",
        "http://[fe80::1]",
    ):
        monkeypatch.setenv("http_proxy", value)
        assert redact(f"{value} or http://[::1]:8080, proxy, 8080") == f"{value} or http://[::1]:8080, proxy, 8080"
        assert without_credentials(value) == value


def test_a_password_that_is_a_word_is_taken_out_with_its_user(monkeypatch):
    monkeypatch.setenv("http_proxy", "me:instruction@host:1")
    assert redact("through me:instruction@host:1; an instruction") == "through ***@host:1; an instruction"


@pytest.mark.parametrize(
    "address",
    [
        "http://host:99999/v1",
        "http://[::g]/v1",
        "http://[12345::1]:8000/v1",
        "http://a..b/v1",
        "http://xn--/v1",
        "http://-/v1",
        "http://" + "a" * 300 + "/v1",
        "http://" + "a." * 40_000 + "b/v1",
    ],
)
def test_an_address_that_cannot_be_asked_is_refused_in_one_line(address):
    with pytest.raises(UserError) as refused:
        answer_of(address)
    assert "endpoint" in str(refused.value) and "\n" not in str(refused.value)
    assert "TaskGroup" not in str(refused.value)


def test_a_server_that_no_proxy_names_is_asked_directly_whatever_the_proxy_is(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:notaport")
    usual, other, six = "http://judge.invalid/v1", "http://judge.invalid:8000/v1", "http://[2001:db8::1]:9/v1"
    for address, direct in [
        *((usual, name) for name in ("judge.invalid", "*", ".invalid", "judge.invalid:80", "a, *")),
        *((usual, name) for name in ("http://judge.invalid", "http://judge.invalid:80")),
        *((other, name) for name in ("judge.invalid", "judge.invalid:8000", "a,JUDGE.invalid:8000 ", ".invalid:8000")),
        *((six, name) for name in ("2001:db8::1", "[2001:db8::1]", "[2001:db8::1]:9")),
    ]:
        monkeypatch.setenv("no_proxy", direct)
        assert proxy_advice(address) is None
        if address.startswith("http://judge"):  # the other may be waited for
            with pytest.raises(UserError, match="connection: ") as refused:
                answer_of(address)
            assert "proxy" not in str(refused.value)


def test_no_proxy_with_another_port_names_another_server(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:notaport")
    for other in ("judge.invalid:8000", "https://judge.invalid", "judge.invalid:443", "notjudge.invalid", "8000"):
        monkeypatch.setenv("no_proxy", other)
        with pytest.raises(UserError, match="the proxy of http_proxy"):
            answer_of("http://judge.invalid/v1")


@pytest.mark.parametrize("bad", ["http://127.0.0.1:notaport", "nonsense://x", "http://[::1", "http://", "socks://a"])
def test_only_the_proxy_that_would_be_used_is_checked(bad, monkeypatch):
    with serve_stub({"": [Say("through the proxy")]}) as stub:
        good = stub.url.removesuffix("/v1")
        for others in ({"https_proxy": bad}, {"ALL_PROXY": bad}, {"HTTPS_PROXY": bad, "all_proxy": bad}):
            with monkeypatch.context() as patch:
                for name, value in {"http_proxy": good.removeprefix("http://"), **others}.items():
                    patch.setenv(name, value)
                assert answer_of("http://judge.invalid/v1") == "through the proxy"
        with monkeypatch.context() as patch:
            patch.setenv("http_proxy", bad)
            patch.setenv("all_proxy", good)
            with pytest.raises(UserError, match="the proxy of http_proxy="):
                answer_of("http://judge.invalid/v1")
    monkeypatch.setenv("https_proxy", bad)
    with pytest.raises(UserError, match="the proxy of https_proxy="):
        answer_of("https://judge.invalid/v1")
    with pytest.raises(UserError, match="connection: ") as refused:  # without a proxy
        answer_of("http://judge.invalid/v1")
    assert "proxy" not in str(refused.value)


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
