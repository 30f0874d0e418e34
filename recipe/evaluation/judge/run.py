"""Scores by a judge: a language model behind an OpenAI-compatible endpoint that grades or compares the responses.

Every id ends with a score or with the reason why it has none, in `judge.jsonl`; usable replies are kept in
`judge_cache.jsonl`, so that another run asks only for what is missing. A mean is refused while scores are missing:
what a judge fails on is not a random sample.

Scoring 0 to 100 is from chapter 7 of "Build a Large Language Model From Scratch"; asking in both orders is from Zheng
et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv:2306.05685).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipe.config import UserError
from recipe.evaluation.comparison import labels_of
from recipe.evaluation.endpoints import USAGE, Endpoint, Failure, Reply, ask, parse_endpoint, preflight, resolve_model
from recipe.evaluation.judge.prompts import JudgePrompt, Verdict, load_judge_prompts
from recipe.evaluation.judge.summary import WITH_VALUE, summarize_pairs, summarize_scores
from recipe.files import write_json_lines

SAMPLING = {"temperature": 0.0, "seed": 123, "max_tokens": 512}
ORDERS = {"baseline_first": ("baseline", "tuned"), "tuned_first": ("tuned", "baseline")}


@dataclass
class JudgeArguments:
    """Whether and how a judge scores the responses."""

    judge: str | None = field(
        default=None,
        metadata={
            "help": "OpenAI-compatible endpoint of a judge, http://host:port/v1#model; its key is read from the "
            "environment variable OPENAI_API_KEY. Default: no judge."
        },
    )
    judge_prompts: list[str] = field(
        default_factory=lambda: ["score_0_100"],
        metadata={"help": "score_0_100, rubric_1_5, pairwise, or the path of a .jinja file that scores; several may."},
    )
    judge_concurrency: int = field(default=4, metadata={"help": "Requests to the judge at the same time."})
    judge_timeout: float = field(default=60.0, metadata={"help": "Seconds until a request is given up or repeated."})
    judge_warmup_timeout: float = field(
        default=300.0, metadata={"help": "Seconds for the first request, which may wait for the model to load."}
    )
    judge_allow_missing: bool = field(
        default=False, metadata={"help": "Give means over the scored responses although scores are missing."}
    )

    def __post_init__(self) -> None:
        if self.judge is not None:
            parse_endpoint(self.judge)
        load_judge_prompts(self.judge_prompts)
        for name in ("judge_concurrency", "judge_timeout", "judge_warmup_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name} {getattr(self, name)}: give a number above 0")


@dataclass(frozen=True)
class Question:
    """One row of `judge.jsonl` to be: what names it, and what is asked or, where nothing needs to be, the verdict."""

    prompt: JudgePrompt
    row: dict[str, str]
    messages: list[dict[str, str]] | None = None
    verdict: Verdict | None = None


def run_judge(
    predictions: Sequence[Mapping[str, Any]], args: JudgeArguments, output_dir: str | Path, max_retries: int = 3
) -> dict[str, Any]:
    """Let the judge score or compare the responses of the first split; its part of `metrics.json`.

    Writes `judge.jsonl` to `output_dir`, also when interrupted, and adds to `judge_cache.jsonl`.

    Args:
        predictions: lines of `predictions.jsonl`: `id`, `instruction`, `input`, `output`, and for each model a `text`.

    Returns:
        `endpoint`, `model`; `complete`: whether every row has a score or a winner; `usage` in tokens, of all replies
        this result rests on; `scores` by prompt, `pairwise` (see `summarize_scores` and `summarize_pairs`); `error`:
        why nothing more could be asked, else None; `labels` and `answers`: whose answers were judged, and their hash.

    Raises:
        UserError: nothing could be asked, nothing is known, and an earlier `judge.jsonl` would be lost.
    """
    endpoint, prompts = parse_endpoint(args.judge or ""), load_judge_prompts(args.judge_prompts)
    headline = [p for p in predictions if p.get("split") == predictions[0].get("split")]
    questions: list[Question] = []
    outcomes: dict[str, Reply | Failure] = {}
    error = None
    try:
        questions += [q for prediction in headline for prompt in prompts for q in _questions(prompt, prediction)]
        if any(prompt.scale is None for prompt in prompts) and "baseline" not in labels_of(headline):
            raise UserError("--judge_prompts pairwise compares two models; name a --baseline")
        endpoint = resolve_model(endpoint, args.judge_warmup_timeout, max_retries)
        _ask_missing(endpoint, questions, outcomes, args, Path(output_dir) / "judge_cache.jsonl", max_retries)
    except UserError as raised:
        error = str(raised)
    finally:
        rows = [_as_row(question, outcomes.get(_key(endpoint, question)), error) for question in questions]
        path = Path(output_dir) / "judge.jsonl"
        if error and not outcomes and path.exists():  # a judge that is down takes nothing back
            raise UserError(f"{error}; the earlier {path} stays")
        write_json_lines(path, rows)
    used = {key for key in (_key(endpoint, question) for question in questions) if key in outcomes}
    usages = [reply.usage or {} for key in used if isinstance(reply := outcomes[key], Reply)]
    pairs = [row for row in rows if "order" in row]
    return {
        "endpoint": endpoint.url,
        "model": endpoint.model,
        "complete": error is None and all(row["status"] in WITH_VALUE for row in rows),
        "usage": {name: sum(usage.get(name, 0) for usage in usages) for name in USAGE},
        "scores": {
            prompt.name: summarize_scores(
                [row for row in rows if row["prompt"] == prompt.name], prompt.scale, args.judge_allow_missing
            )
            for prompt in prompts
            if prompt.scale and rows
        },
        "pairwise": summarize_pairs(pairs, args.judge_allow_missing) if pairs else None,
        "error": error,
        "labels": labels_of(headline),
        "answers": answers_hash(headline, labels_of(headline)),
    }


def answers_hash(predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """What a judgement is about, as a hash: the records of the first split and the texts of these models."""
    first = [p for p in predictions if p.get("split") == predictions[0].get("split")]
    texts = [
        [
            *(p.get(name) for name in ("id", "instruction", "input", "output")),
            *(p.get(n, {}).get("text") for n in labels),
        ]
        for p in first
    ]
    return hashlib.sha256(json.dumps([*labels, texts]).encode()).hexdigest()[:16]


def _questions(prompt: JudgePrompt, prediction: Mapping[str, Any]) -> list[Question]:
    """What to ask of one record: about each model's response, or about a pair in both orders."""
    labels, named = labels_of([prediction]), {"id": prediction["id"], "prompt": prompt.name}
    texts = {label: prediction[label]["text"] for label in labels}
    questions = []
    if prompt.scale is not None:
        for label in labels:
            row = {**named, "model": label}
            if not texts[label].strip():
                questions.append(Question(prompt, row, verdict=Verdict("empty", prompt.scale[0])))
            else:
                questions.append(Question(prompt, row, prompt.messages(prediction, response=texts[label])))
    elif "baseline" in labels:
        for order, (first, second) in ORDERS.items():
            row = {**named, "order": order}
            has_text = [bool(texts[label].strip()) for label in (first, second)]
            if texts[first] == texts[second] and all(has_text):
                questions.append(Question(prompt, row, verdict=Verdict("identical", "tie")))
            elif all(has_text):
                messages = prompt.messages(prediction, response_a=texts[first], response_b=texts[second])
                questions.append(Question(prompt, row, messages))
            else:
                better = "tie" if not any(has_text) else "A" if has_text[0] else "B"
                questions.append(Question(prompt, row, verdict=Verdict("empty", better)))
    return questions


def _key(endpoint: Endpoint, question: Question) -> str:
    """What a reply depends on, as a hash."""
    content = [endpoint.url, endpoint.model, question.prompt.digest, question.messages, SAMPLING]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _ask_missing(
    endpoint: Endpoint,
    questions: Iterable[Question],
    outcomes: dict[str, Reply | Failure],
    args: JudgeArguments,
    cache: Path,
    max_retries: int,
) -> None:
    """Fill `outcomes` from the cache and, for what it lacks, from the endpoint; equal questions are asked once."""
    asked = {_key(endpoint, question): question for question in questions if question.messages is not None}
    cached = read_cache(cache)
    outcomes |= {key: cached[key] for key in asked if key in cached and _is_usable(asked[key], cached[key])}
    missing = {key: question for key, question in asked.items() if key not in outcomes}
    formats = {}
    for prompt in {question.prompt.name: question.prompt for question in missing.values()}.values():
        names = ("response",) if prompt.scale else ("response_a", "response_b")
        example = {"instruction": "Name the colour of a clear sky.", "output": "Blue."}
        plain = {"messages": prompt.messages(example, **dict.fromkeys(names, "Blue.")), **SAMPLING}
        forms = [{**plain, "response_format": prompt.response_format()}, plain]
        formats[prompt.name] = preflight(endpoint, forms, args.judge_warmup_timeout, max_retries)
    keys = list(missing)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with open(cache, "a", encoding="utf-8") as file:

        def keep(index: int, outcome: Reply | Failure) -> None:
            key = keys[index]
            outcomes[key] = outcome
            if isinstance(outcome, Reply) and _is_usable(missing[key], outcome):
                file.write(json.dumps({"key": key, "reply": asdict(outcome)}, ensure_ascii=False) + "\n")
                file.flush()

        requests = [{**formats[q.prompt.name], "messages": q.messages} for q in missing.values()]
        concurrency, timeout = args.judge_concurrency, args.judge_timeout
        ended = ask(endpoint, requests, keep, concurrency, timeout, max_retries, description="Judging")
    outcomes |= zip(keys, ended, strict=True)


def _is_usable(question: Question, reply: Reply) -> bool:
    return question.prompt.read(reply.text, reply.finish_reason).status == "scored"


def read_cache(path: Path) -> dict[str, Reply]:
    """The replies kept by key; a line that a killed run left torn is cut out, so that what is added stays readable."""
    content = path.read_bytes() if path.is_file() else b""
    entries = []
    for line in content.split(b"\n"):
        try:
            entry = json.loads(line)
            entries.append({"key": entry["key"], "reply": asdict(Reply(**entry["reply"]))})
        except (ValueError, TypeError, KeyError):
            continue
    if content and (content.count(b"\n") != len(entries) or not content.endswith(b"\n")):
        write_json_lines(path, entries)
    return {entry["key"]: Reply(**entry["reply"]) for entry in entries}


def _as_row(question: Question, outcome: Reply | Failure | None, error: str | None) -> dict[str, Any]:
    """A line of `judge.jsonl`."""
    reply, failure, verdict = None, None, question.verdict
    if verdict is None:
        if isinstance(outcome, Reply):
            reply, verdict = outcome, question.prompt.read(outcome.text, outcome.finish_reason)
        else:
            failure = outcome or Failure("not_asked", error or "interrupted")
            verdict = Verdict(failure.status)
    value: Any = verdict.value
    if question.prompt.scale is None and value in ("A", "B"):
        value = ORDERS[question.row["order"]]["AB".index(value)]
    return {
        **question.row,
        "status": verdict.status,
        "winner" if question.prompt.scale is None else "score": value,
        "reason": verdict.reason,
        "raw": reply and reply.text,
        "judge": reply and reply.model,
        "usage": reply and reply.usage,
        "error": failure and failure.error,
    }
