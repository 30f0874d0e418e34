"""A key reaches the host that it belongs to, over https or on this machine, and no other."""

import asyncio
import asyncio.selector_events

import pytest
from stub_endpoint import Say, Status, serve_stub

from recipe.config import UserError
from recipe.evaluation.connection import open_client
from recipe.evaluation.endpoint_keys import DEFAULT, endpoint_key, is_openais
from recipe.evaluation.endpoints import Endpoint, ask, parse_endpoint, preflight
from recipe.evaluation.generate import EvalArguments
from recipe.evaluation.judge.run import JudgeArguments

KEYS = {"OPENAI_API_KEY": "sk-openai-0123456789", "JUDGE": "judge-key-0123456789", "OTHER": "other-key-0123456789"}
REQUEST = {"messages": [{"role": "user", "content": "Hello."}]}


@pytest.fixture(autouse=True)
def keys(monkeypatch, no_retries):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)


@pytest.mark.parametrize(
    ("url", "variable", "sent"),
    [
        ("https://api.openai.com/v1", None, "OPENAI_API_KEY"),
        ("https://API.openai.com:443/v1", None, "OPENAI_API_KEY"),
        ("http://localhost:8000/v1", None, "OPENAI_API_KEY"),
        ("http://127.0.0.1:8000/v1", None, "OPENAI_API_KEY"),
        ("http://[::1]:8000/v1", None, "OPENAI_API_KEY"),
        ("https://api.mistral.ai/v1", None, None),
        ("http://gpu-box:8000/v1", None, None),
        ("http://api.openai.com/v1", None, None),
        ("https://api.openai.com.evil.org/v1", None, None),
        ("https://evil.org/api.openai.com/v1", None, None),
        ("https://openai.com/v1", None, None),
        ("http://localhost.evil.org/v1", None, None),
        ("https://api.openai.com:8443/v1", None, None),
        ("https://api.mistral.ai/v1", "JUDGE", "JUDGE"),
        ("https://api.openai.com/v1", "JUDGE", "JUDGE"),
        ("HTTPS://api.openai.com/v1", None, "OPENAI_API_KEY"),
        ("https://api.openai.com.:0443/v1", None, "OPENAI_API_KEY"),
        ("HTTPS://api.mistral.ai/v1", "JUDGE", "JUDGE"),
        ("HTTP://api.openai.com/v1", None, None),
        ("http://localhost:8000/v1", "JUDGE", "JUDGE"),
        ("https://api.mistral.ai/v1", "OPENAI_API_KEY", "OPENAI_API_KEY"),
    ],
)
def test_which_key_goes_where(url, variable, sent):
    assert endpoint_key(url, variable) == (KEYS[sent] if sent else None)


def test_the_address_in_openai_base_url_has_the_key_too(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://proxy.example.org/openai/v1")
    assert endpoint_key("https://proxy.example.org/v1") == KEYS["OPENAI_API_KEY"]
    assert endpoint_key("HTTPS://Proxy.example.org:443/v1") == KEYS["OPENAI_API_KEY"]
    assert endpoint_key("https://proxy.example.org:8443/v1") is None
    monkeypatch.setenv("OPENAI_BASE_URL", "http://proxy.example.org/v1")
    with pytest.raises(UserError, match="the key in OPENAI_API_KEY would go over the network unencrypted"):
        parse_endpoint("http://proxy.example.org/v1#m")


@pytest.mark.parametrize("base", ["http://[bad", "https://proxy.example.org:port/v1", "https://me:secret@[::g]/v1"])
def test_an_openai_base_url_that_cannot_be_read_is_named_where_it_decides(base, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", base)
    for name, variable in (
        ("http://localhost:8000/v1#m", None), ("https://api.openai.com/v1#m", None), ("https://a.org/v1#m", "JUDGE"),
    ):  # fmt: skip
        assert parse_endpoint(name, variable or ()).key_variable == variable
    with serve_stub({"": [Say("85")]}) as stub:
        [reply] = ask(parse_endpoint(f"{stub.url}#m"), [REQUEST])
    assert reply.text == "85"
    with pytest.raises(UserError, match=r"^OPENAI_BASE_URL=.*: not an address") as refused:
        parse_endpoint("https://a.org/v1#m")
    assert "\n" not in str(refused.value) and "secret" not in str(refused.value)
    monkeypatch.delenv("OPENAI_API_KEY")  # nothing that could go there
    assert parse_endpoint("https://a.org/v1#m").key_variable is None


MALFORMED = [
    "http://[::g]/v1#m", "http://[::1#m", "http://[12345::1]:80/v1#m", "http://::1]:80/v1#m", "https://[]/v1#m",
    "http://host:99999/v1#m", "http://host:\u0664/v1#m", "http://a\uff0fb/v1#m", "http://[v1.x]#m", "http://#m",
]  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("named", [None, "JUDGE", "a.org=JUDGE"])
def test_a_malformed_address_is_refused_before_its_key_is_looked_for(name, named, tmp_path):
    words, good = [named] if named else [], "https://a.org/v1#m"
    eval_args = {"output_dir": str(tmp_path), "endpoint_key_env": words}
    for make in (
        lambda: JudgeArguments(judge=name, judge_key_env=named),
        lambda: EvalArguments(model=[name], **eval_args),
        lambda: EvalArguments(model=[good, name], **eval_args),
        lambda: EvalArguments(model=[good], baseline=name, **eval_args),
        lambda: parse_endpoint(name, words),
    ):
        with pytest.raises(UserError, match=r"^endpoint '.*write http://host:port/v1#model") as refused:
            make()
        assert "\n" not in str(refused.value) and "a.org" not in str(refused.value)


@pytest.mark.parametrize("host", ["gpu-box:8000", "10.0.0.7", "192.168.1.2:8080", "judge.example.org", "[2001:db8::1]"])
def test_no_key_goes_in_clear(host):
    with pytest.raises(UserError, match="the key in JUDGE would go over the network unencrypted") as refused:
        parse_endpoint(f"http://{host}/v1#m", "JUDGE")
    assert "https://" in str(refused.value) and KEYS["JUDGE"] not in str(refused.value)
    with pytest.raises(UserError, match="unencrypted"):  # before anything is sent
        ask(Endpoint(f"http://{host}/v1", "m", "JUDGE"), [REQUEST])


def variable_for(url, named, urls):
    return parse_endpoint(url, named, urls).key_variable


def test_each_of_several_hosts_has_its_own():
    urls = ["https://a.org/v1#m", "https://b.org:8000/v1#m"]
    for named in (["A.org=JUDGE", "b.org:8000=OTHER"], ["a.org:443=JUDGE", "B.ORG.:08000=OTHER"]):
        assert [variable_for(url, named, urls) for url in urls] == ["JUDGE", "OTHER"]
    assert [variable_for(url, ["a.org=JUDGE"], urls) for url in urls] == ["JUDGE", None]
    with pytest.raises(UserError, match=r"there are endpoints on a\.org and b\.org:8000; say to which its key belongs"):
        variable_for(urls[0], ["JUDGE"], urls)
    with pytest.raises(UserError, match=r"no endpoint is on the host that was given.*there are a\.org and b\.org:8000"):
        variable_for(urls[0], ["c.org=JUDGE"], urls)
    for host in ("a.org:80", "a.org:8000", "b.org", "a.org/v1", "https://a.org", "me@a.org", ""):
        with pytest.raises(UserError, match="no endpoint is on"):
            variable_for(urls[0], [f"{host}=JUDGE"], urls)
    six = ["https://[2001:db8::1]/v1#m", "https://[2001:DB8:0::1]:8443/v1#m"]
    for host in ("[2001:db8::1]", "2001:db8::1", "[2001:db8:0:0::1]:443"):
        assert [variable_for(url, [f"{host}=JUDGE", "[2001:db8::1]:8443=OTHER"], six) for url in six] == [
            "JUDGE", "OTHER"
        ]  # fmt: skip


@pytest.mark.parametrize(
    "given", ["sk-oops-0123456789abcdef", "hf_abcdefghijklmnopqrstuvwx", "NOT_SET", "a.org=sk-oops", ""]
)
def test_a_key_in_place_of_its_variable_is_refused_and_not_shown(given):
    with pytest.raises(UserError, match="it takes the name of an environment variable that is set") as refused:
        JudgeArguments(judge="https://a.org/v1#m", judge_key_env=given)
    assert not given or given.rpartition("=")[2] not in str(refused.value)


@pytest.mark.parametrize("given", ["sk-oops-0123456789abcdef=JUDGE", "sk_oops:80=JUDGE", "[sk-oops=JUDGE", "=JUDGE"])
def test_a_key_in_place_of_its_host_is_refused_and_not_shown(given, tmp_path):
    name = "https://a.org/v1#m"
    for make in (
        lambda: JudgeArguments(judge=name, judge_key_env=given),
        lambda: EvalArguments(model=[name], output_dir=str(tmp_path), endpoint_key_env=[given]),
    ):
        with pytest.raises(
            UserError, match=r"_key_env HOST=JUDGE: no endpoint is on the host.*there are a\.org"
        ) as refused:
            make()
        assert "oops" not in str(refused.value)


@pytest.mark.parametrize("given", ["sk-oops-0123456789abcdef", "NOT_SET", "JUDGE", "a.org=JUDGE", ""])
def test_a_key_for_nothing_is_refused_and_not_shown(given, tmp_path):
    folder = {"output_dir": str(tmp_path)}
    for flag, make in (
        ("judge", lambda: JudgeArguments(judge_key_env=given)),
        ("endpoint", lambda: EvalArguments(model=["echo"], endpoint_key_env=[given], **folder)),
        ("endpoint", lambda: EvalArguments(stages=["report"], endpoint_key_env=[given], **folder)),
    ):
        with pytest.raises(UserError, match=f"--{flag}_key_env: .*whose key it names.*or leave it out") as refused:
            make()
        assert not given or given not in str(refused.value)


def test_the_flags_reach_the_servers(tmp_path):
    with serve_stub({"": [Say("85")]}) as stub:
        name = f"{stub.url}#m"
        args = EvalArguments(model=[name], output_dir=str(tmp_path), endpoint_key_env=["OTHER"])
        judge = JudgeArguments(judge=name, judge_key_env="JUDGE")
        ask(args.endpoint(name), [REQUEST])
        ask(judge.endpoint(), [REQUEST])
        ask(EvalArguments(model=[name], output_dir=str(tmp_path)).endpoint(name), [REQUEST])
    assert stub.keys == [f"Bearer {KEYS[name]}" for name in ("OTHER", "JUDGE", "OPENAI_API_KEY")]


def at_port_80(port: int, monkeypatch) -> None:
    """Lead connections to port 80 of this machine to another port: to listen there needs rights."""
    connect = asyncio.selector_events.BaseSelectorEventLoop.sock_connect

    async def led(loop, sock, address):
        return await connect(loop, sock, (address[0], port if address[1] == 80 else address[1], *address[2:]))

    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, "sock_connect", led)


@pytest.mark.parametrize(
    "address",
    [
        "http://LOCALHOST:{port}/v1", "HTTP://Localhost:{port}/v1", "hTTp://127.0.0.1:{port}/v1",
        "http://localhost:0{port}/v1/", "http://localhost:80/v1", "HTTP://LOCALHOST:80/v1", "http://localhost:080/v1",
        "http://localhost/v1", "http://127.0.0.1:80/v1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("variable", [None, "JUDGE"])
def test_the_key_arrives_however_its_host_is_spelled(address, variable, monkeypatch):
    with serve_stub({"": [Say("85")]}) as stub:
        port = int(stub.url.removesuffix("/v1").rpartition(":")[2])
        at_port_80(port, monkeypatch)
        [reply] = ask(parse_endpoint(f"{address.format(port=port)}#m", variable or ()), [REQUEST])
        [other] = ask(Endpoint(address.format(port=port), "m", variable), [REQUEST])  # not read by parse_endpoint
    assert reply.text == other.text == "85"
    assert stub.keys == [f"Bearer {KEYS[variable or DEFAULT]}"] * 2


@pytest.mark.parametrize(
    "address",
    [
        "https://API.openai.com/v1", "https://api.openai.com:443/v1", "HTTPS://api.openai.com/v1",
        "https://api.openai.com.:0443/v1",
    ],
)  # fmt: skip
def test_requests_to_openai_keep_what_belongs_to_it(address):
    """What the client has built goes through its own hook, as no test reaches that host."""

    async def headers_to(url: str) -> list[str]:
        async with open_client(endpoint.url, "key", 1, 0, all_headers=is_openais(endpoint.url)) as client:
            request = client._client.build_request("POST", url, headers={"Authorization": "key", "OpenAI-Project": "p"})
            for hook in client._client.event_hooks["request"]:
                await hook(request)
        return [name for name in ("authorization", "openai-project") if name in request.headers]

    endpoint = parse_endpoint(f"{address}#m")
    for own in (f"{endpoint.url}/chat/completions", f"{address}/chat/completions"):
        assert asyncio.run(headers_to(own)) == ["authorization", "openai-project"]
    for other in ("http://api.openai.com/v1", "https://api.openai.com:8443/v1", "https://api.openai.com.evil.org/v1"):
        assert asyncio.run(headers_to(other)) == []


def test_a_redirect_to_another_place_does_not_carry_the_key():
    with serve_stub({"": [Say("stolen")]}) as other:
        moved = Status(307, {"Location": f"{other.url}/chat/completions"})
        with serve_stub({"": [moved]}) as stub:
            [reply] = ask(parse_endpoint(f"{stub.url}#m", "JUDGE"), [REQUEST])
    assert stub.keys == [f"Bearer {KEYS['JUDGE']}"] and other.keys == [None]
    assert reply.text == "stolen"


def test_what_other_variables_of_openai_hold_stays_here(monkeypatch):
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, f"canary-{name}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Auth: canary-header")
    with serve_stub({"": [Say("85")]}) as stub:
        ask(parse_endpoint(f"{stub.url}#m"), [REQUEST])
    assert stub.headers and "canary" not in str(stub.headers)


def test_a_server_that_wants_a_key_says_how_to_give_it():
    with serve_stub({"": [Status(401)]}) as stub, pytest.raises(UserError, match="environment variable JUDGE to a key"):
        preflight(parse_endpoint(f"{stub.url}#m", "JUDGE"), REQUEST, timeout=20)
