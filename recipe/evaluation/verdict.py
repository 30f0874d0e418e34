"""What the scores of an evaluation say, in words: the verdict, the findings, and the cautions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipe.evaluation.comparison import is_not_a_number
from recipe.evaluation.headline import headline_of
from recipe.evaluation.measures import MEASURES
from recipe.evaluation.significance import (
    ENOUGH_TO_JUDGE,
    Direction,
    Kind,
    differences,
    direction,
    holm,
    judged,
    lacks_p,
    standing,
)

SPELLED_OUT = ("exact_match", "reference_loss", "perplexity", "bits_per_byte")  # titles that are words, not names
FEW_EXAMPLES = 100  # below, an interval is so wide that only large differences can be shown
ENDINGS = {  # of responses, by `stop_reason`, that may lack their end
    "length": "reached the limit of --max_new_tokens",
    "context": "reached the end of the context",
    "refused": "were refused by the server, or cut by its filter",
    None: "ended in an unknown way, and may have been cut off",
}


@dataclass(frozen=True)
class Scale:
    """How a score is written: `factor` times the value with `digits` decimals and a sign, and its units."""

    factor: float = 100
    digits: int = 1
    sign: str = " %"
    unit: str = ""
    unit_of_change: str = "points"

    def value(self, value: float | None) -> str:
        """A score with its sign, such as 92.2 %; `–` where it is missing."""
        return "–" if value is None else _fixed(self.factor * value, self.digits) + self.sign

    def change(self, delta: float | None) -> str:
        """A difference with plus or minus, such as −3.1; `–` where it is missing."""
        if delta is None:
            return "–"
        text = _fixed(self.factor * delta, self.digits, sign="+")
        return text if re.search("[1-9]", text) else text.removeprefix("+")  # zero has no sign

    def interval(self, score: Mapping[str, Any]) -> str:
        """The 95 % interval of a score's change, or of the score where nothing is compared; `–` where it is missing."""
        show = self.value if score["delta"] is None else self.change
        return "–" if score["ci95"] is None else " to ".join(map(show, score["ci95"]))


PERCENT = Scale()
SCALES = {
    "reference_loss": Scale(1, 3, "", "nats/token", "nats/token"),
    "perplexity": Scale(1, 2, "", "", ""),
    "bits_per_byte": Scale(1, 3, "", "bits/byte", "bits/byte"),
    "length_ratio": Scale(1, 2, "", "", ""),
}


def scale(name: str) -> Scale:
    """How the score of this name is written."""
    return SCALES.get(name, PERCENT)


def judge_scale(score: Mapping[str, Any]) -> Scale:
    """How a judge's mean is written: on the judge's own scale, with more decimals if the scale is short."""
    low, high = score["scale"]
    return Scale(1, 1 if high - low > 20 else 2, "", f"{low} to {high}", "")


def role_of(label: str) -> str:
    """What a model is called in a sentence: base, tuned, and any other by its label in quotes."""
    return {"baseline": "base", "tuned": "tuned"}.get(label, f"“{label}”")


def model_name(label: str) -> str:
    """What a model is called in a heading: `role_of` with a capital letter."""
    return {"baseline": "Base", "tuned": "Tuned"}.get(label, role_of(label))


def weakest_first(families: Mapping[str, Any], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Families by the change of a score, or by the score itself where nothing is compared; missing ones last."""

    def strength(item: tuple[str, Mapping[str, Any]]) -> float:
        score = item[1]["metrics"][name]
        value = score["tuned"] if score["delta"] is None else score["delta"]
        return math.inf if value is None else value if score["better"] == "higher" else -value

    return sorted(families.items(), key=strength)


@dataclass(frozen=True)
class Verdict:
    """One sentence on the headline score, and its direction."""

    sentence: str
    direction: Direction


def verdict(metrics: Mapping[str, Any], split: str | None = None) -> Verdict:
    """The result of an evaluation in one sentence.

    Args:
        metrics: the content of `metrics.json`.
        split: which split of it; the first by default.

    >>> score = {"baseline": 0.25, "tuned": 0.75, "delta": 0.5, "ci95": [0.4, 0.6], "better": "higher", "n": 200}
    >>> print(verdict({"splits": {"all": {"n": 200, "metrics": {"exact_match": score}}}}).sentence)
    The tuned model is better: exact match 25.0 % → 75.0 % on 200 records (+50.0 points, 95 % interval +40.0 to +60.0).
    """
    split = split or next(iter(metrics["splits"]))
    part, name = metrics["splits"][split], headline_of(metrics)
    score, units = part["metrics"][name], scale(name)
    label = MEASURES[name].title
    label = label.lower() if name in SPELLED_OUT else label
    records = _records(score["n"] or part["n"], split)
    compared = score["delta"] is not None
    if score["tuned"] is None or (not compared and score["baseline"] is not None):
        reason = f": {score['reason']}" if score.get("reason") else ""
        pair = [units.value(score[side]) for side in ("baseline", "tuned")]
        state = "is missing" if score["tuned"] is None else f"({' → '.join(pair)}) is not compared"
        what = f"{label}, the headline score, {state} on {records}"
        return Verdict(f"No verdict: {what}{reason}.", "missing")
    value = f"{units.value(score['tuned'])} {units.unit}".strip()
    interval = f"95 % interval {units.interval(score)}" if score["ci95"] else "no interval"
    p = _headline_p(metrics, split, name)
    result = direction({**score, "p": p})
    if not compared:
        sentence = f"The tuned model reaches {label} {value} on {records} ({interval}); {_no_baseline(metrics, score)}"
    else:
        lead = f"The tuned model is {result}" if result in ("better", "worse") else "No significant difference"
        change = f"{units.change(score['delta'])} {units.unit_of_change}".strip()
        values = f"{label} {units.value(score['baseline'])} → {value}"
        sentence = f"{lead}: {values} on {records} ({change}, {interval})"
        if result == "unclear" and direction({**score, "p": None}) != result:
            sentence += f"; p = {p:.2g} in a permutation test"
        if score["n"] < ENOUGH_TO_JUDGE:
            sentence += f"; fewer than {ENOUGH_TO_JUDGE} records are too few to show one"
    return Verdict(f"{sentence}.", result)


def _headline_p(metrics: Mapping[str, Any], split: str, name: str) -> float | None:
    """The p-value of a split's headline difference, adjusted by Holm for the verdicts on all splits."""
    every = {each: part["metrics"][name].get("p") for each, part in metrics["splits"].items()}
    known = {each: p for each, p in every.items() if p is not None}
    return dict(zip(known, holm([*known.values()]), strict=True)).get(split)


def _no_baseline(metrics: Mapping[str, Any], score: Mapping[str, Any]) -> str:
    asked = "baseline" in metrics.get("provenance", {}).get("models", {}) and score.get("reason")
    return f"it is missing for the base model: {score['reason']}" if asked else "there is no baseline"


@dataclass(frozen=True)
class Finding:
    """A score, or the headline score of one family, that got significantly better or worse on some splits."""

    kind: Kind
    label: str
    unit: str
    changes: dict[str, str] = field(default_factory=dict)  # split → the change there


def findings(metrics: Mapping[str, Any], wanted: Direction) -> list[Finding]:
    """All scores, families (by the headline score) and judge means that stand in the wanted direction, on any split.

    The chance that any of them is there though the models are equal is at most 5 % (see `significance.adjust`).
    """
    found: dict[tuple[str, str], Finding] = {}
    for kind, name, split, score in differences(metrics):
        if standing(judged(score) if kind == "judge" else score) == wanted:
            label, units = _label_and_units(metrics, kind, name, score)
            shown: Kind = "family" if kind == "family" else "score"
            finding = found.setdefault((shown, label), Finding(shown, label, units.unit_of_change))
            finding.changes[split] = units.change(score["delta"])
    return list(found.values())


def _label_and_units(metrics: Mapping[str, Any], kind: Kind, name: str, score: Mapping[str, Any]) -> tuple[str, Scale]:
    if kind == "judge":
        return f"Judge, {name}", judge_scale(score)
    return (name, scale(headline_of(metrics))) if kind == "family" else (MEASURES[name].title, scale(name))


def looked_at(metrics: Mapping[str, Any]) -> str:
    """How many differences were tested together, as a sentence."""
    count = metrics.get("comparisons", 0)
    if count < 2:
        return ""
    return (
        f"{count:,} differences were looked at. What is listed holds for all of them together: if the models were "
        "equal, any would be listed in at most 5 % of evaluations (Holm's method)."
    )


def cautions(metrics: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[str]:
    """Everything that should make a reader trust the scores less, one sentence each; empty if there is nothing."""
    return [
        *_small_splits(metrics),
        *_incomplete_scores(metrics),
        *_untested_scores(metrics),
        *(_judge_gaps(metrics["judge"]) if metrics["judge"] else ()),
        *_cut_answers(predictions, labels),
        *_not_greedy(metrics["provenance"]),
        *_edited(metrics["provenance"]),
        *_losses_that_are_no_numbers(metrics, predictions, labels),
    ]


def _small_splits(metrics: Mapping[str, Any]) -> Iterator[str]:
    for split, part in metrics["splits"].items():
        few = f"fewer than {ENOUGH_TO_JUDGE} cannot show a difference"
        problem = few if part["n"] < ENOUGH_TO_JUDGE else "intervals over so few are rough"
        if part["n"] < FEW_EXAMPLES:
            yield f"Only {_records(part['n'], split)}: {problem}; aim for {FEW_EXAMPLES} or more."


def _incomplete_scores(metrics: Mapping[str, Any]) -> Iterator[str]:
    for split, part in metrics["splits"].items():
        titles: dict[int | str, list[str]] = {}  # records that have a score, or why none counts → the scores
        for name, score in {**part["metrics"], **part["behaviour"]}.items():
            # known on both sides and not compared, or missing: with the reason; else on how many records
            unknown = score["tuned"] is None or (score["baseline"] is not None and score["delta"] is None)
            why = score.get("reason", 0) if unknown else score["n"]
            titles.setdefault(why, []).append(MEASURES[name].title)
        for why, names in titles.items():
            if isinstance(why, str):
                yield f"{', '.join(names)}: no value or no comparison on {_records(part['n'], split)}: {why}."
            elif why < part["n"]:
                yield (
                    f"{', '.join(names)}: measured on {why:,} of the {_records(part['n'], split)} "
                    "(values are missing, or records are longer than the model's context)."
                )


def _untested_scores(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Differences without a p-value, by the stage that writes one."""
    labels: dict[str, dict[str, None]] = {}
    for kind, name, _, score in differences(metrics):
        if lacks_p(score):
            label, _ = _label_and_units(metrics, kind, name, score)
            labels.setdefault("judge" if kind == "judge" else "score", {})[label] = None
    for stage, names in labels.items():
        again = ", with the same --judge: what it has answered is not asked again" if stage == "judge" else ""
        yield (
            f"{', '.join(names)}: scored by an earlier version, which wrote no p-value, so the difference is not "
            f"tested and not listed as better or worse; run the {stage} stage again{again}."
        )


def _judge_gaps(judge: Mapping[str, Any]) -> Iterator[str]:
    if judge["error"]:
        yield f"The judge failed: {judge['error']}"
    if "temperature" in judge.get("left_out", ()):
        yield "The judge takes no temperature of 0, so its scores may differ from one run to the next."
    for prompt, score in judge["scores"].items():
        units = judge_scale(score)
        gaps = [
            f"{scored:,} of {score['n']:,} {role_of(model)} responses scored; with the missing scores their mean would "
            f"be {' to '.join(map(units.value, score['bounds'][model]))}"
            for model, scored in score["scored"].items()
            if scored < score["n"]
        ]
        if gaps:
            yield f"Judge, {prompt}: {'; '.join(gaps)}{_reasons(score)}."
    pairs = judge["pairwise"]
    if pairs and pairs["judged"] < pairs["n"]:
        yield (
            f"Judge, pairwise: {pairs['judged']:,} of {pairs['n']:,} pairs judged{_reasons(pairs)}; with the missing "
            f"pairs the win rate would be {' to '.join(map(PERCENT.value, pairs['bounds']))}."
        )


def _cut_answers(predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Iterator[str]:
    for label in labels:
        reasons = Counter(prediction[label].get("stop_reason") for prediction in predictions)
        for reason, ending in ENDINGS.items():
            if reasons[reason]:
                share = PERCENT.value(reasons[reason] / len(predictions))
                count = f"{reasons[reason]:,} of {len(predictions):,} responses ({share})"
                yield f"{count} of the {role_of(label)} model {ending}."


def _not_greedy(provenance: Mapping[str, Any]) -> Iterator[str]:
    samples = provenance.get("generation", {}).get("temperature", 0) > 0
    for label, fields in provenance.get("left_out", {}).items():
        if not samples and "temperature" not in fields:  # greedy all the same
            continue
        yield f"The server of the {role_of(label)} model does not accept {', '.join(fields)}; its own settings decoded."


def _edited(provenance: Mapping[str, Any]) -> Iterator[str]:
    if provenance.get("edited"):
        yield "predictions.jsonl was changed after the models had answered: these are not all their own answers."


def _losses_that_are_no_numbers(
    metrics: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> Iterator[str]:
    """Where a model's outputs were NaN or infinite: its reference has tokens, but no loss."""
    for label in labels:
        answers = [prediction[label] for prediction in predictions]
        broken = sum(map(is_not_a_number, answers))
        if broken:
            dtype = metrics["provenance"].get("generation", {}).get("dtype", "their dtype")
            yield (
                f"{broken:,} of {len(answers):,} references gave the {role_of(label)} model outputs that are no finite "
                "numbers (NaN or infinite), so its answers mean nothing there. Its weights are finite, but not what it "
                f"computes in {dtype}: evaluate again with --dtype float32."
            )


def _reasons(score: Mapping[str, Any]) -> str:
    missing = ", ".join(f"{count:,} {reason}" for reason, count in score["missing"].items())
    return f" ({missing})" if missing else ""


def _records(n: int, split: str) -> str:
    return f"{n:,} {'' if split == 'all' else split + ' '}record{'' if n == 1 else 's'}"


def _fixed(value: float, digits: int, sign: str = "") -> str:
    """Decimals with a true minus sign and no negative zero; powers of ten for numbers of seven digits or more."""
    style = ".2e" if abs(value) >= 1e6 else f",.{digits}f"
    return f"{value:{sign}z{style}}".replace("-", "−")
