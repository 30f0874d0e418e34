"""Which fields a server accepts is found by asking it: stubs on loopback that refuse each field in turn."""

import itertools

import pytest
from stub_endpoint import Raw, Say, Status, serve_stub

from recipe.config import UserError
from recipe.evaluation.endpoints import Reply, ask, chat_request, parse_endpoint, preflight
from recipe.evaluation.negotiation import MOST_TRIES
from recipe.generation import Decoding

pytestmark = pytest.mark.usefixtures("no_retries")
SCHEMA = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": {"type": "object"}}}
MESSAGES = [{"role": "user", "content": "Reply in JSON."}]
REQUEST = {
    "messages": MESSAGES, "temperature": 0.0, "top_p": 0.9, "seed": 1, "max_tokens": 512, "response_format": SCHEMA,
}  # fmt: skip
REFUSED = {  # what a server refuses → what it is sent instead
    "max_tokens": {"max_completion_tokens": 512},
    "seed": {},
    "temperature": {},
    "top_p": {},
    "response_format": {},
}
WORDS = {
    "openai": (400, '{{"error": {{"message": "Unsupported parameter: \'{0}\' is not supported with this model.",'
               ' "param": "{0}", "code": "unsupported_parameter"}}}}'),
    "pydantic": (422, '{{"detail": [{{"type": "extra_forbidden", "loc": ["body", "{0}"], "msg": "Extra inputs"}}]}}'),
    "router": (404, '{{"error": {{"message": "No endpoints found that support the requested parameters."}}}}'),
    "broken": (500, "Internal Server Error"),
    "unimplemented": (501, '{{"error": "not implemented: {0}"}}'),
    "all named": (400, '{{"error": "check temperature, top_p, seed, max_tokens and response_format"}}'),
}  # fmt: skip


# refused with other statuses: only the words tell that it is a field
SAID = {
    "status 200": (200, '{{"error": {{"message": "Unsupported parameter: {0}"}}}}'),
    "status 200, in a field": (200, '{{"error": {{"message": "Not here.", "type": "bad", "param": "{0}"}}}}'),
    "status 200, plain": (200, '{{"code": 40002, "msg": "unknown field {0}"}}'),
    "status 200, pydantic": (200, '{{"detail": [{{"loc": ["body", "{0}"], "msg": "Extra inputs not permitted"}}]}}'),
    "403": (403, '{{"error": "{0} may not be set with your plan"}}'),
    "405": (405, "{0}: not allowed"),
    "413": (413, "field {0} is not supported"),
    "409": (409, "unexpected parameter"),
    "request parameter": (400, "This request parameter is not allowed: {0}"),
    "input": (400, "Invalid input: {0} is not allowed"),
    "inputs": (422, "Extra inputs are not allowed: {0}"),
    "a policy": (403, "the content policy of this server allows no {0}"),
    "503": (503, '{{"error": "unknown argument {0}"}}'),
}  # fmt: skip


def refuse(fields, code, words):
    def answer(body):
        found = [field for field in fields if field in body]
        body = words.format(found[0]) if found else ""
        return None if not found else Raw(body.encode()) if code == 200 else Status(code, body=body)

    return answer


def negotiated(refuses, request=REQUEST):
    """The terms and all requests that were sent for them, without messages and model."""
    with serve_stub({"": [Say("85")]}, refuses=refuses) as stub:
        terms = preflight(parse_endpoint(f"{stub.url}#m"), request, timeout=20)
    return terms, [{name: body[name] for name in body if name not in ("messages", "model")} for body in stub.bodies]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_refused_is_changed_and_no_other(field, words):
    terms, sent = negotiated(refuse([field], *WORDS[words]))
    expected = {**{name: REQUEST[name] for name in REFUSED if name != field}, **REFUSED[field]}
    assert {name: value for name, value in terms.fit(REQUEST).items() if name != "messages"} == expected
    assert terms.left_out == [field] * (field in ("seed", "temperature", "top_p"))
    assert expected in sent and len(sent) <= MOST_TRIES
    if words in ("openai", "pydantic"):  # said by name: nothing else is tried
        assert len(sent) == (3 if field == "response_format" else 2)


@pytest.mark.parametrize("words", SAID)
@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_refused_in_words_is_changed_whatever_the_status(field, words):
    terms, sent = negotiated(refuse([field], *SAID[words]))
    expected = {**{name: REQUEST[name] for name in REFUSED if name != field}, **REFUSED[field]}
    assert {name: value for name, value in terms.fit(REQUEST).items() if name != "messages"} == expected
    assert len(sent) <= MOST_TRIES


@pytest.mark.parametrize(
    "act",
    [
        Status(403, body="Forbidden"),
        Status(401, body="seed"),
        Status(402, body="max_tokens needs credit"),
        Status(429, body="temperature"),
        Raw(b'{"code": 40001, "msg": "Insufficient balance"}'),
        Raw(b'{"choices": []}'),
        Raw(b"<html>seed</html>"),
    ],
)
def test_what_speaks_of_no_field_is_not_negotiated(act):
    with serve_stub({"": [act]}) as stub, pytest.raises(UserError):
        preflight(parse_endpoint(f"{stub.url}#m"), REQUEST, timeout=20)
    assert len(stub.bodies) == 1


@pytest.mark.parametrize(
    "fields, words",
    [*((pair, "broken") for pair in itertools.combinations(REFUSED, 2)), *((tuple(REFUSED), words) for words in WORDS)],
)
def test_several_fields_at_once(fields, words):
    terms, sent = negotiated(refuse(fields, *WORDS[words]))
    fitted = terms.fit(REQUEST)
    assert not set(fields) & set(fitted) and fitted["messages"] == MESSAGES
    kept = {name: REQUEST[name] for name in REFUSED if name not in fields}
    assert kept.items() <= fitted.items()
    assert ("max_completion_tokens" in fitted) == ("max_tokens" in fields) and len(sent) <= MOST_TRIES


def test_a_schema_falls_back_to_an_object_only_where_the_prompt_speaks_of_json():
    def no_schema(body):
        is_schema = body.get("response_format", {}).get("type") == "json_schema"
        return Status(400, body='{"error": "response_format: json_schema is unknown"}') if is_schema else None

    terms, _ = negotiated(no_schema)
    assert terms.fit(REQUEST)["response_format"] == {"type": "json_object"}
    assert "response_format" not in terms.fit({**REQUEST, "messages": [{"role": "user", "content": "An integer."}]})


@pytest.mark.parametrize(
    "value, refused",
    [("temperature", lambda body: body["temperature"] <= 0), ("top_p", lambda body: not 0 < body["top_p"] < 1)],
)
def test_values_of_a_range_are_refused_as_text_generation_inference_does(value, refused):
    def answer(body):
        return Status(422, body=f'{{"error": "`{value}` is out of range"}}') if refused({value: 0.5, **body}) else None

    for decoding, left_out in (
        (Decoding(temperature=0.0), ["temperature"]),
        (Decoding(temperature=0.7, top_p=0.9), []),
        (Decoding(temperature=0.7), []),  # a top_p of 1 is not sent
    ):
        terms, sent = negotiated(answer, chat_request("Hello.", decoding))
        assert terms.left_out == (left_out if value == "temperature" else [])
        assert all(body.get("top_p") != 1 for body in sent)


def test_what_was_found_is_remembered_and_said_once(capsys):
    with serve_stub({"": [Say("85")]}, refuses=refuse(["seed", "temperature"], *WORDS["openai"])) as stub:
        endpoint = parse_endpoint(f"{stub.url}#m")
        first = preflight(endpoint, REQUEST, timeout=20)
        tries = len(stub.bodies)
        assert preflight(endpoint, REQUEST, timeout=20) == first and len(stub.bodies) == tries + 1
        assert first.left_out == ["seed", "temperature"]
        [outcome] = ask(endpoint, [first.fit(REQUEST)])
    assert isinstance(outcome, Reply)
    assert capsys.readouterr().err.count("does not accept seed, temperature: asked without") == 1


@pytest.mark.parametrize(
    "act, message",
    [
        (Status(404, body='{"error": "model m does not exist"}'), "http_404: .*model m does not exist.*know the model"),
        (Status(400, body='{"error": "max_tokens is too large: 512"}'), "http_400: .*max_tokens is too large: 512"),
        (Status(500, body="out of memory"), "http_500: out of memory"),
        (Status(401), "http_401.*OPENAI_API_KEY"),
        (Status(400, body='{"error": {"code": "content_filter", "message": "no"}}'), "content_filter: "),
    ],
)
def test_a_refusal_that_no_change_mends_keeps_its_first_words(act, message):
    with serve_stub({"": [act]}) as stub, pytest.raises(UserError, match=message):
        preflight(parse_endpoint(f"{stub.url}#m"), REQUEST, timeout=20)
    assert len(stub.bodies) <= MOST_TRIES + 1
