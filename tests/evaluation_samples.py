"""Evaluations as a run leaves them, made up: predictions, what a judge said of them, and the `metrics.json`."""

from __future__ import annotations

import random
from typing import Any

from recipe.evaluation.comparison import compare, labels_of
from recipe.evaluation.judge.summary import WITH_VALUE, summarize_pairs, summarize_scores
from recipe.evaluation.significance import adjust

SPLITS = ("test", "test_unseen")
PROMPT = "score_0_100"
FAMILIES = {
    "plural": ("Give the plural of this noun.", ["cat", "house", "fox", "baby", "leaf", "mouse"]),
    "past tense": ("Put this sentence into the past.", ["He walks home.", "She sings.", "They run to the sea."]),
    "antonym": ("Name the opposite.", ["hot", "early", "narrow", "loud"]),
    "counting": ("Give the number of words.", ["The painter hurried to the beach.", "Ann sleeps.", "It was late."]),
}
WORDS = ["the", "list", "of", "Peter", "is", "hat", "and", "then", "a", "small", "red", "house", "by", "sea"]

TEMPLATE = "{% for message in messages %}### Instruction:\n{{ message['content'] }}\n{% endfor %}"


def make_predictions(
    n: int = 60, seed: int = 0, models: tuple[str, ...] = ("baseline", "tuned")
) -> list[dict[str, Any]]:
    """Records of two splits, four to one; the tuned model is right three times of four, the baseline seldom."""
    draw = random.Random(seed)
    predictions = []
    for number in range(n):
        split = SPLITS[number % 5 == 4]
        family = draw.choice(list(FAMILIES))
        instruction, inputs = FAMILIES[family]
        subject = draw.choice(inputs)
        reference = f"The answer to number {number} is {subject.rstrip('.').lower()}."
        prediction = {
            "id": f"{split}/{number}", "split": split, "instruction": instruction, "input": subject,
            "output": reference, "family": family,
        }  # fmt: skip
        for model in models:
            skill = 0.05 if model == "baseline" else 0.75
            prediction[model] = make_answer(draw, reference, draw.random() < skill, rambles=model == "baseline")
        predictions.append(prediction)
    return predictions


def make_answer(draw: random.Random, reference: str, right: bool, rambles: bool) -> dict[str, Any]:
    if right:
        text, stop_reason = reference, "eos"
    elif rambles and draw.random() < 0.7:
        text, stop_reason = " ".join(draw.choice(WORDS) for _ in range(60)), "length"
    else:
        words = reference.split()
        words[draw.randrange(len(words))] = draw.choice(WORDS)
        text, stop_reason = " ".join(words), "eos"
    count = len(reference.split()) + 2
    return {
        "text": text, "tokens": len(text.split()) + 1, "stop_reason": stop_reason, "seconds": 0.1,
        "reference_loss": count * (3.0 if rambles else 0.4) * draw.uniform(0.8, 1.2), "reference_tokens": count,
    }  # fmt: skip


def make_judge_rows(predictions: list[dict[str, Any]], seed: int = 0, missing: int = 0) -> list[dict[str, Any]]:
    """Scores from 0 to 100 for both models, and pairs in both orders, over the first split; some timed out."""
    draw = random.Random(seed)
    rows = []
    judged = [prediction for prediction in predictions if prediction["split"] == predictions[0]["split"]]
    common = {"raw": "{}", "judge": "llama3", "usage": {"prompt_tokens": 210, "completion_tokens": 31}, "error": None}
    for index, prediction in enumerate(judged):
        exact = {model: prediction[model]["text"] == prediction["output"] for model in ("baseline", "tuned")}
        for model in ("baseline", "tuned"):
            lost = model == "tuned" and index < missing
            score = None if lost else draw.randint(85, 100) if exact[model] else draw.randint(5, 60)
            reason = None if lost else "Matches the reference." if exact[model] else "Does not answer what was asked."
            rows.append(
                {"id": prediction["id"], "prompt": PROMPT, "model": model, "score": score, "reason": reason,
                 "status": "timeout" if lost else "scored", **common}
            )  # fmt: skip
        for order in ("baseline_first", "tuned_first"):
            winner = "tie" if exact["tuned"] == exact["baseline"] else "tuned" if exact["tuned"] else "baseline"
            if draw.random() < 0.1:
                winner = "baseline"
            rows.append(
                {"id": prediction["id"], "prompt": "pairwise", "order": order, "status": "scored", "winner": winner,
                 "reason": "Closer to the reference.", **common}
            )  # fmt: skip
    return rows


def make_judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `metrics.json` says of these rows."""
    return {
        "endpoint": "http://127.0.0.1:11434/v1",
        "model": "llama3",
        "complete": all(row["status"] in WITH_VALUE for row in rows),
        "usage": {"prompt_tokens": 210 * len(rows), "completion_tokens": 31 * len(rows)},
        "scores": {PROMPT: summarize_scores([r for r in rows if r["prompt"] == PROMPT], (0, 100), allow_missing=False)},
        "pairwise": summarize_pairs([row for row in rows if row["prompt"] == "pairwise"], allow_missing=False),
        "error": None,
    }


def make_metrics(predictions: list[dict[str, Any]], judge: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of `metrics.json` for these predictions."""
    by_split = {
        name: [p for p in predictions if p["split"] == name] for name in dict.fromkeys(p["split"] for p in predictions)
    }
    splits = {name: compare(rows) for name, rows in by_split.items()}
    others = [label for label in labels_of(predictions) if label not in ("baseline", "tuned")]
    metrics: dict[str, Any] = {
        **next(iter(splits.values())),
        "judge": judge,
        "splits": splits,
        "other_models": {label: {name: compare(rows, label) for name, rows in by_split.items()} for label in others},
        "provenance": {
            "models": {
                "baseline": {"name": "recipe/demo/base", "weights": "sha256:0123456789abcdef",
                             "template_name": "the tuned model's template", "template": TEMPLATE},
                "tuned": {"name": "outputs/demo", "weights": "sha256:fedcba9876543210",
                          "template_name": "its own template", "template": TEMPLATE},
            },
            "headline": "exact_match", "data": "recipe/demo/records", "data_hash": "f639a785bf6ce6ca",
            "splits": {name: len(rows) for name, rows in by_split.items()},
            "generation": {"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0, "seed": 123, "dtype": "float32"},
            "command": "python scripts/eval.py --model outputs/demo --baseline recipe/demo/base --output_dir outputs/x",
            "versions": {"python": "3.11.7", "torch": "2.11.0", "transformers": "5.17.0"},
            "hardware": "x86_64, 2 cores",
        },
    }  # fmt: skip
    adjust(metrics)
    return metrics


LOG_HISTORY = [
    *({"step": step, "loss": 3.5 / step**0.5, "num_input_tokens_seen": 1785 * step} for step in range(20, 801, 20)),
    *({"step": step, "eval_loss": 3.2 / step**0.5 + 0.03} for step in range(100, 801, 100)),
    {"step": 800, "train_loss": 0.23},
]
