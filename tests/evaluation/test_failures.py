"""Why there is no answer: what servers write in a body of status 200, and in which words they refuse a prompt."""

import json

import pytest
from stub_endpoint import Raw, Say, Status, serve_stub

from recipe.config import UserError
from recipe.evaluation.endpoints import as_answer, ask, chat_request, parse_endpoint, preflight
from recipe.evaluation.failures import Failure, error_in, may_be_of_prompt, may_pass, stop_reason
from recipe.generation import Decoding

pytestmark = pytest.mark.usefixtures("no_retries")
REQUEST = chat_request("Hello.", Decoding())


def outcome_of(act):
    with serve_stub({"": [act]}) as stub:
        [outcome] = ask(parse_endpoint(f"{stub.url}#m"), [REQUEST], timeout=20)
    return outcome


def choice(finish_reason="stop", **message) -> dict:
    return {"choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}]}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"code": 40001, "msg": "Insufficient balance"}, "error_reply", "Insufficient balance (code 40001)"),
        ({"success": False, "errors": [{"code": 7, "message": "No route"}]}, "error_reply", "No route (code 7)"),
        ({"error_code": 336, "error_msg": "Unsupported method"}, "error_reply", "Unsupported method (code 336)"),
        ({"detail": "Model is not served here"}, "error_reply", "Model is not served here"),
        ({"detail": [{"loc": ["body", "n"], "msg": "Input should be 1"}]}, "error_reply", "Input should be 1"),
        ({"errors": ["first", "second"]}, "error_reply", "first; second"),
        ({"base_resp": {"status_code": 1008, "status_msg": "no money"}, "choices": None}, "error_reply", "no money"),
        ({"status": "fail", "data": {"errorMessage": "Wrong realm"}}, "error_reply", "Wrong realm"),
        ({"error": {"code": 503, "message": ""}}, "http_503", "503"),
        ({"error": True, "explanation": "gone fishing"}, "error_reply", "gone fishing"),
        ({"errno": 5, "error_description": "Clock is wrong"}, "error_reply", "Clock is wrong (code 5)"),
        ({"error": {"message": "Rate limit", "status": 429}, "choices": []}, "rate_limited", "Rate limit"),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "Wait."}}, "rate_limited", "Wait."),
        ({"error": {"message": "Slow down.", "code": 429}}, "rate_limited", "Slow down. (code 429)"),
        ({"error": {"message": "Too many requests", "type": "x"}}, "rate_limited", "Too many requests (code x)"),
        ({"error": {"message": "No.", "type": "rate_limit_exceeded"}}, "rate_limited", "No. (code rate_limit"),
        ({"error": {"message": "Wait.", "code": "503"}}, "http_503", "Wait. (code 503)"),
        ({"object": "error", "message": "no such model", "code": 404}, "http_404", "no such model (code 404)"),
        ({"choices": [{"error": {"message": "upstream", "code": 502}}]}, "http_502", "upstream (code 502)"),
        ({"choices": None, "error": "out of cheese"}, "error_reply", "out of cheese"),
        ({"error": {"message": "Something broke."}}, "error_reply", "Something broke."),
        ({"error": {"message": "content_filter triggered", "code": 400}}, "content_filter", "triggered"),
        ({"error": {"message": "No.", "code": "content_filter"}}, "content_filter", "No. (code content_filter)"),
        ({"error": {"message": "maximum context length is 4", "code": "x"}}, "context", "context length is 4 (code x)"),
        ({"error": {"message": "4096 at most", "code": "context_length_exceeded"}}, "context", "4096 at most"),
        ({"hello": "world"}, "malformed", '{"hello": "world"}'),
        ({"choices": "none"}, "malformed", '{"choices": "none"}'),
        ({"choices": [{"text": "a completion"}]}, "malformed", "a completion"),
        (["choices"], "malformed", '["choices"]'),
        ("choices", "malformed", "choices"),
        ({"choices": [{"message": "text"}]}, "no_answer", '"text"'),
        (choice(content=5), "malformed", '"content": 5'),
        ({"choices": None}, "no_answer", '{"choices": null}'),
        ({"id": "1", "choices": []}, "no_answer", '"choices": []'),
        ({"choices": [{"message": None, "finish_reason": "stop"}]}, "no_answer", '"message": null'),
        ({"choices": [None]}, "no_answer", "[null]"),
        ({"choices": [], "promptFeedback": {"blockReason": "OTHER"}}, "content_filter", "OTHER"),
        ({"promptFeedback": {"blockReason": "SAFETY"}}, "content_filter", "blockReason: SAFETY"),
        ({"choices": [], "prompt_filter_results": [{"hate": {"filtered": True}}]}, "content_filter", "filtered"),
        ({"error": {"message": "Your prompt was flagged by us."}}, "content_filter", "Your prompt was flagged by us."),
        ({"error": {"code": "data_inspection_failed", "message": "No."}}, "content_filter", "data_inspection_failed"),
        (choice(content=None, refusal="I won't."), "content_filter", "I won't."),
        (choice(content="", refusal="Not that."), "content_filter", "Not that."),
        (choice(content=[{"type": "refusal", "refusal": "Not me."}]), "content_filter", "Not me."),
        ({"choices": [{"finish_reason": "content_filter: SPII"}]}, "content_filter", "SPII"),
        ({"choices": [{"finish_reason": "safety", "message": None}]}, "content_filter", "safety"),
        (choice("error", content="Half an"), "broken_off", "finish_reason error"),
        (choice("insufficient_system_resource", content=""), "broken_off", "insufficient_system_resource"),
        ({**choice("error", content=""), "error": {"message": "GPU lost"}}, "broken_off", "GPU lost"),
        ({**choice(content=""), "error": {"message": "out of cheese"}}, "error_reply", "out of cheese"),
    ],
)  # fmt: skip
def test_a_body_without_an_answer_is_told_in_its_own_words(body, status, words):
    outcome = outcome_of(Raw(json.dumps(body).encode()))
    assert isinstance(outcome, Failure) and (outcome.status, words in outcome.error) == (status, True), outcome
    assert not any(word in outcome.error for word in ("KeyError", "IndexError", "TypeError", "Attribute"))
    with serve_stub({"": [Raw(json.dumps(body).encode())]}) as stub, pytest.raises(UserError) as refused:
        preflight(parse_endpoint(f"{stub.url}#m"), {"messages": REQUEST["messages"]}, timeout=20)
    assert words in str(refused.value)
    assert ("is the path right" in str(refused.value)) == (status in ("malformed", "http_404"))


@pytest.mark.parametrize(
    "more",
    [
        {"error": None},
        {"error": {"code": 0, "message": ""}},
        {"code": 0, "msg": "success"},
        {"errors": [], "success": True},
        {"base_resp": {"status_code": 0, "status_msg": "ok"}},
        {"prompt_filter_results": [{"content_filter_results": {"hate": {"filtered": False}}}]},
        {"detail": "cached", "message": "served from Frankfurt"},
    ],
)
def test_what_stands_beside_an_answer_does_not_take_it_away(more):
    assert error_in({**choice(content="Blue.", refusal=None), **more}) is None
    assert outcome_of(Raw(json.dumps({**choice(content="Blue.", refusal=""), **more}).encode())).text == "Blue."


def test_an_answer_of_nothing_but_reasoning_is_one():
    outcome = outcome_of(Raw(b'{"choices": [{"message": null, "finish_reason": "length"}]}'))
    assert outcome.text == "" and as_answer(outcome)["stop_reason"] == "length"


@pytest.mark.parametrize("body", [b"<html><title>Log in</title>", b"data: {}\n\ndata: [DONE]", b"", b"\xff\xfe no"])
def test_what_is_no_json_is_shown(body):
    with serve_stub({"": [Raw(body)]}) as stub, pytest.raises(UserError) as refused:
        preflight(parse_endpoint(f"{stub.url}#m"), REQUEST, timeout=20)
    shown = " ".join(body.decode("utf-8", "replace").split()) or "nothing"
    assert "malformed: " in str(refused.value) and shown in str(refused.value)


@pytest.mark.parametrize(
    ("code", "words", "status"),
    [
        (403, "Your input was flagged by moderation for harassment.", "content_filter"),
        (403, "Content violates usage guidelines. Failed check: SAFETY_CHECK", "content_filter"),
        (451, "", "content_filter"),
        (451, "Unavailable For Legal Reasons", "content_filter"),
        (400, "Output blocked by content filtering policy", "content_filter"),
        (400, "Content Exists Risk", "content_filter"),
        (400, "Your request was rejected as a result of our safety system.", "content_filter"),
        (400, "The request was rejected because it was considered high risk", "content_filter"),
        (422, "Input data may contain inappropriate content.", "content_filter"),
        (500, "\u8f93\u5165\u5185\u5bb9\u5305\u542b\u654f\u611f\u4fe1\u606f", "content_filter"),
        (451, "Your country or territory is not supported.", "http_451"),
        (403, "Your account was blocked: it violates our usage policy.", "http_403"),
        (403, "This API key has been disabled.", "http_403"),
        (403, "Insufficient credit: top up your balance.", "http_403"),
        (401, "content policy", "http_401"),
        (503, "The moderation service is unavailable.", "http_503"),
        (400, "Could not finish the message because max_tokens or model output limit was reached.", "cut_off"),
        (500, "the request exceeds the available context size", "context"),
        (422, "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000", "context"),
        (400, "Input tokens exceed the configured limit of 272000 tokens.", "context"),
        (400, "adapter not loaded", "http_400"),
        (503, "The request queue exceeded its capacity.", "http_503"),
        (403, "Requests have exceeded the token quota for this context window of a day.", "http_403"),
        (500, "Context length: tokens per minute exceeded, rate limit.", "http_500"),
        (400, "The input contains sensitive content.", "content_filter"),
        (400, "InputTextSensitiveContentDetected", "content_filter"),
        (400, "The request failed because the input text may contain sensitive information.", "content_filter"),
        (400, "input new_sensitive", "content_filter"),
        (400, "Sensitive words were found.", "content_filter"),
        (400, "Your prompt about a seed was flagged: it violates our usage policy.", "content_filter"),
        (400, "Your input is not allowed by our content policy.", "content_filter"),
        (400, "This prompt is prohibited.", "content_filter"),
        (403, "Request blocked: harmful.", "content_filter"),
        (422, "The message was blocked.", "content_filter"),
        (400, "Invalid prompt: your prompt was flagged as potentially violating our usage policy.", "content_filter"),
    ],
)
def test_words_of_an_error_say_more_than_its_status(code, words, status):
    assert outcome_of(Status(code, body=json.dumps({"error": {"message": words}}))).status == status


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (405, "The requested method POST is not allowed for this URL."),
        (405, "Request method POST is prohibited."),
        (404, "The model does not exist; names are case-sensitive"),
        (404, "Content not found: input names are case sensitive."),
        (400, "This request parameter is not allowed: seed"),
        (400, "Invalid input: seed is not allowed"),
        (422, "Extra inputs are not allowed: seed"),
        (400, "Inappropriate value for temperature in the request"),
        (400, "The input parameter top_p is prohibited for this model."),
        (400, "The request contains a disallowed field."),
        (400, "Unsafe value of max_tokens"),
        (400, "The input violates the schema."),
        (400, "Input is case-insensitive and text is whitespace-sensitive"),
        (400, "This message is not allowed here."),
        (400, "omni-moderation-latest does not chat"),
        (415, "Content-Type text/plain is blocked."),
    ],
)
def test_what_speaks_of_the_request_is_no_refusal_of_a_prompt(code, words):
    body = json.dumps({"error": {"message": words, "type": "invalid_request_error", "param": None}})
    assert outcome_of(Status(code, body=body)).status == f"http_{code}"
    error = error_in({"error": {"message": words, "code": code}})
    assert error is not None and error.status == f"http_{code}"


def test_what_may_be_of_the_prompt_and_what_may_pass():
    assert may_be_of_prompt(Failure("http_403", "Forbidden")) and may_be_of_prompt(Failure("no_answer", "{}"))
    for words in ("Your balance is 0.", "Internal error", "rate limit", "API key expired"):
        assert not may_be_of_prompt(Failure("error_reply", words))
    assert not may_be_of_prompt(Failure("http_404", "no such route"))
    passing = {"timeout", "connection", "rate_limited", "broken_off", "http_500", "http_503", "http_408", "not_asked"}
    lasting = {"http_400", "http_401", "http_403", "http_404", "http_501", "content_filter", "malformed", "no_answer"}
    assert {status for status in passing | lasting if may_pass(status)} == passing


@pytest.mark.parametrize(
    ("code", "requests"), [(500, 2), (503, 2), (408, 2), (409, 2), (429, 2), (501, 1), (505, 1), (400, 1), (403, 1)]
)
def test_an_error_with_status_200_is_tried_again_if_it_may_pass(code, requests, monkeypatch):
    monkeypatch.setattr("recipe.evaluation.endpoints.MAX_RETRIES", 1)
    error = Raw(json.dumps({"error": {"message": "Out of cheese.", "code": code}}).encode())
    with serve_stub({"": [error, Say("now")]}) as stub:
        [outcome] = ask(parse_endpoint(f"{stub.url}#m"), [REQUEST], timeout=20)
        assert len(stub.bodies) == requests
    assert (outcome.text == "now") if requests == 2 else (outcome.status == f"http_{code}")


def test_a_server_that_implements_nothing_is_still_asked_everything():
    with serve_stub({"": [Raw(b'{"error": {"message": "Not implemented.", "code": 501}}')]}) as stub:
        outcomes = ask(parse_endpoint(f"{stub.url}#m"), [REQUEST] * 12, timeout=20, concurrency=1)
    assert [outcome.status for outcome in outcomes] == ["http_501"] * 12


def test_long_words_are_cut_in_one_line_without_a_part_of_a_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    words = "\x1b[2J" + "a" * 285 + "\n sk-secret-0123456789 " + "b" * 100
    error = outcome_of(Status(400, body=words)).error
    assert error == "␛[2J" + "a" * 285 + " *** bbb..." and len(error) == 300


def test_words_for_the_end_of_a_response():
    words = {
        "eos": ["stop", "STOP", "end_turn", "stop_sequence"],
        "length": ["length", "MAX_TOKENS", "model_length"],
        "refused": ["content_filter", "SAFETY", "content_filter: PROHIBITED_CONTENT", "refusal", "RECITATION"],
        None: ["tool_calls", "", None, "other"],
    }
    for reason, finish_reasons in words.items():
        assert {stop_reason(word) for word in finish_reasons} == {reason}


def test_an_answer_that_an_error_ends_is_asked_for_again(monkeypatch):
    monkeypatch.setattr("recipe.evaluation.endpoints.MAX_RETRIES", 1)
    with serve_stub({"": [Raw(json.dumps(choice("error", content="Bl")).encode()), Say("Blue.")]}) as stub:
        [outcome] = ask(parse_endpoint(f"{stub.url}#m"), [REQUEST], timeout=20)
        assert outcome.text == "Blue." and len(stub.bodies) == 2
