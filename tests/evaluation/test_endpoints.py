"""Endpoints: each request ends in a reply or a failure with its reason; against a failing stub and a real server."""

import json
import socket
import time

import pytest
from serve import chat_folder, served_demo, server  # noqa: F401
from stub_endpoint import Cut, Drip, Hang, Raw, Say, Status, serve_stub
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.config import UserError
from recipe.evaluation.endpoints import (
    Reply,
    as_answer,
    ask,
    chat_request,
    is_endpoint,
    parse_endpoint,
    preflight,
)
from recipe.generation import Decoding, generate_responses
from recipe.templates import load_template, message_text

pytestmark = pytest.mark.usefixtures("no_retries")


def request(text: str, **options) -> dict:
    return {"messages": [{"role": "user", "content": text}], **options}


def ask_stub(script, names, **options):
    """The outcomes of one `do:NAME` request for each name, and the stub with what it counted."""
    options = {"timeout": 20.0, **options}
    with serve_stub({"": [Say("hello")], **script}) as stub:
        endpoint = parse_endpoint(f"{stub.url}#stub")
        return ask(endpoint, [request(f"do:{name}") for name in names], **options), stub


# --- addresses ------------------------------------------------------------------------------------------------------


def test_an_endpoint_is_read_from_its_address():
    endpoint = parse_endpoint("http://localhost:8000/v1/#/models/my model#2")
    assert (endpoint.url, endpoint.model) == ("http://localhost:8000/v1", "/models/my model#2")
    assert parse_endpoint("HTTP://localhost:65535/v1#m").model == "m" and is_endpoint("HTTP://localhost:65535/v1#m")
    assert parse_endpoint("https://[::1]/v1#m").url == "https://[::1]/v1"
    same = ("HTTP://LOCALHOST:08000/v1#M", "http://localhost:8000/v1/#M")
    assert {str(parse_endpoint(name)) for name in same} == {"http://localhost:8000/v1#M"}
    assert parse_endpoint("http://GPU-box.:80/V1#m").url == "http://gpu-box./V1"  # a dot at the end says something
    assert is_endpoint("http://host/v1") and not is_endpoint("outputs/demo") and not is_endpoint("someone/http")


@pytest.mark.parametrize(
    "name",
    [
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "http://:80/v1",
        "http://host:port/v1",
        "http://a b/v1",
        "http://host/v 1",
        "http://[::1/v1",
        "http://host/v1?key=secret#m",
        "http://me:secret@ho st/v1",
        "http://me:secret@host/v1#m",
        "http://secret@host:80/v1#m",
        "http://me:secret#secret@host/v1",
        "me:secret@host/v1#m",
        "HTTP://me:secret@host/v1#m",
        "http://me%3Asecret%40host/v1#m",
        "http://me:secret/v1#m",
        "me:secret#m",
        "http://host:65536/v1#m",
        "http://host:0/v1#m",
        "http://[::g]/v1#m",
        "http://[12345::1]:80/v1#m",
    ],
)
def test_what_is_no_endpoint_is_refused_without_its_secrets(name):
    with pytest.raises(UserError, match="endpoint") as refused:
        parse_endpoint(name)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("http://host:99999/v1#llama@q4", "http://host:99999/v1#llama@q4"),
        ("https://host:65536#llama@q4", "https://host:65536#llama@q4"),
        ("localhost:8000/v1#org/llama@q4", "localhost:8000/v1#org/llama@q4"),
        ("http://[::g]:80/v1#llama@q4", "http://[::g]:80/v1#llama@q4"),
        ("http://[::1#llama@q4", "http://[::1#llama@q4"),
        ("http://a b/v1#llama@q4@q5", "http://a b/v1#llama@q4@q5"),
        ("http://host:0/v1#m", "http://host:0/v1#m"),
        ("http://me:secret@host:99999/v1#m", "http://***@host:99999/v1#m"),
        ("http://me:secret@host:99999/v1#llama@q4", "http://***@q4"),
        ("http://me:secret/secret#secret@host/v1#m", "http://***@host/v1#m"),
        ("http://secret@host:99999/v1#m", "http://***@host:99999/v1#m"),
        ("http://me:8secret/v1#m@q4", "http://***@q4"),
        ("http://me:123456/v1#m", "http://me:***"),
        ("http://host:99999/v1?key=secret#m@q4", "http://***@q4"),
        ("http://host:99999/v1?key=secret#m", "http://host:99999/v1"),
        ("http://me%3Asecret%40host:0/v1#m@q4", "http://***@q4"),
    ],
)
def test_what_is_wrong_with_an_address_is_shown_and_no_password(name, shown):
    with pytest.raises(UserError) as refused:
        parse_endpoint(name)
    assert str(refused.value).startswith(f"endpoint {shown!r}: write http")


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    with serve_stub({"": [Status(401, body='{"error": {"message": "wrong: sk-secret-key"}}')]}) as stub:
        [failure] = ask(parse_endpoint(f"{stub.url}#stub"), [request("hello")])
    assert stub.keys == ["Bearer sk-secret-key"]
    assert failure.status == "http_401" and "***" in failure.error and "sk-secret" not in repr(failure)


# --- outcomes -------------------------------------------------------------------------------------------------------


def test_a_reply_in_full():
    [reply], stub = ask_stub({"x": [Say("Blue.", "length")]}, ["x"])
    assert reply == Reply("Blue.", "length", "stub-2026", {"prompt_tokens": 10, "completion_tokens": 2}, reply.seconds)
    assert 0 < reply.seconds < 20
    assert stub.bodies == [{"messages": [{"role": "user", "content": "do:x"}], "model": "stub"}]


def test_each_fault_has_its_status():
    script = {
        "slow": [Hang(60)],
        "drip": [Drip(60)],
        "cut": [Cut()],
        "busy": [Status(429)],
        "broken": [Status(500)],
        "refused": [Status(422)],
        "page": [Raw(b"<html>")],
        "nothing": [Raw(b"")],
        "null": [Raw(b"null")],
        "list": [Raw(b"[]")],
        "no_choices": [Raw(b'{"choices": []}')],
        "no_message": [Raw(b'{"choices": [{"message": null}]}')],
        "number": [Raw(b'{"choices": [{"message": {"content": 5}}]}')],
        "bytes": [Raw(b"\xff\xfe\x00")],
        "deep": [Raw(b"[" * 100_000)],
        "fine": [Say("fine")],
    }
    started = time.monotonic()
    outcomes, _ = ask_stub(script, script, timeout=2.0)
    statuses = dict(zip(script, [getattr(outcome, "status", "reply") for outcome in outcomes], strict=True))
    expected = {
        "slow": "timeout", "drip": "timeout", "cut": "connection", "busy": "rate_limited", "broken": "http_500",
        "refused": "http_422", "fine": "reply", "no_choices": "no_answer", "no_message": "no_answer",
    }  # fmt: skip
    assert statuses == {name: expected.get(name, "malformed") for name in script}
    assert time.monotonic() - started < 20
    assert "incomplete" in outcomes[2].error or "closed" in outcomes[2].error
    assert "the stub was told to" in outcomes[4].error


def test_a_reply_without_text_or_with_half_a_character():
    odd = b'{"usage": [1], "choices": [{"message": {"content": "a \\ud800 b"}}]}'
    none = b'{"usage": {"prompt_tokens": 3}, "choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'
    [reply, empty], _ = ask_stub({"odd": [Raw(odd)], "none": [Raw(none)]}, ["odd", "none"])
    assert (reply.text, reply.finish_reason, reply.model, reply.usage) == ("a ? b", None, None, None)
    assert (empty.text, empty.finish_reason, empty.usage) == ("", "stop", None)


def test_only_temporary_faults_are_tried_again(monkeypatch):
    monkeypatch.setattr("recipe.evaluation.endpoints.MAX_RETRIES", 1)
    script = {
        "busy": [Status(429, {"Retry-After": "1"}), Say("now")],
        "broken": [Status(503), Say("now")],
        "cut": [Cut(), Say("now")],
        "slow": [Hang(60), Say("now")],
        "always": [Status(500)],
        "refused": [Status(400)],
        "unknown": [Status(404)],
    }
    started = time.monotonic()
    outcomes, stub = ask_stub(script, script, timeout=2.0, concurrency=8)
    assert [outcome.text for outcome in outcomes[:4]] == ["now"] * 4
    assert [outcome.status for outcome in outcomes[4:]] == ["http_500", "http_400", "http_404"]
    assert {name: stub.asked(name) for name in script} == {
        "busy": 2, "broken": 2, "cut": 2, "slow": 2, "always": 2, "refused": 1, "unknown": 1
    }  # fmt: skip
    assert 1 <= time.monotonic() - started < 20  # Retry-After was waited for


def test_outcomes_are_in_order_and_concurrency_is_kept():
    seen = []
    with serve_stub({"": [Say(lambda prompt: time.sleep(0.02) or prompt.upper())]}) as stub:
        requests = [request(f"word {index}") for index in range(40)]
        outcomes = ask(
            parse_endpoint(f"{stub.url}#m"), requests, lambda index, reply: seen.append((index, reply)), concurrency=3
        )
    assert [outcome.text for outcome in outcomes] == [f"WORD {index}" for index in range(40)]
    assert sorted(seen, key=lambda pair: pair[0]) == list(enumerate(outcomes))
    assert stub.most_at_once == 3


def test_an_endpoint_that_is_down_is_given_up():
    seen = []
    with serve_stub({"": [Status(503)]}) as stub:
        outcomes = ask(
            parse_endpoint(f"{stub.url}#m"),
            [request("hello")] * 100,
            lambda index, outcome: seen.append(index),
            concurrency=1,
        )
    assert [outcome.status for outcome in outcomes] == ["http_503"] * 10 + ["not_asked"] * 90
    assert "10 requests in a row had failed, the last: http_503" in outcomes[-1].error
    assert len(stub.bodies) == 10 and seen == list(range(10))


def test_requests_that_are_refused_one_by_one_do_not_stop_the_others():
    outcomes, _ = ask_stub({"long": [Status(400)]}, ["long"] * 30 + ["fine"])
    assert [getattr(outcome, "status", "reply") for outcome in outcomes] == ["http_400"] * 30 + ["reply"]


def test_an_error_of_the_callback_comes_through():
    def disk_full(index, outcome):
        raise OSError("no space left")

    with serve_stub({"": [Say("x")]}) as stub, pytest.raises(OSError, match="no space left"):
        ask(parse_endpoint(f"{stub.url}#m"), [request("hello")] * 5, disk_full)


# --- preflight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act, message",
    [
        (Status(401), "http_401.*OPENAI_API_KEY"),
        (Status(404), "http_404.*does it know the model"),
        (Status(400, body='{"detail": "Server is pinned to x"}'), "http_400.*pinned to x"),
        (Raw(b"<html>"), "malformed.*is the path right"),
        (Status(429), "rate_limited.*wait"),
    ],
)
def test_an_endpoint_that_cannot_be_used_says_why(act, message):
    with serve_stub({"": [act]}) as stub, pytest.raises(UserError, match=message):
        preflight(parse_endpoint(f"{stub.url}#m"), request("hello"), timeout=20)


def test_an_endpoint_that_is_down_is_reported_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = parse_endpoint(f"http://127.0.0.1:{free.getsockname()[1]}/v1#m")
        started = time.monotonic()
        with pytest.raises(UserError, match=r"connection: .*is it running"):
            preflight(down, request("hello"))
    assert time.monotonic() - started < 20


def test_a_model_that_loads_is_waited_for():
    """Each request takes a second: the time of the warm-up decides."""
    with serve_stub({"": [Say(lambda prompt: time.sleep(1) or "loaded")]}) as stub:
        endpoint = parse_endpoint(f"{stub.url}#m")
        preflight(endpoint, request("hello"), timeout=20)
        with pytest.raises(UserError, match=r"timeout: .*still be loading"):
            preflight(endpoint, request("hello"), timeout=0.3)


# --- answers of a served model --------------------------------------------------------------------------------------

RECORDS = [
    {"instruction": "Write the plural of the word.", "input": "cat", "output": "cats"},
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Count the words.", "input": "The river is long and the road is short.", "output": "9"},
]


def test_answers_are_those_of_predictions():
    """`tokens` are as the server counts them; what its filter ended is `refused`."""
    script = {"": [Say("Blue.")], "cut_short": [Say("The", "length")], "odd": [Say("", "safety")]}
    records = [{"instruction": f"do:{name}", "input": "cat"} for name in ("cut_short", "odd")] + RECORDS[1:2]
    decoding = Decoding(max_new_tokens=9, temperature=0.5, top_p=0.9, seed=7)
    with serve_stub(script) as stub:
        requests = [chat_request(message_text(record), decoding) for record in records]
        answers = [as_answer(reply) for reply in ask(parse_endpoint(f"{stub.url}#m"), requests)]
    assert all(answer.pop("seconds") > 0 for answer in answers)
    assert answers == [
        {"text": "The", "tokens": 2, "stop_reason": "length"},
        {"text": "", "tokens": 2, "stop_reason": "refused"},
        {"text": "Blue.", "tokens": 2, "stop_reason": "eos"},
    ]
    sent = {body["messages"][0]["content"]: body for body in stub.bodies}
    assert set(sent) == {f"do:{n}\n\n### Input:\ncat" for n in ("cut_short", "odd")} | {"Name a colour."}
    assert {"temperature": 0.5, "top_p": 0.9, "seed": 7, "max_tokens": 9}.items() <= sent["Name a colour."].items()


def test_the_message_renders_the_prompt_of_training():
    """A server renders the content alone; the Alpaca template puts an input where the message has it already."""
    template = load_template("alpaca")
    for record in RECORDS:
        assert template.prompt({"instruction": message_text(record), "input": ""}) == template.prompt(record)


def test_a_served_model_answers_as_the_same_folder_does_here(served_demo, chat_folder):  # noqa: F811
    """`transformers serve` against `generate_responses`, greedy, text for text."""
    endpoint = parse_endpoint(served_demo)
    requests = [chat_request(message_text(record), Decoding(max_new_tokens=12)) for record in RECORDS]
    answers = [as_answer(reply) for reply in ask(endpoint, requests, concurrency=2)]
    model = AutoModelForCausalLM.from_pretrained(chat_folder)
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    prompts = load_template(str(chat_folder / "chat_template.jinja"), tokenizer).prompts(RECORDS)
    responses = generate_responses(model, tokenizer, prompts, max_new_tokens=12)
    assert [answer["text"] for answer in answers] == [response.text for response in responses]
    assert all(response.text for response in responses)
    assert [answer["stop_reason"] for answer in answers] == [response.stop_reason for response in responses]


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        ({"role": "assistant"}, "", None),
        ({"content": None, "reasoning_content": "Hm."}, "", "Hm."),
        ({"content": [{"type": "text", "text": "Bl"}, {"type": "text", "text": "ue."}]}, "Blue.", None),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                      {"type": "text", "text": "Blue."}]}, "Blue.", "Hm."),
    ],
)  # fmt: skip
def test_messages_without_content_or_in_parts(message, text, reasoning):
    body = json.dumps({"choices": [{"message": message, "finish_reason": "length"}]}).encode()
    with serve_stub({"": [Raw(body)]}) as stub:
        [reply] = ask(parse_endpoint(f"{stub.url}#m"), [chat_request("Hello.", Decoding())])
    assert (reply.text, reply.reasoning) == (text, reasoning)
    assert as_answer(reply)["stop_reason"] == "length"


def test_a_server_that_needs_more_tokens_for_its_greeting_is_asked():
    words = "Could not finish the message because max_tokens or model output limit was reached."
    with serve_stub({"": [Status(400, body=json.dumps({"error": {"message": words}}))]}) as stub:
        assert preflight(parse_endpoint(f"{stub.url}#m"), chat_request("Hello.", Decoding())).changes == ()
        assert stub.asked() == 0 and len(stub.bodies) == 1
