"""What the scores of an evaluation say, in words: the verdict, what got better or worse, what calls for caution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from recipe.config import UserError
from recipe.evaluation.measures import BEHAVIOUR, METRICS

Direction = Literal["better", "worse", "unclear", "neutral", "missing"]
SPELLED_OUT = ("exact_match", "reference_loss", "perplexity")  # titles that are words, not names
Kind = Literal["score", "family"]
FEW_EXAMPLES = 100  # below, an interval is so wide that only large differences can be shown
# bootstrap intervals of a few records are too narrow: where there is no difference they exclude 0 in up to 48 % of data
# sets of 2 records, 15 % of 5, 10 % of 10, 7.5 % of 20, and in the 5 % they should from 100 up
ENOUGH_TO_JUDGE = 20


@dataclass(frozen=True)
class Scale:
    """How a score is written: `factor` times the value with `digits` decimals and a sign, and the units of it."""

    factor: float = 100
    digits: int = 1
    sign: str = " %"
    unit: str = ""
    unit_of_change: str = "points"

    def value(self, value: float | None) -> str:
        """A score with its sign, `–` where it is missing.

        >>> Scale().value(0.9225)
        '92.2 %'
        """
        return "–" if value is None else _fixed(self.factor * value, self.digits) + self.sign

    def change(self, delta: float | None) -> str:
        """A difference with plus or minus, `–` where it is missing.

        >>> Scale().change(-0.0313)
        '−3.1'
        """
        if delta is None:
            return "–"
        text = _fixed(self.factor * delta, self.digits)
        return text if text.startswith("−") or float(text.replace(",", "")) == 0 else f"+{text}"


PERCENT = Scale()
SCALES = {
    "reference_loss": Scale(1, 3, "", "nats/token", "nats/token"),
    "perplexity": Scale(1, 2, "", "", ""),
    "length_ratio": Scale(1, 2, "", "", ""),
}
MEASURES = {**METRICS, **BEHAVIOUR}


def title(name: str) -> str:
    """The name of a score as it is read: `rouge_l` is ROUGE-L."""
    return MEASURES[name].title if name in MEASURES else name


def scale(name: str) -> Scale:
    """How the score of this name is written."""
    return SCALES.get(name, PERCENT)


def judge_scale(score: Mapping[str, Any]) -> Scale:
    """How a judge's mean is written: on the judge's own scale, with more decimals where that is short."""
    low, high = score["scale"]
    return Scale(1, 1 if high - low > 20 else 2, "", f"{low} to {high}", "")


def role_of(label: str) -> str:
    """What a model is called in a sentence: base, tuned, and any other by its label in quotes.

    >>> [role_of(label) for label in ("baseline", "tuned", "base")]
    ['base', 'tuned', '“base”']
    """
    return {"baseline": "base", "tuned": "tuned"}.get(label, f"“{label}”")


def model_name(label: str) -> str:
    """What a model is called in a heading: `role_of` with a capital letter.

    >>> [model_name(label) for label in ("baseline", "tuned", "base")]
    ['Base', 'Tuned', '“base”']
    """
    role = role_of(label)
    return role[0].upper() + role[1:]


def counted(score: Mapping[str, Any] | None, n: int) -> int | None:
    """Over how many records a score is, where these are not all `n`; None for all and for a missing score.

    >>> counted({"baseline": 12.5, "tuned": 4.5, "n": 30}, 120)
    30
    """
    return None if score is None or score["tuned"] is None or score["n"] == n else score["n"]


def is_too_few(score: Mapping[str, Any]) -> bool:
    """Whether a score is over so few records that its interval says nothing of a difference."""
    return score["n"] < ENOUGH_TO_JUDGE


@dataclass(frozen=True)
class Verdict:
    """One sentence on the headline score, and its direction."""

    sentence: str
    direction: Direction


def headline_metric(scores: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The score that decides the verdict: exact match, or the next that is not missing and not zero for both models.

    A score that is zero for both says nothing about which is better; None if all are missing.
    """
    measured = [name for name, score in scores.items() if score["tuned"] is not None]
    telling = [name for name in measured if scores[name]["tuned"] or scores[name]["baseline"]]
    return next(iter([*telling, *measured]), None)


def direction(score: Mapping[str, Any] | None) -> Direction:
    """Whether the 95 % interval of a difference excludes 0, and to which side; unclear below `ENOUGH_TO_JUDGE` records.

    >>> direction({"baseline": 0.1, "tuned": 0.3, "delta": 0.2, "ci95": [0.1, 0.3], "better": "higher", "n": 200})
    'better'
    """
    if score is None or score["tuned"] is None:
        return "missing"
    if score["delta"] is None or score["better"] is None:
        return "neutral"
    if score["ci95"] is None or is_too_few(score):
        return "unclear"
    low, high = score["ci95"] if score["better"] == "higher" else (-score["ci95"][1], -score["ci95"][0])
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def judged(score: Mapping[str, Any]) -> dict[str, Any]:
    """A judge's score as `direction` takes it: more is better; `n` are the records that certainly have both scores."""
    lacking = sum(score["n"] - score["scored"][label] for label in ("baseline", "tuned") if label in score["scored"])
    return {**score, "better": "higher", "n": max(0, score["n"] - lacking)}


def verdict(metrics: Mapping[str, Any], split: str | None = None) -> Verdict:
    """The sentence that an evaluation comes to.

    Args:
        metrics: the content of `metrics.json`.
        split: which split of it; the first by default.

    >>> score = {"baseline": 0.25, "tuned": 0.75, "delta": 0.5, "ci95": [0.4, 0.6], "better": "higher", "n": 200}
    >>> print(verdict({"splits": {"all": {"n": 200, "metrics": {"exact_match": score}}}}).sentence)
    The tuned model is better: exact match 25.0 % → 75.0 % on 200 records (+50.0 points, 95 % interval +40.0 to +60.0).
    """
    split = split or next(iter(metrics["splits"]))
    scores = metrics["splits"][split]["metrics"]
    name = headline_metric(scores)
    if name is None:
        return Verdict(
            f"Nothing was measured: every score of {_records(metrics['splits'][split]['n'], split)} is missing.",
            "missing",
        )
    score, units = scores[name], scale(name)
    label = title(name).lower() if name in SPELLED_OUT else title(name)
    records = _records(score["n"], split)
    interval = "no interval"
    if score["ci95"] is not None:
        show = units.value if score["delta"] is None else units.change
        interval = f"95 % interval {' to '.join(map(show, score['ci95']))}"
    if score["delta"] is None:
        value = f"{units.value(score['tuned'])} {units.unit}".strip()
        return Verdict(
            f"The tuned model reaches {label} {value} on {records} ({interval}); it is compared with no baseline.",
            "neutral",
        )
    way = direction(score)
    leads: dict[str, str] = {"better": "The tuned model is better", "worse": "The tuned model is worse"}
    values = f"{units.value(score['baseline'])} → {units.value(score['tuned'])} {units.unit}".strip()
    change = f"{units.change(score['delta'])} {units.unit_of_change}".strip()
    lead = leads.get(way, "No difference was shown")
    few = f"; fewer than {ENOUGH_TO_JUDGE} cannot show one" if is_too_few(score) else ""
    only = "only " if few else ""
    return Verdict(f"{lead}: {label} {values} on {only}{records} ({change}, {interval}){few}.", way)


@dataclass(frozen=True)
class Finding:
    """A score, or the headline score of one family, that got measurably better or worse on some splits."""

    kind: Kind
    label: str
    unit: str
    changes: dict[str, str]  # of each such split


def findings(metrics: Mapping[str, Any], way: Direction) -> list[Finding]:
    """All scores, families (by the headline score) and judge means that went that `direction`, on any split."""
    found: dict[tuple, Finding] = {}

    def add(
        kind: Literal["score", "family"], label: str, units: Scale, split: str, score: Mapping[str, Any] | None
    ) -> None:
        if score is not None and direction(score) == way:
            finding = found.setdefault((kind, label), Finding(kind, label, units.unit_of_change, {}))
            finding.changes[split] = units.change(score["delta"])

    for split, part in metrics["splits"].items():
        for name, score in {**part["metrics"], **part["behaviour"]}.items():
            add("score", title(name), scale(name), split, score)
        headline = headline_metric(part["metrics"])
        for family, entry in part["families"].items():
            if headline:
                add("family", str(family), scale(headline), split, entry["metrics"].get(headline))
    for prompt, score in ((metrics["judge"] or {}).get("scores") or {}).items():
        first = next(iter(metrics["splits"]))
        add("score", f"Judge, {prompt}", judge_scale(score), first, judged(score))
    return list(found.values())


def cautions(metrics: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[str]:
    """Everything that should make a reader trust the scores less, one sentence each; empty if there is nothing."""
    return [
        *_thin_splits(metrics),
        *_missing_scores(metrics),
        *_partial_scores(metrics),
        *_judge_gaps(metrics["judge"]),
        *_cut_answers(metrics, predictions, labels),
    ]


def _thin_splits(metrics: Mapping[str, Any]) -> Iterator[str]:
    for split, part in metrics["splits"].items():
        if part["n"] < FEW_EXAMPLES:
            trouble = "intervals over so few are rough"
            if part["n"] < ENOUGH_TO_JUDGE:
                trouble = f"fewer than {ENOUGH_TO_JUDGE} cannot show a difference"
            yield f"Only {_records(part['n'], split)}: {trouble}; aim for {FEW_EXAMPLES} or more."


def _missing_scores(metrics: Mapping[str, Any]) -> Iterator[str]:
    missing: dict[str, list[str]] = {}  # score → splits
    alone: dict[str, list[str]] = {}
    compared = any(
        score["baseline"] is not None for score in next(iter(metrics["splits"].values()))["metrics"].values()
    )
    for split, part in metrics["splits"].items():
        for name, score in {**part["metrics"], **part["behaviour"]}.items():
            if score["tuned"] is None and name != "stop_rate":  # said with the responses it lacks
                missing.setdefault(title(name), []).append(split)
            elif compared and score["tuned"] is not None and score["baseline"] is None:
                alone.setdefault(title(name), []).append(split)
    for what, scores in (("Not measured", missing), ("Measured for the tuned model only", alone)):
        for splits in dict.fromkeys(map(tuple, scores.values())):
            names = ", ".join(name for name, its_splits in scores.items() if tuple(its_splits) == splits)
            yield f"{what} on {' and '.join(splits)}: {names}. The answers lack what it takes."


def _partial_scores(metrics: Mapping[str, Any]) -> Iterator[str]:
    for split, part in metrics["splits"].items():
        models = {"": part}
        models |= {f" of {model_name(m)}": by_split[split] for m, by_split in metrics["other_models"].items()}
        named: dict[tuple[str, int], list[str]] = {}
        for whose, scores in models.items():
            for name, score in {**scores["metrics"], **scores["behaviour"]}.items():
                n = counted(score, scores["n"])
                if n is not None and (not whose or n != counted(part["metrics"].get(name), part["n"])):
                    named.setdefault((whose, n), []).append(title(name))
        for (whose, n), titles in named.items():
            verb = "is" if len(titles) == 1 else "are"
            among = _records(part["n"], "all") + ("" if split == "all" else f" of {split}")
            yield (
                f"{' and '.join(titles)}{whose} {verb} over {n:,} of {among}; the others are longer than the model's "
                "context or lack what it needs."
            )


def _judge_gaps(judge: Mapping[str, Any] | None) -> Iterator[str]:
    if judge is None:
        return
    if judge["error"]:
        yield f"The judge failed: {judge['error']}"
        return
    for prompt, score in judge["scores"].items():
        units = judge_scale(score)
        gaps = [
            f"{scored:,} of {score['n']:,} {role_of(model)} responses scored, "
            f"worst case {' to '.join(map(units.value, score['bounds'][model]))}"
            for model, scored in score["scored"].items()
            if scored < score["n"]
        ]
        if gaps:
            fate = "mean withheld" if score["tuned"] is None else "the mean leaves the others out"
            yield f"Judge, {prompt}: {'; '.join(gaps)}; {fate}{_reasons(score)}."
    pairs = judge["pairwise"]
    if pairs and pairs["judged"] < pairs["n"]:
        worst = " to ".join(map(PERCENT.value, pairs["bounds"]))
        yield (
            f"Judge, pairwise: {pairs['judged']:,} of {pairs['n']:,} pairs judged{_reasons(pairs)}; "
            f"worst case of the win rate {worst}."
        )


def _cut_answers(
    metrics: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> Iterator[str]:
    cap = ((metrics.get("provenance") or {}).get("generation") or {}).get("max_new_tokens")
    total, unknown = len(predictions), []
    for label in labels:
        name = f"{role_of(label)} model"
        reasons = Counter(prediction[label].get("stop_reason") for prediction in predictions)
        if reasons["length"]:
            where = f"the cap of {cap:,} tokens" if cap else "the cap on tokens"
            share = PERCENT.value(reasons["length"] / total)
            yield f"The {name} ran into {where} in {reasons['length']:,} of {total:,} responses ({share})."
        if reasons["context"]:
            yield f"The {name} ran out of context in {reasons['context']:,} of {total:,} responses."
        if reasons[None]:
            unknown.append(f"{reasons[None]:,} of {total:,} responses of the {name}")
    if unknown:
        yield f"How {' and '.join(unknown)} ended is unknown: some may have been cut off."


def refuse_nan(content: Any, where: str = "metrics") -> None:
    """Raise if a number is NaN or infinite: such a score is a fault, and a page would show it as a value.

    Raises:
        UserError: with the path of the first such number.
    """
    if isinstance(content, float) and not math.isfinite(content):
        raise UserError(f"{where} is {content}; a score that cannot be computed is null: score again")
    pairs = content.items() if isinstance(content, Mapping) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        refuse_nan(value, f"{where}.{key}")


def _reasons(score: Mapping[str, Any]) -> str:
    missing = ", ".join(f"{count:,} {reason}" for reason, count in score["missing"].items())
    return f" ({missing})" if missing else ""


def _records(n: int, split: str) -> str:
    return f"{n:,} {'' if split == 'all' else split + ' '}record{'' if n == 1 else 's'}"


def _fixed(value: float, digits: int) -> str:
    """Decimals with a true minus and without a negative zero; powers of ten where digits would say nothing."""
    if abs(value) >= 1e6:
        return f"{value:.2e}".replace("-", "−")
    text = f"{value:,.{digits}f}"
    return f"{0:.{digits}f}" if float(text.replace(",", "")) == 0 else text.replace("-", "−")
