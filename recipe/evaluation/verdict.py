"""What the scores of an evaluation say, in words: the verdict, the findings, and the cautions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from recipe.evaluation.measures import MEASURES

Direction = Literal["better", "worse", "unclear", "neutral", "missing"]
Kind = Literal["score", "family"]
SPELLED_OUT = ("exact_match", "reference_loss", "perplexity")  # titles that are words, not names
FEW_EXAMPLES = 100  # below, an interval is so wide that only large differences can be shown
# bootstrap intervals of a few records are too narrow: for two equal models they exclude 0 in up to 48 % of data sets of
# 2 records, 15 % of 5, 10 % of 10, 7.5 % of 20, and in the expected 5 % from 100 records up
ENOUGH_TO_JUDGE = 20
ENDINGS = {  # of responses, by `stop_reason`, that may lack their end
    "length": "reached the limit of --max_new_tokens",
    "context": "reached the end of the context",
    "refused": "are empty, because the server refused the prompt",
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


def headline_metric(scores: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The score that decides the verdict: exact match, or the next that is not missing and not zero for both models.

    A score that is zero for both does not tell which is better. None if all are missing.
    """
    measured = [name for name, score in scores.items() if score["tuned"] is not None]
    nonzero = [name for name in measured if scores[name]["tuned"] or scores[name]["baseline"]]
    return next(iter([*nonzero, *measured]), None)


def weakest_first(families: Mapping[str, Any], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Families by the change of a score, or by the score itself where nothing is compared; missing ones last."""

    def strength(item: tuple[str, Mapping[str, Any]]) -> float:
        score = item[1]["metrics"][name]
        value = score["tuned"] if score["delta"] is None else score["delta"]
        return math.inf if value is None else value if score["better"] == "higher" else -value

    return sorted(families.items(), key=strength)


def direction(score: Mapping[str, Any]) -> Direction:
    """Whether the 95 % interval of a difference excludes 0, and on which side; unclear below `ENOUGH_TO_JUDGE` records.

    >>> direction({"baseline": 0.1, "tuned": 0.3, "delta": 0.2, "ci95": [0.1, 0.3], "better": "higher", "n": 200})
    'better'
    """
    if score["tuned"] is None:
        return "missing"
    if score["delta"] is None or score["better"] is None:
        return "neutral"
    if score["ci95"] is None or score["n"] < ENOUGH_TO_JUDGE:
        return "unclear"
    low, high = score["ci95"] if score["better"] == "higher" else (-score["ci95"][1], -score["ci95"][0])
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def judged(score: Mapping[str, Any]) -> dict[str, Any]:
    """A judge's score as `direction` takes it: higher is better; `n` are the records that surely have both scores."""
    lacking = sum(score["n"] - score["scored"][label] for label in ("baseline", "tuned") if label in score["scored"])
    return {**score, "better": "higher", "n": max(0, score["n"] - lacking)}


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
    part = metrics["splits"][split]
    name = headline_metric(part["metrics"])
    if name is None:
        return Verdict(f"Nothing was measured: every score of {_records(part['n'], split)} is missing.", "missing")
    score, units = part["metrics"][name], scale(name)
    label = MEASURES[name].title
    label = label.lower() if name in SPELLED_OUT else label
    value = f"{units.value(score['tuned'])} {units.unit}".strip()
    records = _records(score["n"], split)
    interval = f"95 % interval {units.interval(score)}" if score["ci95"] else "no interval"
    result = direction(score)
    if score["delta"] is None:
        sentence = f"The tuned model reaches {label} {value} on {records} ({interval}); there is no baseline"
    else:
        lead = f"The tuned model is {result}" if result in ("better", "worse") else "No significant difference"
        change = f"{units.change(score['delta'])} {units.unit_of_change}".strip()
        values = f"{label} {units.value(score['baseline'])} → {value}"
        sentence = f"{lead}: {values} on {records} ({change}, {interval})"
        if score["n"] < ENOUGH_TO_JUDGE:
            sentence += f"; fewer than {ENOUGH_TO_JUDGE} records are too few to show one"
    return Verdict(f"{sentence}.", result)


@dataclass(frozen=True)
class Finding:
    """A score, or the headline score of one family, that got significantly better or worse on some splits."""

    kind: Kind
    label: str
    unit: str
    changes: dict[str, str] = field(default_factory=dict)  # split → the change there


def findings(metrics: Mapping[str, Any], wanted: Direction) -> list[Finding]:
    """All scores, families (by the headline score) and judge means of the wanted direction, on any split."""
    found: dict[tuple[Kind, str], Finding] = {}
    for kind, label, units, split, score in _differences(metrics):
        if direction(score) == wanted:
            finding = found.setdefault((kind, label), Finding(kind, label, units.unit_of_change))
            finding.changes[split] = units.change(score["delta"])
    return list(found.values())


def _differences(metrics: Mapping[str, Any]) -> Iterator[tuple[Kind, str, Scale, str, Mapping[str, Any]]]:
    for split, part in metrics["splits"].items():
        for name, score in {**part["metrics"], **part["behaviour"]}.items():
            yield "score", MEASURES[name].title, scale(name), split, score
        headline = headline_metric(part["metrics"])
        if headline:
            for family, entry in part["families"].items():
                yield "family", str(family), scale(headline), split, entry["metrics"][headline]
    for prompt, score in ((metrics["judge"] or {}).get("scores") or {}).items():
        yield "score", f"Judge, {prompt}", judge_scale(score), next(iter(metrics["splits"])), judged(score)


def cautions(metrics: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[str]:
    """Everything that should make a reader trust the scores less, one sentence each; empty if there is nothing."""
    return [
        *_small_splits(metrics),
        *_incomplete_scores(metrics),
        *(_judge_gaps(metrics["judge"]) if metrics["judge"] else ()),
        *_cut_answers(predictions, labels),
        *_not_greedy(metrics["provenance"]),
    ]


def _small_splits(metrics: Mapping[str, Any]) -> Iterator[str]:
    for split, part in metrics["splits"].items():
        few = f"fewer than {ENOUGH_TO_JUDGE} cannot show a difference"
        problem = few if part["n"] < ENOUGH_TO_JUDGE else "intervals over so few are rough"
        if part["n"] < FEW_EXAMPLES:
            yield f"Only {_records(part['n'], split)}: {problem}; aim for {FEW_EXAMPLES} or more."


def _incomplete_scores(metrics: Mapping[str, Any]) -> Iterator[str]:
    for split, part in metrics["splits"].items():
        titles: dict[int, list[str]] = {}  # records that have a score → the scores
        for name, score in {**part["metrics"], **part["behaviour"]}.items():
            titles.setdefault(0 if score["tuned"] is None else score["n"], []).append(MEASURES[name].title)
        for n, names in titles.items():
            if n < part["n"]:
                yield (
                    f"{', '.join(names)}: measured on {n:,} of the {_records(part['n'], split)} "
                    "(values are missing, or records are longer than the model's context)."
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
    for label, fields in provenance.get("left_out", {}).items():
        yield f"The server of the {role_of(label)} model does not accept {', '.join(fields)}; its own settings decoded."


def _reasons(score: Mapping[str, Any]) -> str:
    missing = ", ".join(f"{count:,} {reason}" for reason, count in score["missing"].items())
    return f" ({missing})" if missing else ""


def _records(n: int, split: str) -> str:
    return f"{n:,} {'' if split == 'all' else split + ' '}record{'' if n == 1 else 's'}"


def _fixed(value: float, digits: int, sign: str = "") -> str:
    """Decimals with a true minus sign and no negative zero; powers of ten for numbers of seven digits or more."""
    style = ".2e" if abs(value) >= 1e6 else f",.{digits}f"
    return f"{value:{sign}z{style}}".replace("-", "−")
