"""The model card of a fine-tuned model: `README.md` beside the weights, as the Hub shows it.

Everything in it was measured or written down by the run and its evaluation. What is not known is said to be unknown:
no licence, language or energy is guessed.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from safetensors import safe_open

from recipe.config import UserError
from recipe.files import read_json, write_whole
from recipe.provenance import weights_hash
from recipe.publishing.model_index import DATA_FILES, eval_results, is_hub_id

CARD_TEMPLATE = Path(__file__).with_name("card.md.jinja")
EXAMPLE = {"instruction": "Rewrite the sentence in the past tense.", "input": "She walks to school."}
SHOWN = 3  # best and worst examples, of each
RANKED_BY = "chrf"  # tells close answers apart, one by one and in any script
LONGEST, MOST_LINES, WIDTH = 300, 8, 100  # of a text in an example: characters, lines, characters in a line


class Evaluation(NamedTuple):
    """A finished evaluation: what its `metrics.json` and `predictions.jsonl` hold, and what `read_scores` checked."""

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]
    checked: bool


def write_model_card(
    output_dir: Path,
    run: Mapping[str, Any],
    evaluation: Path | None = None,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
) -> None:
    """Write `README.md` into the folder of a trained model; the card that lies there is replaced.

    Args:
        output_dir: the folder of the model: `config.json`, `*.safetensors`, the tokenizer, `loss.png`.
        run: what its `run.json` holds.
        evaluation: the output folder of `scripts/eval.py`, with `metrics.json` and `predictions.jsonl` of this model;
            without it the card says that nothing was measured.
        repo_id: where the model is on the Hub, so that the card's example names it there; default: the `hub_model_id`
            of the run, or else the folder.
        license: its identifier on the Hub: `apache-2.0`, `mit`, `other`, ...; None where it is not known.
        language: codes of ISO 639: `en`, or several; None where it is not known.

    Raises:
        UserError: the evaluation is not finished, or of other weights.

    Example::

        run = json.loads(Path("outputs/demo/run.json").read_text())
        write_model_card(Path("outputs/demo"), run, Path("outputs/demo-eval"), license="apache-2.0", language="en")
    """
    output_dir = Path(output_dir)
    scores = read_evaluation(Path(evaluation), output_dir) if evaluation else None
    card = make_model_card(output_dir, run, scores, repo_id=repo_id, license=license, language=language)
    write_whole(output_dir / "README.md", card)


def make_model_card(
    output_dir: Path,
    run: Mapping[str, Any],
    evaluation: Evaluation | None = None,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
) -> str:
    """The text of the card; see `write_model_card`."""
    adapter = read_json(output_dir / "adapter_config.json") if is_adapter(output_dir) else None
    base, hub = run["config"]["model"]["model_name_or_path"], hub_of(run)
    energy = measured_energy(output_dir, run)
    repo_id = repo_id or run["config"]["training"]["hub_model_id"]
    title = Path(repo_id or output_dir.resolve()).name
    languages = [language] if isinstance(language, str) else list(language or [])
    same_data = evaluation is not None and evaluation.metrics["provenance"]["data"] == run["config"]["data"]["data"]
    scores = eval_results(evaluation.metrics, hub["data"] if same_data else None) if evaluation else []
    card_data = ModelCardData(
        language=languages or None,
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base if hub["base"] else None,
        base_model_relation=("adapter" if adapter else "finetune") if hub["base"] else None,
        datasets=list(dict.fromkeys(hub["data"])) or None,
        tags=["instruction-tuning", "sft", *(["lora"] if (adapter or {}).get("peft_type") == "LORA" else [])],
        co2_eq_emissions=energy and energy["metadata"],
        model_name=title if scores else None,
        eval_results=scores or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(CARD_TEMPLATE),
        title=escape(title),
        from_random=base is None,
        base=base_in_words(run),
        facts=list(facts(output_dir, run, languages, license)),
        adapter=adapter,
        model=json.dumps(repo_id or local_name(output_dir), ensure_ascii=False),
        example=EXAMPLE,
        prompt=rendered_prompt(output_dir),
        splits=[split_row(row) for row in run["splits"].values()],
        settings=list(settings(output_dir, run, adapter)),
        energy=energy and energy["words"],
        has_curve=(output_dir / "loss.png").is_file(),
        evaluation=evaluation_parts(evaluation, run) if evaluation else None,
        limits=list(limits(run, evaluation)),
        reproduce=fence("\n".join(commands(run["command"], run["processes"])), "bash"),
        data_hash=run["data_hash"],
    )
    return str(card)


def is_adapter(output_dir: Path) -> bool:
    """Whether a folder holds what PEFT adds to a model instead of a whole model."""
    return (output_dir / "adapter_config.json").is_file()


# --- the model, its data and its training -----------------------------------------------------------------------------


def hub_sources(base: str | None, data: Any, revision: str | None = None) -> dict[str, Any]:
    """What of a run comes from the Hub, as it can be told in the run's working folder while it runs.

    Args:
        base: the run's `model_name_or_path`.
        data: its `data`.
        revision: of the base, to look its commit up in the Hub's cache on this machine; None leaves that out.

    >>> hub_sources("recipe/demo/base", {"train": "tatsu-lab/alpaca", "test": "mine.jsonl"})
    {'base': False, 'base_commit': None, 'data': ['tatsu-lab/alpaca']}
    """
    on_hub = is_hub_id(base)
    config = try_to_load_from_cache(base, "config.json", revision=revision) if base and on_hub and revision else None
    return {
        "base": on_hub,
        "base_commit": Path(config).parent.name if isinstance(config, str) else None,
        "data": [source for _, source in sources(data) if is_hub_id(source)],
    }


def hub_of(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the run wrote down of that; for one that did not, as it looks from here."""
    config = run["config"]
    return run.get("hub") or hub_sources(config["model"]["model_name_or_path"], config["data"]["data"])


def base_in_words(run: Mapping[str, Any], in_table: bool = False) -> str:
    """What the weights were before training; in the table with the commit."""
    model, hub = run["config"]["model"], hub_of(run)
    name, revision = model["model_name_or_path"], model["model_revision"]
    if name is None:
        return run["weights_from"]
    if hub["base"]:
        parts = [f"revision {code(revision, in_table)}"] if revision != "main" else []
        commit = hub["base_commit"] if in_table and hub["base_commit"] != revision else None
        parts += [f"commit {code(commit)}"] if commit else []
        return code(name) + (f" ({', '.join(parts)})" if parts else "")
    return f"the weights of the local folder {code(public_path(name), in_table)}"


def sources(data: Any) -> Iterator[tuple[str | None, str]]:
    """Each file, glob, folder or Hub id that the records came from, with its split where the user named one.

    >>> list(sources({"train": ["a.jsonl", "b.jsonl"], "test": "c.jsonl"}))
    [('train', 'a.jsonl'), ('train', 'b.jsonl'), ('test', 'c.jsonl')]
    """
    for split, named in data.items() if isinstance(data, Mapping) else [(None, data)]:
        for source in named if isinstance(named, list) else [named]:
            yield split, source


def facts(
    output_dir: Path, run: Mapping[str, Any], languages: Sequence[str], license: str | None
) -> Iterator[tuple[str, str]]:
    """What the model is, in rows of a table."""
    random = run["config"]["model"]["model_name_or_path"] is None
    yield "weights before training" if random else "base model", base_in_words(run, in_table=True)
    parameters = count_parameters(output_dir)
    if parameters:
        kind = "in the adapter" if is_adapter(output_dir) else model_type(output_dir)
        yield "parameters", f"{parameters:,}" + (f" ({kind})" if kind else "")
    named = [
        (f"{escape(split)}: " if split else "") + code(public_path(source), in_table=True)
        for split, source in sources(run["config"]["data"]["data"])
    ]
    yield "training data", ", ".join(named)
    yield "language", ", ".join(map(escape, languages)) or "not stated"
    yield "licence", escape(license) if license else "not stated"
    yield "licence of the data", "not recorded; ask where the records come from"


def model_type(output_dir: Path) -> str | None:
    """The architecture as transformers calls it: `gpt2`; None where the folder does not say."""
    path = output_dir / "config.json"
    return read_json(path).get("model_type") if path.is_file() else None


def count_parameters(output_dir: Path) -> int:
    """How many numbers the weights are, from the headers of the safetensors files; tied ones count once."""
    total = 0
    for path in output_dir.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def rendered_prompt(output_dir: Path) -> str | None:
    """The prompt of the example in a fence, as the saved tokenizer makes it; None without a chat template."""
    if not (output_dir / "chat_template.jinja").is_file():
        return None
    from transformers import AutoTokenizer  # here: --help needs none of it

    from recipe.templates import to_messages

    tokenizer: Any = AutoTokenizer.from_pretrained(output_dir)
    return fence(
        tokenizer.apply_chat_template(to_messages(EXAMPLE), tokenize=False, add_generation_prompt=True), "text"
    )


def split_row(row: Mapping[str, Any]) -> dict[str, str]:
    """One split of the training data as text."""
    return {
        "name": escape(row["split"]),
        "rows": f"{row['rows']:,}",
        "tokens": f"{row['tokens']:,}",
        "supervised": f"{100 * row['supervised']:.0f} %",
        "longest": f"{row['longest']:,}",
    }


def settings(output_dir: Path, run: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """How the model was trained, in rows of a table: name and value."""
    model, data, training = (run["config"][name] for name in ("model", "data", "training"))
    result, processes = run["result"], run["processes"]
    yield (
        "steps",
        f"{result['steps']:,}" + (f" ({epochs})" if (epochs := epochs_in_words(output_dir, training)) else ""),
    )
    yield "effective batch", batch_in_words(training, processes)
    yield "learning rate", learning_rate_in_words(training)
    yield "optimizer", optimizer_in_words(training)
    mixed = next((name for name in ("bf16", "fp16") if training[name]), None)
    yield "precision", f"weights in {model['dtype']}" + (f", computed in mixed {mixed}" if mixed else "")
    if adapter:
        shape = [f"{key} {adapter[key]}" for key in ("r", "lora_alpha", "lora_dropout") if adapter.get(key) is not None]
        yield "adapter", escape(", ".join([str(adapter.get("peft_type")), *shape]))
    layouts = {
        "padded": "rows padded to the longest",
        "shared_prefix": "one row, in which what the prompts begin with stands once",
    }
    yield "batch layout", layouts[data["batching"]]
    yield "learned from", "the response only" if data["mask_prompt"] else "prompt and response"
    fates = {"truncate": "longer records are cut", "drop": "longer records are left out", "error": "none is longer"}
    if data["max_length"]:
        yield "length limit", f"{data['max_length']:,} tokens ({fates[data['overflow']]})"
    yield "prompt template", code(public_path(data["template"]), in_table=True)
    yield "seed", f"{run['seed']}" + ("" if isinstance(data["data"], Mapping) else f" (split: {data['split_seed']})")
    if result["eval"]:
        yield "validation loss", f"{result['eval']['eval_loss']:.4f} nats per supervised token"
    yield "versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    if run.get("hardware"):
        yield "hardware", escape(run["hardware"])
    yield "time", time_in_words(run)


def epochs_in_words(output_dir: Path, training: Mapping[str, Any]) -> str | None:
    """How often the records were seen: as the Trainer counted, or else as it was told."""
    path = output_dir / "trainer_state.json"
    epochs = read_json(path).get("epoch") if path.is_file() else None
    if epochs is None:
        epochs = training["num_train_epochs"] if training["max_steps"] <= 0 else None
    return None if epochs is None else f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}"


def batch_in_words(training: Mapping[str, Any], processes: int) -> str:
    """What one optimizer step learns from, over all micro-batches and processes."""
    accumulated, budget = training["gradient_accumulation_steps"], training["max_tokens_per_batch"]
    factors = [f"{accumulated} accumulated"] if accumulated > 1 else []
    factors += [f"{processes} processes"] if processes > 1 else []
    one = training["per_device_train_batch_size"]
    size, unit = (budget, "input tokens") if budget else (one, "records")
    product = f" ({' × '.join([f'{size:,}', *factors])})" if factors else ""
    return f"{'up to ' if budget else ''}{size * accumulated * processes:,} {unit}{product}"


def learning_rate_in_words(training: Mapping[str, Any]) -> str:
    """The peak and the schedule."""
    warmup = training["warmup_steps"] or 0
    share = f"the first {100 * warmup:g} % of the steps" if warmup < 1 else f"{warmup:g} steps"
    return f"{training['learning_rate']:g}, {training['lr_scheduler_type']}" + (
        f", warm-up over {share}" if warmup else ""
    )


def optimizer_in_words(training: Mapping[str, Any]) -> str:
    """The optimizer with what it was told."""
    parts = [training["optim"]]
    if "adam" in training["optim"]:
        parts += [f"β₁ {training['adam_beta1']:g}, β₂ {training['adam_beta2']:g}, ε {training['adam_epsilon']:g}"]
    parts += [training["optim_args"]] if training["optim_args"] else []
    parts += [f"weight decay {training['weight_decay']:g}"]
    parts += [f"gradients clipped at {training['max_grad_norm']:g}"] if training["max_grad_norm"] else []
    return escape(", ".join(parts))


def time_in_words(run: Mapping[str, Any]) -> str:
    """How long training took, and how fast it was where the clock saw all of it."""
    seconds, tokens = run["result"]["train_seconds"], run["result"]["tokens_seen"]
    processes = f"{run['processes']} process{'' if run['processes'] == 1 else 'es'}"
    if not seconds:
        return f"not recorded; {processes}"
    if resumed(run):  # the tokens are those of the whole run, the time is not
        return f"{duration(seconds)} since the run was resumed; {processes}"
    speed = f", {tokens / seconds:,.0f} tokens/s" if tokens else ""
    return f"{duration(seconds)} with validation{speed}; {processes}"


def duration(seconds: float) -> str:
    """A time in the largest unit that keeps three digits.

    >>> duration(91.8), duration(5400)
    ('91.8 s', '90 min')
    """
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def resumed(run: Mapping[str, Any]) -> bool:
    checkpoint = run["config"]["training"]["resume_from_checkpoint"]
    return bool(checkpoint) and str(checkpoint).lower() != "false"


def measured_energy(output_dir: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """What codecarbon recorded of this run (`--report_to codecarbon`), as metadata and in words; None if it did not.

    Its `emissions.csv` has a line for each run in the folder, the last one last: kg of CO2 equivalents and kWh. Its
    place is a guess (Canada) where codecarbon could not look it up, which the file does not tell.

    Raises:
        UserError: the file has no such figures.
    """
    path = output_dir / "emissions.csv"
    if "codecarbon" not in run["config"]["training"]["report_to"] or not path.is_file():
        return None
    try:
        with open(path, encoding="utf-8", newline="") as file:
            *_, row = csv.DictReader(file)
        grams, kilowatt_hours, seconds = (
            float(row[name]) * unit for name, unit in (("emissions", 1000), ("energy_consumed", 1), ("duration", 1))
        )
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: not what codecarbon writes ({error!r}); mend or remove it") from error
    where = ", ".join(filter(None, [row.get("region"), row.get("country_name")]))
    metadata = {
        "emissions": float(f"{grams:.4g}"),
        "source": "codecarbon",
        "training_type": "pre-training" if run["config"]["model"]["model_name_or_path"] is None else "fine-tuning",
        "geographical_location": where or None,
        "hardware_used": row.get("gpu_model") or row.get("cpu_model") or None,
    }
    words = f"{kilowatt_hours:.3g} kWh and {grams:.3g} g of CO₂ equivalents over {duration(seconds)}, by codecarbon"
    return {
        "metadata": {name: value for name, value in metadata.items() if value is not None},
        "words": words + (f" for {escape(where)}, the place it found or assumed" if where else ""),
    }


# --- the evaluation ---------------------------------------------------------------------------------------------------


def read_evaluation(folder: Path, output_dir: Path) -> Evaluation:
    """The scores and the answers of a finished evaluation of this model.

    Raises:
        UserError: files are missing, do not belong together, or are of another model; see `read_scores`.
    """
    from recipe.evaluation.answers import read_answers  # here: a card without scores needs none of it
    from recipe.evaluation.report.page import check_inputs

    for name in ("metrics.json", "predictions.jsonl"):
        _require(folder, name)
    metrics, checked = read_scores(folder, output_dir)
    predictions = list(read_answers(folder / "predictions.jsonl", strict=True).values())
    check_inputs(predictions, metrics, [])
    return Evaluation(metrics, predictions, checked)


def read_scores(folder: Path, output_dir: Path) -> tuple[dict[str, Any], bool]:
    """What `metrics.json` of an evaluation holds, and whether it is known to be of the weights in `output_dir`.

    It is known where a folder was evaluated, or a model of the Hub whose files of that commit are in the cache here; it
    is not of an endpoint, of recorded answers, and of other models of the Hub.

    Raises:
        UserError: it is missing or not whole, or is of other weights.
    """
    from recipe.evaluation.answers import ECHO  # here: a card without scores needs none of it
    from recipe.evaluation.endpoints import is_endpoint

    _require(folder, "metrics.json")
    metrics = read_json(folder / "metrics.json")
    try:
        tuned = metrics["provenance"]["models"]["tuned"]
        name, weights = tuned["name"], tuned["weights"]
        metrics["splits"], metrics["judge"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'metrics.json'}: not what scripts/eval.py writes ({error!r}); run its score stage again"
        ) from error
    advice = f"evaluate {output_dir}, or name its evaluation"
    if name == ECHO:
        raise UserError(f"evaluation {folder} is of {name!r}, which says the instruction again; {advice}")
    if is_endpoint(name) or name.endswith(DATA_FILES):
        return metrics, False
    if weights is not None and not weights.startswith("sha256:"):  # the commit of a model on the Hub
        config = try_to_load_from_cache(name, "config.json", revision=weights)
        weights = weights_hash(str(Path(config).parent)) if isinstance(config, str) else None
        if weights is None:
            return metrics, False
    mine = weights_hash(str(output_dir))
    if weights != mine:
        raise UserError(
            f"evaluation {folder} is of {name} with other weights ({weights}) than {output_dir} holds ({mine}); "
            + advice
        )
    return metrics, True


def _require(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise UserError(
            f"evaluation {folder}: no {name} there; give the --output_dir of a finished scripts/eval.py run"
        )


def evaluation_parts(evaluation: Evaluation, run: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of the evaluation, as text."""
    from recipe.evaluation.report.page import judge_table, pairs_sentence, score_row
    from recipe.evaluation.verdict import findings, verdict

    metrics, predictions = evaluation.metrics, evaluation.predictions
    provenance, judge = metrics["provenance"], metrics["judge"]
    models = provenance["models"]
    worse = [
        f"{finding.label} " + ", ".join(f"{change} on {split}" for split, change in finding.changes.items())
        for finding in findings(metrics, "worse")
    ]
    other_data = provenance["data"] != run["config"]["data"]["data"]
    generation = provenance["generation"]
    decoding = (
        f"sampled at temperature {generation['temperature']:g}" if generation["temperature"] else "greedy decoding"
    )
    split = held_out_split(metrics["splits"])
    return {
        "unchecked": None if evaluation.checked else code(model_in_words(models["tuned"]["name"])),
        "verdicts": [escape(verdict(metrics, name).sentence) for name in metrics["splits"]],
        "worse": escape("; ".join(worse)),
        "baseline": code(model_in_words(models["baseline"]["name"])) if "baseline" in models else None,
        "data": ", ".join(code(public_path(s)) for _, s in sources(provenance["data"])) if other_data else None,
        "decoding": f"{decoding}, at most {generation['max_new_tokens']:,} new tokens, {generation['dtype']}",
        "hardware": escape(provenance["hardware"]),
        "splits": [
            {
                "name": escape(name),
                "n": f"{part['n']:,}",
                "rows": [
                    score_in_words(score_row(key, score, part["n"]))
                    for key, score in {**part["metrics"], **part["behaviour"]}.items()
                    if score is not None and score["tuned"] is not None
                ],
            }
            for name, part in metrics["splits"].items()
        ],
        "judge": [{**row, "title": escape(row["title"])} for row in judge_table(judge)],
        "judged_by": escape(str(judge["model"])) if judge else None,
        "pairs": pairs_sentence((judge or {}).get("pairwise")),
        "examples": examples(predictions, split),
        "examples_split": code(split),
        "commands": fence("\n".join(commands(provenance["command"])), "bash"),
    }


def score_in_words(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the report's table for the card: figures on one line with their signs, `n` the records that count."""
    keep = {
        name: row[name].replace(" %", "\N{NO-BREAK SPACE}%") for name in ("baseline", "tuned", "change", "interval")
    }
    unit = f" ({row['unit']})" if row["unit"] else ""
    return {**keep, "title": row["title"], "unit": unit, "word": row["word"], "n": row["over"] or row["n"]}


def held_out_split(splits: Sequence[str] | Mapping[str, Any]) -> str:
    """The first split that the model did not learn from, as far as its name tells; else the first."""
    return next((split for split in splits if split not in ("train", "all")), next(iter(splits)))


def model_in_words(name: str) -> str:
    """A model of the evaluation: a Hub id, an endpoint, or a folder or file by a path that may be shown."""
    return name if "://" in name else public_path(name)


def examples(predictions: Sequence[Mapping[str, Any]], split: str) -> dict[str, list[dict[str, str]]]:
    """The best and the worst answers of the tuned model by chrF, `SHOWN` of each; of equal ones the first records.

    Fewer where the split holds less than twice as many; none is both.
    """
    from recipe.evaluation.comparison import example_scores, labels_of
    from recipe.evaluation.verdict import PERCENT, role_of

    rows = [prediction for prediction in predictions if prediction["split"] == split]
    scores = {
        label: example_scores(rows, label)[RANKED_BY] for label in labels_of(rows) if label in ("baseline", "tuned")
    }
    ranked = [index for index, score in enumerate(scores["tuned"].round(9)) if math.isfinite(score)]
    best = sorted(ranked, key=lambda index: -scores["tuned"][index].round(9))[: min(SHOWN, (len(ranked) + 1) // 2)]
    worst = sorted(ranked, key=lambda index: scores["tuned"][index].round(9))[: min(SHOWN, len(ranked) // 2)]

    def show(index: int) -> dict[str, str]:
        row = rows[index]
        parts = {"instruction": row["instruction"], "input": row.get("input") or None, "reference": row["output"]}
        parts |= {role_of(label): row[label]["text"] for label in scores}
        said = [f"{role_of(label)} {PERCENT.value(scores[label][index])}" for label in scores]
        family = f", {escape(str(row['family']))}" if row.get("family") else ""
        return {
            "id": escape(row["id"]) + family,
            "scores": ", ".join(said),
            "block": labelled({name: text for name, text in parts.items() if text is not None}),
        }

    return {"best": [show(index) for index in best], "worst": [show(index) for index in worst]}


def limits(run: Mapping[str, Any], evaluation: Evaluation | None) -> Iterator[str]:
    """What should keep a reader from expecting too much, one sentence each, from what run and evaluation hold."""
    train, rows, limit = run["splits"]["train"], run["rows"], run["config"]["data"]["max_length"]
    length = f"{limit:,} tokens" if limit else "the tokenizer's limit"
    yield f"It learned from {train['rows']:,} records and has seen nothing longer than {train['longest']:,} tokens."
    if rows["truncated"]:
        yield f"{rows['truncated']:,} records were cut at {length}: it has not seen how their responses end."
    if rows["dropped"]:
        yield f"{rows['dropped']:,} records longer than {length} were left out."
    leaked = rows["left_out_of_train_as_duplicates"]
    if leaked:
        yield (
            f"{leaked:,} training records also stood in a held-out split and were left out of training; only exact "
            "duplicates are found."
        )
    if evaluation is None:
        yield "It was not evaluated: nothing is known of how well it answers records that it has not seen."
        return
    from recipe.evaluation.comparison import labels_of
    from recipe.evaluation.verdict import cautions

    metrics, predictions = evaluation.metrics, evaluation.predictions
    seen = [split for split in metrics["splits"] if split in ("train", "all")]
    if seen:
        yield f"Scores on `{seen[0]}` are on records that it may have learned from."
    if run["config"]["training"]["load_best_model_at_end"] and "validation" in metrics["splits"]:
        yield "The validation split chose these weights, so that its scores flatter them."
    yield "This is one run with one seed: the intervals say how scores vary with the records, not with the seed."
    first = next(iter(metrics["splits"]))
    headline = [prediction for prediction in predictions if prediction["split"] == first]
    yield from map(escape, cautions(metrics, headline, labels_of(predictions)))


# --- paths and commands that may be shown -----------------------------------------------------------------------------


def public_path(source: str) -> str:
    """A path without the folders above the working folder, which may name a user; Hub ids and relative ones stay.

    >>> public_path("recipe/demo/base"), public_path("/home/someone/records.jsonl")
    ('recipe/demo/base', 'records.jsonl')
    """
    path = Path(source).expanduser()
    if not path.is_absolute():
        return source
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def local_name(output_dir: Path) -> str:
    """The folder as one types it in the working folder: relative where that leads there within the home folder."""
    folder, here, home = output_dir.resolve(), Path.cwd().resolve(), Path.home().resolve()
    if folder.is_relative_to(here) or (folder.is_relative_to(home) and here.is_relative_to(home)):
        return os.path.relpath(folder, here)
    return folder.name if folder.is_relative_to(home) else str(folder)


def commands(command: str, processes: int = 1) -> Iterator[str]:
    """The lines of a recorded command, ready for a shell; a path outside the working folder becomes `path/to/name`."""
    try:
        lines = [shlex.split(line) for line in command.split("\n")]
    except ValueError:  # an argument with a line break in it
        lines = [shlex.split(command)]
    for program, *words in lines:
        launcher = f"accelerate launch --num_processes {processes}" if processes > 1 else program
        yield " ".join([launcher, *(shlex.quote(public_word(word)) for word in words)])


def public_word(word: str) -> str:
    """A word of a command with its absolute paths shortened: alone, behind `=`, and in JSON.

    >>> public_word('{"train": "/home/someone/a.jsonl"}')
    '{"train": "path/to/a.jsonl"}'
    """

    def shorten(found: re.Match[str]) -> str:
        inside = Path(found[2]).expanduser().is_relative_to(Path.cwd())
        return found[1] + ("" if inside else "path/to/") + public_path(found[2])

    return re.sub(r'(^|=|")((?:/|~/)[^"]*)', shorten, word)


# --- text in Markdown -------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """A text with its unseen characters shown."""
    from recipe import console  # here: it brings a library for tables, and --help needs none of it

    return console.visible(text)


def escape(text: str) -> str:
    """A text on one line of Markdown, also in a table: nothing in it is markup.

    >>> print(escape("a|b <script> *c*"))
    a\\|b \\<script\\> \\*c\\*
    """
    return re.sub(r"([\\`*\[\]<>|~$&#])", r"\\\1", " ".join(visible(text).split()))


def code(text: str, in_table: bool = False) -> str:
    """A text as code on one line, also with backticks in it; in a table a `|` would end the cell.

    >>> print(code("a`b"))
    ``a`b``
    """
    shown = " ".join(visible(text).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{space}{shown.replace('|', chr(92) + '|') if in_table else shown}{space}{ticks}"


def fence(text: str, language: str = "") -> str:
    """A text as a block of code that no backticks in it can end."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def labelled(parts: Mapping[str, str]) -> str:
    """Texts under each other in one block of code, each behind its label, wrapped, long ones cut with a mark.

    >>> print(labelled({"input": "a cat", "tuned": "cats"}))
    ```text
    input        a cat
    tuned        cats
    ```
    """
    lines = []
    for label, text in parts.items():
        wrapped = [
            piece for line in shortened(text).split("\n") for piece in textwrap.wrap(line, WIDTH, tabsize=4) or [""]
        ]
        lines += [
            f"{name:<13}{line}".rstrip()
            for name, line in zip([label, *[""] * (len(wrapped) - 1)], wrapped, strict=True)
        ]
    return fence("\n".join(lines), "text")


def shortened(text: str) -> str:
    """A text whose unseen characters are shown, of at most `LONGEST` characters and `MOST_LINES` lines."""
    kept = "\n".join(text[:LONGEST].split("\n")[:MOST_LINES])
    left = len(text) - len(kept)
    return (visible(kept) or "(empty)") + (f" [… {left:,} more characters]" if left else "")
