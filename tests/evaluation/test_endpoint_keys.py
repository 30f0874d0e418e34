"""A key reaches the host that it belongs to, over https or on this machine, and no other."""

import pytest
from stub_endpoint import Say, Status, serve_stub

from recipe.config import UserError
from recipe.evaluation.endpoint_keys import endpoint_key, variable_for
from recipe.evaluation.endpoints import Endpoint, ask, parse_endpoint, preflight
from recipe.evaluation.generate import EvalArguments
from recipe.evaluation.judge.run import JudgeArguments

KEYS = {"OPENAI_API_KEY": "sk-openai-0123456789", "JUDGE": "judge-key-0123456789", "OTHER": "other-key-0123456789"}
REQUEST = {"messages": [{"role": "user", "content": "Hello."}]}


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.setattr("recipe.evaluation.endpoints.MAX_RETRIES", 0)
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
        ("http://localhost:8000/v1", "JUDGE", "JUDGE"),
        ("https://api.mistral.ai/v1", "OPENAI_API_KEY", "OPENAI_API_KEY"),
    ],
)
def test_which_key_goes_where(url, variable, sent):
    assert endpoint_key(url, variable) == (KEYS[sent] if sent else None)


def test_the_address_in_openai_base_url_has_the_key_too(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://proxy.example.org/openai/v1")
    assert endpoint_key("https://proxy.example.org/v1") == KEYS["OPENAI_API_KEY"]
    assert endpoint_key("https://proxy.example.org:8443/v1") is None
    monkeypatch.setenv("OPENAI_BASE_URL", "http://proxy.example.org/v1")
    with pytest.raises(UserError, match="the key in OPENAI_API_KEY would go over the network unencrypted"):
        parse_endpoint("http://proxy.example.org/v1#m")


@pytest.mark.parametrize("host", ["gpu-box:8000", "10.0.0.7", "192.168.1.2:8080", "judge.example.org", "[2001:db8::1]"])
def test_no_key_goes_in_clear(host):
    with pytest.raises(UserError, match="the key in JUDGE would go over the network unencrypted") as refused:
        parse_endpoint(f"http://{host}/v1#m", "JUDGE")
    assert "https://" in str(refused.value) and KEYS["JUDGE"] not in str(refused.value)
    with pytest.raises(UserError, match="unencrypted"):  # before anything is sent
        ask(Endpoint(f"http://{host}/v1", "m", "JUDGE"), [REQUEST])


def test_each_of_several_hosts_has_its_own():
    urls = ["https://a.org/v1#m", "https://b.org:8000/v1#m"]
    named = ["A.org=JUDGE", "b.org:8000=OTHER"]
    assert [variable_for(url, named, urls) for url in urls] == ["JUDGE", "OTHER"]
    assert [variable_for(url, ["a.org=JUDGE"], urls) for url in urls] == ["JUDGE", None]
    with pytest.raises(UserError, match=r"there are endpoints on a\.org and b\.org:8000; say to which its key belongs"):
        variable_for(urls[0], ["JUDGE"], urls)
    with pytest.raises(UserError, match=r"no endpoint is on c\.org"):
        variable_for(urls[0], ["c.org=JUDGE"], urls)


@pytest.mark.parametrize(
    "given", ["sk-oops-0123456789abcdef", "hf_abcdefghijklmnopqrstuvwx", "NOT_SET", "a.org=sk-oops", ""]
)
def test_a_key_in_place_of_its_variable_is_refused_and_not_shown(given):
    with pytest.raises(UserError, match="it takes the name of an environment variable that is set") as refused:
        variable_for("https://a.org/v1", [given], flag="--judge_key_env")
    assert not given or given.rpartition("=")[2] not in str(refused.value)


def test_the_flags_reach_the_servers(tmp_path):
    with serve_stub({"": [Say("85")]}) as stub:
        name = f"{stub.url}#m"
        args = EvalArguments(model=[name], output_dir=str(tmp_path), endpoint_key_env=["OTHER"])
        judge = JudgeArguments(judge=name, judge_key_env="JUDGE")
        ask(args.endpoint(name), [REQUEST])
        ask(judge.endpoint(), [REQUEST])
        ask(EvalArguments(model=[name], output_dir=str(tmp_path)).endpoint(name), [REQUEST])
    assert stub.keys == [f"Bearer {KEYS[name]}" for name in ("OTHER", "JUDGE", "OPENAI_API_KEY")]


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
