"""What an evaluation's folder holds, checked when it is read back: somebody may have edited it, or a disk damaged it.

`evaluation.json` and `metrics.json` hold a hash of themselves, and those of the files that belong to them:
`predictions.jsonl` as it was answered and as it was scored, `judge.jsonl` as the judge left it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.config import UserError
from recipe.evaluation.answers import TEXT_FIELDS, read_answers
from recipe.evaluation.comparison import labels_of
from recipe.evaluation.headline import headline_of
from recipe.evaluation.measures import BEHAVIOUR, METRICS
from recipe.evaluation.significance import adjust
from recipe.files import file_hash, is_there, read_json, read_json_lines, read_sealed, write_sealed
from recipe.shapes import COUNT, check_shape

NUMBER, TEXT, SHARE = (None, float), (None, str), (None, [float, float])
SCORE: dict[Any, Any] = {
    "baseline": NUMBER, "tuned": NUMBER, "delta": NUMBER, "ci95": SHARE, "p?": NUMBER, "n": COUNT,
    "better": {"higher", "lower", None}, "reason?": str,
}  # fmt: skip
PART = {
    "n": COUNT, "metrics": {str: SCORE}, "behaviour": {str: SCORE},
    "families": {str: {"n": COUNT, "metrics": {str: SCORE}}},
    "outcomes": {str: {"win": COUNT, "tie": COUNT, "loss": COUNT}},
}  # fmt: skip
BY_MODEL: dict[Any, Any] = {str: COUNT}
JUDGE_SCORE: dict[Any, Any] = {
    "scale": [int, int], "n": COUNT, "scored": {**BY_MODEL, "tuned": COUNT}, "missing": BY_MODEL, "baseline": NUMBER,
    "tuned": NUMBER, "delta": NUMBER, "ci95": SHARE, "p?": NUMBER, "other_models": {str: NUMBER},
    "bounds": {str: [float, float]},
}  # fmt: skip
PAIRS = {
    **dict.fromkeys(("n", "judged", "decided", "win", "tie", "loss", "flips"), COUNT), "win_rate": NUMBER,
    "ci95": SHARE, "bounds": [float, float], "missing": BY_MODEL,
}  # fmt: skip
JUDGE = {
    "model": str, "scores": {str: JUDGE_SCORE}, "pairwise": (None, PAIRS), "error": TEXT,
    "left_out?": [str], "labels?": [str], "answers?": str, "rows_hash?": str,
}  # fmt: skip
MODEL = {"name": str, "weights": TEXT, "tokenizer?": TEXT, "template_name?": TEXT, "template?": TEXT}
BEGUN: dict[Any, Any] = {
    "models": {str: MODEL, "tuned": MODEL}, "headline?": (None, set(METRICS)), "data": object, "data_hash": str,
    "splits": BY_MODEL, "left_out?": {str: [str]}, "command": str, "versions": {str: str}, "hardware": str,
    "generation": {"max_new_tokens": COUNT, "temperature": float, "dtype?": str}, "predictions_hash?": str,
    "edited?": bool,
}  # fmt: skip
SCORES = {
    "judge": (None, JUDGE), "splits": {str: PART}, "other_models": {str: {str: PART}}, "provenance": BEGUN,
    "comparisons?": COUNT,
}  # fmt: skip
JUDGEMENT = {"id": str, "prompt": str, "status": str, "reason?": TEXT}
JUDGEMENT_OF_ONE = {**JUDGEMENT, "model": str, "score": (None, int)}
JUDGEMENT_OF_TWO = {**JUDGEMENT, "order": str, "winner": {"tuned", "baseline", "tie", None}}
STEP = range(1, 2**53)
LOG = {
    "global_step?": (None, COUNT), "best_global_step?": (None, COUNT),
    "log_history?": [{"step": STEP, "loss?": float, "eval_loss?": float, "train_loss?": float,
                      "num_input_tokens_seen?": float}],
}  # fmt: skip

SCORE_AGAIN = "run the score stage again"
START_OVER = "add --overwrite_output_dir to start over, or name another --output_dir"


def read_begun(folder: Path) -> dict[str, Any]:
    """The content of `evaluation.json`.

    Raises:
        UserError: there is none, it was changed, or an evaluation does not write such a file.
    """
    path = folder / "evaluation.json"
    if not is_there(path):
        raise UserError(f"{folder} holds answers, but no evaluation.json that says to what; {START_OVER}")
    return read_sealed(path, BEGUN, START_OVER)


def was_edited(folder: Path, begun: Mapping[str, Any]) -> bool:
    """Whether `predictions.jsonl` is another than the models' answers, now or at an earlier look; a line tells it."""
    path = folder / "predictions.jsonl"
    if begun.get("edited") or file_hash(path) == begun.get("predictions_hash", file_hash(path)):
        return begun.get("edited", False)
    said = "was changed after the models had answered; it is taken as it is, and the report says so"
    print(f"note: {path} {said}", file=sys.stderr)
    return True


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The finished answers of an evaluation.

    Raises:
        UserError: there are none, or a line that is no prediction, or lacks the answer of a model.
    """
    path = folder / "predictions.jsonl"
    predictions = list(read_answers(path, strict=True).values())
    unfinished = [p for p in predictions if not {"split", *TEXT_FIELDS} <= p.keys()]
    if not predictions or unfinished:
        raise UserError(f"{folder} holds no finished answers; run the generate stage, which resumes")
    labels = labels_of(predictions)
    for prediction in predictions:
        if missing := [label for label in labels if not isinstance(prediction.get(label), Mapping)]:
            raise UserError(
                f"{path}: {prediction['id']!r} has no answer of {missing[0]!r}; run the generate stage, which asks for "
                "what is missing"
            )
    return predictions


def provenance_of(predictions: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """What `metrics.json` says of the answers that are scored: the content of `evaluation.json`, and their hash.

    Raises:
        UserError: they are not those of the records and the models that were asked; with the counts of both.
    """
    begun, path = read_begun(folder), folder / "predictions.jsonl"
    present, labels = dict(Counter(prediction["split"] for prediction in predictions)), labels_of(predictions)
    problem = ""
    if set(labels) != set(begun["models"]):
        problem = f"answers of {', '.join(labels)}, not of {', '.join(begun['models'])}"
    if present != begun["splits"]:
        problem = f"{present} records, not {begun['splits']}"
    if problem:
        raise UserError(
            f"{path} holds {problem}, as evaluation.json has it; run the generate stage again, which asks for what is "
            "missing and leaves out what is of other records"
        )
    return {**begun, "edited": was_edited(folder, begun), "predictions_hash": file_hash(path)}


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    write_sealed(folder / "metrics.json", metrics)


def read_metrics(folder: Path) -> dict[str, Any]:
    """The scores of an evaluation.

    Raises:
        UserError: there are none, they were changed, or the file is not what the score stage writes.
    """
    path = folder / "metrics.json"
    if not is_there(path):
        raise UserError(f"{folder} holds no scores; run the score stage first")
    way_out = f"remove it and {SCORE_AGAIN}"
    metrics = read_sealed(path, SCORES, way_out)
    if problem := _find_gap(metrics):
        raise UserError(f"{path}: not what the score stage writes ({problem}); {way_out}")
    adjust(metrics)  # an earlier version did not
    return metrics


def check_scored(folder: Path, predictions: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> None:
    """Refuse scores that are not of the very answers that `predictions.jsonl` holds now.

    Raises:
        UserError: with what is not the same.
    """
    path = folder / "predictions.jsonl"
    check_inputs(predictions, metrics)
    if file_hash(path) != metrics["provenance"].get("predictions_hash", file_hash(path)):
        raise UserError(f"{path} was changed after it was scored (its SHA-256 differs): {SCORE_AGAIN}")


def check_inputs(predictions: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> None:
    """Refuse predictions and scores of different evaluations, before a page shows them as one.

    Raises:
        UserError: with the records or the models of both, and what to do.
    """
    expected = {split: part["n"] for split, part in metrics["splits"].items()}
    present = Counter(prediction["split"] for prediction in predictions)
    if present != expected:
        raise UserError(f"metrics.json covers {expected} records, predictions.jsonl holds {dict(present)}: score again")
    others, labels = list(metrics["other_models"]), labels_of(predictions)
    if "tuned" not in labels or sorted(others) != sorted({*labels} - {"tuned", "baseline"}):
        scored = ", ".join(["tuned", *others])
        raise UserError(f"metrics.json covers {scored}, predictions.jsonl holds {', '.join(labels)}: score again")


def _find_gap(metrics: Mapping[str, Any]) -> str | None:
    """What does not fit together, of scores that have the right shape."""
    splits, headline = metrics["splits"], headline_of(metrics)
    if not splits:
        return "no splits"
    for by_split in ({"": splits} | metrics["other_models"]).values():
        if by_split.keys() != splits.keys():
            return "a model without scores of a split"
        for split, part in by_split.items():
            scored = [part["metrics"], *(entry["metrics"] for entry in part["families"].values())]
            unknown = {*part["metrics"], *part["outcomes"]} - METRICS.keys() | part[
                "behaviour"
            ].keys() - BEHAVIOUR.keys()
            if unknown:
                return f"an unknown score, {sorted(unknown)[0]!r}"
            if any(headline not in scores for scores in scored):
                return f"no {headline} of {split}, the headline score"
            for kind in ("metrics", "behaviour", "families"):
                if part[kind].keys() != splits[split][kind].keys():
                    return f"other {kind} of one model than of another"
    for score in ((metrics["judge"] or {}).get("scores") or {}).values():
        if score["bounds"].keys() != score["scored"].keys() or score["scale"][0] >= score["scale"][1]:
            return "a judge's score without its scale or its bounds"
    return None


def read_judgements(folder: Path, judge: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    """The rows of `judge.jsonl`, None without the file.

    Raises:
        UserError: they are not those that `metrics.json` summarizes.
    """
    path = folder / "judge.jsonl"
    way_out = "run the judge stage again, with the same --judge: what it has answered is not asked again"
    if judge is None:
        return None
    if not is_there(path):
        print(f"note: {path} is missing: the report holds the judge's means, but none of its words", file=sys.stderr)
        return None
    rows = read_json_lines(path)
    if file_hash(path) != judge.get("rows_hash", file_hash(path)):
        raise UserError(f"{path} was changed after the judge had answered (its SHA-256 differs); {way_out}")
    for number, row in enumerate(rows):
        is_pair = isinstance(row, dict) and "order" in row
        check_shape(row, JUDGEMENT_OF_TWO if is_pair else JUDGEMENT_OF_ONE, f"{path} row {number}", way_out)
    return rows


def read_log(path: Path, expected: str | None = None) -> dict[str, Any]:
    """A training run's `trainer_state.json`, empty if there is none; `expected` is the file's hash, if it is known.

    Raises:
        UserError: it was changed, or is not what a Trainer writes.
    """
    way_out = "put it back, or remove it: the report then has no loss curve"
    if not is_there(path):
        if expected:
            print(f"note: {path} is missing: the report has no loss curve", file=sys.stderr)
        return {}
    state = read_json(path)
    if expected not in (None, file_hash(path)):
        raise UserError(f"{path} was changed after the run had ended (its SHA-256 differs); {way_out}")
    check_shape(state, LOG, str(path), way_out)
    return state
