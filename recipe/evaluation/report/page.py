"""One self-contained page on which a person sees whether fine-tuning helped: `report.html`, and its figures as PNGs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from recipe import figures
from recipe.config import UserError
from recipe.console import visible
from recipe.evaluation.comparison import example_scores, labels_of
from recipe.evaluation.judge.summary import WITH_VALUE
from recipe.evaluation.report import pictures
from recipe.evaluation.report.pictures import Interval, Lengths, Picture, make_picture
from recipe.evaluation.verdict import (
    ENOUGH_TO_JUDGE,
    MEASURES,
    PERCENT,
    cautions,
    counted,
    direction,
    findings,
    headline_metric,
    is_too_few,
    judge_scale,
    judged,
    model_name,
    refuse_nan,
    scale,
    title,
    verdict,
)
from recipe.files import write_whole

HERE = Path(__file__).parent
DIRECTIONS = {"better": "better", "worse": "worse", "unclear": "not shown", "neutral": "", "missing": "missing"}
FILES = {
    "predictions.jsonl": "every response",
    "metrics.json": "every score",
    "judge.jsonl": "every judgement",
    "evaluation.json": "what was asked of whom",
}
DRAWINGS = {
    "deltas.png": "differences",
    "outcomes.png": "better, equal, worse",
    "lengths.png": "response lengths",
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
        output_dir: where `report.html`, `deltas.png` (with a baseline), `outcomes.png` (likewise), `lengths.png` and
            `loss.png` (with a history) go; such a figure of an earlier report is removed where there is nothing to
            draw. The page links the files of the evaluation that lie there.
        predictions: the lines of `predictions.jsonl`.
        metrics: the content of `metrics.json`.
        judge_rows: the lines of `judge.jsonl`; those of what `metrics` has no word of are left out.
        log_history: of the tuned model's training, as in its `trainer_state.json`.
        chosen_step: the step whose weights were evaluated.

    Raises:
        UserError: scores and predictions, or judgements and predictions, do not belong together; a score is NaN.

    Example::

        write_report(Path("outputs/demo-eval"), predictions, metrics, log_history=trainer.state.log_history)
    """
    output_dir = Path(output_dir)
    judge_rows = rows_of_judge(metrics["judge"], judge_rows or [])
    check_inputs(predictions, metrics, judge_rows)
    output_dir.mkdir(parents=True, exist_ok=True)
    labels = labels_of(predictions)
    first = next(iter(metrics["splits"]))
    headline_predictions = [prediction for prediction in predictions if prediction["split"] == first]
    pictures = draw_pictures(output_dir, headline_predictions, labels, metrics, log_history, chosen_step)
    others = [label for label in labels if label not in ("baseline", "tuned")]
    said = verdict(metrics)
    lead, colon, rest = said.sentence.partition(": ")
    provenance = metrics.get("provenance") or {}
    context = {
        "verdict": said,
        "lead": lead + colon if colon else "",
        "rest": nonbreaking(rest or lead),
        "other_verdicts": [verdict(metrics, split) for split in list(metrics["splits"])[1:]],
        "compared": "baseline" in labels,
        "better": findings(metrics, "better"),
        "worse": findings(metrics, "worse"),
        "first_split": first,
        "turned": metrics["splits"][first]["outcomes"].get("exact_match"),
        "cautions": cautions(metrics, headline_predictions, labels),
        "sections": [split_section(split, metrics, labels) for split in metrics["splits"]],
        "others": others,
        "pictures": pictures,
        "judge": metrics["judge"],
        "judge_rows": judge_table(metrics["judge"], judge_rows, others),
        "pairs": pairs_sentence((metrics["judge"] or {}).get("pairwise")),
        "provenance": provenance,
        "models": provenance.get("models") or {},
        "facts": list(provenance_facts(provenance)),
        "files": files_beside(output_dir, metrics["judge"], pictures),
        "count": len(predictions),
        "splits": list(metrics["splits"]),
        "families": list(dict.fromkeys(filter(None, map(family_of, predictions)))),
        "measures": MEASURES,
        "enough": ENOUGH_TO_JUDGE,
        "examples": embed_json(example_columns(predictions, labels, judge_rows, metrics)),
    }
    write_whole(output_dir / "report.html", render(context))


def check_inputs(
    predictions: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], judge_rows: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse inputs of different evaluations, before a page shows them as one."""
    refuse_nan(metrics)
    counts = {split: part["n"] for split, part in metrics["splits"].items()}
    found: dict[str, int] = dict.fromkeys(counts, 0)
    for prediction in predictions:
        found[prediction["split"]] = found.get(prediction["split"], 0) + 1
    if found != counts:
        raise UserError(f"metrics.json is over {counts}, but predictions.jsonl holds {found} records: score again")
    ids = {prediction["id"] for prediction in predictions}
    strangers = [row["id"] for row in judge_rows if row["id"] not in ids]
    if strangers:
        raise UserError(
            f"judge.jsonl has {len(strangers)} rows of ids that are not in predictions.jsonl, {strangers[0]!r} first: "
            "judge again, or remove the file"
        )


# --- the parts of the page --------------------------------------------------------------------------------------------


def rows_of_judge(judge: Mapping[str, Any] | None, judge_rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that the judge's word in `metrics.json` is of: others have no known scale, or are of another judge."""
    prompts, pairs = ((judge or {}).get(key) or {} for key in ("scores", "pairwise"))
    return [row for row in judge_rows if (pairs if is_pair(row) else row["prompt"] in prompts)]


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row is of two responses side by side, whatever its prompt is called."""
    return "order" in row


def files_beside(output_dir: Path, judge: Mapping[str, Any] | None, pictures: Iterable[str]) -> dict[str, str]:
    """The files of this evaluation and what is in them, by name; drawings of an earlier report are removed."""
    drawn = {f"{name}.png" for name in pictures}
    for name in DRAWINGS.keys() - drawn:
        (output_dir / name).unlink(missing_ok=True)
    files = {name: what for name, what in FILES.items() if name != "judge.jsonl" or judge is not None}
    return {name: what for name, what in (files | DRAWINGS).items() if (output_dir / name).is_file()}


def family_of(prediction: Mapping[str, Any]) -> str | None:
    """The family as text, None where there is none or a blank one."""
    family = prediction.get("family")
    return None if family is None else str(family) if str(family).strip() else None


def split_section(split: str, metrics: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """The tables of one split, as text."""
    part = metrics["splits"][split]
    others = [
        (metrics.get("other_models") or {}).get(label, {}).get(split)
        for label in labels
        if label not in ("baseline", "tuned")
    ]
    headline = headline_metric(part["metrics"])
    return {
        "name": split,
        "n": part["n"],
        "headline": title(headline) if headline else None,
        **{
            kind: [
                score_row(name, score, part["n"], [(o or {}).get(kind) for o in others])
                for name, score in part[kind].items()
            ]
            for kind in ("metrics", "behaviour")
        },
        "families": [
            {
                **score_row(
                    headline,
                    entry["metrics"].get(headline),
                    entry["n"],
                    [((o or {}).get("families", {}).get(family) or {}).get("metrics") for o in others],
                ),
                "title": str(family),
            }
            for family, entry in weakest_first(part["families"], headline)
            if headline
        ],
    }  # fmt: skip


def weakest_first(families: Mapping[str, Any], headline: str | None) -> list[tuple[str, Mapping[str, Any]]]:
    """Families by the difference of the headline score, or by that score where there is no difference."""
    if headline is None:
        return []

    def strength(entry: Mapping[str, Any]) -> tuple[bool, float]:
        score = entry["metrics"].get(headline) or {}
        value = score.get("delta") if score.get("delta") is not None else score.get("tuned")
        return value is None, 0 if value is None else value if score["better"] == "higher" else -value

    return sorted(families.items(), key=lambda item: strength(item[1]))


def score_row(
    name: str, score: Mapping[str, Any] | None, n: int, others: Iterable[Mapping[str, Any] | None] = ()
) -> dict[str, Any]:
    """One line of a table: the score of each model, the difference, its interval and its direction, as text.

    `n` are the records; `over` says of how many of them the score is, where that is not all.
    """
    units = scale(name)
    score = score or {"baseline": None, "tuned": None, "delta": None, "ci95": None, "better": None, "n": 0}
    interval = "–"
    if score["ci95"] is not None:
        show = units.value if score["delta"] is None else units.change
        interval = " to ".join(map(show, score["ci95"]))
    way, part = direction(score), counted(score, n)
    return {
        "n": f"{n:,}",
        "over": "" if part is None else f"{part:,} of {n:,}",
        "name": name,
        "title": title(name),
        "unit": units.unit,
        "baseline": units.value(score["baseline"]),
        "tuned": units.value(score["tuned"]),
        "others": [
            {
                "value": units.value(entry["tuned"]) if entry else "–",
                "change": units.change(entry["delta"]) if entry and entry["delta"] is not None else "",
                "over": "" if counted(entry, n) in (None, part) else f"n {counted(entry, n):,}",
            }
            for entry in ((other or {}).get(name) for other in others)
        ],
        "change": units.change(score["delta"]),
        "interval": interval,
        "direction": way,
        "word": direction_word(score),
    }


def direction_word(score: Mapping[str, Any]) -> str:
    """The direction of a difference as a table says it, or why there is none."""
    way = direction(score)
    if way == "unclear" and (is_too_few(score) or score["ci95"] is None):
        return "too few" if is_too_few(score) else "no interval"
    return DIRECTIONS[way]


def provenance_facts(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is known of data, settings and machine, in words, under names."""
    data = provenance.get("data")
    if data:
        yield "Data", ", ".join(f"{k}: {v}" for k, v in data.items()) if isinstance(data, Mapping) else str(data)
    if provenance.get("data_hash"):
        yield "Data hash", provenance["data_hash"]
    groups = {"splits": "Records", "generation": "Generation", "versions": "Versions"}
    for key, name in groups.items():
        if provenance.get(key):
            yield name, ", ".join(f"{k} {v}" for k, v in provenance[key].items() if v is not None)
    if provenance.get("hardware"):
        yield "Hardware", provenance["hardware"]


def judge_table(
    judge: Mapping[str, Any] | None, judge_rows: Sequence[Mapping[str, Any]], others: Sequence[str]
) -> list[dict[str, Any]]:
    """One line a prompt: mean scores, their difference, and how far missing scores could move the means."""
    table = []
    for prompt, score in ((judge or {}).get("scores") or {}).items():
        units = judge_scale(score)
        show = units.value if score["delta"] is None else units.change
        parts = []
        for model in score["scored"]:
            statuses = Counter(
                row["status"]
                for row in judge_rows
                if not is_pair(row) and (row["prompt"], row["model"]) == (prompt, model)
            )
            missing = ", ".join(f"{n:,} {status}" for status, n in statuses.items() if status not in WITH_VALUE)
            parts.append(
                {
                    "model": model,
                    "name": model_name(model),
                    "scored": f"{score['scored'][model]:,} of {score['n']:,}",
                    "empty": f"{score['empty'].get(model, 0):,}",
                    "bounds": " to ".join(map(units.value, score["bounds"][model])),
                    "missing": missing,
                }
            )
        table.append(
            {
                "title": prompt,
                "scale": f"{score['scale'][0]} to {score['scale'][1]}",
                "baseline": units.value(score["baseline"]),
                "tuned": units.value(score["tuned"]),
                "others": [units.value(score["other_models"].get(label)) for label in others],
                "change": units.change(score["delta"]),
                "interval": "–" if score["ci95"] is None else " to ".join(map(show, score["ci95"])),
                "direction": direction(judged(score)),
                "word": direction_word(judged(score)),
                "parts": parts,
            }
        )
    return table


def pairs_sentence(pairs: Mapping[str, Any] | None) -> str | None:
    """What the judge said of both responses side by side."""
    if pairs is None:
        return None
    sentences = [
        f"Side by side, asked in both orders: of {pairs['judged']:,} pairs, tuned wins {pairs['win']:,}, "
        f"ties {pairs['tie']:,} and loses {pairs['loss']:,}."
    ]
    if pairs["win_rate"] is not None:
        interval = f" (95 % interval {' to '.join(map(PERCENT.value, pairs['ci95']))})" if pairs["ci95"] else ""
        sentences.append(f"Win rate {PERCENT.value(pairs['win_rate'])}{interval}, a tie counting half.")
    if pairs["flip_rate"] is not None:
        asked = pairs["judged"] - pairs["decided"]
        rate = PERCENT.value(pairs["flip_rate"])
        sentences.append(f"Of the {asked:,} that needed asking, {pairs['flips']:,} changed with the order ({rate}).")
    return " ".join(sentences)


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_pictures(
    output_dir: Path,
    predictions: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    metrics: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]] | None,
    chosen_step: int | None,
) -> dict[str, Picture]:
    """The figures of the first split that there is something to draw for, by name; each also as `{name}.png`."""
    part = next(iter(metrics["splits"].values()))
    drawings = {}
    groups = forest_rows(part)
    if any(groups.values()):
        count = sum(map(len, groups.values()))
        alt = (
            f"Forest plot of {count} differences, tuned minus base, with 95 % intervals; the tables hold their values."
        )
        drawings["deltas"] = partial(pictures.draw_deltas, groups), alt
    outcomes = outcome_counts(part, metrics["judge"])
    if outcomes:
        alt = "; ".join(
            f"{name}: tuned better on {won:,}, equal on {tied:,}, worse on {lost:,}"
            for name, (won, tied, lost) in outcomes.items()
        )
        drawings["outcomes"] = partial(pictures.draw_outcomes, outcomes), f"Bars of outcomes per example. {alt}."
    lengths, unit = response_lengths(predictions, labels, part)
    alt = "; ".join(f"{row.label}: {row.note}" for row in lengths)
    drawings["lengths"] = partial(pictures.draw_lengths, lengths, unit), f"Histograms of {unit} per response. {alt}."
    if log_history and any("loss" in entry or "train_loss" in entry for entry in log_history):
        chosen = "" if chosen_step is None else f" Step {chosen_step:,} was chosen."
        drawings["loss"] = (
            partial(figures.draw_loss, log_history, chosen_step),
            f"Training and validation loss over optimizer steps.{chosen}",
        )
    return {name: make_picture(draw, alt, output_dir / f"{name}.png") for name, (draw, alt) in drawings.items()}


def forest_rows(part: Mapping[str, Any]) -> dict[str, list[Interval]]:
    """Differences in points by group: all scores that are fractions, and the headline score by family."""

    def rows(named: Iterable[tuple[str, str, Mapping[str, Any] | None]]) -> list[Interval]:
        return [
            Interval(
                one_line(str(label)),
                100 * s["delta"],
                100 * s["ci95"][0],
                100 * s["ci95"][1],
                direction(s),
            )
            for name, label, s in named
            if s is not None and s["delta"] is not None and s["ci95"] is not None and scale(name) is PERCENT
        ]

    headline = headline_metric(part["metrics"])
    groups = {"Scores": rows((name, title(name), score) for name, score in part["metrics"].items())}
    if headline:
        ranked = weakest_first(part["families"], headline)
        families = rows((headline, family, entry["metrics"].get(headline)) for family, entry in ranked)
        if len(families) > pictures.MAX_FAMILIES:  # the extremes are what one looks for
            families = families[: pictures.MAX_FAMILIES // 2] + families[-pictures.MAX_FAMILIES // 2 :]
            groups["Extreme families"] = families
        elif families:
            groups["Families"] = families
    return groups


def outcome_counts(part: Mapping[str, Any], judge: Mapping[str, Any] | None) -> dict[str, tuple[int, int, int]]:
    """(better, equal, worse) counts of examples for each score, and by the judge's pairwise verdicts."""
    counts = {title(name): (o["win"], o["tie"], o["loss"]) for name, o in part["outcomes"].items()}
    pairs = (judge or {}).get("pairwise")
    if pairs:
        counts["Judge, pairs"] = (pairs["win"], pairs["tie"], pairs["loss"])
    return counts


def response_lengths(
    predictions: Sequence[Mapping[str, Any]], labels: Sequence[str], part: Mapping[str, Any]
) -> tuple[list[Lengths], str]:
    """Lengths of the references and of each model's responses, all in tokens, or all in words if a count is unknown."""
    answers = {label: [prediction[label] for prediction in predictions] for label in labels}
    # a count of reference tokens holds the end-of-text token, a count of response tokens does not
    reference = [answer.get("reference_tokens") for answer in answers["tuned"]]
    everything = [*reference, *(answer.get("tokens") for row in answers.values() for answer in row)]
    if None in everything:
        unit = "words"
        reference = [len(prediction["output"].split()) for prediction in predictions]
        counts = {label: [len(answer["text"].split()) for answer in row] for label, row in answers.items()}
    else:
        unit = "tokens"
        reference = [count - 1 for count in reference]
        counts = {label: [answer["tokens"] for answer in row] for label, row in answers.items()}
    rows = [Lengths("References", "reference", reference, f"median {median(reference):g}")]
    stop_rate = part["behaviour"].get("stop_rate") or {}
    for label, values in counts.items():
        rate = stop_rate.get(label)
        note = f"median {median(values):g}" + ("" if rate is None else f", stop rate {PERCENT.value(rate)}")
        role = label if label in ("baseline", "tuned") else "other"
        rows.append(Lengths(one_line(model_name(label)), role, values, note))
    return rows, unit


def one_line(text: str, limit: int = 28) -> str:
    """A label short enough for a figure, with nothing unseen in it."""
    shown = visible(" ".join(text.split()))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


# --- the example browser ----------------------------------------------------------------------------------------------


def example_columns(
    predictions: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    judge_rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """All examples by column, as report.js takes them: names once, not once an example."""
    row_of = {prediction["id"]: index for index, prediction in enumerate(predictions)}
    n = len(predictions)
    scores = {label: {k: rounded(v) for k, v in example_scores(predictions, label).items()} for label in labels}
    judgements: dict[str, dict[str, list]] = {label: {} for label in labels}  # label → prompt → per row
    pairwise: list[list | None] = [None] * n
    for row in judge_rows:
        index = row_of[row["id"]]
        if is_pair(row):
            entry = [row["order"], row["status"], row["winner"], row.get("reason")]
            pairwise[index] = [*(pairwise[index] or []), entry]
        else:
            column = judgements[row["model"]].setdefault(row["prompt"], [None] * n)
            column[index] = [row["status"], row["score"], row.get("reason")]
    prompts = dict.fromkeys(prompt for columns in judgements.values() for prompt in columns)
    return {
        "models": [[label, model_name(label)] for label in labels],
        "scores": {name: title(name) for name in next(iter(scores.values()), {})},
        "judge_scales": {prompt: metrics["judge"]["scores"][prompt]["scale"] for prompt in prompts},
        **{key: [prediction[key] for prediction in predictions] for key in ("id", "split")},
        "family": [family_of(prediction) for prediction in predictions],
        **{
            key: [prediction.get(key) or "" for prediction in predictions] for key in ("instruction", "input", "output")
        },
        "answers": {
            label: {
                "text": [prediction[label]["text"] for prediction in predictions],
                "tokens": [prediction[label].get("tokens") for prediction in predictions],
                "stop_reason": [prediction[label].get("stop_reason") for prediction in predictions],
                "scores": scores[label],
                "judge": judgements[label],
            }
            for label in labels
        },
        "pairwise": pairwise if any(pairwise) else None,
    }


def rounded(values: Iterable[float]) -> list[float]:
    """Six decimals, and 1 rather than 1.0: fewer characters."""
    return [int(value) if value in (0, 1) else round(float(value), 6) for value in values]


def embed_json(content: Any) -> Markup:
    """JSON that can stand in a script element: nothing in it can end the element or start a comment.

    >>> print(embed_json({"text": "</script><!--"}))
    {"text":"\\u003c/script\\u003e\\u003c!--"}
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # half of a surrogate pair can stand in JSON, but in no file
    return Markup(re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text))


# --- rendering --------------------------------------------------------------------------------------------------------


def render(context: Mapping[str, Any]) -> str:
    """The page; its policy allows the one style and the one script that are written into it, and no network."""
    style, script = ((HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    policy = f"default-src 'none'; img-src data:; style-src {csp_hash(style)}; script-src {csp_hash(script)}"
    environment.filters.update(nonbreaking=nonbreaking, percent=PERCENT.value, fragment=fragment, name=model_name)
    return environment.get_template("report.html.jinja").render(
        **context,
        style=Markup(style),
        script=Markup(script),
        policy=Markup(policy + "; base-uri 'none'; form-action 'none'"),
    )


def nonbreaking(text: str) -> str:
    """A sentence whose numbers stay on one line with their signs and units."""
    return re.sub(r" (?=[%→]|points\b|to [+−0-9])|(?<=→) |(?<=to) (?=[+−0-9])", "\N{NO-BREAK SPACE}", text)


def fragment(text: str) -> str:
    """A value as it stands in the fragment of an address."""
    return quote(text, errors="replace")


def csp_hash(text: str) -> str:
    """The source expression by which a content security policy allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
