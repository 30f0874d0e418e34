"""One self-contained page that shows whether fine-tuning helped: `report.html`, and its figures as PNGs."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from recipe.console import visible
from recipe.evaluation.comparison import labels_of
from recipe.evaluation.headline import headline_of
from recipe.evaluation.measures import MEASURES
from recipe.evaluation.report.examples import embed_json, example_columns, is_pair
from recipe.evaluation.report.figures import draw_pictures
from recipe.evaluation.significance import ENOUGH_TO_JUDGE
from recipe.evaluation.stored import check_inputs
from recipe.evaluation.tables import judge_table, score_row
from recipe.evaluation.verdict import (
    PERCENT,
    cautions,
    findings,
    looked_at,
    model_name,
    verdict,
    weakest_first,
)
from recipe.files import write_whole

HERE = Path(__file__).parent
FILES = {
    "predictions.jsonl": "every response",
    "metrics.json": "every score",
    "judge.jsonl": "every judgement",
    "evaluation.json": "models, data and settings",
    "deltas.png": "differences",
    "outcomes.png": "better, equal, worse",
    "loss.png": "loss curve",
}


def write_report(
    output_dir: Path,
    predictions: list[dict[str, Any]],
    metrics: dict[str, Any],
    judge_rows: list[dict[str, Any]] | None = None,
    log_history: list[dict[str, Any]] | None = None,
    chosen_step: int | None = None,
) -> None:
    """Write `report.html` with its figures inside, and the figures as PNGs beside it.

    Args:
        output_dir: gets `report.html`, `deltas.png` and `outcomes.png` (with a baseline) and `loss.png` (with a
            history); the page links the other files of the evaluation that are there.
        predictions, metrics, judge_rows: the content of `predictions.jsonl`, `metrics.json` and `judge.jsonl`.
        log_history: of the tuned model's training, as in its `trainer_state.json`.
        chosen_step: the step whose weights were evaluated.

    Raises:
        UserError: the files do not belong together.

    Example::

        write_report(Path("outputs/demo-eval"), predictions, metrics, log_history=trainer.state.log_history)
    """
    check_inputs(predictions, metrics)
    judge_rows = summarized_rows(metrics["judge"], judge_rows or [], predictions)
    output_dir.mkdir(parents=True, exist_ok=True)
    splits, labels, judge = list(metrics["splits"]), labels_of(predictions), metrics["judge"]
    others = [label for label in labels if label not in ("baseline", "tuned")]
    of_first_split = [prediction for prediction in predictions if prediction["split"] == splits[0]]
    pictures = draw_pictures(output_dir, metrics, log_history, chosen_step)
    page = render(
        splits=splits,
        others=others,
        compared="baseline" in labels,
        verdicts=[verdict(metrics, split) for split in splits],
        better=findings(metrics, "better"),
        worse=findings(metrics, "worse"),
        looked_at=looked_at(metrics),
        **turned(metrics["splits"][splits[0]]["outcomes"], headline_of(metrics)),
        cautions=cautions(metrics, of_first_split, labels),
        pictures=pictures,
        sections=[split_section(split, metrics, others) for split in splits],
        measures=MEASURES,
        enough=ENOUGH_TO_JUDGE,
        judge=judge,
        judge_rows=judge_table(judge, others),
        pairs=pairs_sentence(judge and judge["pairwise"]),
        examples=example_columns(predictions, labels, judge_rows, judge or {}),
        provenance=metrics["provenance"],
        templates=templates_in_use(metrics["provenance"]["models"]),
        # without a judgement, judge.jsonl is of earlier answers
        files={f: FILES[f] for f in FILES if (output_dir / f).is_file() and (judge or f != "judge.jsonl")},
    )
    write_whole(output_dir / "report.html", page)


def summarized_rows(
    judge: Mapping[str, Any] | None, rows: Iterable[dict[str, Any]], predictions: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of `judge.jsonl` that `metrics.json` summarizes; others are another judge's, or of other records."""
    if judge is None:
        return []
    ids, labels = {prediction["id"] for prediction in predictions}, labels_of(predictions)
    scored = judge["scores"]
    summarized = [
        r for r in rows if (judge["pairwise"] if is_pair(r) else r["prompt"] in scored and r["model"] in labels)
    ]
    return [row for row in summarized if row["id"] in ids]


def split_section(split: str, metrics: Mapping[str, Any], others: Sequence[str]) -> dict[str, Any]:
    """The tables of one split, as text."""
    part = metrics["splits"][split]
    further = [metrics["other_models"][label][split] for label in others]
    headline = headline_of(metrics)
    section: dict[str, Any] = {"name": split, "n": part["n"], "headline": MEASURES[headline].title, "families": []}
    for kind in ("metrics", "behaviour"):
        section[kind] = [
            score_row(name, score, part["n"], [other[kind][name] for other in further])
            for name, score in part[kind].items()
        ]
    for family, entry in weakest_first(part["families"], headline):
        scores = [other["families"][family]["metrics"][headline] for other in further]
        row = score_row(headline, entry["metrics"][headline], entry["n"], scores)
        section["families"].append({**row, "title": str(family)})
    return section


def templates_in_use(models: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The models asked in each template, by the template's source."""
    templates: dict[str, list[str]] = {}
    for label, model in models.items():
        if model.get("template"):
            templates.setdefault(model["template"], []).append(label)
    return templates


def turned(outcomes: Mapping[str, Mapping[str, int]], headline: str) -> dict[str, Any]:
    """On how many examples the headline score went up and down, or exact match where no single example has it."""
    name = headline if headline in outcomes else "exact_match"
    words = {"better": f"scored higher in {MEASURES[name].title}.", "worse": f"scored lower in {MEASURES[name].title}."}
    if name == "exact_match":
        words = {"better": "went from wrong to exactly right.", "worse": "went from exactly right to wrong."}
    return {"outcomes": outcomes.get(name), "turned_by": name, "turned": words}


def pairs_sentence(pairs: Mapping[str, Any] | None) -> str | None:
    """The judge's result on both responses side by side."""
    if not pairs:
        return None
    text = f"Side by side, in both orders: of {pairs['judged']:,} pairs, tuned wins {pairs['win']:,}, "
    text += f"ties {pairs['tie']:,} and loses {pairs['loss']:,}."
    if pairs["win_rate"] is not None:
        interval = f" (95 % interval {' to '.join(map(PERCENT.value, pairs['ci95']))})" if pairs["ci95"] else ""
        text += f" Win rate {PERCENT.value(pairs['win_rate'])}{interval}, where a tie counts half."
    if asked := pairs["judged"] - pairs["decided"]:
        text += f" In {pairs['flips']:,} of the {asked:,} pairs asked about, the order decided."
    return text


def render(**context: Any) -> str:
    """The page; its policy allows only the style and the script that are written into it, and no network."""
    style, script = ((HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters.update(nonbreaking=nonbreaking, name=model_name, embed=embed_json)
    # a content security policy names an inline text by its hash
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'"
    return environment.get_template("report.html.jinja").render(
        **context,
        style=Markup(style),
        script=Markup(script),
        policy=Markup(f"{policy}; base-uri 'none'; form-action 'none'"),
    )


def nonbreaking(text: str) -> str:
    """A sentence whose numbers stay on one line with their units, and with the arrow between them."""
    return re.sub(r" (?=[%→]|points\b)|(?<=→) ", "\N{NO-BREAK SPACE}", text)
