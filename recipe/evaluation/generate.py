"""Which models answer which records, and in which prompts: the generate stage of an evaluation."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState

from recipe.config import RUN_CODE, DataArguments, ModelArguments, UserError, setting
from recipe.evaluation import answers, ask, endpoints
from recipe.evaluation.headline import check_headline, choose_headline
from recipe.evaluation.stored import START_OVER, read_begun, was_edited
from recipe.files import file_hash, write_sealed
from recipe.precision import is_native, slow_note
from recipe.provenance import command_line, hardware, versions, weights_hash

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase

    from recipe.adapters import Models
    from recipe.generation import Decoding
    from recipe.templates import Template

STAGES = ("generate", "score", "judge", "report")
# no further model gets such a label: roles, and fields of a record
RESERVED = ("baseline", "tuned", "base", "id", "split", "family", "messages", *answers.TEXT_FIELDS)
WRITTEN = (  # by an evaluation, without judge_cache.jsonl: its replies are valid in any
    "predictions.jsonl", "evaluation.json", "metrics.json", "judge.jsonl", "report.html",
    "deltas.png", "outcomes.png", "loss.png",
)  # fmt: skip


@dataclass
class EvalArguments:
    """Which models answer which records, and what is made of the answers."""

    model: list[str] = setting(
        list,
        "The fine-tuned model, and further ones to compare. Each a folder or Hub id, an OpenAI-compatible "
        "endpoint (http://localhost:8000/v1#name), a file of recorded answers, or `echo`.",
    )
    baseline: str | None = setting(
        None, "What to compare with, in the same forms. Default: of an adapter, its base model; else nothing."
    )
    split: list[str] = setting(
        list, "Splits to score, or `all` records as one. Default: test, and all of recorded answers."
    )
    output_dir: str = setting("", "Where answers, scores and report go.")
    overwrite_output_dir: bool = setting(False, "Start over in an output_dir that is in use.")
    stages: list[str] = setting(lambda: [*STAGES], "Stages to run: generate score judge report.")
    headline: str | None = setting(
        None, "Score that decides the verdict. Default: exact_match where references are short answers, else chrf."
    )
    gate: list[str] = setting(list, "Conditions for exit code 0: exact_match>=0.8 ...")
    max_new_tokens: int = setting(128, "Cap on each response, in tokens.")
    temperature: float = setting(0.0, "0 for greedy decoding; above, sampling.")
    top_p: float = setting(1.0, "Nucleus of the sampling.")
    seed: int = setting(123, "Seed of the sampling.")
    batch_size: int = setting(32, "Prompts generated together on each process.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Of the weights; auto: bfloat16 on an NVIDIA or AMD GPU with instructions for it, else float32."
    )
    trust_remote_code: bool = setting(False, RUN_CODE)
    endpoint_key_env: list[str] = setting(
        list,
        "Environment variable with the key of the served models, or HOST=NAME for each host. Default: OPENAI_API_KEY, "
        "which is sent to api.openai.com, OPENAI_BASE_URL and this machine only.",
    )
    endpoint_concurrency: int = setting(8, "Requests to a served model at the same time.")
    endpoint_timeout: float = setting(120.0, "Seconds a served model has for an answer.")
    endpoint_allow_missing: bool = setting(
        False, "Count prompts that a served model fails to answer as answers without text."
    )

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
        if not self.output_dir:
            raise UserError("say where the results go: --output_dir")
        if not self.model and "generate" in self.stages:
            raise UserError("say what to score: --model")
        if self.stages == ["generate"] and self.gate:
            raise UserError("--gate needs scores: add the score stage")
        check_headline(self.headline)
        output_dir = Path(self.output_dir).resolve()
        if self.endpoint_key_env and not self._served():
            raise UserError(
                "--endpoint_key_env: no model is served whose key it names; give --model or --baseline the address of "
                "one, or leave it out"
            )
        for name in [*self.model, self.baseline or ""]:
            kind = model_kind(name)
            if kind == "endpoint":
                self.endpoint(name)
            elif kind == "file" and self.overwrite_output_dir and Path(name).resolve().parent == output_dir:
                raise UserError(
                    f"--overwrite_output_dir would remove {name}, the answers to score; name another folder"
                )
        if self.dtype == "auto":
            has_bfloat16 = torch.cuda.is_available() and is_native(torch.bfloat16, "cuda")
            self.dtype = "bfloat16" if has_bfloat16 else "float32"

    def endpoint(self, name: str) -> endpoints.Endpoint:
        """A served model with the key that is meant for its host."""
        return endpoints.parse_endpoint(name, self.endpoint_key_env, self._served())

    def _served(self) -> list[str]:
        return [name for name in [*self.model, self.baseline or ""] if model_kind(name) == "endpoint"]


def generate_predictions(args: EvalArguments, data_args: DataArguments, run: dict | None, state: PartialState) -> None:
    """Append every answer that is missing to predictions.jsonl, then merge its lines by record."""
    from recipe.adapters import Models
    from recipe.data.split import data_hash  # here, as below: datasets and models take seconds, and --help needs none
    from recipe.model import check_finite, load_tokenizer

    with state.main_process_first():  # the other processes read what it caches
        records, predictions = select_records(args, data_args, run)
    models = name_models(args)
    weights = {label: name for label, name in models.items() if model_kind(name) == "weights"}
    opens = Models(weights.values())
    tokenizers = {label: load_tokenizer(model_arguments(name, args, opens)) for label, name in weights.items()}
    templates = choose_templates(weights, tokenizers, data_args.template)
    for name in weights.values():
        check_finite(name)
    if weights and (note := slow_note(getattr(torch, args.dtype), state.device.type)):
        state.print(f"{note}: try --dtype float32")
    ends = {str(tokenizer.eos_token) for tokenizer in tokenizers.values()}
    predictions = [strip_end(prediction, ends) for prediction in predictions]
    evaluation: dict[str, Any] = {
        "models": {
            label: describe_model(name, tokenizers.get(label), templates.get(label), opens.revision(name))
            for label, name in models.items()
        },
        "headline": args.headline or choose_headline([prediction["output"] for prediction in predictions]),
        "data": data_args.data or args.model[0],
        "data_hash": data_hash(records),
        "splits": Counter(prediction["split"] for prediction in predictions),
        "generation": {**asdict(decoding_of(args)), "dtype": args.dtype},
        "trust_remote_code": args.trust_remote_code,
        "left_out": {},  # fields of it that an endpoint did not accept, by model
        "command": command_line(),
        "versions": versions(),
        "hardware": hardware(),
    }
    output_dir = Path(args.output_dir)
    path = output_dir / "predictions.jsonl"
    answered = {} if args.overwrite_output_dir else answers.read_answers(path)
    if answered:
        rows = [answered.get(p["id"], {}) for p in predictions]
        evaluation = resume_evaluation(output_dir, evaluation, rows, args.headline)
    state.wait_for_everyone()  # all have read before the main process writes
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name in WRITTEN if args.overwrite_output_dir else ():
            (output_dir / name).unlink(missing_ok=True)
        write_sealed(output_dir / "evaluation.json", evaluation)
    state.wait_for_everyone()
    for label, name in models.items():
        missing = [p for p in predictions if label not in answered.get(p["id"], {})]
        if some := len(missing) < len(predictions):
            state.print(f"{len(predictions) - len(missing)} of {len(predictions)} answers of {label} are there already")
        asked = missing, path, args, data_args, templates.get(label), state, opens, ends, some
        if missing and (unsent := append_answers_of(label, name, *asked)):
            evaluation["left_out"][label] = unsent
            write_sealed(output_dir / "evaluation.json", evaluation)
    state.wait_for_everyone()
    if state.is_main_process:
        answers.merge_answers(path, predictions, list(evaluation["models"]))
        write_sealed(output_dir / "evaluation.json", {**evaluation, "predictions_hash": file_hash(path)})


def select_records(
    args: EvalArguments, data_args: DataArguments, run: dict[str, Any] | None
) -> tuple[DatasetDict, list[dict[str, Any]]]:
    """The records of the splits to score, and their predictions without answers.

    Warns if the data has changed since the model was trained.
    """
    from datasets import DatasetDict

    from recipe.data import load_records
    from recipe.data.split import data_hash

    files = [name for name in args.model if model_kind(name) == "file"]
    if data_args.data is None and files:  # recorded answers bring their records along
        records, predictions, _ = answers.read_answer_file(files[0], data_args)
        names = chosen_splits(args.split or ["all"], split_names(predictions))
        return records, [prediction for prediction in predictions if prediction["split"] in names]
    if data_args.data is None:
        raise UserError(f"--model {args.model[0]}: no run.json there says on which records; name them: --data FILE")
    records, _ = load_records(data_args)
    known = run and not data_args.streaming and run["config"]["data"]["data"] == data_args.data
    if run and known and run["data_hash"] != data_hash(records):
        warning = "the data or its split has changed since this model was trained; it may have seen these records"
        print(f"warning: {warning}", file=sys.stderr)
    records = DatasetDict({name: records[name] for name in chosen_splits(args.split or ["test"], list(records))})
    empty = [name for name in records if not len(records[name])]
    if empty:
        raise UserError(f"--split {' '.join(empty)}: no records in it; name another, or give a larger --test_ratio")
    return records, answers.as_predictions(records, merged=args.split == ["all"])


def chosen_splits(names: list[str], known: list[str]) -> list[str]:
    """The splits that `--split` names, which must be in the data; `all` means every one."""
    unknown = [name for name in names if name not in known and names != ["all"]]
    if unknown:
        raise UserError(f"--split {' '.join(unknown)}: the data has {', '.join(known)}; name one, or all")
    return known if names == ["all"] else names


def resume_evaluation(
    output_dir: Path, evaluation: dict[str, Any], rows: list[dict[str, Any]], headline: str | None = None
) -> dict[str, Any]:
    """This evaluation, with the further models of which `rows`, one per record, hold all answers already.

    Its headline score stays, since answers may have been seen; `headline` is the one that is asked for now.

    Raises:
        UserError: the folder holds answers to other prompts, or of other models under the same labels, or was begun
            with another headline score.
    """
    earlier, models = read_begun(output_dir), dict(evaluation["models"])
    changed = [key for key in ("data_hash", "generation") if earlier[key] != evaluation[key]]
    kept = {"headline": earlier.get("headline", evaluation["headline"]), "left_out": earlier.get("left_out", {})}
    kept |= {"edited": True} if was_edited(output_dir, earlier) else {}
    changed += ["headline score"] if headline not in (None, kept["headline"]) else []
    for label, model in earlier["models"].items():
        count = sum(label in row for row in rows)
        if label in models:
            fields = {"name": "model", "weights": "model", "template": "template of"}
            others = {words for key, words in fields.items() if model.get(key) != models[label][key]}
            changed += [f"{words} {label!r}" for words in sorted(others)] if count else []
        elif count == len(rows):
            models[label] = model
        elif count:
            print(f"{count} of {len(rows)} answers of {label}, which is not asked now, are left out")
    commands = [*earlier["command"].split("\n"), evaluation["command"]]
    if changed:
        raise UserError(f"{output_dir} holds an evaluation with another {', '.join(changed)}; {START_OVER}")
    return {**evaluation, **kept, "models": models, "command": "\n".join(dict.fromkeys(commands))}


def choose_templates(
    names: Mapping[str, str], tokenizers: Mapping[str, PreTrainedTokenizerBase], given: str
) -> dict[str, Template]:
    """The template in which each model that is weights is asked, by label; its name says which it is, for the page.

    That is its own saved one; for a model without one, that of the tuned model; or `given` for all.
    """
    from recipe.templates import OWN, load_template, saved_template

    if given and given != OWN:
        named = f"the template {given}"
        return {label: replace(load_template(given, each), name=named) for label, each in tokenizers.items()}
    own = {
        label: replace(saved_template(tokenizer, f"model {names[label]!r}"), name="its own template")
        for label, tokenizer in tokenizers.items()
        if tokenizer.chat_template
    }
    if "tuned" in own:
        fallback = replace(own["tuned"], name="the tuned model's template")
    else:
        default = DataArguments().template
        fallback = replace(load_template(default), name=f"the template {default}")
    return {label: own.get(label) or fallback.for_tokenizer(tokenizer) for label, tokenizer in tokenizers.items()}


def describe_model(
    name: str, tokenizer: PreTrainedTokenizerBase | None, template: Template | None, revision: str = "main"
) -> dict[str, str | None]:
    """What evaluation.json holds of a model: its name, hashes of weights and tokenizer, and how it is asked."""
    from recipe.evaluation.likelihood import tokenizer_hash

    asked: tuple[str | None, str | None]
    if template is not None:
        asked = (template.name, template.chat_template)
    else:
        asked = ("chat messages" if model_kind(name) == "endpoint" else None, None)
    hashes = {
        "weights": content_hash(name, revision),
        "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
    }
    return {"name": name, **hashes, "template_name": asked[0], "template": asked[1]}


def strip_end(record: dict[str, Any], ends: Iterable[str]) -> dict[str, Any]:
    """A record without the end of text that its response may bring: no answer has it."""
    from recipe.tokens import without_end

    return {**record, "output": functools.reduce(without_end, sorted(ends), record["output"])}


def append_answers_of(
    label: str,
    name: str,
    predictions: list[dict],
    path: Path,
    args: EvalArguments,
    data_args: DataArguments,
    template: Template | None,
    state: PartialState,
    opens: Models,
    ends: Iterable[str] = (),
    others_answered: bool = False,
) -> list[str]:
    """Append one model's answers to `predictions`; weights answer a share of them on each process.

    Returns:
        the fields of sampling that an endpoint did not accept.
    """
    kind, decoding = model_kind(name), decoding_of(args)
    if template is not None:
        with state.split_between_processes(predictions) as share:
            try:
                model = model_arguments(name, args, opens)
                ask.ask_weights(label, model, share, path, decoding, args.batch_size, template, state, opens)
            except UserError as error:
                if not state.is_main_process:  # the main process prints its own error
                    print(f"error: process {state.process_index}: {error}", file=sys.stderr, flush=True)
                raise
    elif state.is_main_process and kind == "endpoint":
        settings = (args.endpoint_concurrency, args.endpoint_timeout, args.endpoint_allow_missing, others_answered)
        return ask.ask_endpoint(label, args.endpoint(name), predictions, path, decoding, *settings)
    elif state.is_main_process:
        strip = functools.partial(strip_end, ends=ends)
        if kind == "echo":
            rows = answers.echoes(predictions)
        else:
            rows = answers.pair_answers(name, predictions, strip, data_args)
        ask.keep_answers(path, label, predictions, rows)
    return []


def model_arguments(name: str, args: EvalArguments, opens: Models) -> ModelArguments:
    """How weights are loaded."""
    dtype: Any = args.dtype  # auto is resolved
    return ModelArguments(name, opens.revision(name), dtype=dtype, trust_remote_code=args.trust_remote_code)


def decoding_of(args: EvalArguments) -> Decoding:
    """How all models decode."""
    from recipe.generation import Decoding

    return Decoding(args.max_new_tokens, args.temperature, args.top_p, args.seed)


def name_models(args: EvalArguments) -> dict[str, str]:
    """Models by their label in the results: baseline, tuned, and the others by their folder, file or served name."""
    models = {"baseline": args.baseline} if args.baseline else {}
    models["tuned"] = args.model[0]
    for name in args.model[1:]:
        path = Path(name.rpartition("#")[2])
        label = path.stem if model_kind(name) == "file" else path.name
        if label in (*models, *RESERVED):
            label = f"{path.parent.name}/{label}"
        if label in models or args.model.count(name) > 1:
            raise UserError(f"--model {name}: named twice, or like another one")
        models[label] = name
    return models


def model_kind(name: str) -> Literal["weights", "endpoint", "file", "echo"]:
    """In which of its forms a model is named: weights are a folder or a Hub id, a file holds recorded answers."""
    if name == answers.ECHO:
        return "echo"
    if endpoints.is_endpoint(name):
        return "endpoint"
    return "file" if answers.is_answer_file(name) else "weights"


def content_hash(name: str, revision: str = "main") -> str | None:
    """A hash of weights or of recorded answers, which tells a model from another of the same name."""
    kind = model_kind(name)
    if kind == "weights":
        return weights_hash(name, revision)
    return file_hash(name) if kind == "file" else None


def split_names(predictions: list[dict[str, Any]]) -> list[str]:
    """The splits of predictions, in their order."""
    return list(dict.fromkeys(prediction["split"] for prediction in predictions))
