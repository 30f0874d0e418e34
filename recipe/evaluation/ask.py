"""One model's answers to the records of an evaluation, appended as they come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from recipe.config import ModelArguments, UserError
from recipe.evaluation import answers, endpoints
from recipe.evaluation.failures import OF_PROMPT, Failure, may_be_of_prompt, may_pass
from recipe.reasoning import opened_by, split_scored
from recipe.templates import plain_messages

if TYPE_CHECKING:
    from recipe.adapters import Models
    from recipe.generation import Decoding, Response
    from recipe.templates import Template

Answer = dict[str, Any]


def ask_weights(
    label: str,
    model_args: ModelArguments,
    predictions: Sequence[Mapping[str, Any]],
    path: Path,
    decoding: Decoding,
    batch_size: int,
    template: Template,
    state: PartialState,
    models: Models,
) -> None:
    """Append a model's answers batch by batch, each with how likely the model finds the reference."""
    from recipe.evaluation.likelihood import reference_losses  # here, as below: models take seconds
    from recipe.generation import iter_responses
    from recipe.model import base_model, load_tokenizer, stop_at
    from recipe.tokens import prompt_ids

    tokenizer = load_tokenizer(model_args)
    with models.opened(model_args, tokenizer) as model:
        if not tokenizer.chat_template or tokenizer.chat_template not in template.chat_template:
            stop_at(base_model(model), tokenizer, template)  # with its own template, it stops where `generate` does
        model.to(state.device)
        prompts = prompt_ids(template, tokenizer, predictions)
        references = [prediction["output"] for prediction in predictions]
        bars = [f"{work} ({label})" if state.is_main_process else None for work in ("Reference loss", "Generating")]
        losses = reference_losses(model, tokenizer, prompts, references, batch_size, bars[0], template)
        opened = [opened_by(tokenizer, prompt) for prompt in prompts]
        for indices, responses in iter_responses(model, tokenizer, prompts, decoding, batch_size, bars[1]):
            rows = [as_answer(response, losses[index]) for index, response in zip(indices, responses, strict=True)]
            keep_answers(path, label, [predictions[i] for i in indices], rows, [opened[i] for i in indices])


def ask_endpoint(
    label: str,
    endpoint: endpoints.Endpoint,
    predictions: Sequence[Mapping[str, Any]],
    path: Path,
    decoding: Decoding,
    concurrency: int,
    timeout: float,
    allow_missing: bool,
    others_answered: bool,
) -> list[str]:
    """Append a served model's answers as they come; returns the fields of sampling that the server did not accept.

    A prompt that the server refuses, such as one longer than its context, gets an answer without text and the reason,
    as another request for it would end in the same way; with `allow_missing`, so does one that failed otherwise.

    Raises:
        UserError: other requests failed, or all were refused; it counts those that have no answer, with reasons.
    """
    warm_up = {**endpoints.chat_request("Hello.", decoding), "max_tokens": 1}
    terms = endpoints.preflight(endpoint, warm_up, max(300.0, timeout))
    refused: dict[int, Failure] = {}

    def keep(index: int, outcome: endpoints.Reply | Failure) -> None:
        if isinstance(outcome, endpoints.Reply):
            keep_answers(path, label, [predictions[index]], [endpoints.as_answer(outcome)])
        elif outcome.status in OF_PROMPT or may_be_of_prompt(outcome) or allow_missing:
            refused[index] = outcome

    requests = [terms.fit(endpoints.chat_request(plain_messages(prediction), decoding)) for prediction in predictions]
    outcomes = endpoints.ask(endpoint, requests, keep, concurrency, timeout, description=f"Asking {endpoint} ({label})")
    unexplained = [index for index, outcome in refused.items() if outcome.status not in OF_PROMPT]
    if 2 * len(unexplained) > len(predictions) and not allow_missing:
        refused = {index: outcome for index, outcome in refused.items() if index not in unexplained}
    is_answering = others_answered or len(refused) < len(predictions)
    if is_answering and any(outcome.status not in ("context", "cut_off") for outcome in refused.values()):
        # an account that was closed meanwhile is refused in the same words as a prompt
        is_answering = allow_missing or endpoints.still_answers(endpoint, terms, warm_up, timeout)
    if is_answering or allow_missing:
        keep_answers(path, label, [predictions[i] for i in refused], map(_of_refusal, refused.values()))
    else:  # the fault may be of all requests, not of what they ask
        refused.clear()
    failed = [
        (prediction["id"], outcome)
        for index, (prediction, outcome) in enumerate(zip(predictions, outcomes, strict=True))
        if isinstance(outcome, Failure) and index not in refused
    ]
    if failed:
        raise UserError(_unanswered(endpoint, failed, len(predictions)))
    return terms.left_out


def keep_answers(
    path: Path,
    label: str,
    predictions: Sequence[Mapping[str, Any]],
    rows: Iterable[Mapping[str, Any]],
    opened: Sequence[str] | None = None,
) -> None:
    """Append one model's answers, with their reasoning apart; `opened` are the marks of `opened_by`, if any."""
    references = [prediction["output"] for prediction in predictions]
    opened = opened or [""] * len(references)
    rows = [without_reasoning(*parts) for parts in zip(rows, references, opened, strict=True)]
    answers.append_answers(path, label, predictions, rows)


def without_reasoning(answer: Mapping[str, Any], reference: str, opened: str = "") -> Answer:
    """An answer whose reasoning, `<think>...</think>` before it, is in a field of its own and is not scored.

    >>> without_reasoning({"text": "<think>Plural.</think>cats"}, "cats")
    {'text': 'cats', 'reasoning': 'Plural.'}
    """
    text, reasoning = split_scored(answer["text"], reference, opened)
    if reasoning is None:
        return {**answer}
    before = answer.get("reasoning")
    return {**answer, "text": text, "reasoning": f"{before}\n{reasoning}" if before else reasoning}


def as_answer(response: Response, reference_loss: tuple[float, int] | None) -> Answer:
    """What predictions.jsonl holds of a response."""
    nats, targets = reference_loss or (None, None)
    nats = nats if nats is not None and math.isfinite(nats) else None  # its tokens stay, and tell why it is missing
    return {
        "text": response.text,
        "tokens": len(response.token_ids),
        "stop_reason": response.stop_reason,
        "seconds": round(response.seconds, 4),
        "reference_loss": None if nats is None else round(nats, 4),
        "reference_tokens": targets,
    }


def _of_refusal(failure: Failure) -> Answer:
    """What predictions.jsonl holds of a prompt that the server refused."""
    reason = {"context": "context", "cut_off": "length"}.get(failure.status, "refused")
    return {"text": "", "tokens": None, "stop_reason": reason, "seconds": None, "error": str(failure)}


def _unanswered(endpoint: endpoints.Endpoint, failed: Sequence[tuple[str, Failure]], count: int) -> str:
    """What a user can do about prompts without an answer: the same command only helps if the fault may pass."""
    counts = Counter(failure.status for _, failure in failed)
    first = "\n".join(f"  {id_}: {failure}" for id_, failure in failed[:5])
    same = "the same command, without --overwrite_output_dir, asks for these"
    lasting = [status for status in counts if not may_pass(status)]
    advice = f"{same}, once the cause of {', '.join(lasting)} is removed" if lasting else same
    return (
        f"{endpoint} left {len(failed)} of {count} prompts without an answer "
        f"({', '.join(f'{status} {number}' for status, number in counts.items())}); the first:\n{first}\n"
        f"the others are kept: {advice}; with --endpoint_allow_missing true, those that fail again count as answers "
        "without text"
    )
