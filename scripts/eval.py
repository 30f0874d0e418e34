"""Score fine-tuned models beside the one they came from, on records they have not seen.

python scripts/eval.py --model outputs/demo --baseline recipe/demo/base --output_dir outputs/demo-eval
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState

from recipe.config import DataArguments, UserError, parse_arguments
from recipe.console import run_script, visible
from recipe.evaluation.comparison import compare, labels_of
from recipe.evaluation.gates import failures, parse_gate
from recipe.evaluation.generate import EvalArguments, generate_predictions, model_kind, split_names
from recipe.evaluation.headline import choose_headline
from recipe.evaluation.judge.run import JudgeArguments, answers_hash, run_judge
from recipe.evaluation.significance import adjust
from recipe.evaluation.stored import (
    check_scored,
    provenance_of,
    read_judgements,
    read_log,
    read_metrics,
    read_predictions,
    write_metrics,
)
from recipe.evaluation.tables import print_examples, print_scores
from recipe.evaluation.verdict import verdict
from recipe.files import check_place, is_there, sweep
from recipe.lock import hold_folder
from recipe.manifest import check_unchanged
from recipe.peers import meeting_others
from recipe.provenance import read_run


def main(argv: list[str]) -> None:
    with meeting_others():
        state = PartialState(cpu=not torch.accelerator.is_available())
    transformers.logging.set_verbosity_error()  # it warns of end-of-text tokens behind finished answers
    args, data_args, judge_args, run = parse(argv, state)
    gates = [parse_gate(text) for text in args.gate]
    with hold_folder(args.output_dir) if state.is_main_process else nullcontext():
        evaluate(args, data_args, judge_args, run, gates, state)


def evaluate(args, data_args, judge_args, run, gates, state) -> None:
    """The stages that were asked for, one after another."""
    output_dir = Path(args.output_dir)
    if state.is_main_process:
        sweep(output_dir)
    if "generate" in args.stages:
        generate_predictions(args, data_args, run, state)
    state.destroy_process_group()  # what follows is one process's work, and may take longer than a barrier waits
    if not state.is_main_process or args.stages == ["generate"]:
        return
    predictions = read_predictions(output_dir)
    problems: list[str] = []
    if "score" in args.stages:
        score(predictions, output_dir, args.headline)
    if "judge" in args.stages and judge_args.judge:
        problems += judge(predictions, judge_args, output_dir)
    metrics = read_metrics(output_dir)
    check_scored(output_dir, predictions, metrics)
    if "report" in args.stages:
        report(predictions, metrics, output_dir)
    print_scores(metrics)
    print_examples([p for p in predictions if p["split"] == predictions[0]["split"]])
    print(f"\n{visible(verdict(metrics).sentence)}")
    print(f"Report: {output_dir / 'report.html'}   Every answer: {output_dir / 'predictions.jsonl'}")
    problems += failures(gates, metrics)
    if problems:
        raise UserError("\n".join(problems))


def parse(
    argv: list[str], state: PartialState
) -> tuple[EvalArguments, DataArguments, JudgeArguments, dict[str, Any] | None]:
    """The arguments, with the data settings of the model's own training run where no flag says otherwise."""
    types: list[type] = [EvalArguments, DataArguments, JudgeArguments]
    description = (__doc__ or "").split("\n")[0]
    args, data_args, judge_args = parse_arguments(types, argv, description)
    from recipe.adapters import base_of  # here: models take two seconds, and --help needs none
    from recipe.model import check_folder, check_weights

    check_place(args.output_dir)
    run = None
    for name in args.model:
        if model_kind(name) == "weights":
            check_folder(name)
            check_weights(name)
            is_whole = (Path(name) / "config.json").is_file()
            if Path(name).is_dir() and not is_whole and base_of(name) is None:
                raise UserError(
                    f"--model {name}: no finished model is there (no config.json); name a finished run's folder"
                )
            if state.is_main_process:
                check_unchanged(Path(name))
            run = run or read_run(name)
    # no template: each model is asked in its own, if no flag says otherwise
    defaults = {**(run["config"]["data"] if run else {}), "template": ""}
    args, data_args, judge_args = parse_arguments(types, argv, description, defaults, "run.json of the model")
    absent = [name for name in args.model if model_kind(name) == "weights" and not Path(name).is_dir()]
    if data_args.data is None and absent:
        raise UserError(
            f"--model {absent[0]}: no such folder; for a model of the Hub, name the records too: --data FILE"
        )
    if args.baseline is None and args.model and model_kind(args.model[0]) == "weights":
        base = base_of(args.model[0])
        args.baseline = base.name if base else None
    if args.split == ["all"]:  # every record counts, held out or not
        data_args.validation_ratio = data_args.test_ratio = 0.0
    return args, data_args, judge_args, run


def score(predictions: list[dict[str, Any]], output_dir: Path, headline: str | None) -> None:
    """Write metrics.json and keep an earlier judgement if it is of these answers."""
    evaluation = provenance_of(predictions, output_dir)
    if headline not in (None, evaluation.get("headline", headline)):
        raise UserError(f"--headline {headline}: this evaluation was begun with {evaluation['headline']}; leave it out")
    # an earlier version wrote no headline; the references alone decide it
    evaluation.setdefault("headline", choose_headline([prediction["output"] for prediction in predictions]))
    tokenizers = {label: model.get("tokenizer") for label, model in evaluation["models"].items()}
    by_split = {name: [p for p in predictions if p["split"] == name] for name in split_names(predictions)}
    scores = {
        label: {name: compare(rows, model=label, tokenizers=tokenizers) for name, rows in by_split.items()}
        for label in dict.fromkeys(["tuned", *labels_of(predictions)])
        if label != "baseline"
    }
    splits = scores.pop("tuned")
    judged = read_metrics(output_dir)["judge"] if is_there(output_dir / "metrics.json") else None
    metrics = {
        **next(iter(splits.values())),
        "judge": judged
        if judged and judged.get("answers") == answers_hash(predictions, judged.get("labels", ()))
        else None,
        "splits": splits,
        "other_models": scores,
        "provenance": evaluation,
    }
    adjust(metrics)
    write_metrics(output_dir, metrics)


def judge(predictions: list[dict[str, Any]], judge_args: JudgeArguments, output_dir: Path) -> list[str]:
    """Ask the judge about the first split and add its scores to metrics.json; returns what went wrong."""
    metrics = read_metrics(output_dir)
    try:
        judged = run_judge(predictions, judge_args, output_dir)
        metrics["judge"] = judged
        adjust(metrics)
        write_metrics(output_dir, metrics)
        error = judged["error"]
    except UserError as raised:
        error = raised
    if error:
        return [f"the judge was not asked: {error}"]
    if judged["complete"] or judge_args.judge_allow_missing:
        return []
    return [
        f"the judge left scores out, see {output_dir / 'judge.jsonl'}. What can help: {judged['advice']}; "
        "--judge_allow_missing reports means without them"
    ]


def report(predictions: list[dict[str, Any]], metrics: dict[str, Any], output_dir: Path) -> None:
    """Write report.html, with the loss curve of the tuned model's training run if its folder is here."""
    from recipe.evaluation.report.page import write_report  # here: matplotlib takes half a second

    tuned = Path(metrics["provenance"]["models"]["tuned"]["name"])
    run, path = read_run(tuned), tuned / "trainer_state.json"
    known = run and not tuned.name.startswith("checkpoint-")  # a checkpoint's log is another, which its manifest knows
    state = read_log(path, run.get("log_hash") if known else None) if run else {}
    kept_best = known and run["config"]["training"].get("load_best_model_at_end")
    step = state.get("best_global_step" if kept_best else "global_step")
    judge_rows = read_judgements(output_dir, metrics.get("judge"))
    write_report(output_dir, predictions, metrics, judge_rows, state.get("log_history"), step)


if __name__ == "__main__":
    kept = "all answers so far are kept; the same command, without --overwrite_output_dir, resumes"
    run_script(main, interrupted=kept, after_os_error=f"; once this is fixed, {kept}")
