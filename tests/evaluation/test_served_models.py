"""What a served model refuses, thinks, or is cut off in: an answer with its reason, and the others are scored."""

import json

import pytest
from stub_endpoint import Raw, Say, Status, serve_stub

from recipe.config import UserError

RECORDS = [{"instruction": f"Say {number}.", "input": "", "output": str(number)} for number in range(4)]


def refusal(message: str, code: int = 400) -> Status:
    return Status(code, body=json.dumps({"error": {"message": message, "type": "invalid_request_error"}}))


def completion(finish_reason: str = "stop", **message) -> Raw:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    return Raw(json.dumps({"id": "1", "object": "chat.completion", "model": "m", "choices": [choice]}).encode())


def run(evaluate, tmp_path, *attempts: dict, flags: tuple[str, ...] = ()) -> list[dict]:
    """The answers to the records, of which the n-th has the acts of the word `do:n`; the last attempt succeeds."""
    tmp_path.mkdir(exist_ok=True)
    records = [{**record, "input": f"do:r{number}"} for number, record in enumerate(RECORDS)]
    (tmp_path / "few.json").write_text(json.dumps(records), encoding="utf-8")
    usual = {"": [Say("hello")]} | {f"r{n}": [Say(str(n))] for n in range(4)}
    with serve_stub(usual) as stub:
        command = ["--model", f"{stub.url}#m", "--data", json.dumps({"test": str(tmp_path / "few.json")}),
                   "--output_dir", tmp_path / "out"]  # fmt: skip
        for acts in attempts[:-1]:
            stub.script = usual | acts
            with pytest.raises(UserError, match="prompts without an answer"):
                evaluate(*command)
        stub.script = usual | attempts[-1]
        evaluate(*command, *flags)
        asked = stub.asked("r1")
        evaluate(*command, *flags)
        assert stub.asked("r1") == asked  # the same command does not ask again what will be refused again
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["tuned"] for line in lines]


@pytest.mark.parametrize(
    ("act", "stop_reason"),
    [
        (refusal("This model's maximum context length is 512 tokens. Your messages resulted in 600."), "context"),
        (refusal("Input is too long: `inputs` must have less than 512 tokens. Given: 600", 422), "context"),
        (refusal("Request too large", 413), "context"),
        (refusal("The response was filtered due to the prompt triggering our content management policy."), "refused"),
        (completion("content_filter", content=""), "refused"),
        (completion("content_filter", content=None), "refused"),
        (completion("content_filter: PROHIBITED_CONTENT", content=""), "refused"),
        (completion(content=None, refusal="I will not say 1."), "refused"),
        (refusal("Your input was flagged by moderation.", 403), "refused"),
        (Status(451, body=""), "refused"),
        (Status(403, body="<html>Forbidden</html>"), "refused"),
        (Raw(b'{"error": {"message": "Your prompt was flagged as unsafe."}}'), "refused"),
        (Raw(b'{"error": {"message": "No such luck."}}'), "refused"),
        (Raw(b'{"choices": null}'), "refused"),
        (Raw(b'{"choices": []}'), "refused"),
        (Raw(b'{"candidates": [], "promptFeedback": {"blockReason": "SAFETY"}}'), "refused"),
        (Raw(b'{"choices": [{"message": null, "finish_reason": "stop"}]}'), "refused"),
        (Raw(b'{"error": {"message": "prompt is too long: 9000 tokens"}}'), "context"),
    ],
)  # fmt: skip
def test_a_prompt_that_the_server_refuses_is_an_answer_with_its_reason(act, stop_reason, evaluate, tmp_path):
    answers = run(evaluate, tmp_path, {"r1": [act]})
    assert [answer["text"] for answer in answers] == ["0", "", "2", "3"]
    assert answers[1]["stop_reason"] == stop_reason
    if not isinstance(act, Raw) or "content_filter" not in act.body.decode():  # else an answer, which the filter cut
        assert answers[1]["error"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["metrics"]["exact_match"]["tuned"] == 0.75 and metrics["behaviour"]["empty_rate"]["tuned"] == 0.25
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    ending = {
        "context": "reached the end of the context",
        "refused": "were refused by the server, or cut by its filter",
    }
    assert "1 of 4 responses (25.0\N{NO-BREAK SPACE}%) of the tuned model" in page and ending[stop_reason] in page


def test_a_server_that_refuses_most_prompts_without_a_reason_has_another_fault(evaluate, tmp_path):
    broken = {f"r{n}": [refusal("adapter not loaded")] for n in range(3)}
    with pytest.raises(UserError, match=r"left 3 of 4 prompts without an answer \(http_400 3\)"):
        run(evaluate, tmp_path, broken)
    answers = run(evaluate, tmp_path / "one", {"r1": [refusal("adapter not loaded")]})
    assert [answer["text"] for answer in answers] == ["0", "", "2", "3"] and answers[1]["stop_reason"] == "refused"


@pytest.mark.parametrize(
    "act",
    [
        Raw(b'{"choices": []}'),
        Raw(b'{"error": {"message": "Your prompt was flagged."}}'),
        completion(content=None, refusal="No."),
        refusal("flagged by moderation", 403),
        Status(451),
    ],
)
def test_a_server_that_refuses_every_prompt_is_at_fault(act, evaluate, tmp_path):
    with pytest.raises(UserError, match=r"left 4 of 4 prompts without an answer") as reported:
        run(evaluate, tmp_path, {f"r{n}": [act] for n in range(4)})
    assert "once the cause of" in str(reported.value)  # the same command alone would end in the same way


@pytest.mark.parametrize(
    "closed",
    [refusal("Forbidden", 403), refusal("policy violation: content of your uploads", 403), Raw(b'{"choices": []}')],
)
def test_a_server_that_refuses_everything_from_some_prompt_on_is_at_fault(closed, evaluate, tmp_path):
    """As one that closes an account: what it says may be what it says of a prompt."""
    warm_up = [Say("hello"), closed]
    with pytest.raises(UserError, match=r"left 1 of 4 prompts without an answer"):
        run(evaluate, tmp_path, {"r1": [closed], "": warm_up})


@pytest.mark.parametrize(
    "act", [Raw(b'{"code": 40001, "msg": "Insufficient balance"}'), refusal("Your API key was disabled.", 403)]
)
def test_what_is_wrong_with_the_account_is_no_answer(act, evaluate, tmp_path):
    with pytest.raises(UserError, match=r"left 1 of 4 prompts without an answer[^$]*once the cause of"):
        run(evaluate, tmp_path, {"r1": [act]})


def test_where_all_prompts_are_refused_the_fault_is_not_theirs(evaluate, tmp_path):
    everywhere = {f"r{n}": [refusal("adapter not loaded")] for n in range(4)}
    with pytest.raises(UserError, match=r"left 4 of 4 prompts without an answer \(http_400 4\)[^$]*adapter not loaded"):
        run(evaluate, tmp_path, everywhere)


@pytest.mark.parametrize(
    "act",
    [
        Say("<think>Is it 1?\n\n2?</think>\n\n1"),
        Say("It must be 1.</think>1"),
        completion(content="1", reasoning_content="Is it 1?"),
        completion(content="1", reasoning="Is it 1?"),
        completion(
            content="<|channel|>analysis<|message|>Is it 1?<|end|><|start|>assistant<|channel|>final<|message|>1"
        ),
    ],
)
def test_reasoning_is_kept_apart_and_shown(act, evaluate, tmp_path):
    answers = run(evaluate, tmp_path, {"r1": [act]})
    assert [answer["text"] for answer in answers] == ["0", "1", "2", "3"]
    assert "1" in answers[1]["reasoning"] and "reasoning" not in answers[0]
    assert "Reasoning, not scored" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_reasoning_that_is_cut_off_leaves_an_empty_answer(evaluate, tmp_path):
    answers = run(evaluate, tmp_path, {"r1": [Say("<think>Is it 1", finish_reason="length")]})
    assert answers[1]["text"] == "" and answers[1]["stop_reason"] == "length" and answers[1]["reasoning"] == "Is it 1"


def test_what_fails_otherwise_is_asked_again_or_counted_as_unanswered(evaluate, tmp_path):
    broken = {"r1": [refusal("no such route", 404)], "r2": [refusal("not implemented", 501)]}
    with pytest.raises(UserError, match=r"left 2 of 4 prompts [^$]*--endpoint_allow_missing true"):
        run(evaluate, tmp_path, broken)
    answers = run(evaluate, tmp_path / "again", broken, broken, flags=("--endpoint_allow_missing", "true"))
    assert [answer["text"] for answer in answers] == ["0", "", "", "3"]
    assert [answer["stop_reason"] for answer in answers] == ["eos", "refused", "refused", "eos"]
    assert answers[1]["error"].startswith("http_404") and "no such route" in answers[1]["error"]


def test_refusals_that_are_all_that_is_left_do_not_block_an_evaluation(evaluate, tmp_path):
    """Of four records one failed in the first run; in the second the server refuses it."""
    late = [{"r1": [Status(404)]}, {"r1": [refusal("maximum context length is 512 tokens")]}]
    answers = run(evaluate, tmp_path, *late)
    assert [answer["text"] for answer in answers] == ["0", "", "2", "3"] and answers[1]["stop_reason"] == "context"
