"""The model card of a fine-tuned model: `README.md` beside the weights, as the Hub shows it.

The words are in `card.md.jinja`; everything that they say was recorded by the run and by its evaluation.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import parse_local_safetensors_file_metadata, try_to_load_from_cache
from huggingface_hub.repocard import ModelCard
from huggingface_hub.repocard_data import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from recipe.config import UserError
from recipe.console import one_line, visible
from recipe.provenance import weights_hash
from recipe.publishing.public_paths import shorten_paths
from recipe.shapes import COUNT

CARD_TEMPLATE = Path(__file__).with_name("card.md.jinja")
TEXT, SPLIT = (
    (None, str),
    {"split": str, "supervised": (None, float), **dict.fromkeys(("rows", "tokens", "longest"), (None, COUNT))},
)
RUN = {  # what the card takes of a run.json; see `recipe.shapes`
    "command": str, "versions": {str: str}, "hardware": str, "seed": int, "processes": COUNT, "weights_from": str,
    "ran?": (None, {"mixed_precision": TEXT}), "data_hash": str, "splits": {str: SPLIT, "train": SPLIT},
    "hub": {"base": bool, "base_commit?": TEXT, "data": [str]},
    "adapter?": (None, {"targets": [str]}),
    "rows": {**dict.fromkeys(("truncated", "dropped", "left_out_of_train_as_duplicates"), COUNT), "bad?": COUNT},
    "bad_records?": {str: COUNT}, "result": {"steps": COUNT, "eval?": (None, {"eval_loss": float})},
    "config": {
        "model": {"model_name_or_path": TEXT, "model_revision": str, "dtype": str, "trust_remote_code?": bool},
        "lora?": (None, {"lora_r": (None, COUNT), "lora_alpha": COUNT}),
        "data": {"batching": str, "mask_prompt": bool, "overflow": str, "template": str, "split_seed": int},
        "training": {
            **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), COUNT),
            **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"), float),
            "lr_scheduler_type": str, "optim": str, "warmup_steps?": (None, float), "max_grad_norm?": (None, float),
            "max_tokens_per_batch?": (None, COUNT),
        },
    },
}  # fmt: skip
EXAMPLE = {"instruction": "Rewrite the sentence in the past tense.", "input": "She walks to school."}
SHOWN = 3  # best and worst examples, of each
RANKED_BY = "chrf"  # the score that tells close answers apart, in any script
LONGEST = 300  # characters of a text in an example


class Evaluation(NamedTuple):
    """A finished evaluation: its `metrics.json`, its `predictions.jsonl`, and whether its weights could be checked."""

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]
    checked: bool


def make_model_card(
    output_dir: Path,
    run: Mapping[str, Any],
    evaluation: Evaluation | None = None,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    language: Sequence[str] = (),
) -> str:
    """The text of the card.

    Args:
        output_dir: the folder of the model: `config.json`, `*.safetensors`, the tokenizer, `loss.png`.
        run: the content of its `run.json`.
        evaluation: see `read_evaluation`; without it the card says that nothing was measured.
        repo_id: where the model is on the Hub, for the card's example; default: the folder.
        license: its identifier on the Hub: `apache-2.0`, `mit`, `other`, ...; None if it is not known.
        language: ISO 639 codes.

    Example::

        run = json.loads(Path("outputs/demo/run.json").read_text())
        card = make_model_card(Path("outputs/demo"), run, license="apache-2.0", language=["en"])
    """
    from recipe.model import library_errors  # here: --help needs none of it

    adapter = (output_dir / "adapter_config.json").is_file()
    trusted = bool(run["config"]["model"].get("trust_remote_code"))  # earlier runs had no such setting
    with library_errors(f"the weights in {output_dir}"):
        weights = [parse_local_safetensors_file_metadata(path) for path in output_dir.glob("*.safetensors")]
    name = Path(repo_id or output_dir.resolve()).name
    card = ModelCard.from_template(
        card_metadata(name, run, evaluation, adapter, license, language),
        template_path=str(CARD_TEMPLATE),
        title=escape(name),
        run=run,
        **run["config"],
        license=license,
        language=language,
        adapter=adapter,
        parameters=sum(count for file in weights for count in file.parameter_count.values()),
        sources=sources,
        address=json.dumps(repo_id or (name if output_dir.is_absolute() else str(output_dir)), ensure_ascii=False),
        **example_prompt(output_dir, trusted),
        trusted=trusted,
        has_curve=(output_dir / "loss.png").is_file(),
        evaluation=evaluation_parts(evaluation) if evaluation else None,
        escape=escape,
        fence=fence,
        shorten_paths=shorten_paths,
        public_command=public_command,
    )
    return str(card)


def card_metadata(
    name: str,
    run: Mapping[str, Any],
    evaluation: Evaluation | None,
    adapter: bool,
    license: str | None,
    language: Sequence[str],
) -> ModelCardData:
    """What the Hub itself reads of the card; what is not on the Hub is not named there."""
    hub = run["hub"]
    scores = eval_results(evaluation.metrics, hub["data"]) if evaluation else []
    return ModelCardData(
        language=list(language) or None,
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=run["config"]["model"]["model_name_or_path"] if hub["base"] else None,
        base_model_relation=("adapter" if adapter else "finetune") if hub["base"] else None,
        datasets=list(dict.fromkeys(hub["data"])) or None,
        tags=["instruction-tuning", "sft"],
        model_name=name if scores else None,
        eval_results=scores or None,
    )


def eval_results(metrics: Mapping[str, Any], hub_data: Sequence[str] = ()) -> list[EvalResult]:
    """The tuned model's scores on every split as `model-index` entries; with each, its interval, `n` and baseline.

    Example::

        [first, *_] = eval_results(json.loads(Path("outputs/demo-eval/metrics.json").read_text()))
        first.metric_type, first.metric_value  # ('exact_match', 0.9225)
        first.metric_args  # {'n': 400, 'baseline': 0.0, 'delta': 0.9225, 'ci95': [0.895, 0.9475], ...}
    """
    from recipe.evaluation.measures import MEASURES  # here: its libraries take a while, and --help needs none of it

    data = metrics["provenance"]["data"]
    name = Path(data).name if isinstance(data, str) else ""  # a mapping or a list names several files
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Instruction following",
            dataset_type=data if data in hub_data else "instruction-records",
            dataset_name=data if data in hub_data else name or "instruction records",
            dataset_split=split,
            metric_type=metric,
            metric_name=MEASURES[metric].title,
            metric_value=score["tuned"],
            metric_args={
                **{key: score[key] for key in ("n", "baseline", "delta", "ci95")},
                "ci95_of": "tuned" if score["delta"] is None else "delta",
            },
        )
        for split, scores in metrics["splits"].items()
        for metric, score in {**scores["metrics"], **scores["behaviour"]}.items()
        if score is not None and score["tuned"] is not None
    ]


def hub_sources(base: str | None, data: Any, revision: str | None = None) -> dict[str, Any]:
    """Which sources of a run are on the Hub: its `model_name_or_path` and its `data`; asked in its working folder.

    The commit of the base at `revision` is looked up in the Hub's cache on this machine.

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


def is_hub_id(source: Any) -> bool:
    """Whether a model or data source is named by its id on the Hub: `name` or `owner/name`, and no file or folder here.

    >>> [is_hub_id(source) for source in ("openai-community/gpt2", "records.jsonl", "runs/2024/gpt2", "data/*.json")]
    [True, False, False, False]
    """
    from recipe.data.sources import FORMATS  # here: it brings datasets, and --help needs none of it

    try:
        validate_repo_id(source or "")
    except HFValidationError:
        return False
    return Path(source).suffix.lower() not in FORMATS and not Path(source).exists()


def sources(data: Any) -> Iterator[tuple[str | None, str]]:
    """Each file, glob, folder or Hub id that the records came from, with its split where the user named one.

    >>> list(sources({"train": ["a.jsonl", "b.jsonl"], "test": "c.jsonl"}))
    [('train', 'a.jsonl'), ('train', 'b.jsonl'), ('test', 'c.jsonl')]
    """
    for split, named in data.items() if isinstance(data, Mapping) else [(None, data)]:
        for source in named if isinstance(named, list) else [named]:
            if isinstance(source, Mapping):  # of a mixture
                yield from sources(source["path"])
            else:
                yield split, source


def example_prompt(output_dir: Path, trusted: bool) -> dict[str, str]:
    """The chat of the example, as Python, and its prompt, as the saved tokenizer makes it.

    `trusted` says whether the folder may run code of its own, as in training.
    """
    from recipe.config import ModelArguments  # here: --help needs none of it
    from recipe.model import load_tokenizer
    from recipe.templates import saved_template

    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(output_dir), trust_remote_code=trusted))
    template = saved_template(tokenizer, f"{output_dir}")
    return {
        "chat": json.dumps(template.messages(EXAMPLE), ensure_ascii=False), "prompt": template.prompt(EXAMPLE),
    }  # fmt: skip


def read_evaluation(folder: Path, output_dir: Path) -> Evaluation:
    """The scores and the answers of a finished evaluation of the model in `output_dir`.

    Its weights are known if a folder was evaluated, but not of an endpoint, recorded answers or a model of the Hub.

    Raises:
        UserError: files are missing or do not belong together, or the evaluation is of other weights.
    """
    from recipe.data.sources import FORMATS  # here: a card without scores needs none of it
    from recipe.evaluation.answers import ECHO
    from recipe.evaluation.stored import check_scored, read_metrics, read_predictions

    metrics = read_metrics(folder)
    tuned = metrics["provenance"]["models"]["tuned"]
    name, weights = tuned["name"], tuned["weights"]
    if name == ECHO:
        raise UserError(f"evaluation {folder} is of {ECHO!r}, which repeats the input; evaluate {output_dir}")
    # of an endpoint None is recorded, of a model of the Hub its commit, of recorded answers the hash of their file
    checked = str(weights).startswith("sha256:") and Path(name).suffix.lower() not in FORMATS
    expected = weights_hash(str(output_dir))
    if checked and weights != expected:
        raise UserError(
            f"evaluation {folder} is of {name} with other weights ({weights}) than {output_dir} holds ({expected}); "
            f"evaluate {output_dir}, or name its evaluation"
        )
    predictions = read_predictions(folder)
    check_scored(folder, predictions, metrics)
    return Evaluation(metrics, predictions, checked)


def evaluation_parts(evaluation: Evaluation) -> dict[str, Any]:
    """What the template shows of an evaluation, and the functions that put scores into words."""
    from recipe.evaluation.comparison import labels_of
    from recipe.evaluation.report.page import pairs_sentence
    from recipe.evaluation.tables import judge_table, score_row
    from recipe.evaluation.verdict import cautions, findings, looked_at, verdict

    metrics, predictions, _ = evaluation
    held_out = [split for split in metrics["splits"] if split not in ("train", "all")] or list(metrics["splits"])
    headline = [prediction for prediction in predictions if prediction["split"] == held_out[0]]
    return {
        **evaluation._asdict(),
        **metrics["provenance"]["models"],
        "verdicts": [verdict(metrics, split).sentence for split in metrics["splits"]],
        "worse": findings(metrics, "worse"),
        "looked_at": looked_at(metrics),
        "score_row": score_row,
        "judge_rows": judge_table(metrics["judge"]),
        "pairs": pairs_sentence((metrics["judge"] or {}).get("pairwise")),
        "examples": examples(headline),
        "cautions": cautions(metrics, headline, labels_of(predictions)),
    }


def examples(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """The best and the worst answers of the tuned model by chrF, `SHOWN` of each; of equal ones the first records.

    There are fewer if less than twice as many were scored: none is in both.
    """
    from recipe.evaluation.comparison import example_scores, labels_of
    from recipe.evaluation.verdict import PERCENT, role_of
    from recipe.templates import transcript

    labels = [label for label in ("baseline", "tuned") if label in labels_of(rows)]
    scores = {label: example_scores(rows, label)[RANKED_BY].round(9) for label in labels}
    scored = [index for index, score in enumerate(scores["tuned"]) if math.isfinite(score)]
    best = sorted(scored, key=lambda index: -scores["tuned"][index])[: min(SHOWN, (len(scored) + 1) // 2)]
    worst = sorted(scored, key=lambda index: scores["tuned"][index])[: min(SHOWN, len(scored) // 2)]

    def example(index: int) -> dict[str, str]:
        row = rows[index]
        asked = transcript(row) or row["instruction"]
        texts = {"instruction": asked, "input": row.get("input") or None, "reference": row["output"]}
        texts |= {role_of(label): row[label]["text"] for label in labels}
        lines = [
            f"{name:<13}{one_line(text, LONGEST) or '(empty)'}" for name, text in texts.items() if text is not None
        ]
        lines = [textwrap.fill(line, width=100, subsequent_indent=" " * 13) for line in lines]
        marks = [f"{role_of(label)} {PERCENT.value(scores[label][index])}" for label in labels]
        return {"id": escape(row["id"]), "scores": ", ".join(marks), "block": fence("\n".join(lines))}

    return {"Best": [example(index) for index in best], "Worst": [example(index) for index in worst]}


def public_command(command: str, processes: int = 1) -> str:
    """Recorded commands, one a line, ready for a shell but for their paths: see `shorten_paths`.

    >>> public_command("python train.py --data /home/someone/a.jsonl")
    "python train.py --data '…/a.jsonl'"
    """
    try:
        lines = [shlex.split(line) for line in command.split("\n")]
    except ValueError:  # one command, with a line break in an argument
        lines = [shlex.split(command)]
    if processes > 1:
        lines = [["accelerate", "launch", "--num_processes", str(processes), *words] for _, *words in lines]
    return "\n".join(shlex.join(map(_public_word, words)) for words in lines)


def _public_word(word: str) -> str:
    name, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{name}{equals}{shorten_paths(value)}"


def escape(text: str) -> str:
    """A text on one line of Markdown, also in a table: nothing in it is markup.

    >>> print(escape("a|b <script> *c*"))
    a\\|b \\<script\\> \\*c\\*
    """
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", " ".join(visible(text).split()))


def fence(text: str, language: str = "text") -> str:
    """A text as a block of code that no backticks in it can end."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"
