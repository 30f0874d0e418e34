"""Which models answer which records, and their answers: the generate stage of an evaluation."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState

from recipe.config import DataArguments, ModelArguments, UserError
from recipe.evaluation import answers, endpoints
from recipe.files import file_hash, read_json, write_json
from recipe.provenance import command_line, hardware, versions, weights_hash

if TYPE_CHECKING:
    from datasets import DatasetDict

    from recipe.generation import Decoding, Response
    from recipe.templates import Template

STAGES = ("generate", "score", "judge", "report")
RESERVED = ("baseline", "tuned", "base", "id", "split", *answers.RECORD_FIELDS)  # no further model's name
WRITTEN = (  # by an evaluation, but for judge_cache.jsonl, whose replies are good for any
    "predictions.jsonl", "evaluation.json", "metrics.json", "model-index.yml", "judge.jsonl", "report.html",
    "deltas.png", "outcomes.png", "lengths.png", "loss.png",
)  # fmt: skip


@dataclass
class EvalArguments:
    """Which models answer which records, and what is made of the answers."""

    model: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The fine-tuned model, and further ones to set beside it. Each a folder or Hub id, an "
            "OpenAI-compatible endpoint (http://localhost:8000/v1#name), a file of recorded answers, or `echo`."
        },
    )
    baseline: str | None = field(default=None, metadata={"help": "What to compare with, in the same forms."})
    split: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Splits to score, each apart; or `all` records as one. Default: test, and all of recorded answers."
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where answers, scores and report go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start over in an output_dir that holds another evaluation."}
    )
    stages: list[str] = field(
        default_factory=lambda: list(STAGES),
        metadata={"help": "Stages to run, each from the files of those before: generate score judge report."},
    )
    gate: list[str] = field(
        default_factory=list, metadata={"help": "Conditions such as exact_match>=0.8; the exit is 1 if one fails."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Cap on each response, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "0 for greedy decoding; above, sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the sampling."})
    seed: int = field(default=123, metadata={"help": "Seed of the sampling."})
    batch_size: int = field(default=32, metadata={"help": "Prompts generated together on each process."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the weights; auto: bfloat16 on a GPU that has it, else float32."}
    )
    endpoint_concurrency: int = field(default=8, metadata={"help": "Requests a served model answers at once."})
    endpoint_timeout: float = field(default=120.0, metadata={"help": "Seconds a served model has for an answer."})

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "endpoint_concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"--temperature {self.temperature} --top_p {self.top_p}: give a temperature from 0 up, and a top_p "
                "above 0 and up to 1"
            )
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown:
            raise UserError(f"--stages {' '.join(unknown)}: there are {', '.join(STAGES)}")
        if self.output_dir is None:
            raise UserError("say where the results go: --output_dir")
        if not self.model and "generate" in self.stages:
            raise UserError("say what to score: --model")
        if self.stages == ["generate"] and self.gate:
            raise UserError("--gate needs scores: add the score stage")
        files = [name for name in [*self.model, self.baseline or ""] if answers.is_answer_file(name)]
        if self.overwrite_output_dir and any(
            Path(name).resolve().parent == Path(self.output_dir).resolve() for name in files
        ):
            raise UserError(
                f"--overwrite_output_dir would remove {', '.join(files)}, which is to be scored; name another "
                "--output_dir"
            )
        if self.dtype == "auto":
            gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            self.dtype = "bfloat16" if gpu else "float32"


def generate(args: EvalArguments, data_args: DataArguments, run: dict | None, state: PartialState) -> None:
    """Append every answer that is not there yet to predictions.jsonl, then join its lines by record."""
    from recipe.data.split import data_hash  # here, as below: datasets and models take seconds, and --help needs none
    from recipe.templates import load_template

    with state.main_process_first():  # the others read its cache
        records, predictions = select_records(args, data_args, run)
    models = {label: resolve(name, args) for label, name in name_models(args).items()}
    template = load_template(data_args.template)
    output_dir, decoding = Path(args.output_dir or ""), decoding_of(args)
    evaluation: dict[str, Any] = {
        "models": {label: {"name": public_name(name), "weights": identify(name)} for label, name in models.items()},
        "data": data_args.data or args.model[0],
        "data_hash": data_hash(records),
        "splits": {name: sum(p["split"] == name for p in predictions) for name in split_names(predictions)},
        "template_name": template.name,
        "template": template.chat_template,
        "generation": {**asdict(decoding), "dtype": args.dtype},
        "command": command_line(),
        "versions": versions(),
        "hardware": hardware(),
    }
    path = output_dir / "predictions.jsonl"
    if not args.overwrite_output_dir:
        evaluation = go_on(output_dir, evaluation, [p["id"] for p in predictions])
    state.wait_for_everyone()  # all have looked
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if args.overwrite_output_dir:
            for name in WRITTEN:
                (output_dir / name).unlink(missing_ok=True)
        write_json(output_dir / "evaluation.json", evaluation)
    state.wait_for_everyone()
    for label, name in models.items():
        answered = answers.read_answers(path)
        missing = [p for p in predictions if label not in answered.get(p["id"], {})]
        state.wait_for_everyone()  # all have read before one writes
        if len(missing) < len(predictions):
            state.print(f"{len(predictions) - len(missing)} of {len(predictions)} answers of {label} are there already")
        if missing:
            ask(label, name, missing, path, args, template, state)
        state.wait_for_everyone()
    if state.is_main_process:
        answers.settle(path, predictions, list(evaluation["models"]))


def select_records(
    args: EvalArguments, data_args: DataArguments, run: dict[str, Any] | None
) -> tuple[DatasetDict, list[dict[str, Any]]]:
    """The records of the named splits, and their predictions without answers.

    Warns if they are no longer those the model was trained beside.
    """
    from datasets import DatasetDict  # here: datasets takes a second, and --help needs none of it

    from recipe.data import load_records
    from recipe.data.split import data_hash

    files = [name for name in args.model if answers.is_answer_file(name)]
    if data_args.data is None and files:  # recorded answers bring their records along
        records, predictions, _ = answers.read_answer_file(files[0])
        names = split_names(predictions) if args.split in ([], ["all"]) else args.split
        check_split(args.split, split_names(predictions))
        return records, [prediction for prediction in predictions if prediction["split"] in names]
    records, _ = load_records(data_args)
    if run and run["config"]["data"]["data"] == data_args.data and run["data_hash"] != data_hash(records):
        print(
            "warning: the data or its split changed since this model was trained; it may have seen these records",
            file=sys.stderr,
        )
    if args.split != ["all"]:
        names = args.split or ["test"]
        check_split(names, list(records))
        records = DatasetDict({name: records[name] for name in names})
    empty = [name for name in records if not len(records[name])]
    if empty:
        raise UserError(f"--split {' '.join(empty)}: no records in it; name another, or give a larger --test_ratio")
    return records, answers.as_predictions(records, merged=args.split == ["all"])


def check_split(names: list[str], known: list[str]) -> None:
    unknown = [name for name in names if name not in known and names != ["all"]]
    if unknown:
        raise UserError(f"--split {' '.join(unknown)}: the data has {', '.join(known)}; name one, or all")


def resolve(name: str, args: EvalArguments) -> str:
    """A model's name; of an endpoint that lists one model, with that model, which is asked and written down."""
    if not endpoints.is_endpoint(name) or "#" in name:
        return name
    return f"{name}#{endpoints.resolve_model(endpoints.parse_endpoint(name), args.endpoint_timeout).model}"


def public_name(name: str) -> str:
    """A model's name without the credentials of an endpoint."""
    return str(endpoints.parse_endpoint(name)) if endpoints.is_endpoint(name) else name


def identify(name: str) -> str | None:
    """What tells this model's answers from those of another of the same name."""
    if name == answers.ECHO or endpoints.is_endpoint(name):
        return None
    return file_hash(name) if answers.is_answer_file(name) else weights_hash(name)


def go_on(output_dir: Path, evaluation: dict[str, Any], ids: list[str]) -> dict[str, Any]:
    """This evaluation with the other models of which the folder holds all answers.

    Raises:
        UserError: the folder holds answers to other questions, or of other models under the same names.
    """
    advice = "add --overwrite_output_dir to start over, or name another --output_dir"
    path = output_dir / "evaluation.json"
    answered = answers.read_answers(output_dir / "predictions.jsonl")
    if not answered:
        return evaluation
    if not path.is_file():
        raise UserError(f"{output_dir} holds answers, but no evaluation.json that says of what; {advice}")
    earlier, models = read_json(path), evaluation["models"]
    try:
        changed = [key for key in ("data_hash", "template", "generation") if earlier[key] != evaluation[key]]
        kept = dict(models)
        for label, model in earlier["models"].items():
            count = sum(label in answered.get(id_, {}) for id_ in ids)
            if label in models and model != models[label] and count:
                changed.append(f"model {label!r}")
            elif label not in models and count == len(ids):
                kept[label] = model
            elif label not in models and count:
                print(f"{count} of {len(ids)} answers of {label}, which is not asked now, are left out")
        commands = earlier["command"].split("\n")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not what an evaluation writes ({error!r}); {advice}") from error
    if changed:
        raise UserError(f"{output_dir} holds an evaluation with another {', '.join(changed)}; {advice}")
    order = sorted(kept, key=lambda label: ("baseline", "tuned", label).index(label))
    command = "\n".join(dict.fromkeys([*commands, evaluation["command"]]))
    return {**evaluation, "models": {label: kept[label] for label in order}, "command": command}


def ask(
    label: str,
    name: str,
    predictions: list[dict[str, Any]],
    path: Path,
    args: EvalArguments,
    template: Template,
    state: PartialState,
) -> None:
    """Append one model's answers to `predictions`; each process asks for a share of them."""
    ids = [prediction["id"] for prediction in predictions]
    if answers.is_answer_file(name):
        if state.is_main_process:
            answers.append_answers(path, ids, label, answers.pair_answers(name, predictions))
    elif name == answers.ECHO:
        if state.is_main_process:
            answers.append_answers(path, ids, label, map(answers.echo, predictions))
    elif endpoints.is_endpoint(name):
        if state.is_main_process:
            ask_endpoint(label, name, predictions, path, args)
    else:
        with state.split_between_processes(predictions) as mine:
            try:
                ask_weights(label, name, mine, path, args, template, state)
            except UserError as error:
                if not state.is_main_process:  # the main process says its own
                    print(f"error: process {state.process_index}: {error}", file=sys.stderr, flush=True)
                raise


def ask_weights(
    label: str,
    name: str,
    predictions: list[dict[str, Any]],
    path: Path,
    args: EvalArguments,
    template: Template,
    state: PartialState,
) -> None:
    from recipe.evaluation.likelihood import reference_losses
    from recipe.generation import iter_responses
    from recipe.model import load_model, load_tokenizer
    from recipe.templates import load_template

    model_args = ModelArguments(model_name_or_path=name, dtype=args.dtype)  # type: ignore[arg-type]  # auto is resolved
    tokenizer = load_tokenizer(model_args)
    model, _ = load_model(model_args, tokenizer)
    model.to(state.device)
    prompts = load_template(template.name, tokenizer).prompts(predictions)
    show = state.is_main_process
    losses = reference_losses(
        model,
        tokenizer,
        prompts,
        [prediction["output"] for prediction in predictions],
        batch_size=args.batch_size,
        description=f"Reference loss ({label})" if show else None,
    )
    for indices, responses in iter_responses(
        model, tokenizer, prompts, decoding_of(args), args.batch_size, f"Generating ({label})" if show else None
    ):
        rows = [as_answer(response, losses[index]) for index, response in zip(indices, responses, strict=True)]
        answers.append_answers(path, [predictions[index]["id"] for index in indices], label, rows)


def as_answer(response: Response, reference_loss: tuple[float, int] | None) -> dict[str, Any]:
    """What predictions.jsonl holds of a response."""
    nats, targets = reference_loss or (None, None)
    return {
        "text": response.text,
        "tokens": len(response.token_ids),
        "stop_reason": response.stop_reason,
        "seconds": round(response.seconds, 4),
        "reference_loss": None if nats is None else round(nats, 4),
        "reference_tokens": targets,
    }


def ask_endpoint(label: str, name: str, predictions: list[dict[str, Any]], path: Path, args: EvalArguments) -> None:
    endpoint = endpoints.resolve_model(endpoints.parse_endpoint(name), args.endpoint_timeout)

    def keep(index: int, answer: dict[str, Any] | endpoints.Failure) -> None:
        if not isinstance(answer, endpoints.Failure):
            answers.append_answers(path, [predictions[index]["id"]], label, [answer])

    outcomes = endpoints.generate_from_endpoint(
        endpoint,
        predictions,
        decoding_of(args),
        on_answer=keep,
        concurrency=args.endpoint_concurrency,
        timeout=args.endpoint_timeout,
        description=f"Asking {endpoint} ({label})",
    )
    failed = [(p["id"], o) for p, o in zip(predictions, outcomes, strict=True) if isinstance(o, endpoints.Failure)]
    if failed:
        reasons = Counter(failure.status for _, failure in failed)
        first = "\n".join(f"  {id_}: {failure.status}: {failure.error}" for id_, failure in failed[:5])
        raise UserError(
            f"{endpoint} left {len(failed)} of {len(predictions)} prompts without an answer "
            f"({', '.join(f'{status} {count}' for status, count in reasons.items())}); the first:\n{first}\n"
            f"the others are kept: {again(args)} asks for these"
        )


def decoding_of(args: EvalArguments) -> Decoding:
    from recipe.generation import Decoding

    return Decoding(args.max_new_tokens, args.temperature, args.top_p, args.seed)


def again(args: EvalArguments) -> str:
    """The command that goes on where this one stopped, in words."""
    return "the same command" + (" without --overwrite_output_dir" if args.overwrite_output_dir else "")


def name_models(args: EvalArguments) -> dict[str, str]:
    """What each model is called in the results: baseline, tuned, and the others by their folder, file or endpoint."""
    labels = {"baseline": args.baseline} if args.baseline else {}
    labels |= {"tuned": args.model[0]}
    for name in args.model[1:]:
        path = Path(public_name(name).rpartition("#")[2])
        label = path.stem if answers.is_answer_file(name) else path.name
        if label in (*labels, *RESERVED):
            label = f"{path.parent.name}/{label}"
        if label in labels or args.model.count(name) > 1:
            raise UserError(f"--model {public_name(name)}: named twice, or like another one")
        labels[label] = name
    return labels


def split_names(predictions: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(prediction["split"] for prediction in predictions))
