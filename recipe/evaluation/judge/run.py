"""Scores by a judge: a language model behind an OpenAI-compatible endpoint that grades or compares the responses.

Every id ends with a score or with the reason why it has none, in `judge.jsonl`. Usable replies are kept in
`judge_cache.jsonl`, so that another run asks only for what is missing. While scores are missing no mean is given:
what a judge fails on is not a random sample.

Scoring 0 to 100 is from chapter 7 of "Build a Large Language Model From Scratch"; asking in both orders is from Zheng
et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv:2306.05685).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from recipe.config import UserError, setting
from recipe.evaluation.answers import append_lines
from recipe.evaluation.comparison import labels_of
from recipe.evaluation.endpoints import USAGE, Endpoint, EndpointError, Reply, ask, parse_endpoint, preflight
from recipe.evaluation.failures import Failure
from recipe.evaluation.judge.prompts import JudgePrompt, load_judge_prompts
from recipe.evaluation.judge.reading import Verdict
from recipe.evaluation.judge.summary import WITH_VALUE, missing_advice, summarize_pairs, summarize_scores
from recipe.files import SEAL, file_hash, is_there, own_hash, parse_json, read_file, sealed, write_json_lines
from recipe.shapes import COUNT, fits
from recipe.templates import transcript

MORE_TOKENS = (4, 16)  # times as many for what was cut off: reasoning takes some thousands
SAMPLING = {"temperature": 0.0, "seed": 123, "max_tokens": 512}
TEXT = (None, str)
REPLY = {
    "text": str, "finish_reason": TEXT, "model": TEXT, "usage": (None, dict.fromkeys(USAGE, COUNT)), "seconds": float,
    "reasoning?": TEXT,
}  # fmt: skip
ENTRY = {"key": str, "reply": REPLY, "left_out?": [str]}  # of the cache; see `recipe.shapes`
ORDERS = {"baseline_first": ("baseline", "tuned"), "tuned_first": ("tuned", "baseline")}


@dataclass
class JudgeArguments:
    """Whether and how a judge scores the responses."""

    judge: str | None = setting(
        None, "OpenAI-compatible endpoint, http://host:port/v1#model, its key as --judge_key_env says. Default: none."
    )
    judge_key_env: str | None = setting(
        None,
        "Environment variable with the judge's key. Default: OPENAI_API_KEY, which is sent to api.openai.com, "
        "OPENAI_BASE_URL and this machine only.",
    )
    judge_prompts: list[str] = setting(
        lambda: ["score_0_100"],
        "score_0_100, rubric_1_5, pairwise, or the path of a .jinja file that scores; several may.",
    )
    judge_concurrency: int = setting(4, "Requests to the judge at the same time.")
    judge_timeout: float = setting(60.0, "Seconds until a request is given up or repeated.")
    judge_warmup_timeout: float = setting(300.0, "Seconds for the first request, while the model may still load.")
    judge_max_tokens: int = setting(
        512,
        "Tokens of a reply, reasoning included. One that is cut off is asked for again with 4 and 16 times as many.",
    )
    judge_allow_missing: bool = setting(False, "Give means although scores are missing.")

    def __post_init__(self) -> None:
        if self.judge is not None:
            self.endpoint()
        elif self.judge_key_env is not None:
            raise UserError(
                "--judge_key_env: there is no judge whose key it names; name one with --judge, or leave it out"
            )
        load_judge_prompts(self.judge_prompts)
        for name in ("judge_concurrency", "judge_timeout", "judge_warmup_timeout", "judge_max_tokens"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name} {getattr(self, name)}: give a number above 0")

    def endpoint(self) -> Endpoint:
        """The judge with its key."""
        named = [] if self.judge_key_env is None else [self.judge_key_env]
        return parse_endpoint(self.judge or "", named, flag="--judge_key_env")


@dataclass(frozen=True)
class Question:
    """What a row of `judge.jsonl` asks: the fields that name it, the messages, and the verdict if none are needed."""

    prompt: JudgePrompt
    row: dict[str, str]
    messages: list[dict[str, str]]
    verdict: Verdict | None
    shown: tuple[str, ...] = ()  # texts in the messages that a reply may quote

    def key(self, endpoint: Endpoint) -> str:
        """A hash of all that the reply depends on."""
        content = [endpoint.url, endpoint.model, self.prompt.digest, self.messages, SAMPLING]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def read(self, outcome: Reply | Failure | None) -> Verdict:
        """The verdict of a reply, or the reason why there is none."""
        if isinstance(outcome, Reply):
            return self.prompt.read(outcome.text, outcome.finish_reason, self.shown)
        return Verdict(outcome.status if outcome else "not_asked")


def run_judge(predictions: Sequence[Mapping[str, Any]], args: JudgeArguments, output_dir: Path) -> dict[str, Any]:
    """Let the judge score or compare the responses of the first split; the result is its part of `metrics.json`.

    Writes `judge.jsonl` to `output_dir`, also when interrupted, and adds to `judge_cache.jsonl`.

    Args:
        predictions: lines of `predictions.jsonl`: `id`, `instruction`, `input`, `output`, and for each model a `text`.

    Returns:
        `endpoint`, `model`; `complete`: whether every row has a score or a winner; `usage` in tokens, of all replies
        that this result uses; `scores` by prompt, `pairwise` (see `summarize_scores` and `summarize_pairs`); `error`:
        why nothing more could be asked, else None; `left_out`: fields of sampling that the judge does not accept;
        `advice`: what can help against what is missing, else None; `labels` and `answers`: whose answers were judged,
        and their hash; `rows_hash`: that of `judge.jsonl`.

    Raises:
        UserError: nothing could be asked, no reply is known, and an earlier `judge.jsonl` would be lost.
    """
    endpoint, prompts = args.endpoint(), load_judge_prompts(args.judge_prompts)
    predictions, path = _first_split(predictions), output_dir / "judge.jsonl"
    questions = [q for prediction in predictions for prompt in prompts for q in _questions(prompt, prediction)]
    outcomes: dict[str, Reply | Failure] = {}
    error, may_be_asked, left_out = None, True, []
    try:
        if any(prompt.scale is None for prompt in prompts) and "baseline" not in labels_of(predictions):
            raise UserError("--judge_prompts pairwise compares two models; name a --baseline")
        left_out = _ask_missing(endpoint, questions, outcomes, args, output_dir / "judge_cache.jsonl")
    except UserError as raised:
        error, may_be_asked = str(raised), isinstance(raised, EndpointError) and raised.may_pass
    finally:
        not_asked = Failure("not_asked", error or "interrupted")
        rows = [_as_row(question, outcomes.get(question.key(endpoint), not_asked)) for question in questions]
        if error and not outcomes and path.exists():
            raise UserError(f"{error}; the earlier {path} stays")
        write_json_lines(path, rows)
    usages = [outcome.usage for outcome in outcomes.values() if isinstance(outcome, Reply) and outcome.usage]
    pairs = [row for row in rows if "order" in row]
    return {
        "endpoint": endpoint.url,
        "model": endpoint.model,
        "complete": error is None and all(row["status"] in WITH_VALUE for row in rows),
        "usage": {name: sum(usage[name] for usage in usages) for name in USAGE},
        "scores": {
            prompt.name: summarize_scores(
                [row for row in rows if row["prompt"] == prompt.name], prompt.scale, args.judge_allow_missing
            )
            for prompt in prompts
            if prompt.scale and rows
        },
        "pairwise": summarize_pairs(pairs, args.judge_allow_missing) if pairs else None,
        "error": error,
        "left_out": left_out,
        "advice": missing_advice(rows, MORE_TOKENS[-1] * args.judge_max_tokens, may_be_asked),
        "labels": labels_of(predictions),
        "answers": answers_hash(predictions, labels_of(predictions)),
        "rows_hash": file_hash(path),
    }


def answers_hash(predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """A hash of what is judged: the records of the first split and the responses of these models."""
    texts = [
        [*map(p.get, ("id", "instruction", "input", "output")), *(p.get(label, {}).get("text") for label in labels)]
        + ([p["messages"]] if "messages" in p else [])
        for p in _first_split(predictions)
    ]
    return hashlib.sha256(json.dumps([*labels, texts]).encode()).hexdigest()[:16]


def _first_split(predictions: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [p for p in predictions if p.get("split") == predictions[0].get("split")]


def _questions(prompt: JudgePrompt, prediction: Mapping[str, Any]) -> list[Question]:
    """What to ask about one record: each model's response, or base and tuned in both orders."""
    labels = labels_of([prediction])
    if prompt.scale is not None:
        asked = [({"model": label}, {"response": label}) for label in labels]
    else:
        pairs = ORDERS.items() if "baseline" in labels else ()
        asked = [({"order": order}, {"response_a": a, "response_b": b}) for order, (a, b) in pairs]
    questions = []
    for name, label_by_part in asked:
        row = {"id": prediction["id"], "prompt": prompt.name, **name}
        responses = {part: prediction[label]["text"] for part, label in label_by_part.items()}
        verdict = _verdict_without_judge(prompt, *responses.values())
        shown = (*responses.values(), *(prediction.get(name) or "" for name in ("instruction", "input", "output")))
        shown += (transcript(prediction),)
        questions.append(Question(prompt, row, prompt.messages(prediction, **responses), verdict, shown))
    return questions


def _verdict_without_judge(prompt: JudgePrompt, *responses: str) -> Verdict | None:
    """An empty response has the lowest score and loses; two empty or equal ones are a tie; else the judge decides."""
    is_empty = [not response.strip() for response in responses]
    if any(is_empty):
        winner = "tie" if all(is_empty) else "B" if is_empty[0] else "A"
        return Verdict("empty", prompt.scale[0] if prompt.scale else winner)
    return Verdict("identical", "tie") if len(set(responses)) < len(responses) else None


def _ask_missing(
    endpoint: Endpoint,
    questions: Sequence[Question],
    outcomes: dict[str, Reply | Failure],
    args: JudgeArguments,
    cache: Path,
) -> list[str]:
    """Add outcomes by key from the cache and, for what it lacks, from the endpoint; equal questions are asked once.

    Returns:
        The fields of sampling that the endpoint does not accept.
    """
    asked = {question.key(endpoint): question for question in questions if question.verdict is None}
    cached = read_cache(cache)
    known = {key: cached[key] for key, question in asked.items() if question.read(cached.get(key)).value is not None}
    outcomes |= known
    fields = [field for key, left_out in _left_out_in(cache).items() if key in known for field in left_out]
    missing = {key: question for key, question in asked.items() if key not in known}
    if not missing:
        return list(dict.fromkeys(fields))
    terms = {
        prompt: preflight(endpoint, _example_request(prompt, args.judge_max_tokens), args.judge_warmup_timeout)
        for prompt in dict.fromkeys(question.prompt for question in missing.values())
    }
    cache.parent.mkdir(parents=True, exist_ok=True)

    def ask_for(wanted: Mapping[str, Question], tokens: int) -> dict[str, Reply | Failure]:
        keys, more = list(wanted), "" if tokens == args.judge_max_tokens else f", with up to {tokens:,} tokens"

        def keep(index: int, outcome: Reply | Failure) -> None:
            key = keys[index]
            if isinstance(outcome, Reply) or key not in outcomes:  # a reply stays, although it was cut off
                outcomes[key] = outcome
            if isinstance(outcome, Reply) and wanted[key].read(outcome).value is not None:
                entry = {"key": key, "reply": asdict(outcome), "left_out": terms[wanted[key].prompt].left_out}
                append_lines(cache, [sealed(entry)])

        requests = [
            terms[q.prompt].fit({**_request(q.prompt, tokens), "messages": q.messages}) for q in wanted.values()
        ]
        ended = ask(endpoint, requests, keep, args.judge_concurrency, args.judge_timeout, description=f"Judging{more}")
        return dict(zip(keys, ended, strict=True))

    ended = ask_for(missing, args.judge_max_tokens)
    outcomes |= ended  # also those that were not sent
    for factor in MORE_TOKENS:
        cut = {key: q for key, q in missing.items() if q.read(ended.get(key)).status == "cut_off"}
        ended = ask_for(cut, factor * args.judge_max_tokens) if cut else {}
    return list(dict.fromkeys([*fields, *(field for found in terms.values() for field in found.left_out)]))


def _request(prompt: JudgePrompt, max_tokens: int) -> dict[str, Any]:
    return {**SAMPLING, "max_tokens": max_tokens, "response_format": prompt.response_format()}


def _example_request(prompt: JudgePrompt, max_tokens: int) -> dict[str, Any]:
    """A request about an example."""
    names = ("response",) if prompt.scale else ("response_a", "response_b")
    example = {"instruction": "Name the colour of a clear sky.", "output": "Blue."}
    return {**_request(prompt, max_tokens), "messages": prompt.messages(example, **dict.fromkeys(names, "Blue."))}


def read_cache(path: Path) -> dict[str, Reply]:
    """The replies in the cache by key; a line that a killed run left incomplete, or that was changed, is skipped."""
    return {key: reply for key, reply, _ in _entries(path)}


def _left_out_in(path: Path) -> dict[str, list[str]]:
    """Which fields of sampling the requests of the replies in the cache were sent without."""
    return {key: left_out for key, _, left_out in _entries(path)}


def _entries(path: Path) -> Iterator[tuple[str, Reply, list[str]]]:
    for line in read_file(path).split(b"\n") if is_there(path) else []:
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if fits(entry, ENTRY) and entry.get(SEAL, own_hash(entry)) == own_hash(entry):
            yield (
                entry["key"],
                Reply(**{field.name: entry["reply"].get(field.name) for field in fields(Reply)}),
                entry.get("left_out", []),
            )


def _as_row(question: Question, outcome: Reply | Failure) -> dict[str, Any]:
    """A line of `judge.jsonl`."""
    details: dict[str, Any] = dict.fromkeys(("raw", "judge", "usage", "error"))
    if question.verdict:
        verdict = question.verdict
    elif isinstance(outcome, Reply):
        verdict = question.read(outcome)
        details |= {"raw": outcome.text, "judge": outcome.model, "usage": outcome.usage}
    else:
        verdict = question.read(outcome)
        details["error"] = outcome.error
    name, value = "score", verdict.value
    if question.prompt.scale is None:
        first, second = ORDERS[question.row["order"]]
        name, value = "winner", {"A": first, "B": second}.get(str(value), value)
    return {**question.row, "status": verdict.status, name: value, "reason": verdict.reason, **details}
